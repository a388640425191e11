#!/usr/bin/env bash
# A GPT-2-medium-sized model, 345 million parameters, on one node: data parallel over its GPUs.
#
#   bash train_gpt3_345m.sh CHECKPOINTS TENSORBOARD VOCAB.json MERGES.txt DATA_PREFIX [further flags]
set -euo pipefail

if (($# < 5)); then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
CHECKPOINTS=$1 TENSORBOARD=$2 VOCAB=$3 MERGES=$4 DATA=$5
shift 5
PROGRAM=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/pretrain_gpt.py

LAUNCH=(torchrun --standalone --nproc-per-node "${GPUS_PER_NODE:-8}")

MODEL=(
    --num-layers 24
    --hidden-size 1024
    --num-attention-heads 16
    --seq-length 1024
    --max-position-embeddings 1024
)

TRAINING=(
    --micro-batch-size 8
    --global-batch-size 64
    --train-iters 500000
    --lr 1.5e-4
    --min-lr 1.0e-5
    --lr-decay-style cosine
    --lr-decay-iters 320000
    --lr-warmup-fraction 0.01
    --weight-decay 0.01
    --clip-grad 1.0
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --cross-entropy-loss-fusion
    --bf16
)

DATASET=(
    --data-path "$DATA"
    --split 949,50,1
    --tokenizer-type GPT2BPETokenizer
    --vocab-file "$VOCAB"
    --merge-file "$MERGES"
)

OUTPUT=(
    --log-interval 100
    --eval-interval 1000
    --eval-iters 10
    --save-interval 10000
    --save "$CHECKPOINTS"
    --load "$CHECKPOINTS"
    --tensorboard-dir "$TENSORBOARD"
)

exec "${LAUNCH[@]}" "$PROGRAM" \
    "${MODEL[@]}" "${TRAINING[@]}" "${DATASET[@]}" "${OUTPUT[@]}" "$@"
