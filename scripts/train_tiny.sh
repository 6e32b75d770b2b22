#!/usr/bin/env bash
# Train weights/genlip-tiny again: tokenizer, flash cards, stage 1, stage 2, the same without the gate, scores, model card.
# Runs go to runs/ and are resumed if they were stopped. With the gate and without it take some two hours each on one core
# of a CPU, and go on side by side: two runs of one thread use two cores better than one run of two threads.
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment train
cd "$ROOT"
PATH=$VENV/bin:$PATH

[ -d tokenizer ] || genlip-mlx tokenizer train --data synth:train:20000 --vocab-size 640 --output tokenizer

with_gate() {
    pretrain runs/tiny-cards --recipe tiny-cards
    pretrain runs/tiny-stage1 --recipe tiny-stage1
    pretrain runs/tiny-stage2 --recipe tiny-stage2
}

without_gate() {
    pretrain runs/tiny-cards-ungated --recipe tiny-cards --set model_config.gated_attention=false
    pretrain runs/tiny-stage1-ungated --recipe tiny-stage1 --set init_from=runs/tiny-cards-ungated
    pretrain runs/tiny-stage2-ungated --recipe tiny-stage2 --set init_from=runs/tiny-stage1-ungated
}

export OPENBLAS_NUM_THREADS=1
with_gate &
other=$!
without_gate
wait "$other"

python scripts/tiny_card.py runs --output weights/genlip-tiny
