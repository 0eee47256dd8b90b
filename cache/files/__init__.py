"""Files: written whole or not at all, and read without trust where they come from others."""
