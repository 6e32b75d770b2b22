"""OpenBLAS for MLX on Linux CPUs.

MLX's Linux CPU wheel links the reference BLAS, about 50 times slower in float32 than OpenBLAS.
A BLAS whose symbols are global before ``mlx.core`` is loaded takes its place, so the package
calls `preload` first thing. ``GENLIP_MLX_BLAS=off`` turns it off.
"""

from __future__ import annotations

import ctypes
import os
import sys

_LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
loaded: str | None = None  # the library in use, None where MLX uses its own


def preload() -> None:
    """Load OpenBLAS into the process's global symbols, if this is Linux and the system has one."""
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
        return
