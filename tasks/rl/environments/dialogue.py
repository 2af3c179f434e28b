"""What an environment is, and how a conversation with it is written down.

A conversation is one plain text that the policy and the environment write in turns:

    User: Hello, this is Ann Berg. I need a taxi to the museum.
    Bot: What time?
    User: At seven.
    Bot: So a taxi to the museum at seven?

The prompt is everything up to the first `Bot:`. What stands between two turns of the policy, from the line end to the
next `Bot:`, is the environment's. Plain roles and no chat template, because the base model's own is made for tools and
system prompts; a turn ends with the end token, which the text does not show, or is cut at `generation.max_new_tokens`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tasks.core.schema import Demonstration, Prompt

__all__ = ["Environment", "Step", "answered", "heard", "opening", "tokenised"]

USER, BOT = "User:", "Bot:"

BETWEEN = re.compile(rf"(\n{USER}.*?\n{BOT})", flags=re.DOTALL)


@dataclass(frozen=True)
class Step:
    """What follows a turn of the policy.

    Attributes:
        observation: what the environment says, one line without a role.
        reward: what the conversation has earned if it ends here; 0 while it goes on.
        done: whether it is over.
    """

    observation: str
    reward: float
    done: bool


class Environment(Protocol):
    """One conversation at a time, deterministic: equal rows and equal turns give equal answers."""

    def reset(self, row: Prompt) -> str:
        """Begin anew; the prompt of the policy's first turn, which ends with `Bot:`."""

    def step(self, action: str) -> Step:
        """The answer to a turn of the policy, given without its end token."""


def opening(text: str) -> str:
    """A prompt: what the user says first, and the policy's role."""
    return f"{USER} {text}\n{BOT}"


def heard(text: str) -> str:
    """The environment's last words, after the policy's last turn."""
    return f"\n{USER} {text}"


def answered(text: str) -> str:
    """The environment's words between two turns of the policy."""
    return f"{heard(text)}\n{BOT}"


def tokenised(row: Demonstration, tokenizer: Any) -> Mapping[str, list[int]]:
    """A whole dialogue as `input_ids`, and in `completion_mask` which of them are the bot's: 1, its end tokens too.

    Each piece is tokenised by itself, as a conversation with an environment is.
    """
    prompt = list(tokenizer(row.prompt).input_ids)
    ids, mask = prompt, [0] * len(prompt)
    for place, text in enumerate(BETWEEN.split(row.response)):
        own = place % 2 == 0
        piece = [*tokenizer(text, add_special_tokens=False).input_ids, *([tokenizer.eos_token_id] if own else [])]
        ids, mask = ids + piece, mask + [int(own)] * len(piece)
    return {"input_ids": ids, "completion_mask": mask}
