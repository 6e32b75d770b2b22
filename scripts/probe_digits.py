"""Probes on handwritten digits: scikit-learn's 1797 pictures of 8 x 8 pixels, a public set that needs no download.

    python scripts/probe_digits.py MODEL [--pixels 128] [--json digits.json]

The digits (UCI's optical recognition of handwritten digits, test part) are enlarged and made RGB. Of each class a
fifth is for validation and a fifth for the test. Prints accuracy on the model's features, on those of a
random-weight model of its shape, and on raw pixels.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from genlip_mlx.cli.main import app


def write_digits(folder: Path, pixels: int) -> None:
    """Class folders of digits, enlarged to pixels x pixels (bicubic), black on white."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target)):
        inside = folder / str(label)
        inside.mkdir(exist_ok=True)
        grey = Image.fromarray((255 - image * 255 / 16).round().astype("uint8"))
        grey.resize((pixels, pixels), Image.Resampling.BICUBIC).convert("RGB").save(inside / f"{number:04d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="model folder or hub repo")
    parser.add_argument("--pixels", type=int, default=128, help="side of the enlarged pictures")
    parser.add_argument("--json", help="write the figures to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder) / "digits", Path(folder) / "cache"
        data.mkdir()
        write_digits(data, options.pixels)
        command = ["probe", "--model", options.model, "--data", str(data), "--baselines", "--cache", str(cache)]
        app([*command, "--output", options.json] if options.json else command)


if __name__ == "__main__":
    main()
