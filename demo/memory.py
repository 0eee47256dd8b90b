"""Keeps freed memory in the process, which makes small CPU training several times faster."""

import ctypes
import platform

# The parameters' numbers in glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Tell glibc not to hand large blocks back to the system.

    A training step frees and takes the same blocks again and again; by default each of them is
    unmapped, mapped and cleared anew. Does nothing where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_TOP_PAD, 2**28)
