#!/usr/bin/env bash
# Write requirements.lock (what runs) and requirements-dev.lock (what checks it) from pyproject.toml.
# The lock names exact versions and no index; torch is pinned by its public version, which a CPU-only build satisfies,
# and the GPU libraries that some builds of it bring along are left to that build.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=${TORCH:-torch==2.13.0}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

freeze() {
    "$scratch/venv/bin/python" -m pip freeze --all --exclude-editable --exclude rlhf-pipeline |
        grep -viE '^(nvidia-|cuda-|triton|setuptools|wheel)' | sed -E 's/\+[a-z0-9.]+$//' | LC_ALL=C sort -f
}

python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --upgrade 'pip>=25,<27'
"$scratch/venv/bin/python" -m pip install --quiet "$torch" --editable .
freeze >requirements.lock
"$scratch/venv/bin/python" -m pip install --quiet --group dev
freeze | LC_ALL=C comm -13 <(LC_ALL=C sort requirements.lock) <(LC_ALL=C sort) >requirements-dev.lock || true
