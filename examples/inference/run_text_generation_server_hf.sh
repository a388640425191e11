#!/usr/bin/env bash
# Serve a Llama, Mistral, Mixtral or GPT-2 of a Hugging Face directory, whose config.json has its shape: no conversion.
#
#   bash run_text_generation_server_hf.sh DIR NUMBER_OF_GPUS [further flags, such as --quantize int8]
set -euo pipefail

if (($# < 2)); then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
DIR=$1 GPUS=$2
shift 2
PROGRAM=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/tools/run_text_generation_server.py

torchrun --standalone --nproc-per-node "$GPUS" "$PROGRAM" \
    --tensor-model-parallel-size "$GPUS" \
    --load "hf:$DIR" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$DIR" \
    --bf16 "$@"
