"""From a source's own columns to envelopes with the fields of a row type; files line by line, broken lines kept."""

import gzip
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
from pydantic import ValidationError

from tasks.config.data import SourceParams
from tasks.core.errors import DataError, SourceError
from tasks.data.sources import collect_source, read_local


def local(row_type: str = "prompts", id: str = "a.jsonl", **more: Any) -> SourceParams:  # noqa: A002
    return SourceParams(name="mine", kind="local", row_type=row_type, id=id, **more)


def source(name: str) -> SourceParams:
    return SourceParams(name=name, kind="local", row_type="prompts", id="a.jsonl")


def collected(root: Path, content: list[Any], **more: Any) -> list[dict[str, Any]]:
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return collect_source(local(**more), 0).rows


def lines(name: str, **more: str) -> list[tuple[str, int, object]]:
    return list(read_local(local(id=name, **more), 0)[0])


def test_columns_are_mapped_others_left_behind_and_ids_made_unique_to_the_source(root: Path) -> None:
    content = [{"question": "Why?", "reply": "So.", "id": 7, "noise": 1}, {"question": "Who?"}]
    columns = {"prompt": "question", "response": "reply"}
    assert collected(root, content, row_type="demonstrations", columns=columns) == [
        {"file": "a.jsonl", "line": 1, "row": {"id": "mine-7", "prompt": "Why?", "response": "So."}},
        {"file": "a.jsonl", "line": 2, "row": {"id": "mine-2", "prompt": "Who?"}},
    ]


def test_a_group_has_a_column_like_any_field_and_numbers_are_labels(root: Path) -> None:
    rows = collected(
        root, [{"prompt": "a", "template": 3, "answer": 7}, {"prompt": "b"}], columns={"group": "template"}
    )
    assert [row["row"] for row in rows] == [
        {"id": "mine-1", "group": "3", "prompt": "a", "answer": "7"},
        {"id": "mine-2", "prompt": "b"},
    ]


def test_no_two_sources_share_an_id_and_names_without_a_dash_keep_theirs(root: Path) -> None:
    (root / "a.jsonl").write_text("".join(json.dumps({"id": i, "prompt": "p"}) + "\n" for i in ("1", "b-1", "b.1")))
    names = ("a", "a-b", "a--b", "a_b", "a-b-1", "-", "--")
    ids = {name: [row["row"]["id"] for row in collect_source(source(name), 0).rows] for name in names}
    assert ids["a"] == ["a-1", "a-b-1", "a-b.1"]
    assert len({*itertools.chain(*ids.values())}) == 3 * len(names)


@pytest.mark.parametrize("missing", [None, "", float("nan")])
def test_rows_without_an_id_are_numbered_apart_from_ids_that_are_numbers(root: Path, missing: object) -> None:
    rows = collected(root, [{"id": value, "prompt": "p"} for value in (3, missing, missing, "2", 2.5)])
    assert [row["row"]["id"] for row in rows] == ["mine-3", "mine-2.line", "mine-3.line", "mine-2", "mine-2.5"]
    rows = collected(root, [{"id": missing, "prompt": "p"}] * 2)
    assert [row["row"]["id"] for row in rows] == ["mine-1", "mine-2"]


def test_an_empty_cell_leaves_an_optional_field_out_and_a_null_prompt_is_none(root: Path) -> None:
    (root / "a.csv").write_text("prompt,chosen,rejected,margin,group\np,a,b,,\np,a,c,1.5,g\n")
    first, second = collect_source(local("preferences", "a.csv"), 0).rows
    assert first["row"] == {"id": "mine-2", "prompt": "p", "chosen": "a", "rejected": "b"}
    assert (second["row"]["margin"], second["row"]["group"]) == ("1.5", "g")
    dialogue = {"prompt": None, "chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}
    assert collected(root, [dialogue], row_type="preferences")[0]["row"]["prompt"] == "\n\nAssistant:"
    (row,) = collected(root, [{"prompt": "p", "answer": None, "group": float("nan")}])
    assert row["row"] == {"id": "mine-1", "prompt": "p"}
    (row,) = collected(root, [{"prompt": "p", "answer": None}], answer_pattern="(.+)")
    assert row["error"] == "answer: '(.+)' is not in it", "null is no answer to be found"


def test_nan_leaves_any_field_out_and_a_cell_can_hold_a_list(root: Path) -> None:
    numbers, texts = ("margin", "confidence"), ("labelled_by", "guidelines", "objective")
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (row,) = collected(root, [pair | dict.fromkeys((*numbers, *texts), float("nan"))], row_type="preferences")
    assert row["row"] == {"id": "mine-1", **pair}
    (root / "a.csv").write_text(
        'prompt,chosen,rejected,labelled_by,guidelines\np,a,b,"[""ann"", ""bob""]",abc\np,a,c,[ann,\n'
    )
    first, second = (item["row"] for item in collect_source(local("preferences", "a.csv"), 0).rows)
    assert (first["labelled_by"], first["guidelines"]) == (["ann", "bob"], ["abc"])
    assert (second["labelled_by"], "guidelines" in second) == ("[ann", False), "no list, and so malformed"
    (root / "a.csv").write_text('text,ratings\na,"[1, 2]"\nb,3\nc,x\n')
    assert [item["row"]["ratings"] for item in collect_source(local("ratings", "a.csv"), 0).rows] == [[1, 2], [3], "x"]


PAIR = {"Prompt": "p", "better": "a", "worse": "b"}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "hub"])
def test_wrong_columns_are_an_error_with_the_columns_there_are_and_the_mapping_to_write(
    root: Path, ending: str
) -> None:
    frame = pandas.DataFrame([PAIR])
    frame.to_csv(root / "a.csv", index=False)
    frame.to_parquet(root / "a.parquet")
    (root / "a.jsonl").write_text("{broken\n" + json.dumps(PAIR) + "\n")
    readers = {"local": read_local, "hub": lambda source, seed: ([("hub", 1, PAIR)], {})}
    kind, name = ("hub", "owner/pairs") if ending == "hub" else ("local", f"a.{ending}")

    def message(row_type: str, **columns: str) -> str:
        given = SourceParams(name="mine", kind=kind, id=name, row_type=row_type, columns=columns)  # type: ignore[arg-type]
        with pytest.raises(DataError) as caught:
            collect_source(given, 0, readers)
        return str(caught.value)

    text = message("preferences")
    assert text.startswith(f"source 'mine' ({kind} {name}): no row has the column 'prompt' or 'chosen' or 'rejected'")
    assert "its columns are 'Prompt', 'better', 'worse'." in text
    assert text.endswith("\n  columns: {prompt: 'Prompt', chosen: 'COLUMN', rejected: 'COLUMN'}")
    assert message("prompts").endswith("\n  columns: {prompt: 'Prompt'}"), "the nearest name is proposed"
    text = message("preferences", chosen="beter", rejected="worse", margin="gap")
    assert "no row has the column 'prompt' or 'beter' or 'gap'" in text
    assert text.endswith("\n  columns: {prompt: 'Prompt', chosen: 'better', rejected: 'worse', margin: 'COLUMN'}")


def test_two_csv_columns_of_one_name_are_an_error_unless_they_have_none(root: Path) -> None:
    (root / "a.csv").write_text("prompt,prompt\na,b\n")
    with pytest.raises(DataError, match=r"a\.csv has two columns 'prompt': rename one"):
        collect_source(local(id="a.csv"), 0)
    (root / "a.csv").write_text("prompt,,\na,,\n")
    assert collect_source(local(id="a.csv"), 0).rows[0]["row"]["prompt"] == "a"


def test_a_field_that_the_row_type_lacks_is_refused() -> None:
    with pytest.raises(ValidationError, match="prompts have no field 'promt'; their fields are id, group, prompt, ans"):
        local(columns={"promt": "question"})


def test_a_template_is_put_around_each_prompt(root: Path) -> None:
    (row,) = collected(root, [{"prompt": "Why {x}?"}], template="User: {prompt}\nYou:")
    assert row["row"]["prompt"] == "User: Why {x}?\nYou:"


@pytest.mark.parametrize(("given", "ratings"), [([1, 2], [1, 2]), ("[1, 2.5]", [1, 2.5]), (3, [3]), ("4", [4])])
def test_ratings_come_in_several_spellings(root: Path, given: object, ratings: list[float]) -> None:
    (row,) = collected(root, [{"text": "a", "ratings": given}], row_type="ratings")
    assert row["row"]["ratings"] == ratings


def test_a_limit_keeps_the_first_rows_and_an_empty_source_is_an_error(root: Path) -> None:
    content = [{"prompt": str(number)} for number in range(5)]
    assert [row["row"]["prompt"] for row in collected(root, content, limit=2)] == ["0", "1"]
    with pytest.raises(DataError, match=r"source 'mine' \(local a\.jsonl\) holds no rows"):
        collected(root, [])


def test_two_dialogues_are_parted_at_the_last_answer_unless_they_differ_before(root: Path) -> None:
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    whole = [
        {"chosen": "one", "rejected": "two"},
        {"chosen": "\n\nHuman: A\n\nAssistant: one", "rejected": "\n\nHuman: B\n\nAssistant: two"},
    ]
    content = [{"chosen": f"{dialogue} So.", "rejected": f"{dialogue} No."}, *whole]
    rows = [row["row"] for row in collected(root, content, row_type="preferences")]
    assert rows[0] == {"id": "mine-1", "prompt": dialogue, "chosen": " So.", "rejected": " No."}
    assert rows[1:] == [{"id": f"mine-{line}", "prompt": "", **sides} for line, sides in enumerate(whole, start=2)]


def test_pairs_say_what_their_source_compares(root: Path) -> None:
    content = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "c"}]
    rows = collected(root, content, row_type="preferences", objective="helpful")
    assert [row["row"]["objective"] for row in rows] == ["helpful", "helpful"]
    assert "objective" not in collected(root, content, row_type="preferences")[0]["row"]


def test_a_pattern_cuts_the_answer_out_of_its_column_and_a_row_without_it_says_so(root: Path) -> None:
    content = [{"q": "1 + 1?", "a": "1 + 1 is two.\n#### 2 "}, {"q": "2 + 2?", "a": "4"}, {"q": "3 + 3?"}]
    columns = {"prompt": "q", "response": "a", "answer": "a"}
    rows = collected(root, content, row_type="demonstrations", columns=columns, answer_pattern="#### (.+)")
    first = {"id": "mine-1", "prompt": "1 + 1?", "response": "1 + 1 is two.\n#### 2 ", "answer": "2"}
    assert rows[0]["row"] == first
    assert [row["error"] for row in rows[1:]] == ["answer: '#### (.+)' is not in it"] * 2
    assert rows[1]["raw"] == '{"q": "2 + 2?", "a": "4"}'
    empty = collected(root, [{"prompt": "p", "answer": "####"}], answer_pattern="#### ?(.+)?")
    assert [row["error"] for row in empty] == ["answer: '#### ?(.+)?' is not in it"]


def test_a_row_on_which_the_pattern_would_search_for_ever_says_so(root: Path) -> None:
    content = [{"prompt": "p", "answer": "a" * 60 + "!"}, {"prompt": "q", "answer": "aa"}]
    slow, quick = collected(root, content, answer_pattern="^((?:a|aa)+)$")
    assert slow["error"] == "answer: '^((?:a|aa)+)$' takes too long on it"
    assert quick["row"]["answer"] == "aa"


@pytest.mark.parametrize("pattern", ["####", "(#)(#)", "("])
def test_a_pattern_without_exactly_one_group_is_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match=r"needs one group|no regular expression"):
        local(answer_pattern=pattern)


def test_reasoning_gym_gives_the_same_tasks_for_the_same_seed() -> None:
    pytest.importorskip("reasoning_gym")
    source = SourceParams(name="sums", kind="reasoning_gym", id="chain_sum", row_type="demonstrations", limit=3)
    first, again, other = (collect_source(source, seed).rows for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 3
    for row in first:
        expression = row["row"]["prompt"].rpartition(":")[2].removesuffix("=")
        assert row["row"]["response"] == str(sum(map(int, re.findall(r"[+-]?\d+", expression.replace(" ", "")))))


def test_a_task_of_many_right_answers_has_no_answer_that_reads_none() -> None:
    pytest.importorskip("reasoning_gym")
    cube: dict[str, Any] = {"name": "cube", "kind": "reasoning_gym", "id": "rubiks_cube", "limit": 2}
    rows = collect_source(SourceParams(**cube, row_type="prompts"), 0).rows
    assert [sorted(row["row"]) for row in rows] == [["id", "prompt"]] * 2
    with pytest.raises(DataError, match="'rubiks_cube' has no one right answer to show; use row_type prompts"):
        collect_source(SourceParams(**cube, row_type="demonstrations"), 0)


def test_an_unknown_reasoning_task_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceParams(name="sums", kind="reasoning_gym", id="no_such_task", row_type="prompts")
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataError, match="reasoning-gym makes no task 'no_such_task'"):
        collect_source(source, 0)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SourceError, match="needs the package: `pip install reasoning-gym`"):
        collect_source(source, 0)


@pytest.mark.parametrize(("constant", "value"), [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")])
def test_the_hub_without_a_network_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, constant: str, value: object
) -> None:
    monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)
    source = SourceParams(name="hh", kind="hub", id="Anthropic/hh-rlhf", row_type="preferences")
    with pytest.raises(SourceError, match=r"dataset 'Anthropic/hh-rlhf' .* could not be fetched.*check the network"):
        collect_source(source, 0)


def test_json_lines_keep_their_numbers_and_broken_ones_their_text(root: Path) -> None:
    content = b'\xef\xbb\xbf{"prompt": "one"}\n\n{"prompt": \r\n{"prompt": "caf\xe9"}\n[1]\n"text"\n{"prom\n'
    (root / "a.jsonl").write_bytes(content)
    first, *broken = collect_source(local(), 0).rows
    assert first == {"file": "a.jsonl", "line": 1, "row": {"id": "mine-1", "prompt": "one"}}
    assert broken == [
        {"file": "a.jsonl", "line": line, "raw": raw, "error": error}
        for line, raw, error in (
            (3, '{"prompt": ', "not JSON: Expecting value at column 12"),
            (4, '{"prompt": "caf\ufffd"}', "not UTF-8: invalid continuation byte at byte 16"),
            (5, "[1]", "not an object but list"),
            (6, '"text"', "not an object but a string"),
            (7, '{"prom', "not JSON: Unterminated string starting at at column 2"),
        )
    ]


def test_a_gzipped_file_reads_like_the_plain_one(root: Path) -> None:
    (root / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "one"}\n'))
    assert lines("a.jsonl.gz") == [("a.jsonl.gz", 1, {"prompt": "one"})]
    (root / "a.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        lines("a.jsonl.gz")


def test_csv_rows_know_the_line_they_start_on(root: Path) -> None:
    (root / "a.csv").write_text('id,prompt\n1,"two\nlines"\n2,short\n3\n4,a,b\n', encoding="utf-8")
    assert lines("a.csv") == [
        ("a.csv", 2, {"id": "1", "prompt": "two\nlines"}),
        ("a.csv", 4, {"id": "2", "prompt": "short"}),
        ("a.csv", 5, '1 cells under 2 column names\n["3", null]'),
        ("a.csv", 6, '3 cells under 2 column names\n["4", "a", "b"]'),
    ]


def test_csv_with_an_open_quote_is_refused(root: Path) -> None:
    (root / "a.csv").write_text('id,prompt\n1,"never closed\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv:2: not CSV"):
        lines("a.csv")


def test_parquet_rows_are_counted_from_one(root: Path) -> None:
    pandas.DataFrame({"text": ["a", "b"], "ratings": [[1.0, 2.0], [3.0]]}).to_parquet(root / "a.parquet")
    assert lines("a.parquet") == [
        ("a.parquet", 1, {"text": "a", "ratings": [1.0, 2.0]}),
        ("a.parquet", 2, {"text": "b", "ratings": [3.0]}),
    ]
    (root / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        lines("a.parquet")


def test_a_missing_file_another_checksum_and_an_unknown_ending_are_named(root: Path) -> None:
    with pytest.raises(SourceError, match=r"source 'mine': there is no file .*/none\.jsonl"):
        lines("none.jsonl")
    (root / "a.jsonl").write_text('{"prompt": "one"}\n')
    with pytest.raises(SourceError, match=r"a\.jsonl has SHA-256 [0-9a-f]{64}, params.yaml says 00"):
        lines("a.jsonl", sha256="00")
    (root / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt should end in \.jsonl, \.csv, \.parquet"):
        lines("a.txt")
