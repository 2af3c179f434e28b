"""From a source's own columns to envelopes with the fields of a row type."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.config.data import SourceParams
from tasks.core.errors import DataError, SourceError
from tasks.core.rows import Demonstration, Preference
from tasks.data.sources import SourceRows, collect_source


def collected(root: Path, content: list[Any], **more: Any) -> SourceRows:
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return collect_source(SourceParams(name="mine", kind="local", id="a.jsonl", **more), 0)


def test_columns_are_mapped_others_left_behind_and_ids_made_unique_to_the_source(root: Path) -> None:
    content = [{"question": "Why?", "reply": "So.", "id": 7, "noise": 1}, {"question": "Who?"}]
    result = collected(root, content, row_type="demonstrations", columns={"prompt": "question", "response": "reply"})
    assert result.rows == [
        {"file": "a.jsonl", "line": 1, "row": {"id": "mine-7", "prompt": "Why?", "response": "So."}},
        {"file": "a.jsonl", "line": 2, "row": {"id": "mine-2", "prompt": "Who?"}},
    ]


def test_a_template_is_put_around_each_prompt(root: Path) -> None:
    result = collected(root, [{"prompt": "Why {x}?"}], row_type="prompts", template="User: {prompt}\nYou:")
    assert result.rows[0]["row"]["prompt"] == "User: Why {x}?\nYou:"


@pytest.mark.parametrize(("given", "ratings"), [([1, 2], [1, 2]), ("[1, 2.5]", [1, 2.5]), (3, [3]), ("4", [4])])
def test_ratings_come_in_several_spellings(root: Path, given: object, ratings: list[float]) -> None:
    result = collected(root, [{"text": "a", "ratings": given}], row_type="ratings")
    assert result.rows[0]["row"]["ratings"] == ratings


def test_a_line_that_is_no_object_keeps_its_text_and_says_why(root: Path) -> None:
    (root / "a.jsonl").write_text('{"prompt": "a"}\n[1, 2]\n{"prom\n')
    result = collect_source(SourceParams(name="mine", kind="local", id="a.jsonl", row_type="prompts"), 0)
    assert result.rows[1:] == [
        {"file": "a.jsonl", "line": 2, "raw": "[1, 2]", "error": "not an object but list"},
        {
            "file": "a.jsonl",
            "line": 3,
            "raw": '{"prom',
            "error": "not JSON: Unterminated string starting at at column 2",
        },
    ]


def test_a_limit_keeps_the_first_rows_and_an_empty_source_is_an_error(root: Path) -> None:
    content = [{"prompt": str(number)} for number in range(5)]
    assert [row["row"]["prompt"] for row in collected(root, content, row_type="prompts", limit=2).rows] == ["0", "1"]
    with pytest.raises(DataError, match=r"source 'mine' \(local a\.jsonl\) holds no rows"):
        collected(root, [], row_type="prompts")


def test_two_dialogues_are_parted_at_the_last_answer(root: Path) -> None:
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    content = [{"chosen": f"{dialogue} So.", "rejected": f"{dialogue} No."}, {"chosen": "one", "rejected": "two"}]
    rows = [row["row"] for row in collected(root, content, row_type="preferences").rows]
    assert rows[0] == {"id": "mine-1", "prompt": dialogue, "chosen": " So.", "rejected": " No."}
    assert rows[1] == {"id": "mine-2", "prompt": "", "chosen": "one", "rejected": "two"}


def test_dialogues_that_differ_before_the_last_answer_are_whole_texts(root: Path) -> None:
    sides = {"chosen": "\n\nHuman: A\n\nAssistant: one", "rejected": "\n\nHuman: B\n\nAssistant: two"}
    (row,) = collected(root, [sides], row_type="preferences").rows
    assert row["row"] == {"id": "mine-1", "prompt": "", **sides}


def test_pairs_say_what_their_source_compares(root: Path) -> None:
    content = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "c"}]
    rows = [row["row"] for row in collected(root, content, row_type="preferences", objective="helpful").rows]
    assert [row["objective"] for row in rows] == ["helpful", "helpful"]
    assert "objective" not in collected(root, content, row_type="preferences").rows[0]["row"]
    with pytest.raises(ValidationError, match="the rows of source 'mine' are prompts"):
        SourceParams(name="mine", kind="local", id="a.jsonl", row_type="prompts", objective="helpful")


def test_real_dialogues_all_part_into_valid_preferences() -> None:
    file = Path(__file__).parents[4] / "shared" / "data" / "hh-harmless" / "pairs.jsonl.gz"
    if not file.is_file():
        pytest.skip("no dialogues on this machine")
    source = SourceParams(name="hh", kind="local", id=str(file), row_type="preferences")
    rows = [row["row"] for row in collect_source(source, 0).rows]
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        given = [json.loads(line) for line in lines]
    assert len(rows) == len(given)
    for row, raw in zip(rows, given, strict=True):
        assert (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) == (raw["chosen"], raw["rejected"])
        assert row["prompt"].endswith("\n\nAssistant:")
    valid = [Preference.model_validate(row) for row in rows if row["chosen"] != row["rejected"] and row["chosen"]]
    assert len(valid) > 0.98 * len(rows)


def test_a_pattern_cuts_the_answer_out_of_its_column_and_a_row_without_it_says_so(root: Path) -> None:
    content = [{"q": "1 + 1?", "a": "1 + 1 is two.\n#### 2 "}, {"q": "2 + 2?", "a": "4"}, {"q": "3 + 3?"}]
    columns = {"prompt": "q", "response": "a", "answer": "a"}
    result = collected(root, content, row_type="demonstrations", columns=columns, answer_pattern="#### (.+)")
    assert result.rows[0]["row"] == {
        "id": "mine-1", "prompt": "1 + 1?", "response": "1 + 1 is two.\n#### 2 ", "answer": "2",
    }  # fmt: skip
    assert [row["error"] for row in result.rows[1:]] == ["answer: '#### (.+)' is not in it"] * 2
    assert result.rows[1]["raw"] == '{"q": "2 + 2?", "a": "4"}'


@pytest.mark.parametrize("pattern", ["####", "(#)(#)", "("])
def test_a_pattern_without_exactly_one_group_is_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match=r"needs one group|no regular expression"):
        SourceParams(name="mine", kind="local", id="a.jsonl", row_type="prompts", answer_pattern=pattern)


def test_real_problems_become_demonstrations_with_their_answers() -> None:
    """GSM8K as published: the worked solution is the response, the number after its mark the answer."""
    file = Path(__file__).parents[4] / "shared" / "data" / "gsm8k" / "test.jsonl.gz"
    if not file.is_file():
        pytest.skip("no GSM8K on this machine")
    source = SourceParams(
        name="gsm8k", kind="local", id=str(file), row_type="demonstrations", template="Question: {prompt}\nAnswer:",
        columns={"prompt": "question", "response": "answer", "answer": "answer"}, answer_pattern="#### (.+)",
    )  # fmt: skip
    rows = [Demonstration.model_validate(row["row"]) for row in collect_source(source, 0).rows]
    assert len(rows) == 1319
    assert (rows[0].prompt[:24], rows[0].answer) == ("Question: Janet’s ducks ", "18")
    for row in rows:
        assert row.answer is not None
        assert row.response.endswith(f"#### {row.answer}")


def test_reasoning_gym_gives_the_same_tasks_for_the_same_seed() -> None:
    pytest.importorskip("reasoning_gym")
    source = SourceParams(name="sums", kind="reasoning_gym", id="chain_sum", row_type="demonstrations", limit=3)
    first, again, other = (collect_source(source, seed).rows for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 3
    for row in first:
        expression = row["row"]["prompt"].rpartition(":")[2].removesuffix("=").split()
        total = int(expression[0])
        for sign, number in zip(expression[1::2], expression[2::2], strict=True):
            total += int(number) if sign == "+" else -int(number)
        assert row["row"]["response"] == str(total)


def test_an_unknown_reasoning_task_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceParams(name="sums", kind="reasoning_gym", id="no_such_task", row_type="prompts")
    if "reasoning_gym" in sys.modules or pytest.importorskip("reasoning_gym"):
        with pytest.raises(DataError, match="reasoning-gym makes no task 'no_such_task'"):
            collect_source(source, 0)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SourceError, match="needs the package: `pip install reasoning-gym`"):
        collect_source(source, 0)


def test_the_hub_without_a_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = SourceParams(name="hh", kind="hub", id="Anthropic/hh-rlhf", row_type="preferences")
    with pytest.raises(SourceError, match=r"dataset 'Anthropic/hh-rlhf' .* could not be fetched.*check the network"):
        collect_source(source, 0)
