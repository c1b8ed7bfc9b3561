"""The C library's allocator, told to reuse what is freed while a checkpoint is read.

glibc takes every large block from the kernel anew, which clears it page by page when it is first
touched. A leaf passes through such blocks on its way from the file, and clearing them took more
time than reading. Elsewhere than on glibc nothing is done.
"""

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them, malloc.h
_BY_DEFAULT = 128 * 1024
_NEVER = 2**30


@contextlib.contextmanager
def reusing() -> Iterator[None]:
    """Within it, freed memory stays with the process; on leaving, what is free is given back."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        set_option, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    set_option(_MMAP_THRESHOLD, _NEVER)
    set_option(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, _BY_DEFAULT)
        set_option(_TRIM_THRESHOLD, _BY_DEFAULT)
        trim(0)
