#!/usr/bin/env bash
# GPT-3 with 175 billion parameters (arXiv:2005.14165, table 2.1) on 1024 GPUs: 8-way tensor, 16-way pipeline and 8-way
# data parallel. See README.md beside this file.
#
#   bash train_gpt3_175b_distributed.sh CHECKPOINTS TENSORBOARD VOCAB.json MERGES.txt DATA_PREFIX [further flags]
#
# Run it once on every node, or let Slurm do that:
#   sbatch --nodes=128 --ntasks-per-node=1 --gpus-per-node=8 --wrap "srun bash train_gpt3_175b_distributed.sh ..."
set -euo pipefail

if (($# < 5)); then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
CHECKPOINTS=$1 TENSORBOARD=$2 VOCAB=$3 MERGES=$4 DATA=$5
shift 5
PROGRAM=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/pretrain_gpt.py

# The nodes: Slurm's variables if there are any, else NUM_NODES, NODE_RANK and MASTER_ADDR from the environment.
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-${SLURM_JOB_NUM_NODES:-128}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
if [[ -z "${MASTER_ADDR:-}" && -n "${SLURM_JOB_NODELIST:-}" ]]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi

LAUNCH=(
    torchrun
    --nnodes "$NUM_NODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS_PER_NODE"
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-6000}"
)

MODEL=(
    --num-layers 96
    --hidden-size 12288
    --num-attention-heads 96
    --seq-length 2048
    --max-position-embeddings 2048
    --attention-backend auto
)

PARALLEL=(
    --tensor-model-parallel-size 8
    --pipeline-model-parallel-size 16
    --sequence-parallel
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

# 300 billion tokens. The batch grows from 16 to 1536 sequences over the first 5,859,375 of them, in steps of 16.
TRAINING=(
    --micro-batch-size 1
    --global-batch-size 1536
    --rampup-batch-size 16 16 5859375
    --train-samples 146484375
    --lr 6.0e-5
    --min-lr 6.0e-6
    --lr-decay-style cosine
    --lr-decay-samples 126953125
    --lr-warmup-samples 183105
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
    --init-method-std 0.006
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
    --save-interval 1000
    --save "$CHECKPOINTS"
    --load "$CHECKPOINTS"
    --tensorboard-dir "$TENSORBOARD"
)

exec "${LAUNCH[@]}" "$PROGRAM" \
    "${MODEL[@]}" "${PARALLEL[@]}" "${TRAINING[@]}" "${DATASET[@]}" "${OUTPUT[@]}" "$@"
