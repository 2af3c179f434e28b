"""The variants of the benchmark `frontier` are valid parameters."""

from pathlib import Path

import pytest

from tasks.config.params import load_params

ROOT = Path(__file__).resolve().parents[2]


def test_every_variant_can_be_built_and_changes_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import frontier

    params = load_params(ROOT / "tests" / "support" / "params.yaml")
    variants = frontier.variants_of(params)
    assert set(variants) == set(frontier.VARIANTS)
    digests = {frontier.digest(own) for own in variants.values()}
    assert len(digests) == len(variants) - 2, "only the three stages without changes are equal"
    half = variants["ppo, two epochs"].ppo
    assert (half.epochs, half.learning_rate) == (2, params.ppo.learning_rate / 2)
    seeded = params.model_copy(update={"policy_seed": 7})
    assert frontier.digest(seeded) == frontier.digest(params) != frontier.digest(params.model_copy(update={"seed": 7}))
    without = params.model_copy(update={"lora": None})
    assert set(variants) - set(frontier.variants_of(without)) == {"ppo, all linear layers", "ppo, rank 4"}
