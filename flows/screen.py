"""What a person sees: one line per stage, the comparison of the policies, and errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.core.errors import StageError
from tasks.core.paths import stage_dir

if TYPE_CHECKING:
    from pathlib import Path

    from flows.work import Outcome

__all__ = [
    "approval_waits",
    "collapsed",
    "comparison",
    "console",
    "device_waits",
    "errors",
    "failed",
    "gate_ends",
    "markdown",
    "push_waits",
    "pushed",
    "read_findings",
    "read_policies",
    "run_waits",
    "seeds",
    "server_starts",
    "show",
    "stage_begins",
    "stage_ends",
    "stage_waits",
    "tail",
    "variant_begins",
    "variants",
]

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

WORDS = {"executed": "[green]ran[/]", "restored": "[cyan]restored[/]", "unchanged": "[dim]cached[/]"}
SHOWN_REASONS = 3
SHOWN_LINES = 15
SHORT_HASH = 8
"""Characters of a hash that a person looks at; JSON has all."""
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

SEED_COLUMNS = {
    "win_rate": ("win rate v. SFT", ".0%"),
    "gain_gold": ("gold gain (SD)", "z.2f"),
    "gain_proxy": ("proxy gain (SD)", "z.2f"),
    "kl": ("KL to SFT (nats)", "z.2f"),
}


def failed(error: Exception) -> None:
    """An error that the user can cure."""
    errors.print(f"[bold red]error:[/] {escape(str(error))}")


def server_starts() -> None:
    """A server of our own is started for this command."""
    console.print("[dim]starting a temporary Prefect server (set PREFECT_API_URL to use your own)[/]")


def stage_begins(name: str, reasons: Sequence[str], log: Path | None = None) -> None:
    """A stage starts to compute; `log` is where its own output goes, if not here."""
    console.print(f"[bold]▸ {name:<{NAME_WIDTH}}[/] running   [dim]{_brief(reasons)}[/]")
    if log:
        console.print(f"[dim]  {escape(str(log))}[/]")


def stage_waits(blocker: str) -> None:
    """A stage waits for another process."""
    console.print(f"[yellow]  waiting for another run of this project[/] [dim]{escape(blocker)}[/]")


def run_waits(holder: str) -> None:
    """A run waits for another one of this project."""
    console.print(f"[yellow]waiting for another run of this project[/] [dim]{escape(holder)}[/]")


def variant_begins(number: int, count: int, variant: Sequence[str]) -> None:
    """A sweep starts its next variant."""
    console.print(f"[bold]variant {number} of {count}:[/] {escape(' '.join(variant))}")


def variants(found: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Every policy of every variant, a row each."""
    table = Table(title="Variants on held-out prompts", title_justify="left")
    table.add_column("variant")
    table.add_column("policy")
    found = {variant: _compared(policies) for variant, policies in found.items()}
    columns = _columns([figures for policies in found.values() for figures in policies.values()])
    for heading, _ in columns.values():
        table.add_column(heading, justify="right")
    for variant, policies in found.items():
        for name, figures in policies.items():
            table.add_row(variant, name, *_cells(figures, columns))
    return table


def seeds(report: dict[str, Any]) -> Table:
    """Every policy under every seed, and their mean with its 95 % interval: see
    `tasks.evals.experiments.summarise_seeds`."""
    table = Table(title=f"Policies under {len(report['seeds'])} seeds, on held-out prompts", title_justify="left")
    table.add_column("policy")
    table.add_column("seed")
    for heading, _ in SEED_COLUMNS.values():
        table.add_column(heading, justify="right")
    table.add_column("signs of hacking")
    for policy, own in report["policies"].items():
        for seed, row in own["seeds"].items():
            style, label = ("red", f"{seed} collapsed") if row["collapsed"] else (None, seed)
            table.add_row(policy, label, *_cells(row, SEED_COLUMNS), row["detectors"] or "none", style=style)
        spreads = own["summary"]
        table.add_row(policy, "mean", *(_mean_cell(spreads.get(key), form) for key, (_, form) in SEED_COLUMNS.items()))
        table.add_row(
            policy, "range", *(_range_cell(spreads.get(key), form) for key, (_, form) in SEED_COLUMNS.items())
        )
        table.add_section()
    return table


def collapsed(sentences: Sequence[str]) -> None:
    """Seeds that came to nothing."""
    for sentence in sentences:
        console.print(f"[red]collapsed:[/] {escape(sentence)}")


def approval_waits(policy: str, hours: float) -> None:
    """A person is asked."""
    console.print(f"[yellow]{policy} waits up to {hours:g} hours for approval in Prefect's page of this run[/]")


def gate_ends(policy: str, verdict: str, reasons: Sequence[str]) -> None:
    """What the gate decided, and why."""
    colour = {"promoted": "green", "refused": "red"}.get(verdict, "dim")
    console.print(f"[bold]gate[/] {policy}: [{colour}]{verdict}[/]")
    for reason in reasons:
        console.print(f"  {escape(reason)}")


def push_waits(error: Exception) -> None:
    """A stage's results could not be sent yet."""
    errors.print(f"[yellow]warning:[/] not sent to the DVC remote, tried again at the end: {escape(str(error))}")


def pushed(files: int) -> None:
    """All results are at the DVC remote."""
    console.print(f"[dim]the DVC remote has everything; {files} files were new[/]")


def device_waits() -> None:
    """A stage waits until another run has done its computing."""
    console.print("[yellow]  waiting for the device: another run computes on it[/]")


def show(table: Table) -> None:
    """Print a table without frames; a cell too wide for the terminal goes on below, for half an id is of no use."""
    table.box, table.show_edge, table.pad_edge, table.collapse_padding = box.SIMPLE_HEAD, False, False, True
    for column in table.columns:
        column.overflow = "fold"
    console.print(table)


def stage_ends(name: str, result: str, seconds: float, reasons: Sequence[str]) -> None:
    """A stage is up to date."""
    why = "" if result == "executed" else _brief(reasons)
    padding = " " * (9 - len({"executed": "ran", "unchanged": "cached"}.get(result, result)))
    console.print(f"[green]✓[/] {name:<{NAME_WIDTH}} {WORDS[result]}{padding}{seconds:7.1f} s  [dim]{why}[/]".rstrip())


def tail(log: Path) -> str:
    """Where a process wrote what it had to say, and the end of that, for an error message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"see {log}", *lines[-SHOWN_LINES:]])


def read_policies() -> dict[str, dict[str, Any]]:
    """Policy → its figures, as the evaluation wrote them.

    Raises:
        StageError: there is no evaluation yet.
    """
    policies: dict[str, dict[str, Any]] = _evaluated("policies.json")
    return policies


def read_findings() -> dict[str, list[dict[str, str]]]:
    """Policy → the signs of reward hacking that the evaluation found.

    Raises:
        StageError: there is no evaluation yet.
    """
    findings: dict[str, list[dict[str, str]]] = _evaluated("findings.json")
    return findings


def _evaluated(name: str) -> Any:
    path = stage_dir("evaluate") / name
    if not path.is_file():
        raise StageError(f"{path} does not exist: no evaluation has finished yet; run `rlhf run`")
    return json.loads(path.read_text(encoding="utf-8"))


def comparison(policies: dict[str, dict[str, Any]]) -> Table:
    """The policies side by side; the win rate with its 95 % interval."""
    table = Table(title="Policies on held-out prompts", title_justify="left")
    table.add_column("policy")
    policies = _compared(policies)
    columns = _columns(list(policies.values()))
    for heading, _ in columns.values():
        table.add_column(heading, justify="right")
    for name, figures in policies.items():
        table.add_row(name, *_cells(figures, columns))
    return table


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Stages, and policies where they are evaluated, as Markdown tables."""
    lines = ["| stage | result | seconds | why |", "|---|---|---:|---|"]
    lines += [f"| {item.stage} | {item.result} | {item.seconds:.1f} | {item.why} |" for item in outcomes]
    if any(item.stage == "evaluate" for item in outcomes):
        policies = _compared(read_policies())
        columns = _columns(list(policies.values()))
        headings = [heading for heading, _ in columns.values()]
        lines += ["", f"| policy | {' | '.join(headings)} |", f"|---|{'---:|' * len(headings)}"]
        lines += [f"| {name} | {' | '.join(_cells(figures, columns))} |" for name, figures in policies.items()]
    return "\n".join(lines)


def _compared(policies: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures without the win rates of the policy that all are compared with against itself."""
    from tasks.evals.compare import REFERENCE  # slow to import

    return {
        name: {key: value for key, value in figures.items() if name != REFERENCE or not key.startswith("win_rate")}
        for name, figures in policies.items()
    }


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {key: column for key, column in COLUMNS.items() if any(row.get(key) is not None for row in rows)}


def _cells(figures: dict[str, Any], columns: dict[str, tuple[str, str]]) -> list[str]:
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


def _brief(reasons: Sequence[str]) -> str:
    shown = "; ".join(reasons[:SHOWN_REASONS])
    rest = len(reasons) - SHOWN_REASONS
    return escape(shown + (f"; and {rest} more" if rest > 0 else ""))
