"""Cache on disk of the replies of a judge behind an endpoint, so that no request is paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from tasks.core.schema import Row, read_rows
from tasks.evals.pairwise import Reply

__all__ = ["JudgeCache", "request_key"]


class CacheEntry(Row):
    """One line of the file; `id` is the hash of the judge and the request."""

    judge: dict[str, str]
    reply: Reply


class JudgeCache:
    """Append-only file of replies; a killed run loses only the reply that it was waiting for."""

    def __init__(self, path: Path) -> None:
        """Read the replies in the file.

        Raises:
            DataError: a line is malformed; the message names the file and the line.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        complete_bytes = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, complete_bytes)  # drops an incomplete last line, which a killed run did not finish
        self._replies = {entry.id: entry.reply for entry in read_rows(path, CacheEntry)} if complete_bytes else {}

    def __contains__(self, key: str) -> bool:
        return key in self._replies

    def __getitem__(self, key: str) -> Reply:
        return self._replies[key]

    def add(self, key: str, judge_id: Mapping[str, str], reply: Reply) -> None:
        """Append the reply at once, before the next request."""
        self._replies[key] = reply
        entry = CacheEntry(id=key, judge=dict(judge_id), reply=reply)
        with self._path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(entry.model_dump_json() + "\n")


def request_key(judge_id: Mapping[str, str], request: Mapping[str, object]) -> str:
    """Hash of the judge and the complete request."""
    return hashlib.sha256(json.dumps([judge_id, request], sort_keys=True).encode()).hexdigest()
