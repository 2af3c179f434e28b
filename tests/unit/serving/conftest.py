"""A server of the two-layer model in this process, and what it would have recorded."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tasks.config.training import GenerationParams
from tasks.core.errors import ConfigError, StageError
from tasks.runtime.registry import Version
from tasks.serving.access import Access
from tasks.serving.app import Recording, create_app
from tasks.serving.engine import Engine
from tasks.serving.versions import Served, Versions
from tests.conftest import letter_tokenizer, tiny_model

GENERATION = GenerationParams(max_new_tokens=8, temperature=1.0)
VERSION = Version(1, "ppo", {}, {}, ("champion",), datetime.now(UTC))
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"


class MemoryJournal:
    """Keeps what a journal would; `full` refuses as a full one does."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, Mapping[str, Any], bool]] = []
        self.full, self.waiting, self.dropped = False, 0, 0

    def append(self, write: Callable[..., None], content: Mapping[str, Any], *, durable: bool) -> None:
        if self.full:
            raise StageError("the journal is full")
        self.rows.append((write.__name__, content, durable))

    def close(self) -> None:
        pass


class Server:
    """An application and the registry that it looks at."""

    def __init__(self, folder: Path, *, keys: bool = False, rate: int = 1000, canary: float | None = None) -> None:
        self.aliases = {"champion": 1, "challenger": 2}
        self.engines: dict[int, Engine] = {}
        self.broken: set[int] = set()
        self.journal, self.access = MemoryJournal(), Access(folder / "access.json", rate)
        share = None if canary is None else ("challenger", canary)
        self.versions = Versions("champion", share, find=self.find, load=self.load)
        self.recording, self.keys = Recording(), keys

    def find(self, name: str) -> Version:
        if name not in self.aliases:
            raise ConfigError(f"no version {name!r}")
        return replace(VERSION, number=self.aliases[name])

    def load(self, version: Version) -> Served:
        if version.number in self.broken:
            raise StageError(f"neither the DVC cache nor a DVC remote has version {version.number}")
        tokenizer = letter_tokenizer()
        tokenizer.chat_template = TEMPLATE
        self.engines[version.number] = Engine(tiny_model(version.number), tokenizer)
        return Served(version.number, self.engines[version.number], GENERATION)

    def app(self) -> FastAPI:
        return create_app(
            self.versions,
            self.journal,
            self.access,
            self.recording,
            keys=self.keys,
            refresh_seconds=60,  # type: ignore[arg-type]
        )

    def run(
        self, *requests: tuple[str, Mapping[str, Any]], headers: Mapping[str, str] | None = None
    ) -> list[httpx.Response]:
        """Load the versions and send these (path, body) at once; a GET where the body is empty."""

        async def send() -> list[httpx.Response]:
            await self.versions.refresh()
            transport = httpx.ASGITransport(self.app(), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
                calls = [client.post(path, json=body) if body else client.get(path) for path, body in requests]
                return await asyncio.gather(*calls)

        return asyncio.run(send())


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)
