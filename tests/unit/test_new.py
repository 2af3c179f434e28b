"""`rlhf new`: what stands in the folder, that its example rows are enough for its settings, and what it refuses."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows import new
from flows.cli.console import enter_project
from flows.cli.main import app
from tasks.collect import collect
from tasks.config.params import load_params
from tasks.core.errors import ConfigError
from tasks.core.paths import Artifacts
from tasks.data.fit import find_misfits
from tasks.prepare import prepare
from tasks.runtime.dvc_stages import graph
from tests.conftest import ROOT, SHIPPED_PARAMS
from tests.support.tokenizers import write_tokenizer


@pytest.fixture(autouse=True)
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package: the code, and the template with the shipped parameters."""
    source = tmp_path / "site-packages" / "flows" / "template"
    for name in (*new.COPIED, new.STARTS):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    shutil.copy(SHIPPED_PARAMS, source)
    (tmp_path / "site-packages" / "tasks").mkdir()
    for module in ("flows.installed", "flows.new", "flows.cli.console"):
        monkeypatch.setattr(f"{module}.INSTALLED", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_default_is_a_clone_without_its_code(tmp_path: Path) -> None:
    new.new_project(tmp_path / "demo", "film")
    for name in ("dvc.yaml", ".dvc/config", ".dvcignore", "infra/presets/tiny.jsonl"):
        assert (tmp_path / "demo" / name).read_bytes() == (ROOT / name).read_bytes()
    assert load_params(tmp_path / "demo" / "params.yaml") == load_params(SHIPPED_PARAMS)
    tracked = git(tmp_path / "demo", "ls-files").split()
    assert {"params.yaml", "dvc.yaml", ".dvc/config", "README.md", "custom/rewards/example.py"} <= set(tracked)
    assert not [name for name in tracked if name.startswith(("tasks", "flows", "infra/new"))]
    versions = (tmp_path / "demo" / "requirements.lock").read_text().splitlines()
    assert not [line for line in versions if line.startswith("rlhf")], "an upgrade would make every stage stale"
    assert [line for line in versions if line.startswith("torch==")]


@pytest.mark.parametrize("start", ["pairs", "answers", "conversation"])
def test_the_example_rows_are_enough_for_the_settings(start: str, tmp_path: Path) -> None:
    new.new_project(tmp_path / "demo", start)
    demo = tmp_path / "demo"
    with new.as_project_root(demo):
        params = load_params(demo / "params.yaml")
        collect(params.collect, params.seed, Artifacts(out=tmp_path / "collect"))
        read = Artifacts(base_model=base_model(tmp_path), collect=tmp_path / "collect", out=tmp_path / "prepare")
        prepare(params.prepare, params.seed, read)
        found = find_misfits(params, tmp_path / "base_model", tmp_path / "prepare")
    assert [str(item) for item in found if item.blocks] == []
    assert (tmp_path / "prepare" / "quarantine.jsonl").read_text() == ""


def base_model(folder: Path) -> Path:
    """A tokenizer, and the card of a model as deep as the default one."""
    written = write_tokenizer(folder / "base_model")
    card = {"layers": 30, "context": 8192, "linear_modules": ["q_proj", "v_proj"]}
    (written / "card.json").write_text(json.dumps(card))
    return written


def test_each_command_links_the_code_of_its_own_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new.new_project(tmp_path / "demo", "film")
    link = tmp_path / "demo" / "tasks"
    assert link.readlink() == tmp_path / "site-packages" / "tasks"
    monkeypatch.setattr("flows.processes.use_writable_home", lambda: None)
    monkeypatch.setattr("tasks.runtime.mlflow_runs.close_abandoned_runs", lambda: None)
    for remove in (True, False):
        if remove:  # as after `git clone`
            link.unlink()
        else:  # as after a move to another environment
            link.unlink()
            link.symlink_to(tmp_path / "gone")
        monkeypatch.chdir(tmp_path / "demo")
        assert enter_project() == tmp_path / "demo"
        assert link.readlink() == tmp_path / "site-packages" / "tasks"


def test_a_clone_keeps_its_code_and_a_strange_folder_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, folder in (("clone", "custom"), ("clone", "tasks"), ("strange", "data")):
        (tmp_path / name / folder).mkdir(parents=True)
        (tmp_path / name / "dvc.yaml").touch()
        monkeypatch.chdir(tmp_path / name)
        if folder != "custom":
            with pytest.raises(ConfigError, match="but the project here is"):
                enter_project()
    for folder, name in itertools.product(("clone", "strange"), ("tasks", "flows")):
        assert not (tmp_path / folder / name).is_symlink()


@pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # DVC 3.67 with pygtrie 2.6
def test_an_environment_inside_the_project_adds_no_stages(tmp_path: Path) -> None:
    new.new_project(tmp_path / "demo", "film")
    own = tmp_path / "demo" / "venv" / "lib" / "python3.11" / "site-packages" / "flows" / "template"
    own.mkdir(parents=True)
    shutil.copy(ROOT / "dvc.yaml", own)
    with new.as_project_root(tmp_path / "demo"):
        assert set(graph()) == set(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])


def test_a_clone_of_the_project_has_every_folder_that_stages_read_though_the_examples_are_deleted(
    tmp_path: Path,
) -> None:
    new.new_project(tmp_path / "demo", "film")
    for example in (tmp_path / "demo" / "custom").glob("*/example.py"):
        example.unlink()
    tracked = git(tmp_path / "demo", "ls-files", "custom").split()
    deleted = git(tmp_path / "demo", "ls-files", "--deleted", "custom").split()
    kept = {Path(name).parent.name for name in set(tracked) - set(deleted)}
    assert kept >= {"rewards", "judges", "readers", "environments"}


def test_nothing_is_left_of_a_project_that_could_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ConfigError("params.yaml is wrong")

    monkeypatch.setattr(new, "write_overrides", fail)
    with pytest.raises(ConfigError, match="is wrong"):
        new.new_project(tmp_path / "demo", "film")
    assert not (tmp_path / "demo").exists()


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(ConfigError, match=f"{name} exists and is not empty: name a new folder"):
            new.new_project(tmp_path / name, "film")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    unknown = CliRunner().invoke(app, ["new", str(tmp_path / "demo"), "--from", "songs"])
    assert unknown.exit_code == 2
    assert "'songs' is not one of 'film', 'pairs', 'answers'" in " ".join(unknown.output.replace("│", "").split())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="`git` is missing"):
        new.new_project(tmp_path / "demo", "film")
    assert not (tmp_path / "demo").exists()
