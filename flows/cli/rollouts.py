"""The command `rlhf rollouts`: what policies wrote in training, token by token, as a page."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from flows.cli.console import console, enter_project_with_services
from tasks.core.errors import ConfigError
from tasks.core.paths import stage_dir

__all__ = ["app"]

app = typer.Typer()

MLFLOW_RUN = re.compile(r"[0-9a-f]{32}")

Run = Annotated[
    str | None,
    typer.Argument(help="A stage, an MLflow run, a version's number, champion or challenger; default: artifacts/."),
]


@app.command()
def rollouts(run: Run = None) -> None:
    """Write a page of responses from training: token by token, with advantages, rewards and detectors."""
    enter_project_with_services()
    from tasks.evals.rollouts_page import render_page

    path = stage_dir("evaluate") / "rollouts.html"
    has_report = path.with_name("report.html").is_file()
    with TemporaryDirectory(prefix="rlhf-rollouts-") as temporary:
        page = render_page(_find_folders(run, Path(temporary)), run or "", has_report=has_report)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", newline="\n")
    console.print(f"page: {path} ({path.stat().st_size / 1e6:.2f} MB)")


def _find_folders(run: str | None, temporary: Path) -> dict[str, Path]:
    """Stage → folder with its rollouts and curves; those of a version or an MLflow run come from DVC's cache."""
    from tasks.evals.rollouts_page import HISTORY, ROLLOUTS

    here = {path.parent.name: path.parent for path in sorted(stage_dir("evaluate").parent.glob(f"*/{ROLLOUTS}"))}
    if run is None or run in here:
        return {name: folder for name, folder in here.items() if run in (None, name)}
    from tasks.runtime import dvc_repo

    try:
        md5s = {stage: own for stage, own in _output_md5s(run).items() if ROLLOUTS in own}
    except ConfigError as error:
        raise ConfigError(f"{error}; stages here that recorded rollouts: {', '.join(here) or 'none'}") from None
    for stage, own in md5s.items():
        for name in (ROLLOUTS, HISTORY):
            dvc_repo.restore(own[name], temporary / stage / name)
    return {stage: temporary / stage for stage in md5s}


def _output_md5s(run: str) -> dict[str, dict[str, str]]:
    """Stage → name of its output → md5, for an MLflow run or a registered version."""
    from tasks.runtime import mlflow_runs, provenance, registry

    if MLFLOW_RUN.fullmatch(run):
        return mlflow_runs.output_md5s(run)
    version = registry.find(run)
    outputs = provenance.provenance_of(version).stages[version.policy].outputs
    return {version.policy: {Path(path).name: md5 for path, md5 in outputs.items()}}
