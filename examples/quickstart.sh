#!/usr/bin/env bash
# From text to a trained GPT: run this once with nothing installed, and read what it prints as a tutorial.
#
#   bash examples/quickstart.sh [FOLDER]        everything is written to FOLDER (default: quickstart)
#
# It makes .venv unless a virtual environment is active, installs the package, learns a vocabulary on the corpus in
# examples/data, trains a GPT on four processes, stops half-way, resumes, and lets the model write. On two cores and no
# GPU that takes about five minutes after installation. Interrupted? Run it again: finished steps are skipped, and
# training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source requirements/environment.sh
use_environment mlm

OUT=${1:-quickstart}
ITERATIONS=${ITERATIONS:-360}
STOP_AT=$((ITERATIONS / 2))
RANKS=4
DATA=$OUT/corpus_text_document
mkdir -p "$OUT"
SECONDS=0

# Four ranks share the cores; more threads than that only get in each other's way.
CORES=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > RANKS ? CORES / RANKS : 1))}
if python -c "import sys, torch; sys.exit(not 0 < torch.cuda.device_count() < $RANKS)"; then
    echo "Fewer than $RANKS GPUs: this example runs on the CPU instead."
    export CUDA_VISIBLE_DEVICES=
fi

heading() { printf '\n== %s\n' "$*"; }
show() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
}
run() {
    show "$@"
    "$@"
}
logged() { # logged FILE COMMAND...: the long list of all settings goes to the file only
    local log=$1
    shift
    show "$@"
    "$@" 2>&1 | tee -a "$log" | sed -u '/--- arguments ---/,/--- end of arguments ---/d'
}
reached() { # iteration of the last complete checkpoint
    cat "$OUT/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0
}

heading "1. The corpus as JSON lines, one document a line"
[[ -s $OUT/corpus.jsonl ]] || run python examples/data/corpus_to_jsonl.py "$OUT/corpus.jsonl"

heading "2. A byte-pair vocabulary learned from it"
[[ -s $OUT/vocab/vocab.json ]] ||
    run python tools/train_bpe.py --input "$OUT/corpus.jsonl" --vocab-size 4096 --output-dir "$OUT/vocab"
TOKENIZER=(
    --tokenizer-type GPT2BPETokenizer --vocab-file "$OUT/vocab/vocab.json" --merge-file "$OUT/vocab/merges.txt"
)

heading "3. The documents as token ids in a binary file"
[[ -s $DATA.idx && -s $DATA.bin ]] ||
    run python tools/preprocess_data.py --input "$OUT/corpus.jsonl" --output-prefix "$OUT/corpus" \
        "${TOKENIZER[@]}" --append-eod --workers "$CORES"

TRAIN=(
    torchrun --standalone --nproc-per-node "$RANKS" pretrain_gpt.py
    --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer
    --overlap-grad-reduce --overlap-param-gather --cross-entropy-loss-fusion
    --num-layers 4 --hidden-size 256 --num-attention-heads 8 --seq-length 256 --max-position-embeddings 256
    --position-embedding-type rope --normalization RMSNorm --swiglu --ffn-hidden-size 704 --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 4 --global-batch-size 8 --train-iters "$ITERATIONS"
    --lr 3e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.1 --adam-beta2 0.95
    "${TOKENIZER[@]}" --data-path "$DATA" --split 90,8,2 --num-workers 0
    --log-interval 20 --eval-interval 100 --eval-iters 8 --save-interval 60
    --save "$OUT/checkpoints" --load "$OUT/checkpoints" --tensorboard-dir "$OUT/tensorboard"
)

heading "4. Training on $RANKS processes, tensor parallel 2 x data parallel 2, up to a stop at iteration $STOP_AT"
(($(reached) >= STOP_AT)) || logged "$OUT/train.log" "${TRAIN[@]}" --exit-interval "$STOP_AT"

heading "5. The same command goes on from the last checkpoint to iteration $ITERATIONS"
(($(reached) >= ITERATIONS)) || logged "$OUT/train.log" "${TRAIN[@]}"

heading "6. What it has learned, against a model that knows only how frequent each token is"
run python tools/unigram_entropy.py --data-path "$DATA" | tee "$OUT/entropy.txt"
ENTROPY=$(sed -n 's/^unigram entropy: \([0-9.]*\) .*/\1/p' "$OUT/entropy.txt")
run python tools/plot_metrics.py --metrics "$OUT/checkpoints/metrics.jsonl" --output "$OUT/loss.png" \
    --reference "$ENTROPY" --reference-name "unigram entropy"

heading "7. One process lets the model write, from the checkpoint of four"
logged "$OUT/generate.log" python tools/generate_text.py --load "$OUT/checkpoints" --use-checkpoint-args \
    "${TOKENIZER[@]}" --prompts "The whale" "Fellow-citizens of the Senate and" \
    --num-tokens-to-generate 60 --temperature 0.8 --top_k 40

heading "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Everything is in $(cd "$OUT" && pwd):"
cat <<END
  loss.png                 the loss curve
  tensorboard/             the same for: tensorboard --logdir $OUT/tensorboard
  checkpoints/             what can be resumed, loaded into other layouts, and written with
  checkpoints/metrics.jsonl, train.log, generate.log     numbers and full logs
  corpus.jsonl, vocab/, corpus_text_document.bin, .idx   the data, step by step
END
