"""The server of that page, and what it lets through."""
