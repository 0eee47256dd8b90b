"""Files: atomic writes, and careful reading of files from other machines."""
