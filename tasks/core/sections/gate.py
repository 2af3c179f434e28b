"""What a policy must show before it becomes the champion."""

from __future__ import annotations

from pydantic import Field

from tasks.core.sections.section import Section, Share

__all__ = ["GateParams"]


class GateParams(Section):
    """The rules of promotion; all of them must hold."""

    policy: str = Field(
        description="Which policy may be promoted: ppo, grpo or dpo, or `best`: the one whose win rate is surest."
    )
    min_win_rate: Share = Field(
        description="Against SFT, by the gold judge: the lower end of the 95 % interval must be above this."
    )
    max_kl: float = Field(gt=0, description="KL to SFT, nats per response, at most.")
    allowed_findings: list[str] = Field(
        description="Detectors of reward hacking that may fire; any other that does refuses the policy."
    )
    margin: Share = Field(
        description="Against the champion, by the gold judge on the same prompts: the lower end of the win rate's 95 % "
        "interval may be this much below one half (non-inferiority)."
    )
