#!/usr/bin/env bash
# Tokenize a large corpus as an array job: one task cuts the input, each partition is a task, one task joins them.
#
#   INPUT='/data/raw/*.jsonl.zst' OUTPUT_PREFIX=/data/tokens/corpus PARTITIONS=64 bash examples/data/preprocess_slurm.sh \
#       --append-eod --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt
#
# Arguments go to tools/preprocess_data.py. Add `--partition-by files` where the input is many files already: then nothing is
# copied and the first task has nothing to do. Every step can be run again by hand, on any scheduler, by its --only; with
# --resume a partition that is complete is kept. Without sbatch the steps run here, one after another.
set -euo pipefail
: "${INPUT:?files, a pattern or a folder}" "${OUTPUT_PREFIX:?start of the names of the token files}"
PARTITIONS="${PARTITIONS:-8}" WORKERS="${WORKERS:-8}"
ROOT="$(cd "$(dirname "$0")/../.." && pwd)"

# The pattern stays quoted: the program finds the files, in the same order in every task.
COMMAND=(python "$ROOT/tools/preprocess_data.py" --input "$INPUT" --output-prefix "$OUTPUT_PREFIX"
    --partitions "$PARTITIONS" --workers "$WORKERS" --resume "$@")

if ! command -v sbatch >/dev/null; then
    "${COMMAND[@]}" --only split
    for ((i = 0; i < PARTITIONS; i++)); do
        "${COMMAND[@]}" --only "$i"
    done
    "${COMMAND[@]}" --only merge
    exit
fi

quoted="$(printf '%q ' "${COMMAND[@]}")"
options=(--parsable --ntasks 1 --cpus-per-task "$WORKERS")
split="$(sbatch "${options[@]}" --wrap "$quoted --only split")"
array="$(sbatch "${options[@]}" --array "0-$((PARTITIONS - 1))" --dependency "afterok:$split" \
    --wrap "$quoted --only \$SLURM_ARRAY_TASK_ID")"
sbatch "${options[@]}" --dependency "afterok:$array" --wrap "$quoted --only merge"
