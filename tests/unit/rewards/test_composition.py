import pytest
import torch
from torch import Tensor

from tasks.core.errors import ConfigError, DataError, TrainingError
from tasks.core.schema import Prompt
from tasks.core.sections.reward import LengthRule, RewardParams
from tasks.rewards.composition import CompositeReward, build_reward

PROMPTS, RESPONSES = ["A film", "The end"], [" so so so", " is near"]


def _constant(*values: float) -> object:
    return lambda prompts, responses: list(values)


def _params(**weights: float) -> RewardParams:
    return RewardParams(weights=weights, length=LengthRule(target=3, tolerance=3))


def test_total_is_the_weighted_sum_and_components_stay_unweighted() -> None:
    reward = CompositeReward({"a": _constant(1.0, -2.0), "b": _constant(0.5, 4.0)}, {"a": 2.0, "b": -0.5})
    outcome = reward(PROMPTS, RESPONSES)
    assert outcome.total.tolist() == [1.75, -6.0]  # 2·1 − ½·½ and 2·(−2) − ½·4
    assert {name: value.tolist() for name, value in outcome.components.items()} == {"a": [1.0, -2.0], "b": [0.5, 4.0]}
    assert outcome.total.dtype == torch.float32
    assert outcome.components["a"].dtype == torch.float32


def test_a_component_of_weight_zero_is_reported_without_counting() -> None:
    outcome = CompositeReward({"a": _constant(1.0, 1.0), "b": _constant(7.0, 8.0)}, {"a": 1.0, "b": 0.0})(
        PROMPTS, RESPONSES
    )
    assert outcome.total.tolist() == [1.0, 1.0]
    assert outcome.components["b"].tolist() == [7.0, 8.0]


def test_components_see_prompts_and_responses_apart() -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def spy(prompts: list[str], responses: list[str]) -> Tensor:
        seen.append((prompts, responses))
        return torch.zeros(len(prompts), dtype=torch.float64)

    CompositeReward({"spy": spy}, {"spy": 1.0})(PROMPTS, RESPONSES)
    assert seen == [(PROMPTS, RESPONSES)]


class Noticing:
    """A component that measures in the pass that scores."""

    calls = 0

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        raise AssertionError("a second pass")

    def measured(self, prompts: list[str], responses: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        return torch.tensor([3.0, 1.0]), {"unfamiliar": torch.tensor([0.0, 1.0])}


def test_what_components_measure_is_reported_and_never_paid() -> None:
    noticing = Noticing()
    outcome = CompositeReward({"a": noticing, "b": _constant(1.0, 1.0)}, {"a": 2.0, "b": 1.0})(PROMPTS, RESPONSES)
    assert outcome.total.tolist() == [7.0, 3.0]
    assert {name: values.tolist() for name, values in outcome.measures.items()} == {"unfamiliar": [0.0, 1.0]}
    assert outcome.of_all_ranks().measures == outcome.measures
    assert noticing.calls == 1
    assert CompositeReward({"b": _constant(1.0, 1.0)}, {"b": 1.0})(PROMPTS, RESPONSES).measures == {}


def test_build_reward_joins_the_learned_model_and_the_rules_by_weight() -> None:
    reward = build_reward(_params(learned=1.0, repetition=0.5, length=0.1), [], lambda p, r: torch.tensor([0.25, -1.0]))
    outcome = reward(PROMPTS, RESPONSES)
    assert outcome.components["repetition"].tolist() == [-0.5, 0.0]
    assert outcome.components["length"].tolist() == pytest.approx([1.0, 2 / 3])
    assert outcome.total.tolist() == pytest.approx([0.25 - 0.25 + 0.1, -1.0 + 0.2 / 3])


def test_a_component_without_weight_is_not_computed() -> None:
    def fail(prompts: list[str], responses: list[str]) -> list[float]:
        raise AssertionError("the learned model has no weight, so nothing may ask it")

    assert list(build_reward(_params(repetition=1.0), [], fail)(PROMPTS, RESPONSES).components) == ["repetition"]


def test_an_unknown_component_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"reward\.weights\.repetitions.*answer, code, learned, length, repetition"):
        build_reward(_params(repetitions=1.0), [], lambda p, r: [0.0] * len(r))


def test_a_reward_model_that_is_off_can_have_no_weight() -> None:
    with pytest.raises(ConfigError, match=r"reward\.weights\.learned: the stage reward_model is off"):
        build_reward(_params(learned=1.0), [], None)
    assert build_reward(_params(repetition=1.0), [], None)(PROMPTS, RESPONSES).total.tolist() == [-0.5, 0.0]


def test_rules_know_the_right_answers_of_the_prompts() -> None:
    rows = [Prompt(id="a", prompt="2 + 2 =", answer="4"), Prompt(id="b", prompt="Hello")]
    reward = build_reward(_params(answer=2.0), rows, None)
    assert reward(["2 + 2 =", "2 + 2 ="], [" 4", " 5"]).total.tolist() == [2.0, 0.0]
    with pytest.raises(DataError, match=r"reward\.weights\.answer: no right answer is known for the prompt 'Hello'"):
        reward(["Hello"], [" 4"])


def test_weights_and_components_must_match() -> None:
    with pytest.raises(ConfigError, match="each component once"):
        CompositeReward({"a": _constant(1.0)}, {"b": 1.0})
    with pytest.raises(ConfigError, match="each component once"):
        CompositeReward({}, {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_names_component_prompt_and_response(bad: float) -> None:
    reward = CompositeReward({"fine": _constant(0.0, 0.0), "broken": _constant(1.0, bad)}, {"fine": 1.0, "broken": 1.0})
    with pytest.raises(TrainingError, match=r"'broken' is (nan|-?inf).*1 of 2.*'The end'.*' is near'"):
        reward(PROMPTS, RESPONSES)


def test_one_value_per_response() -> None:
    with pytest.raises(TrainingError, match=r"'short' returned shape \(1,\) for 2 responses"):
        CompositeReward({"short": _constant(1.0)}, {"short": 1.0})(PROMPTS, RESPONSES)
    with pytest.raises(TrainingError, match="1 prompts for 2 responses"):
        CompositeReward({"a": _constant(1.0, 1.0)}, {"a": 1.0})(PROMPTS[:1], RESPONSES)
