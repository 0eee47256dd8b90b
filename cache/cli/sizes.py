"""How a number of bytes is written for a human."""

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def human_size(num_bytes: int) -> str:
    """Return a size in the largest unit of which there is at least one: "1.5 GiB", "12 bytes"."""
    exponent = min(max(0, num_bytes.bit_length() - 1) // 10, len(UNITS) - 1)
    if not exponent:
        return f"{num_bytes} bytes"
    return f"{num_bytes / 2 ** (10 * exponent):.1f} {UNITS[exponent]}"
