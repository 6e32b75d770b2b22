"""GenLIP on MLX: one Transformer that reads a picture's patches and speaks its caption.

>>> import genlip_mlx
>>> model, processor = genlip_mlx.load("path/or/repo")          # doctest: +SKIP
>>> genlip_mlx.caption(model, processor, ["cat.jpg"])           # doctest: +SKIP
>>> genlip_mlx.encode(model, processor, ["cat.jpg"])            # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import blas

blas.preload()  # before anything imports mlx.core

__version__ = "0.1.0"

_PUBLIC = {
    "load": "checkpoint.load",
    "GenLIP": "model.genlip",
    "GenLIPConfig": "config",
    "PRESETS": "config",
    "Processor": "processing.processor",
    "caption": "generate",
    "encode": "features",
}
__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from .checkpoint.load import load as load
    from .config import PRESETS as PRESETS
    from .config import GenLIPConfig as GenLIPConfig
    from .features import encode as encode
    from .generate import caption as caption
    from .model.genlip import GenLIP as GenLIP
    from .processing.processor import Processor as Processor


def __getattr__(name: str) -> Any:
    # Names resolve on first use, so that importing the package (and `--help`) stays fast.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value
