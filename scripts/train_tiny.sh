#!/usr/bin/env bash
# Train weights/genlip-tiny again: tokenizer, stage 1, stage 2, the same without the gate, scores, model card.
# Runs go to runs/ and are resumed if they were stopped. On 2 CPU cores this takes some hours.
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment train
cd "$ROOT"
PATH=$VENV/bin:$PATH

[ -d tokenizer ] || genlip-mlx tokenizer train --data synth:train:20000 --vocab-size 640 --output tokenizer

pretrain runs/tiny-stage1 --recipe tiny-stage1
pretrain runs/tiny-stage2 --recipe tiny-stage2
pretrain runs/tiny-stage1-ungated --recipe tiny-stage1 --set model_config.gated_attention=false
pretrain runs/tiny-stage2-ungated --recipe tiny-stage2 --set init_from=runs/tiny-stage1-ungated

python scripts/tiny_card.py runs --output weights/genlip-tiny
