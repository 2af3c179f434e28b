"""Sections of the evaluation: LLM judge, gate, benchmarks and the over-optimisation curve."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.config.base import AnswerPattern, Fraction, Positive, Section
from tasks.config.rules import Judge

__all__ = ["EvaluateParams", "GateParams", "JudgeParams", "LmEvalParams", "Metric", "OveroptimisationParams"]


class JudgeParams(Section):
    """LLM judge that compares two responses (Zheng et al. 2023, arXiv 2306.05685)."""

    kind: Literal["local", "endpoint"] = Field(
        "local", description="The pipeline's base model, or a server that speaks OpenAI's chat completions."
    )
    model: str = Field("", description="For endpoint: the model's name there.")
    base_url: str = Field("", description="For endpoint: its address up to `/v1`; its key is $OPENAI_API_KEY.")
    rubric: str = Field("", description="What makes a response the better one; required for evaluate.llm_judge.")
    prompts: Positive = Field(description="How many of the evaluation's prompts; each policy's pairs are asked twice.")
    max_requests: Positive = Field(1000, description="For endpoint: with more answers missing, none is asked.")
    max_tokens: Positive = Field(500_000, description="For endpoint: a run stops once its answers took this many.")

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        if self.kind == "local" and (self.model or self.base_url):
            raise ValueError("kind 'local' is the pipeline's base model: model and base_url are for kind 'endpoint'")
        if self.kind == "endpoint" and not (self.model and self.base_url.startswith(("http://", "https://"))):
            raise ValueError("kind 'endpoint' needs model, and base_url as http(s)://…/v1")
        if set("@?") & set(self.base_url):
            raise ValueError("base_url must hold no password or key, it is written down: use $OPENAI_API_KEY")
        return self


class EvaluateParams(Section):
    """The comparison of all policies on held-out prompts."""

    prompts: Positive = Field(description="How many held-out prompts.")
    samples_per_prompt: Positive = Field(2, description="Responses per prompt of each policy.")
    reference_samples: Positive = Field(4, description="SFT's responses per prompt, with each of which all compare.")
    best_of_n: int = Field(
        4, ge=2, description="Further responses per prompt of SFT: a null comparison, and the proxy's best of them."
    )
    batch_size: Positive = Field(description="Sequences per forward pass.")
    bootstrap_samples: Positive = Field(description="Resamples of the prompts for each 95 % interval.")
    report_samples: Positive = Field(description="Prompts shown side by side in the report.")
    vader: bool = Field(description="Whether the VADER lexicon judges too: for tasks whose aim is a positive text.")
    llm_judge: JudgeParams | None = Field(description="A language model that compares responses with SFT's.")
    answer_pattern: AnswerPattern | None = Field(
        None,
        description="Where prompts have right answers: the form in which one must stand to be strictly right, as a "
        "regular expression with one group (GSM8K: `#### (\\-?[0-9\\.\\,]+)`); null: it is the whole response.",
    )
    gold_rule: Judge | None = Field(
        None,
        description="Where neither people's ratings nor the right answer as a text can judge: a rule that does; one "
        "that the reward does not have, such as `{function: language}`, or `code`, whose answers are tests.",
    )

    @model_validator(mode="after")
    def _check_judge_prompts(self) -> Self:
        if self.llm_judge and self.llm_judge.prompts > self.prompts:
            raise ValueError(f"llm_judge.prompts is {self.llm_judge.prompts}, but prompts is {self.prompts}")
        if self.llm_judge and not self.llm_judge.rubric.strip():
            raise ValueError(
                "llm_judge.rubric is missing: say in a sentence what makes a response the better one, for example "
                "'The better answer is right, and short.'"
            )
        return self


Metric = Literal["win_rate", "win_rate_vader", "reward_gold", "repetition", "truncated_share", "kl"]
"""Metrics that can be compared with the champion; see `tasks.evals.gate`."""

Margin = Annotated[float, Field(ge=0)]


class GateParams(Section):
    """The rules of promotion; all of them must hold."""

    policy: Literal["best", "ppo", "grpo", "dpo"] = Field(description="Policy to promote; `best`: by surest win rate.")
    min_win_rate: Fraction = Field(description="Against SFT, by the gold judge; the 95 % interval must lie above.")
    max_kl: float = Field(gt=0, description="KL to SFT, nats per response, at most.")
    allowed_detectors: list[str] = Field(description="Detectors of reward hacking that may fire without refusal.")
    margins: dict[Metric, Margin] = Field(
        min_length=1,
        description="Metric → by how much a policy may be worse than the champion on the same prompts, at the bad end "
        "of the 95 % interval (non-inferiority).",
    )


class LmEvalParams(Section):
    """Benchmarks of SFT and the policies by EleutherAI's lm-evaluation-harness."""

    tasks: tuple[str, ...] = Field(
        min_length=1, description="Names of tasks, groups or tags: in `include`, or lm-eval's own (`lm-eval ls tasks`)."
    )
    include: str = Field(
        "infra/lm_eval",
        pattern=r"^infra/lm_eval(/[\w-]+)*$",
        description="Folder of own task files; a dep in dvc.yaml.",
    )
    limit: Positive | None = Field(None, description="At most this many documents per task, the first; null: all.")
    batch_size: Positive = Field(description="Sequences per forward pass.")
    num_fewshot: int | None = Field(None, ge=0, description="Worked examples per question; null: as the task says.")


class OveroptimisationParams(Section):
    """Proxy and gold reward of policy snapshots, and of best-of-n (Gao et al. 2022)."""

    prompts: Positive = Field(description="How many held-out prompts.")
    samples_per_prompt: int = Field(ge=2, description="SFT responses per prompt: best-of-n goes up to this n.")
    samples_per_policy: Positive = Field(4, description="Responses per prompt of each policy, for a closer gain.")
    batch_size: Positive = Field(description="Prompts per batch.")
    bootstrap_samples: Positive = Field(description="Resamples of the prompts for each 95 % interval.")
