"""The commands for registered policies: list, promote, trace, reproduce, sample from and export them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flows.cli.console import SHORT_HASH, console, enter_project_with_services, handle_interrupt, print_table
from tasks.core.errors import ConfigError
from tasks.core.paths import project_root, stage_dir
from tasks.runtime import registry
from tasks.runtime.mlflow_runs import WEIGHT_DIRS
from tasks.runtime.registry import Version

if TYPE_CHECKING:
    from tasks.runtime.provenance import StageRecord

__all__ = ["app"]

app = typer.Typer()

Sample = Callable[[Sequence[str], int], Iterator[tuple[str, str, bool]]]
"""(prompts, samples of each) → prompt, response, and whether it ended by itself."""

EXPORT_CHECK_PROMPTS = 8  # held-out prompts on which an export is compared with the policy
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Model = Annotated[str, typer.Argument(help="A version's number, champion, or challenger.")]
ModelOption = Annotated[str, typer.Option("--model", help="A version's number, champion, challenger, or a stage.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Tokens of a response at most; default: as trained.")]
Temperature = Annotated[float | None, typer.Option(min=0.01, help="Default: as trained.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the random numbers.")]
Reason = Annotated[str, typer.Option(help="For the record.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
ChatTemplate = Annotated[bool, typer.Option(help="Show prompts as a user's messages, not as beginnings of a text.")]


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the registered policies."""
    enter_project_with_services()
    known = registry.versions()
    if as_json:
        from tasks.runtime.provenance import PROVENANCE_TAG

        hidden = (PROVENANCE_TAG, "weights")
        rows = []
        for item in known:
            tags = {key: value for key, value in item.tags.items() if key not in hidden}
            rows.append({"version": item.number, **_summary(item), "tags": tags})
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif known:
        print_table(_models_table(known))
    else:
        console.print("No policy is registered yet: `rlhf retrain` registers one.")


@app.command()
def promote(model: Model = "challenger", reason: Reason = "") -> None:
    """Make a version the champion; one that was refused or withdrawn needs --reason."""
    enter_project_with_services()
    version = registry.find(model)
    objection = version.withdrawal or (None if version.accepted else f"the gate refused it: {version.tags['reasons']}")
    if objection and not reason.strip():
        raise ConfigError(f"version {version.number}: {objection}. Promote it all the same with --reason TEXT")
    from tasks.runtime.provenance import restore_weights

    with TemporaryDirectory(prefix="rlhf-model-") as folder:
        restore_weights(version, Path(folder))  # else nobody could serve it
    registry.set_champion(version, by=_user(), reason=reason.strip())
    console.print(f"version {version.number} ({version.policy}) is the champion; `rlhf rollback` undoes it")


@app.command()
def rollback(reason: Reason = "") -> None:
    """Put the champion before this one in use again."""
    enter_project_with_services()
    withdrawn, restored = registry.roll_back(by=_user(), reason=reason.strip())
    console.print(
        f"version {restored.number} ({restored.policy}) is the champion again; "
        f"version {withdrawn.number} ({withdrawn.policy}) is withdrawn, and the gate will not promote it by itself"
    )


@app.command()
def withdraw(reason: Reason = "") -> None:
    """Take the champion out of use and leave none; `rlhf rollback` puts the one before in its place."""
    enter_project_with_services()
    withdrawn = registry.withdraw(by=_user(), reason=reason.strip())
    console.print(
        f"version {withdrawn.number} ({withdrawn.policy}) is withdrawn, and the gate will not promote it by itself; "
        "there is no champion: `rlhf promote` or `rlhf retrain` makes one"
    )


@app.command()
def lineage(model: Model = "champion", as_json: AsJson = False) -> None:
    """Show what a version was made from: data, code, parameters, stages, and the decision about it."""
    enter_project_with_services()
    version = registry.find(model)
    if as_json:
        print(json.dumps(_lineage_dict(version), indent=2, ensure_ascii=False))
    else:
        _print_lineage(version)


@app.command()
def reproduce(model: Model = "champion") -> None:
    """Compute a version again from its commit, parameters and data with an empty cache, and compare the weights."""
    enter_project_with_services()
    from flows.experiments import reproduce as compute

    version = registry.find(model)
    with handle_interrupt("it begins anew, and this project is as it was"):
        reproduced = compute(version)
    title = f"Version {version.number} ({version.policy})"
    table = Table("weights", "registered", "reproduced", "equal", title=title, title_justify="left")
    for path, md5 in version.weights.items():
        table.add_row(path, md5, reproduced[path], "[green]yes[/]" if md5 == reproduced[path] else "[red]no[/]")
    print_table(table)
    if reproduced == version.weights:
        return
    console.print("what may change the last bits: docs/reproducibility.md; `rlhf lineage` shows where it was made")
    raise typer.Exit(1)


@app.command()
def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="Default: each line of standard input is one.")] = None,
    model: ModelOption = "champion",
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 0,
    chat_template: ChatTemplate = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line.")] = False,
) -> None:
    """Sample a policy's responses to prompts."""
    enter_project_with_services()
    prompts = prompt or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("there is no prompt: give some as arguments, or as lines of standard input")
    with _open_sampler(model, temperature, max_new_tokens, seed, chat_template) as sample:
        for number, (text, response, has_eos) in enumerate(sample(prompts, samples)):
            if as_json:
                row = {"prompt": text, "sample": number % samples, "response": response, "ended": has_eos}
                print(json.dumps(row, ensure_ascii=False))
            else:
                _print_sample(text, response, chat_template)


@app.command()
def chat(
    model: ModelOption = "champion",
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 0,
    chat_template: ChatTemplate = False,
) -> None:
    """Type prompts, each on its own (no conversation), and read a policy's responses; Ctrl-D ends."""
    enter_project_with_services()
    with _open_sampler(model, temperature, max_new_tokens, seed, chat_template) as sample:
        while (line := _read_prompt()) is not None:
            for text, response, _ in sample([line] if line.strip() else [], 1):
                _print_sample(text, response, chat_template)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    model: Model = "champion",
    adapter: Annotated[bool, typer.Option(help="The SFT model, and the policy as a LoRA adapter on it.")] = False,
) -> None:
    """Write a version as a folder that transformers loads without this project, with a model card."""
    folder = folder.absolute()
    enter_project_with_services()
    version = registry.find(model)
    from tasks.core.rows import Prompt, read_rows
    from tasks.evals.model_card import render_model_card
    from tasks.models import export
    from tasks.runtime import dvc_repo, provenance

    made_from = provenance.provenance_of(version)
    generation = made_from.parameters["generation"]
    with TemporaryDirectory(prefix="rlhf-model-") as temporary, export.atomic_folder(folder) as draft:
        parts = Path(temporary)
        provenance.restore_weights(version, parts)
        prompts = parts / "prompts"
        dvc_repo.restore(made_from.md5_of("artifacts/prepare/prompts"), prompts)
        exported = export.export(
            parts,
            version.policy,
            draft,
            adapter=adapter,
            prompts=[row.prompt for row in read_rows(prompts / "test.jsonl", Prompt)[:EXPORT_CHECK_PROMPTS]],
            max_new_tokens=generation["max_new_tokens"],
            temperature=generation["temperature"],
        )
        text = render_model_card(version, made_from, exported, adapter=adapter)
        (draft / "README.md").write_text(text, encoding="utf-8")
    console.print(
        f"version {version.number} ({version.policy}) as {exported.dtype} in {folder}; loaded again, its logits differ "
        f"by at most {exported.max_logit_difference:.2g} (the largest is {exported.max_logit:.3g})"
    )


def _user() -> str:
    return os.environ.get("USER", "unknown")


def _models_table(known: list[Version]) -> Table:
    headings = ["version", "in use", "policy", "win rate v. SFT", "KL to SFT (nats)", "gate", "commit"]
    table = Table(*headings, "registered (UTC)", title="Registered policies", title_justify="left")
    for item in known:
        row = _summary(item)
        rate, kl = f"{row['win_rate']:.0%}", f"{row['kl']:z.2f}"
        aliases, when = " ".join(item.aliases), f"{item.registered:%Y-%m-%d %H:%M}"
        table.add_row(str(item.number), aliases, item.policy, rate, kl, row["gate"], row["commit"][:SHORT_HASH], when)
    return table


def _summary(version: Version) -> dict[str, Any]:
    return {
        "policy": version.policy,
        "aliases": list(version.aliases),
        "win_rate": float(version.tags["win_rate"]),
        "kl": float(version.tags["kl"]),
        "gate": "withdrawn" if version.withdrawal else "accepted" if version.accepted else "refused",
        "commit": version.tags["git.commit"],
        "registered": version.registered.isoformat(timespec="seconds"),
        "weights": dict(version.weights),
    }


def _lineage_dict(version: Version) -> dict[str, Any]:
    from tasks.runtime.provenance import provenance_of

    return {
        "version": version.number,
        "policy": version.policy,
        "aliases": list(version.aliases),
        "registered": version.registered.isoformat(timespec="seconds"),
        "weights": dict(version.weights),
        "data_md5": version.tags["data.md5"],
        "decision": _gate_decision(version),
        "deleted_feedback": dict(version.deleted_users),
        **provenance_of(version).model_dump(mode="json"),
    }


def _gate_decision(version: Version) -> dict[str, Any]:
    """Decision of the gate, and later promotions and withdrawals by people."""
    tags = {key: value for key, value in version.tags.items() if key.startswith(("promoted.", "withdrawn."))}
    return {"accepted": version.accepted, "reasons": version.tags["reasons"], **tags}


def _print_lineage(version: Version) -> None:
    from tasks.runtime.provenance import provenance_of

    origin = provenance_of(version)
    changed = f" with changes that were not committed: {', '.join(origin.uncommitted)}" if origin.uncommitted else ""
    base, when = origin.base_model, f"{version.registered:%Y-%m-%d %H:%M}"
    facts = {
        "version": f"{version.number} {' '.join(version.aliases)} ({version.policy}, {when} UTC)",
        "git commit": (origin.commit or "none") + changed,
        "data/": version.tags["data.md5"] or "none",
        **{f"source {item['name']}": f"{item['source']}, {item['rows']} rows" for item in origin.sources},
        "base model": f"{base.get('source', 'unknown')}, {base.get('parameters', '?')} parameters",
        "pipeline run": origin.pipeline_run,
        "made on": "  ".join(f"{key}={value}" for key, value in origin.machine_facts().items()) or "not recorded",
        "gate": f"{'accepted' if version.accepted else 'refused'}: {version.tags['reasons']}",
        **{key: value for key, value in _gate_decision(version).items() if "." in key and value},
        **{
            f"feedback of {user}": f"deleted {at}, after this version was trained on it"
            for user, at in version.deleted_users.items()
        },
    }
    for key, value in facts.items():
        console.print(f"[bold]{key:<14}[/] {escape(str(value))}")
    print_table(_stages_table(origin.stages))
    values = origin.parameters.get(version.policy) or {}
    parameters = [f"{version.policy}.{key}={value}" for key, value in values.items()]
    console.print(f"{escape('  '.join(parameters))}\n[dim]all of params.yaml: rlhf lineage --json[/]")


def _stages_table(stages: Mapping[str, StageRecord]) -> Table:
    table = Table("stage", "DVC key", "MLflow run", "weights", title="Stages", title_justify="left")
    for name, stage in stages.items():
        weights = [md5 for path, md5 in stage.outputs.items() if path.rpartition("/")[2] in WEIGHT_DIRS]
        run = stage.run or "none in this store"  # up to date without ever having run here
        table.add_row(name, stage.key[:SHORT_HASH], run, " ".join(weights))
    return table


@contextmanager
def _open_sampler(
    model: str, temperature: float | None, max_new_tokens: int | None, seed: int, chat_template: bool
) -> Iterator[Sample]:
    """Open a sampler of the named policy, for as long as its weights' temporary folder exists."""
    import torch

    from tasks.config.training import GenerationParams
    from tasks.rl.rollout import load_sampler, sample_in_batches

    with handle_interrupt("nothing is kept"), TemporaryDirectory(prefix="rlhf-model-") as folder:
        policy, parts, trained = _resolve_model(model, Path(folder))
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


def _resolve_model(model: str, folder: Path) -> tuple[str, Path, dict[str, Any]]:
    """Resolve a name to a policy, the folder of its parts (restored for a version), and its generation parameters."""
    from tasks.config.params import load_params
    from tasks.models.loading import policy_stages
    from tasks.runtime import provenance

    here = stage_dir("evaluate").parent
    stages = policy_stages(here)
    if model in stages:
        return model, here, load_params(project_root() / "params.yaml").generation.model_dump()
    try:
        version = registry.find(model)
    except ConfigError as error:
        raise ConfigError(f"{error}; stages here whose model writes: {', '.join(stages) or 'none'}") from None
    provenance.restore_weights(version, folder)
    return version.policy, folder, provenance.provenance_of(version).parameters["generation"]


def _print_sample(prompt: str, response: str, chat_template: bool) -> None:
    """Print a response, without characters that would steer the terminal."""
    text = CONTROL_CHARACTERS.sub("\ufffd", response)
    console.print(f"[dim]{escape(prompt)}[/]", end="\n" if chat_template else "")
    console.print(escape(text))


def _read_prompt() -> str | None:
    """Read a line of standard input; None at Ctrl-D."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
