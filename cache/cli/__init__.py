"""The frame of a command: arguments, errors, exit codes, interruption."""
