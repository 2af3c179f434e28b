"""Benchmarks by lm-eval."""

from __future__ import annotations

from pydantic import Field

from tasks.core.sections.section import Positive, Section

__all__ = ["LmEvalParams"]


class LmEvalParams(Section):
    """Benchmarks of SFT and the policies by EleutherAI's lm-evaluation-harness."""

    tasks: tuple[str, ...] = Field(
        min_length=1,
        description="Names of tasks, groups or tags: those in `include`, or lm-eval's own (`lm-eval ls tasks`).",
    )
    include: str = Field(
        "infra/lm_eval",
        pattern=r"^infra/lm_eval(/[\w-]+)*$",
        description="Folder of own task files; within infra/lm_eval, of which dvc.yaml makes an input.",
    )
    limit: Positive | None = Field(None, description="At most this many documents per task, the first; null: all.")
    batch_size: Positive = Field(description="Sequences per forward pass.")
    num_fewshot: int | None = Field(
        None,
        ge=0,
        description="Worked examples before each question, unless the task fixes none; null: as the task says.",
    )
