"""From the tables of the index to packed batches of tokens and features."""
