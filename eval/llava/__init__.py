"""The parts of an exported model in the LLaVA layout of transformers."""
