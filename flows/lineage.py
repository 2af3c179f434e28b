"""Where a registered policy comes from, as one JSON object and as text."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from flows import screen
from tasks.runtime import recording
from tasks.runtime.provenance import origin_of
from tasks.runtime.registry import Version

__all__ = ["describe", "print_lineage"]


def describe(version: Version) -> dict[str, Any]:
    """Everything that is known of it.

    Raises:
        StageError: the version has no record of its origin.
    """
    return {
        "version": version.number,
        "policy": version.policy,
        "aliases": list(version.aliases),
        "registered": version.registered.isoformat(timespec="seconds"),
        "weights": dict(version.weights),
        "data_md5": version.tags["data.md5"],
        "decision": decision(version),
        **origin_of(version).model_dump(mode="json"),
    }


def decision(version: Version) -> dict[str, Any]:
    """What the gate said, and who decided since."""
    tags = {key: value for key, value in version.tags.items() if key.startswith(("promoted.", "withdrawn."))}
    return {"accepted": version.accepted, "reasons": version.tags["reasons"], **tags}


def print_lineage(version: Version) -> None:
    """What led to this version, as a person reads it.

    Raises:
        StageError: the version has no record of its origin.
    """
    origin = origin_of(version)
    changed = f" with changes that were not committed: {', '.join(origin.uncommitted)}" if origin.uncommitted else ""
    base = origin.base_model
    facts = {
        "version": f"{version.number} {' '.join(version.aliases)} ({version.policy}, {_when(version)})",
        "git commit": (origin.commit or "none") + changed,
        "data/": version.tags["data.md5"] or "none",
        **{f"source {item['name']}": f"{item['source']}, {item['rows']} rows" for item in origin.sources},
        "base model": f"{base.get('source', 'unknown')}, {base.get('parameters', '?')} parameters",
        "pipeline run": origin.pipeline_run,
        "gate": f"{'accepted' if version.accepted else 'refused'}: {version.tags['reasons']}",
        **{key: value for key, value in decision(version).items() if "." in key and value},
    }
    for key, value in facts.items():
        screen.console.print(f"[bold]{key:<14}[/] {escape(str(value))}")
    screen.show(_stages(version))
    values = origin.parameters.get(version.policy) or {}
    parameters = [f"{version.policy}.{key}={value}" for key, value in values.items()]
    screen.console.print(f"{escape('  '.join(parameters))}\n[dim]all of params.yaml: rlhf lineage --json[/]")


def _stages(version: Version) -> Table:
    table = Table(title="Stages", title_justify="left")
    for column in ("stage", "DVC key", "MLflow run", "weights"):
        table.add_column(column)
    for name, stage in origin_of(version).stages.items():
        weights = [md5 for path, md5 in stage.outputs.items() if path.rpartition("/")[2] in recording.WEIGHTS]
        run = stage.run or "none in this store"  # up to date without ever having run here
        table.add_row(name, stage.key[: screen.SHORT_HASH], run, " ".join(weights))
    return table


def _when(version: Version) -> str:
    return f"{version.registered:%Y-%m-%d %H:%M} UTC"
