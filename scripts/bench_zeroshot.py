"""What zero-shot classification costs, beside the naive way that computes picture and caption anew for each pair.

    python scripts/bench_zeroshot.py [--preset tiny] [--json bench.json]

Random weights of a preset's full size, one picture of 224 x 224 pixels, made-up class names of two and three tokens.
The naive way is timed on some pairs, drawn evenly, and taken to cost as much for all; the scores of those pairs
are compared. The two ways are timed in turn, since machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import genlip_mlx  # first, since it loads OpenBLAS, which must come before mlx

# isort: split
import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from genlip_mlx.analysis.trie import RUN_ROWS, Trie, node_log_probs
from genlip_mlx.config import PRESETS
from genlip_mlx.model.genlip import GenLIP
from genlip_mlx.model.sequence import PackedSequence

GRID = (14, 14)  # 224 x 224 pixels
PAIRS_A_PACK = 16  # of the naive way
SETTINGS = ((100, 1), (1000, 7))  # classes, templates
# Words stand for tokens, {} for a class.
TEMPLATES = (
    "the picture shows a {} .",
    "the picture shows a small {} .",
    "the picture shows a large {} in the middle .",
    "there is a {} .",
    "there is a {} in the background .",
    "a drawing of a {} .",
    "a close view of the {} .",
)
PROMPT_TOKENS = 6
END_TOKENS = 2


def captions(classes: int, templates: int) -> list[list[int]]:
    """Token ids of every class in every template, with the end tokens."""
    ids: dict[str, int] = {}
    texts = []
    for number in range(classes):
        first, second = divmod(number, 25)
        name = [f"first-{first}", f"second-{second}", *(["third"] if number % 2 else [])]
        for template in TEMPLATES[:templates]:
            before, after = template.split(" {} ")
            words = [*before.split(), *name, *after.split(), *(f"end-{i}" for i in range(END_TOKENS))]
            texts.append([ids.setdefault(word, len(ids) + PROMPT_TOKENS) for word in words])
    return texts


def shared(model: GenLIP, patches: mx.array, texts: list[list[int]]) -> np.ndarray:
    """log P of each caption: one prefill, one trie."""
    logits, cache = model.prefill(patches, [GRID])
    logits = model.extend(mx.arange(PROMPT_TOKENS)[None], cache)
    trie = Trie.of(texts)
    return trie.sums(node_log_probs(model, trie, logits, cache))[0]


def naive(model: GenLIP, patches: mx.array, texts: list[list[int]]) -> np.ndarray:
    """log P of each caption: picture, prompt and caption as training reads them, a few pairs packed together."""
    scores = []
    for start in range(0, len(texts), PAIRS_A_PACK):
        pack = texts[start : start + PAIRS_A_PACK]
        full = [[*range(PROMPT_TOKENS), *text] for text in pack]
        sequence = PackedSequence([GRID] * len(pack), [len(text) for text in full])
        features = model.outputs(
            mx.concatenate([patches] * len(pack)), mx.array([i for text in full for i in text]), sequence
        )
        # A sample has a row more than tokens: row k predicts token k.
        ends = np.cumsum([len(text) + 1 for text in full])
        rows = [np.arange(end - 1 - len(text), end - 1) for end, text in zip(ends, pack)]
        targets = mx.array([i for text in pack for i in text])
        logits = model.logits(features[mx.array(np.concatenate(rows))]).astype(mx.float32)
        picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
        lengths = [len(text) for text in pack]
        scores.append(np.add.reduceat(np.array(picked), np.cumsum([0, *lengths[:-1]])))
    return np.concatenate(scores)


def bench(model: GenLIP, classes: int, templates: int, naive_pairs: int) -> dict[str, float]:
    texts = captions(classes, templates)
    patches = mx.random.normal((GRID[0] * GRID[1], model.config.patch_dim))
    some = np.linspace(0, len(texts) - 1, naive_pairs).astype(int)
    chosen = [texts[i] for i in some]
    mx.eval(patches)
    naive(model, patches, chosen[:PAIRS_A_PACK])
    shared(model, patches, texts[:PAIRS_A_PACK])
    seconds: dict[str, list[float]] = {"naive": [], "shared": []}
    for _ in range(2):
        start = time.perf_counter()
        slow = naive(model, patches, chosen)
        seconds["naive"].append((time.perf_counter() - start) / len(chosen))
        mx.reset_peak_memory()
        start = time.perf_counter()
        quick = shared(model, patches, texts)
        seconds["shared"].append(time.perf_counter() - start)
    pair, whole = min(seconds["naive"]), min(seconds["shared"])
    lengths = [len(text) for text in texts]
    return {
        "classes": classes,
        "templates": templates,
        "captions": len(texts),
        "tokens_a_caption": sum(lengths) / len(texts),
        "trie_rows": len(Trie.of(texts).rows),
        "naive_pairs_timed": naive_pairs,
        "naive_seconds_a_pair": pair,
        "naive_seconds": pair * len(texts),
        "shared_seconds": whole,
        "speed_up": pair * len(texts) / whole,
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
        "largest_difference_nats_a_token": float(np.max(np.abs(slow - quick[some]) / np.array(lengths)[some])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--naive-pairs", type=int, default=32, help="pairs of picture and caption timed the naive way")
    parser.add_argument("--json", help="write the figures to this file too")
    options = parser.parse_args()
    gpu = mx.default_device().type == mx.DeviceType.gpu
    dtype = getattr(mx, options.dtype or ("bfloat16" if gpu else "float32"))

    model = GenLIP(PRESETS[options.preset])
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    figures = {
        "preset": options.preset,
        "dtype": str(dtype).removeprefix("mlx.core."),
        "device": str(mx.default_device()),
        "blas": genlip_mlx.blas.loaded,
        "mlx": mx.__version__,
        "run_rows": RUN_ROWS,
        "settings": [bench(model, *setting, options.naive_pairs) for setting in SETTINGS],
    }

    console = Console()
    console.print(f"{options.preset}, random weights, {figures['dtype']}, {figures['device']}, one 224 x 224 picture")
    table = Table(
        "classes x templates", "naive, s *", "shared, s", "speed-up", "rows / tokens", "peak GB", "difference"
    )
    for row in figures["settings"]:
        table.add_row(
            f"{row['classes']} x {row['templates']}",
            f"{row['naive_seconds']:.1f}",
            f"{row['shared_seconds']:.2f}",
            f"{row['speed_up']:.0f}",
            f"{row['trie_rows']} / {row['captions'] * row['tokens_a_caption']:.0f}",
            f"{row['peak_memory_gb']:.2f}",
            f"{row['largest_difference_nats_a_token']:.1e}",
        )
    console.print(table)
    console.print(
        f"* {options.naive_pairs} pairs timed and all reckoned from them; difference: of their scores, nats a token"
    )
    console.print("rows / tokens: rows of the trie that are computed, for all captions' tokens")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
