"""The commands around labels: which pairs to ask for, what labels are worth, labels in and out, labels by a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from flows.cli import console as screen
from flows.cli.console import enter_project as enter
from flows.cli.console import enter_project_with_services as enter_served
from flows.cli.console import handle_interrupt as interruptible
from flows.label_commands import Database
from tasks.core.errors import ConfigError, RLHFError, SourceError
from tasks.core.paths import artifacts, project_root, state

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from tasks.core.sections.judge import JudgeParams
    from tasks.labelling.dataset import Dataset
    from tasks.labelling.feedback import Cost, Labelled
    from tasks.labelling.labels import Label, Question
    from tasks.labelling.report import Report

__all__ = ["commands"]

commands = typer.Typer()

POOL = 4
"""Pairs that are scored for each one that is asked by disagreement."""

SPARE = 4
"""Prompts beyond an eighth more than are needed, because some get one response from everybody."""

Names = Annotated[bool, typer.Option("--names", help="Write people's names, and not pseudonyms.")]


@commands.command()
def ask(
    pairs: Annotated[int, typer.Option(min=1, help="How many to ask for.")],
    policies: Annotated[str, typer.Option("--from", help="Policies, as sft,ppo; default: all of the last run.")] = "",
    by: Annotated[Literal["random", "disagreement"], typer.Option(help="At random, or where reward models differ.")] = (
        "random"
    ),
    prompts: Annotated[Literal["train", "validation"], typer.Option(help="Whose prompts; never those of test.")] = (
        "train"
    ),
    twice: Annotated[float, typer.Option(min=0, max=1, help="Share of pairs that two people label.")] = 0.0,
    gold: Annotated[Path | None, typer.Option(help="JSON Lines: questions with their answer, or preferences.")] = None,
    gold_margin: Annotated[float, typer.Option(help="A preference of at least this margin tests labellers.")] = 3.0,
    golds: Annotated[int, typer.Option(min=1, help="Test questions at most.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, responses and pairs.")] = 0,
    database: Database = None,
) -> None:
    """Let the policies write, and put pairs of responses up for labelling; asked again, it adds nothing."""
    gold = gold and gold.absolute()
    enter()
    from tasks.labelling.labels import add_questions, otherwise_known
    from tasks.labelling.pairs import asked_twice, gold_questions

    tests = gold_questions(gold, min_margin=gold_margin, count=golds) if gold else []
    with interruptible("nothing was added"):
        chosen = _chosen([name for name in policies.split(",") if name], prompts, pairs, by, seed)
    with _session(database) as session:
        chosen = asked_twice(chosen, twice, seed=seed)
        kept = otherwise_known(session, [*chosen, *tests])
        new = add_questions(session, chosen)
        new_tests = add_questions(session, tests)
    line = f"{new} pairs to label added, {len(chosen) - new} were there already"
    screen.console.print(line + (f"; {new_tests} of {len(tests)} questions with a known answer added" if tests else ""))
    _tell_kept(kept)


@commands.command()
def ai(
    judge: Annotated[str, typer.Option(help="As evaluate.judge: '{kind: endpoint, base_url: …, model: …}'.")],
    constitution: Annotated[Path, typer.Option(help="A text that says what is better: infra/constitutions/….md.")],
    max_requests: Annotated[
        int | None,
        typer.Option(min=2, help="New requests of this run at most; a pair takes two. Default: the judge's, or 1000."),
    ] = None,
    rate: Annotated[float | None, typer.Option(min=0.01, help="Requests a minute at most.")] = None,
    database: Database = None,
) -> None:
    """Let a language model label what it has not labelled yet, by a written constitution; it can be interrupted."""
    constitution = constitution.absolute()
    enter()
    from tasks.labelling.feedback import Budget, Constitution, CountingBook, judge_of, label_by_model

    params = _judge_params(judge)
    text, book = Constitution.read(constitution), CountingBook(state() / "judge" / "answers.jsonl")
    who = judge_of(params, book, artifacts("evaluate").parent)
    budget = Budget(max_requests or params.max_requests, params.max_tokens, rate)
    with interruptible("it goes on from there, and asks nothing twice"), _session(database) as session:
        done = label_by_model(session, who, text, cost=book.cost, budget=budget)
    _tell(done, book.cost)


@commands.command()
def report(
    out: Annotated[Path | None, typer.Option(help="The page; default: .rlhf/labels.html.")] = None,
    names: Names = False,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON, and no page.")] = False,
    database: Database = None,
) -> None:
    """How far labels can be trusted: agreement, accuracy on known answers, order bias; as tables and a page."""
    page = out and out.absolute()
    enter()
    from tasks.labelling import labels as rows
    from tasks.labelling.report import report as figures
    from tasks.labelling.report import report_page

    with _session(database) as session:  # no longer than to read: in SQLite nobody can answer meanwhile
        asked, labels = rows.questions(session), rows.current_labels(session)
    found = figures(asked, _named(labels, names))
    if as_json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
        return
    _print_report(found)
    page = page or state() / "labels.html"
    _write(page, report_page(found))
    screen.console.print(f"page: {page}")


@commands.command()
def export(
    out: Annotated[
        Path | None, typer.Option(help="Default: data/labels/preferences.jsonl, or .rlhf/labels.FORMAT.json.")
    ] = None,
    kind: Annotated[
        Literal["rows", "argilla", "label-studio"], typer.Option("--format", help="Preferences, or another program's.")
    ] = "rows",
    aggregate: Annotated[
        Literal["none", "majority", "dawid-skene"], typer.Option(help="Each label a row, or each question.")
    ] = "none",
    by: Annotated[Literal["all", "people", "models"], typer.Option(help="Whose labels.")] = "all",
    names: Names = False,
    announce: Annotated[bool, typer.Option(help="Start the retrain deployment where the data changed.")] = True,
    database: Database = None,
) -> None:
    """Write labels as preferences that the pipeline reads, with a card beside them, or in another program's format."""
    file = out and out.absolute()
    root = enter_served()
    from tasks.labelling import foreign
    from tasks.labelling import labels as rows

    with _session(database) as session:
        asked = rows.questions(session)
        labels = [label for label in rows.current_labels(session) if by == "all" or _is(by, label)]
    shown = {label.labeller: label.labeller for label in labels} if names else rows.pseudonyms(labels)
    if kind != "rows":
        file = file or state() / f"labels.{kind}.json"
        _write(file, foreign.text_of(asked, labels, shown, kind))
        screen.console.print(f"{len(asked)} questions with {len(labels)} labels: {file}")
        if kind == "label-studio":
            _write_interface(file)
        return
    from tasks.labelling.dataset import dataset

    file = file or root / "data" / "labels" / "preferences.jsonl"
    changed = _write_dataset(file, dataset(asked, labels, aggregate=aggregate, names=shown))
    if announce and changed and file.is_relative_to(root / "data"):
        _announce()


@commands.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="What the other program exported.")],
    kind: Annotated[Literal["argilla", "label-studio"], typer.Option("--format", help="Whose format it is.")],
    database: Database = None,
) -> None:
    """Take questions and labels from another program's file; all of it or, where something is malformed, nothing."""
    file = file.absolute()
    enter()
    from tasks.labelling import foreign

    found = foreign.read(file, kind, warn=lambda text: screen.console.print(f"[yellow]{escape(text)}[/]"))
    with _session(database) as session:
        done = foreign.store(session, found)
    known = done.labels - done.new_labels
    screen.console.print(
        f"{done.questions} questions, {done.new_questions} of them new; {done.labels} labels, {done.new_labels} new"
        + (f", {known} known from before and skipped" if known else "")
    )
    _tell_kept(done.kept)


@contextmanager
def _session(address: str | None) -> Iterator[Session]:
    """What is not committed within is kept where it ends without an error.

    Raises:
        SourceError: somebody else wrote what this was about to write, as can be in PostgreSQL.
    """
    from sqlalchemy.exc import IntegrityError
    from sqlalchemy.orm import Session

    from tasks.labelling.database import connect, database_url

    engine = connect(database_url(address))
    try:
        with Session(engine.execution_options(writes=True)) as session:
            yield session
            session.commit()
    except IntegrityError:
        raise SourceError(
            "the labelling database has changed meanwhile, by a click or another command; what was stored before is "
            "kept: run again"
        ) from None
    finally:
        engine.dispose()


def _chosen(policies: list[str], split: str, count: int, by: str, seed: int) -> list[Question]:
    """The pairs to ask for, out of what the policies write now."""
    from tasks.core.params import load_params
    from tasks.labelling import pairs, sampling

    here = artifacts("evaluate").parent
    scores = sampling.ensemble(here) if by == "disagreement" else None
    writing = sampling.check_policies(policies, here)
    generation = load_params(project_root() / "params.yaml").generation
    wanted = count * POOL if scores else count
    asked = sampling.prompts(here, split, wanted + wanted // 8 + SPARE, seed=seed)
    written = sampling.written(writing, asked, generation, here, seed=seed)
    pool = pairs.paired(written, wanted, seed=seed)
    return pairs.by_disagreement(pool, count, scores) if scores else pairs.at_random(pool, count)


def _judge_params(text: str) -> JudgeParams:
    """The judge in the words of params.yaml; how many prompts it is asked depends on the database alone.

    Raises:
        ConfigError: no such judge, or one with a rubric, whose place the constitution takes.
    """
    from pydantic import ValidationError

    from tasks.core.params import parse_override
    from tasks.core.schema import explain
    from tasks.core.sections.judge import JudgeParams

    content = parse_override(f"judge={text}")["judge"]
    if not isinstance(content, dict):
        raise ConfigError(f"--judge: '{{kind: endpoint, base_url: …, model: …}}' expected, got {text!r}")
    if "rubric" in content:
        raise ConfigError("--judge: rubric has no meaning here, --constitution says what is better: leave it out")
    try:
        return JudgeParams.model_validate({"prompts": 1} | content)
    except ValidationError as error:
        raise ConfigError(f"--judge: {explain(error)}") from None


def _tell(done: Labelled, cost: Cost) -> None:
    counts = ", ".join(f"{choice} {count}" for choice, count in sorted(done.choices.items())) or "none"
    screen.console.print(f"labels: {counts}")
    screen.console.print(
        f"of the skips, {done.contradictions} because the answer changed with the order, {done.unclear} unclear; "
        f"{done.first} of {done.clear} clear answers chose the response shown first"
    )
    screen.console.print(f"{cost.requests} requests, {cost.tokens} tokens; other answers were known from before")
    if done.left:
        screen.console.print(f"[yellow]{done.left} questions are left[/]: the budget is spent; run again to go on")


def _tell_kept(kept: int) -> None:
    if kept:
        screen.console.print(
            f"[yellow]{kept} of them were there with another known answer, or wanting another number of labels[/], "
            "and keep theirs"
        )


def _named(labels: list[Label], names: bool) -> list[Label]:
    from tasks.labelling.labels import pseudonym

    return labels if names else [replace(label, labeller=pseudonym(label.labeller)) for label in labels]


def _is(by: str, label: Label) -> bool:
    from tasks.labelling.labels import by_model

    return by_model(label.labeller) == (by == "models")


def _print_report(found: Report) -> None:
    from tasks.labelling.report import figure, share

    table = Table(title="Labellers", title_justify="left")
    table.add_column("labeller", no_wrap=True)
    for column in ("labels", "skips", "right on known answers", "quality", "first shown", "seconds"):
        table.add_column(column)
    for row in found.labellers:
        table.add_row(
            row.name, str(row.labels), str(row.skips), share(row.gold), figure(row.quality), share(row.first),
            figure(row.seconds),
        )  # fmt: skip
    screen.print_table(table)
    both = "" if found.alpha_all is None else f" (with models {figure(found.alpha_all)})"
    screen.console.print(f"{found.labels} labels, {found.labelled} of {found.questions} questions labelled")
    screen.console.print(f"Krippendorff's alpha {figure(found.alpha)}{both}; two people agree {share(found.agreement)}")
    screen.console.print(f"the first shown is chosen {share(found.first)}")


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="\n")


def _write_interface(tasks: Path) -> None:
    from tasks.labelling.label_studio import CONFIG

    file = tasks.with_suffix(".xml")
    _write(file, CONFIG)
    screen.console.print(f"labelling interface for the project's settings: {file}")


def _write_dataset(file: Path, made: Dataset) -> bool:
    """Rows and card, and what they hold on the screen; whether the rows are others than before."""
    from tasks.core.files import write_json
    from tasks.core.schema import write_rows

    before = file.read_bytes() if file.is_file() else None
    write_rows(file, made.rows)
    write_json(file.with_suffix(".card.json"), made.card)
    left = ", ".join(f"{reason} {count}" for reason, count in made.left_out.items()) or "nothing"
    screen.console.print(f"{len(made.rows)} preferences of {made.card['labelled']} labelled questions: {file}")
    screen.console.print(f"left out: {left}; questions on which labellers differ: {made.card['disputed']}")
    return file.read_bytes() != before


def _announce() -> None:
    """Tell Prefect; without a server the file is as good, so that is no error."""
    from flows.retrain import emit_data_event
    from tasks.runtime import dvc_repo

    try:
        md5 = dvc_repo.data_md5()
        if md5 is None:
            raise ConfigError("no stage of dvc.yaml reads data/")
        emit_data_event(md5)
    except RLHFError as error:
        screen.console.print(f"not announced: {error}; `rlhf retrain` trains with these labels")
        return
    screen.console.print(f"announced data of md5 {md5}")
