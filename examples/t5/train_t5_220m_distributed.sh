#!/usr/bin/env bash
# T5 of base size, 220 million parameters, on one node (or several): data parallel over the GPUs.
#
#   bash train_t5_220m_distributed.sh CHECKPOINTS TENSORBOARD VOCAB.txt DATA_PREFIX [further flags]
set -euo pipefail

if (($# < 4)); then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
CHECKPOINTS=$1 TENSORBOARD=$2 VOCAB=$3 DATA=$4
shift 4
PROGRAM=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/pretrain_t5.py

LAUNCH=(
    torchrun
    --nproc-per-node "${GPUS_PER_NODE:-8}"
    --nnodes "${NUM_NODES:-1}"
    --node-rank "${NODE_RANK:-0}"
    --master-addr "${MASTER_ADDR:-localhost}"
    --master-port "${MASTER_PORT:-6000}"
)

MODEL=(
    --encoder-num-layers 12
    --decoder-num-layers 12
    --hidden-size 768
    --num-attention-heads 12
    --kv-channels 64
    --ffn-hidden-size 3072
    --encoder-seq-length 512
    --decoder-seq-length 128
    --max-position-embeddings 512
    --vocab-extra-ids 100
)

TRAINING=(
    --micro-batch-size 64
    --global-batch-size 512
    --train-iters 1000000
    --lr 1.0e-4
    --min-lr 1.0e-5
    --lr-decay-style linear
    --lr-decay-iters 1000000
    --lr-warmup-fraction 0.01
    --weight-decay 1.0e-2
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
    --tokenizer-type BertWordPieceLowerCase
    --vocab-file "$VOCAB"
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
