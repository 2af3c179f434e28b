"""Passwords of labellers: made by us, so that none is weak or used elsewhere; stored as argon2 hashes."""

from __future__ import annotations

import secrets
import threading

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

__all__ = ["fits", "hashed", "new_password"]

LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"
"""None that is mistaken for another when it is read aloud or typed on a phone."""

GROUPS, GROUP = 4, 4  # 16 of 31 letters: 79 bits

_hasher = PasswordHasher()
_one_at_a_time = threading.Lock()  # each takes 64 MB: a crowd of wrong passwords must not take all memory

NOBODYS = _hasher.hash(secrets.token_hex())
"""Checked where there is no such labeller, so that the time of the answer does not tell."""


def new_password() -> str:
    """Like k7mf-q2xw-hp3t-9dya."""
    return "-".join("".join(secrets.choice(LETTERS) for _ in range(GROUP)) for _ in range(GROUPS))


def hashed(password: str) -> str:
    """What the database keeps (argon2id; RFC 9106, section 4, second recommended option)."""
    return _hasher.hash(password)


def fits(password: str, password_hash: str | None) -> bool:
    """Whether the password is the one; never for a labeller without one."""
    try:
        with _one_at_a_time:
            return _hasher.verify(password_hash or NOBODYS, password) and password_hash is not None
    except (VerificationError, InvalidHashError):
        return False
