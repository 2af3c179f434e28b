"""The commands for registered policies: which there are, where they come from, and using them."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flows import screen
from flows.commandline import enter_served, interruptible
from tasks.core.errors import ConfigError
from tasks.core.paths import project_root, stage_dir

if TYPE_CHECKING:
    from tasks.core.registry import Version

__all__ = ["commands"]

commands = typer.Typer()

PROMPTS = 8
"""Held-out prompts on which an export is compared with the policy."""

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Sample = Callable[[Sequence[str], int], Iterator[tuple[str, str, bool]]]
"""(prompts, samples of each) → prompt, response, and whether it ended by itself."""

Model = Annotated[str, typer.Argument(help="A version's number, champion, or challenger.")]
Writing = Annotated[str, typer.Option("--model", help="A version's number, champion, challenger, or a stage.")]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens of a response at most; default: as trained.")]
Temperature = Annotated[float | None, typer.Option(min=0.01, help="Default: as trained.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the random numbers.")]
Why = Annotated[str, typer.Option(help="The reason, for the record.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
ChatTemplate = Annotated[bool, typer.Option(help="Show prompts as a user's messages, not as beginnings of a text.")]


@commands.command()
def models(as_json: AsJson = False) -> None:
    """List the registered policies."""
    enter_served()
    from tasks.core import registry

    known = registry.versions()
    if as_json:
        rows = [{"version": item.number, **_summary(item), "tags": _plain_tags(item)} for item in known]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif known:
        screen.show(_models(known))
    else:
        screen.console.print("No policy is registered yet: `rlhf retrain` registers one.")


@commands.command()
def promote(model: Model = "challenger", why: Why = "") -> None:
    """Make a version the champion; one that was refused or rolled back needs --why."""
    enter_served()
    from tasks.core import registry

    version = registry.find(model)
    objection = version.withdrawn or (None if version.accepted else f"the gate refused it: {version.tags['reasons']}")
    if objection and not why.strip():
        raise ConfigError(f"version {version.number}: {objection}. Promote it all the same with --why TEXT")
    registry.set_champion(version, by=_user(), why=why.strip())
    screen.console.print(f"version {version.number} ({version.policy}) is the champion; `rlhf rollback` undoes it")


@commands.command()
def rollback(why: Why = "") -> None:
    """Put the champion before this one in use again."""
    enter_served()
    from tasks.core import registry

    gone, back = registry.roll_back(by=_user(), why=why.strip())
    screen.console.print(
        f"version {back.number} ({back.policy}) is the champion again; version {gone.number} ({gone.policy}) is "
        "withdrawn, and the gate will not promote it by itself"
    )


@commands.command()
def lineage(model: Model = "champion", as_json: AsJson = False) -> None:
    """What a version was made from: data, code, parameters, stages, and the decision about it."""
    enter_served()
    from flows.lineage import describe, print_lineage
    from tasks.core import registry

    version = registry.find(model)
    if as_json:
        print(json.dumps(describe(version), indent=2, ensure_ascii=False))
    else:
        print_lineage(version)


@commands.command()
def reproduce(model: Model = "champion") -> None:
    """Compute a version again from its commit, parameters and data with an empty cache, and compare the weights."""
    enter_served()
    from flows.reproduce import reproduce as compute
    from flows.reproduce import same_libraries
    from tasks.core import registry

    version = registry.find(model)
    with interruptible("it begins anew, and this project is as it was"):
        remade = compute(version)
    table = Table(title=f"Version {version.number} ({version.policy})", title_justify="left")
    for column in ("weights", "registered", "reproduced", "equal"):
        table.add_column(column)
    for item in remade:
        table.add_row(item.path, item.registered, item.reproduced, "[green]yes[/]" if item.equal else "[red]no[/]")
    screen.show(table)
    if all(item.equal for item in remade):
        return
    if same_libraries(version):
        screen.console.print(
            "another kind of processor, or another number of threads (OMP_NUM_THREADS), rounds sums differently: "
            "try as it was made"
        )
    else:
        screen.console.print("requirements.lock was another one then: install that, and try again")
    raise typer.Exit(1)


@commands.command()
def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="Default: each line of standard input is one.")] = None,
    model: Writing = "champion",
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    temperature: Temperature = None,
    max_new_tokens: Length = None,
    seed: Seed = 0,
    chat_template: ChatTemplate = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line.")] = False,
) -> None:
    """Let a policy go on from the beginnings of texts."""
    enter_served()
    prompts = prompt or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("there is no prompt: give some as arguments, or as lines of standard input")
    with interruptible("nothing is kept"), _sampler(model, temperature, max_new_tokens, seed, chat_template) as sample:
        for number, (text, response, ended) in enumerate(sample(prompts, samples)):
            if as_json:
                row = {"prompt": text, "sample": number % samples, "response": response, "ended": ended}
                print(json.dumps(row, ensure_ascii=False))
            else:
                _print(text, response, chat_template)


@commands.command()
def chat(
    model: Writing = "champion",
    temperature: Temperature = None,
    max_new_tokens: Length = None,
    seed: Seed = 0,
    chat_template: ChatTemplate = False,
) -> None:
    """Type beginnings of texts, each on its own (no conversation), and read how a policy goes on; Ctrl-D ends."""
    enter_served()
    with interruptible("nothing is kept"), _sampler(model, temperature, max_new_tokens, seed, chat_template) as sample:
        while (line := _line()) is not None:
            for text, response, _ in sample([line] if line.strip() else [], 1):
                _print(text, response, chat_template)


@commands.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    model: Model = "champion",
    adapter: Annotated[bool, typer.Option(help="The SFT model, and the policy as a LoRA adapter on it.")] = False,
) -> None:
    """Write a version as a folder that transformers loads without this project, with a model card."""
    folder = folder.absolute()
    enter_served()
    from tasks.core import registry

    version = registry.find(model)
    from tasks.core import origin, versioning
    from tasks.core.rows import Prompt, read_rows
    from tasks.evals import model_card
    from tasks.models import export

    made_from = origin.origin_of(version)
    generation = made_from.parameters["generation"]
    with _temporary() as parts, export.atomic_folder(folder) as draft:
        origin.restore(version, parts)
        prompts = parts / "prompts"
        versioning.restore(made_from.md5_of("artifacts/prepare/prompts"), prompts)
        exported = export.export(
            parts,
            version.policy,
            draft,
            adapter=adapter,
            prompts=[row.prompt for row in read_rows(prompts / "test.jsonl", Prompt)[:PROMPTS]],
            max_new_tokens=generation["max_new_tokens"],
            temperature=generation["temperature"],
        )
        text = model_card.render_model_card(model_card.ModelCard(version, made_from, exported, adapter))
        (draft / "README.md").write_text(text, encoding="utf-8")
    screen.console.print(
        f"version {version.number} ({version.policy}) as {exported.dtype} in {folder}; loaded again, its logits differ "
        f"by at most {exported.max_logit_difference:.2g} (the largest is {exported.max_logit:.3g})"
    )


def _user() -> str:
    return os.environ.get("USER", "unknown")


def _models(known: list[Version]) -> Table:
    table = Table(title="Registered policies", title_justify="left")
    columns = (
        "version",
        "in use",
        "policy",
        "win rate v. SFT",
        "KL to SFT (nats)",
        "gate",
        "commit",
        "registered (UTC)",
    )
    for column in columns:
        table.add_column(column)
    for item in known:
        row = _summary(item)
        rate, kl = f"{row['win_rate']:.0%}", f"{row['kl']:z.2f}"
        aliases, when = " ".join(item.aliases), f"{item.registered:%Y-%m-%d %H:%M}"
        table.add_row(
            str(item.number), aliases, item.policy, rate, kl, row["gate"], row["commit"][: screen.SHORT_HASH], when
        )
    return table


def _summary(version: Version) -> dict[str, Any]:
    return {
        "policy": version.policy,
        "aliases": list(version.aliases),
        "win_rate": float(version.tags["win_rate"]),
        "kl": float(version.tags["kl"]),
        "gate": "rolled back" if version.withdrawn else "accepted" if version.accepted else "refused",
        "commit": version.tags["git.commit"],
        "registered": version.registered.isoformat(timespec="seconds"),
        "weights": dict(version.weights),
    }


def _plain_tags(version: Version) -> dict[str, str]:
    from tasks.core.origin import ORIGIN

    return {key: value for key, value in version.tags.items() if key not in (ORIGIN, "weights")}


@contextmanager
def _sampler(
    model: str, temperature: float | None, max_new_tokens: int | None, seed: int, chat_template: bool
) -> Iterator[Sample]:
    """Samples of the policy of that name, its weights in a folder that lasts as long as this."""
    import torch

    from tasks.config.training import GenerationParams
    from tasks.rl.rollout import load_sampler, sample_in_batches

    with _temporary() as folder:
        policy, parts, trained = _chosen(model, folder)
        generation = GenerationParams(
            max_new_tokens=max_new_tokens or trained["max_new_tokens"],
            temperature=temperature or trained["temperature"],
        )
        sampler = load_sampler(parts, policy, generation, chat_template=chat_template)
        generator = torch.Generator().manual_seed(seed)

        def sample(prompts: Sequence[str], samples: int) -> Iterator[tuple[str, str, bool]]:
            for rollout in sample_in_batches(sampler, prompts, generator, samples_per_prompt=samples):
                yield from zip(rollout.prompt_texts, rollout.texts, rollout.has_eos.tolist(), strict=True)

        yield sample


def _chosen(model: str, folder: Path) -> tuple[str, Path, dict[str, Any]]:
    """Policy, where its parts are, and how it was trained to write; a version's weights are put into the folder."""
    from tasks.config.params import load_params
    from tasks.core import origin, registry
    from tasks.models.loading import policy_stages

    here = stage_dir("evaluate").parent
    stages = policy_stages(here)
    if model in stages:
        return model, here, load_params(project_root() / "params.yaml").generation.model_dump()
    try:
        version = registry.find(model)
    except ConfigError as error:
        raise ConfigError(f"{error}; stages here whose model writes: {', '.join(stages) or 'none'}") from None
    origin.restore(version, folder)
    return version.policy, folder, origin.origin_of(version).parameters["generation"]


def _print(prompt: str, response: str, chat_template: bool) -> None:
    """What it wrote, without signs that would steer the terminal."""
    text = CONTROLS.sub("\ufffd", response)
    screen.console.print(f"[dim]{escape(prompt)}[/]", end="\n" if chat_template else "")
    screen.console.print(escape(text))


@contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rlhf-model-") as folder:
        yield Path(folder)


def _line() -> str | None:
    """What a person types; None at Ctrl-D."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
