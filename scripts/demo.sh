#!/usr/bin/env bash
# From a fresh clone to captions and features: make an environment, install, convert, caption, encode.
# Needs Python 3.10+ on macOS (Apple silicon) or Linux. What it writes goes to demo/.
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# shellcheck disable=SC2119 # it is meant to take no extra
environment
cd "$ROOT"

step() {
    echo
    echo "\$ genlip-mlx $*"
    "$VENV/bin/genlip-mlx" "$@"
}

rm -rf demo
mkdir demo

if [ -f weights/genlip-tiny/config.json ]; then
    model=weights/genlip-tiny
    pictures=demo/scenes
    tokens=160
    note="The captions come from $model, a small model trained on drawn scenes like these and on nothing else.
It reads receipts and charts, with few mistakes; signs and counted shapes it often gets wrong (see its card)."
    step synth --output "$pictures" --split test --size 4 --kinds receipts,bars
else
    model=demo/tiny-navit
    pictures=tests/golden/images
    tokens=24
    note="The weights are RANDOM: a tiny test checkpoint that shows that everything runs. Its captions mean nothing
until there is a trained model in weights/."
    step convert --hf-path tests/golden/tiny-navit --mlx-path "$model"
fi
echo
echo "$note"

step caption "$pictures" --model "$model" --max-tokens "$tokens"
step features "$pictures" --model "$model" --output demo/features.npz

echo
echo "demo/features.npz holds, by name and shape:"
"$VENV/bin/python" - <<'PYTHON'
import numpy as np

with np.load("demo/features.npz") as arrays:
    for name, array in arrays.items():
        print(f"  {name:10} {array.dtype} {list(array.shape)}")
PYTHON
echo
echo "Done: captioned the pictures in $pictures with $model and wrote their features."
echo "$note"
echo "Next: $VENV/bin/genlip-mlx --help"
