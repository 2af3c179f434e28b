"""README.md and docs/: their commands are understood, their YAML is valid, and what they name exists."""

import re
import shlex
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML
from typer.main import get_command

from flows.cli.main import app
from tasks.config.params import Params, load_preset, parse_override, write_overrides

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "custom", "data", "infra", "infra/compose", "infra/new", "scripts", "tests")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES += [ROOT / folder / "README.md" for folder in FOLDERS]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(page, kind, text) for page, whole in TEXTS.items() for kind, text in BLOCK.findall(whole)]
LINES = [(page, line) for page, kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
SNIPPETS = [(page, text) for page, kind, text in BLOCKS if kind == "yaml"]
SPANS = [
    (page, " ".join(span.split()))
    for page, whole in TEXTS.items()
    for span in re.findall(r"`([^`]+)`", BLOCK.sub("", whole))
]

COMMANDS = [pair for pair in LINES if pair[1].startswith("rlhf ")]
MENTIONS = [pair for pair in SPANS if pair[1].startswith(("rlhf ", "-S ", "--preset "))]
OURS = "benchmarks|custom|docs|flows|infra|scripts|tasks|tests"
FILE_TYPES = {"csv", "html", "json", "jsonl", "lock", "md", "py", "yaml"}


def find_command(line: str) -> tuple[str, Any, list[str]]:
    """The command that a line calls, by its last name, and the arguments that follow."""
    name, *words = shlex.split(line, comments=True)
    command = get_command(app)
    while words and words[0] in (known := getattr(command, "commands", {})):
        name = words.pop(0)
        command = known[name]
    assert name != "rlhf", "no such command"
    assert not (words and hasattr(command, "commands")), f"{name} has no command {words[0]}"
    return name, command, words


def check(line: str, params_yaml: Path) -> None:
    """Refuse what the command would refuse: unknown options, and values that params.yaml cannot take."""
    name, command, words = find_command(line)
    given = command.make_context(name, words).params
    if name == "run":
        changes = [load_preset(ROOT, given["preset"])] if given["preset"] else []
        write_overrides(params_yaml, [*changes, *map(parse_override, given["setting"])])


def test_there_are_commands_and_snippets_to_test() -> None:
    assert len(COMMANDS) > 40
    assert len(MENTIONS) > 30
    assert len(SNIPPETS) > 4


def test_readme_is_a_landing_page() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 200


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_is_understood(page: str, line: str, params_yaml: Path) -> None:
    check(line, params_yaml)


@pytest.mark.parametrize(("page", "span"), MENTIONS)
def test_a_command_in_a_sentence_is_understood(page: str, span: str, params_yaml: Path) -> None:
    """A name alone must exist; with arguments, it must be a whole call."""
    line = (span if span.startswith("rlhf ") else f"rlhf run {span}").replace("--preset NAME", "--preset tiny")
    if find_command(line)[2]:
        check(line, params_yaml)


@pytest.mark.parametrize(("page", "text"), SNIPPETS)
def test_a_snippet_is_valid(page: str, text: str, params_yaml: Path) -> None:
    """A snippet is an overlay of params.yaml, unless its first line is a comment that names another file."""
    content = YAML(typ="safe").load(text)
    if not text.startswith("# "):
        assert write_overrides(params_yaml, [content])


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", BLOCK.sub("", TEXTS[page]))
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []


@pytest.mark.parametrize("page", TEXTS)
def test_files_exist(page: str) -> None:
    inline = {span for where, span in SPANS if where == page and re.fullmatch(rf"(?:{OURS})/[\w./-]*", span)}
    called = {path for where, line in LINES if where == page for path in re.findall(r"python ([\w/]+\.py)", line)}
    assert sorted(path for path in inline | called if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("page", TEXTS)
def test_make_targets_exist(page: str) -> None:
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = [text for where, text in [*LINES, *SPANS] if where == page and text.startswith("make ")]
    assert [text for text in commands if text.split()[1] not in known] == []


@pytest.mark.parametrize("page", TEXTS)
def test_parameters_exist(page: str) -> None:
    """`section.key`, alone or with a value, names a key of params.yaml."""
    unknown = []
    for where, span in SPANS:
        match = re.fullmatch(r"(\w+)\.(\w+)(?:[.:=\[].*)?", span)
        if where != page or not match or match[1] not in Params.model_fields or match[2] in FILE_TYPES:
            continue
        annotation = Params.model_fields[match[1]].annotation
        section = next(kind for kind in get_args(annotation) or [annotation] if kind is not NoneType)
        if match[2] not in section.model_fields:
            unknown.append(span)
    assert unknown == []
