"""The frame of a command: its arguments, its errors, its exit code, its interruption."""
