"""Stores of other machines: where the files are, and how they are copied here."""
