"""DPO and its kin in all parameters: the reference is SFT's model, and another one beside the policy's."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.core.rows import read_table
from tasks.models.loading import load_reference, make_trainable, save_weights
from tests.support import tiny_stages
from tests.support.tiny_stages import RUNS, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT has trained all parameters, and is far from the base model."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    model = make_trainable(load_reference(folder / "base_model", None), None, seed=0)
    draw = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=draw)
    save_weights(model, folder / "sft")
    return folder


@pytest.mark.parametrize(
    ("loss_type", "changes", "first_loss"),
    [
        ("sigmoid", {}, math.log(2)),  # −log σ(β · 0)
        ("ipo", {}, 25.0),  # (0 − 1/2β)², β = 0.1
        ("kto", {}, 0.5),  # 1 − σ(0)
        ("orpo", {}, None),  # without a reference
        ("simpo", {"beta": 2.0}, None),
    ],
)
def test_the_first_loss_is_that_of_a_policy_equal_to_its_reference(
    loss_type: str,
    changes: dict[str, Any],
    first_loss: float | None,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiny_stages, "LORA", None)
    params = tiny_stages._DPO.model_copy(update={"loss_type": loss_type, "epochs": 1, "learning_rate": 1e-3} | changes)
    monkeypatch.setattr(tiny_stages, "_DPO", params)
    RUNS["dpo"](inputs, tmp_path)
    rows = read_table(tmp_path / "history.csv")
    if first_loss is not None:
        assert float(rows[0]["loss"]) == pytest.approx(first_loss, abs=1e-4), "the reference is another model"
    before, after = (load_file(of / "adapter" / "model.safetensors") for of in (inputs / "sft", tmp_path))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before), "all parameters learn"
