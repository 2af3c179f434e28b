"""The command `rlhf gc`: what nothing refers to any more, and freeing it."""

from contextlib import ExitStack
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from flows import worktrees
from flows.cli.console import console, enter_project_with_services, print_table, print_waiting
from flows.processes import project_lock
from tasks.core.errors import StageError
from tasks.core.paths import state_dir

__all__ = ["app"]

app = typer.Typer()


@app.command()
def gc(yes: Annotated[bool, typer.Option("--yes", help="Free it; else nothing is changed.")] = False) -> None:
    """Show what nothing refers to any more, per kind, or free it; champions and what runs refer to are kept."""
    enter_project_with_services()
    from tasks.runtime.dvc_repo import locked
    from tasks.runtime.garbage import Garbage, collect_garbage

    with project_lock(print_waiting), ExitStack() as held:
        stale = worktrees.stale_worktrees()
        others = [tree for tree in worktrees.worktrees() if tree not in stale]
        if busy := [tree for tree in others if tree.is_relative_to(state_dir())]:
            raise StageError(f"a sweep, seeds or a reproduction works in {busy[0]}: wait for its end")
        held.enter_context(locked(others))  # till the end: what `dvc repro` would restore meanwhile is not freed
        found = [*collect_garbage(others), Garbage("worktrees", "runs of variants that go on", tuple(stale))]
        table, total = Table("kind", "files", "size", "kept is what belongs to"), sum(item.size for item in found)
        for item in found:
            table.add_row(item.kind, str(len(item.paths)), decimal(item.size), item.kept_for)
        print_table(table)
        if yes:
            worktrees.remove_stale()
            for item in found:
                item.remove()
    console.print(f"{decimal(total)} freed" if yes else f"`rlhf gc --yes` frees {decimal(total)}")
