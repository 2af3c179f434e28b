"""The MLflow store: where it is, its server's command, and opening it.

MLflow takes seconds to import, so it is imported when it is needed and not before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING

from tasks.core.errors import ConfigError
from tasks.core.paths import project_root, state_dir

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["EXPERIMENT_ID_VAR", "is_unavailable", "open_store", "server_command", "store_uri"]

EXPERIMENT = "rlhf"

EXPERIMENT_ID_VAR = "RLHF_EXPERIMENT_ID"
"""The experiment that a flow passes to its stages, since the server may be away when they begin."""

MLFLOW_ENV = {
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Files go through the server: the address under which it knows its store need not exist here.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def store_uri() -> str:
    """Where runs are kept: `$MLFLOW_TRACKING_URI`, else mlflow.db in the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root() / 'mlflow.db'}"


def server_command(port: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment of MLflow's server on loopback; one worker and no job runner make it start fast."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store_uri()]
    command += ["--artifacts-destination", str(project_root() / "mlartifacts")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return command, {**os.environ, **MLFLOW_ENV, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def open_store() -> tuple[MlflowClient, str]:
    """A client for the store, and the experiment, made on first use.

    Raises:
        ConfigError: the store cannot be opened.
    """
    for variable, value in MLFLOW_ENV.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints what it then raises
    from filelock import FileLock
    from mlflow import MlflowClient, set_tracking_uri
    from mlflow.exceptions import MlflowException

    uri = store_uri()
    # Files of a run are found by `runs:/…`, which MLflow resolves against its global URI.
    set_tracking_uri(uri)
    if known := os.environ.get(EXPERIMENT_ID_VAR):  # the flow has opened it, and the server may be away by now
        return MlflowClient(uri), known
    state_dir().mkdir(exist_ok=True)
    try:
        # Two processes that open a new store at once would both create its tables. And a local store makes a folder
        # `mlruns` in the working directory, used or not.
        with FileLock(state_dir() / "mlflow.lock"), contextlib.chdir(state_dir()):
            client = MlflowClient(uri)
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment:
                return client, str(experiment.experiment_id)
            folder = (project_root() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
            return client, client.create_experiment(EXPERIMENT, artifact_location=folder)
    except MlflowException as error:
        raise ConfigError(f"the MLflow store {uri} cannot be opened; check MLFLOW_TRACKING_URI: {error}") from error


def is_unavailable(error: Exception) -> bool:
    """Whether the error is that of a server that does not answer or is overloaded; never so for a local store."""
    from mlflow.exceptions import MlflowException

    if not store_uri().startswith("http"):
        return False
    if isinstance(error, MlflowException):
        status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
        return status >= 500 or error.error_code == "REQUEST_LIMIT_EXCEEDED"
    return isinstance(error, OSError)
