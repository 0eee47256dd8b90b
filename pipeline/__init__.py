"""Everything before training: fetch, index, decode, encode, extract."""
