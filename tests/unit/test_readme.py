"""What README says to type is understood, and what it says to write into params.yaml is valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.main import get_command

from flows.cli.main import app
from tasks.core.params import apply_changes, parse_override, preset_changes

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
LINES = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("rlhf ")]
SNIPPETS = [text for kind, text in BLOCKS if kind == "yaml"]


def test_there_are_commands_and_snippets_to_test() -> None:
    assert len(COMMANDS) > 30
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line: str, params_yaml: Path) -> None:
    name, *words = shlex.split(line, comments=True)
    command = get_command(app)
    while words and words[0] in (known := getattr(command, "commands", {})):
        name = words.pop(0)
        command = known[name]
    assert name != "rlhf", "no such command"
    assert not (words and hasattr(command, "commands")), f"{name} has no command {words[0]}"
    given = command.make_context(name, words).params
    if name == "run":
        changes = [preset_changes(ROOT, given["preset"])] if given["preset"] else []
        apply_changes(params_yaml, [*changes, *map(parse_override, given["setting"])])


@pytest.mark.parametrize("text", SNIPPETS, ids=["reward", "collect"])
def test_a_snippet_is_valid(text: str, params_yaml: Path) -> None:
    assert apply_changes(params_yaml, [YAML(typ="safe").load(text)])
