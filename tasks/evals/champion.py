"""Non-inferiority tests of a policy against the champion: one per metric, paired by prompt.

For each metric the whole 95 % interval of the paired difference must lie on the good side of its margin, which tests
non-inferiority at level 0.025 (Piaggio et al. 2012, JAMA 308:2594). A policy passes only if it does so in every metric.
That is an intersection–union test, whose level is that of its single tests (Berger 1982, Technometrics 24:295), so
nothing has to be corrected for their number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tasks.core.rows import Prompt, read_rows
from tasks.core.text_stats import repetition_rate
from tasks.evals.compare import ScoredResponse
from tasks.evals.scoring import PolicySampler, SampledResponse, load_gold_reward, sample_prompts, vader_scores
from tasks.evals.statistics import Interval, bootstrap_mean, pairwise_wins
from tasks.models.loading import init_process, load_policy, load_tokenizer
from tasks.runtime.provenance import RuleResult

if TYPE_CHECKING:
    from tasks.config.evaluation import EvaluateParams
    from tasks.config.training import EnvironmentParams, GenerationParams

__all__ = [
    "METRICS",
    "MetricSpec",
    "ResponseScores",
    "compare_with_champion",
    "noninferiority_rule",
    "paired_interval",
]


class ResponseScores(Protocol):
    """Fields of a response that metrics need, as in `tasks.evals.compare.ScoredResponse`."""

    @property
    def response(self) -> str: ...
    @property
    def ended(self) -> bool: ...
    @property
    def kl(self) -> float: ...
    @property
    def gold(self) -> float: ...
    @property
    def vader(self) -> float | None: ...


@dataclass(frozen=True)
class MetricSpec:
    """A metric.

    Attributes:
        name: display name in a reason.
        value: value for one prompt, from the challenger's and the champion's response.
        more_is_better: whether a high mean is in favour of the challenger.
        null_value: mean if the two are equal.
        value_format: format of the mean.
        margin_format: format of the bound.
    """

    name: str
    value: Callable[[ResponseScores, ResponseScores], float]
    more_is_better: bool
    null_value: float = 0.0
    value_format: str = "+.3f"
    margin_format: str = "+g"


METRICS: Mapping[str, MetricSpec] = {
    "win_rate": MetricSpec(
        "win rate against the champion", lambda challenger, champion: _pairwise_win(challenger.gold, champion.gold),
        more_is_better=True, null_value=0.5, value_format=".1%", margin_format=".0%",
    ),
    "win_rate_vader": MetricSpec(
        "VADER's win rate against the champion",
        lambda challenger, champion: _pairwise_win(_vader_score(challenger), _vader_score(champion)),
        more_is_better=True, null_value=0.5, value_format=".1%", margin_format=".0%",
    ),
    "reward_gold": MetricSpec(
        "gold reward less the champion's", lambda challenger, champion: challenger.gold - champion.gold,
    more_is_better=True ),
    "repetition": MetricSpec(
        "repetition less the champion's",
        lambda challenger, champion: repetition_rate(challenger.response) - repetition_rate(champion.response),
    more_is_better=False, ),
    "truncated_share": MetricSpec(
        "share without end less the champion's", lambda challenger, champion: float(champion.ended) -
        float(challenger.ended), more_is_better=False,
    ),
    "kl": MetricSpec(
        "KL to SFT less the champion's, nats", lambda challenger, champion: challenger.kl - champion.kl,
    more_is_better=False ),
}  # fmt: skip
"""Key of `gate.margins` → metric; each KL is to the SFT policy that the policy was trained from."""


def paired_interval(
    metric: str, challenger: Sequence[ResponseScores], champion: Sequence[ResponseScores], *, samples: int, seed: int
) -> Interval:
    """Compute the metric's mean over paired prompts with its 95 % bootstrap interval.

    Args:
        samples: bootstrap resamples.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    values = [
        METRICS[metric].value(response, baseline) for response, baseline in zip(challenger, champion, strict=True)
    ]
    return bootstrap_mean(values, samples=samples, seed=seed)


def noninferiority_rule(metric: str, interval: Interval, margin: float) -> RuleResult:
    """Check that the unfavourable end of the interval is within the margin of the null value."""
    spec = METRICS[metric]
    if spec.more_is_better:
        end, side, bound, relation = interval.low, "lower", spec.null_value - margin, "at least"
        passed = end >= bound
    else:
        end, side, bound, relation = interval.high, "upper", spec.null_value + margin, "at most"
        passed = end <= bound
    return RuleResult(
        f"{spec.name}, {side} end",
        format(end, spec.value_format),
        f"{relation} {format(bound, spec.margin_format)}",
        passed,
    )


def _pairwise_win(score: float, other: float) -> float:
    return pairwise_wins([score], [other])[0]


def _vader_score(answer: ResponseScores) -> float:
    assert answer.vader is not None, "params.yaml lets VADER judge where a margin names it"
    return answer.vader


@dataclass(frozen=True)
class _ChampionResponse:
    """Champion's response to one prompt; see `tasks.evals.champion.ResponseScores`."""

    response: str
    ended: bool
    kl: float
    gold: float
    vader: float | None


def compare_with_champion(
    policy: str,
    params: EvaluateParams,
    generation: GenerationParams,
    seed: int,
    *,
    metrics: Collection[str],
    artifacts: Path,
    champion: Path,
    champion_policy: str,
    environment: EnvironmentParams | None = None,
) -> dict[str, Interval]:
    """Compute each metric of the challenger against the champion, with its 95 % bootstrap interval over prompts.

    The challenger's responses are those of the evaluation; the champion responds to the same prompts now.

    Args:
        policy: the challenger, as the evaluation names it.
        metrics: of `tasks.evals.champion.METRICS`.
        artifacts: what the stages wrote.
        champion: the champion's base model, SFT and policy, laid out as in artifacts.
        champion_policy: the name of its policy.
        environment: environment of the evaluation, used for the champion too.

    Raises:
        DataError: no judge is available.
        ModelError: a folder is incomplete.
    """
    init_process()
    prompts = sample_prompts(artifacts / "prepare" / "prompts" / "test.jsonl", params.prompts, seed)
    tokenizer = load_tokenizer(champion / "base_model")
    sampler = PolicySampler(
        tokenizer, prompts, generation, batch_size=params.batch_size, seed=seed, environment=environment
    )
    model = load_policy(champion / "base_model", champion / "sft", champion / champion_policy)
    answers = sampler.sample("champion", model)
    champion_scores = _score_answers(answers, prompts, artifacts, params)
    records = read_rows(artifacts / "evaluate" / "responses.jsonl", ScoredResponse)
    by_prompt = {record.prompt_id: record for record in records if record.policy == policy}
    challenger_scores = [by_prompt[answer.prompt.id] for answer in answers]
    return {
        name: paired_interval(name, challenger_scores, champion_scores, samples=params.bootstrap_samples, seed=seed)
        for name in metrics
    }


def _score_answers(
    answers: Sequence[SampledResponse], prompts: Sequence[Prompt], artifacts: Path, params: EvaluateParams
) -> list[_ChampionResponse]:
    """Score the champion's responses with the judges of the evaluation."""
    prompt_texts, responses = [answer.prompt.prompt for answer in answers], [answer.response for answer in answers]
    gold = [
        answer.environment_reward for answer in answers if answer.environment_reward is not None
    ] or load_gold_reward(prompts, artifacts / "base_model", artifacts / "gold_judge", params.gold_rule)(
        prompt_texts, responses
    )
    sentiment = vader_scores(prompt_texts, responses) if params.vader else [None] * len(answers)
    return [
        _ChampionResponse(answer.response, answer.ended, answer.kl, float(score), compound)
        for answer, score, compound in zip(answers, gold, sentiment, strict=True)
    ]
