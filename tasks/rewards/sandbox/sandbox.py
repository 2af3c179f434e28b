"""Sandbox that runs programs against tests, many at once, in two isolated processes each."""

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
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from tasks.core.errors import ConfigError, DataError, TrainingError
from tasks.rewards.sandbox.bubblewrap import ENVIRONMENT, command
from tasks.rewards.sandbox.inside import codec, run_program, run_tests

if TYPE_CHECKING:
    from tasks.config.rules import CodeRule

__all__ = ["Job", "Sandbox", "SandboxResult", "Status"]

_MAX_MESSAGE_BYTES = 65536  # bytes of a result, and of a sandbox's error message
_MAX_PROGRAM_CHARACTERS = 1 << 20  # the processes hold a few copies of it within `memory_mb`
_EXIT_GRACE_SECONDS = 5.0  # seconds for a process that is known to be ending

# Exit codes of a process killed by SIGKILL (the hard limit) or SIGXCPU (the soft one), also by way of bubblewrap.
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


class Status(StrEnum):
    """Outcome of a program."""

    PASSED = "passed"
    FAILED = "failed"  # a test did not hold
    ERROR = "error"  # the program could not be loaded, lacks the function, raised something, or ended
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output_limit"  # it printed too much, or a result is too large
    REFUSED = "refused"  # no program, a result that is no plain data, or one that does not keep to calls and answers


@dataclass(frozen=True)
class SandboxResult:
    """Status, and a reason for people; programs can influence the reason, so no code may depend on it."""

    status: Status
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """A program that should define the function `name`, and tests that call it, as `name` or `candidate`."""

    program: str | None  # None: constants in its place, see `Sandbox.trivial_answers`
    tests: str
    name: str
    preamble: str = ""  # trusted code that runs before the tests: helpers that they use


class Sandbox:
    """Sandbox that runs programs under one set of limits."""

    def __init__(self, options: CodeRule) -> None:
        """Check that the isolation works on this machine.

        Raises:
            ConfigError: something is not installed, the kernel refuses, or the isolation fails.
        """
        self._options = options
        self._workers = options.workers or len(os.sched_getaffinity(0))
        if options.isolation == "bubblewrap":
            self._probe()

    def run(self, jobs: Sequence[Job]) -> list[SandboxResult]:
        """Run the jobs, one result per job; equal jobs run once.

        Raises:
            DataError: tests cannot be run, whatever the program is.
            TrainingError: a sandbox did not start.
        """
        unique = list(dict.fromkeys(jobs))
        with ThreadPoolExecutor(self._workers) as pool:
            results = dict(zip(unique, pool.map(self._run_job, unique), strict=True))
        return [results[job] for job in jobs]

    def trivial_answers(self, jobs: Sequence[Job]) -> list[str]:
        """Name what each job's tests accept as the answer to every call, of None, NaN, …; "" where it is nothing."""
        results = self.run([replace(job, program=None) for job in jobs])
        return [result.reason if result.status is Status.PASSED else "" for result in results]

    def _probe(self) -> None:
        """Run a program that tries forbidden operations and reports those that worked."""
        try:
            (result,) = self.run([Job(PROBE, "assert reached() == []", "reached")])
        except TrainingError as error:
            raise ConfigError(
                f"the sandbox does not work on this machine: {error}. bubblewrap needs user namespaces: `sysctl "
                "kernel.unprivileged_userns_clone=1`, on Ubuntu 24.04 also kernel.apparmor_restrict_unprivileged_userns"
                "=0; in Docker --security-opt seccomp=unconfined, in Kubernetes an unconfined seccomp profile. Or set "
                "isolation: unsafe_no_isolation"
            ) from error
        if result.status is not Status.PASSED:
            problem = f"{result.status} {result.reason}"
            raise ConfigError(f"the sandbox does not hold on this machine: {problem}; do not use it")

    def _run_job(self, job: Job) -> SandboxResult:
        if job.program is not None and len(job.program) > _MAX_PROGRAM_CHARACTERS:
            return SandboxResult(Status.REFUSED, f"a program of {len(job.program)} characters")
        with ExitStack() as stack:
            return _SandboxRun(job, self._options, stack).result()


class _SandboxRun:
    """One run of a program and its tests; both processes end when the stack unwinds."""

    def __init__(self, job: Job, options: CodeRule, stack: ExitStack) -> None:
        self._job, self._options, self._stack = job, options, stack
        self._deadline = time.monotonic() + options.wall_seconds
        self._output_bytes, self._captured_output = 0, b""
        self._folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        requests, answers, self._results, self._output = (_Pipe(stack) for _ in range(4))
        if job.program is not None:
            self._program = self._start_process(
                run_program, stdin=requests.read, stdout=answers.write, stderr=self._output.write
            )
        channel = requests.write.fileno(), answers.read.fileno()
        self._tests = self._start_process(
            run_tests, channel, stdin=self._job_file(), stdout=self._results.write, stderr=subprocess.PIPE
        )
        ends = requests.write, requests.read, answers.write, answers.read, self._results.write, self._output.write
        for file in ends:
            file.close()
        os.set_blocking(self._output.read.fileno(), False)

    def result(self) -> SandboxResult:
        """Wait for the result; what it raises, see `Sandbox.run`."""
        result = self._wait_for_result()
        self._read_output()
        if self._printed_too_much:
            return SandboxResult(Status.OUTPUT_LIMIT, f"more than {self._options.output_kb} KB printed")
        return result or SandboxResult(Status.TIMEOUT, f"no result within {self._options.wall_seconds:g} s")

    def _wait_for_result(self) -> SandboxResult | None:
        """Wait for the result of the tests; None where the time or output limit is reached before."""
        poll = select.poll()
        poll.register(self._results.read, select.POLLIN)
        poll.register(self._output.read, select.POLLIN)
        while (remaining := self._deadline - time.monotonic()) > 0 and not self._printed_too_much:
            ready = {descriptor for descriptor, _ in poll.poll(remaining * 1000)}
            if self._results.read.fileno() in ready:
                return self._read_result()
            if ready and not self._read_output():
                poll.unregister(self._output.read)
        return None

    @property
    def _printed_too_much(self) -> bool:
        return self._output_bytes > self._options.output_kb << 10

    def _read_output(self) -> bool:
        """Count printed bytes and keep the first ones; return whether more can come."""
        with suppress(BlockingIOError):
            while chunk := os.read(self._output.read.fileno(), 1 << 16):
                self._output_bytes += len(chunk)
                self._captured_output = (self._captured_output + chunk)[:_MAX_MESSAGE_BYTES]
            return False
        return True

    def _read_result(self) -> SandboxResult:
        text = codec.read_frame(self._results.read.fileno(), _MAX_MESSAGE_BYTES)
        if text is None:
            return self._result_from_tests_exit()
        message: Any = codec.decode(text)
        status, reason, _ = message
        if status == "broken":
            self._read_output()
            raise TrainingError(f"a sandbox did not start: {self._captured_output.decode(errors='replace').strip()}")
        if status == "invalid":
            raise DataError(
                f"the tests of {self._job.name} cannot judge any program: {reason}; got {self._job.tests[:200]!r}"
            )
        return self._result_from_exit() if status == "died" else SandboxResult(Status(status), reason)

    def _result_from_exit(self) -> SandboxResult:
        """Derive the result from the exit status of the program's process."""
        try:
            code = self._program.wait(_EXIT_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return SandboxResult(Status.REFUSED, "the program closed its channel")
        if code in _OUT_OF_CPU:
            return self._out_of_cpu("program")
        if code < 0 or code > 128:
            return SandboxResult(Status.ERROR, f"signal {-code if code < 0 else code - 128} ended the program")
        return SandboxResult(Status.ERROR, f"the program ended its process with status {code}")

    def _result_from_tests_exit(self) -> SandboxResult:
        """Derive the result from the exit status of the tests' process, which gave none."""
        try:
            _, stderr = self._tests.communicate(timeout=_EXIT_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return SandboxResult(Status.ERROR, "the tests' process closed its channel")
        if stderr:
            message = stderr.decode(errors="replace").strip()[:_MAX_MESSAGE_BYTES]
            raise TrainingError(f"a sandbox did not start: {message}")
        if self._tests.returncode in _OUT_OF_CPU:
            return self._out_of_cpu("tests")
        return SandboxResult(Status.ERROR, f"the tests' process ended with status {self._tests.returncode}")

    def _out_of_cpu(self, who: str) -> SandboxResult:
        return SandboxResult(Status.TIMEOUT, f"the {who} took more than {self._options.cpu_seconds} s of CPU time")

    def _job_file(self) -> IO[bytes]:
        """The job as a file: a pipe would have to be filled while its reader starts."""
        file = self._stack.enter_context(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
        job = asdict(self._job) | {"in_place": self._options.in_place}
        codec.write_frame(file.fileno(), codec.encode(job, 1 << 26))
        file.seek(0)
        return file

    def _start_process(self, module: ModuleType, pass_fds: Sequence[int] = (), **stdio: Any) -> subprocess.Popen[bytes]:
        arguments = command(module, self._options, *map(str, pass_fds))
        environment = ENVIRONMENT | {"HOME": self._folder, "TMPDIR": self._folder}
        process = subprocess.Popen(
            arguments, pass_fds=pass_fds, env=environment, cwd=self._folder, start_new_session=True, **stdio
        )
        self._stack.callback(_kill, process)
        return process


class _Pipe:
    """Pipe with both ends as files, which can be closed twice; descriptors can be reused by another thread."""

    def __init__(self, stack: ExitStack) -> None:
        read_fd, write_fd = os.pipe()
        self.read = stack.enter_context(open(read_fd, "rb", buffering=0))  # noqa: SIM115
        self.write = stack.enter_context(open(write_fd, "wb", buffering=0))  # noqa: SIM115


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its group; in a sandbox, the kernel then ends all others in its namespace."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr:
        process.stderr.close()
