"""A vLLM server: requests to it over HTTP, and a server of this process's own, which ends with it.

vLLM needs other versions of libraries than the trainer, so it lives in an environment of its own (`make vllm`) and is
reached over HTTP alone. The server holds the base model; policies are adapters that are loaded while it runs.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import httpx

from tasks.core.errors import ConfigError, SourceError
from tasks.core.paths import project_root
from tasks.core.terminal import print_line, tail

__all__ = ["OwnServer", "VLLMServer"]

PROGRAM = Path(".venv-vllm/bin/vllm")
"""In the project's folder, unless $RLHF_VLLM names another."""

START_SECONDS, STOP_SECONDS, GRACE_SECONDS, SHOW_SECONDS = 900.0, 30.0, 5.0, 30.0
REQUEST_SECONDS = 600.0
PDEATHSIG = 1  # prctl(2)

ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


class VLLMServer:
    """A server that runs already, or is about to; requests may come from several threads."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = httpx.Client(timeout=REQUEST_SECONDS, limits=httpx.Limits(max_connections=None))

    def post(self, path: str, content: Mapping[str, Any]) -> Any:
        """Send a request, and return the answer: JSON, or a text.

        Raises:
            SourceError: the server does not answer, or refuses.
        """
        try:
            answer = self._client.post(self.url + path, json=content)
        except httpx.HTTPError as error:
            raise SourceError(f"the vLLM server at {self.url} does not answer ({error}): is it running?") from error
        if answer.is_error:
            status, reason = answer.status_code, answer.text[:300]
            raise SourceError(f"the vLLM server at {self.url} refuses {path} (HTTP {status}): {reason}")
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            return self._client.get(f"{self.url}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def restart(self) -> bool:
        """Start it anew where it has ended, and is ours to start; whether it was."""
        return False

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


class OwnServer(VLLMServer):
    """A server of this process: on a free port of loopback, with its output in a log file.

    It ends with `close`, and with this process however that ends. `$RLHF_VLLM_ARGS` are further arguments, such as
    `--gpu-memory-utilization 0.4`.
    """

    def __init__(self, model: Path, *, dtype: str, max_lora_rank: int, log: Path) -> None:
        """Start it, and wait until it answers.

        Raises:
            ConfigError: vLLM is not installed.
            SourceError: the server ended before it answered, or took too long.
        """
        super().__init__(f"http://127.0.0.1:{_free_port()}")
        program = Path(os.environ.get("RLHF_VLLM") or project_root() / PROGRAM)
        if not program.is_file():
            raise ConfigError(
                f"rollout.engine is vllm, and there is no {program}: `make vllm` installs it; or name the program in "
                "$RLHF_VLLM, or servers that run in $RLHF_ROLLOUT_URLS"
            )
        port = self.url.rpartition(":")[2]
        self._command = [
            str(program), "serve", str(model), "--host", "127.0.0.1", "--port", port, "--dtype", dtype,
            "--enable-lora", "--max-lora-rank", str(max_lora_rank), "--max-loras", "2",
            "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
            *shlex.split(os.environ.get("RLHF_VLLM_ARGS", "")),
        ]  # fmt: skip
        self._log = log
        self._start()

    def restart(self) -> bool:
        """See `VLLMServer.restart`."""
        try:
            self._process.wait(GRACE_SECONDS)  # it ends a moment after its engine
        except subprocess.TimeoutExpired:
            return False
        print_line(f"the vLLM server has ended, and is started again; {tail(self._log)}")
        self._end()  # what it has left behind: engine and workers are processes of their own
        self._start()
        return True

    def close(self) -> None:
        """End the server and all of its processes."""
        super().close()
        self._end()

    def _end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(STOP_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = _spawn(self._command, log)
        started = shown = time.monotonic()
        try:
            while not self.is_up():
                if (status := self._process.poll()) is not None:
                    raise SourceError(f"the vLLM server ended with status {status}; {tail(self._log)}")
                now = time.monotonic()
                if now - started > START_SECONDS:
                    raise SourceError(f"the vLLM server does not answer after {START_SECONDS:.0f} s; {tail(self._log)}")
                if now - shown > SHOW_SECONDS:
                    shown = now
                    print_line(f"the vLLM server starts, {now - started:.0f} s so far (log: {self._log})")
                time.sleep(0.5)
        except BaseException:
            self.close()
            raise


def _spawn(command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)
    return subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True, preexec_fn=lambda: libc.prctl(PDEATHSIG, signal.SIGTERM),
    )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
