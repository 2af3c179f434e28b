"""The labelling page: one question at a time, as plain forms that work without a script; a script makes it quick."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from tasks.core.errors import DataError
from tasks.labelling import sessions
from tasks.labelling.answers import LONGEST_COMMENT, ConflictError, answer_of, as_shown, is_swapped
from tasks.labelling.forms import BUTTONS, RATINGS, new_token, read_answer, read_number, read_token, words
from tasks.labelling.store import LabelStore
from tasks.labelling.tables import Event

__all__ = ["application"]

FOLDER = Path(__file__).parent

LARGEST_FORM = 100_000
SESSION_SECONDS = 14 * 24 * 3600

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

Fields = Mapping[str, str]


def application(store: LabelStore, secret: str) -> Starlette:
    """The web application over a store, which it closes at its end.

    Args:
        secret: what session cookies are signed with.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        store.close()

    pages = Pages(store)
    routes = [
        Route("/", pages.question),
        Route("/help", pages.help),
        Route("/sign-in", pages.sign_in_page),
        Route("/sign-in", _form(pages.sign_in), methods=["POST"]),
        Route("/sign-out", _form(pages.sign_out), methods=["POST"]),
        Route("/answer", _form(pages.answer), methods=["POST"]),
        Route("/undo", _form(pages.undo), methods=["POST"]),
        Mount("/static", StaticFiles(directory=FOLDER / "static")),
    ]
    cookies = Middleware(
        SessionMiddleware,
        secret_key=secret,
        session_cookie="rlhf_label",
        max_age=SESSION_SECONDS,
        same_site="lax",
    )
    return Starlette(
        routes=routes,
        middleware=[cookies],
        exception_handlers={HTTPException: pages.refused, ConflictError: pages.too_late, DataError: pages.wrong},
        lifespan=lifespan,
    )


class Pages:
    """What is shown at each address, and what a form does."""

    def __init__(self, store: LabelStore) -> None:
        self._store = store
        self._templates = Environment(
            loader=FileSystemLoader(FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def question(self, request: Request) -> Response:
        """The next pair, or why there is none."""
        name = sessions.person(request, self._store)
        if name is None:
            return RedirectResponse("/sign-in", 303)
        task = self._store.next_item(name)
        state = self._state(name)
        if task is None:
            _, items = self._store.open_items()
            return self._page(request, "nothing", name, items=items, **state)
        pair = [task.item.response_a, task.item.response_b]
        responses = dict(zip("AB", pair[::-1] if task.swapped else pair, strict=True))
        undone = as_shown(task.previous, task.swapped) if task.previous else None
        state |= {"task": task, "responses": responses, "undone": undone}
        return self._page(request, "question", name, now=f"{time.time():.3f}", **state)

    def answer(self, request: Request, fields: Fields) -> Response:
        """Keep an answer, and show the next question."""
        name = self._signed_in(request)
        item = fields.get("item", "")
        answer = read_answer(fields, swapped=is_swapped(item, name)).turned()
        self._store.record(name, item, read_token(fields), read_number(fields, "after"), answer)
        return RedirectResponse("/", 303)

    def undo(self, request: Request, fields: Fields) -> Response:
        """Take an answer back, and show its question again."""
        self._store.undo(self._signed_in(request), read_token(fields), read_number(fields, "event"))
        return RedirectResponse("/", 303)

    def help(self, request: Request) -> Response:
        """What the buttons and keys mean."""
        return self._page(request, "help", sessions.person(request, self._store))

    def sign_in_page(self, request: Request) -> Response:
        """Name and password."""
        return self._page(request, "sign_in", None, wrong=False, name="")

    def sign_in(self, request: Request, fields: Fields) -> Response:
        """Begin a session, or ask again."""
        name = fields.get("name", "").strip()
        if sessions.sign_in(request, self._store, name, fields.get("password", "").strip()):
            return RedirectResponse("/", 303)
        return self._page(request, "sign_in", None, 401, wrong=True, name=name)

    def sign_out(self, request: Request, _: Fields) -> Response:
        """End the session."""
        request.session.clear()
        return RedirectResponse("/sign-in", 303)

    def refused(self, request: Request, error: Exception) -> Response:
        """No such page, no session, or no form of ours."""
        assert isinstance(error, HTTPException)
        return self._message(request, error.status_code, "This did not work", error.detail)

    def wrong(self, request: Request, error: Exception) -> Response:
        """A form that our page would not have sent."""
        return self._message(request, 400, "This did not work", f"{error}. Nothing was saved.")

    def too_late(self, request: Request, error: Exception) -> Response:
        """What stands, and that it was not changed."""
        assert isinstance(error, ConflictError)
        stands = _said(error.standing)
        what = f"What stands is: {stands}." if stands else "You have taken that answer back, and it stays taken back."
        said = f"Perhaps in another window, or by two quick clicks. {what} This click changed nothing."
        return self._message(request, 409, "You have answered this already", said)

    def _signed_in(self, request: Request) -> str:
        name = sessions.person(request, self._store)
        if name is None:
            raise HTTPException(403, "You are signed out, so this click was not saved. Sign in and give it again.")
        return name

    def _state(self, name: str) -> dict[str, Any]:
        last = self._store.last_label(name)
        return {"last": last, "last_words": _said(last), "progress": self._store.progress(name)}

    def _message(self, request: Request, status: int, title: str, text: str) -> Response:
        name = sessions.person(request, self._store)
        state = self._state(name) if name else {"last": None, "last_words": None, "progress": None}
        return self._page(request, "message", name, status, title=title, text=text, **state)

    def _page(
        self, request: Request, template: str, person: str | None, status: int = 200, /, **values: Any
    ) -> Response:
        values |= {"person": person, "csrf": sessions.csrf(request), "new_token": new_token}
        values |= {"buttons": BUTTONS, "ratings": RATINGS, "longest": LONGEST_COMMENT, "words": words}
        return HTMLResponse(self._templates.get_template(f"{template}.html.j2").render(values), status, HEADERS)


def _form(function: Callable[[Request, Fields], Response]) -> Callable[[Request], Awaitable[Response]]:
    """A route for a form of ours, whose work with the database does not hold up other requests."""

    async def endpoint(request: Request) -> Response:
        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > LARGEST_FORM:
            raise HTTPException(413, f"This form is too large: {LARGEST_FORM} bytes at most.")
        form = await request.form(max_files=0)
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        if not sessions.is_ours(request, fields.get("csrf", "")):
            raise HTTPException(403, "The page was too old to be sent, so this click was not saved. Give it again.")
        return await run_in_threadpool(function, request, fields)

    return endpoint


def _said(event: Event | None) -> str | None:
    """An answer in the order in which its labeller's page shows the pair."""
    answer = answer_of(event) if event else None
    return words(as_shown(answer, is_swapped(event.item_id, event.labeller))) if event and answer else None
