"""The pipeline under several seeds of its policies: the project itself, and a variant of it for every other seed.

Data, SFT, reward model, and the prompts and random numbers of the evaluation are common to all of them, so what differs
is luck in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows import screen
from flows.pipeline import pipeline, plan
from flows.variants import begin, run_variant
from tasks.core.errors import ConfigError, RLHFError, TrainingError
from tasks.core.params import Params, load_params
from tasks.core.paths import artifacts, project_root
from tasks.evals.seeds import Trained, metrics, read, report, write
from tasks.runtime import recording

__all__ = ["seeds"]


def seeds(
    count: int, stages: Sequence[str], options: Mapping[str, Any], environment: Mapping[str, str]
) -> tuple[Path, dict[str, Any]]:
    """Run under so many seeds, from `policy_seed` upwards, one after another, and compare them.

    A seed that fails does not keep the others from running; what it failed by is part of the report.

    Args:
        stages: to run, with what they need; empty for all.
        options: of `flows.pipeline.pipeline`, for each run.
        environment: variables by which another process reports to the same servers.

    Returns:
        The folder with the comparison, and what it says: see `tasks.evals.seeds.report`.

    Raises:
        ConfigError: there is nothing to compare.
        RLHFError: the project's own run failed, and not in training.
    """
    params = load_params(project_root() / "params.yaml")
    _refuse_what_has_no_seeds(params, stages)
    folder = begin("seeds")
    first, flow_run = params.policy_seed, ""
    found: dict[int, Trained | RLHFError] = {}
    for seed in range(first, first + count):
        screen.variant_begins(seed - first + 1, count, [_setting(seed)])
        if seed == first:
            flow_run, found[seed] = _own(stages, options)
        else:
            found[seed] = _variant(folder, seed, _words(stages, options), environment)
        write(folder, found)
    told = report(found)
    _record(flow_run, {"rlhf.sweep": folder.name, "rlhf.variant": _setting(first)}, told)
    return folder, told


def _refuse_what_has_no_seeds(params: Params, stages: Sequence[str]) -> None:
    if "evaluate" not in plan(list(stages) or None):
        raise ConfigError("--seeds compares evaluations: name the stage evaluate, too, or no stage at all")
    if not (params.ppo or params.grpo or params.dpo):
        raise ConfigError("--seeds repeats the training of policies, but ppo, grpo and dpo are all off")


def _own(stages: Sequence[str], options: Mapping[str, Any]) -> tuple[str, Trained | RLHFError]:
    """The project's own run: its Prefect id, and what it came to."""
    state: Any = pipeline(list(stages) or None, **options, return_state=True)
    run_id = str(state.state_details.flow_run_id)
    try:
        state.result()
    except TrainingError as error:  # any other error would meet every seed
        return run_id, error
    return run_id, read(artifacts("evaluate").parent)


def _variant(folder: Path, seed: int, words: Sequence[str], environment: Mapping[str, str]) -> Trained | RLHFError:
    try:
        with run_variant(folder, [_setting(seed)], words, environment) as written:
            return read(written)
    except RLHFError as error:
        return error


def _setting(seed: int) -> str:
    return f"policy_seed={seed}"


def _words(stages: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The same as a person would type it."""
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items() if value]
    return [*stages, *flags]


def _record(flow_run: str, tags: Mapping[str, str], told: Mapping[str, Any]) -> None:
    """Say it of the project's own pipeline run in MLflow."""
    bad = {f"seeds.{word}": "; ".join(told[word]) for word in ("collapsed", "failed") if told[word]}
    recording.tag_pipeline(flow_run, {**tags, **bad})
    recording.measure_pipeline(flow_run, metrics(told))
