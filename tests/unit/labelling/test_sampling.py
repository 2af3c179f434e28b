"""The policies of a run write, and its ensemble scores, for people to compare."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.errors import ConfigError
from tasks.core.rows import Prompt, write_rows
from tasks.labelling.pairs import by_disagreement, paired, variance
from tasks.labelling.sampling import check_policies, ensemble, prompts, written
from tests.support.tiny_policy import write_parts
from tests.support.tiny_stages import GENERATION, run_reward_model, write_inputs


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    rows = [Prompt(id=str(number), prompt=text) for number, text in enumerate("abcdefgh")]
    write_rows(folder / "prepare" / "prompts" / "train.jsonl", rows)
    return write_parts(folder)


def test_every_policy_writes_twice_to_each_prompt_and_the_same_again(parts: Path) -> None:
    asked = prompts(parts, "train", 5, seed=0)
    assert asked != prompts(parts, "train", 5, seed=1)
    assert len(set(asked)) == 5
    found = written(["sft", "ppo"], asked, GENERATION, parts, seed=0)
    assert list(found) == asked
    assert all([item.policy for item in own] == ["sft", "sft", "ppo", "ppo"] for own in found.values())
    assert found == written(["sft", "ppo"], asked, GENERATION, parts, seed=0)


def test_a_run_that_left_no_policy_is_an_error(parts: Path, tmp_path: Path) -> None:
    assert check_policies([], parts) == ["ppo", "sft"]
    assert check_policies(["sft"], parts) == ["sft"]
    with pytest.raises(ConfigError, match=r"no policy in .* that could write: `rlhf run` first"):
        check_policies([], tmp_path)


@pytest.mark.slow
def test_pairs_are_chosen_where_a_trained_ensemble_differs_most(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    run_reward_model(tmp_path, tmp_path / "reward_model", ensemble_size=2)
    scores = ensemble(tmp_path)
    found = written(["sft"], prompts(tmp_path, "train", 4, seed=0), GENERATION, tmp_path, seed=0)
    pool = paired(found, 20, seed=0)
    chosen = by_disagreement(pool, 2, scores)
    texts = [[pair.prompt, pair.response_a, pair.response_b] for pair in pool.pairs]
    asked, first, second = (list(column) for column in zip(*texts, strict=True))
    doubt = variance(scores(asked, first), scores(asked, second)).tolist()
    assert [pair.priority for pair in chosen] == pytest.approx(sorted(doubt, reverse=True)[:2], abs=1e-6)
    assert doubt != pytest.approx([doubt[0]] * len(doubt))
