"""Settings of the promotion gate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tasks.core.sections.section import Section, Fraction

__all__ = ["GateParams", "Metric"]

Metric = Literal["win_rate", "win_rate_vader", "reward_gold", "repetition", "no_end_share", "kl"]
"""Metrics that can be compared with the champion; see `tasks.evals.noninferiority`."""

Margin = Annotated[float, Field(ge=0)]


class GateParams(Section):
    """The rules of promotion; all of them must hold."""

    policy: str = Field(
        description="Which policy may be promoted: ppo, grpo or dpo, or `best`: the one whose win rate is surest."
    )
    min_win_rate: Fraction = Field(
        description="Against SFT, by the gold judge: the lower end of the 95 % interval must be above this."
    )
    max_kl: float = Field(gt=0, description="KL to SFT, nats per response, at most.")
    allowed_detectors: list[str] = Field(
        description="Detectors of reward hacking that may fire; any other that does refuses the policy."
    )
    margins: dict[Metric, Margin] = Field(
        min_length=1,
        description="Metric → by how much a policy may be worse than the champion on the same prompts, at the bad end "
        "of the 95 % interval (non-inferiority).",
    )
