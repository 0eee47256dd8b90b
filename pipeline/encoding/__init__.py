"""From the images of the index to finished shards."""
