#!/usr/bin/env bash
# Serve a T5 v1.1 of a Hugging Face directory: prompts of up to 512 tokens, answers of up to 256.
#
#   bash run_t5_text_generation_server.sh DIR NUMBER_OF_GPUS [further flags, such as --port 5001]
set -euo pipefail

if (($# < 2)); then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
DIR=$1 GPUS=$2
shift 2
PROGRAM=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/tools/run_t5_text_generation_server.py

torchrun --standalone --nproc-per-node "$GPUS" "$PROGRAM" \
    --tensor-model-parallel-size "$GPUS" \
    --load "hf:$DIR" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$DIR" \
    --max-position-embeddings 512 --decoder-seq-length 256 \
    --bf16 "$@"
