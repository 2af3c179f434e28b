"""Token ids of prompts and responses, by tokenizers that merge, add tokens or drop spaces; rows that do not fit."""

import logging
import re
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tasks.config.training import SFTParams
from tasks.core.errors import DataError, ModelError
from tasks.models.encoding import (
    EncodedRow,
    check_context,
    context_length,
    decode_response,
    encode_prompt,
    encode_response,
    encode_row,
    encode_text,
    fit_rows,
    start_ids,
)
from tests.conftest import letter_tokenizer

PAD, END, START = 0, 1, 2
LINE, SPACES = "Ċ", "ĠĠ"  # a line break and two spaces, as byte-level tokenizers write them


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, a line break and spaces, which merge: `\\n` and two spaces are one token."""
    tokens = ["<pad>", "<end>", "<start>", *"abx", LINE, "Ġ", SPACES, LINE + SPACES]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, [("Ġ", "Ġ"), (LINE, SPACES)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", bos_token="<start>")


def with_template(template: str, tokenizer: PreTrainedTokenizerFast | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that puts special tokens around every text."""
    tokenizer = tokenizer or merging_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in re.findall("<[a-z]+>", template)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    return tokenizer


def test_prompt_and_response_are_tokenised_apart() -> None:
    """Together, the line break and the indentation are one token, which no prompt ends with while a policy samples."""
    tokenizer = merging_tokenizer()
    a, b, x, line, spaces = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "x", LINE, SPACES))
    row = encode_row(tokenizer, "ab\n", "  x", "  xb")
    assert row.prompt == [a, b, line]
    assert row.responses == [[spaces, x, END], [spaces, x, b, END]]
    assert row.length == 3 + 4
    together = tokenizer("ab\n  x").input_ids
    assert together[2:] == [tokenizer.convert_tokens_to_ids(LINE + SPACES), x], "this tokenizer shows nothing"


@pytest.mark.parametrize(
    ("template", "start"),
    [("$A", []), ("<start> $A", [START]), ("$A <end>", []), ("<start> $A <end>", [START]), ("<end> $A", [END]),
     ("<start> <end> $A <end>", [START, END])],
)  # fmt: skip
def test_start_tokens_open_a_prompt_and_the_end_token_closes_a_response_alone(template: str, start: list[int]) -> None:
    tokenizer = with_template(template)
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert list(start_ids(tokenizer)) == start
    assert encode_prompt(tokenizer, "ab") == [*start, a, b]
    assert encode_prompt(tokenizer, "") == start
    assert encode_text(tokenizer, "ab") == [a, b]
    assert encode_response(tokenizer, "b") == [b, END]


def test_start_tokens_are_found_once_and_whatever_a_tokenizer_makes_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = merging_tokenizer()
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("a $A", special_tokens=[("a", a)])
    texts, call = list[str](), PreTrainedTokenizerFast.__call__

    def spy(self: PreTrainedTokenizerFast, text: str, **options: Any) -> Any:
        texts.append(text)
        return call(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", spy)
    assert [encode_prompt(tokenizer, "b") for _ in range(3)] == [[a, b]] * 3
    assert texts == ["a", "b", "b", "b"]
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"b": 0}, unk_token="b")))
    words.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    assert start_ids(words) == ()


def test_a_special_token_that_a_response_spells_out_is_plain_text() -> None:
    """Else a policy could write it letter by letter, and a reward model would read the end of the response."""
    tokenizer = letter_tokenizer("<>endabx")
    end = tokenizer.eos_token_id
    assert encode_response(tokenizer, "a<end>b").count(end) == 1
    assert tokenizer.decode(encode_response(tokenizer, "a<end>b")[:-1]) == "a<end>b"
    assert encode_prompt(tokenizer, "a<end>b").count(end) == 1, "a prompt may hold a chat template's tokens"


def sentencepiece(*, always: bool) -> PreTrainedTokenizerFast:
    """Words behind ▁; a text's first word gets one: before any text (as the first Llamas), or where it has no space."""
    tokens = ["<pad>", "<end>", "▁", "a", "b", "▁a", "▁b", "▁▁a"]
    merges = [("▁", "a"), ("▁", "b"), ("▁", "▁a")]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    if always:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")


def test_a_response_keeps_the_space_that_its_tokenizer_drops_from_a_text() -> None:
    tokenizer = sentencepiece(always=False)
    prompt, response = encode_prompt(tokenizer, "a"), encode_text(tokenizer, " b")
    assert tokenizer.decode(response) == "b", "this tokenizer shows nothing"
    assert decode_response(tokenizer, prompt, response) == " b"
    assert decode_response(tokenizer, prompt, [*response, END]) == " b"
    assert decode_response(tokenizer, prompt, []) == ""


def test_a_character_split_between_prompt_and_response_is_decoded_as_far_as_it_goes() -> None:
    tokens = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    first, second = encode_text(tokenizer, "é")
    assert decode_response(tokenizer, [first], [second, *encode_text(tokenizer, "x")]) == "\N{REPLACEMENT CHARACTER}x"


# -- maximum length ------------------------------------------------------------------------------------------------


def params(max_length: int | str, share: float = 0.9) -> SFTParams:
    return SFTParams.model_validate(
        {"epochs": 1, "batch_size": 1, "learning_rate": 0.1, "max_examples": 9, "max_validation_examples": 9,
         "max_length": max_length, "max_cut_share": share}
    )  # fmt: skip


def row(prompt: int, *responses: int) -> EncodedRow:
    """Prompt tokens 10, 11, …; the responses are of 5s, the end token included."""
    return EncodedRow(list(range(10, 10 + prompt)), [[5] * (length - 1) + [END] for length in responses])


ROWS = [row(4, 4), row(6, 4), row(2, 8), row(0, 9), row(3, 4, 5), row(2, 4, 4)]


def test_a_prompt_loses_its_first_tokens_and_what_cannot_fit_is_dropped_and_counted() -> None:
    """Eight tokens: the second keeps 4 of its 6, the third and fourth have no room, the last's sides are equal."""
    fitted = fit_rows(ROWS, params(8), section="sft", context=64)
    assert fitted.kept == [0, 1, 4]
    assert [len(row.prompt) for row in fitted.rows] == [4, 4, 3]
    assert fitted.rows[1].prompt == [12, 13, 14, 15]
    assert fitted.rows[1].responses == ROWS[1].responses
    assert fitted.metrics() == {
        "rows/kept": 3, "rows/prompt_cut": 1, "rows/response_too_long": 2, "rows/sides_equal": 1, "max_length": 8,
    }  # fmt: skip


def test_a_start_token_stays_in_front_of_a_prompt_that_is_cut() -> None:
    fitted = fit_rows([row(6, 4), row(4, 4)], params(8), section="sft", context=64, start=1)
    assert fitted.rows[0].prompt == [10, 13, 14, 15]


@pytest.mark.parametrize(("context", "max_length", "kept"), [(64, 10, 5), (None, 10, 5), (8, 8, 3)])
def test_auto_is_the_longest_row_at_most_the_context(context: int | None, max_length: int, kept: int) -> None:
    fitted = fit_rows(ROWS, params("auto"), section="sft", context=context)
    assert (fitted.max_length, len(fitted.rows)) == (max_length, kept)


def test_the_first_row_that_does_not_fit_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(4, 4)] * 19 + [row(6, 4)]
    with caplog.at_level(logging.WARNING):
        fit_rows(rows[:-1], params(8), section="dpo", context=64)
    assert not caplog.messages
    fit_rows(rows, params(8, 0.1), section="dpo", context=64)
    assert caplog.messages == [
        "dpo: 1 of 20 rows do not fit max_length 8 (prompt_cut 1); all of the rows need at most 10 tokens: set "
        "dpo.max_length to 10, or to auto"
    ]


@pytest.mark.parametrize(
    ("rows", "share", "context", "message"),
    [
        (ROWS, 0.1, 64, "4 of 6 rows do not fit .* need at most 10 tokens: set sft.max_length to 10, or to auto; "
                        r"sft.max_cut_share allows 10%"),
        (ROWS, 0.1, 9, r"the model's context is 9: leave long rows out by prepare.max_words"),
        ([row(2, 9)] * 3, 0.9, 64, "3 of 3 rows do not fit max_length 8 .response_too_long 3."),
        ([row(2, 4, 4)], 0.9, 64, "chosen and rejected are the same tokens there"),
        ([], 0.9, 64, "sft: there are no rows to learn from"),
    ],
)  # fmt: skip
def test_too_many_rows_that_do_not_fit_are_an_error(
    rows: list[EncodedRow], share: float, context: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        fit_rows(rows, params(8, share), section="sft", context=context)


def test_a_maximum_beyond_the_context_is_refused() -> None:
    with pytest.raises(ModelError, match=r"lower sft\.max_length: that is 65 tokens, and the model's context is 64"):
        fit_rows(ROWS, params(65), section="sft", context=64)
    check_context(None, 10**9, "no bound is known")
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
