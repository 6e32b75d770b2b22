"""What a model states of synthetic scenes it has not seen: shapes, colours and counts, and the text it reads.

    python scripts/evaluate_scenes.py MODEL [MODEL ...] [--size 500] [--json scores.json]

Captions are greedy. Shares are of the groups that are there; the character error rate is the edit distance to the
printed text over its length.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import genlip_mlx  # first, since it loads OpenBLAS, which must come before mlx

# isort: split
from rich.console import Console
from rich.progress import track
from rich.table import Table

from genlip_mlx.data.scoring import score, summary
from genlip_mlx.data.synthetic import Scene, Scenes
from genlip_mlx.generate import captions

LAYOUTS = ("square", "tall", "wide")


def evaluate(model: str, scenes: list[Scene], batch_size: int) -> dict[str, Any]:
    loaded, processor = genlip_mlx.load(model)
    # Like sizes together, so that batches hold little padding.
    order = sorted(range(len(scenes)), key=lambda i: scenes[i].image.size)
    pictures = [scenes[i].image for i in order]
    results = captions(loaded, processor, pictures, batch_size=batch_size, max_tokens=160)
    spoken = dict(zip(order, track(results, total=len(scenes), description=model, transient=True)))
    scores = [score(scene.facts, spoken[i].caption or "") for i, scene in enumerate(scenes)]
    by_layout = {layout: summary(s for s, scene in zip(scores, scenes) if scene.layout == layout) for layout in LAYOUTS}
    examples = [{"kind": s.kind, "truth": s.caption, "spoken": spoken[i].caption} for i, s in enumerate(scenes[:8])]
    return {"model": model, "all": summary(scores), **by_layout, "examples": examples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folder or hub repo")
    parser.add_argument("--size", type=int, default=500, help="scenes of the test split")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", help="write scores and some captions to this file too")
    options = parser.parse_args()
    scenes = [*Scenes("test", size=options.size)]
    figures = [evaluate(model, scenes, options.batch_size) for model in options.models]
    names = [name for name, value in figures[0]["all"].items() if isinstance(value, (int, float))]
    table = Table("model", "scenes", *names)
    for row in figures:
        for part in ("all", *LAYOUTS):
            numbers = [row[part].get(name) for name in names]
            table.add_row(row["model"], part, *("-" if x is None else f"{x:.3f}" for x in numbers))
    Console().print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
