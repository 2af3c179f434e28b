"""Running programs against tests, many at once: a program and its tests are two processes, each behind walls."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import IO, Any

from tasks.core.errors import ConfigError, DataError, TrainingError
from tasks.core.sections.code_rule import CodeRule
from tasks.rewards.sandbox.inside import judge, serve, wire
from tasks.rewards.sandbox.jail import ENVIRONMENT, command
from tasks.rewards.sandbox.verdict import Status, Verdict

__all__ = ["Job", "Sandbox"]

_LEFT = 65536  # bytes of a verdict, and of a sandbox's own complaint
_PATIENCE = 5.0  # seconds for a process that is known to be ending

# A shell's and bubblewrap's way to say: killed by SIGKILL (the hard limit), by SIGXCPU (the soft one).
_OUT_OF_CPU = {128 + 9, 128 + 24, -9, -24}

PROBE = """
import os
def reached():
    found = [path for path in ("/etc/passwd", "/proc/1", "/home", "/root/.ssh", "/tmp") if os.path.exists(path)]
    for name, act in {"fork": os.fork, "kill": lambda: os.kill(1, 0), "write": lambda: open("/file", "w")}.items():
        try:
            act()
        except OSError:
            continue
        found.append(name)
    return found
"""


@dataclass(frozen=True)
class Job:
    """A program that should define the function `name`, and tests that call it, as `name` or `candidate`.

    `preamble` is trusted code that runs before the tests: helpers that they use.
    """

    program: str
    tests: str
    name: str
    preamble: str = ""


class Sandbox:
    """Runs programs under one set of limits."""

    def __init__(self, options: CodeRule) -> None:
        """See that the walls stand on this machine.

        Raises:
            ConfigError: something is not installed, the kernel refuses, or a wall does not hold.
        """
        self._options = options
        self._workers = options.workers or len(os.sched_getaffinity(0))
        if options.isolation == "bubblewrap":
            self._probe()

    def run(self, jobs: Sequence[Job]) -> list[Verdict]:
        """A verdict per job; equal jobs run once.

        Raises:
            DataError: tests cannot be run, whatever the program is.
            TrainingError: a sandbox did not start.
        """
        different = list(dict.fromkeys(jobs))
        with ThreadPoolExecutor(self._workers) as pool:
            verdicts = dict(zip(different, pool.map(self._judged, different), strict=True))
        return [verdicts[job] for job in jobs]

    def _probe(self) -> None:
        """Run a program that tries a few forbidden things and reports which it could do."""
        try:
            (verdict,) = self.run([Job(PROBE, "assert reached() == []", "reached")])
        except TrainingError as error:
            raise ConfigError(
                f"the sandbox does not work on this machine: {error}. bubblewrap needs user namespaces: `sysctl "
                "kernel.unprivileged_userns_clone=1`, on Ubuntu 24.04 also kernel.apparmor_restrict_unprivileged_userns"
                "=0; in Docker --security-opt seccomp=unconfined, in Kubernetes an unconfined seccomp profile. Or set "
                "isolation: none_i_accept_the_risk"
            ) from error
        if verdict.status is not Status.PASSED:
            raise ConfigError(
                f"the sandbox does not hold on this machine: {verdict.status} {verdict.reason}; do not use it"
            )

    def _judged(self, job: Job) -> Verdict:
        with ExitStack() as stack:
            return _Run(job, self._options, stack).verdict()


class _Run:
    """One program and its tests, from start to verdict; when the stack unwinds, both processes end."""

    def __init__(self, job: Job, options: CodeRule, stack: ExitStack) -> None:
        self._job, self._options, self._stack = job, options, stack
        self._deadline = time.monotonic() + options.wall_seconds
        self._printed, self._said = 0, b""
        self._folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        requests, answers, self._verdicts, self._output = (_Pipe(stack) for _ in range(4))
        self._program = self._process(serve, requests.end, answers.start, self._output.start)
        channel = (requests.start.fileno(), answers.end.fileno())
        self._tests = self._process(judge, self._description(), self._verdicts.start, subprocess.PIPE, channel)
        for file in (requests.start, requests.end, answers.start, answers.end):
            file.close()
        for pipe in (self._verdicts, self._output):
            pipe.start.close()
        os.set_blocking(self._output.end.fileno(), False)

    def verdict(self) -> Verdict:
        """Wait for it.

        Raises:
            DataError: the tests cannot be run, whatever the program is.
            TrainingError: a sandbox did not start.
        """
        verdict = self._awaited()
        self._read_output()
        if self._printed > self._options.output_kb << 10:
            return Verdict(Status.OUTPUT_LIMIT, f"more than {self._options.output_kb} KB printed")
        return verdict or Verdict(Status.TIMEOUT, f"no verdict within {self._options.wall_seconds:g} s")

    def _awaited(self) -> Verdict | None:
        """The verdict of the tests; None where time or room for output is up before."""
        poll = select.poll()
        poll.register(self._verdicts.end, select.POLLIN)
        poll.register(self._output.end, select.POLLIN)
        while (left := self._deadline - time.monotonic()) > 0 and self._printed <= self._options.output_kb << 10:
            ready = {descriptor for descriptor, _ in poll.poll(left * 1000)}
            if self._verdicts.end.fileno() in ready:
                return self._heard()
            if ready and not self._read_output():
                poll.unregister(self._output.end)
        return None

    def _read_output(self) -> bool:
        """Count what has been printed, keep its beginning; whether more can come."""
        with suppress(BlockingIOError):
            while part := os.read(self._output.end.fileno(), 1 << 16):
                self._printed += len(part)
                self._said = (self._said + part)[:_LEFT]
            return False
        return True

    def _heard(self) -> Verdict:
        text = wire.read_frame(self._verdicts.end.fileno(), _LEFT)
        if text is None:
            return self._tests_ended()
        said: Any = wire.decode(text)
        status, reason, _ = said
        if status == "broken":
            self._read_output()
            raise TrainingError(f"a sandbox did not start: {self._said.decode(errors='replace').strip()}")
        if status == "invalid":
            raise DataError(
                f"the tests of {self._job.name} cannot judge any program: {reason}; got {self._job.tests[:200]!r}"
            )
        return self._of_death() if status == "died" else Verdict(Status(status), reason)

    def _of_death(self) -> Verdict:
        """Why the program's process ended."""
        try:
            code = self._program.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            return Verdict(Status.REFUSED, "the program closed its channel")
        if code in _OUT_OF_CPU:
            return Verdict(Status.TIMEOUT, f"the program took more than {self._options.cpu_seconds} s of CPU time")
        if code < 0 or code > 128:
            return Verdict(Status.ERROR, f"signal {-code if code < 0 else code - 128} ended the program")
        return Verdict(Status.ERROR, f"the program ended its process with status {code}")

    def _tests_ended(self) -> Verdict:
        """Without a verdict: out of CPU time, or it never came to the tests."""
        _, complaint = self._tests.communicate(timeout=_PATIENCE)
        if complaint:
            raise TrainingError(f"a sandbox did not start: {complaint.decode(errors='replace').strip()[:_LEFT]}")
        if self._tests.returncode in _OUT_OF_CPU:
            return Verdict(Status.TIMEOUT, f"the tests took more than {self._options.cpu_seconds} s of CPU time")
        return Verdict(Status.ERROR, f"the tests' process ended with status {self._tests.returncode}")

    def _description(self) -> IO[bytes]:
        """The job as a file: a pipe would have to be filled while its reader starts."""
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 — closed by the stack
        self._stack.enter_context(file)
        job = asdict(self._job) | {"in_place": self._options.in_place}
        wire.write_frame(file.fileno(), wire.encode(job, 1 << 26))
        file.seek(0)
        return file

    def _process(
        self,
        module: ModuleType,
        stdin: IO[bytes],
        stdout: IO[bytes],
        stderr: IO[bytes] | int,
        passed: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        words = command(module, self._options, *map(str, passed))
        environment = ENVIRONMENT | {"HOME": self._folder, "TMPDIR": self._folder}
        process = subprocess.Popen(
            words, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=passed, env=environment, cwd=self._folder,
            start_new_session=True,
        )  # fmt: skip
        self._stack.callback(_end, process)
        return process


class _Pipe:
    """Both ends as files, which can be closed twice; descriptors cannot, for another thread may have got the number."""

    def __init__(self, stack: ExitStack) -> None:
        end, start = os.pipe()
        self.end, self.start = open(end, "rb", buffering=0), open(start, "wb", buffering=0)  # noqa: SIM115
        for file in (self.end, self.start):
            stack.enter_context(file)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its group; behind walls, the kernel then ends all that is left there."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr:
        process.stderr.close()
