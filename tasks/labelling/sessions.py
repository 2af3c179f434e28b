"""Who is signed in: a name and a proof of the password in force, in a cookie signed with this project's secret."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from starlette.requests import Request

from tasks.labelling.passwords import fits
from tasks.labelling.store import LabelStore
from tasks.labelling.tables import Labeller

__all__ = ["csrf", "is_ours", "person", "secret", "sign_in"]

LONGEST_PASSWORD = 200


def secret(path: Path) -> str:
    """What cookies are signed with; made once, and readable by its owner alone."""
    if not path.exists():
        draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another server was faster: its secret holds
            path.hardlink_to(draft)
        draft.unlink()
    return path.read_text(encoding="ascii")


def sign_in(request: Request, store: LabelStore, name: str, password: str) -> bool:
    """Begin a session of this labeller, if the password is right; whether it was."""
    labeller = store.labeller(name)
    right = fits(password[:LONGEST_PASSWORD], labeller.password_hash if labeller else None)
    if right and labeller:
        request.session.clear()
        request.session.update(name=name, proof=_proof(labeller))
    return right


def person(request: Request, store: LabelStore) -> str | None:
    """The name of who is signed in; a new password ends the sessions begun with the old one."""
    name = request.session.get("name")
    labeller = store.labeller(name) if name else None
    if labeller and hmac.compare_digest(request.session.get("proof", ""), _proof(labeller)):
        return labeller.name
    return None


def csrf(request: Request) -> str:
    """The word that forms of this session carry, so that no other site can send one in its name."""
    return str(request.session.setdefault("csrf", secrets.token_urlsafe(16)))


def is_ours(request: Request, word: str) -> bool:
    """Whether a form with this word is of this session."""
    return "csrf" in request.session and hmac.compare_digest(word.encode(), csrf(request).encode())


def _proof(labeller: Labeller) -> str:
    return hashlib.sha256((labeller.password_hash or "").encode()).hexdigest()[:16]
