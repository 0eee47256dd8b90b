"""The parts of `bench.gpu`: what is measured on a GPU, and how the results are kept."""
