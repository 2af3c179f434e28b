"""Pairs for the reward model and DPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tasks.core.sections.section import Positive, Section

__all__ = ["PreferencesParams"]


class PreferencesParams(Section):
    """How pairs are drawn from rated texts, and how many."""

    train_pairs: Positive = Field(description="Pairs for training the reward model and DPO.")
    heldout_pairs: Positive = Field(description="Pairs for each of validation and test.")
    source_pairs: Literal["only", "add"] = Field(
        description="Use of pairs from sources, such as labels: the only ones, sampled down to "
        "the numbers above, or those for training are prepended to the pairs drawn from ratings."
    )
    min_margin: float = Field(ge=0, description="Training pairs differ in mean rating by at least this many points.")
    raters_per_label: Positive = Field(
        description="A training label is the comparison of the mean of this many randomly drawn raters for each side."
    )
