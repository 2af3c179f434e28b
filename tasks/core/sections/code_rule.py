"""Options of the reward for programs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from tasks.core.sections.rule_options import RuleOptions
from tasks.core.sections.section import Positive

__all__ = ["CodeRule"]


def _must_be_zero(floor: float) -> float:
    if floor != 0:
        raise ValueError(f"a program that fails earns 0, whatever else is set; got {floor:g}; remove it")
    return floor


class CodeRule(RuleOptions):
    """Options of rule code: how the program is extracted from a response, and its resource limits."""

    function: str = Field("code", description="This rule's name.")
    floor: Annotated[float, AfterValidator(_must_be_zero)] = Field(
        0.0, description="A program that fails for whatever reason earns 0; nothing else can be set."
    )
    program: Literal["fenced", "whole", "completion"] = Field(
        "fenced",
        description="What of a response is the program: its last ```python block, or block without a language, that "
        "defines the function, all of it, or prompt and response as one text, as in HumanEval.",
    )
    in_place: bool = Field(
        False,
        description="Whether the tests see what the function did to its arguments. A function that empties them then "
        "passes `f(x) == sorted(x)`, so only for functions that work in place.",
    )
    held_out: bool = Field(
        False,
        description="Whether a row's tests after its line `# held out` run, and not those before it. Rows without that "
        "line have the same tests either way.",
    )
    cpu_seconds: Positive = Field(2, description="CPU time of the program, and of its tests, before they are killed.")
    wall_seconds: float = Field(
        10.0, gt=0, description="Time from start to verdict; generous, because it depends on the machine's load."
    )
    memory_mb: Annotated[int, Field(ge=64)] = Field(
        256, description="Address space of the program; Python itself takes about 30 MB."
    )
    output_kb: Positive = Field(64, description="What a program may print before it is killed; nobody reads it.")
    answer_kb: Positive = Field(1024, description="Size of one result, encoded, that the tests accept.")
    scratch_mb: Positive = Field(
        8, description="Files that a program may write; they live in memory and vanish with it."
    )
    workers: Positive | None = Field(None, description="Programs that run at once; null: one per CPU core.")
    isolation: Literal["bubblewrap", "none_i_accept_the_risk"] = Field(
        "bubblewrap",
        description="What stands between a program and this machine: namespaces and seccomp (Linux, the package "
        "bubblewrap and the extra `code`), or nothing but the limits above.",
    )
