"""The model: projector and frozen language model, its loss, and generation."""
