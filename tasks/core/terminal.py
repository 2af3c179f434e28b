"""What a stage or a command shows while it runs: characters that every terminal and file can take, progress, logs."""

import codecs
import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

__all__ = ["Progress", "allow_all_characters", "print_line", "tail"]

PLAIN = str.maketrans(
    {"✓": "ok", "▸": ">", "→": "->", "–": "-", "—": "-", "−": "-", "…": "...", "─": "-", "√": "sqrt ", "±": "+-"}
)
"""What stands for a character of ours where the output's encoding has none for it; any other is escaped."""

TAIL_LINES = 15
LINES = 4  # of progress at most, where no terminal shows a bar


def allow_all_characters() -> None:
    """Let this process print every character, and read its arguments as UTF-8, whatever the locale says."""
    codecs.register_error("rlhf.plain", _encode_plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            stream.reconfigure(errors="rlhf.plain")
    sys.argv = [os.fsencode(word).decode("utf-8", "surrogateescape") for word in sys.argv]


def _encode_plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return json.dumps(text)[1:-1], error.end  # escaped as in JSON, which some commands print


def print_line(text: str) -> None:
    """Print a line to standard error, above a progress bar."""
    tqdm.write(text, file=sys.stderr)


def tail(log: Path) -> str:
    """The path of a log and its last lines, for an error message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"see {log}", *lines[-TAIL_LINES:]])


class Progress:
    """A progress bar on a terminal; elsewhere (a log file, a pipe) a line after each quarter of the way.

    Args:
        label: what is going on.
        total: number of steps.
        unit: of a step.
        done: steps of an earlier run.
        hidden: show nothing, because another rank does.
    """

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, hidden: bool = False) -> None:
        self._label, self._total, self._unit, self._done = label, total, unit, done
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._prints_lines = not (on_terminal or hidden)
        self._bar: Any = tqdm(total=total, initial=done, desc=label, unit=unit, disable=hidden or not on_terminal)

    def update(self, done: int, figures: Mapping[str, float] | None = None) -> None:
        """Show how many steps are done, those of an earlier run included, with figures of the last one."""
        shown = ", ".join(f"{name} {value:.3g}" for name, value in (figures or {}).items())
        if shown:
            self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(done - self._done)
        if self._prints_lines and LINES * done // self._total > LINES * self._done // self._total:
            print_line(f"{self._label}: {self._unit} {done} of {self._total}" + (f", {shown}" if shown else ""))
        self._done = done

    def close(self) -> None:
        """End the bar, which stays visible."""
        self._bar.close()
