#!/usr/bin/env bash
# Teach weights/genlip-tiny a kind of picture that it has never seen, price tags: LoRA against full fine-tuning against
# LoRA on 4 bits. Writes finetune-example/, with a table of what each knows before and after, its time and memory.
# On 2 CPU cores this takes half an hour; ITERS=100 gives a first look. Products with 4-bit weights are slow on a
# CPU, so LoRA on these gets a tenth of the steps.
# The captions have words that the model was never shown. Of such words all rows of its head are about the same, and no
# change inside the blocks tells one from another: so LoRA gets the head and the embeddings too.
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment evaluate
cd "$ROOT"
PATH=$VENV/bin:$PATH

base=weights/genlip-tiny
steps=${ITERS:-600}
layers='lora_parameters.keys=[self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.out_proj, mlp.fc1, mlp.gate_fc, mlp.fc2, embeddings, lm_head]'
out=finetune-example
rm -rf "$out"
mkdir "$out"
python scripts/make_price_tags.py "$out/tags"
genlip-mlx quantize --model "$base" --mlx-path "$out/4bit" --q-bits 4 >"$out/quantize.log"

# score NAME MODEL [OPTION...]: how well a model describes the tags it has not seen.
score() {
    local name=$1 model=$2
    shift 2
    genlip-mlx evaluate --model "$model" "$@" --data "$out/tags" --captions 100 --max-tokens 48 \
        --field 'paper=(\w+) price tag' --field 'price=costs ([0-9])' --field 'string=on the (\w+)' \
        --output "$out/$name.json" >/dev/null
}

# learn NAME MODEL OPTION...
learn() {
    local name=$1 model=$2
    shift 2
    echo "== $name"
    genlip-mlx finetune --model "$model" --data "$out/tags" --iters "$steps" --batch-tokens 2048 \
        --steps-per-eval 50 --val-batches 8 --run-dir "$out/runs/$name" "$@"
}

score before "$base"
score before-4bit "$out/4bit"
learn lora "$base" --learning-rate 1e-3 --set "$layers"
score lora "$base" --adapter-path "$out/runs/lora/adapters"
learn lora-4bit "$out/4bit" --learning-rate 1e-3 --set "$layers" --iters $((steps / 10)) --steps-per-eval $((steps / 10))
score lora-4bit "$out/4bit" --adapter-path "$out/runs/lora-4bit/adapters"
learn full "$base" --fine-tune-type full --optimizer muon --learning-rate 2e-3
score full "$out/runs/full"
genlip-mlx fuse --model "$base" --adapter-path "$out/runs/lora/adapters" --mlx-path "$out/fused"

python - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
print(f"\n{'':12} {'nll':>7} {'paper':>6} {'price':>6} {'string':>6} {'steps':>6} {'seconds':>8} {'peak GB':>8} {'learned MB':>10}")
for name in ("before", "before-4bit", "lora", "lora-4bit", "full"):
    scores = json.loads((out / f"{name}.json").read_text())
    fields = [scores["captions"]["fields"][field]["exact_match"] for field in ("paper", "price", "string")]
    line = f"{name:12} {scores['nll']:7.3f} " + " ".join(f"{share:6.0%}" for share in fields)
    run = out / "runs" / name
    if run.is_dir():
        rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
        seconds = sum(row["tokens"] / row["tokens_per_second"] for row in rows)
        peak = max(row["peak_memory_gb"] for row in rows)
        learned = [*run.glob("adapters/adapters.safetensors"), *run.glob("checkpoints/step-*/model.safetensors")][0]
        line += f" {len(rows):6} {seconds:8.0f} {peak:8.2f} {learned.stat().st_size / 1e6:10.2f}"
    print(line)
PYTHON
