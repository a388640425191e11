# Sourced by examples/quickstart.sh and tests/run.sh: a virtual environment with the pinned packages, made once.
#
#   use_environment EXTRA
#
# Uses the active virtual environment (venv or conda), else .venv of this repository, which it makes on first use, and
# installs this package into it with EXTRA unless everything is there already. An installed environment needs no
# network. MEGATRON_SKIP_INSTALL=1 takes the active environment as it is (say, a container with its own CUDA torch).

use_environment() {
    local extra=$1 root problem python
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [[ -z "${VIRTUAL_ENV:-}" && -z "${CONDA_PREFIX:-}" && "${MEGATRON_SKIP_INSTALL:-0}" != 1 ]]; then
        if [[ ! -x "$root/.venv/bin/pip" ]]; then
            python=${PYTHON:-python3}
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
                echo "Python 3.10 or newer is needed; $("$python" --version) was found. Set PYTHON=/path/to/python3." >&2
                return 1
            }
            echo "+ $python -m venv .venv"
            "$python" -m venv --clear "$root/.venv" || return 1
        fi
        export VIRTUAL_ENV="$root/.venv" PATH="$root/.venv/bin:$PATH"
        unset PYTHONHOME
        hash -r
    fi
    [[ "${MEGATRON_SKIP_INSTALL:-0}" == 1 ]] && return 0
    if ! problem=$(cd "$root" && python requirements/satisfied.py "$extra"); then
        echo "Installing: $problem"
        echo "+ python -m pip install -c requirements/constraints.txt -e '.[$extra]'"
        (cd "$root" && python -m pip install -q -c requirements/constraints.txt -e ".[$extra]") || {
            echo "The installation failed; it needs a package index that pip can reach, once." >&2
            return 1
        }
    fi
}
