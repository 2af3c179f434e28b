"""Stage lm_eval: run SFT and the policies on tasks of EleutherAI's lm-evaluation-harness (lm-eval).

lm-eval is an extra of the project, so it is imported where it is used. Its `simple_evaluate` is not used: beside the
numbers it asks the hub for the model's commit, and pip and git for the machine.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets.exceptions import DatasetsError
from transformers import set_seed

from tasks.core.errors import ConfigError, SourceError, first_line
from tasks.core.paths import Artifacts, project_root
from tasks.core.rows import flatten, write_json
from tasks.data.hub import HUB_ERRORS
from tasks.evals.compare import DIGITS, REFERENCE
from tasks.models.loading import init_process, is_disabled, load_policy, load_reference, load_tokenizer

if TYPE_CHECKING:
    from tasks.config.evaluation import LmEvalParams

__all__ = ["lm_eval", "load_tasks"]


Scores = dict[str, dict[str, list[float | None]]]
"""Task → metric → [value, standard error]; the error is None where lm-eval knows none (perplexities)."""

BOOTSTRAP_RESAMPLES = 1000
"""Resamples for the few metrics whose standard error lm-eval bootstraps (F1, BLEU, medians)."""


def lm_eval(params: LmEvalParams, seed: int, artifacts: Artifacts) -> None:
    """Measure SFT and those of PPO, GRPO and DPO that are on, in every task.

    Writes results.json (policy → task → metric → [value, standard error or null]) and metrics.json (policy →
    `<task>.<metric>` → value). Tasks read held-out demonstrations and preferences, or the hub.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task.
        SourceError: the data of a task cannot be read.
    """
    init_process()
    tokenizer = load_tokenizer(artifacts.base_model)
    trained = {"ppo": artifacts.ppo, "grpo": artifacts.grpo, "dpo": artifacts.dpo}
    data = (artifacts.prepare / "demonstrations", artifacts.preferences / "test.jsonl")
    with load_tasks(params, project_root() / params.include, data, seed) as tasks:
        evaluate = partial(run_tasks, tokenizer=tokenizer, tasks=tasks, params=params, seed=seed)
        results = {REFERENCE: evaluate(load_reference(artifacts.base_model, artifacts.sft))}
        for name, folder in trained.items():
            if not is_disabled(folder):
                gc.collect()  # the previous policy is in reference cycles
                results[name] = evaluate(load_policy(artifacts.base_model, artifacts.sft, folder))
    write_json(artifacts.out / "results.json", results)
    metrics = {name: {key: value for key, (value, _) in flatten(scores).items()} for name, scores in results.items()}
    write_json(artifacts.out / "metrics.json", metrics)


@contextlib.contextmanager
def load_tasks(params: LmEvalParams, include: Path, data: Sequence[Path], seed: int) -> Iterator[Any]:
    """Load lm-eval tasks with their data; valid while the context is open.

    Paths in task files start at the project's root, of which only what `data` names is there, as
    `artifacts/<stage>/<name>`: what a stage reads, dvc.yaml must name.

    Raises:
        ConfigError: lm-eval, or a package that a task needs, is not installed, or there is no such task.
        SourceError: the data of a task cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-lm-eval-") as folder:
        root = Path(folder, "root")
        for path in data:
            link = root / "artifacts" / path.parent.name / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        include = include.resolve()
        with contextlib.chdir(root), _isolated_datasets_cache(Path(folder, "cache")), _silence_lm_eval():
            loaded = _load_task_objects(params, include)
        for task in loaded["tasks"].values():
            _set_fewshot(task, params.num_fewshot, seed)
        yield loaded


def run_tasks(model: Any, tokenizer: Any, tasks: Any, *, params: LmEvalParams, seed: int) -> Scores:
    """Evaluate the model on the loaded tasks; with several filters, metrics are named `metric.filter`."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    set_seed(seed)
    with _silence_lm_eval():
        output = evaluate(
            lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=params.batch_size),
            task_dict=tasks,
            limit=params.limit,
            bootstrap_iters=BOOTSTRAP_RESAMPLES,
            log_samples=False,
        )
    return {task: scores for task, row in output["results"].items() if (scores := _metric_values(row))}


def _metric_values(row: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """`acc,none` and `acc_stderr,none` as `acc`: [value, error]; other entries are dropped."""
    scores = {}
    for key, value in row.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = row.get(f"{metric}_stderr,{filter_name}")
            stderr = round(float(error), DIGITS) if isinstance(error, int | float) else None
            name = metric if filter_name == "none" else f"{metric}.{filter_name}"
            scores[name] = [round(float(value), DIGITS), stderr]
    return scores


def _load_task_objects(params: LmEvalParams, include: Path) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "lm_eval is on, but lm-eval is not installed: `pip install -e '.[lm-eval]'`, or set lm_eval to null"
        ) from error
    manager = TaskManager(include_path=str(include), include_defaults=False)
    if not set(params.tasks) <= set(manager.all_tasks):  # reading the names of all its own tasks takes seconds
        manager = TaskManager(include_path=str(include))
    if unknown := [name for name in params.tasks if name not in manager.all_tasks]:
        raise ConfigError(
            f"lm_eval.tasks: neither {params.include} nor lm-eval has {unknown}; `lm-eval ls tasks` lists what it has"
        )
    try:
        return manager.load(list(params.tasks))
    except ImportError as error:
        raise ConfigError(f"lm_eval.tasks: a task of {list(params.tasks)} needs another package: {error}") from error
    except (*HUB_ERRORS, DatasetsError, StopIteration) as error:  # the last: datasets 5, of an empty JSON file
        reason = "a file is empty" if isinstance(error, StopIteration) else first_line(error)
        raise SourceError(
            f"lm_eval.tasks: the data of a task of {list(params.tasks)} cannot be read: {reason}; check "
            f"the network, whether the stages that write it are on, or the task files in {params.include}"
        ) from error


def _set_fewshot(task: Any, count: int | None, seed: int) -> None:
    """Set few-shot as lm-eval's `simple_evaluate` does: a task that fixes 0 keeps it; with no setting, `count` or 0."""
    task_default = task.get_config("num_fewshot")
    if task_default is None or (count is not None and task_default != 0):
        task.set_config(key="num_fewshot", value=count or 0)
    task.set_fewshot_seed(seed=seed)


@contextlib.contextmanager
def _isolated_datasets_cache(cache: Path) -> Iterator[None]:
    """Redirect the cache of datasets and switch off its download counter, which reports even local files."""
    config = datasets.config
    before = config.HF_DATASETS_CACHE, config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_DATASETS_CACHE, config.HF_UPDATE_DOWNLOAD_COUNTS = cache, False
    try:
        yield
    finally:
        config.HF_DATASETS_CACHE, config.HF_UPDATE_DOWNLOAD_COUNTS = before


@contextlib.contextmanager
def _silence_lm_eval() -> Iterator[None]:
    """Silence lm-eval, and stop it from forking processes beside torch's threads."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("lm_eval")
