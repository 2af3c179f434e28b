"""Stage prepare: what is kept, what is dropped and counted, and that nothing leaks between splits or halves."""

import gzip
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import DataError
from tasks.core.paths import Artifacts
from tasks.core.rows import SPLITS, Demonstration, Preference, Prompt, Rating, RowT, read_rows
from tasks.data.cleaning import shingles, similarity
from tasks.prepare import prepare
from tests.support.collected import PREPARE, write_collected
from tests.support.tokenizers import write_tokenizer


def corpus(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Rated texts of which every third nearly repeats the one before it."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        words = [f"w{rng.randrange(60)}" for _ in range(rng.randrange(4, 14))]
        if number % 3 == 2:
            words = [*rows[-1]["text"].split()[:-1], "changed"]
        rows.append({"id": str(number), "text": " ".join(words), "ratings": [rng.randrange(-4, 5) for _ in range(3)]})
    return rows


def run(tmp_path: Path, rows: list[dict[str, Any]], row_type: str = "ratings", **changes: Any) -> tuple[Path, Any]:
    folder = write_collected(tmp_path / "collect", row_type, rows)
    out = tmp_path / "out"
    prepare(
        PREPARE.model_copy(update=changes),
        0,
        Artifacts(base_model=write_tokenizer(tmp_path / "base_model"), collect=folder, out=out),
    )
    return out, json.loads((out / "metrics.json").read_text())


def read(folder: Path, row_type: type[RowT]) -> dict[str, list[RowT]]:
    """The rows by split, as far as there is a file."""
    return {path.stem: read_rows(path, row_type) for path in folder.glob("*.jsonl")}


def ratings(out: Path) -> dict[tuple[str, str], list[Rating]]:
    halves = {half: read(out / "ratings" / half, Rating) for half in ("proxy", "gold")}
    return {(half, split): rows for half, splits in halves.items() for split, rows in splits.items()}


def first_words(rows: list[Rating]) -> set[str]:
    return {" ".join(row.text.split()[:3]) for row in rows}


def prompts_of(rows: list[Any]) -> set[str]:
    return {row.prompt for row in rows}


def assert_apart(groups: list[list[str]]) -> None:
    """No text of a group nearly repeats one of another group."""
    for one, other in itertools.combinations([[*map(shingles, texts)] for texts in groups], 2):
        assert max(similarity(a, b) for a in one for b in other) < PREPARE.near_duplicate_threshold


def test_no_text_or_near_duplicate_is_in_two_splits_or_halves(tmp_path: Path) -> None:
    out, metrics = run(tmp_path, corpus(900, random.Random(0)))
    groups = [[row.text for row in rows] for rows in ratings(out).values()]
    assert all(len(group) > 20 for group in groups)
    assert_apart(groups)
    assert metrics["dropped"]["near_duplicate"] > 100


def test_every_row_is_kept_or_counted(tmp_path: Path) -> None:
    rows = corpus(300, random.Random(1))
    rows += [{**rows[0], "id": "again"}, {"id": "bad", "text": "x", "ratings": []}]
    out, metrics = run(tmp_path, rows)
    dropped = metrics["dropped"]
    assert (metrics["rows"]["collected"], metrics["rows"]["quarantined"]) == (302, 1)
    reasons = ("too_short", "too_long", "duplicate", "near_duplicate")
    assert 302 - 1 - sum(dropped[reason] for reason in reasons) == metrics["rows"]["kept"]
    assert dropped["too_short"] == sum(len(row["text"].split()) < 5 for row in rows[:301])
    written = sum(sum(metrics[f"ratings_{half}"].values()) for half in ("proxy", "gold"))
    assert written == metrics["rows"]["kept"]
    assert (out / "quarantine.jsonl").read_text().count("\n") == 1


def test_demonstrations_are_the_proxy_half_cut_after_the_prompt(tmp_path: Path) -> None:
    out, _ = run(tmp_path, corpus(300, random.Random(2)))
    rated = ratings(out)
    shown = read(out / "demonstrations", Demonstration)
    assert shown.keys() == {"train", "validation"}
    for split, rows in shown.items():
        assert [row.prompt + row.response for row in rows] == [row.text for row in rated["proxy", split]]
        assert {len(row.prompt.split()) for row in rows} == {3}
        assert all(row.response.startswith(" ") for row in rows)


def test_each_prompt_is_in_one_split_once_and_the_gold_half_gives_test_prompts_alone(tmp_path: Path) -> None:
    rows = corpus(600, random.Random(3))
    for row in rows:
        row["text"] = " ".join([f"p{len(row['text']) % 13}", *row["text"].split()[1:]])
    for row in rows[::5]:
        row["text"] = "The film is " + " ".join(row["text"].split()[3:])
    out, metrics = run(tmp_path, rows)
    prompts = {split: [row.prompt for row in asked] for split, asked in read(out / "prompts", Prompt).items()}
    everything = list(itertools.chain(*prompts.values()))
    assert len(everything) == len(set(everything))
    assert "The film is" in prompts["train"]
    rated = ratings(out)
    sources = {split: first_words(rated["proxy", split]) for split in SPLITS}
    assert set(prompts["train"]) == sources["train"]
    gold = first_words(rated["gold", "test"])
    assert set(prompts["test"]) == (sources["test"] | gold) - sources["train"] - sources["validation"]
    lost = sum(count for reason, count in metrics["dropped"].items() if "prompt" in reason)
    given = sum(len(rated["proxy", split]) for split in SPLITS) + len(rated["gold", "test"])
    assert lost == given - len(everything)
    assert metrics["dropped"]["test_prompt_also_in_train"] > 0


def test_new_rows_leave_the_old_ones_where_they_were(tmp_path: Path) -> None:
    rows = corpus(600, random.Random(4))
    before, _ = run(tmp_path / "before", rows[:400])
    after, _ = run(tmp_path / "after", rows)
    old, new = ratings(before), ratings(after)
    for group, kept in old.items():
        assert [row.id for row in new[group] if int(row.id) < 400] == [row.id for row in kept]
        assert len(new[group]) > len(kept)


def test_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    one, two = (run(tmp_path / name, corpus(200, random.Random(5)))[0] for name in ("one", "two"))
    files = sorted(path.relative_to(one) for path in one.rglob("*.json*"))
    assert len(files) == 2 + 2 + 3 + 3 + 3 + 6
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_answers_to_one_prompt_stay_together_and_near_repeats_of_it_go(tmp_path: Path) -> None:
    rows = [
        {"id": f"{number}-{place}", "prompt": f"why is number {number} odd ?", "response": f"because {answer}"}
        for number in range(120)
        for place, answer in enumerate(("yes", "no", "no"))
    ]
    out, metrics = run(tmp_path, rows, "demonstrations")
    shown = read(out / "demonstrations", Demonstration)
    train = prompts_of(shown["train"])
    assert train.isdisjoint(prompts_of(shown["validation"]))
    assert len(shown["train"]) == 2 * len(train)
    assert all(row.response.startswith(" because") for row in shown["train"])
    assert metrics["dropped"]["duplicate"] == 120
    assert metrics["prompts"]["train"] == len(train)
    assert metrics["ratings_proxy"] == metrics["ratings_gold"] == {"train": 0, "validation": 0, "test": 0}
    rows.append({"id": "x", "prompt": "Why is number 7 odd?", "response": "because"})
    assert run(tmp_path / "more", rows, "demonstrations")[1]["dropped"]["near_duplicate"] == 1


def test_preferences_give_pairs_prompts_and_where_nothing_else_does_demonstrations(tmp_path: Path) -> None:
    rows = [
        {"id": str(number), "prompt": f"say something about {number}:", "chosen": f"good {number}", "rejected": "bad"}
        for number in range(100)
    ]
    rows += [{**rows[0], "id": "same", "chosen": "bad", "rejected": "bad "}, {**rows[1], "id": "copy"}]
    out, metrics = run(tmp_path, rows, "preferences")
    assert metrics["rows"]["quarantined"] == 1
    assert "same text" in json.loads((out / "quarantine.jsonl").read_text())["reason"]
    assert metrics["dropped"]["duplicate"] == 1
    pairs, shown = read(out / "preferences", Preference), read(out / "demonstrations", Demonstration)["train"]
    assert [(row.prompt, row.response) for row in shown] == [(row.prompt, row.chosen) for row in pairs["train"]]
    assert prompts_of(read(out / "prompts", Prompt)["test"]) == prompts_of(pairs["test"])
    rated = [{**row, "id": f"rated{row['id']}"} for row in corpus(60, random.Random(6))]
    write_collected(tmp_path / "collect", "ratings", rated, "rated")
    prepare(
        PREPARE,
        0,
        Artifacts(base_model=write_tokenizer(tmp_path / "base_model"), collect=tmp_path / "collect", out=out),
    )
    assert not any("good" in row.response for row in read(out / "demonstrations", Demonstration)["train"])


@pytest.mark.parametrize("seed", range(4))
def test_a_group_is_in_one_split_and_one_half_whatever_its_rows_are(tmp_path: Path, seed: int) -> None:
    """Texts of all row types; groups of six rows, and rows of another source that repeat a prompt without the group."""
    rng = random.Random(seed)

    def text(length: int = 7) -> str:
        return " ".join(f"w{rng.randrange(500)}" for _ in range(length))

    collect, groups = tmp_path / "collect", [f"g{number}" for number in range(40) for _ in range(6)]
    asked = [{"id": f"a{n}", "group": group, "prompt": text()} for n, group in enumerate(groups)]
    rated = [{"id": f"r{n}", "group": group, "text": text(), "ratings": [1]} for n, group in enumerate(groups)]
    pairs = [{**row, "id": f"p{row['id']}", "chosen": text(3), "rejected": text(3)} for row in asked]
    shown = [{"id": f"d{row['id']}", "prompt": row["prompt"], "response": text(3)} for row in asked]
    for row_type, rows in {"prompts": asked, "ratings": rated, "preferences": pairs, "demonstrations": shown}.items():
        write_collected(collect, row_type, rows, row_type)
    prepare(
        PREPARE.model_copy(update={"gold_pair_share": 0.5}),
        seed,
        Artifacts(base_model=write_tokenizer(tmp_path / "base_model"), collect=collect, out=tmp_path / "out"),
    )
    group_of = {row["prompt"]: row["group"] for row in asked}
    found: dict[str, set[str]] = {}
    halves: dict[str, set[str]] = {}
    for path in (tmp_path / "out").rglob("*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            group = row.get("group") or group_of[row["prompt"]]
            found.setdefault(group, set()).add(path.stem)
            if "preferences" in path.parts or "ratings" in path.parts:
                halves.setdefault(group, set()).add("gold" if path.parent.name == "gold" else "proxy")
    assert set(found) == set(groups)
    assert all(len(splits) == 1 for splits in found.values())
    assert len({*itertools.chain(*found.values())}) == 3
    assert all(len(parts) == 1 for parts in halves.values())
    assert len({*itertools.chain(*halves.values())}) == 2


def test_gold_pairs_are_a_share_that_no_other_stage_sees_and_long_ones_are_dropped(tmp_path: Path) -> None:
    """Two pairs a prompt, which stay together; every tenth pair has a side of nine words."""
    rows = [
        {"id": f"{n}{way}", "prompt": f"say something {n}:", "chosen": f"good {way}{n}{' so' * (n % 10 == 0) * 4}",
         "rejected": f"bad {way}{n}"}
        for n in range(200) for way in "ab"
    ]  # fmt: skip
    out, metrics = run(
        tmp_path, rows, "preferences", near_duplicate_threshold=1.0, gold_pair_share=0.4, max_preference_words=8
    )
    assert metrics["dropped"]["too_long"] == 40
    ours, gold = (read(folder, Preference) for folder in (out / "preferences", out / "preferences" / "gold"))
    assert sum(map(len, ours.values())) + sum(map(len, gold.values())) == 360
    assert {split: len(rows) for split, rows in gold.items()} == metrics["preferences_gold"]
    assert sum(map(len, gold.values())) / 360 == pytest.approx(0.4, abs=0.1)
    unseen = prompts_of([row for part in gold.values() for row in part])
    assert unseen.isdisjoint(prompts_of([row for part in ours.values() for row in part]))
    asked = read(out / "prompts", Prompt)
    shown = prompts_of(read(out / "demonstrations", Demonstration)["train"])
    assert unseen.isdisjoint(shown | prompts_of(asked["train"])), "training does without the gold judge's texts"
    assert prompts_of(asked["test"]) == prompts_of(ours["test"] + gold["test"])


SYSTEM = " ".join(f"rule{number} says be helpful" for number in range(29))


def test_pairs_that_share_a_system_prompt_are_no_near_duplicates(tmp_path: Path, caplog: Any) -> None:
    rng = random.Random(0)
    rows = [
        {"id": str(n), "prompt": f"{SYSTEM} what is {rng.randrange(10**6)} plus {rng.randrange(10**6)} ?",
         "chosen": f"it is {n}", "rejected": "no idea"}
        for n in range(300)
    ]  # fmt: skip
    _, metrics = run(tmp_path, rows, "preferences", max_words=200)
    assert metrics["rows"]["kept"] == 300
    assert metrics["dropped"]["near_duplicate"] == metrics["dropped"]["same_prompt"] == 0
    assert "dropped_share" not in metrics
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_prompt_of_several_rows_is_counted_once_for_each_row_after_the_first(tmp_path: Path) -> None:
    rows = [
        {"id": f"{n}-{way}", "prompt": f"say something {n}:", "chosen": f"good {way}", "rejected": "bad"}
        for n in range(60) for way in "abc"
    ]  # fmt: skip
    _, metrics = run(tmp_path, rows, "preferences", near_duplicate_threshold=1.0)
    assert (metrics["rows"]["kept"], metrics["dropped"]["same_prompt"]) == (180, 120)


RULES: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "near_duplicate": (
        "near_duplicate_threshold", lambda n: {"text": " ".join(f"w{n // 2}-{place}" for place in range(5 + n % 2))}
    ),
    "too_long": ("max_words", lambda n: {"text": f"a b c d {n}" + " x" * (n % 3) * 5}),
    "too_short": ("min_words", lambda n: {"text": f"{'a b c ' * (n % 3)}{n} b"}),
    "duplicate": ("nothing to set", lambda n: {"text": f"a b c d {n % 40}"}),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_drops_many_rows_is_a_warning_with_the_key_to_change(
    tmp_path: Path, caplog: Any, rule: str
) -> None:
    key, make = RULES[rule]
    rows = [{"id": str(number), **make(number)} for number in range(60)]
    rows = [{**row, "ratings": [1]} for row in rows]
    _, metrics = run(tmp_path, rows, near_duplicate_threshold=0.7 if rule == "near_duplicate" else 1.0)
    count = metrics["dropped"][rule]
    (line,) = caplog.messages
    assert line.startswith(f"prepare: {count} of 60 rows (")
    assert f" are dropped as {rule}; " in line
    assert key in line
    assert metrics["dropped_share"] == {rule: pytest.approx(count / 60, abs=1e-6)}
    assert count >= 20


def test_the_default_s_bounds_select_among_film_reviews_without_a_warning(tmp_path: Path, caplog: Any) -> None:
    rows = corpus(120, random.Random(9))
    run(tmp_path, rows)
    assert "are dropped as too_short" in caplog.text
    caplog.clear()
    (tmp_path / "collect" / "cards" / "mine.json").write_text('{"kind": "film_reviews", "type": "ratings"}')
    prepare(
        PREPARE,
        0,
        Artifacts(
            base_model=write_tokenizer(tmp_path / "base_model"), collect=tmp_path / "collect", out=tmp_path / "out"
        ),
    )
    (line,) = caplog.messages
    assert "are dropped as near_duplicate" in line


def test_one_pair_about_two_objectives_is_two_rows(tmp_path: Path) -> None:
    row = {"prompt": "why so:", "chosen": "because", "rejected": "no"}
    rows = [{**row, "id": "1", "objective": "kind"}, {**row, "id": "2", "objective": "short"}, {**row, "id": "3"}]
    rows += [{**row, "id": "4"}, {**row, "id": "5", "objective": "kind"}]
    out, metrics = run(tmp_path, rows, "preferences", validation_share=0.0, test_share=0.0)
    assert metrics["dropped"]["duplicate"] == 2
    kept = [json.loads(line) for line in (out / "preferences" / "train.jsonl").read_text().splitlines()]
    assert {pair["id"]: pair.get("objective") for pair in kept} == {"1": "kind", "2": "short", "3": None}
    assert all(("objective" in pair) == (pair["id"] != "3") for pair in kept), "a file says it only where it is known"


def test_too_many_malformed_rows_stop_the_stage_and_leave_the_quarantine(tmp_path: Path) -> None:
    """The bound itself, a share of 0.1, is allowed; the message shows the first five of them."""
    broken = [{"raw": "{oops", "error": f"reason {number}"} for number in range(1, 8)]
    assert run(tmp_path, corpus(63, random.Random(7)) + broken)[1]["rows"]["quarantined"] == 7
    file = tmp_path / "out" / "quarantine.jsonl"
    with pytest.raises(DataError, match=r"(?s)7 of 27 rows \(25\.93%\) are malformed.*allows \(10\.00%\)") as caught:
        run(tmp_path, corpus(20, random.Random(7)) + broken)
    assert "mine.jsonl:25: reason 5" in str(caught.value)
    assert "reason 6" not in str(caught.value)
    assert str(file) in str(caught.value)
    first = json.loads(file.read_text().splitlines()[0])
    assert first == {"source": "mine", "file": "mine.jsonl", "line": 21, "reason": "reason 1", "raw": "{oops"}


def test_when_nothing_is_left_the_message_says_what_happened_to_the_rows(tmp_path: Path) -> None:
    rows = [{"id": str(number), "text": "too short", "ratings": [1]} for number in range(7)]
    with pytest.raises(DataError, match=r"none of 7 collected rows is left \(too_short 7\)"):
        run(tmp_path, rows)


def test_real_problems_split_without_leaks(tmp_path: Path) -> None:
    file = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl.gz"
    if not file.is_file():
        pytest.skip("no problems on this machine")
    problems = list(map(json.loads, gzip.decompress(file.read_bytes()).splitlines()))
    rows = [{"id": str(i), "prompt": row["question"], "response": row["answer"]} for i, row in enumerate(problems)]
    out, metrics = run(tmp_path, rows, "demonstrations", max_words=1000)
    assert_apart([[row.prompt for row in asked] for asked in read(out / "prompts", Prompt).values()])
    assert metrics["rows"]["kept"] > 0.98 * len(problems)
