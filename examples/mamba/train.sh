#!/usr/bin/env bash
# The models of "An Empirical Study of Mamba-based Language Models" (arXiv:2406.07887): Mamba-2 hybrids of 800 million
# and of 8 billion parameters, on one node (or several).
#
#   bash train.sh 800M|8B CHECKPOINTS TENSORBOARD TOKENIZER.model DATA_PREFIX [further flags]
set -euo pipefail

if (($# < 5)) || [[ $1 != 800M && $1 != 8B ]]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
SCALE=$1 CHECKPOINTS=$2 TENSORBOARD=$3 TOKENIZER=$4 DATA=$5
shift 5
PROGRAM=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/pretrain_mamba.py

LAUNCH=(
    torchrun
    --nproc-per-node "${GPUS_PER_NODE:-8}"
    --nnodes "${NUM_NODES:-1}"
    --node-rank "${NODE_RANK:-0}"
    --master-addr "${MASTER_ADDR:-localhost}"
    --master-port "${MASTER_PORT:-6000}"
)

case $SCALE in
800M)
    SIZES=(
        --num-layers 48 --hidden-size 1024 --num-attention-heads 16
        --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
        --micro-batch-size 4 --global-batch-size 32 --lr 2.5e-4 --min-lr 2.5e-5
    )
    ;;
8B)
    SIZES=(
        --num-layers 56 --hidden-size 4096 --num-attention-heads 32
        --tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 1
        --micro-batch-size 4 --global-batch-size 8 --lr 2.5e-4 --min-lr 2.5e-5
    )
    ;;
esac

MODEL=(
    --spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec
    --is-hybrid-model
    --mamba-num-groups 8
    --hybrid-attention-ratio 0.08
    --hybrid-mlp-ratio 0.5
    --group-query-attention
    --num-query-groups 8
    --seq-length 4096
    --max-position-embeddings 4096
    --position-embedding-type none
    --squared-relu
    --normalization RMSNorm
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --init-method-std 0.02
    --attention-dropout 0.0
    --hidden-dropout 0.0
)

TRAINING=(
    --train-samples "${SAMPLES:-73242188}"
    --lr-decay-samples "${DECAY_SAMPLES:-73168945}"
    --lr-warmup-samples "${WARMUP_SAMPLES:-73242}"
    --lr-decay-style cosine
    --weight-decay 0.1
    --clip-grad 1.0
    --adam-beta2 0.95
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --cross-entropy-loss-fusion
    --bf16
)

DATASET=(
    --data-path "$DATA"
    --split 99,1,0
    --tokenizer-type GPTSentencePieceTokenizer
    --tokenizer-model "$TOKENIZER"
)

OUTPUT=(
    --log-interval 100
    --eval-interval 2000
    --eval-iters 32
    --save-interval 2000
    --save "$CHECKPOINTS"
    --load "$CHECKPOINTS"
    --tensorboard-dir "$TENSORBOARD"
)

exec "${LAUNCH[@]}" "$PROGRAM" \
    "${SIZES[@]}" "${MODEL[@]}" "${TRAINING[@]}" "${DATASET[@]}" "${OUTPUT[@]}" "$@"
