"""Lengths in tokens, against counts by hand: the tokenizer has a token a word."""

from pathlib import Path

from tokenizers import Tokenizer, processors

from tasks.core.rows import Demonstration, Preference, Prompt, Rating
from tasks.data.lengths import token_lengths
from tests.support.tokenizers import write_tokenizer

ROWS = {
    "prompts": [Prompt(id="p", prompt="a b c"), Prompt(id="q", prompt="a")],
    "demonstrations": [
        Demonstration(id="d", prompt="a b", response=" c d e f"),
        Demonstration(id="e", prompt="", response="g"),
    ],
    "preferences": [Preference(id="r", prompt="a b", chosen=" c", rejected=" c d e f")],
    "ratings": [Rating(id=str(n), text="x " * n, ratings=(1.0,)) for n in range(1, 101)],
    "nothing": [],
}


def test_lengths_count_the_end_token_of_responses_and_the_longer_side_of_pairs(tmp_path: Path) -> None:
    found = token_lengths(write_tokenizer(tmp_path) / "model", ROWS)
    assert found == {
        "prompts": {"median": 3, "99_percent": 3, "longest": 3},
        "demonstrations": {"median": 7, "99_percent": 7, "longest": 7},
        "responses": {"median": 5, "99_percent": 5, "longest": 5},
        "preferences": {"median": 7, "99_percent": 7, "longest": 7},
        "ratings": {"median": 52, "99_percent": 101, "longest": 101},
    }


def test_a_start_token_counts_once_whatever_closes_a_text(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path) / "model"
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens = [("<start>", 2), ("<end>", 1)]
    backend.post_processor = processors.TemplateProcessing("<start> $A <end>", special_tokens=tokens)
    backend.save(str(model / "tokenizer.json"))
    assert token_lengths(model, {"preferences": ROWS["preferences"]})["preferences"]["longest"] == 8
