"""From annotation files and image files to the tables of the index."""
