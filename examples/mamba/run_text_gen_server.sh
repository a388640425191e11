#!/usr/bin/env bash
# Serve a model that train.sh has trained, on one node: http://localhost:5000, routes as in docs/inference.md.
#
#   bash run_text_gen_server.sh 800M|8B CHECKPOINTS TOKENIZER.model [further flags]
set -euo pipefail

if (($# < 3)) || [[ $1 != 800M && $1 != 8B ]]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
SCALE=$1 CHECKPOINTS=$2 TOKENIZER=$3
shift 3
PROGRAM=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/tools/run_mamba_text_generation_server.py

case $SCALE in
800M) RANKS=1 LAYOUT=(--tensor-model-parallel-size 1) ;;
8B) RANKS=4 LAYOUT=(--tensor-model-parallel-size 4 --sequence-parallel) ;;
esac

MODEL=(
    --spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec
    --load "$CHECKPOINTS"
    --use-checkpoint-args
    --bf16
    --tokenizer-type GPTSentencePieceTokenizer
    --tokenizer-model "$TOKENIZER"
)

exec torchrun --standalone --nproc-per-node "$RANKS" "$PROGRAM" "${LAYOUT[@]}" "${MODEL[@]}" \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" "$@"
