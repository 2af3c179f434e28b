"""Who may reach the labelling page: host names, passwords, how often one may be tried, and sessions of labellers.

Passwords are generated, so that none is weak or used elsewhere. A session is a name and a fingerprint of the password's
hash, in a cookie signed with this project's secret.
"""

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tasks.labelling.store import LabelStore

__all__ = [
    "LOOPBACK", "HostCheck", "SignInLimits", "csrf", "csrf_valid", "current_user", "hash_password", "load_secret",
    "new_password", "sign_in", "verify",
]  # fmt: skip

LOOPBACK = ("127.0.0.1", "localhost", "::1")
WILDCARDS = ("0.0.0.0", "::")
"""Addresses to listen on that are no page's address."""

HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:@/\[\]]+))(?::\d*)?", re.ASCII | re.IGNORECASE)

REFUSED = "This page is not served under that name. Whoever runs it can allow it: rlhf label --allow-host NAME"

MAX_WRONG, WINDOW_SECONDS = 10, 60.0
"""Wrong passwords of one address, and of one name, before the next one has to wait."""

LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"
"""None that is mistaken for another when it is read aloud or typed on a phone."""

GROUPS, GROUP = 4, 4  # 16 of 31 letters: 79 bits
MAX_PASSWORD_LENGTH = 200

_hasher = PasswordHasher()

DUMMY_HASH = _hasher.hash(secrets.token_hex())
"""Checked where there is no such labeller, so that the response time gives nothing away."""


def new_password() -> str:
    """Generate a password like k7mf-q2xw-hp3t-9dya."""
    return "-".join("".join(secrets.choice(LETTERS) for _ in range(GROUP)) for _ in range(GROUPS))


def hash_password(password: str) -> str:
    """Return the hash that the database keeps (argon2id; RFC 9106, section 4, second recommended option)."""
    return _hasher.hash(password)


def verify(password: str, password_hash: str | None) -> bool:
    """Return whether the password is right; never for a labeller without one. Each call takes 64 MB for a moment."""
    try:
        return _hasher.verify(password_hash or DUMMY_HASH, password) and password_hash is not None
    except (VerificationError, InvalidHashError):
        return False


def load_secret(path: Path) -> str:
    """Return the key that signs cookies; it is generated once, and readable by its owner alone."""
    if not path.exists():
        draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another server was faster: its secret holds
            path.hardlink_to(draft)
        draft.unlink()
    return path.read_text(encoding="ascii")


def sign_in(request: Request, store: LabelStore, name: str, password: str) -> bool:
    """Begin a session of this labeller if the password is right; return whether it was."""
    password_hash = store.password_hash(name)
    valid = verify(password[:MAX_PASSWORD_LENGTH], password_hash)
    if valid and password_hash:
        request.session.clear()
        request.session.update(name=name, fingerprint=_password_fingerprint(password_hash))
    return valid


def current_user(request: Request, store: LabelStore) -> str | None:
    """Return the name of who is signed in; a new password ends the sessions begun with the old one."""
    name, fingerprint = request.session.get("name"), request.session.get("fingerprint", "")
    password_hash = store.password_hash(name) if name else None
    valid = password_hash and hmac.compare_digest(fingerprint, _password_fingerprint(password_hash))
    return name if valid else None


def csrf(request: Request) -> str:
    """Return the token that forms of this session carry, so that no other site can send one in its name."""
    return str(request.session.setdefault("csrf", secrets.token_urlsafe(16)))


def csrf_valid(request: Request, token: str) -> bool:
    """Return whether a form with this token is of this session."""
    return "csrf" in request.session and hmac.compare_digest(token.encode(), csrf(request).encode())


def _password_fingerprint(password_hash: str) -> str:
    return hashlib.sha256(password_hash.encode()).hexdigest()[:16]


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
