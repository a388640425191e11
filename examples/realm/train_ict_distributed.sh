#!/usr/bin/env bash
# Retrieval of BERT-base's size: pretrains the two encoders by the inverse cloze task from a BERT, then embeds all blocks.
#
#   bash train_ict_distributed.sh BERT CHECKPOINTS VOCAB.txt DATA_PREFIX [further flags of pretrain_ict.py]
set -euo pipefail

if (($# < 4)); then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
BERT=$1 CHECKPOINTS=$2 VOCAB=$3 DATA=$4
shift 4
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

LAUNCH=(
    torchrun
    --nproc-per-node "${GPUS_PER_NODE:-8}"
    --nnodes "${NUM_NODES:-1}"
    --node-rank "${NODE_RANK:-0}"
    --master-addr "${MASTER_ADDR:-localhost}"
    --master-port "${MASTER_PORT:-6000}"
)

MODEL=(
    --num-layers 12
    --hidden-size 768
    --num-attention-heads 12
    --seq-length 256
    --max-position-embeddings 256
    --ict-head-size 128
    --bf16
)

DATASET=(
    --data-path "${DATA}_text_sentence"
    --titles-data-path "${DATA}_title_sentence"
    --tokenizer-type BertWordPieceLowerCase
    --vocab-file "$VOCAB"
)

TRAINING=(
    --bert-load "$BERT"
    --micro-batch-size 128
    --train-iters 100000
    --lr 0.0001
    --lr-decay-style linear
    --lr-warmup-fraction .01
    --weight-decay 1e-2
    --clip-grad 1.0
    --query-in-block-prob 0.1
    --retriever-report-topk-accuracies 1 5 20 100
    --use-distributed-optimizer
)

OUTPUT=(
    --log-interval 100
    --eval-interval 1000
    --eval-iters 10
    --save-interval 3000
    --save "$CHECKPOINTS"
    --load "$CHECKPOINTS"
)

if [[ -z ${ONLY_INDEX:-} ]]; then
    "${LAUNCH[@]}" "$ROOT/pretrain_ict.py" "${MODEL[@]}" "${DATASET[@]}" "${TRAINING[@]}" "${OUTPUT[@]}" "$@"
fi
exec "${LAUNCH[@]}" "$ROOT/tools/create_doc_index.py" "${MODEL[@]}" "${DATASET[@]}" \
    --ict-load "$CHECKPOINTS" --block-data-path "$CHECKPOINTS/embedded_blocks.pkl"
