"""Labelling page: one question at a time, as plain forms that work without a script; a script makes it quick."""

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
from tasks.labelling import auth
from tasks.labelling.forms import BUTTONS, RATINGS, label_text, new_token, read_label, read_number, read_token
from tasks.labelling.labels import MAX_COMMENT_LENGTH, Label, flip, show_swapped
from tasks.labelling.store import ConflictError, LabelStore

__all__ = ["create_app"]

FOLDER = Path(__file__).parent

MAX_FORM_BYTES = 100_000
SESSION_SECONDS = 14 * 24 * 3600

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

Fields = Mapping[str, str]


def create_app(store: LabelStore, secret: str) -> Starlette:
    """Create the web application over a store, which it closes at its end.

    Args:
        secret: what session cookies are signed with.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        store.close()

    views = Views(store)
    routes = [
        Route("/", views.question),
        Route("/help", views.help),
        Route("/sign-in", views.sign_in_page),
        Route("/sign-in", _form_route(views.sign_in), methods=["POST"]),
        Route("/sign-out", _form_route(views.sign_out), methods=["POST"]),
        Route("/answer", _form_route(views.answer), methods=["POST"]),
        Route("/undo", _form_route(views.undo), methods=["POST"]),
        Mount("/static", StaticFiles(directory=FOLDER / "static")),
    ]
    cookies = Middleware(
        SessionMiddleware, secret_key=secret, session_cookie="rlhf_label", max_age=SESSION_SECONDS, same_site="lax"
    )
    return Starlette(
        routes=routes,
        middleware=[cookies],
        exception_handlers={
            HTTPException: views.http_error,
            ConflictError: views.conflict,
            DataError: views.bad_request,
        },
        lifespan=lifespan,
    )


class Views:
    """The page at each address, and the action of each form."""

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
        """Show the next question, or why there is none."""
        name = auth.current_user(request, self._store)
        if name is None:
            return RedirectResponse("/sign-in", 303)
        task = self._store.next_task(name)
        state = self._state(name)
        if task is None:
            _, questions = self._store.open_questions()
            return self._page(request, "nothing", name, questions=questions, **state)
        pair = [task.question.response_a, task.question.response_b]
        responses = dict(zip("AB", pair[::-1] if task.swapped else pair, strict=True))
        undone = flip(task.undone) if task.undone and task.swapped else task.undone
        state |= {"task": task, "responses": responses, "undone": undone}
        return self._page(request, "question", name, now=f"{time.time():.3f}", **state)

    def answer(self, request: Request, fields: Fields) -> Response:
        """Save an answer, and show the next question."""
        label = read_label(fields, self._signed_in(request))
        stored = flip(label) if show_swapped(label.question_id, label.labeller) else label
        previous_event = read_number(fields, "previous_event")
        self._store.save_label(stored, token=read_token(fields), previous_event=previous_event)
        return RedirectResponse("/", 303)

    def undo(self, request: Request, fields: Fields) -> Response:
        """Take an answer back, and show its question again."""
        name = self._signed_in(request)
        self._store.undo(name, token=read_token(fields), event_id=read_number(fields, "event"))
        return RedirectResponse("/", 303)

    def help(self, request: Request) -> Response:
        """Explain the buttons and keys."""
        return self._page(request, "help", auth.current_user(request, self._store))

    def sign_in_page(self, request: Request) -> Response:
        """Ask for name and password."""
        return self._page(request, "sign_in", None, wrong=False, name="")

    def sign_in(self, request: Request, fields: Fields) -> Response:
        """Begin a session, or ask again."""
        name = fields.get("name", "").strip()
        if auth.sign_in(request, self._store, name, fields.get("password", "").strip()):
            return RedirectResponse("/", 303)
        return self._page(request, "sign_in", None, 401, wrong=True, name=name)

    def sign_out(self, request: Request, _: Fields) -> Response:
        """End the session."""
        request.session.clear()
        return RedirectResponse("/sign-in", 303)

    def http_error(self, request: Request, error: Exception) -> Response:
        """Show that there is no such page, no session, or that the form is not of this session."""
        assert isinstance(error, HTTPException)
        return self._message(request, error.status_code, "This did not work", error.detail)

    def bad_request(self, request: Request, error: Exception) -> Response:
        """Show what is wrong with a form that our page would not have sent."""
        return self._message(request, 400, "This did not work", f"{error}. Nothing was saved.")

    def conflict(self, request: Request, error: Exception) -> Response:
        """Show the current label, and that it was not changed."""
        assert isinstance(error, ConflictError)
        current = _describe_label(error.standing)
        what = f"Your saved answer is: {current}." if current else "You have taken that answer back, and it stays so."
        text = f"Perhaps in another window, or by two quick clicks. {what} This click changed nothing."
        return self._message(request, 409, "You have answered this already", text)

    def _signed_in(self, request: Request) -> str:
        name = auth.current_user(request, self._store)
        if name is None:
            raise HTTPException(403, "You are signed out, so this click was not saved. Sign in and give it again.")
        return name

    def _state(self, name: str) -> dict[str, Any]:
        last = self._store.last_label(name)
        return {"last": last, "last_text": _describe_label(last), "progress": self._store.progress(name)}

    def _message(self, request: Request, status: int, title: str, text: str) -> Response:
        name = auth.current_user(request, self._store)
        state = self._state(name) if name else {"last": None, "last_text": None, "progress": None}
        return self._page(request, "message", name, status, title=title, text=text, **state)

    def _page(self, request: Request, template: str, user: str | None, status: int = 200, /, **values: Any) -> Response:
        values |= {"user": user, "csrf": auth.csrf(request), "new_token": new_token, "label_text": label_text}
        values |= {"buttons": BUTTONS, "ratings": RATINGS, "max_comment_length": MAX_COMMENT_LENGTH}
        return HTMLResponse(self._templates.get_template(f"{template}.html.j2").render(values), status, HEADERS)


def _form_route(function: Callable[[Request, Fields], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Return a route for a form of ours, whose work with the database does not hold up other requests."""

    async def endpoint(request: Request) -> Response:
        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > MAX_FORM_BYTES:
            raise HTTPException(413, f"This form is too large: {MAX_FORM_BYTES} bytes at most.")
        form = await request.form(max_files=0)
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        if not auth.csrf_valid(request, fields.get("csrf", "")):
            raise HTTPException(403, "The page was too old to be sent, so this click was not saved. Give it again.")
        return await run_in_threadpool(function, request, fields)

    return endpoint


def _describe_label(label: Label | None) -> str | None:
    """Return a label's text in the order in which its labeller's page shows the pair."""
    if label is None:
        return None
    return label_text(flip(label) if show_swapped(label.question_id, label.labeller) else label)
