"""Changing params.yaml: the lines of what changes, and not a byte of the rest."""

import difflib
import io
import random
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tasks.config.params import load_preset, parse_override, write_overrides
from tasks.config.yaml_text import edit_yaml

ROOT = Path(__file__).resolve().parents[3]
PRESETS = sorted(path.stem for path in (ROOT / "infra" / "presets").glob("*.yaml"))

TEXT = """\
# head
seed:   0     # of all
name: 'a: b'  # quoted
sft:          # a section

  epochs: 1
  modules: [ q, v ]   # spaced
  rate: 2.0e-3

# of the next section
off: null     # switch
empty:
flow: {a: 1, b: {c: "2"}}
none: {}
rows:
    - name: one   # first
      x: 1
    # between
    - {name: two, x: 2}
plain:
- 1
- 2
last:
  text: |
    line 1
    line 2

  end: 9"""

CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "a number": ({"seed": 1}, ["seed:   0     # of all"], ["seed:   1     # of all"]),
    "a quoted text": ({"name": "c"}, ["name: 'a: b'  # quoted"], ["name: c  # quoted"]),
    "a text that needs quotes": ({"seed": "1"}, ["seed:   0     # of all"], ["seed:   '1'     # of all"]),
    "a text of lines": ({"seed": "a\nb"}, ["seed:   0     # of all"], [r'seed:   "a\nb"     # of all']),
    "an inner value": ({"sft": {"epochs": 2}}, ["  epochs: 1"], ["  epochs: 2"]),
    "one of a list": (
        {"sft": {"modules": ["q", "k"]}}, ["  modules: [ q, v ]   # spaced"], ["  modules: [ q, k ]   # spaced"],
    ),
    "a longer list": (
        {"sft": {"modules": ["q", "k", "a, b"]}},
        ["  modules: [ q, v ]   # spaced"],
        ["  modules: [q, k, 'a, b']   # spaced"],
    ),
    "a list for a number": (
        {"sft": {"rate": [1, 2]}}, ["  rate: 2.0e-3"], ["  rate: [1, 2]"],
    ),
    "a new key": ({"sft": {"more": None}}, [], ["  more: null"]),
    "new keys": ({"sft": {"more": {"a": {"b": 1}, "c": [1]}}}, [], ["  more:", "    a:", "      b: 1", "    c: [1]"]),
    "a key at the end": ({"last": {"new": 1}}, [], ["  new: 1"]),
    "a section at the end": ({"new": {"a": 1}}, [], ["new:", "  a: 1"]),
    "a section switched on": (
        {"off": {"a": 1, "b": [{"c": 2}]}},
        ["off: null     # switch"],
        ["off:     # switch", "  a: 1", "  b:", "    - c: 2"],
    ),
    "a value where there was none": ({"empty": 3}, ["empty:"], ["empty: 3"]),
    "a section where there was none": ({"empty": {"a": 3}}, [], ["  a: 3"]),
    "a section switched off": (
        {"sft": None},
        ["sft:          # a section", "", "  epochs: 1", "  modules: [ q, v ]   # spaced", "  rate: 2.0e-3"],
        ["sft: null          # a section"],
    ),
    "within braces": (
        {"flow": {"b": {"c": "3"}}}, ['flow: {a: 1, b: {c: "2"}}'], ["flow: {a: 1, b: {c: '3'}}"],
    ),
    "a new key within braces": (
        {"flow": {"d": None}}, ['flow: {a: 1, b: {c: "2"}}'], ["flow: {a: 1, b: {c: '2'}, d: null}"],
    ),
    "empty braces": ({"none": {"a": 1}}, ["none: {}"], ["none:", "  a: 1"]),
    "an item of rows": ({"rows": [{"name": "one", "x": 3}, {"name": "two", "x": 2}]}, ["      x: 1"], ["      x: 3"]),
    "one more row": (
        {"rows": [{"name": "one", "x": 1}, {"name": "two", "x": 2}, {"name": "three"}]}, [], ["    - name: three"],
    ),
    "one row less": ({"rows": [{"name": "one", "x": 1}]}, ["    - {name: two, x: 2}"], []),
    "no row": (
        {"rows": []},
        ["rows:", "    - name: one   # first", "      x: 1", "    # between", "    - {name: two, x: 2}"],
        ["rows: []"],
    ),
    "a block list": ({"plain": [1, 3, 4]}, ["- 2"], ["- 3", "- 4"]),
    "after a text of lines": ({"last": {"end": 8}}, ["  end: 9"], ["  end: 8"]),
    "a text of lines itself": (
        {"last": {"text": "x"}}, ["  text: |", "    line 1", "    line 2"], ["  text: x"],
    ),
}  # fmt: skip


def merged(value: Any, change: dict[str, Any]) -> Any:
    """The change merged into what ruamel has loaded."""
    for key, inner in change.items():
        if isinstance(inner, dict) and isinstance(value.get(key), dict) and value[key]:
            merged(value[key], inner)
        else:
            value[key] = inner
    return value


def differing_lines(before: str, after: str) -> tuple[list[str], list[str]]:
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    return [line[2:] for line in lines if line[0] == "-"], [line[2:] for line in lines if line[0] == "+"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("case", CASES)
def test_only_the_lines_of_the_change_differ(case: str, newline: str) -> None:
    change, removed, added = CASES[case]
    text = TEXT.replace("\n", newline)
    document = merged(YAML().load(text), change)
    edited = edit_yaml(text, YAML(typ="safe").load(text), document)
    assert edited.count("\n") == edited.count(newline), "every line ends as before"
    assert differing_lines(TEXT, edited.replace(newline, "\n")) == (removed, added)
    assert YAML(typ="safe").load(edited) == document


def test_a_key_that_goes_takes_its_lines_along() -> None:
    document = YAML().load(TEXT)
    del document["rows"], document["seed"], document["flow"]["b"]
    edited = edit_yaml(TEXT, YAML(typ="safe").load(TEXT), document)
    removed, added = differing_lines(TEXT, edited)
    assert added == ["flow: {a: 1}"]
    assert "seed:   0     # of all" in removed
    assert len(removed) == 1 + 1 + 5


def test_what_an_alias_shares_is_written_anew_and_stays_right() -> None:
    text = "# kept\na: &one {x: 1}\nb: *one\nc: 3\n"
    document = YAML().load(text)
    document["b"] = {"x": 2}
    edited = edit_yaml(text, YAML(typ="safe").load(text), document)
    assert YAML(typ="safe").load(edited) == {"a": {"x": 1}, "b": {"x": 2}, "c": 3}
    assert "# kept" in edited


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_its_own_lines_and_no_comment(preset: str, params_yaml: Path) -> None:
    text = params_yaml.read_text()
    write_overrides(params_yaml, [load_preset(ROOT, preset)])
    removed, added = differing_lines(text, params_yaml.read_text())
    assert [line for line in [*removed, *added] if line.lstrip().startswith("#")] == []
    before = params_yaml.read_bytes()
    assert write_overrides(params_yaml, [load_preset(ROOT, preset)]) == []
    assert params_yaml.read_bytes() == before


def test_two_settings_are_two_lines(params_yaml: Path) -> None:
    text = params_yaml.read_text()
    write_overrides(params_yaml, [parse_override("ppo.kl_coef=0.1"), parse_override("gate.margins.win_rate=0.1")])
    removed, added = differing_lines(text, params_yaml.read_text())
    assert removed == ["  kl_coef: 0.05", "  margins: {win_rate: 0.05, repetition: 0.05, truncated_share: 0.15}"]
    assert added == ["  kl_coef: 0.1", "  margins: {win_rate: 0.1, repetition: 0.05, truncated_share: 0.15}"]


SCALARS = [
    0, 1, -2, 0.5, 1e-05, 1e22, True, False, None, "", "a", "a b", "a: b", "#c", "- d", "null", "1", "{x}", "ä→",
    "it's", 'say "x"', "l1\nl2", "end:", "x, y", "[", "*a", "&b", "!t", "%", "@", "`", "|", ">", "~", "yes",
]  # fmt: skip


def random_value(draw: random.Random, depth: int) -> Any:
    if depth == 0 or draw.random() < 0.5:
        return draw.choice(SCALARS)
    if draw.random() < 0.4:
        return [random_value(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    return {key: random_value(draw, depth - 1) for key in draw.sample("abcdefg", draw.randint(0, 4))}


def changed(draw: random.Random, value: Any) -> Any:
    """The value with parts of it replaced, removed and added."""
    if draw.random() < 0.15 or not isinstance(value, dict | list):
        return random_value(draw, 2) if draw.random() < 0.4 else value
    if isinstance(value, list):
        kept = [changed(draw, item) for item in value]
        return (
            kept[: draw.randint(0, len(kept))]
            if draw.random() < 0.2
            else kept + [draw.choice(SCALARS)][: draw.randint(0, 1)]
        )
    kept = {key: changed(draw, inner) for key, inner in value.items() if draw.random() > 0.1}
    return kept | ({draw.choice("hij"): random_value(draw, 2)} if draw.random() < 0.3 else {})


@pytest.mark.parametrize("seed", range(10))
def test_whatever_changes_the_text_means_it_afterwards(seed: int) -> None:
    """Random documents in block style, in flow style, and mixed; each with comments between its lines."""
    draw = random.Random(seed)
    for _ in range(100):
        before = {key: random_value(draw, 3) for key in "uvwxyz"}
        after = {key: changed(draw, value) for key, value in before.items()}
        yaml, stream = YAML(), io.StringIO()
        yaml.default_flow_style = draw.choice([False, None])
        yaml.indent(*draw.choice([(2, 4, 2), (2, 2, 0), (4, 6, 4)]))
        yaml.dump(before, stream)
        text = stream.getvalue()
        if "|" not in text:
            text = "".join(
                line + ("# note\n" if draw.random() < 0.1 else "") for line in text.splitlines(keepends=True)
            )
        document = YAML().load(text)
        for key, value in after.items():
            document[key] = value
        edited = edit_yaml(text, YAML(typ="safe").load(text), document)
        assert YAML(typ="safe").load(edited) == after, (text, after, edited)
