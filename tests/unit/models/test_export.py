"""A policy as a plain folder, on a small model; without the project around: tests/pipeline/test_models.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tasks.core.errors import ConfigError, ModelError
from tasks.models import export as export_module
from tasks.models.export import ExportCheck, atomic_folder, export
from tasks.models.loading import load_policy, load_reference, save_weights
from tests.conftest import tiny_model
from tests.support.tiny_stages import write_parts

IDS = torch.tensor([[5, 9, 3, 22, 11]])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def exported(parts: Path, folder: Path, *, adapter: bool = False) -> ExportCheck:
    folder.mkdir()
    return export(parts, "ppo", folder, adapter=adapter, prompts=["ab", "a film is"], max_new_tokens=5, temperature=0.7)


def policy(parts: Path) -> PeftModel:
    return load_policy(parts / "base_model", parts / "sft", parts / "ppo")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_the_merged_model_computes_and_generates_what_the_policy_does(parts: Path, tmp_path: Path) -> None:
    measured = exported(parts, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found, weights, wanted = logits(model), model.state_dict(), policy(parts).merge_and_unload().state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted), "a bit of the merged weights is lost"
    torch.testing.assert_close(found, logits(policy(parts)), rtol=0, atol=1e-5)
    assert measured.dtype == "float32"
    assert 0 <= measured.max_logit_difference < 1e-5 < 0.1 < measured.max_logit
    reference = logits(load_reference(parts / "base_model", parts / "sft"))
    assert (found - reference).abs().max() > 1e-2, "the policy's adapter is not in it"
    config = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (config["temperature"], config["max_new_tokens"], config["top_k"], config["do_sample"]) == (0.7, 5, 0, True)


def test_the_adapter_lies_on_the_merged_sft_model(parts: Path, tmp_path: Path) -> None:
    exported(parts, tmp_path / "out", adapter=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    reference = logits(load_reference(parts / "base_model", parts / "sft"))
    torch.testing.assert_close(logits(base), reference, rtol=0, atol=1e-5)
    found = logits(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter"))
    torch.testing.assert_close(found, logits(policy(parts)), rtol=0, atol=1e-5)


def test_all_parameters_are_exported_as_they_are_and_have_no_adapter(parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "base_model", tmp_path / "base_model")
    for seed, stage in enumerate(("sft", "ppo"), start=1):
        save_weights(tiny_model(seed), tmp_path / stage)
    measured = exported(tmp_path, tmp_path / "out")
    assert measured.max_logit_difference < 1e-5 < measured.max_logit
    found, wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), tiny_model(2).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ConfigError, match="ppo was trained in all parameters, so it has no adapter"):
        exported(tmp_path, tmp_path / "with adapter", adapter=True)


def test_an_export_that_computes_something_else_is_refused(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "_load", lambda folder, adapter: tiny_model())
    with pytest.raises(ModelError, match="logits differ from the policy's by up to"):
        exported(parts, tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"), atomic_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "out") as draft:
            (draft / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as draft:
        (draft / "all").write_text("all")
    assert (tmp_path / "out" / "all").read_text() == "all"
    assert len(list(tmp_path.iterdir())) == 1
