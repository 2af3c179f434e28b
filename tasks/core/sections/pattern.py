"""Regular expression that extracts one answer from a text."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

__all__ = ["AnswerPattern"]


def _check_one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    if groups != 1:
        raise ValueError(f"needs one group, which is the answer, for example `#### (.+)`; this has {groups}")
    return pattern


AnswerPattern = Annotated[str, AfterValidator(_check_one_group)]
