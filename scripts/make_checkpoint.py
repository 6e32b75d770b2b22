#!/usr/bin/env python3
"""Write a checkpoint with random weights, of any size, in the published layout.

    python scripts/make_checkpoint.py --preset L16 --out random-L16

For measuring conversion, captioning and encoding at full size without a download. Tensors are drawn as
pretraining initialises them, one at a time and a slice at a time, so memory stays near the largest
tensor's size. The same seed gives the same numbers, whatever the dtype they are rounded to.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

from genlip_mlx import PRESETS, GenLIPConfig  # first of all packages: it loads OpenBLAS for MLX

# isort: split
import mlx.core as mx
import numpy as np

from genlip_mlx.checkpoint.lazy import DTYPES, LazyTensor
from genlip_mlx.checkpoint.names import expected_shapes, published
from genlip_mlx.checkpoint.writing import PREPROCESSOR_FILE, copy_processor, model_folder, write_json, write_weights
from genlip_mlx.processing.images import ImageProcessor

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "tiny-navit"
SLICE = 1 << 24  # numbers drawn at a time, 64 MB in float32

# Fields that published files carry and that change nothing here.
PUBLISHED_FIELDS = {
    "attention_dropout": 0.0,
    "llm_decoder": None,
    "spatial_merge_size": 1,
    "tie_word_embeddings": False,
    "tokens_per_second": 2,
    "use_liger_kernel": False,
    "use_llm_head": False,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}


def draw(name: str, shape: tuple[int, ...], dtype: mx.Dtype, config: GenLIPConfig, seed: int) -> mx.array:
    """One tensor of a fresh model, in our layout.

    Attention projections are Xavier uniform, other matrices normal with `initializer_range`, biases 0,
    LayerNorm weights 1, LayerScale `ls_init_value`.
    """
    if name.endswith(".bias"):
        return mx.zeros(shape, dtype)
    if name.endswith(".lambda1"):
        return mx.full(shape, config.ls_init_value, dtype)
    if len(shape) == 1:
        return mx.ones(shape, dtype)

    # A stream of its own for each tensor: the order in which they are written does not matter.
    random = np.random.default_rng([seed, *name.encode()])
    bound = math.sqrt(6 / sum(shape))
    rows = max(1, SLICE // shape[1])
    slices = []
    for start in range(0, shape[0], rows):
        size = (min(rows, shape[0] - start), shape[1])
        if ".self_attn." in name:
            numbers = random.random(size, dtype=np.float32) * np.float32(2 * bound) - np.float32(bound)
        else:
            numbers = random.standard_normal(size, dtype=np.float32) * np.float32(config.initializer_range)
        slices.append(mx.array(numbers).astype(dtype))
        mx.eval(slices[-1])
    return mx.concatenate(slices) if len(slices) > 1 else slices[0]


def published_config(config: GenLIPConfig, dtype: str) -> dict[str, object]:
    """config.json as it is on the hub, which leaves out the width of the text embedding."""
    content = PUBLISHED_FIELDS | config.to_dict() | {"torch_dtype": dtype}
    for left_out in ("text_embed_dim", "layer_norm_eps"):
        del content[left_out]
    return content


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write a checkpoint with random weights, of any size, in the published layout."
    )
    parser.add_argument("--preset", required=True, choices=PRESETS)
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--tokenizer", default=GOLDEN, type=Path, help="folder whose tokenizer files are copied")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--native", default=True, action="store_true", help="native aspect ratio (default)")
    pictures.add_argument("--fixed", dest="native", action="store_false", help="fixed 224x224")
    arguments = parser.parse_args()

    config, dtype = PRESETS[arguments.preset], DTYPES[arguments.dtype]
    tensors = {
        name: LazyTensor(shape, dtype, partial(draw, name, shape, dtype, config, arguments.seed))
        for name, shape in expected_shapes(config).items()
    }
    try:
        with model_folder(arguments.out) as folder:
            copy_processor(arguments.tokenizer, folder, vision_only=False)
            write_json(folder / PREPROCESSOR_FILE, ImageProcessor(native=arguments.native).to_dict())
            write_json(folder / "config.json", published_config(config, arguments.dtype))
            write_weights(folder, published(tensors, config), format="pt")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{arguments.out}: {arguments.preset}, {sum(math.prod(t.shape) for t in tensors.values()):,} random numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
