"""Image files: where they lie, which name means which, and their pixels."""
