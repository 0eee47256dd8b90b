"""Keeps freed memory in the process, which makes small training on a CPU several times faster."""

import ctypes
import platform

# Numbers of the parameters in glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Keep glibc from returning large blocks to the system; does nothing with another C library.

    Every training step allocates the same blocks again; by default each of them is unmapped, mapped
    and cleared.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_TOP_PAD, 2**28)
