"""Determinism: what is set for the libraries, what is recorded of a machine, and equal bits of trained weights."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tasks.core import determinism
from tasks.core.errors import ConfigError
from tests.conftest import ROOT

TRAIN = """
import hashlib, json, sys
import tasks
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from tasks.models.onednn_linear import freeze_for_onednn, register_frozen_lora
from tasks.rewards.reward_model import MahalanobisOOD
from tasks.rl.masking import whiten
from peft import LoraConfig, get_peft_model

def digest(tensors):
    whole = hashlib.md5()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()

def train(model):
    ids = torch.randint(300, (16, 70), generator=torch.Generator().manual_seed(1))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return digest(weights)

def new():
    torch.manual_seed(0)
    sizes = dict(hidden_size=192, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, num_key_value_heads=2, **sizes))

found = []
for threads in json.loads(sys.argv[1]):
    torch.set_num_threads(threads)
    adapted = new()
    freeze_for_onednn(adapted)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    values = torch.randn(400, 100, generator=torch.Generator().manual_seed(2))
    detector = MahalanobisOOD.fit(values.reshape(200, 200), values[:4].reshape(2, 200))
    found.append({
        "all": train(new()),
        "adapter": train(get_peft_model(adapted, register_frozen_lora(lora))),
        "whitened": digest([whiten(values, values < 2)]),
        "detector": digest([detector.whitening]),
    })
print(json.dumps(found))
"""

FORCED = {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_CBWR": "AUTO"}
has_avx2 = "avx2" in determinism._cpu_info("flags").split()
has_avx512 = "avx512bw" in determinism._cpu_info("flags").split()


def digests(threads: list[int], **variables: str) -> list[dict[str, str]]:
    """For each number of threads, the md5s of what a child trains that starts with these variables."""
    inherited = {key: value for key, value in os.environ.items() if key not in determinism.AVX2_VARIABLES}
    command = [sys.executable, "-W", "ignore", "-c", TRAIN, json.dumps(threads)]
    done = subprocess.run(command, cwd=ROOT, env=inherited | variables, capture_output=True, text=True, check=True)
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not has_avx2, reason="portable needs AVX2")
def test_threads_and_newer_instructions_change_no_bit() -> None:
    one, two, four = digests([1, 2, 4], RLHF_DETERMINISM="portable")
    assert one == two, "1 and 2 threads"
    assert one == four, "1 and 4 threads"
    assert digests([2], RLHF_DETERMINISM="portable", **FORCED) == [one], (
        "what the user's environment asks for is overridden"
    )


@pytest.mark.slow
@pytest.mark.skipif(not has_avx512, reason="this CPU has nothing newer than AVX2 to choose")
def test_without_it_the_instructions_of_this_cpu_give_other_bits() -> None:
    (portable,), (native,) = digests([1], RLHF_DETERMINISM="portable"), digests([1], **FORCED)
    assert all(portable[name] != native[name] for name in ("all", "adapter"))


def test_the_setting_decides_what_the_libraries_are_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(determinism, "CPU_INFO", info)
    monkeypatch.setattr(os, "environ", {"MKL_CBWR": "AUTO", "RLHF_DETERMINISM": "portable"})
    info.write_text("flags\t\t: fpu avx f16c\n")
    determinism.fix_instructions()
    assert (determinism.determinism(), os.environ["MKL_CBWR"]) == ("native", "AUTO"), "AVX2 would crash this CPU"
    info.write_text("model name\t: A: B\nflags\t\t: fpu avx avx2\n\nmodel name\t: C\nflags\t\t: fpu\n")
    del os.environ["RLHF_DETERMINISM"]
    determinism.fix_instructions()
    assert os.environ["MKL_CBWR"] == "AUTO", "native is the default"
    os.environ["RLHF_DETERMINISM"] = "portable"
    determinism.fix_instructions()
    assert os.environ["MKL_CBWR"] == "AVX2,STRICT"
    assert determinism.describe_machine()["cpu"] == "A: B"
    os.environ["RLHF_DETERMINISM"] = "yes"
    with pytest.raises(ConfigError, match="RLHF_DETERMINISM is 'yes': set it to portable or native"):
        determinism.determinism()


def test_the_record_names_what_this_process_computes_with() -> None:
    found = determinism.describe_machine()
    assert found["threads"] == str(torch.get_num_threads())
    assert found["torch"] == torch.__version__
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()


def test_the_record_has_a_digest_of_code_that_a_project_links(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "code" not in determinism.describe_machine()
    for name in ("flows", "tasks"):
        (tmp_path / "installed" / name).mkdir(parents=True)
        (tmp_path / name).symlink_to(tmp_path / "installed" / name)
    monkeypatch.setattr(determinism, "project_root", lambda: tmp_path)
    digests = []
    for text in ("x = 1", "x = 2"):
        (tmp_path / "installed" / "tasks" / "ppo.py").write_text(text)
        digests.append(determinism.describe_machine()["code"])
    assert digests == [hashlib.sha256(text.encode()).hexdigest()[:8] for text in ("x = 1", "x = 2")]
