#!/usr/bin/env bash
# Train weights/genlip-tiny again: tokenizer, stage 1, course, stage 2, finish, the same without the gate, scores, model
# card. Runs go to runs/ and are resumed if they were stopped. On 2 CPU cores this takes some hours.
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment train
cd "$ROOT"
PATH=$VENV/bin:$PATH

[ -d tokenizer ] || genlip-mlx tokenizer train --data synth:train:20000 --vocab-size 640 --output tokenizer

for twin in "" -ungated; do
    gate=$([ -z "$twin" ] && echo true || echo false)
    pretrain "runs/tiny-stage1$twin" --recipe tiny-stage1 --set model_config.gated_attention="$gate"
    pretrain "runs/tiny-cards$twin" --recipe tiny-cards --set init_from="runs/tiny-stage1$twin"
    pretrain "runs/tiny-stage2$twin" --recipe tiny-stage2 --set init_from="runs/tiny-cards$twin"
    pretrain "runs/tiny-finish$twin" --recipe tiny-finish --set init_from="runs/tiny-stage2$twin"
done

python scripts/tiny_card.py runs --output weights/genlip-tiny
