"""Labelling page: one question at a time, as plain forms that work without a script; a script makes it quick."""

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from tasks.core.errors import DataError, SourceError
from tasks.labelling import auth
from tasks.labelling.auth import HostCheck, SignInLimits
from tasks.labelling.guidelines import Guidelines
from tasks.labelling.labels import MAX_COMMENT_LENGTH, MAX_NAME_LENGTH, Label, flip, pseudonym, show_swapped, text_error
from tasks.labelling.store import ConflictError, LabelStore

__all__ = ["create_app"]

FOLDER = Path(__file__).parent

MAX_FORM_BYTES = 100_000
MAX_WAITING_SIGN_INS = 50
SESSION_SECONDS = 14 * 24 * 3600

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

Fields: TypeAlias = Mapping[str, str]


@dataclass(frozen=True)
class Button:
    """A button: the value it sends, its key and text; `group` is the response that it favours."""

    value: str
    key: str
    text: str
    group: str
    choice: str
    strength: int | None = None


BUTTONS = (
    Button("a3", "1", "A far better", "a", "a", 3),
    Button("a2", "2", "A clearly better", "a", "a", 2),
    Button("a1", "3", "A slightly better", "a", "a", 1),
    Button("tie", "4", "Equally good", "none", "tie"),
    Button("both_bad", "5", "Both bad", "none", "both_bad"),
    Button("skip", "6", "Skip", "none", "skip"),
    Button("b1", "7", "B slightly better", "b", "b", 1),
    Button("b2", "8", "B clearly better", "b", "b", 2),
    Button("b3", "9", "B far better", "b", "b", 3),
)

RATINGS = {1: "very bad", 2: "bad", 3: "fair", 4: "good", 5: "very good"}


log = logging.getLogger(__name__)


def create_app(
    store: LabelStore, secret: str, *, hosts: Collection[str] = (), guidelines: Guidelines | None = None
) -> Starlette:
    """Create the web application over a store, which it closes at its end.

    Args:
        secret: signs session cookies.
        hosts: names under which the page is served, besides those that `tasks.labelling.auth.HostCheck` knows.
        guidelines: shown beside each question; the store keeps them.
    """
    if guidelines:
        store.add_guidelines(guidelines.sha256, guidelines.text)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        store.close()

    views = Views(store, guidelines)
    routes = [
        Route("/", views.question),
        Route("/help", views.help),
        Route("/sign-in", views.sign_in_page),
        Route("/sign-in", views.sign_in, methods=["POST"]),
        Route("/sign-out", _form_route(views.sign_out), methods=["POST"]),
        Route("/answer", _form_route(views.answer), methods=["POST"]),
        Route("/undo", _form_route(views.undo), methods=["POST"]),
        Mount("/static", StaticFiles(directory=FOLDER / "static")),
    ]
    cookies = Middleware(
        SessionMiddleware, secret_key=secret, session_cookie="rlhf_label", max_age=SESSION_SECONDS, same_site="lax"
    )
    handlers = {
        HTTPException: views.refuse,
        ConflictError: views.conflict,
        DataError: views.refuse,
        SourceError: views.unavailable,
        ClientDisconnect: _answer_nobody,
    }
    middleware = [Middleware(HostCheck, names=hosts), cookies]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)


class Views:
    """The page at each address, and the action of each form."""

    def __init__(self, store: LabelStore, guidelines: Guidelines | None) -> None:
        self._store, self._guidelines = store, guidelines
        self._limits, self._one_at_a_time, self._waiting = SignInLimits(), asyncio.Lock(), 0
        self._logged = ""  # what the log says of the database, until an answer is saved again
        self._templates = Environment(
            loader=FileSystemLoader(FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        shared = {"buttons": BUTTONS, "ratings": RATINGS, "max_comment_length": MAX_COMMENT_LENGTH}
        shared |= {"guidelines": guidelines, "pseudonym": pseudonym}
        self._templates.globals |= shared | {"new_token": uuid.uuid4, "label_text": _label_text}

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
        responses = dict(zip("AB", pair[::-1] if show_swapped(task.question.id, name) else pair, strict=True))
        state |= {"task": task, "responses": responses, "undone": task.undone and _turn(task.undone)}
        return self._page(request, "question", name, now=f"{time.time():.3f}", **state)

    def answer(self, request: Request, fields: Fields) -> Response:
        """Save an answer, and show the next question."""
        label = _turn(_read_label(fields, self._signed_in(request)))
        self._check_guidelines(label.guidelines)
        previous_event = _read_number(fields, "previous_event")
        self._store.save_label(label, token=_read_token(fields), previous_event=previous_event)
        self._logged = ""
        return RedirectResponse("/", 303)

    def undo(self, request: Request, fields: Fields) -> Response:
        """Take an answer back, and show its question again."""
        name = self._signed_in(request)
        self._store.undo(name, token=_read_token(fields), event_id=_read_number(fields, "event"))
        self._logged = ""
        return RedirectResponse("/", 303)

    def help(self, request: Request) -> Response:
        """Explain the buttons and keys."""
        return self._page(request, "help", auth.current_user(request, self._store))

    def sign_in_page(self, request: Request) -> Response:
        """Ask for name and password."""
        return self._page(request, "sign_in", None, wrong=False, wait=0, name="")

    async def sign_in(self, request: Request) -> Response:
        """Begin a session, or ask again.

        Passwords are checked one at a time, for each takes 64 MB; who waits for it takes no worker from the others.
        """
        fields = await _read_form(request)
        name, password = (fields.get(field, "").strip() for field in ("name", "password"))
        address = request.client.host if request.client else ""
        keys = (f"address {address}", f"name {name[:MAX_NAME_LENGTH]}")
        if self._waiting > MAX_WAITING_SIGN_INS:
            return self._page(request, "sign_in", None, 429, wrong=False, wait=1, name=name)
        self._waiting += 1
        try:
            async with self._one_at_a_time:
                wait = math.ceil(self._limits.seconds_to_wait(keys))
                if not wait and await run_in_threadpool(auth.sign_in, request, self._store, name, password):
                    return RedirectResponse("/", 303)
                if not wait:
                    self._limits.count_wrong(keys)
        finally:
            self._waiting -= 1
        return self._page(request, "sign_in", None, 429 if wait else 401, wrong=not wait, wait=wait, name=name)

    def sign_out(self, request: Request, _: Fields) -> Response:
        """End the session."""
        request.session.clear()
        return RedirectResponse("/sign-in", 303)

    def refuse(self, request: Request, error: Exception) -> Response:
        """Show that there is no such page or session, or what is wrong with a form that our page would not send."""
        status, text = 400, f"{error}. Nothing was saved."
        if isinstance(error, HTTPException):
            status, text = error.status_code, error.detail
        return self._message(request, status, "This did not work", text)

    def conflict(self, request: Request, error: Exception) -> Response:
        """Show the current label, and that it was not changed."""
        assert isinstance(error, ConflictError)
        current = _describe_label(error.standing)
        what = f"Your saved answer is: {current}." if current else "You have taken that answer back, and it stays so."
        text = f"Perhaps in another window, or by two quick clicks. {what} This click changed nothing."
        return self._message(request, 409, "You have answered this already", text)

    def unavailable(self, request: Request, error: Exception) -> Response:
        """Say that nothing was saved, with a form that sends the same answer again; the log says it once."""
        if str(error) != self._logged:
            self._logged = str(error)
            log.warning("%s; the page says so to who clicks", error)
        fields = getattr(request.state, "fields", {}) if request.url.path in ("/answer", "/undo") else {}
        button = next((button.text for button in BUTTONS if button.value == fields.get("answer")), None)
        values = {"reason": getattr(error, "reason", error), "fields": fields, "action": request.url.path}
        return self._page(request, "unsaved", None, 503, button=button, **values)

    def _check_guidelines(self, sha256: str | None) -> None:
        """Refuse guidelines that this database has never shown; an open page may show those of an earlier start."""
        current = self._guidelines.sha256 if self._guidelines else None
        if sha256 not in (None, current) and sha256 not in self._store.guidelines():
            raise DataError(f"guidelines: got {sha256!r}, which this page has not shown")

    def _signed_in(self, request: Request) -> str:
        name = auth.current_user(request, self._store)
        if name is None:
            raise HTTPException(403, "You are signed out, so this click was not saved. Sign in and give it again.")
        return name

    def _state(self, name: str) -> dict[str, Any]:
        last = self._store.last_label(name)
        return {"last": last, "last_text": _describe_label(last), "progress": self._store.progress(name)}

    def _message(self, request: Request, status: int, title: str, text: str) -> Response:
        try:
            name = auth.current_user(request, self._store)
            state = self._state(name) if name else {"progress": None}
        except SourceError as error:
            return self.unavailable(request, error)
        return self._page(request, "message", name, status, title=title, text=text, **state)

    def _page(self, request: Request, template: str, user: str | None, status: int = 200, /, **values: Any) -> Response:
        values |= {"user": user, "csrf": auth.csrf(request)}
        return HTMLResponse(self._templates.get_template(f"{template}.html.j2").render(values), status, HEADERS)


def _form_route(function: Callable[[Request, Fields], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Return a route for a form of ours, whose work with the database does not hold up other requests."""

    async def endpoint(request: Request) -> Response:
        return await run_in_threadpool(function, request, await _read_form(request))

    return endpoint


async def _read_form(request: Request) -> Fields:
    """Return the fields of a form of ours."""
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit() and len(length) < 10 and int(length) <= MAX_FORM_BYTES):
        raise HTTPException(413, f"This form is too large: {MAX_FORM_BYTES} bytes at most.")
    form = await request.form(max_files=0)
    fields = {name: value for name, value in form.items() if isinstance(value, str)}
    if not auth.csrf_valid(request, fields.get("csrf", "")):
        raise HTTPException(403, "The page was too old to be sent, so this click was not saved. Give it again.")
    if reason := next(filter(None, (text_error(name, value) for name, value in fields.items())), None):
        raise DataError(reason)
    request.state.fields = fields
    return fields


def _answer_nobody(_: Request, __: Exception) -> Response:
    """Answer a client that hung up before its form had arrived: nothing was saved, and nothing is to be said."""
    return Response(status_code=400)


def _turn(label: Label) -> Label:
    """Turn a label from the stored order to the one in which its labeller's page shows the pair, or back."""
    return flip(label) if show_swapped(label.question_id, label.labeller) else label


def _describe_label(label: Label | None) -> str | None:
    """Return a label's text in the order shown."""
    return None if label is None else _label_text(_turn(label))


def _label_text(label: Label) -> str:
    """Return the text of the label's button."""
    texts = {(button.choice, button.strength): button.text for button in BUTTONS}
    return texts.get((label.choice, label.strength), f"{label.choice.upper()} better")


def _read_label(fields: Fields, labeller: str) -> Label:
    """Return the label in the form, in the order shown; the store refuses values that the page does not offer."""
    button = next((button for button in BUTTONS if button.value == fields.get("answer")), None)
    if button is None:
        raise DataError(f"answer: got {fields.get('answer', '')!r}; go back and choose one of the buttons")
    return Label(
        fields.get("question", ""),
        labeller,
        button.choice,
        strength=button.strength,
        rating_a=_read_number(fields, "rating_a") if fields.get("rating_a") else None,
        rating_b=_read_number(fields, "rating_b") if fields.get("rating_b") else None,
        comment=fields.get("comment", "").replace("\r\n", "\n").strip() or None,
        seconds=_seconds_since(fields.get("shown", "")),
        guidelines=fields.get("guidelines") or None,
    )


def _read_number(fields: Fields, name: str) -> int:
    """Return a field that holds a whole number."""
    text = fields.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise DataError(f"{name}: got {text!r}, expected a number")
    return int(text)


def _read_token(fields: Fields) -> str:
    """Return the id of the form that was sent."""
    try:
        return str(uuid.UUID(fields.get("token", "")))
    except ValueError:
        raise DataError(f"token: got {fields.get('token')!r}, which this page has not made") from None


def _seconds_since(shown: str) -> float | None:
    """Return None where the clock was set back, or the field is not ours: the answer counts all the same."""
    try:
        seconds = time.time() - float(shown)
    except ValueError:
        return None
    return round(seconds, 3) if math.isfinite(seconds) and 0 <= seconds < 86400 else None
