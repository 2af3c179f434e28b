"""The commands of `rlhf label`: the labelling page, pairs to label, labels by a model, report, export and import."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ConfigDict, TypeAdapter
from rich.markup import escape
from rich.table import Column, Table

from flows.cli.console import console, enter_project, enter_project_with_services, handle_interrupt, print_table
from tasks.core.errors import ConfigError, DataError, RLHFError, SourceError
from tasks.core.paths import project_root, stage_dir, state_dir

if TYPE_CHECKING:
    from tasks.evals.pairwise import Cost
    from tasks.labelling.ai_labels import AutoLabelResult
    from tasks.labelling.export import ExportResult
    from tasks.labelling.formats import Format
    from tasks.labelling.labels import Label, Question
    from tasks.labelling.quality import LabelSummary
    from tasks.labelling.store import LabelStore

__all__ = ["announce_labels", "app", "listen"]

NO_QUESTIONS = "none yet: `rlhf label sample` chooses pairs to compare"
NO_LABELLERS = "none yet: `rlhf label add NAME` adds one, and prints a password"
EXPOSED_WARNING = "Others can reach this page, and passwords travel in the clear: put a proxy with TLS before it."

_print = console.print

app = typer.Typer(help="Let people compare responses, on a page of their own; Ctrl-C ends it.")

Database = Annotated[
    str | None,
    typer.Option(envvar="RLHF_LABEL_DATABASE", help="URL of a PostgreSQL database; default: .rlhf/labels.db."),
]
Host = Annotated[str, typer.Option(help="Where to listen; 0.0.0.0: everywhere, so that others reach the page.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
AllowHost = Annotated[
    list[str],
    typer.Option(help="A name under which a reverse proxy serves the page; its X-Forwarded-For is then believed."),
]
GuidelinesFile = Annotated[
    Path | None, typer.Option("--guidelines", help="Markdown, shown beside each question; its sha256 is in each label.")
]
Names = Annotated[bool, typer.Option("--names", help="Write people's names, and not pseudonyms.")]


@app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    host: Host = "127.0.0.1",
    port: Port = 8800,
    allow_host: AllowHost = [],  # noqa: B006, as typer wants it
    guidelines: GuidelinesFile = None,
    database: Database = None,
) -> None:
    """Serve the labelling page until Ctrl-C."""
    if context.invoked_subcommand:
        return
    guidelines = guidelines and guidelines.absolute()
    enter_project()
    import uvicorn

    from tasks.labelling.app import create_app
    from tasks.labelling.auth import load_secret
    from tasks.labelling.guidelines import Guidelines

    shown = Guidelines.read(guidelines) if guidelines else None
    listener = listen(host, port)
    store = _open_store(database)
    state_dir().mkdir(exist_ok=True)
    app = create_app(store, load_secret(state_dir() / "label-secret"), hosts=[host, *allow_host], guidelines=shown)
    _print_banner(store, host, listener.getsockname()[1])
    proxied = bool(allow_host)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, proxy_headers=proxied)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
    _print("ended; every answer that the page called saved is in the database")


@app.command()
def add(name: Annotated[str, typer.Argument(help="Who labels.")], database: Database = None) -> None:
    """Add a labeller, or give a known one a new password; it is printed once, and only its hash is kept."""
    enter_project()
    from tasks.labelling.auth import hash_password, new_password
    from tasks.labelling.labels import pseudonym

    password = new_password()
    with closing(_open_store(database)) as store:
        is_new = store.add_labeller(name, hash_password(password))
    status = "can sign in" if is_new else "was known, and has a new password; the old one and its sessions have ended"
    _print(f"{escape(name)} {status}")
    _print(f"in reports and exports: {pseudonym(name)}", highlight=False)
    _print(f"password: {password}", highlight=False)


@app.command()
def restore(database: Database = None) -> None:
    """Rebuild a database that is damaged or lost from its copy; what is left of the old one is kept beside it."""
    enter_project()
    from tasks.labelling import backup
    from tasks.labelling.database import database_file, database_url

    url = database_url(database)
    if database_file(url):  # another has no copy
        with suppress(DataError, SourceError), closing(_open_store(database)) as store:
            _print(f"{escape(store.address)} is whole, and lacks nothing that its copy holds; nothing was restored")
            return
    result = backup.restore(url)
    _print(f"restored: {_format_counts(result.rows)}")
    if result.unreadable:
        _print(f"[yellow]{result.unreadable} lines of the copy could not be read[/]")
    if result.old:
        _print(f"the old database is in {result.old}")


@app.command()
def sample(
    pairs: Annotated[int, typer.Option(min=1, help="How many to choose.")],
    policies: Annotated[str, typer.Option("--from", help="Policies, as sft,ppo; default: all of the last run.")] = "",
    by: Annotated[
        Literal["random", "disagreement", "ranking"],
        typer.Option(help="Or where reward models disagree, or all pairs of two policies alike, to rank them."),
    ] = "random",
    prompts: Annotated[Literal["train", "validation"], typer.Option(help="Split of the prompts.")] = "train",
    overlap: Annotated[float, typer.Option(min=0, max=1, help="Share of pairs that two people label.")] = 0.0,
    gold: Annotated[Path | None, typer.Option(help="JSON Lines: questions with their answer, or preferences.")] = None,
    gold_margin: Annotated[float, typer.Option(help="A preference of at least this margin tests labellers.")] = 3.0,
    max_gold: Annotated[int, typer.Option(min=1, help="Test questions at most.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, responses and pairs.")] = 0,
    database: Database = None,
) -> None:
    """Sample responses of the policies, and add pairs of them to be labelled; run again, it adds nothing."""
    gold = gold and gold.absolute()
    enter_project()
    from tasks.config.params import load_params
    from tasks.labelling.pairs import gold_questions, select_pairs, with_overlap

    tests = gold_questions(gold, min_margin=gold_margin, count=max_gold) if gold else []
    artifacts, generation = stage_dir("evaluate").parent, load_params(project_root() / "params.yaml").generation
    with handle_interrupt("nothing was added"):
        names = [name for name in policies.split(",") if name]
        chosen = select_pairs(artifacts, generation, names, prompts, pairs, by, seed=seed, warn=_warn)
    with closing(_open_store(database)) as store:
        added = store.add_questions(with_overlap(chosen, overlap, seed=seed))
        added_tests = store.add_questions(tests)
    line = f"{added.new_questions} pairs to label added, {len(chosen) - added.new_questions} were there already"
    if tests:
        line += f"; {added_tests.new_questions} of {len(tests)} questions with a known answer added"
    _print(line)
    _print_conflicts(added.conflicts + added_tests.conflicts)


@app.command()
def auto(
    judge: Annotated[str, typer.Option(help="As evaluate.llm_judge: '{kind: endpoint, base_url: …, model: …}'.")],
    constitution: Annotated[Path, typer.Option(help="A text that says what is better: infra/constitutions/….md.")],
    max_requests: Annotated[int | None, typer.Option(min=2, help="At most, two a pair; default: the judge's.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.01, help="Requests a minute at most.")] = None,
    database: Database = None,
) -> None:
    """Let a language model label what it has not labelled yet, by a written constitution; it can be interrupted."""
    constitution = constitution.absolute()
    enter_project()
    from tasks.labelling.ai_labels import Budget, Constitution, auto_label, load_labeller, parse_judge

    params, text = parse_judge(judge), Constitution.read(constitution)
    model, weights = load_labeller(params, stage_dir("evaluate").parent)
    budget = Budget(max_requests or params.max_requests, params.max_tokens, rate)
    with handle_interrupt("it goes on from there, and asks nothing twice"), closing(_open_store(database)) as store:
        result = auto_label(store, model, text, budget=budget, weights=weights)
    _print_auto_result(result, model.cost)


@app.command()
def report(
    out: Annotated[Path | None, typer.Option(help="The page; default: .rlhf/labels.html.")] = None,
    names: Names = False,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers as JSON, and no page.")] = False,
    database: Database = None,
) -> None:
    """Report label quality: agreement, accuracy on known answers, order bias; as tables and a page."""
    page = out and out.absolute()
    enter_project()
    from tasks.labelling.quality import label_summary, report_page

    summary = label_summary(*_read_labels(database, names))
    if as_json:
        as_text = TypeAdapter(dict[str, Any], config=ConfigDict(ser_json_inf_nan="strings"))
        print(as_text.dump_json(asdict(summary), indent=2).decode())
        return
    _print_report(summary)
    page = page or state_dir() / "labels.html"
    _write(page, report_page(summary))
    _print(f"page: {page}")


@app.command()
def export(
    out: Annotated[Path | None, typer.Option(help="Default: data/labels/preferences.jsonl, or in .rlhf.")] = None,
    kind: Annotated[Literal["rows", "argilla", "label-studio"], typer.Option("--format", help="Of the file.")] = "rows",
    aggregate: Annotated[Literal["none", "majority", "dawid-skene"], typer.Option(help="One row a question.")] = "none",
    by: Annotated[Literal["all", "people", "models"], typer.Option(help="Whose labels.")] = "all",
    names: Names = False,
    announce: Annotated[bool, typer.Option(help="Start the retrain deployment where the data changed.")] = True,
    database: Database = None,
) -> None:
    """Write labels as preferences that the pipeline reads, with a card beside them, or in another program's format."""
    file = out and out.absolute()
    root = enter_project_with_services()
    from tasks.labelling.export import export_preferences
    from tasks.labelling.labels import is_model

    questions, labels = _read_labels(database, names)
    labels = [label for label in labels if by == "all" or is_model(label.labeller) == (by == "models")]
    if kind != "rows":
        _write_format(file or state_dir() / f"labels.{kind}.json", questions, labels, kind)
        return
    file = file or root / "data" / "labels" / "preferences.jsonl"
    changed = _write_preferences(file, export_preferences(questions, labels, aggregate=aggregate))
    if announce and changed and file.is_relative_to(root / "data"):
        announce_labels()


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="What the other program exported.")],
    kind: Annotated[Literal["argilla", "label-studio"], typer.Option("--format", help="Whose format it is.")],
    database: Database = None,
) -> None:
    """Add questions and labels from another program's file; all of it or, where something is malformed, nothing."""
    file = file.absolute()
    enter_project()
    from tasks.labelling.formats import load

    records = load(file, kind, warn=_warn)
    with closing(_open_store(database)) as store:
        result = store.import_records(records)
    line = f"{result.questions} questions, {result.new_questions} of them new"
    line += f"; {result.labels} labels, {result.new_labels} new"
    if known := result.labels - result.new_labels:
        line += f", {known} known from before and skipped"
    _print(line)
    _print_conflicts(result.conflicts)


def _warn(text: str) -> None:
    _print(f"[yellow]{escape(text)}[/]")


def _open_store(database: str | None) -> LabelStore:
    from tasks.labelling.database import database_url
    from tasks.labelling.store import LabelStore

    return LabelStore(database_url(database))


def _read_labels(database: str | None, names: bool) -> tuple[list[Question], list[Label]]:
    """Read everything, people under pseudonyms unless their names are asked for."""
    from tasks.labelling.labels import hide_names

    with closing(_open_store(database)) as store:
        labels = store.current_labels()  # first: questions may be added meanwhile, and none is ever removed
        return store.questions(), labels if names else hide_names(labels)


def listen(host: str, port: int) -> socket.socket:
    """Listen there; a ConfigError where another program does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from None


def _print_banner(store: LabelStore, host: str, port: int) -> None:
    from tasks.labelling.auth import LOOPBACK

    (unlabelled, count), labellers = store.open_questions(), store.labellers()
    _print(f"page       http://{f'[{host}]' if ':' in host else host}:{port}   (Ctrl-C ends it)")
    _print(f"database   {escape(store.address)}")
    _print(f"questions  {count}, of which {unlabelled} need labels" if count else f"questions  {NO_QUESTIONS}")
    _print(f"labellers  {escape(', '.join(labellers)) or NO_LABELLERS}")
    if host not in LOOPBACK:
        _print(f"[yellow]{EXPOSED_WARNING}[/]")


def _print_auto_result(result: AutoLabelResult, cost: Cost) -> None:
    _print(f"labels: {_format_counts(result.choices) or 'none'}")
    _print(
        f"of the skips, {result.contradictions} because the answer changed with the order, {result.unclear} unclear; "
        f"{result.first} of {result.clear} clear answers chose the response shown first"
    )
    _print(f"{cost.requests} requests, {cost.tokens} tokens; other answers were known from before")
    if result.left:
        _print(f"[yellow]{result.left} questions are left[/]: the budget is spent; run again to go on")


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _print_conflicts(count: int) -> None:
    if count:
        _print(
            f"[yellow]{count} of them were there with another known answer, or wanting another number of labels[/], "
            "and keep theirs"
        )


def _print_report(summary: LabelSummary) -> None:
    from tasks.labelling.quality import format_number, format_proportion

    headings = ("labels", "skips", "right on known answers", "quality", "first shown", "seconds")
    table = Table(Column("labeller", no_wrap=True), *headings, title="Labellers", title_justify="left")
    for row in summary.labellers:
        table.add_row(
            row.name, str(row.labels), str(row.skips), format_proportion(row.gold), format_number(row.quality),
            format_proportion(row.first), format_number(row.seconds),
        )  # fmt: skip
    print_table(table)
    _print_ranking(summary)
    alpha = f"–, for {summary.alpha_gap}" if summary.alpha_gap else format_number(summary.alpha)
    if summary.alpha_all is not None:
        alpha += f" (with models {format_number(summary.alpha_all)})"
    _print(f"{summary.labels} labels, {summary.labelled} of {summary.questions} questions labelled")
    _print(f"Krippendorff's alpha {alpha}; two people agree {format_proportion(summary.agreement)}")
    _print(f"the first shown is chosen {format_proportion(summary.first)}")


def _print_ranking(summary: LabelSummary) -> None:
    from tasks.labelling.quality import format_interval

    if not summary.ranking:
        return
    headings = ("policy", "comparisons", "wins against sft", "Elo")
    table = Table(*headings, title="Policies, by people", title_justify="left")
    for row in summary.ranking:
        shown = format_interval(row.win_rate, "{:.0%}"), format_interval(row.elo, "{:.0f}")
        table.add_row(row.policy, str(row.comparisons), *shown)
    print_table(table)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="\n")


def _write_format(file: Path, questions: list[Question], labels: list[Label], kind: Format) -> None:
    from tasks.labelling.formats import dump
    from tasks.labelling.records import LABEL_STUDIO_CONFIG

    _write(file, dump(questions, labels, kind))
    _print(f"{len(questions)} questions with {len(labels)} labels: {file}")
    if kind == "label-studio":
        _write(file.with_suffix(".xml"), LABEL_STUDIO_CONFIG)
        _print(f"labelling interface for the project's settings: {file.with_suffix('.xml')}")


def _write_preferences(file: Path, result: ExportResult) -> bool:
    """Write rows and card, print what they hold, and return whether the rows have changed."""
    from tasks.core.rows import write_json, write_rows

    before = file.read_bytes() if file.is_file() else None
    write_rows(file, result.rows)
    write_json(file.with_suffix(".card.json"), result.card)
    dropped = _format_counts(result.dropped) or "nothing"
    _print(f"{len(result.rows)} preferences of {result.card['labelled']} labelled questions: {file}")
    _print(f"dropped: {dropped}; questions on which labellers differ: {result.card['disputed']}")
    return file.read_bytes() != before


def announce_labels() -> bool:
    """Announce the new data to Prefect and return whether that succeeded; a missing server is no error."""
    from flows.retrain import announce_data

    try:
        _print(f"announced data of md5 {announce_data()}")
    except RLHFError as error:
        _print(f"not announced: {error}; `rlhf retrain` trains with these labels")
        return False
    return True
