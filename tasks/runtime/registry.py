"""MLflow's model registry: which policy is the champion, and where each version came from.

The weights stay with DVC: a version names them by their md5, and `tasks.runtime.dvc_repo.restore` brings them back.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from tasks.core.errors import ConfigError
from tasks.runtime.mlflow_store import open_store

__all__ = [
    "CHAMPION", "MODEL", "Version", "champion", "find", "mark_deleted", "mark_refused", "register", "roll_back",
    "set_champion", "versions", "withdraw",
]  # fmt: skip

MODEL = "rlhf-policy"
CHAMPION, CHALLENGER = "champion", "challenger"

FORMER_CHAMPIONS_TAG = "former_champions"  # the model's: numbers of versions, the latest last; a rollback removes it

PROMOTED, WITHDRAWN = "promoted", "withdrawn"
DELETED = "deleted_feedback."  # and a user's pseudonym: a tag of versions that were trained on her feedback
DECISION_FIELDS = ("by", "at", "reason")  # of a decision's tags of a version: `promoted.by`, …


@dataclass(frozen=True)
class Version:
    """A registered policy; `weights` maps each folder of weights that it is made of, as `stage/folder`, to its md5."""

    number: int
    policy: str
    weights: Mapping[str, str]
    tags: Mapping[str, str]
    aliases: tuple[str, ...]
    registered: datetime

    @property
    def accepted(self) -> bool:
        """Whether the gate, and the person that it may have asked, let it pass."""
        return self.tags.get("accepted") == str(True)

    @property
    def withdrawal(self) -> str | None:
        """Record of the withdrawal: person, time and reason; None unless withdrawn since the last promotion."""
        if f"{WITHDRAWN}.by" not in self.tags:
            return None
        by, at, reason = (self.tags[f"{WITHDRAWN}.{field}"] for field in DECISION_FIELDS)
        return f"{by} withdrew it at {at}" + (f": {reason}" if reason else "")

    @property
    def deleted_users(self) -> Mapping[str, str]:
        """Pseudonyms of users whose feedback it was trained on, with the time when that was deleted."""
        return {key.removeprefix(DELETED): at for key, at in self.tags.items() if key.startswith(DELETED)}


def versions() -> list[Version]:
    """Every registered policy, the oldest first."""
    client, _ = open_store()
    models = client.search_registered_models(f"name = '{MODEL}'")
    aliases = models[0].aliases if models else {}
    found = [
        Version(
            number=int(item.version),
            policy=item.tags["policy"],
            weights=json.loads(item.tags["weights"]),
            tags=dict(item.tags),
            aliases=tuple(sorted(name for name, number in aliases.items() if int(number) == int(item.version))),
            registered=datetime.fromtimestamp(item.creation_timestamp / 1000, UTC),
        )
        for item in client.search_model_versions(f"name = '{MODEL}'")
        if "weights" in item.tags  # else its registration was cut off
    ]
    return sorted(found, key=lambda version: version.number)


def find(name: str) -> Version:
    """The version of this number or alias; a ConfigError with those that exist if there is none."""
    known = versions()
    for version in known:
        if name == str(version.number) or name in version.aliases:
            return version
    if not known:
        raise ConfigError("no policy is registered yet: `rlhf retrain` registers one")
    listed = ", ".join(" ".join([str(item.number), *(f"({alias})" for alias in item.aliases)]) for item in known)
    raise ConfigError(f"no version {name!r} of {MODEL}; there are {listed}")


def champion() -> Version | None:
    """The policy that is in use; None before the first promotion."""
    return next((version for version in versions() if CHAMPION in version.aliases), None)


def register(policy: str, weights: Mapping[str, str], tags: Mapping[str, str]) -> Version:
    """Register a version as the challenger; the one that has these weights already, if there is one."""
    from mlflow.exceptions import MlflowException

    client, experiment = open_store()
    with contextlib.suppress(MlflowException):  # it exists
        client.create_registered_model(MODEL, description="Policies that passed through the gate; weights are in DVC.")
    text = json.dumps(dict(weights), sort_keys=True)
    number = next((str(known.number) for known in versions() if known.tags["weights"] == text), None)
    if number is None:
        md5 = next(md5 for path, md5 in weights.items() if path.startswith(f"{policy}/"))
        models = client.search_logged_models([experiment], f"tags.`dvc.md5` = '{md5}'")
        model = models[0] if models else client.create_logged_model(experiment, policy, tags={"dvc.md5": md5})
        if not models:
            client.finalize_logged_model(model.model_id, "READY")
        created = client.create_model_version(
            MODEL, f"models:/{model.model_id}", run_id=model.source_run_id, model_id=model.model_id
        )
        number = str(created.version)
    _tag(number, {**tags, "policy": policy, "weights": text})
    client.set_registered_model_alias(MODEL, CHALLENGER, number)
    return find(number)


def mark_refused(version: Version, reason: str) -> None:
    """Mark a version that the gate had accepted as refused for this reason."""
    _tag(version.number, {"accepted": str(False), "reasons": reason})


def mark_deleted(version: Version, user: str) -> None:
    """Record that feedback of this user, which the version was trained on, has been deleted."""
    _tag(version.number, {f"{DELETED}{user}": datetime.now(UTC).isoformat(timespec="seconds")})


def set_champion(version: Version, *, by: str, reason: str = "") -> None:
    """Make this the policy in use: no challenger, nor withdrawn, any more; a ConfigError if it is in use already."""
    client, _ = open_store()
    former = champion()
    if former and former.number == version.number:
        raise ConfigError(f"version {version.number} is the champion already")
    if former:
        _set_former_champions([*_former_champions(), former.number])
    _tag(version.number, _decision(PROMOTED, by, reason))
    _set_champion_alias(version)
    if CHALLENGER in version.aliases:
        client.delete_registered_model_alias(MODEL, CHALLENGER)


def roll_back(*, by: str, reason: str = "") -> tuple[Version, Version]:
    """Put the former champion in use again; returns the version withdrawn and this. A ConfigError if there is none."""
    known = {version.number: version for version in versions()}
    withdrawn = _champion_in_use()
    former = [number for number in _former_champions() if number in known]  # others were deleted in MLflow
    while former and former[-1] == withdrawn.number:  # a promotion was cut off
        former.pop()
    if not former:
        raise ConfigError(
            f"no champion was before version {withdrawn.number}, so there is nothing to roll back to; `rlhf withdraw` "
            "takes it out of use and leaves no champion"
        )
    restored = known[former[-1]]
    _tag(withdrawn.number, _decision(WITHDRAWN, by, reason))
    _set_champion_alias(restored)
    _set_former_champions(former[:-1])
    return withdrawn, restored


def withdraw(*, by: str, reason: str = "") -> Version:
    """Take the champion out of use and leave none; a ConfigError if there is none."""
    client, _ = open_store()
    withdrawn = _champion_in_use()
    _tag(withdrawn.number, _decision(WITHDRAWN, by, reason))
    client.delete_registered_model_alias(MODEL, CHAMPION)
    return withdrawn


def _champion_in_use() -> Version:
    if version := champion():
        return version
    raise ConfigError("there is no champion: `rlhf models` lists what is registered, `rlhf promote` promotes")


def _set_champion_alias(version: Version) -> None:
    client, _ = open_store()
    client.set_registered_model_alias(MODEL, CHAMPION, str(version.number))
    for field in DECISION_FIELDS:
        if (key := f"{WITHDRAWN}.{field}") in version.tags:
            client.delete_model_version_tag(MODEL, str(version.number), key)


def _tag(number: int | str, tags: Mapping[str, str]) -> None:
    client, _ = open_store()
    for key, value in tags.items():
        client.set_model_version_tag(MODEL, str(number), key, value)


def _decision(verb: str, by: str, reason: str) -> dict[str, str]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {f"{verb}.by": by, f"{verb}.at": now, f"{verb}.reason": reason}


def _former_champions() -> list[int]:
    client, _ = open_store()
    return list(json.loads(client.get_registered_model(MODEL).tags.get(FORMER_CHAMPIONS_TAG, "[]")))


def _set_former_champions(numbers: list[int]) -> None:
    client, _ = open_store()
    client.set_registered_model_tag(MODEL, FORMER_CHAMPIONS_TAG, json.dumps(numbers))
