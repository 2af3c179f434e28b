#!/usr/bin/env bash
# Install requirements.lock and the lock files named into the Python that `python` starts; each file is checked by its hash.
#   scripts/install.sh                                              # what runs
#   scripts/install.sh infra/locks/extras.lock requirements-dev.lock
# TORCH=cpu takes torch's build without GPU libraries, from TORCH_INDEX. TORCH=gpu takes PyPI's build with them. Without
# either, a Linux machine that has no NVIDIA driver tries the first, which is 3 GB smaller, and falls back on the second.
set -euo pipefail
cd "$(dirname "$0")/.."

install() {
    python -m pip install --quiet --disable-pip-version-check --require-hashes --no-build-isolation "$@"
}

install_cpu_torch() {
    install --no-deps --no-warn-conflicts --retries 1 -r infra/locks/torch-cpu.lock \
        --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
}

build=${TORCH:-gpu}
if [ -z "${TORCH:-}" ] && [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    install_cpu_torch && build=cpu || echo "taking PyPI's build of torch, with its GPU libraries"
elif [ "$build" = cpu ]; then
    install_cpu_torch
fi

locks=(-r requirements.lock)
[ "$build" = cpu ] || locks+=(-r infra/locks/gpu.lock)
for lock in "$@"; do locks+=(-r "$lock"); done

# Source distributions are built with the setuptools of the lock, which is there first.
sed -nE '/^(pip|setuptools)==/,/[^\\]$/p' requirements.lock | install --no-warn-conflicts -r /dev/stdin
install "${locks[@]}"
