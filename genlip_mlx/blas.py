"""OpenBLAS, and memory that is kept, for MLX on Linux CPUs.

MLX's Linux CPU wheel links the reference BLAS, about 50 times slower in float32 than OpenBLAS.
A BLAS whose symbols are global before ``mlx.core`` is loaded takes its place, so the package
calls `preload` first thing. ``GENLIP_MLX_BLAS=off`` turns it off.

MLX takes each result's memory from malloc anew. By default glibc gives megabytes back to the system at
once, and the page faults of getting them again cost an encoder a tenth of its time.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT_BYTES = 512 * 2**20  # free memory at the top of the heap that is not given back
_LARGEST_KEPT = 32 * 2**20  # the most glibc allows for blocks that come from the heap

_LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
loaded: str | None = None  # the library in use, None where MLX uses its own


def preload() -> None:
    """Load OpenBLAS into the process's global symbols, if this is Linux and the system has one; keep freed memory."""
    global loaded
    wanted = os.environ.get("GENLIP_MLX_BLAS", "on").lower() not in ("off", "0", "no", "false")
    if not wanted or not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return
    for name in _LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        loaded = name
        break
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; other C libraries do without
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
