"""MLflow's model registry: which policy is the champion, and where each version came from.

The weights stay with DVC: a version names them by their md5, and `tasks.core.versioning.restore` brings them back.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from tasks.core.recording import open_store

__all__ = ["CHALLENGER", "CHAMPION", "MODEL", "Version", "champion", "register", "set_champion"]

MODEL = "rlhf-policy"
CHAMPION, CHALLENGER = "champion", "challenger"


@dataclass(frozen=True)
class Version:
    """A registered policy; `weights` maps each folder of weights that it is made of, as `stage/folder`, to its md5."""

    number: int
    policy: str
    weights: Mapping[str, str]
    tags: Mapping[str, str]


def champion() -> Version | None:
    """The policy that is in use; None before the first promotion."""
    from mlflow.exceptions import MlflowException

    client, _ = open_store()
    try:
        found = client.get_model_version_by_alias(MODEL, CHAMPION)
    except MlflowException:
        return None
    return _version(found.version, found.tags)


def register(policy: str, weights: Mapping[str, str], tags: Mapping[str, str]) -> Version:
    """A new version, which becomes the challenger; the one that has these weights already, if there is one."""
    from mlflow.exceptions import MlflowException

    client, experiment = open_store()
    with contextlib.suppress(MlflowException):  # it exists
        client.create_registered_model(MODEL, description="Policies that passed through the gate; weights are in DVC.")
    text = json.dumps(dict(weights), sort_keys=True)
    for known in client.search_model_versions(f"name = '{MODEL}'"):
        if known.tags.get("weights") == text:
            number = known.version
            break
    else:
        md5 = next(md5 for path, md5 in weights.items() if path.startswith(f"{policy}/"))
        models = client.search_logged_models([experiment], f"tags.`dvc.md5` = '{md5}'")
        model = models[0] if models else client.create_logged_model(experiment, policy, tags={"dvc.md5": md5})
        if not models:
            client.finalize_logged_model(model.model_id, "READY")
        made = client.create_model_version(
            MODEL, f"models:/{model.model_id}", run_id=model.source_run_id, model_id=model.model_id
        )
        number = made.version
    for key, value in {"policy": policy, "weights": text, **tags}.items():
        client.set_model_version_tag(MODEL, number, key, value)
    client.set_registered_model_alias(MODEL, CHALLENGER, number)
    return _version(number, {"policy": policy, "weights": text, **tags})


def set_champion(version: Version) -> None:
    """From now on this is the policy in use; it is no challenger any more."""
    client, _ = open_store()
    client.set_registered_model_alias(MODEL, CHAMPION, str(version.number))
    client.delete_registered_model_alias(MODEL, CHALLENGER)


def _version(number: str | int, tags: Mapping[str, str]) -> Version:
    return Version(int(number), tags["policy"], json.loads(tags["weights"]), dict(tags))
