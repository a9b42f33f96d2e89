#!/usr/bin/env bash
# Installs the tested PyTorch into the virtual environment $1: the CPU build where there is no NVIDIA GPU, since the
# default build for Linux brings gigabytes of CUDA libraries. Other systems' default build has none.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
version=$(sed -n 's/^torch==//p' constraints.txt)
cpu_wheels=https://download.pytorch.org/whl/cpu

pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --quiet "$@"
}

installed=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)
if [ "${installed%%+*}" = "$version" ]; then
    exit 0
fi

if [ "$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then
    echo "installing PyTorch $version"
    pip_install "torch==$version"
    exit 0
fi

echo "installing PyTorch $version, CPU build (no NVIDIA GPU found; about 200 MB)"
# First from wherever pip is set up to look, then from PyTorch's own wheels; short waits, since neither may be in reach.
# The packages that PyTorch needs follow with EightGig's, from the usual place.
quickly=(--no-deps --retries 1 --timeout 15)
pip_install "${quickly[@]}" "torch==$version+cpu" 2>/dev/null ||
    pip_install "${quickly[@]}" --index-url "$cpu_wheels" "torch==$version+cpu" 2>/dev/null || {
    echo "PyTorch's CPU wheels are out of reach: installing the default build, which works too but is gigabytes larger" >&2
    pip_install "torch==$version"
}
