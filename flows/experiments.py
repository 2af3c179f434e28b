"""Runs of other variants of the project, each in a git worktree: parameter sweeps, several seeds, reproductions.

The variants of a sweep and of seeds share one DVC cache: what they have in common is computed by the first and restored
for the others, and `rlhf run -S` with the same settings brings it into the project itself. They report to the project's
MLflow, tagged with their series and their settings.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.markup import escape

from flows.cli import console
from flows.worktrees import as_project_root, git, run_rlhf, worktree
from tasks.config.params import Params, load_params, parse_override
from tasks.core.determinism import describe_machine
from tasks.core.errors import ConfigError, RLHFError, StageError, TrainingError
from tasks.core.paths import project_root, stage_dir, state_dir
from tasks.evals import experiments
from tasks.evals.experiments import SeedResult
from tasks.runtime import dvc_repo, holding, mlflow_pipeline, mlflow_runs, mlflow_store
from tasks.runtime.provenance import Provenance, provenance_of, weight_digests
from tasks.runtime.registry import Version

__all__ = ["differences", "expand_grid", "reproduce", "run_seeds", "sweep"]


# -- parameter sweeps ------------------------------------------------------------------------------------------


def sweep(settings: Sequence[str], args: Sequence[str]) -> Path:
    """Run every combination of values, one after another; return the folder with the comparison.

    Args:
        settings: `key=value,value,…` each.
        args: of each `rlhf run`.

    Raises:
        ConfigError: a setting is malformed, or a combination is not valid.
        StageError: there is no git commit to start from, or a variant failed; those before it are kept.
    """
    variants = expand_grid(settings)
    folder = _new_series_folder("sweeps")
    results: dict[str, Any] = {}
    for number, variant in enumerate(variants, start=1):
        console.print_variant_start(number, len(variants), variant)
        name = " ".join(variant)
        try:
            with _run_with_overrides(folder, variant, args) as written:
                policies = written / "evaluate" / "policies.json"
                if policies.is_file():
                    results[name] = json.loads(policies.read_text(encoding="utf-8"))
        except RLHFError as error:
            raise StageError(f"the variant {name} failed: {error}; run the sweep again to go on from there") from error
        if results:
            experiments.write_comparison(folder, results)
    return folder


def expand_grid(settings: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of the values, each as `key=value` arguments; a ConfigError if a setting lacks key or value.

    A list or mapping counts as one value: commas within brackets do not separate. Values are YAML, as in params.yaml.
    """
    choices = []
    for setting in settings:
        key, equals, values = setting.partition("=")
        overrides = [f"{key}{equals}{value}" for value in _split_values(values)]
        for override in overrides:
            parse_override(override)
        choices.append(overrides)
    if not choices:
        raise ConfigError("a sweep needs values to try: rlhf sweep -S ppo.kl_coef=0.02,0.05,0.1")
    return list(itertools.product(*choices))


def _split_values(values: str) -> list[str]:
    parts, depth = [""], 0
    for character in values:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


# -- several seeds ---------------------------------------------------------------------------------------------


def run_seeds(
    count: int, stages: Sequence[str], options: Mapping[str, Any], environment: Mapping[str, str], *, whole_chain: bool
) -> tuple[Path, dict[str, Any]]:
    """Run under so many seeds, from those of params.yaml upwards, one after another, and compare them.

    The first is the project itself. `policy_seed` differs; data, SFT, reward model, and the prompts and random numbers
    of the evaluation are common to all. For the whole chain `seed` differs, too: it splits the data, and SFT, reward
    model and gold judge are trained anew. A seed that fails does not keep the others from running; its error is part of
    the summary.

    Args:
        stages: to run, with what they need; empty for all.
        options: of `flows.pipeline.pipeline`, for each run.
        environment: variables by which another process reports to the same servers.

    Returns:
        The folder with the comparison, and its content: see `tasks.evals.experiments.summarise_seeds`.

    Raises:
        ConfigError: there is nothing to compare.
        RLHFError: the project's own run failed, and not in training.
    """
    params = load_params(project_root() / "params.yaml")
    _check_seeds_apply(params, stages)
    folder = _new_series_folder("seeds")
    starts = {"policy_seed": params.policy_seed} | ({"seed": params.seed} if whole_chain else {})
    flow_run = ""
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items() if value]
    results: dict[int, SeedResult | RLHFError] = {}
    for number in range(count):
        settings = [f"{name}={start + number}" for name, start in starts.items()]
        seed = params.policy_seed + number
        console.print_variant_start(number + 1, count, settings)
        if number == 0:
            flow_run, results[seed] = _run_in_place(stages, options)
        else:
            try:
                with _run_with_overrides(folder, settings, [*stages, *flags], environment) as written:
                    results[seed] = experiments.load_seed_result(written)
            except RLHFError as error:
                results[seed] = error
        experiments.write_summary(folder, results)
    summary = experiments.summarise_seeds(results)
    variant = " ".join(f"{name}={start}" for name, start in starts.items())
    tags = {"rlhf.sweep": folder.name, "rlhf.variant": variant}
    tags |= {f"seeds.{key}": "; ".join(summary[key]) for key in ("collapsed", "failed") if summary[key]}
    mlflow_pipeline.add_to_pipeline(flow_run, tags, experiments.flat_metrics(summary))
    return folder, summary


def _check_seeds_apply(params: Params, stages: Sequence[str]) -> None:
    from flows.pipeline import resolve_plan

    if "evaluate" not in resolve_plan(list(stages) or None):
        raise ConfigError("--seeds compares evaluations: name the stage evaluate, too, or no stage at all")
    if not (params.ppo or params.grpo or params.dpo):
        raise ConfigError("--seeds repeats the training of policies, but ppo, grpo and dpo are all off")


def _run_in_place(stages: Sequence[str], options: Mapping[str, Any]) -> tuple[str, SeedResult | RLHFError]:
    """Run the pipeline in this folder; return its Prefect run id and its result."""
    from flows.pipeline import pipeline

    flow_state: Any = pipeline(list(stages) or None, **options, return_state=True)
    run_id = str(flow_state.state_details.flow_run_id)
    try:
        flow_state.result()
    except TrainingError as error:  # any other error would meet every seed
        return run_id, error
    return run_id, experiments.load_seed_result(stage_dir("evaluate").parent)


# -- variants in worktrees -------------------------------------------------------------------------------------


def _new_series_folder(kind: str) -> Path:
    """A new folder, named as the series of variants; a StageError if there is no git commit to start from."""
    if not mlflow_runs.git_commit():
        raise StageError("variants need a git commit to start from: commit the project first")
    folder = state_dir() / kind / f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True)
    return folder


@contextmanager
def _run_with_overrides(
    folder: Path, settings: Sequence[str], args: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Run with these settings in a worktree; yield the folder of the outputs, which is removed at the end.

    Args:
        folder: of the series.
        settings: `key=value` each.
        args: of `rlhf run` beside them.
        environment: variables beside this process's.
    """
    tags = json.dumps({"sweep": folder.name, "variant": " ".join(settings)})
    own = {"MLFLOW_TRACKING_URI": mlflow_store.store_uri(), mlflow_pipeline.SWEEP_VAR: tags}
    own[holding.MARKS_VAR] = str(holding.marks_dir())
    with _working_copy(folder / "worktree") as tree:
        flags = [flag for setting in settings for flag in ("-S", setting)]
        run_rlhf(tree, [*args, *flags], {**os.environ, **(environment or {}), **own})
        yield tree / "artifacts"


@contextmanager
def _working_copy(folder: Path) -> Iterator[Path]:
    """The project as it is now, changes that are not committed included, at another place with the same DVC cache."""
    root = project_root()
    with worktree(folder, "HEAD"):
        changed = git("ls-files", "--modified", "--others", "--exclude-standard", "-z").split("\0")
        for name in filter(None, changed):
            source, target = root / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            if source.is_symlink() or source.is_dir():  # a folder listed by itself is a repository of its own
                target.symlink_to(source.resolve())
            elif source.exists():
                shutil.copy2(source, target)
        load_params(folder / "params.yaml")
        _fetch_data(folder)
        yield folder


# -- reproduction of a registered policy -----------------------------------------------------------------------


def reproduce(version: Version) -> dict[str, str]:
    """Compute a policy and all that it needs again, from its commit, parameters and data; return its weights' md5s.

    That takes as long as it took: the worktree has an empty DVC cache and an MLflow store of its own. What differs here
    from where it was made is printed first. A StageError if that is not all known or not here, or if a stage failed.
    """
    origin = provenance_of(version)
    _check_reproducible(version, origin)
    for difference in differences(origin):
        console.console.print(f"[yellow]differs:[/] {escape(difference)}")
    folder = state_dir() / "reproduce" / f"{version.number}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    try:
        with worktree(folder, origin.commit) as tree:
            (tree / "params.yaml").write_text(origin.params, encoding="utf-8")
            _fetch_data(tree)
            dvc_repo.use_cache(tree, shared=False)
            environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
            try:
                run_rlhf(tree, [version.policy], environment)
            except RLHFError as error:
                raise StageError(f"version {version.number} could not be computed again: {error}") from error
            with as_project_root(tree):
                reproduced = weight_digests({path.partition("/")[0] for path in version.weights})
    finally:
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
    return {path: reproduced[path] for path in version.weights}


def differences(origin: Provenance) -> list[str]:
    """What is not as it was where the version was made, and may give other bytes."""
    now, facts = describe_machine(), origin.machine_facts().items()
    found = [f"{key} was {then}, here {now.get(key, 'none')}" for key, then in facts if then != now.get(key)]
    if git("diff", "--name-only", origin.commit, "--", "requirements.lock"):
        found.append("requirements.lock was another one: install that")
    return found


def _check_reproducible(version: Version, origin: Provenance) -> None:
    name = f"version {version.number}"
    if not origin.commit:
        raise StageError(f"{name} was made where git had no commit, so its code is not known: commit, then retrain")
    if origin.uncommitted:
        files = ", ".join(origin.uncommitted)
        raise StageError(
            f"{name} was made with changes that were not committed ({files}), so its code or data is not known; "
            "commit first, then `rlhf retrain` registers versions that can be made again"
        )
    try:
        git("cat-file", "-e", f"{origin.commit}^{{commit}}")
    except StageError as error:
        raise StageError(f"{name} was made at commit {origin.commit}, which is not here: `git fetch` it") from error


def _fetch_data(tree: Path) -> None:
    """Fetch the data that `dvc add` tracks, from this project's cache or the DVC remote."""
    dvc_repo.use_cache(tree, shared=True)
    with as_project_root(tree):
        dvc_repo.pull_data()
