"""Keys of clients, how often each may ask, and ids of answers that nobody can make up."""

import hashlib
import hmac
import json
import math
import os
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.core.errors import RLHFError

__all__ = ["Access", "AccessError"]

WINDOW_SECONDS = 60.0
RECORDED, UNRECORDED = "tr-", "no-"  # what ids of answers begin with; MLflow's of traces begin with the first
NONCE, MAC = 16, 16  # hexadecimal digits of an id


class AccessError(RLHFError):
    """A request without a valid key, or one too many; `status` is HTTP's, `wait` in seconds."""

    def __init__(self, message: str, status: int, wait: int = 0) -> None:
        super().__init__(message)
        self.status, self.wait = status, wait


class Access:
    """The file of keys, as hashes, and of the secret that signs ids; only its owner may read it."""

    def __init__(self, file: Path, per_minute: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._per_minute, self._clock = file, per_minute, clock
        self._times: dict[str, deque[float]] = defaultdict(deque)
        content = self._read()
        if "secret" not in content:
            content = {"secret": secrets.token_hex(32), "keys": {}}
            self._write(content)
        self._secret = content["secret"].encode()

    def add(self, name: str) -> str:
        """Make a key of this name, in place of the one that it had; only its hash is kept."""
        key, content = f"rlhf-{secrets.token_urlsafe(32)}", self._read()
        self._write(content | {"keys": content["keys"] | {name: hashlib.sha256(key.encode()).hexdigest()}})
        return key

    @property
    def names(self) -> list[str]:
        """Names of the keys."""
        return list(self._read()["keys"])

    def caller(self, authorization: str) -> str:
        """The name of the key in the header; an AccessError if there is none, or it asks too often.

        A key holds 256 random bits, so a fast hash keeps it.
        """
        digest = hashlib.sha256(authorization.removeprefix("Bearer ").encode()).hexdigest()
        known = self._read()["keys"]
        name = next((name for name, kept in known.items() if hmac.compare_digest(kept, digest)), None)
        if name is None:
            raise AccessError("no valid key: send `Authorization: Bearer KEY`", 401)
        times, now = self._times[name], self._clock()
        while times and times[0] <= now - WINDOW_SECONDS:
            times.popleft()
        if len(times) >= self._per_minute:
            wait = math.ceil(times[0] + WINDOW_SECONDS - now)
            raise AccessError(f"more than {self._per_minute} requests a minute: wait {wait} s", 429, wait)
        times.append(now)
        return name

    def new_id(self, *, recorded: bool) -> str:
        """A fresh id of an answer."""
        start = (RECORDED if recorded else UNRECORDED) + secrets.token_hex(NONCE // 2)
        return start + self._mac(start)

    def is_id(self, text: str) -> bool:
        """Whether the text is an id of ours."""
        return hmac.compare_digest(text[-MAC:].encode(), self._mac(text[:-MAC]).encode())

    def _mac(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), "sha256").hexdigest()[:MAC]

    def _read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}
        return content

    def _write(self, content: dict[str, Any]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        draft = self._file.with_suffix(f".{secrets.token_hex(4)}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(content, file, indent=2)
        draft.replace(self._file)
