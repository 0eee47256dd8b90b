"""Side-by-side measurements; each prints a table and writes a JSON file."""
