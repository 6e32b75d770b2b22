#!/usr/bin/env bash
# The paper's questions at a size for a desk: does the gate help, does stage 2, does width? Three widths, with and without
# the gate, both stages, on synthetic scenes, all with the same steps: twelve runs in runs/replication, resumed if they
# were stopped, then a table in runs/replication/table.md. STEPS=400 of stage 1 (half as many of stage 2) take about an
# hour on one CPU core; more of them show more.
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment train
cd "$ROOT"
PATH=$VENV/bin:$PATH

steps=${STEPS:-400}
scenes=${SCENES:-100}
out=runs/replication
[ -d tokenizer ] || genlip-mlx tokenizer train --data synth:train:20000 --vocab-size 640 --output tokenizer

runs=()
for width in 64 128 192; do
    for gate in true false; do
        name=$out/$width-$gate
        pretrain "$name-stage1" --recipe tiny-stage1 --set iters="$steps" \
            --set model_config.hidden_size="$width" --set model_config.num_attention_heads=$((width / 64)) \
            --set model_config.intermediate_size=$((width * 8 / 3)) --set model_config.gated_attention="$gate"
        pretrain "$name-stage2" --recipe tiny-stage2 --set iters=$((steps / 2)) --set init_from="$name-stage1"
        runs+=("$name-stage1" "$name-stage2")
    done
done
for run in "${runs[@]}"; do
    [ -f "$run/probe.json" ] || genlip-mlx probe --model "$run" --data synth:1500 --label colour --output "$run/probe.json"
done
[ -f "$out/scores.json" ] || python scripts/evaluate_scenes.py "${runs[@]}" --size "$scenes" --json "$out/scores.json"

python - "$out" <<'PYTHON' | tee "$out/table.md"
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
print("| width | gate | stage | NLL | linear probe | attentive probe | reading error | attention on the first token |")
print("|---|---|---|---|---|---|---|---|")
for scores in json.loads((out / "scores.json").read_text()):
    run = Path(scores["model"])
    width, gate, stage = run.name.split("-")
    results = json.loads((run / "probe.json").read_text())["results"]
    probes = {result["probe"]: result["test"] for result in results if result["features"] == "model"}
    row = [width, {"true": "yes", "false": "no"}[gate], stage[-1], f"{scores['all']['nll']:.3f}"]
    row += [f"{probes['linear']:.1%}", f"{probes['attentive']:.1%}"]
    row += [f"{scores['all'][key]:.1%}" for key in ("character_error_rate", "first_token")]
    print(f"| {' | '.join(row)} |")
PYTHON
