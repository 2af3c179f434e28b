"""Validation, quarantine, normal form and length bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.config.data import PrepareParams
from tasks.core.errors import DataError
from tasks.core.rows import Demonstration, Preference, Prompt, Rating, Row
from tasks.data.cleaning import CleanResult, check_quarantine, clean, filter_by_length, split_key

BOUNDS = PrepareParams(
    prompt_words=1, min_words=2, max_words=4, near_duplicate_threshold=0.7, validation_share=0.1, test_share=0.1,
    gold_share=0.5, max_quarantine_share=0.25,
)  # fmt: skip


def collected(folder: Path, row_type: str, *envelopes: dict[str, Any]) -> Path:
    (folder / "cards").mkdir()
    (folder / "rows").mkdir()
    (folder / "cards" / "mine.json").write_text(json.dumps({"type": row_type}))
    rows = ({"file": "a.jsonl", "line": number, **row} for number, row in enumerate(envelopes, start=1))
    (folder / "rows" / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_each_malformed_row_is_quarantined_with_file_line_reason_and_text(tmp_path: Path) -> None:
    folder = collected(
        tmp_path,
        "ratings",
        {"row": {"id": "1", "text": "fine", "ratings": [1]}},
        {"row": {"id": "2", "text": "none"}},
        {"raw": "{broken", "error": "not JSON"},
        {"row": {"id": "1", "text": "again", "ratings": [1]}},
        {"row": {"id": "5", "text": "also fine", "ratings": [1]}},
        {"row": {"id": "6", "text": " \t", "ratings": [1]}},
        {"row": {"id": "7", "text": "what", "ratings": [float("nan")]}},
        {"row": {"id": "8", "text": 5, "ratings": ["high"]}},
    )
    cleaned = clean(folder)
    assert [row.id for row in cleaned.rows] == ["1", "5"]
    assert cleaned.collected == 8
    assert [(row["source"], row["file"], row["line"]) for row in cleaned.quarantine] == [
        ("mine", "a.jsonl", line) for line in (2, 3, 4, 6, 7, 8)
    ]
    reasons = [str(row["reason"]) for row in cleaned.quarantine]
    assert reasons[0].startswith("ratings: Field required")
    assert reasons[1:3] == ["not JSON", "id: '1' is taken by an earlier row"]
    assert reasons[3].startswith("text: String should have at least 1 character")
    assert reasons[4].startswith("ratings: all must be finite numbers")
    assert "text: Input should be a valid string (got '5')" in reasons[5]
    assert "ratings.0: Input should be a valid number" in reasons[5]
    assert cleaned.quarantine[1]["raw"] == "{broken"
    assert json.loads(str(cleaned.quarantine[2]["raw"])) == {"id": "1", "text": "again", "ratings": [1]}


def test_a_preference_with_equal_sides_is_quarantined(tmp_path: Path) -> None:
    row = {"id": "1", "prompt": "", "chosen": "same ", "rejected": "same"}
    (only,) = clean(collected(tmp_path, "preferences", {"row": row})).quarantine
    assert "chosen and rejected are the same text" in str(only["reason"])


def test_texts_get_one_form(tmp_path: Path) -> None:
    content = {"id": "1", "text": "  cafe\u0301\r\n  noir\x00 ", "ratings": [1, 2]}
    (row,) = clean(collected(tmp_path, "ratings", {"row": content})).rows
    assert row == Rating(id="1", text="café noir", ratings=(1.0, 2.0))


@pytest.mark.parametrize(
    ("prompt", "response", "joined"),
    [
        ("Why?", "So.", "Why? So."),
        ("Why?", " So. ", "Why? So."),
        ("Why?\r\n", "a\r\n  b\n", "Why?\na\n  b"),
        ("", "So.", "So."),
    ],
)
def test_prompt_and_response_make_one_text_with_its_inner_white_space(
    tmp_path: Path, prompt: str, response: str, joined: str
) -> None:
    content = {"id": "1", "prompt": prompt, "response": response}
    (row,) = clean(collected(tmp_path, "demonstrations", {"row": content})).rows
    assert isinstance(row, Demonstration)
    assert row.prompt + row.response == joined


def test_the_bound_on_malformed_rows_is_exclusive_and_the_message_shows_the_first(tmp_path: Path) -> None:
    bad = [{"file": "a.jsonl", "line": line, "reason": f"reason {line}"} for line in range(1, 8)]
    check_quarantine(CleanResult(quarantine=bad[:1], collected=4), tmp_path / "q.jsonl", 0.25)
    with pytest.raises(DataError) as caught:
        check_quarantine(CleanResult(quarantine=bad, collected=20), tmp_path / "q.jsonl", 0.25)
    message = str(caught.value)
    assert "7 of 20 rows (35.00%) are malformed" in message
    assert "prepare.max_quarantine_share allows (25.00%)" in message
    assert "a.jsonl:5: reason 5" in message
    assert "reason 6" not in message
    assert str(tmp_path / "q.jsonl") in message


def kept(*rows: Row) -> tuple[list[str], dict[str, int]]:
    cleaned = CleanResult(rows=list(rows))
    return [row.id for row in filter_by_length(cleaned, BOUNDS)], dict(cleaned.dropped)


def test_length_bounds_include_their_ends_and_count_what_they_drop() -> None:
    texts = ["one", "one two", "one two three four", "one two three four five"]
    rows = [Rating(id=str(index), text=text, ratings=(1,)) for index, text in enumerate(texts)]
    assert kept(*rows) == (["1", "2"], {"too_short": 1, "too_long": 1})
    prompts = [Prompt(id=str(index), prompt=text) for index, text in enumerate(texts)]
    assert kept(*prompts) == (["0", "1", "2"], {"too_long": 1})
    whole = Demonstration(id="d", prompt="one two three", response=" four five")
    assert kept(whole) == ([], {"too_long": 1})


def test_preferences_that_agree_as_far_as_is_read_are_dropped() -> None:
    late = Preference(id="late", prompt="p", chosen="a b c d X", rejected="a b c d Y")
    early = Preference(id="early", prompt="p", chosen="a b c X e", rejected="a b c Y e")
    space = Preference(id="space", prompt="p", chosen="a  b", rejected="a b")
    assert kept(late, early, space) == (["early"], {"identical_after_truncation": 2})


def test_rows_that_share_a_prompt_share_a_key() -> None:
    one = Preference(id="1", prompt="p", chosen="a", rejected="b")
    other = Demonstration(id="2", prompt="p", response="c")
    assert split_key(one) == split_key(other) == split_key(Prompt(id="3", prompt="p")) == "p"
    alone = Preference(id="1", prompt="", chosen="a", rejected="b")
    assert split_key(alone) == "a\nb"
    assert split_key(Demonstration(id="2", prompt="", response="c")) == "c"
    assert split_key(Rating(id="2", text="t", ratings=(1,))) == "t"


def test_without_cards_or_rows_the_message_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data cards: run stage collect first"):
        clean(tmp_path)
    folder = collected(tmp_path, "prompts")
    (folder / "rows" / "mine.jsonl").unlink()
    with pytest.raises(DataError, match=r"mine\.jsonl does not exist although there is a card for it"):
        clean(folder)
