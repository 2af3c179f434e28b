"""The DVC project: opening it, loading a stage, its data in cache and remote, and its errors in plain words."""

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dvc.config import ConfigError as DvcConfigError
from dvc.config import RemoteConfigError
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.repo import Repo
from dvc.scm import SCMError
from dvc.stage.exceptions import StageNotFound
from dvc.utils.serialize import ParseError
from dvc.utils.strictyaml import YAMLValidationError
from dvc_data.hashfile import load
from dvc_data.hashfile.checkout import checkout
from dvc_data.hashfile.hash_info import HashInfo
from dvc_objects.errors import ObjectFormatError
from dvc_objects.fs import localfs

from tasks.core.errors import StageError, describe_disk_error
from tasks.core.paths import project_root

__all__ = [
    "check_remote", "data_md5", "describe_error", "dvc_errors", "error_chain", "load_stage", "locked", "open_repo",
    "pull_data", "push", "quiet_logger", "remote_error", "restore", "unused_objects", "use_cache",
]  # fmt: skip

DATA = "data"
"""The folder of what users bring along; what else enters the pipeline is named in params.yaml."""


def open_repo() -> Repo:
    """The DVC project of the working directory; it takes no lock."""
    quiet_logger()
    return Repo(str(project_root()))


@contextmanager
def locked(worktrees: Sequence[Path]) -> Iterator[None]:
    """Hold DVC's lock of the project and of these other working copies; a StageError where one is held for long."""
    with ExitStack() as held:
        for folder in (project_root(), *worktrees):
            with dvc_errors(str(folder)):
                held.enter_context(Repo(str(folder)).lock)
        yield


def load_stage(repo: Any, name: str) -> Any:
    """A stage of dvc.yaml, as DVC has loaded it; a StageError if there is none of this name."""
    try:
        return repo.stage.load_one(str(project_root() / "dvc.yaml"), name)
    except StageNotFound as error:
        known = ", ".join(stage.addressing for stage in repo.index.stages)
        raise StageError(f"dvc.yaml has no stage {name!r}; its stages are {known}") from error


@contextmanager
def dvc_errors(where: str) -> Iterator[None]:
    """Convert errors of DVC to a StageError that names the place."""
    try:
        yield
    except DvcException as error:
        raise StageError(_describe_project_error(error) or f"{where}: {describe_error(error)}") from error


def _describe_project_error(error: DvcException) -> str | None:
    """What is wrong with the project's own files for DVC, and the cure; None if it is something else."""
    root = project_root()
    match error:
        case NotDvcRepoError():
            return f"{root / '.dvc'} is missing: `git checkout .dvc`; where git does not have it either, `dvc init`"
        case DvcConfigError() if not isinstance(error, RemoteConfigError):
            return f"{root / '.dvc' / 'config'} or config.local beside it: {error}; mend it, or `git checkout .dvc`"
        case SCMError() if not (root / ".git").exists():
            return f"{root} is no git repository, which DVC needs: `git init` and commit, or `git clone` the project"
        case YAMLValidationError(path=path) | ParseError(path=path):
            name, reason = Path(path).name, " ".join(str(list(error_chain(error))[-1]).split())
            cure = f"`git checkout {name}`"
            if name == "dvc.lock":
                cure += ", or delete it: `rlhf run` writes it again, with what the cache still has"
            return f"{root / name} is damaged: {reason}; {cure}"
    return None


@contextmanager
def _remote_errors(what: str) -> Iterator[None]:
    """Convert errors of a DVC remote's library: see `remote_error`."""
    try:
        yield
    except (DvcException, StageError):
        raise
    except Exception as error:
        raise remote_error(what, error) from error


def remote_error(what: str, error: Exception) -> StageError:
    """The StageError for an error of a remote's own library; `what`: read or written."""
    missing = re.search("requires '(dvc-[a-z0-9]+)'", str(error))
    cure = f"; pip install {missing[1]}" if missing else ""
    return StageError(f"the DVC remote cannot be {what}: {type(error).__name__}: {error}{cure}")


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, the origin last."""
    yield error
    if error.__cause__:
        yield from error_chain(error.__cause__)


def describe_error(error: BaseException) -> str:
    """The origin of an error of DVC, in words that say what to do."""
    last = list(error_chain(error))[-1]
    if problem := describe_disk_error(error):
        return f"its outputs were not recorded: {problem}"
    if isinstance(last, FileNotFoundError) and last.filename:
        return f"{last.filename} does not exist; if the DVC remote has it, `rlhf run --pull` fetches it"
    return str(last)


def quiet_logger() -> None:
    """Let DVC print warnings and errors only, and those once: it has handlers of its own beside the root logger's."""
    for name in ("dvc", "dvc_data", "dvc_objects"):
        logging.getLogger(name).propagate = False
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("dvc.output").addFilter(_hide_empty_output_warning)


def data_md5() -> str | None:
    """The md5 of the folder `data`, as DVC hashes it; None where no stage reads one."""
    with dvc_errors("data"):
        deps = [dep for stage in open_repo().index.stages for dep in stage.deps if str(dep) == DATA and dep.exists]
        return str(deps[0].get_hash().value) if deps else None


def check_remote() -> None:
    """Raise a StageError if there is no DVC remote: DVC only warns when a stage fetches from none."""
    with dvc_errors("--pull"):
        open_repo().cloud.get_remote(command="pull")


def pull_data() -> None:
    """Fetch missing data that `dvc add` tracks, from the cache or the DVC remote; a StageError if neither has it."""
    with dvc_errors("data"):
        repo = open_repo()
        sources = [stage for stage in repo.index.stages if stage.is_data_source]
        if missing := [stage.addressing for stage in sources if not all(out.exists for out in stage.outs)]:
            with _remote_errors("read"):
                repo.pull(targets=missing)


def push(name: str | None = None) -> int:
    """Send a stage's outputs, or all, and the run-cache to the remote, else a StageError; how many files went."""
    with dvc_errors(name or "push"), _remote_errors("written"):
        return int(open_repo().push(targets=[name] if name else None, run_cache=True))


def restore(md5: str, path: Path) -> None:
    """Write what has this md5 (`….dir`: a folder), from the cache or the DVC remote; a StageError if neither has it."""
    with dvc_errors(str(path)):
        repo = open_repo()
        cache, digest = repo.cache.local, HashInfo("md5", md5)
        try:
            found = load(cache, digest)
            parts = [info.value for _, _, info in found] if digest.isdir else [md5]
            if not all(cache.exists(part) for part in parts):
                raise FileNotFoundError(md5)
        except (FileNotFoundError, ObjectFormatError):
            try:
                repo.cloud.pull([digest])
                found = load(cache, digest)
            except Exception as error:
                raise StageError(f"neither the DVC cache nor a DVC remote has {md5}, wanted for {path}") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        checkout(str(path), localfs, found, cache, force=True, quiet=True)


def unused_objects(keep: Collection[str], worktrees: Sequence[Path]) -> list[Path]:
    """Files of the cache that neither the workspace, a branch, a tag, a worktree nor an md5 of `keep` refers to.

    Call it, and free them, while `locked`. A cache outside of the project may serve others, so nothing in it counts as
    unused.
    """
    with dvc_errors("cache"):
        repo = open_repo()
        if not Path(repo.cache.local_cache_dir).resolve().is_relative_to(project_root().resolve()):
            return []
        used = set(keep)
        logging.getLogger("dvc.output").setLevel(logging.ERROR)  # it warns of stages that have not run yet
        # force: go on where a branch has a folder that was never here
        found = [repo.used_objs(all_branches=True, all_tags=True, all_experiments=True, force=True)]
        found += [Repo(str(tree)).used_objs(force=True) for tree in worktrees]
        used |= {info.value for objects in found for infos in objects.values() for info in infos}
        unused: list[Path] = []
        for cache in {id(odb): odb for _, odb in repo.cache.by_scheme() if odb}.values():
            parts = {info.value for md5 in used if md5.endswith(".dir") for info in _parts(cache, md5)}
            named = used | parts
            unused += [Path(cache.oid_to_path(oid)) for oid in cache.all() if oid not in named]
        return unused


def _parts(cache: Any, md5: str) -> list[HashInfo]:
    """What a folder in the cache is made of; empty where the cache does not have it."""
    try:
        return [info for _, _, info in load(cache, HashInfo("md5", md5))]
    except (FileNotFoundError, ObjectFormatError):
        return []


def use_cache(folder: Path, *, shared: bool) -> None:
    """Let another working copy of this project use this one's cache, or one of its own, whatever its settings say."""
    with dvc_errors(str(folder)):
        cache = open_repo().cache.local_cache_dir if shared else folder / ".dvc" / "cache"
        with Repo(str(folder)).config.edit("local") as config:
            config["cache"]["dir"] = str(cache)


def _hide_empty_output_warning(record: logging.LogRecord) -> bool:
    """Filter: an output may be empty, since no row was malformed or the stage is off."""
    return not record.getMessage().endswith("is empty.")
