"""Passwords and sessions of labellers.

Passwords are generated, so that none is weak or used elsewhere. A session is a name and a fingerprint of the password's
hash, in a cookie signed with this project's secret.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from starlette.requests import Request

from tasks.labelling.store import LabelStore

__all__ = ["csrf", "csrf_valid", "current_user", "hash_password", "load_secret", "new_password", "sign_in", "verify"]

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
