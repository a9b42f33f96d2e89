#!/usr/bin/env bash
# Creates the virtual environment $1 (unless it stands) and fills it with the tested set of packages and EightGig itself.
# PYTHON=/path/to/python chooses the interpreter; otherwise the first of the candidates that will do is taken.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

candidates=(python3.11 python3.12 python3.13 python3.14 python3 python)
if [ -n "${PYTHON:-}" ]; then
    candidates=("$PYTHON")
fi

find_python() {
    local candidate
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    cat >&2 <<-END
	found: no Python 3.11 or newer with the modules venv and ensurepip (tried ${candidates[*]})
	expected: one of these; on Debian and Ubuntu the packages python3 and python3-venv
	next: install it, or name another: make test PYTHON=/path/to/python
	END
    return 1
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" # clear: what an interrupted set-up left behind has no pip
fi
pip_install=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --quiet)

"${pip_install[@]}" --upgrade "pip>=25.1" # the first pip that knows --group
scripts/install_torch.sh "$venv"
echo "installing EightGig, the libraries it stands on and its tools (about 100 MB)"
"${pip_install[@]}" --constraint constraints.txt --editable . --group dev
