"""Make weights/genlip-tiny of the runs of scripts/train_tiny.sh: weights, scores, curves and the model card.

    python scripts/tiny_card.py RUNS --output weights/genlip-tiny [--size 500]

RUNS holds tiny-stage1, tiny-cards, tiny-stage2, tiny-finish and their -ungated twins. Every figure of the card is
measured here or read from the runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from evaluate_scenes import PARTS, Scenes, measure  # loads OpenBLAS first

# isort: split
import yaml

from genlip_mlx.checkpoint.convert import convert
from genlip_mlx.checkpoint.hub import best_checkpoint
from genlip_mlx.train.plot import plot, read_metrics

STAGES = {
    "tiny-stage1": "stage 1",
    "tiny-cards": "course",
    "tiny-stage2": "stage 2",
    "tiny-finish": "finish",
}
FINAL = "tiny-finish"  # the run whose model goes into weights/
RUNS = {**STAGES, **{f"{name}-ungated": f"{label}, no gate" for name, label in STAGES.items()}}
ROWS = {
    "nll": "caption NLL, nats a token",
    "shapes": "shapes right",
    "colours": "colours right",
    "counts": "counts right",
    "places": "places right",
    "character_error_rate": "character error rate",
    "first_token": "attention on the first token, largest of the blocks",
}
SHARES = {"shapes", "colours", "counts", "places", "character_error_rate", "first_token"}


def facts(run: Path) -> dict[str, Any]:
    """What a run took."""
    metrics = read_metrics(run)
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    tokens = sum(row["tokens"] for row in metrics)
    # At the median rate: a step during which the machine slept would count for hours.
    seconds = tokens / statistics.median(row["tokens_per_second"] for row in metrics)
    valid = [row["valid_loss"] for row in metrics if "valid_loss" in row]
    return {
        "steps": len(metrics),
        "tokens": tokens,
        "hours": seconds / 3600,
        "seed": recipe["seed"],
        "batch_tokens": recipe["batch_tokens"],
        "learning_rate": recipe["learning_rate"],
        "valid_loss": valid[-1],
        "data_wait": sum(row["data_wait"] for row in metrics) / seconds,
        "peak_memory_gb": max(row["peak_memory_gb"] for row in metrics),
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def show(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}" if name in SHARES else f"{value:.3f}"


def sections(runs: dict[str, dict[str, Any]], scores: dict[str, dict[str, Any]], size: int) -> str:
    """The parts of the card that are about training and results."""
    took = [
        [
            RUNS[name],
            str(f["steps"]),
            f"{f['tokens'] / 1e6:.1f} M",
            f"{f['learning_rate']:g}",
            str(f["seed"]),
            f"{f['hours']:.1f}",
            f"{f['peak_memory_gb']:.2f} GB",
            f"{f['data_wait']:.1%}",
            f"{f['valid_loss']:.3f}",
        ]
        for name, f in runs.items()
    ]
    results = [[label, *(show(key, scores[name]["all"][key]) for name in runs)] for key, label in ROWS.items()]
    for part in (part for part in PARTS if part != "shapes"):  # nothing is written there
        rates = (scores[name][part]["character_error_rate"] for name in runs)
        results.append([f"character error rate, {part}", *(show("character_error_rate", rate) for rate in rates)])
    spoken = "\n\n".join(
        f"- {one['kind']}: {one['truth']}\n- *it says:* {one['spoken']}" for one in scores[FINAL]["examples"][:4]
    )
    return f"""
## Training

From random weights on synthetic scenes (`genlip-mlx synth`) and nothing else: it knows coloured shapes, signs,
receipts, banners and charts as they are drawn there, with type of one size that stands in rows of patches, and no
photograph. `scripts/train_tiny.sh` does all of it again: a SentencePiece vocabulary of 20000 captions, recipe
`tiny-stage1` at a fixed size, `tiny-cards`, a course from flash cards to scenes, `tiny-stage2` on scenes in native
sizes, and `tiny-finish`, the same again in larger batches; and all four with `gated_attention: false`. Each run had
one core of a Linux CPU; hours are its tokens at its median rate.

{table(["run", "steps", "tokens", "learning rate", "seed", "hours", "peak", "waiting for data", "valid loss"], took)}

![Loss, learning rate and gradient norm of the runs](curves.png)

## Results

{size} scenes of the test split, greedy captions (`scripts/evaluate_scenes.py`). Shares are of the groups of shapes in
the pictures; an invented group counts against it.

{table(["", *(RUNS[name] for name in runs)], results)}

The first scenes of the test split, as the finished model describes them:

{spoken}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=500, help="scenes of the test split")
    options = parser.parse_args()
    found = {name: options.runs / name for name in RUNS}
    checkpoints = {name: best_checkpoint(run) for name, run in found.items()}
    missing = [name for name, checkpoint in checkpoints.items() if checkpoint is None]
    if missing:
        parser.error(f"{options.runs}: no run {', '.join(missing)}")

    convert(str(checkpoints[FINAL]), options.output, dtype="bfloat16", overwrite=True)
    scenes = [*Scenes("test", size=options.size)]
    scores = {name: measure(str(checkpoint), scenes, 32) for name, checkpoint in checkpoints.items()}
    runs = {name: facts(run) for name, run in found.items()}
    plot([*found.values()], options.output / "curves.png")
    (options.output / "results.json").write_text(json.dumps({"runs": runs, "scores": scores}, indent=2) + "\n")
    with (options.output / "README.md").open("a") as card:
        card.write(sections(runs, scores, options.size))
    print(options.output)


if __name__ == "__main__":
    main()
