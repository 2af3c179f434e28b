"""Token ids of prompts and responses, and how rows are fitted to a maximum length.

Prompt and response are tokenised apart: what a model is trained on is then what it reads while it samples. Together,
their tokens could merge across the boundary. A start token (BOS) stands before the prompt where the tokenizer puts one
before every text; the end token never closes a prompt, and ends every response.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tasks.core.errors import DataError, ModelError
from tasks.core.text_stats import quantile_99

if TYPE_CHECKING:
    from tasks.config.training import TrainerParams

__all__ = [
    "EncodedRow", "FittedRows", "check_context", "context_length", "cut_prompt", "decode_response", "encode_chat",
    "encode_prompt", "encode_response", "encode_row", "encode_text", "fit_rows", "start_ids",
]  # fmt: skip

logger = logging.getLogger(__name__)

UNFIT = ("prompt_cut", "response_too_long", "sides_equal")


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without any special token that the text does not spell out."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@lru_cache(maxsize=8)
def start_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens, such as BOS, that the tokenizer puts before every text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    return tuple(encoded.input_ids[: [*encoded.special_tokens_mask, 0].index(0)])


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt, after the start token if the tokenizer has one; that alone for an empty prompt."""
    return [*start_ids(tokenizer), *encode_text(tokenizer, prompt)]


def encode_chat(tokenizer: Any, message: str) -> list[int]:
    """Token ids of a user's message in the tokenizer's chat template, up to where the answer begins."""
    turns = [{"role": "user", "content": message}]
    return encode_text(tokenizer, tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def encode_response(tokenizer: Any, response: str) -> list[int]:
    """Token ids of a response and the end token. A special token that it spells out is plain text, and ends nothing."""
    ids = tokenizer(response, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    return [*ids, tokenizer.eos_token_id]


def decode_response(tokenizer: Any, prompt: Sequence[int], response: Sequence[int]) -> str:
    """Text of response tokens after this prompt, without special tokens.

    Some tokenizers drop the space of a text's first word, so the response is decoded behind the prompt's last token.
    """
    last = list(prompt[-1:])
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (last, [*last, *response]))
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(list(response), skip_special_tokens=True))  # a character is split between the two


def context_length(config: Any) -> int | None:
    """Longest sequence of tokens that a model with this configuration can read; None where it states none."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)


def check_context(context: int | None, tokens: int, what: str) -> None:
    """Check that a model can read so many tokens; past its context some models go on, and compute nonsense.

    Raises:
        ModelError: it cannot; `what` says what needs them, and which key to lower.
    """
    if context is not None and tokens > context:
        raise ModelError(f"{what}: that is {tokens} tokens, and the model's context is {context}")


@dataclass(frozen=True)
class EncodedRow:
    """A prompt and its responses, one of a demonstration or text, two of a pair; all as token ids."""

    prompt: list[int]
    responses: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest response."""
        return len(self.prompt) + max(map(len, self.responses))


def encode_row(tokenizer: Any, prompt: str, *responses: str) -> EncodedRow:
    """Encode a prompt, empty where the text is whole, and its responses, each with the end token."""
    return EncodedRow(encode_prompt(tokenizer, prompt), [encode_response(tokenizer, text) for text in responses])


@dataclass(frozen=True)
class FittedRows:
    """The rows that fit, their positions among all rows, and reason → number of those that were cut or dropped."""

    max_length: int
    rows: list[EncodedRow] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    unfit: Counter[str] = field(default_factory=Counter)

    def metrics(self) -> dict[str, float]:
        """Counts for metrics.json, and the maximum length that they belong to."""
        reasons = {f"rows/{name}": self.unfit[name] for name in UNFIT}
        return {"rows/kept": len(self.rows), **reasons, "max_length": self.max_length}


def fit_rows(
    rows: Sequence[EncodedRow], params: TrainerParams, *, section: str, context: int | None, start: int = 0
) -> FittedRows:
    """Fit rows to `max_length`: a prompt loses its first tokens, its end and every response stay whole.

    A row whose response alone is too long is dropped, and so is a pair whose sides are the same tokens. The first row
    that is cut or dropped is worth a warning.

    Args:
        section: of params.yaml, for messages.
        context: the longest sequence that the model can read, if its configuration states one.
        start: number of start tokens, which stay at the front of a prompt that is cut.

    Raises:
        DataError: there is no row, none fits, or more than `max_cut_share` do not.
        ModelError: max_length is more than the model's context.
    """
    if not rows:
        raise DataError(f"{section}: there are no rows to learn from; artifacts/prepare/metrics.json has the counts")
    longest = max(row.length for row in rows)
    if params.max_length == "auto":
        fitted = FittedRows(longest if context is None else min(longest, context))
    else:
        fitted = FittedRows(params.max_length)
        check_context(context, fitted.max_length, f"lower {section}.max_length")
    for position, row in enumerate(rows):
        room = fitted.max_length - max(map(len, row.responses))
        if len(row.responses) == 2 and row.responses[0] == row.responses[1]:
            fitted.unfit["sides_equal"] += 1
        elif room < min(len(row.prompt), max(start, 1)):
            fitted.unfit["response_too_long"] += 1
        else:
            fitted.unfit["prompt_cut"] += room < len(row.prompt)
            fitted.rows.append(EncodedRow(cut_prompt(row.prompt, room, start), row.responses))
            fitted.kept.append(position)
    _report(fitted, rows, section, context, params.max_cut_share)
    return fitted


def cut_prompt(prompt: list[int], room: int, start: int) -> list[int]:
    """The start tokens and the last of the prompt's tokens, at most `room` in all."""
    return prompt if len(prompt) <= room else prompt[:start][:room] + prompt[len(prompt) - max(room - start, 0) :]


def _report(
    fitted: FittedRows, rows: Sequence[EncodedRow], section: str, context: int | None, max_cut_share: float
) -> None:
    """Warn of rows that do not fit; raise DataError where there are too many."""
    if not (unfit := sum(fitted.unfit.values())):
        return
    lengths = [row.length for row in rows]
    needed = quantile_99(lengths)
    if needed <= fitted.max_length:
        needed = max(lengths)
    reasons = ", ".join(f"{name} {count}" for name, count in fitted.unfit.items() if count)
    if unfit == fitted.unfit["sides_equal"]:
        cure = "chosen and rejected are the same tokens there: correct the source"
    elif context is not None and needed > context:
        cure = f"the model's context is {context}: leave long rows out by prepare.max_words or max_preference_words"
    else:
        cure = f"set {section}.max_length to {needed}, or to auto"
    message = (
        f"{section}: {unfit} of {len(rows)} rows do not fit max_length {fitted.max_length} ({reasons}); "
        f"{'all' if needed == max(lengths) else '99 %'} of the rows need at most {needed} tokens: {cure}"
    )
    if not fitted.rows or unfit > max_cut_share * len(rows):
        raise DataError(f"{message}; {section}.max_cut_share allows {max_cut_share:.0%}")
    logger.warning(message)
