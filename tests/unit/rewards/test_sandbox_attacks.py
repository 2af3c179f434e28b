"""Attacks on the sandbox: none may pass its tests, reach anything outside, or leave anything behind."""

import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tasks.config.rules import CodeRule
from tasks.rewards.sandbox.sandbox import Job, Sandbox, SandboxResult, Status
from tests.support.attacks import ATTACKS, ENDLESS, UNISOLATED, Attack
from tests.support.swallowed import SWALLOWED
from tests.unit.rewards.conftest import sandbox_or_skip

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap on this machine")

ROOT = Path(__file__).resolve().parents[3]
SECRET = "the-secret-outside"

# One number of the command line that no other process on this machine has: what carries it is ours.
ANSWER_KB = 1000 + os.getpid() % 10_000
MARK = str(ANSWER_KB << 10)

LIMITS = {"cpu_seconds": 1, "wall_seconds": 20, "memory_mb": 200, "answer_kb": ANSWER_KB, "workers": 2}

Recorder = Callable[[str, object], None]


class Outside:
    """What a program could reach or harm: files, sockets, the environment, other processes."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        (folder / "secret.txt").write_text(SECRET)
        self._abstract = f"rlhf-{os.getpid()}-{folder.name}"
        self._doors = [stack.enter_context(socket.socket(family)) for family in (socket.AF_INET, *[socket.AF_UNIX] * 2)]
        self._letters = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        for door, address in zip(self._doors, (("127.0.0.1", 0), f"{folder}/door", f"\0{self._abstract}"), strict=True):
            door.bind(address)
            door.listen()
        self._letters.bind(self._doors[0].getsockname())
        for door in (*self._doors, self._letters):
            door.setblocking(False)
        self._files = self._seen()

    def fill_placeholders(self, program: str) -> str:
        names = {
            "PORT": str(self._doors[0].getsockname()[1]), "UNIX": f"{self._folder}/door", "ABSTRACT": self._abstract,
            "FOLDER": str(self._folder), "SECRET": SECRET, "HOME": str(Path.home()), "REPOSITORY": str(ROOT),
        }  # fmt: skip
        for name, value in names.items():
            program = program.replace(f"@{name}@", value)
        return program

    def harm(self) -> str:
        """What has happened outside, in words."""
        found = [f"{door.getsockname()!r} was reached" for door in self._doors if _got(door.accept)]
        found += ["a datagram came"] if _got(lambda: self._letters.recv(99)) else []
        found += ["files changed"] if self._seen() != self._files else []
        return ", ".join(found + _left_over())

    def _seen(self) -> dict[str, int]:
        cores = [path for path in (*Path.cwd().glob("core*"), *ROOT.glob("core*")) if path.is_file()]
        return {str(path): path.stat().st_size for path in [*self._folder.iterdir(), *cores]}


def _got(receive: Callable[[], object]) -> bool:
    with suppress(BlockingIOError):
        found = receive()
        if isinstance(found, tuple):
            found[0].close()
        return True
    return False


def _left_over() -> list[str]:
    """Our sandboxes that still run; the kernel may need a moment to end a killed process."""
    for _ in range(20):
        lines = {process.pid: process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])}
        found = [pid for pid, line in lines.items() if MARK in line and pid != os.getpid()]
        if not found:
            return []
        time.sleep(0.1)
    return [f"{len(found)} processes were left"]


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_TEST_SECRET", SECRET)
        yield Outside(tmp_path_factory.mktemp("outside"), stack)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_or_skip(CodeRule(**LIMITS))


@pytest.fixture(scope="module")
def endless(sandbox: Sandbox, outside: Outside) -> dict[Attack, SandboxResult]:
    """Results of endless programs, all at once: each waits for its limit, not for the others'."""
    limits = LIMITS | {"wall_seconds": 4, "workers": len(ENDLESS)}
    results = Sandbox(CodeRule(**limits)).run([_job(attack, outside) for attack in ENDLESS])
    return dict(zip(ENDLESS, results, strict=True))


def _job(attack: Attack, outside: Outside) -> Job:
    return Job(outside.fill_placeholders(attack.program), attack.tests, "answer")


def _check(attack: Attack, result: SandboxResult, outside: Outside, record_property: Recorder) -> None:
    harm = outside.harm()
    won = ", ".join(["the reward"] * (result.status is Status.PASSED) + [harm] * bool(harm))
    happened = f"{result.status}: {result.reason}" if result.reason else str(result.status)
    record_property("attack", (attack.name, happened, won))
    assert not won, f"{attack.name} got {won}"
    assert result.status in attack.statuses, happened


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_gets_nothing(attack: Attack, sandbox: Sandbox, outside: Outside, record_property: Recorder) -> None:
    if attack.name.startswith(("system call", "32-bit")) and platform.machine() != "x86_64":
        pytest.skip("numbers of x86-64")
    (result,) = sandbox.run([_job(attack, outside)])
    _check(attack, result, outside, record_property)


def test_tests_that_swallow_exceptions_pass_a_right_program(sandbox: Sandbox) -> None:
    """Else the attacks on them would show nothing."""
    jobs = [Job("def answer(x): return 18 * x + 17", tests, "answer") for _, tests in SWALLOWED.values()]
    assert dict(zip(SWALLOWED, sandbox.run(jobs), strict=True)) == dict.fromkeys(
        SWALLOWED, SandboxResult(Status.PASSED)
    )


@pytest.mark.parametrize("attack", ENDLESS, ids=lambda attack: attack.name)
def test_endless_programs_are_ended(
    attack: Attack, endless: dict[Attack, SandboxResult], outside: Outside, record_property: Recorder
) -> None:
    patient = replace(attack, statuses=(*attack.statuses, "timeout"))  # on a busy machine that limit may come first
    _check(patient, endless[attack], outside, record_property)


@pytest.mark.parametrize("name", UNISOLATED)
def test_without_isolation_the_same_attack_succeeds(name: str, tmp_path: Path) -> None:
    """The control: what the suite calls harmless would be seen if it were not."""
    unisolated = Sandbox(CodeRule(**LIMITS, isolation="unsafe_no_isolation"))
    (attack,) = (attack for attack in ATTACKS if attack.name == name)
    with ExitStack() as stack:
        outside = Outside(tmp_path, stack)
        (result,) = unisolated.run([_job(attack, outside)])
        assert result.status is Status.PASSED
        assert bool(outside.harm()) == name.startswith(("network", "write"))


def test_a_program_finds_nothing_of_the_one_before(sandbox: Sandbox) -> None:
    program = "import os\ndef answer():\n    found = os.listdir()\n    open('mine', 'w')\n    return found"
    jobs = [Job(program, f"assert answer() == []\n# {number}", "answer") for number in range(4)]
    assert [result.status for result in sandbox.run(jobs)] == [Status.PASSED] * 4
