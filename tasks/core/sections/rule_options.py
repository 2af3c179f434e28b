"""Options that all rules share."""

from __future__ import annotations

from pydantic import Field

from tasks.core.sections.section import Section

__all__ = ["RuleOptions"]


class RuleOptions(Section):
    """Options that all rules share: function and floor."""

    function: str = Field(description="A rule's name, or `module:function` of a file in tasks/rewards/custom.")
    floor: float = Field(0.0, description="What a response earns on which the function fails; such are counted.")
