"""Console output of the commands: a line per stage, tables, errors; also entry into the project, and Ctrl-C."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.installed import INSTALLED, link_code
from tasks.core.errors import ConfigError, StageError
from tasks.core.paths import project_root, stage_dir

if TYPE_CHECKING:
    from tasks.runtime.stage_runner import Outcome

__all__ = [
    "console", "enter_project", "enter_project_with_services", "handle_interrupt", "policies_table", "print_comparison",
    "print_error", "print_gate_decision", "print_prefect_away", "print_seed_differences", "print_stage_end",
    "print_stage_start", "print_table", "print_variant_start", "print_waiting", "print_warning", "read_evaluation",
    "seeds_table", "summary_markdown", "variants_table",
]  # fmt: skip

console = Console(highlight=False, soft_wrap=True)
error_console = Console(stderr=True, highlight=False, soft_wrap=True)

Columns = dict[str, tuple[str, str]]  # key of a figure → heading, format
Rows = dict[tuple[str, ...], dict[str, Any]]  # what the row is called, a cell each → figures

RESULT_LABELS = {"executed": "[green]ran[/]", "restored": "[cyan]restored[/]"}
RESULT_LABELS |= {"unchanged": "[dim]cached[/]", "off": "[dim]off[/]"}
SHOWN_REASONS = 3
SHORT_HASH = 8  # characters of a hash that a person looks at; JSON has all
NAME_WIDTH = 16

# Key in policies.json → column heading, format; a column that no policy fills is left out.
COLUMNS = {
    "reward_proxy": ("proxy reward", "z.2f"),
    "reward_gold": ("gold reward", "z.2f"),
    "win_rate": ("win rate v. SFT", ".0%"),
    "win_rate_judge": ("LLM judge", ".0%"),
    "judge_inconsistent": ("contradictions", ".0%"),
    "kl": ("KL to SFT (nats)", "z.2f"),
    "length": ("length", ".1f"),
}

WIN_RATE_COLUMNS = {
    "win_rate": ("win rate v. SFT", ".0%"),
    "win_rate_length_controlled": ("at equal length", ".0%"),
    "win_rate_finished": ("both finished", ".0%"),
    "win_rate_same_length": ("within one word", ".0%"),
    "win_rate_bound": ("at most, by KL", ".0%"),
}

SEED_COLUMNS = {
    "win_rate": ("win rate v. SFT", ".0%"),
    "gain_gold": ("gold gain (SD)", "z.2f"),
    "gain_proxy": ("proxy gain (SD)", "z.2f"),
    "kl": ("KL to SFT (nats)", "z.2f"),
}


def enter_project() -> Path:
    """Change to the project's root; a ConfigError if there is none here, or this code belongs to another one."""
    root = project_root()
    link_code(root)
    if (root / "tasks").resolve() != INSTALLED / "tasks":
        raise ConfigError(
            f"this is the rlhf command of {INSTALLED}, but the project here is {root}: use `python -m flows.cli.main` "
            "here, or install the package here"
        )
    os.chdir(root)
    from flows.processes import use_writable_home
    from tasks.runtime.mlflow_runs import close_abandoned_runs

    use_writable_home()
    close_abandoned_runs()
    return root


def enter_project_with_services() -> Path:
    """Enter the project, and report to the services of `rlhf up` if they run."""
    root = enter_project()
    from flows.services import use_services

    use_services()
    return root


@contextmanager
def handle_interrupt(hint: str) -> Iterator[None]:
    """Turn Ctrl-C into one message and the shell's exit status for it."""
    try:
        yield
    except KeyboardInterrupt:
        error_console.print(f"[yellow]interrupted.[/] Run again: {hint}.")
        raise typer.Exit(130) from None


def print_error(error: Exception) -> None:
    """Print an error that the user can cure."""
    error_console.print(f"[bold red]error:[/] {escape(str(error))}")


def print_warning(text: str) -> None:
    """Print what is worth a look and stops nothing."""
    error_console.print(f"[yellow]warning:[/] {escape(text)}")


def print_stage_start(name: str, reasons: Sequence[str], log: Path | None = None) -> None:
    """Print that a stage starts to compute; `log` is where its own output goes, if not here."""
    console.print(f"[bold]▸ {name:<{NAME_WIDTH}}[/] running   [dim]{_shorten(reasons)}[/]")
    if log:
        console.print(f"[dim]  {escape(str(log))}[/]")


def print_waiting(holder: str) -> None:
    """Print that a run or a stage waits for another run of this project."""
    console.print(f"[yellow]waiting for another run of this project[/] [dim]{escape(holder)}[/]")


def print_variant_start(number: int, count: int, variant: Sequence[str]) -> None:
    """Print that the next variant starts."""
    console.print(f"[bold]variant {number} of {count}:[/] {escape(' '.join(variant))}")


def variants_table(results: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Every policy of every variant, a row each."""
    rows = {names: row for variant, policies in results.items() for names, row in _rows(policies, variant).items()}
    return _table("Variants on held-out prompts", ["variant", "policy"], _columns(rows), rows)


def seeds_table(report: dict[str, Any]) -> Table:
    """Table of the policies per seed, and means with 95 % intervals: see `tasks.evals.experiments.summarise_seeds`."""
    title = f"Policies under {len(report['seeds'])} seeds, on held-out prompts"
    table = _table(title, ["policy", "seed"], SEED_COLUMNS)
    table.add_column("signs of hacking")
    for policy, own in report["policies"].items():
        for seed, row in own["seeds"].items():
            style, label = ("red", f"{seed} collapsed") if row["collapsed"] else (None, seed)
            table.add_row(policy, label, *_cells(row, SEED_COLUMNS), row["detectors"] or "none", style=style)
        spreads = [(own["summary"].get(key), form) for key, (_, form) in SEED_COLUMNS.items()]
        table.add_row(policy, "mean", *(_mean_cell(spread, form) for spread, form in spreads))
        table.add_row(policy, "range", *(_range_cell(spread, form) for spread, form in spreads))
        table.add_section()
    return table


def print_seed_differences(report: dict[str, Any]) -> None:
    """Print each two policies' difference of win rates over seeds and prompts, and what difference would be seen."""
    for policies, found in report["differences"].items():
        mean, low, high = (format(100 * found[key], "+.1f") for key in ("mean", "low", "high"))
        seen = f"; {100 * found['detectable']:.1f} would be seen at 80 % power" if "detectable" in found else ""
        console.print(f"{policies}: {mean} points ({low} to {high}), p = {found['p_value']:.2g}{seen}")


def print_gate_decision(policy: str, verdict: str, reasons: Sequence[str]) -> None:
    """Print what the gate decided, and why."""
    colour = {"promoted": "green", "refused": "red"}.get(verdict, "dim")
    console.print(f"[bold]gate[/] {policy}: [{colour}]{verdict}[/]")
    for reason in reasons:
        console.print(f"  {escape(reason)}")


@functools.cache
def print_prefect_away() -> None:
    """Print that the run goes on without Prefect; the cache sees that it is printed once."""
    error_console.print("[yellow]warning:[/] Prefect's server does not answer: the run goes on without it")


def print_table(table: Table) -> None:
    """Print a table without frames; a cell too wide for the terminal is folded, never cut."""
    table.box, table.show_edge, table.pad_edge, table.collapse_padding = box.SIMPLE_HEAD, False, False, True
    for column in table.columns:
        column.overflow = "fold"
    console.print(table)


def print_stage_end(name: str, result: str, seconds: float, reasons: Sequence[str]) -> None:
    """Print that a stage is up to date."""
    why = {"executed": "", "off": "its section in params.yaml is null"}.get(result, _shorten(reasons))
    padding = " " * (9 - len({"executed": "ran", "unchanged": "cached"}.get(result, result)))
    console.print(
        f"[green]✓[/] {name:<{NAME_WIDTH}} {RESULT_LABELS[result]}{padding}{seconds:7.1f} s  [dim]{why}[/]".rstrip()
    )


def print_comparison() -> None:
    """Print the last evaluation's tables, and which win rate is no evidence; a StageError if there is none yet."""
    from tasks.evals.controls import doubt  # slow to import

    policies, controls = read_evaluation("policies"), read_evaluation("controls")
    print_table(policies_table(policies, controls))
    compared = {names: row for names, row in _rows({**policies, **controls}).items() if "win_rate" in row}
    if compared:
        title = "Win rate by the gold judge, and its controls"
        print_table(_table(title, ["policy"], WIN_RATE_COLUMNS, compared, last=list(policies)[-1]))
    for (name,) in compared:
        if name in policies and (text := doubt(policies[name])):
            print_warning(f"{name}'s win rate is no evidence: {text}")


def read_evaluation(name: Literal["policies", "controls", "findings"]) -> dict[str, Any]:
    """Policy or control → its metrics, or policy → its signs of reward hacking; a StageError if there is none yet."""
    path = stage_dir("evaluate") / f"{name}.json"
    if not path.is_file():
        raise StageError(f"{path} does not exist: no evaluation has finished yet; run `rlhf run`")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def policies_table(policies: dict[str, dict[str, Any]], controls: dict[str, dict[str, Any]]) -> Table:
    """The policies side by side, then the controls; the win rate with its 95 % interval."""
    rows, title = _rows({**policies, **controls}), "Policies on held-out prompts, and controls"
    return _table(title, ["policy"], _columns(rows), rows, last=list(policies)[-1])


def summary_markdown(outcomes: Sequence[Outcome]) -> str:
    """Stages, and policies where they are evaluated, as Markdown tables."""
    lines = ["| stage | result | seconds | why |", "|---|---|---:|---|"]
    lines += [f"| {item.stage} | {item.result} | {item.seconds:.1f} | {item.reason} |" for item in outcomes]
    if any(item.stage == "evaluate" for item in outcomes):
        rows = _rows(read_evaluation("policies"))
        columns = _columns(rows)
        headings = [heading for heading, _ in columns.values()]
        lines += ["", f"| policy | {' | '.join(headings)} |", f"|---|{'---:|' * len(headings)}"]
        lines += [f"| {name} | {' | '.join(_cells(figures, columns))} |" for (name,), figures in rows.items()]
    return "\n".join(lines)


def _rows(policies: dict[str, dict[str, Any]], *before: str) -> Rows:
    """The figures without the win rates of the policy that all are compared with against itself."""
    from tasks.evals.compare import REFERENCE  # slow to import

    return {
        (*before, name): {key: figures[key] for key in figures if name != REFERENCE or not key.startswith("win_rate")}
        for name, figures in policies.items()
    }


def _table(title: str, keys: Sequence[str], columns: Columns, rows: Rows | None = None, last: str = "") -> Table:
    """A row each under its names; a section ends after the policy `last`."""
    table = Table(*keys, title=title, title_justify="left")
    for heading, _ in columns.values():
        table.add_column(heading, justify="right")
    for names, figures in (rows or {}).items():
        table.add_row(*names, *_cells(figures, columns), end_section=names[-1] == last)
    return table


def _columns(rows: Rows) -> Columns:
    return {key: column for key, column in COLUMNS.items() if any(row.get(key) is not None for row in rows.values())}


def _cells(figures: dict[str, Any], columns: Columns) -> list[str]:
    cells = []
    for key, (_, form) in columns.items():
        value = figures.get(key)
        text = "–" if value is None else format(value, form)
        if value is not None and figures.get(f"{key}_low") is not None:
            text += f" ({figures[f'{key}_low']:.0%}–{figures[f'{key}_high']:.0%})"
        cells.append(text)
    return cells


def _mean_cell(spread: dict[str, Any] | None, form: str) -> str:
    if spread is None:
        return "–"
    interval = "" if spread["low"] is None else f" ({format(spread['low'], form)} to {format(spread['high'], form)})"
    return format(spread["mean"], form) + interval


def _range_cell(spread: dict[str, Any] | None, form: str) -> str:
    return "–" if spread is None else f"{format(spread['min'], form)} to {format(spread['max'], form)}"


def _shorten(reasons: Sequence[str]) -> str:
    shown = "; ".join(reasons[:SHOWN_REASONS])
    rest = len(reasons) - SHOWN_REASONS
    return escape(shown + (f"; and {rest} more" if rest > 0 else ""))
