"""Layouts of the files of texts: what is a record in each, and what its fields mean."""
