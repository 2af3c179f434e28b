from unittest.mock import Mock

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tasks.config.reward import Normaliser, Priority, RewardParams
from tasks.core.errors import ConfigError, DataError, TrainingError
from tasks.core.rows import Prompt
from tasks.rewards.composition import CompositeReward, build_reward

PROMPTS, RESPONSES = ["A film", "The end"], [" so so so", " is near"]


def _constant(*values: float) -> object:
    return lambda prompts, responses: list(values)


def _params(**weights: float) -> RewardParams:
    rules = {"length": {"target": 3, "tolerance": 3}} if "length" in weights else {}
    return RewardParams(weights=weights, rules=rules)


def test_total_is_the_weighted_sum_and_components_stay_unweighted() -> None:
    components = {"a": _constant(1.0, -2.0), "b": _constant(0.5, 4.0), "zero": _constant(7.0, 8.0)}
    outcome = CompositeReward(components, {"a": 2.0, "b": -0.5, "zero": 0.0})(PROMPTS, RESPONSES)
    assert outcome.total.tolist() == [1.75, -6.0]  # 2·1 − ½·½ and 2·(−2) − ½·4
    values = {name: value.tolist() for name, value in outcome.components.items()}
    assert values == {"a": [1.0, -2.0], "b": [0.5, 4.0], "zero": [7.0, 8.0]}
    assert {tensor.dtype for tensor in (outcome.total, *outcome.components.values())} == {torch.float32}


class WithMetrics:
    """A component that returns metrics from its scoring pass."""

    calls = 0

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        raise AssertionError("a second pass")

    def score_with_metrics(self, prompts: list[str], responses: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        assert (prompts, responses) == (PROMPTS, RESPONSES)
        return torch.tensor([3.0, 1.0]), {"ood_share": torch.tensor([0.0, 1.0])}


def test_metrics_of_components_are_reported_and_never_rewarded() -> None:
    component = WithMetrics()
    outcome = CompositeReward({"a": component, "b": _constant(1.0, 1.0)}, {"a": 2.0, "b": 1.0})(PROMPTS, RESPONSES)
    assert outcome.total.tolist() == [7.0, 3.0]
    assert {name: values.tolist() for name, values in outcome.metrics.items()} == {"ood_share": [0.0, 1.0]}
    assert outcome.gather().metrics == outcome.metrics
    assert component.calls == 1
    assert CompositeReward({"b": _constant(1.0, 1.0)}, {"b": 1.0})(PROMPTS, RESPONSES).metrics == {}


def test_build_reward_joins_the_learned_model_and_the_rules_by_weight() -> None:
    def learned(prompts: list[str], responses: list[str]) -> Tensor:
        assert (prompts, responses) == (PROMPTS, RESPONSES)
        return torch.tensor([0.25, -1.0], dtype=torch.float64)

    outcome = build_reward(_params(learned=1.0, repetition=0.5, length=0.1), [], learned)(PROMPTS, RESPONSES)
    assert outcome.components["repetition"].tolist() == [-0.5, 0.0]
    assert outcome.components["length"].tolist() == pytest.approx([1.0, 2 / 3])
    assert outcome.total.tolist() == pytest.approx([0.25 - 0.25 + 0.1, -1.0 + 0.2 / 3])


def test_an_unknown_component_is_named_with_the_nearest_or_all_known_ones() -> None:
    with pytest.raises(ValidationError, match=r"reward\.weights\.repetitions.*did you mean repetition"):
        _params(repetitions=1.0)
    with pytest.raises(ValidationError, match=r"reward\.weights\.xyz.*answer, .*, learned, length, .*, repetition"):
        _params(xyz=1.0)


def test_a_reward_model_that_is_off_can_have_no_weight_and_one_without_weight_is_not_asked() -> None:
    with pytest.raises(ConfigError, match=r"reward\.weights\.learned: the stage reward_model is off"):
        build_reward(_params(learned=1.0), [], None)
    unasked = Mock(side_effect=AssertionError("the learned model has no weight"))
    for learned in (None, unasked):
        outcome = build_reward(_params(repetition=1.0), [], learned)(PROMPTS, RESPONSES)
        assert {name: value.tolist() for name, value in outcome.components.items()} == {"repetition": [-0.5, 0.0]}


def test_rules_know_the_right_answers_of_the_prompts() -> None:
    rows = [Prompt(id="a", prompt="2 + 2 =", answer="4"), Prompt(id="b", prompt="Hello")]
    reward = build_reward(_params(answer=2.0), rows, None)
    assert reward(["2 + 2 =", "2 + 2 ="], [" 4", " 5"]).total.tolist() == [2.0, 0.0]
    for name in ("answer", "contains_facts"):
        with pytest.raises(DataError, match=rf"weights\.{name}: no right answer is known for the prompt 'Hello'"):
            build_reward(_params(**{name: 1.0}), rows, None)(["Hello"], [" 4"])


@pytest.mark.parametrize(("components", "weights"), [({"a": _constant(1.0)}, {"b": 1.0}), ({}, {})])
def test_weights_and_components_must_match(components: dict[str, object], weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="each component once"):
        CompositeReward(components, weights)


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


# -- beyond the weighted sum -----------------------------------------------------------------------------------


def test_a_product_is_of_powers() -> None:
    components = {"a": _constant(0.25, 1.0), "b": _constant(0.5, 0.0)}
    reward = CompositeReward(components, {"a": 0.5, "b": 2.0}, composition="product")
    assert reward(PROMPTS, RESPONSES).total.tolist() == [0.125, 0.0]  # ¼^½ · ½², 1 · 0²
    assert reward.marginal_weights(1) == {}
    for second in ((0.5, 0.0), (-0.5, 7.0)):
        components = {"a": _constant(0.25, 1.0), "b": _constant(*second)}
        reported = CompositeReward(components, {"a": 1.0, "b": 0.0}, composition="product")(PROMPTS, RESPONSES)
        assert reported.total.tolist() == [0.25, 1.0], "a weight of 0 reports alone, whatever its values are"
        assert reported.components["b"].tolist() == [*second]


def test_a_batchs_scale_is_refused_in_a_product_unless_the_component_is_reported_alone() -> None:
    section = {"composition": "product", "normalisation": {"length": {"by": "batch"}}}
    with pytest.raises(ValidationError, match=r"reward\.normalisation\.length: .*below 0.*`by: fixed`"):
        RewardParams(weights={"length": 1.0, "answer": 1.0}, **section)
    with pytest.raises(ValidationError, match=r"reward\.normalisation\.length"):
        RewardParams(weights={"length": 0.0, "answer": 1.0}, weight_schedule={"length": {1: 1.0, 2: 0.0}}, **section)
    assert RewardParams(weights={"length": 0.0, "answer": 1.0}, **section).normalisation["length"].by == "batch"


def test_one_component_runs_programs_and_has_no_floor() -> None:
    """Two would report their failures under the same names."""
    with pytest.raises(ValidationError, match=r"reward\.rules: code and strict are both of the function code"):
        RewardParams(weights={"code": 1.0, "strict": 0.0}, rules={"strict": {"function": "code", "program": "whole"}})
    with pytest.raises(ValidationError, match=r"(?s)floor.*a program that fails earns 0.*got -1"):
        RewardParams(weights={"code": 1.0}, rules={"code": {"floor": -1.0}})


def test_a_product_needs_values_between_0_and_1_which_a_scale_can_give() -> None:
    below = {"a": _constant(1.0, 1.0), "b": _constant(-0.5, 0.0)}
    with pytest.raises(TrainingError, match=r"'b' is -0\.5, and reward\.composition: product needs values in \[0, 1\]"):
        CompositeReward(below, {"a": 1.0, "b": 1.0}, composition="product")(PROMPTS, RESPONSES)
    scales = {"b": Normaliser(mean=-1.0, std=1.0)}
    rescaled = CompositeReward(below, {"a": 1.0, "b": 1.0}, composition="product", scales=scales)(PROMPTS, RESPONSES)
    assert rescaled.total.tolist() == [0.5, 1.0]
    assert rescaled.components["b"].tolist() == [-0.5, 0.0], "components are reported as they are"


def test_what_comes_later_counts_only_where_what_comes_before_reaches_its_threshold() -> None:
    components = {"c": _constant(7.0, 7.0), "a": _constant(0.4, 1.0), "b": _constant(0.5, 0.25)}
    priorities = [Priority(component="a", threshold=0.5), Priority(component="b", threshold=0.3)]
    weights = {"c": 1.0, "a": 2.0, "b": 4.0}
    reward = CompositeReward(components, weights, composition="lexicographic", priorities=priorities)
    assert reward(PROMPTS, RESPONSES).total.tolist() == pytest.approx([0.8, 3.0])  # 2·0.4; 2·1 + 4·¼, and b < 0.3


@pytest.mark.parametrize(
    ("rest", "gate", "floor", "total"), [(3.0, 1.0, 0.0, 0.0), (3.0, 0.5, -2.0, -2.0), (-3.0, 0.5, 0.0, -3.0)]
)
def test_a_gate_leaves_at_most_the_floor(rest: float, gate: float, floor: float, total: float) -> None:
    """At most: failing the gate is no way out of a reward below it."""
    components = {"form": _constant(0.0, 1.0), "rest": _constant(rest, 3.0)}
    reward = CompositeReward(components, {"form": 0.0, "rest": 1.0}, gates={"form": gate}, floor=floor)
    assert reward(PROMPTS, RESPONSES).total.tolist() == [total, 3.0]


def test_a_batch_gives_the_scale_in_training_and_the_first_batch_outside() -> None:
    seen = iter([[1.0, 3.0], [1.0, 5.0], [4.0, 4.0], [1.0, 3.0], [5.0, 5.0]])
    reward = CompositeReward(
        {"a": lambda prompts, responses: next(seen)}, {"a": 2.0}, scales={"a": Normaliser(by="batch")}
    )
    training = [reward(PROMPTS, RESPONSES, update).total.tolist() for update in (1, 2, 3)]
    assert training == [[-2.0, 2.0], [-2.0, 2.0], [0.0, 0.0]]
    outside = [reward(PROMPTS, RESPONSES).total.tolist() for _ in range(2)]
    assert outside == [[-2.0, 2.0], [6.0, 6.0]]  # 2 · (5 − 2) / 1
    assert reward.marginal_weights(1) == {}


@pytest.mark.parametrize(("update", "weight"), [(1, 1.0), (2, 1.0), (4, 2.0), (6, 3.0), (7, 2.0), (8, 1.0), (99, 1.0)])
def test_a_curriculum_is_linear_between_its_points_and_flat_outside(update: int, weight: float) -> None:
    reward = CompositeReward(
        {"a": _constant(1.0, 2.0), "b": _constant(0.0, 0.0)}, {"a": 1.0, "b": 5.0},
        weight_schedule={"a": {2: 1.0, 6: 3.0, 8: 1.0}}, scales={"b": Normaliser(std=10.0)},
    )  # fmt: skip
    assert reward(PROMPTS, RESPONSES, update).total.tolist() == [weight, 2 * weight]
    assert reward.weights_at(update) == {"a": weight, "b": 5.0}
    assert reward.marginal_weights(update) == {"a": weight, "b": 0.5}, "what one unit of the reported value adds"
    assert reward(PROMPTS, RESPONSES).total.tolist() == [1.0, 2.0], "outside training: where it ends"
    assert reward.weights == {"a": 1.0, "b": 5.0}


def test_the_section_describes_all_of_it() -> None:
    params = RewardParams(
        weights={"length": 1.0, "short": 0.0, "repetition": 2.0},
        rules={"length": {"target": 2, "tolerance": 2}, "short": {"function": "format", "pattern": ".{0,7}"}},
        gates={"short": 1.0},
        floor=-1.0,
        normalisation={"repetition": {"mean": -1.0, "std": 0.5}},
        weight_schedule={"length": {1: 3.0, 2: 1.0}},
    )
    outcome = build_reward(params, [], None)(PROMPTS, RESPONSES, 1)
    assert {name: own.tolist() for name, own in outcome.components.items()} == {
        "length": [0.5, 1.0], "short": [0.0, 1.0], "repetition": [-0.5, 0.0],
    }  # fmt: skip
    assert outcome.total.tolist() == [-1.0, 7.0]  # " so so so" is a letter too long; 3·1 + 2·(0 + 1)/½
    assert list(outcome.metrics) == ["failures/length", "failures/short", "failures/repetition"]
