"""The labelling page as a labeller meets it: a real server, a real browser, and a server that is killed in between."""

import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.labelling.labels import Question
from tasks.labelling.store import LabelStore
from tests.pipeline.conftest import PATIENCE, answers, query, wait_for
from tests.support.labels import make_question

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")]

ROOT = Path(__file__).resolve().parents[2]
SHOTS = os.environ.get("RLHF_SCREENSHOTS")
LABELS = 200
LONG = "A sentence that goes on for a while, so that it wraps more than once on a narrow screen. " * 9

CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest("dialog:not([open])")) continue;
    const [front, back] = [parse(getComputedStyle(node).color), behind(node)].map(light);
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    found.push([Math.round(ratio * 100) / 100, walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found.sort((one, two) => one[0] - two[0]);
}"""

SMALL = """() => [...document.querySelectorAll("button, a, summary, .rating label, input:not([type=hidden])")]
  .filter((node) => node.checkVisibility() && !node.matches("dialog:not([open]) *, .jump, [type=radio]"))
  .map((node) => [node.textContent.trim() || node.name, node.getBoundingClientRect()])
  .filter(([, box]) => box.width < 44 || box.height < 44)
  .map(([name, box]) => `${name}: ${box.width} × ${box.height}`)"""

FOCUSED = """() => {
  const node = document.activeElement;
  if (node.className === "jump" || node.type === "radio") return node.name || "jump";
  return node.name === "answer" ? node.dataset.key : node.firstChild.textContent.trim();
}"""


READ = """async () => {
  for (const mark of document.querySelectorAll("[data-read]")) {
    mark.scrollIntoView({ block: "center" });
    while (!mark.dataset.seen) await new Promise((resolve) => setTimeout(resolve, 10));
  }
}"""


class Server:
    """`rlhf label` on a database of its own; started again, it comes back on the same port."""

    def __init__(self, folder: Path) -> None:
        self.path, self.log = folder / "labels.db", folder / "log"
        self.url = f"sqlite:///{self.path}"
        self.store = LabelStore(self.url)
        self.port, self.process, self.options = 0, None, []

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "flows.cli.main", "label", *words, "--database", self.url]

    def start(self) -> None:
        command = self.command("--port", str(self.port), *self.options)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        wait_for(self.answers, seconds=60)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        if not (found := re.search(r"http://127\.0\.0\.1:(\d+)\s", self.log.read_text())):
            return False
        self.port = int(found[1])
        self.address = f"http://127.0.0.1:{self.port}"
        return answers(f"{self.address}/sign-in")

    def end(self, sign: signal.Signals) -> tuple[int, str]:
        assert self.process
        self.process.send_signal(sign)
        return self.process.wait(timeout=PATIENCE), self.log.read_text()

    def label_tokens(self) -> list[tuple[str, str]]:
        """Labeller and token of every label, none of them undone."""
        return [(labeller, token) for labeller, token in query(self.path, "select labeller, token from events")]

    def password(self, name: str) -> str:
        done = subprocess.run(self.command("add", name), cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.split("password:")[1].strip()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.store.close()
    if server.process and server.process.poll() is None:
        server.end(signal.SIGKILL)


@pytest.fixture
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def questions(count: int) -> list[Question]:
    texts = {
        "prompt": "Explain in two sentences why the sky is blue, for somebody of ten years. ({})",
        "response_a": f"{LONG}\n\nAnd a second paragraph, number {{}}.",
        "response_b": "Because blue light is scattered more. ({})",
    }
    return [
        make_question(f"item{number:04}", **{name: text.format(number) for name, text in texts.items()})
        for number in range(count)
    ]


def signed_in(browser: Any, server: Server, name: str, password: str, **options: Any) -> Any:
    page = browser.new_context(**options).new_page()
    page.goto(server.address)
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("heading", name="Which response is better?").wait_for()
    return page


def labelling(browser: Any, server: Server, count: int, **options: Any) -> Any:
    """Ann's page, with so many questions."""
    server.store.add_questions(questions(count))
    password = server.password("ann")
    server.start()
    return signed_in(browser, server, "ann", password, **options)


def token_of(page: Any) -> str:
    return str(page.locator("#answer input[name=token]").get_attribute("value"))


def click(page: Any, key: str) -> str:
    """Read, and press an answer's key; the token of the page that then went away, and so counted it as saved."""
    token = token_of(page)
    page.evaluate(READ)
    page.keyboard.press(key)
    wait_gone(page, token)
    return token


def wait_gone(page: Any, token: str) -> None:
    page.wait_for_function("t => document.querySelector('#answer input[name=token]')?.value !== t", arg=token)


def test_two_hundred_labels_by_two_people_with_the_server_killed_in_between(server: Server, browser: Any) -> None:
    server.store.add_questions(questions(LABELS - 20))
    server.store.add_questions([make_question(f"test{number}", gold="a", reason="gold") for number in range(10)])
    passwords = {name: server.password(name) for name in ("ann", "bob")}
    server.start()
    pages = {name: signed_in(browser, server, name, word) for name, word in passwords.items()}
    accepted: list[tuple[str, str]] = []
    for number in range(LABELS):
        name = ("ann", "bob")[number % 2]
        if number == LABELS // 2:
            accepted.append((name, _click_while_it_dies(server, pages[name])))
            continue
        accepted.append((name, click(pages[name], "123456789"[number % 9])))
    events = server.label_tokens()
    assert not set(accepted) - set(events), "an answer that a page counted as saved is lost"
    assert sorted(events) == sorted(accepted), "an answer that no page counted as saved"
    pairs = Counter((label.question_id, label.labeller) for label in server.store.current_labels())
    assert max(pairs.values()) == 1


def _click_while_it_dies(server: Server, page: Any) -> str:
    """Kill the server, answer, see that the page says so and keeps the answer, and bring the server back."""
    token = token_of(page)
    page.evaluate(READ)
    server.end(signal.SIGKILL)
    page.keyboard.press("2")
    page.get_by_text("Not saved yet").wait_for()
    assert token_of(page) == token
    server.start()
    wait_gone(page, token)
    return token


def test_undo_rating_comment_and_help_by_keyboard(server: Server, browser: Any) -> None:
    page = labelling(browser, server, 3)
    page.keyboard.press("a")
    page.keyboard.press("4")
    page.keyboard.press("c")
    page.keyboard.type("123 ?")
    page.keyboard.press("Escape")
    click(page, "8")
    (label,) = server.store.current_labels()
    first = "b" if label.swapped else "a"
    second = "a" if first == "b" else "b"
    assert (label.choice, label.strength, label.comment) == (second, 2, "123 ?")
    assert (getattr(label, f"rating_{first}"), getattr(label, f"rating_{second}")) == (4, None)
    assert 0 < label.seconds < 60

    click(page, "u")
    assert server.store.current_labels() == []
    assert "You took back B clearly better" in page.locator("main").inner_text()
    assert page.locator("#live").inner_text().startswith("Taken back: B clearly better")
    assert page.locator("textarea").input_value() == "123 ?"
    assert page.locator("input[name=rating_a]:checked").get_attribute("value") == "4"
    click(page, "1")
    (again,) = server.store.current_labels()
    assert (again.question_id, again.choice, again.strength, again.comment) == (label.question_id, first, 3, "123 ?")

    page.locator("input[name=rating_b][value='2']").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("?")
    assert page.locator("dialog").is_visible()
    page.keyboard.press("1")
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    assert len(server.store.current_labels()) == 1


def test_without_a_script_the_forms_do_the_same(server: Server, browser: Any) -> None:
    page = labelling(browser, server, 2, java_script_enabled=False)
    page.get_by_role("button", name="Equally good").click()
    page.get_by_text("Saved: Equally good").wait_for()
    assert [label.choice for label in server.store.current_labels()] == ["tie"]
    page.locator("input[name=rating_a][value='3']").focus()
    page.keyboard.press("Enter")
    page.get_by_text("go back and choose one of the buttons").wait_for()
    assert len(server.store.current_labels()) == 1, "Enter alone must not answer"
    page.get_by_role("button", name="Undo").click()
    page.get_by_text("You took back Equally good").wait_for()
    assert server.store.current_labels() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (360, 740)])
def test_everybody_can_read_and_reach_it(
    server: Server, browser: Any, scheme: str, width: int, height: int, tmp_path: Path
) -> None:
    phone = {"is_mobile": True, "has_touch": True} if width < 500 else {}
    viewport = {"width": width, "height": height}
    page = labelling(browser, server, 3, color_scheme=scheme, viewport=viewport, **phone)
    page.evaluate(READ)
    page.get_by_role("button", name="A clearly better").click()
    page.locator("form.last").wait_for()
    page.evaluate(READ)
    page.evaluate("window.scrollTo(0, 0)")
    shots = Path(SHOTS) if SHOTS else tmp_path
    page.screenshot(path=shots / f"{scheme}-{width}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "sideways scrolling"
    ratio, text = page.evaluate(CONTRAST)[0]
    assert ratio >= 4.5, text
    assert page.evaluate(SMALL) == []
    bar = page.locator(".bar").bounding_box()
    assert bar["y"] + bar["height"] <= height + 1, "the answers are in sight without scrolling"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, a, input:not([type=hidden]), textarea, summary, progress")]
        .filter((node) => node.checkVisibility() && !(node.getAttribute("aria-label") || node.textContent.trim()
          || [...(node.labels || [])].some((label) => label.textContent.trim()))).map((node) => node.outerHTML)"""
    )
    assert nameless == []
    if not phone:
        assert _tab_order(page) == [
            "jump", "Labelling", "Help", "Sign out", "Undo", "rating_a", "rating_b", "Comment", "1", "2", "3", "4", "5",
            "6", "7", "8", "9",
        ]  # fmt: skip
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.screenshot(path=shots / f"{scheme}-{width}-end.png")
    page.get_by_role("link", name="Help").click()
    page.screenshot(path=shots / f"{scheme}-{width}-help.png")
    assert page.evaluate(CONTRAST)[0][0] >= 4.5


def _tab_order(page: Any) -> list[str]:
    page.reload()
    page.keyboard.press("Tab")
    names = [page.evaluate(FOCUSED)]
    page.evaluate(READ)
    # Tab goes on from what a script has scrolled to, so the first place gets the focus anew.
    page.evaluate("() => { const first = document.activeElement; first.blur(); first.focus() }")
    for _ in range(16):
        page.keyboard.press("Tab")
        names.append(page.evaluate(FOCUSED))
    return names


def test_on_a_phone_nobody_answers_before_both_responses_were_in_view(server: Server, browser: Any) -> None:
    texts = {"response_a": LONG, "response_b": f"{LONG}."}
    server.store.add_questions([make_question(f"long{number}", **texts) for number in range(3)])
    page = labelling(browser, server, 0, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    for answered in range(2):
        page.get_by_text("Read response A and B to the end, then answer.").wait_for()
        _press_everything(page)
        page.locator(".response.a .end").evaluate("node => node.scrollIntoView({block: 'center'})")
        page.get_by_text("Read response B to the end, then answer.").wait_for()
        _press_everything(page)
        bar, end = page.locator(".bar").bounding_box(), page.locator(".response.b .end").bounding_box()
        assert end["y"] > bar["y"], "B's end must be hidden for this test"
        assert len(server.store.current_labels()) == answered
        page.evaluate(READ)
        page.locator(".choice[data-key='7']").tap()
        page.get_by_text(f"{answered + 1} of 3 answered").first.wait_for()
    page.set_viewport_size({"width": 740, "height": 360})
    assert page.locator(".choice:disabled").count() == 9, "turned on its side"


def _press_everything(page: Any) -> None:
    assert page.locator(".choice:disabled").count() == 9
    for key in "123456789":
        page.keyboard.press(key)
        page.locator(f".choice[data-key='{key}']").evaluate("node => node.click()")
    assert page.locator("#live").inner_text() == page.locator("#unread").inner_text()


@pytest.mark.parametrize("script", [True, False])
def test_on_a_full_disk_the_choice_stays_on_the_page(server: Server, browser: Any, script: bool) -> None:
    page = labelling(browser, server, 2, viewport={"width": 1280, "height": 1400}, java_script_enabled=script)
    page.locator(".comment summary").click()
    page.locator("textarea").fill("so\nit is")
    page.locator("input[name=rating_a][value='4']").check(force=True)
    process = server.process.pid
    resource.prlimit(process, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    for _ in range(3):
        page.get_by_role(
            "button", name="A clearly better" if script else re.compile("A clearly better|Try again")
        ).click()
        page.get_by_text("Not saved, try again").first.wait_for()
        assert page.locator(".sent").all_inner_texts() == (["A clearly better\n2"] if script else [])
    resource.prlimit(process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    page.get_by_role("button", name="A clearly better" if script else "Try again").click()
    page.get_by_text("Saved: A clearly better").first.wait_for()
    (label,) = server.store.current_labels()
    assert (label.strength, label.comment, {label.rating_a, label.rating_b}) == (2, "so\nit is", {4, None})
    log = server.log.read_text()
    assert (log.count("cannot use the labelling database"), log.count("Traceback")) == (1, 0)


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (360, 740)])
def test_guidelines_stand_beside_the_question_and_stay_closed(
    server: Server, browser: Any, width: int, height: int, tmp_path: Path
) -> None:
    (tmp_path / "g.md").write_text(
        "# Choose the true one\n\n<script>document.title = 'x'</script>\n\n" + f"{LONG}\n\n" * 3
    )
    server.options = ["--guidelines", str(tmp_path / "g.md")]
    page = labelling(browser, server, 3, viewport={"width": width, "height": height})
    page.screenshot(path=(Path(SHOTS) if SHOTS else tmp_path) / f"guidelines-{width}.png")
    assert page.get_by_role("heading", name="Choose the true one").is_visible()
    question, beside = page.locator("form#answer").bounding_box(), page.locator(".guidelines").bounding_box()
    assert (beside["x"] >= question["x"] + question["width"]) == (width > 1000)
    assert page.evaluate(CONTRAST)[0][0] >= 4.5
    page.locator(".guidelines summary").click()
    click(page, "4")
    assert not page.get_by_role("heading", name="Choose the true one").is_visible()
    (label,) = server.store.current_labels()
    assert label.guidelines == hashlib.sha256((tmp_path / "g.md").read_bytes()).hexdigest()


def test_it_ends_cleanly_and_lists_what_it_serves(server: Server) -> None:
    server.start()
    status, output = server.end(signal.SIGINT)
    assert status == 0, output
    assert "none yet: `rlhf label sample` chooses pairs to compare" in output
    assert "none yet: `rlhf label add NAME` adds one, and prints a password" in output
    assert "every answer that the page called saved is in the database" in output
    assert "Traceback" not in output
    server.store.add_questions(questions(2))
    server.password("ann")
    server.start()
    status, output = server.end(signal.SIGTERM)
    assert status in (0, -signal.SIGTERM)
    assert all(text in output for text in ("2, of which 2 need labels", "labellers  ann"))
    assert "Traceback" not in output
