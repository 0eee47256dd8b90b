"""The parts of an exported model in transformers' LLaVA format."""
