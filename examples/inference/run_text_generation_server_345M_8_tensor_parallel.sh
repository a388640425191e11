#!/usr/bin/env bash
# Serve the model of examples/gpt3/train_gpt3_345m.sh, each layer spread over 8 GPUs, from a checkpoint of any layout.
#
#   bash run_text_generation_server_345M_8_tensor_parallel.sh CHECKPOINTS VOCAB.json MERGES.txt [further flags]
set -euo pipefail

if (($# < 3)); then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
CHECKPOINTS=$1 VOCAB=$2 MERGES=$3
shift 3
PROGRAM=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/tools/run_text_generation_server.py

torchrun --standalone --nproc-per-node 8 "$PROGRAM" \
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --sequence-parallel \
    --load "$CHECKPOINTS" \
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --max-position-embeddings 1024 --seq-length 1024 \
    --tokenizer-type GPT2BPETokenizer --vocab-file "$VOCAB" --merge-file "$MERGES" \
    --bf16 --seed 42 "$@"
