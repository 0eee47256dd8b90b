"""What a training stage does: on captions, on conversations, and without any text."""
