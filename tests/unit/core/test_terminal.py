"""What is printed where the output cannot say everything, and progress with and without a terminal."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core.terminal import Progress

ROOT = Path(__file__).resolve().parents[3]
PLAIN_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

PRINT = """
import json, sys
from tasks.core.terminal import allow_all_characters
allow_all_characters()
print("✓ sft 1 → 2 …", "naïve 😀 \\udce9")
print(json.dumps({"text": "ï😀" + sys.argv[1]}, ensure_ascii=False))
print("✓", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"PYTHONIOENCODING": "ascii"}, r"ok sft 1 -> 2 ... na\u00efve \ud83d\ude00 \udce9"),
        ({"PYTHONIOENCODING": "latin-1"}, r"ok sft 1 -> 2 ... naïve \ud83d\ude00 \udce9"),
        (PLAIN_LOCALE, r"ok sft 1 -> 2 ... na\u00efve \ud83d\ude00 \udce9"),
        ({"PYTHONIOENCODING": "utf-8"}, r"✓ sft 1 → 2 … naïve 😀 \udce9"),
    ],
    ids=["ascii", "latin-1", "C", "UTF-8"],
)
def test_every_character_can_be_printed_and_json_stays_json(
    variables: dict[str, str], line: str, tmp_path: Path
) -> None:
    (tmp_path / "print.py").write_text(PRINT, encoding="utf-8")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    command, environment = [sys.executable, tmp_path / "print.py", "é".encode()], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=kept | variables | environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.decode("latin-1" if "latin-1" in variables.values() else "utf-8").splitlines()
    assert first == line
    assert json.loads(second) == {"text": "ï😀é"}


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("sft", 10, "step", done=2)
    for step in range(3, 11):
        progress.update(step, {"loss": 1 / step})
        progress.update(step)
    progress.close()
    printed = capsys.readouterr().err
    assert "\r" not in printed
    assert printed.splitlines() == [
        "sft: step 3 of 10, loss 0.333",
        "sft: step 5 of 10, loss 0.2",
        "sft: step 8 of 10, loss 0.125",
        "sft: step 10 of 10, loss 0.1",
    ]


def test_on_a_terminal_it_is_a_bar_and_a_hidden_one_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for hidden in (False, True):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress("sft", 2, "step", hidden=hidden)
        progress.update(2, {"loss": 0.5})
        progress.close()
        shown = terminal.getvalue()
        assert shown == "" if hidden else "\r" in shown and "2/2" in shown and "loss 0.5" in shown
