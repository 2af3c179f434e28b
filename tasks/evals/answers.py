"""What a judge behind an endpoint has answered: kept one by one, so that no question is paid for twice."""

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
    """One line of the file; `id` is the hash of what was asked and of whom."""

    judge: dict[str, str]
    reply: Reply


class JudgeCache:
    """A file that only grows; a killed run has lost no answer but the one that it waited for."""

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            DataError: a line is no answer; it names the file and the line.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        complete_bytes = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, complete_bytes)  # a last line without its end is one that a killed run did not finish
        self._replies = {entry.id: entry.reply for entry in read_rows(path, CacheEntry)} if complete_bytes else {}

    def __contains__(self, key: str) -> bool:
        return key in self._replies

    def __getitem__(self, key: str) -> Reply:
        return self._replies[key]

    def add(self, key: str, judge_id: Mapping[str, str], reply: Reply) -> None:
        """Write it down before anything else is asked."""
        self._replies[key] = reply
        entry = CacheEntry(id=key, judge=dict(judge_id), reply=reply)
        with self._path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(entry.model_dump_json() + "\n")


def request_key(judge_id: Mapping[str, str], request: Mapping[str, object]) -> str:
    """The hash of a request as a whole and of who gets it."""
    return hashlib.sha256(json.dumps([judge_id, request], sort_keys=True).encode()).hexdigest()
