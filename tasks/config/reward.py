"""The composed reward, shared by PPO, GRPO and the evaluation."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tasks.config.base import EXTERNAL_COMPONENTS, LEARNED, Positive, Section
from tasks.config.rules import RULE_OPTIONS, Rule
from tasks.core.custom import did_you_mean

__all__ = ["Normaliser", "Priority", "RewardParams"]


class Priority(Section):
    """One level of the lexicographic order."""

    component: str = Field(description="Its name in `weights`.")
    threshold: float = Field(description="The value from which on what comes later counts, too.")


class Normaliser(Section):
    """Normalisation of a component's values before weighting: (value − mean) / std."""

    by: Literal["fixed", "batch"] = Field(
        "fixed",
        description="`batch`: mean and std are those of the update's responses, of all ranks; outside training, of the "
        "first responses that are scored, so that policies stay comparable.",
    )
    mean: float = Field(0.0, description="For `fixed`.")
    std: float = Field(1.0, gt=0, description="For `fixed`.")


class RewardParams(Section):
    """The reward of a response: components, and how they become one number."""

    weights: dict[str, float] = Field(min_length=1, description="Component → weight; others are not computed.")
    rules: dict[str, Rule] = Field(
        default_factory=dict,
        description="Component → rule and its options; a component that is named like a rule and has no entry is that "
        "rule with its defaults.",
    )
    composition: Literal["sum", "product", "lexicographic"] = Field(
        "sum",
        description="`sum`: Σ weight · component. `product`: Π component ^ weight, for components in [0, 1]. "
        "`lexicographic`: the sum, in which a component counts only where all before it in `priorities` reach their "
        "thresholds.",
    )
    priorities: tuple[Priority, ...] = Field(
        (), description="For lexicographic: the components in their order; those that are not named come last."
    )
    gates: dict[str, float] = Field({}, description="Component → value below which the response gets at most `floor`.")
    floor: float = Field(0.0, description="Maximum reward of a response that a gate stops.")
    normalisation: dict[str, Normaliser] = Field(
        {}, description="Component → its scale; gates and thresholds read values as they are."
    )
    weight_schedule: dict[str, dict[Positive, float]] = Field(
        default_factory=dict,
        description="Component → update → weight, linear in between and flat outside, counted from 1; it ends at the "
        "component's weight in `weights`, which is what evaluation uses.",
    )
    ensemble_reduction: Literal["mean", "worst", "uncertainty"] = Field(
        "mean",
        description="How members of the reward model become one score: their mean, the least of them, or the mean less "
        "uncertainty_coef times their variance (Coste et al. 2023, arXiv 2310.02743, equations 3 to 5).",
    )
    uncertainty_coef: float = Field(
        0.5, ge=0, description="λ of `uncertainty`; Coste et al. take 0.5 for best-of-n and 0.1 for PPO."
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_rules(cls, values: Any) -> Any:
        """A component with a weight alone is the rule of its name; so is one whose entry names no function."""
        rules = values.get("rules", {}) if isinstance(values, dict) else None
        if not isinstance(rules, dict):
            return values
        weights = values.get("weights")
        defaults = [name for name in weights if name in RULE_OPTIONS] if isinstance(weights, dict) else []
        entries = rules | {name: {} for name in defaults if name not in rules}
        named = {name: {"function": name} | rule if isinstance(rule, dict) else rule for name, rule in entries.items()}
        return values | {"rules": named}

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        known = sorted({LEARNED, *EXTERNAL_COMPONENTS, *RULE_OPTIONS, *self.rules})
        for name in self.weights:
            if name not in {LEARNED, *EXTERNAL_COMPONENTS, *self.rules}:
                raise ValueError(
                    f"reward.weights.{name}: no such component; {did_you_mean(name, known)} A component of another "
                    f"name needs an entry reward.rules.{name}"
                )
        if taken := {LEARNED, *EXTERNAL_COMPONENTS} & set(self.rules):
            raise ValueError(f"reward.rules.{min(taken)}: {min(taken)} is no rule; give the rule another name")
        for key in ("rules", "gates", "normalisation", "weight_schedule"):
            _check_weighted(key, getattr(self, key), self.weights)
        _check_weighted("priorities", [rank.component for rank in self.priorities], self.weights)
        return self

    @model_validator(mode="after")
    def _check_composition(self) -> Self:
        if (self.composition == "lexicographic") != bool(self.priorities):
            raise ValueError(
                f"reward.composition is {self.composition}, reward.priorities names {len(self.priorities)} components: "
                "priorities belong to lexicographic, which needs at least one"
            )
        if len({rank.component for rank in self.priorities}) < len(self.priorities):
            raise ValueError("reward.priorities names a component twice: each has one place in the order")
        below = [name for name, weight in self.weights.items() if weight < 0]
        if self.composition == "product" and below:
            raise ValueError(
                f"reward.weights.{below[0]} is below 0, and so no exponent of a product of values in [0, 1]"
            )
        for name, scale in self.normalisation.items():
            weighted = self.weights[name] or name in self.weight_schedule
            if self.composition == "product" and scale.by == "batch" and weighted:
                raise ValueError(
                    f"reward.normalisation.{name}: batch scaling puts values below 0, a product needs them in [0, 1]; "
                    "use `by: fixed`, or another composition"
                )
        running = [name for name, rule in self.rules.items() if rule.function == "code"]
        if len(running) > 1:
            raise ValueError(
                f"reward.rules: {' and '.join(sorted(running))} are both of the function code, whose metrics "
                "(failures/<status>) have one name each; keep one, and let evaluate.gold_rule be the other"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        for name, points in self.weight_schedule.items():
            if not points or any(later <= earlier for earlier, later in pairwise(points)):
                raise ValueError(f"reward.weight_schedule.{name} must name updates in rising order, got {list(points)}")
            last = list(points.values())[-1]
            if last != self.weights[name]:
                raise ValueError(
                    f"reward.weight_schedule.{name} ends at {last:g}, reward.weights.{name} is {self.weights[name]:g}:"
                    " make them equal, for evaluation uses the latter"
                )
            if self.composition == "product" and min(points.values()) < 0:
                raise ValueError(f"reward.weight_schedule.{name} goes below 0, which no exponent of a product may")
        return self


def _check_weighted(key: str, names: Iterable[str], weights: dict[str, float]) -> None:
    for name in names:
        if name not in weights:
            raise ValueError(
                f"reward.{key} names {name!r}, which has no weight; {did_you_mean(name, weights)} Give it a "
                "weight (0: computed and reported alone), or remove it"
            )
