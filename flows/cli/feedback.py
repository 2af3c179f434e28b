"""The commands of `rlhf feedback`: people's feedback on served answers as a source of the pipeline, or deleted."""

from typing import Annotated

import typer

from flows.cli.console import console, enter_project_with_services, print_warning
from flows.cli.labels import announce_labels
from tasks.core.errors import StageError
from tasks.core.paths import project_root, state_dir

__all__ = ["app"]

app = typer.Typer(help="People's feedback on what `rlhf serve` answered.", no_args_is_help=True)

Threshold = Annotated[int, typer.Option(min=1, help="So many new rows start the retrain deployment.")]


@app.command()
def pull(announce_from: Threshold = 100) -> None:
    """Write all feedback to data/feedback: corrections as demonstrations, chosen answers as preferences, ratings."""
    enter_project_with_services()
    _pull(announce_from)


@app.command()
def delete(
    user: Annotated[str, typer.Argument(help="The `user` of the requests, or a pseudonym.")],
    announce_from: Threshold = 100,
) -> None:
    """Delete a user's prompts, answers and feedback, and say which versions were trained on them."""
    enter_project_with_services()
    from tasks.labelling.labels import pseudonym
    from tasks.runtime import registry
    from tasks.runtime.mlflow_traces import delete_feedback
    from tasks.serving import journal
    from tasks.serving.feedback import trained_rows

    name = pseudonym(user)
    journal.deliver()
    count = delete_feedback({user, name})
    if waiting := sum(name in line for line in journal.waiting_lines()):
        raise StageError(f"{waiting} records of {name} still wait for MLflow: run this again when they are there")
    console.print(f"{count} answers and remarks of {name} are deleted")
    _pull(announce_from)
    for version in registry.versions():
        try:
            rows = trained_rows(version, name)
        except StageError as error:
            print_warning(f"whether version {version.number} was trained on them is not known: {error}")
            continue
        if rows:
            registry.mark_deleted(version, name)
            text = f"version {version.number} was trained on {rows} rows of {name}; `rlhf retrain` trains without them"
            print_warning(text)
    console.print("[dim]git and the DVC cache keep earlier versions of data/feedback[/]")


def _pull(threshold: int) -> None:
    from tasks.core.rows import write_json, write_rows
    from tasks.runtime.mlflow_traces import read_feedback
    from tasks.serving import journal
    from tasks.serving.feedback import feedback_rows, held_out_prompts

    journal.deliver()
    result = feedback_rows(read_feedback(), held_out_prompts())
    folder = project_root() / "data" / "feedback"
    for name, rows in result.rows.items():
        file = folder / f"{name}.jsonl"
        if rows:
            write_rows(file, rows)
        else:
            file.unlink(missing_ok=True)
        console.print(f"{len(rows)} {name}: {file}")
    counts = {name: len(rows) for name, rows in result.rows.items()}
    write_json(folder / "card.json", {"rows": counts, "dropped": result.dropped})
    dropped = ", ".join(f"{reason} {count}" for reason, count in result.dropped.items())
    console.print(f"dropped: {dropped or 'nothing'}")
    _announce({row.id for rows in result.rows.values() for row in rows}, threshold)


def _announce(ids: set[str], threshold: int) -> None:
    """Start the retrain deployment once there are enough rows that were not there at the last start."""
    file = state_dir() / "serving" / "announced.txt"
    known = set(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else set()
    if len(ids - known) < threshold:
        console.print(f"{len(ids - known)} rows are new; {threshold} start a retraining")
    elif announce_labels():
        file.write_text("\n".join(sorted(ids)), encoding="utf-8")
