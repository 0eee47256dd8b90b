"""Ways to read random batches of features, each as its own documentation has it.

Every reader writes its own files once; `open` then gives batches of random rows without end. Their
libraries are in requirements-bench.txt, and imported when a reader is prepared.
"""
