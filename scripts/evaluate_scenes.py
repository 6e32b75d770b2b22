"""What a model states of synthetic scenes it has not seen: shapes, colours and counts, and the text it reads.

    python scripts/evaluate_scenes.py MODEL [MODEL ...] [--size 500] [--json scores.json]

Captions are greedy. Shares are of the groups that are there; the character error rate is the edit distance to the
printed text over its length. NLL is in nats a label token, over the same scenes; first token is the share of
patches' attention that goes to the first patch, in the block where it is largest.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import genlip_mlx  # first, since it loads OpenBLAS, which must come before mlx

# isort: split
from rich.console import Console
from rich.progress import track
from rich.table import Table

from genlip_mlx.analysis.attention import allocation
from genlip_mlx.analysis.evaluation import evaluate
from genlip_mlx.data.scoring import score, summary
from genlip_mlx.data.sources import open_source
from genlip_mlx.data.synthetic import LAYOUTS, SCENES, Scene, Scenes
from genlip_mlx.generate import captions

PARTS = (*LAYOUTS, *SCENES)
ATTENDED = 100  # scenes whose attention is looked at


def measure(model: str, scenes: list[Scene], batch_size: int) -> dict[str, Any]:
    loaded, processor = genlip_mlx.load(model)
    # Like sizes together, so that batches hold little padding.
    order = sorted(range(len(scenes)), key=lambda i: scenes[i].image.size)
    pictures = [scenes[i].image for i in order]
    results = captions(loaded, processor, pictures, batch_size=batch_size, max_tokens=160)
    spoken = dict(zip(order, track(results, total=len(scenes), description=model, transient=True)))
    scores = [score(scene.facts, spoken[i].caption or "") for i, scene in enumerate(scenes)]
    parts = {
        part: summary(s for s, scene in zip(scores, scenes) if part in (scene.layout, scene.kind)) for part in PARTS
    }
    examples = [{"kind": s.kind, "truth": s.caption, "spoken": spoken[i].caption} for i, s in enumerate(scenes[:8])]

    source = open_source(f"synth:test:{len(scenes)}")
    shares = allocation(loaded, processor, islice((source[i] for i in range(len(source))), ATTENDED))
    total = {
        **summary(scores),
        "nll": evaluate(loaded, processor, source).nll,
        "first_token": float(shares.vision_to_first.max()),
    }
    return {"model": model, "all": total, **parts, "attention": shares.to_dict(), "examples": examples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folder or hub repo")
    parser.add_argument("--size", type=int, default=500, help="scenes of the test split")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", help="write scores and some captions to this file too")
    options = parser.parse_args()
    scenes = [*Scenes("test", size=options.size)]
    figures = [measure(model, scenes, options.batch_size) for model in options.models]
    for row in figures:
        names = [name for name, value in row["all"].items() if isinstance(value, float)]
        header = (name.replace("_", " ") for name in names)
        table = Table("", *header, title=row["model"], title_justify="left", box=None)
        for part in ("all", *PARTS):
            numbers = [row[part].get(name) for name in names]
            table.add_row(part, *("-" if x is None else f"{x:.3f}" for x in numbers))
        Console().print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
