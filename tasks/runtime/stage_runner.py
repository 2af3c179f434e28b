"""Runs one stage with the parameters and folders that its signature names, as one recorded run."""

import contextlib
import gc
import importlib
import inspect
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks.config.params import Params, load_params
from tasks.core import tracking
from tasks.core.custom import forget_custom
from tasks.core.determinism import describe_machine
from tasks.core.errors import RLHFError, StageError, disk_errors
from tasks.core.paths import DISABLED_MARKER, Artifacts, checkpoint_dir, project_root, stage_dir
from tasks.core.rows import flatten, read_table
from tasks.core.terminal import allow_all_characters
from tasks.runtime import dvc_stages, mlflow_runs

__all__ = [
    "Outcome", "execute_stage", "is_off", "read_metrics", "run_stage", "stage_arguments", "write_empty_outputs",
]  # fmt: skip

# No library may call home, and forked data loaders must not deadlock in the tokenizers' thread pool.
ENVIRONMENT = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}


def _file_state(path: Path) -> tuple[int, int, int]:
    """State of a file that changes with every edit, whatever its time stamp."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


CODE_STATE_AT_IMPORT = {path: _file_state(path) for path in Path(__file__).resolve().parents[1].rglob("*.py")}


@dataclass(frozen=True)
class Outcome:
    """Result of the execution of a stage. `key` is DVC's hash of all its inputs, `curves` has a row per step."""

    stage: str
    result: dvc_stages.Result | Literal["off"]
    key: str
    reasons: tuple[str, ...]
    seconds: float
    metrics: dict[str, float]
    curves: list[dict[str, float]]

    @property
    def reason(self) -> str:
        """The reasons in one line."""
        return "; ".join(self.reasons) or "nothing that it reads has changed"


def run_stage(name: str) -> None:
    """`python -m tasks.<name>`: run the stage; an error that the user can cure is one message and exit status 1."""
    allow_all_characters()
    try:
        with disk_errors():
            execute_stage(name, dvc_stages.changes(name))
        if is_off(name):
            print(f"{name} is off: its section in params.yaml is null")
    except RLHFError as error:
        print(f"{name}: {str(error).removeprefix(f'{name}: ')}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def execute_stage(name: str, reasons: Sequence[str]) -> None:
    """Run a stage in this process, as one recorded run.

    Where torchrun or accelerate has started several processes for it, rank 0 records and writes; the others only help.

    Raises:
        ConfigError: params.yaml is not valid.
        StageError: there is no such stage, an input is missing, or an input changed while the stage ran.
        RLHFError: whatever else the stage finds wrong.
    """
    root = project_root()
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    with contextlib.chdir(root), disk_errors(name):
        params = load_params(root / "params.yaml")
        if getattr(params, name, None) is None:
            write_empty_outputs(name)
            return
        inputs = dvc_stages.inputs(name)
        _check_code_unchanged(name, inputs)
        forget_custom()
        function = _load_stage_function(name)
        sections = stage_arguments(function, name, params)
        upstream = {stage: stage_dir(stage) for stage in dvc_stages.graph()[name]}
        folder = checkpoint_dir(name, inputs.key)
        if int(os.environ.get("RANK", "0")) > 0:
            # A rank that helps rank 0: what it writes is thrown away, and nothing is recorded.
            helper = tracking.active_run(tracking.ActiveRun(name, None, folder))
            with tempfile.TemporaryDirectory(prefix="rlhf-rank-") as out, helper:
                function(*sections, Artifacts(out=Path(out), **upstream))
            return
        stage_dir(name).mkdir(parents=True, exist_ok=True)
        tags = {"rlhf.reasons": "; ".join(reasons), "rlhf.ranks": os.environ.get("WORLD_SIZE", "1")}
        with mlflow_runs.stage_run(name, inputs, _flat_params(function, sections), tags) as recorder:
            with tracking.active_run(tracking.ActiveRun(name, recorder, folder)):
                started = time.monotonic()
                function(*sections, Artifacts(out=stage_dir(name), **upstream))
                recorder.log_metrics({"seconds": time.monotonic() - started}, None)
                if "torch" in sys.modules:  # else the stage has computed nothing that could differ
                    recorder.tag({mlflow_runs.MACHINE_TAG: json.dumps(describe_machine())})
            final = mlflow_runs.without_curves(read_metrics(name), read_history(name))
            recorder.log_metrics({f"final/{metric}": value for metric, value in final.items()}, None)
            _check_inputs_unchanged(name, inputs)
            recorder.log_outputs(dvc_stages.output_digests(name))
        shutil.rmtree(folder, ignore_errors=True)
    gc.collect()


def is_off(name: str) -> bool:
    """Whether the stage's section in params.yaml is null; a ConfigError if that file is not valid."""
    return getattr(load_params(project_root() / "params.yaml"), name, None) is None


def stage_arguments(function: Callable[..., None], name: str, params: Params) -> list[Any]:
    """The sections that a stage's signature names before `artifacts`; `params` is its own; a StageError if unknown."""
    sections = []
    for argument in list(inspect.signature(function).parameters)[:-1]:
        section = name if argument == "params" else argument
        if section not in Params.model_fields:
            raise StageError(f"tasks/{name}.py: {name}() asks for {section!r}, which is no section of params.yaml")
        sections.append(getattr(params, section))
    return sections


def read_metrics(name: str) -> dict[str, float]:
    """The numbers in the stage's metrics.json, nested ones as `outer.inner`; empty if the stage writes none."""
    path = stage_dir(name) / "metrics.json"
    if not path.is_file():
        return {}
    metrics = flatten(json.loads(path.read_text(encoding="utf-8")))
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def read_history(name: str) -> list[dict[str, float]]:
    """The stage's curves, a row per logged step; empty if it writes none."""
    rows = read_table(stage_dir(name) / "history.csv")
    return [{column: float(value) for column, value in row.items() if value} for row in rows]


def write_empty_outputs(name: str) -> None:
    """Write the outputs of a stage that is off, so that DVC finds what dvc.yaml promises: see `is_disabled`."""
    for path in dvc_stages.outputs(name):
        folder = path if not path.suffix else path.parent
        folder.mkdir(parents=True, exist_ok=True)
        file = path if path.suffix else path / DISABLED_MARKER
        file.write_text("{}\n" if path.suffix == ".json" else "", encoding="utf-8")


def _load_stage_function(name: str) -> Callable[..., None]:
    path = project_root() / "tasks" / f"{name}.py"
    if not path.is_file():
        raise StageError(f"there is no stage {name!r}: {path} does not exist")
    module = importlib.import_module(f"tasks.{name}")
    function: Callable[..., None] | None = getattr(module, name, None)
    if function is None:
        raise StageError(f"tasks/{name}.py must define the stage function {name}()")
    return function


def _flat_params(function: Callable[..., None], positional: list[Any]) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, value in zip(inspect.signature(function).parameters, positional, strict=False):
        plain = value.model_dump() if hasattr(value, "model_dump") else value
        values |= flatten(plain, "" if name == "params" else name)
    return values


def _check_code_unchanged(name: str, inputs: dvc_stages.Inputs) -> None:
    """Refuse code in memory that is older than the files that DVC has hashed: it would be recorded under their hash."""
    for path in inputs.code:
        if CODE_STATE_AT_IMPORT.get(path.resolve()) != _file_state(path):
            raise StageError(f"{path} was edited after this run began, so {name} would run its old version: run again")


def _check_inputs_unchanged(name: str, before: dvc_stages.Inputs) -> None:
    """Refuse inputs that changed meanwhile: DVC would record the outputs as made from the new ones."""
    if dvc_stages.stage_key(name) != before.key:
        raise StageError(
            f"parameters, code or data of {name} changed while it ran, so its outputs belong to neither version and "
            "were not recorded: run again"
        )
