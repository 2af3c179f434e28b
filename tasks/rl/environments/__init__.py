"""Environment protocol and the text format of conversations.

A conversation is one plain text that the policy and the environment write in turns:

    User: Hello, this is Ann Berg. I need a taxi to the museum.
    Bot: What time?
    User: At seven.
    Bot: So a taxi to the museum at seven?

The prompt is everything up to the first `Bot:`; from a line end to the next `Bot:` the text is the environment's. Plain
roles and no chat template, because the base model's own is made for tools and system prompts. A turn ends with the end
token, which the text does not show, or is cut at `generation.max_new_tokens`.
"""

import re
from dataclasses import dataclass
from typing import Any, Protocol

from tasks.core.rows import Demonstration, Prompt
from tasks.models.encoding import EncodedRow, encode_prompt, encode_response, encode_text

__all__ = ["Environment", "Step", "encode_dialogue", "final_user_turn", "first_prompt", "user_turn"]

USER, BOT = "User:", "Bot:"

USER_TURN = re.compile(rf"(\n{USER}.*?\n{BOT})", flags=re.DOTALL)


@dataclass(frozen=True)
class Step:
    """Result of a turn of the policy."""

    observation: str  # one line without a role
    reward: float  # of the conversation if it ends here, else 0
    done: bool


class Environment(Protocol):
    """One conversation at a time, deterministic: equal rows and equal turns give equal answers."""

    def reset(self, row: Prompt) -> str:
        """Start a conversation; return the prompt of the policy's first turn, which ends with `Bot:`."""

    def step(self, action: str) -> Step:
        """Answer a turn of the policy, given without its end token."""


def first_prompt(text: str) -> str:
    """Format the first prompt: the user's opening, and the policy's role."""
    return f"{USER} {text}\n{BOT}"


def final_user_turn(text: str) -> str:
    """Format the environment's final turn."""
    return f"\n{USER} {text}"


def user_turn(text: str) -> str:
    """Format the environment's turn between two turns of the policy."""
    return f"{final_user_turn(text)}\n{BOT}"


def encode_dialogue(row: Demonstration, tokenizer: Any) -> tuple[EncodedRow, list[int]]:
    """Encode a dialogue, and a mask of the response that is 1 on the bot's tokens and their end tokens.

    Each piece is tokenised by itself, as a conversation with an environment is.
    """
    ids, mask = list[int](), list[int]()
    for index, text in enumerate(USER_TURN.split(row.response)):
        is_bot = index % 2 == 0
        piece = (encode_response if is_bot else encode_text)(tokenizer, text)
        ids, mask = ids + piece, mask + [int(is_bot)] * len(piece)
    return EncodedRow(encode_prompt(tokenizer, row.prompt), [ids]), mask
