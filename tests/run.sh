#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, import contract, types, tests. See docs/testing.md.
#
#   bash tests/run.sh                     all of it
#   bash tests/run.sh -m slow             lint and the slow tests
#   bash tests/run.sh tests/unit_tests/x  lint and these tests (arguments go to pytest)
#   bash tests/run.sh -n 0 tests/x        in one process, which a debugger needs
set -euo pipefail
cd "$(dirname "$0")/.."

source requirements/environment.sh
use_environment test

# One thread a process: the tests run several ranks on few cores. No network: a missing file fails at once.
unset PYTHONDONTWRITEBYTECODE  # many processes import the same files
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONHASHSEED=0
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
export CUBLAS_WORKSPACE_CONFIG="${CUBLAS_WORKSPACE_CONFIG:-:4096:8}"

failed=()
check() {
    echo "+ $*"
    "$@" || failed+=("$1")
}

check ruff check .
check ruff format --check .
check lint-imports
check mypy
# Two processes: a test of one rank leaves a core idle, and ranks wait for each other. File by file, so that what a module
# prepares is prepared once; in the order of the folders, which ends with small files.
check python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}" >&2
    exit 1
fi
