"""What a model folder says of itself: config.json, and a README.md with numbers computed from it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import GenLIPConfig, estimate_parameters
from .hub import is_repo_id
from .lazy import dtype_name
from .quantization import estimate_size, unquantized
from .writing import write_config


def describe(folder: Path, config: GenLIPConfig, dtype: mx.Dtype, name: str, source: str | None) -> None:
    """Write README.md and a config.json that states the weights' type; arguments as `model_card`."""
    write_config(folder, config, dtype)
    (folder / "README.md").write_text(model_card(config, dtype, name, source))


def model_card(config: GenLIPConfig, dtype: mx.Dtype, name: str, source: str | None) -> str:
    """Markdown with the hub's front matter.

    Args:
        dtype: the type of what is not packed.
        name: repo id or folder name, for the examples.
        source: where the weights come from: a repo id, a folder's name, or None if made here.
    """
    task = "image-feature-extraction" if config.vision_only else "image-to-text"
    head = ["---", "library_name: mlx", f"pipeline_tag: {task}", "tags:", "- mlx", "- genlip"]
    if source is not None and is_repo_id(source):
        head.append(f"base_model: {source}")
    origin = f" Made from `{source}`." if source is not None else ""
    facts = "\n".join(f"| {fact} | {value} |" for fact, value in _facts(config, dtype))
    use = _FEATURES if config.vision_only else _CAPTION
    return f"""{chr(10).join(head)}
---

# {name}

A GenLIP model (arXiv 2605.00809) for MLX, to be used with `genlip-mlx`.{origin}

| | |
|---|---|
{facts}

## Use

{use.format(name=name)}"""


_FEATURES = """```sh
genlip-mlx features photo.jpg --model {name} --output features.npz
```

```python
import genlip_mlx

model, processor = genlip_mlx.load("{name}")
features = genlip_mlx.encode(model, processor, ["photo.jpg"])
```
"""

_CAPTION = """```sh
genlip-mlx caption photo.jpg --model {name}
```

```python
import genlip_mlx

model, processor = genlip_mlx.load("{name}")
captions = genlip_mlx.caption(model, processor, ["photo.jpg"])
features = genlip_mlx.encode(model, processor, ["photo.jpg"])
```
"""


def _facts(config: GenLIPConfig, dtype: mx.Dtype) -> list[tuple[str, str]]:
    parts = estimate_parameters(config)
    facts = [
        ("parameters", f"{sum(parts.values()):,}"),
        *((f"of these in {part.replace('_', ' ')}", f"{count:,}") for part, count in parts.items() if count),
        (
            "layers, hidden size, heads",
            f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}",
        ),
        ("type", dtype_name(dtype)),
    ]
    if config.quantization is not None:
        facts.append(("quantization", _quantization(config.quantization)))
        kept = unquantized(config)
        if kept:
            facts.append(("not quantized, by width", f"{len(kept)} layers"))
    facts.append(("size", f"{estimate_size(config, dtype) / 1e6:,.1f} MB"))
    return facts


def _quantization(field: dict[str, Any]) -> str:
    text = f"{field['mode']}, {field['bits']} bits, groups of {field['group_size']}"
    others = Counter(choice["bits"] for choice in field.values() if isinstance(choice, dict))
    return "; ".join([text, *(f"{count} layers at {bits} bits" for bits, count in sorted(others.items()))])
