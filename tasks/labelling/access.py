"""Who may reach the labelling page: under which host names it answers, and how often a password may be tried."""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["LOOPBACK", "WILDCARDS", "HostCheck", "SignInLimits"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
WILDCARDS = ("0.0.0.0", "::")
"""Addresses to listen on that are no page's address."""

HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:@/\[\]]+))(?::\d*)?", re.ASCII | re.IGNORECASE)

REFUSED = "This page is not served under that name. Whoever runs it can allow it: rlhf label --allow-host NAME"

MAX_WRONG, WINDOW_SECONDS = 10, 60.0
"""Wrong passwords of one address, and of one name, before the next one has to wait."""


class HostCheck:
    """Answer requests that name this page alone, so that a site whose name resolves to this machine reads nothing.

    The page's names are those of the loopback interface, the address that a connection came to, and `names`.
    """

    def __init__(self, app: ASGIApp, names: Collection[str] = ()) -> None:
        self._app = app
        self._names = {name.lower() for name in (*LOOPBACK, *names) if name not in WILDCARDS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            address = (scope.get("server") or ("",))[0].lower()
            found = Headers(scope=scope).getlist("host")
            if len(found) != 1 or _host_name(found[0]) not in self._names | {address}:
                return await PlainTextResponse(REFUSED, 400)(scope, receive, send)
        await self._app(scope, receive, send)


class SignInLimits:
    """Count wrong passwords by key; after MAX_WRONG of them within WINDOW_SECONDS the next one has to wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: dict[str, list[float]] = defaultdict(list)

    def seconds_to_wait(self, keys: Iterable[str]) -> float:
        """Return after how many seconds a password may be tried under all of these keys; 0: now."""
        now = self._clock()
        recent = {key: [at for at in times if at > now - WINDOW_SECONDS] for key, times in self._wrong.items()}
        self._wrong = defaultdict(list, {key: times for key, times in recent.items() if times})
        full = [self._wrong[key] for key in keys if len(self._wrong.get(key, ())) >= MAX_WRONG]
        return max((times[-MAX_WRONG] + WINDOW_SECONDS - now for times in full), default=0.0)

    def count_wrong(self, keys: Iterable[str]) -> None:
        """Count one wrong password under each of these keys."""
        for key in keys:
            self._wrong[key].append(self._clock())


def _host_name(header: str) -> str | None:
    """Return the name in a Host header in lower case, without brackets and port."""
    found = HOST.fullmatch(header.strip())
    return (found[1] or found[2]).lower() if found else None
