"""Records of rollouts: what they say of each token, against arithmetic by hand; whole groups within a bound."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.config.rl import PPOParams, RLParams
from tasks.rewards.composition import RewardBatch
from tasks.rl import rollout_records
from tasks.rl.algorithm import ScoredRollout
from tasks.rl.rollout import Rollout
from tasks.rl.rollout_records import record_groups, token_texts, with_texts
from tests.conftest import EOS, PAD, letter_tokenizer
from tests.support.tiny_trainer import GRPO_PARAMS, PARAMS, algorithm_of, trainer

LOO = {"advantage": "leave_one_out", "value_coef": 0.0, "prompts_per_update": 1, "kl_controller": "fixed"}
TOKENIZER = letter_tokenizer()
A, B, C = (TOKENIZER.convert_tokens_to_ids(letter) for letter in "abc")


def scored(engine_logprobs: Tensor | None = None, **changes: Any) -> ScoredRollout:
    """Two responses to one prompt: `ab` with its end, cut after `c` where the environment's `a` stands inside."""
    mask = torch.tensor([[True, True, True], [True, False, True]])
    rollout = Rollout(
        prompts=torch.tensor([[PAD, C], [PAD, C]]),
        prompt_mask=torch.tensor([[False, True]] * 2),
        responses=torch.tensor([[A, B, EOS], [B, A, C]]),
        response_mask=mask,
        prompt_texts=["c", "c"],
        texts=["ab", "b\nc"],
        logprobs=torch.tensor([[-1.0, -2.0, -0.5], [-1.5, 0.0, -3.0]]),
        has_eos=torch.tensor([True, False]),
        transcripts=["ab", "bac!"],
        pad_token_id=PAD,
        engine_logprobs=engine_logprobs,
    )
    reward = RewardBatch(
        torch.tensor([1.0, 0.0]), {"rule": torch.tensor([0.123456, 7.0])}, {"ood": torch.tensor([0.0, 1.0])}
    )
    reference = torch.tensor([[-1.5, -2.0, -1.0], [-1.0, 9.0, -3.25]])
    return ScoredRollout(rollout, reference, reward, torch.tensor([1.0, -0.5]), **changes)


def record(params: RLParams, of: ScoredRollout, **options: Any) -> list[dict[str, Any]]:
    experience, _ = algorithm_of(params).compute_advantages(of)
    options = {"update": 1, "kl_coef": 0.2, "recorded": []} | options
    return record_groups(of, experience, params, **options)


def test_grpo_by_hand() -> None:
    # k1 = (0.5, 0, 0.5), (−0.5, –, 0.25); the KL is in the loss. Scores 1 and −0.5: mean 0.25, unbiased std 1.0607.
    params = GRPO_PARAMS.model_copy(update={"prompts_per_update": 1, "kl_penalty": "loss"})
    entropies = torch.tensor([[0.1, 0.2, 0.3], [0.4, 9.0, 0.5]])
    engine = torch.tensor([[-1.0, -2.25, -0.5], [-1.5, 0.0, -3.125]])
    of = scored()
    first, second = record(params, of)
    advantage = 0.75 / (1.5 / 2**0.5 + 1e-4)
    assert first["values"] == {
        "advantage": pytest.approx([advantage] * 3, rel=5e-3),
        "kl": [0.5, 0.0, 0.5],
        "reward": [0.0, 0.0, 1.0],
        "logprob": [-1.0, -2.0, -0.5],
    }
    assert second["values"] == {
        "advantage": pytest.approx([-advantage, 0, -advantage], rel=5e-3),
        "kl": [-0.5, 0.0, 0.25],
        "reward": [0.0, 0.0, -0.5],
        "logprob": [-1.5, 0.0, -3.0],
    }
    figures = ("update", "group", "sample", "ended", "score", "reward", "components", "metrics", "kl")
    assert [first[name] for name in figures] == [1, 0, 0, True, 1.0, 1.0, {"rule": 0.123}, {"ood": 0.0}, 1.0]
    assert [second[name] for name in figures] == [1, 0, 1, False, -0.5, 0.0, {"rule": 7.0}, {"ood": 1.0}, -0.25]
    assert "is_policy" not in first
    assert second["is_policy"] == [1, 0, 1]
    assert (second["prompt"], second["response"]) == ("c", "bac!")
    assert [row["tokens"] for row in with_texts([first, second], TOKENIZER)] == [["a", "b", ""], ["b", "a", "c"]]

    both = scored(engine, entropies=entropies)
    experience, _ = algorithm_of(params).compute_advantages(of)
    _, second = record_groups(both, experience, params, update=1, kl_coef=0.2, recorded=[])
    assert second["values"]["entropy"] == [0.4, 0.0, 0.5], "the environment's token has none"
    assert second["values"]["mismatch"] == [0.0, 0.0, 0.125]


def test_ppo_by_hand() -> None:
    # r = −0.2 · k1 + score at the end: (−0.1, 0, 0.9) and (0.1, –, −0.55); returns 0.8 and −0.45, so ±1.25 leave one
    # out. Whitened over all five tokens: mean 0.25, variance 1.25² − 0.25² = 1.5.
    params = PARAMS.model_copy(update=LOO)
    algorithm = algorithm_of(params)
    algorithm.kl_controller.kl_coef = 0.2
    of = scored()
    experience, _ = algorithm.compute_advantages(of)
    first, second = record_groups(of, experience, params, update=1, kl_coef=0.2, recorded=[])
    assert first["values"]["reward"] == [-0.1, 0.0, 0.9]
    assert second["values"]["reward"] == [0.1, 0.0, -0.55]
    high, low = (pytest.approx(gain / 1.5**0.5, rel=5e-3) for gain in (1.0, -1.5))
    assert first["values"]["advantage"] == [high, high, high]
    assert second["values"]["advantage"] == [low, 0.0, low]


@pytest.mark.parametrize(
    ("action", "expected"),
    [("turn", [[0.5, 0.5, 0.5], [1.5, 0.0, 2.5]]), ("response", [[0.5, 0.5, 0.5], [1.5, 0.0, 1.5]])],
)
def test_a_token_has_the_advantage_of_its_action(action: str, expected: list[list[float]]) -> None:
    params = PARAMS.model_copy(update=LOO | {"action": action})
    assert isinstance(params, PPOParams)
    of = scored()
    experience, _ = algorithm_of(params).compute_advantages(of)
    given = torch.tensor([[0.5, 0.0, 0.0], [1.5, 2.5, 0.0]])
    experience.advantages.copy_(given[:, : experience.advantages.shape[1]])
    records = record_groups(of, experience, params, update=1, kl_coef=0.0, recorded=[])
    assert [row["values"]["advantage"] for row in records] == expected


def test_what_does_not_count_in_the_loss_has_no_advantage() -> None:
    params = GRPO_PARAMS.model_copy(update={"prompts_per_update": 1, "mask_truncated": True})
    first, second = record(params, scored())
    assert min(first["values"]["advantage"]) > 0.5
    assert second["values"]["advantage"] == [0, 0, 0], "it was cut"


def test_groups_are_whole_and_evenly_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_records, "RECORDED_RESPONSES", 6)
    run = trainer(GRPO_PARAMS, prompts_per_update=9, updates=2)
    run.train()
    expected = [(update, group, sample) for update in (1, 2) for group in (0, 3, 6) for sample in (0, 1)]
    assert [(row["update"], row["group"], row["sample"]) for row in run.rollouts] == expected
    monkeypatch.setattr(rollout_records, "RECORDED_RESPONSES", 1)
    run = trainer(GRPO_PARAMS, updates=1)
    run.train()
    assert [(row["group"], row["sample"]) for row in run.rollouts] == [(0, 0), (0, 1)], "one group, whole"


def test_a_long_run_records_some_updates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(run: Any) -> int:
        return sum(len(row["tokens"]) for row in run.rollouts)

    free = trainer(GRPO_PARAMS, updates=8)
    free.train()
    monkeypatch.setattr(rollout_records, "RECORDED_TOKENS", tokens(free) // 12)
    run = trainer(GRPO_PARAMS, updates=8)
    run.train()
    assert run.history == free.history
    assert 0 < tokens(run) <= tokens(free) // 12
    updates = sorted({row["update"] for row in run.rollouts})
    assert 1 < len(updates) < 8, "spread over the run"
    assert updates[-1] > 4
    assert all(row in free.rollouts for row in run.rollouts)
    assert len(run.rollouts) == 2 * len({(row["update"], row["group"]) for row in run.rollouts})


def test_a_character_of_several_tokens_stands_at_the_last_of_them() -> None:
    tokenizer = letter_tokenizer("aĠÃ©âĤ¬")
    ids = [tokenizer.convert_tokens_to_ids(sign) for sign in ["a", "Ã", "©", "Ġ", "â", "Ĥ", "¬", "a", "Ã"]]
    assert token_texts(tokenizer, ids) == ["", "é", " ", "", "", "€", "a", "\ufffd"], "the last one is cut"
    stuck = [ids[0], *[ids[1]] * 6]
    assert len(token_texts(tokenizer, stuck)) == 6, "bytes that never become a character"
    assert "".join(token_texts(tokenizer, stuck)) == "\ufffd" * 6
