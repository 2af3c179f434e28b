"""The judge behind an endpoint against a real server on this machine, and the local one against plain arithmetic."""

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tasks.config.evaluation import JudgeParams
from tasks.core.errors import ConfigError, DataError, ModelError, SourceError
from tasks.evals import llm_judge
from tasks.evals.llm_judge import ANSWER_PREFIX, JudgeCache, LocalJudge, load_judge, request_key
from tasks.evals.pairwise import Reply
from tasks.models.loading import load_reference
from tests.conftest import LETTERS, letter_tokenizer, tiny_model
from tests.support.chat_server import TOKENS, Chat, serving

QUESTIONS = [f"Question {number}?" for number in range(5)]
KEY = "sk-secret-0123"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.setenv("RLHF_ROOT", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return tmp_path


@pytest.fixture
def chat() -> Iterator[Chat]:
    with serving(lambda question: f"{'AB'[int(question[9]) % 2]} for {question}") as chat:
        yield chat


def _ask(chat: Chat, questions: list[str] = QUESTIONS, **values: object) -> list[str]:
    params = JudgeParams.model_validate(
        {"kind": "endpoint", "model": "strong", "base_url": chat.url, "prompts": 1} | values
    )
    judge = load_judge(params, Path("unused"), batch_size=1)
    assert judge.judge_id == {"kind": "endpoint", "model": params.model, "base_url": chat.url}
    return [reply.text for reply in judge.judge(questions)]


ANSWERS = [f"{letter} for {question}" for letter, question in zip("ABABA", QUESTIONS, strict=True)]


def test_every_question_is_asked_once_and_never_again(chat: Chat, project: Path) -> None:
    assert _ask(chat, [*QUESTIONS, QUESTIONS[0]]) == [*ANSWERS, ANSWERS[0]]
    assert chat.questions() == QUESTIONS
    assert all((request["model"], request["temperature"]) == ("strong", 0) for request in chat.asked)
    assert all(request["max_tokens"] <= 16 for request in chat.asked)
    assert chat.keys == [f"Bearer {KEY}"] * 5
    assert _ask(chat, QUESTIONS[::-1], max_requests=1) == ANSWERS[::-1]
    assert len(chat.asked) == 5
    lines = [json.loads(line) for line in (project / ".rlhf/judge/answers.jsonl").read_text().splitlines()]
    assert lines[0]["reply"] == {"text": ANSWERS[0], "model": "strong-0613", "tokens": TOKENS}
    assert lines[0]["judge"] == {"kind": "endpoint", "model": "strong", "base_url": chat.url}


def test_a_busy_server_is_asked_again_and_another_model_anew(chat: Chat) -> None:
    chat.refuse = [429, 503, 429]
    assert _ask(chat) == ANSWERS
    _ask(chat, QUESTIONS[:2], model="stronger")
    assert [request["model"] for request in chat.asked] == ["strong"] * 5 + ["stronger"] * 2


def test_after_a_failure_only_the_rest_is_asked(chat: Chat, project: Path) -> None:
    chat.fails_after = 3
    with pytest.raises(SourceError, match=r"judge at http://127.*/v1 fails with HTTP 500: .*answers so far are kept"):
        _ask(chat)
    chat.fails_after = None
    path = project / ".rlhf/judge/answers.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # and the run was killed while it wrote the third
    assert _ask(chat) == ANSWERS
    assert chat.questions() == QUESTIONS[:3] + QUESTIONS[2:]


def test_too_many_questions_are_refused_before_the_first(chat: Chat) -> None:
    with pytest.raises(ConfigError, match=r"asked 5 questions, .*llm_judge\.max_requests allows 4; nothing was ask"):
        _ask(chat, max_requests=4)
    assert (chat.asked, chat.keys) == ([], [])
    _ask(chat, QUESTIONS[:2], max_requests=2)
    assert _ask(chat, max_requests=3) == ANSWERS


def test_the_budget_of_tokens_ends_a_run_and_the_next_goes_on(chat: Chat) -> None:
    with pytest.raises(ConfigError, match=r"2 answers of the judge took 200 tokens, .*_tokens allows 150; 3 are miss"):
        _ask(chat, max_tokens=150)
    assert len(chat.asked) == 2
    assert _ask(chat, max_tokens=300) == ANSWERS
    assert len(chat.asked) == 5


def test_a_server_that_counts_nothing_is_counted_by_bytes_and_an_empty_answer_is_an_answer(
    chat: Chat, project: Path
) -> None:
    chat.counts = False
    _ask(chat, QUESTIONS[:1])
    entry = json.loads((project / ".rlhf/judge/answers.jsonl").read_text())
    assert entry["reply"]["tokens"] == len("Question 0?A for Question 0?")
    chat.say = lambda _: None
    assert _ask(chat, QUESTIONS[1:2]) == [""]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"refuses the key \(HTTP 401\): set OPENAI_API_KEY in the environment"),
        (403, r"refuses the key \(HTTP 403\)"),
        (404, r"knows no model 'strong', or base_url is wrong \(HTTP 404\)"),
        (400, "fails with HTTP 400: .*no: Bearer …"),
    ],
)
def test_a_refusal_is_one_message_without_the_key(chat: Chat, status: int, message: str) -> None:
    """This server repeats the key in its refusals, as some do."""
    chat.refuse = [status]
    with pytest.raises(SourceError, match=message) as caught:
        _ask(chat)
    assert KEY not in str(caught.value)
    assert len(chat.keys) == 1, "it asked again what was refused for good"


def test_the_key_is_written_nowhere_and_a_server_of_ones_own_needs_none(
    chat: Chat, project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _ask(chat, QUESTIONS[:1])
    assert chat.keys == [f"Bearer {KEY}"]
    files = [path for path in project.rglob("*") if path.is_file()]
    assert {"answers.jsonl", "dvc.yaml"} == {path.name for path in files}
    assert not any(KEY.encode() in path.read_bytes() for path in files)
    assert KEY not in "".join(capfd.readouterr())
    monkeypatch.delenv("OPENAI_API_KEY")
    assert _ask(chat) == ANSWERS


def test_a_page_for_people_is_no_answer_and_no_server_one_message(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.page = True
    with pytest.raises(SourceError, match="answers, but not as an OpenAI-compatible server: check base_url"):
        _ask(chat)
    monkeypatch.setattr(llm_judge, "RETRIES", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = Chat(lambda _: "A", url=f"http://127.0.0.1:{free.getsockname()[1]}/v1")
        with pytest.raises(SourceError, match=r"does not answer \(Connection error\.\): is the server running\?"):
            _ask(nobody)


def test_without_the_package_the_extra_is_named_unless_nothing_is_to_ask(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ask(chat, QUESTIONS[:1])
    monkeypatch.setitem(sys.modules, "openai", None)
    assert _ask(chat, QUESTIONS[:1]) == ANSWERS[:1]
    with pytest.raises(ConfigError, match=r"needs the package openai: pip install -e '\.\[judge\]'"):
        _ask(chat)


TEMPLATE = "{% for message in messages %}u {{ message.content }} e{% endfor %} a "


def _base_model(folder: Path, letters: str = LETTERS + "ABC", template: str | None = None) -> Path:
    tokenizer = letter_tokenizer(letters)
    begin = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 1)])
    tokenizer.backend_tokenizer.post_processor = begin  # a text begins with a token of its own; a template writes its
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "model")
    tiny_model().save_pretrained(folder / "model")
    return folder


WORDS = ["is it good", "a", "which of the two is the better one then", "so so", "what"]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_local_judge_takes_the_likelier_letter(tmp_path: Path, template: str | None) -> None:
    """Against a forward pass of each question alone, over ids spelt by hand: every letter is one, Ġ is the space."""
    base_model = _base_model(tmp_path, template=template)
    judge = LocalJudge(base_model, batch_size=2)
    replies = judge.judge(WORDS)
    assert (judge.cost.requests, judge.cost.tokens) == (5, sum(reply.tokens for reply in replies))
    assert replies == LocalJudge(base_model, batch_size=2).judge(WORDS)
    alone = LocalJudge(base_model, batch_size=5).judge(WORDS)
    assert [reply.text for reply in replies] == [reply.text for reply in alone], "a question's answer depends on others"
    ids = {token: number for number, token in enumerate(["<pad>", "<end>", *LETTERS, "A", "B"])}
    model = load_reference(base_model, None)
    for words, reply in zip(WORDS, replies, strict=True):
        text = (f"u {words} e a " if template else words) + ANSWER_PREFIX + " "
        row = [1] * (template is None) + [ids[letter] for letter in text.replace(" ", "Ġ") if letter in ids]
        with torch.no_grad():
            a, b = model(torch.tensor([row])).logits[0, -1, [ids["A"], ids["B"]]].tolist()
        share = 1 / (1 + torch.tensor(b - a).exp().item())
        letter, probability = ("A", share) if a > b else ("B", 1 - share)
        assert reply.text[:3] == f"{letter}: "
        assert float(reply.text[3:]) == pytest.approx(probability, abs=2e-4)
        assert reply.tokens == len(row) + 1
    assert len({reply.text for reply in replies}) == 5, "the model answers the same whatever it reads"


def test_the_local_judge_is_the_default_asks_nobody_and_needs_letters(tmp_path: Path) -> None:
    judge = load_judge(JudgeParams(prompts=1), _base_model(tmp_path / "base_model"), batch_size=1)
    assert isinstance(judge, LocalJudge)
    assert not (tmp_path / ".rlhf").exists()
    with pytest.raises(ModelError, match=r"cannot tell A from B .*set evaluate\.llm_judge to null"):
        LocalJudge(_base_model(tmp_path / "none", LETTERS), batch_size=1)


WHO = {"kind": "endpoint", "model": "m", "base_url": "http://x/v1"}
REPLY = Reply(text="A\u2028\n\U0001f600", model="m-1", tokens=3)


def test_what_was_written_is_there_next_time_but_a_torn_line_which_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    cache = JudgeCache(path)
    assert "k" not in cache
    cache.add("k", WHO, REPLY)
    assert JudgeCache(path)["k"] == cache["k"] == REPLY
    JudgeCache(path).add("l", WHO, REPLY)
    assert JudgeCache(path)["k"] == JudgeCache(path)["l"] == REPLY
    whole = path.read_bytes()
    for cut in (1, 5, len(whole.splitlines()[1])):
        path.write_bytes(whole[:-cut])
        cache = JudgeCache(path)
        assert "k" in cache
        assert "l" not in cache
        cache.add("l", WHO, REPLY)
        assert path.read_bytes() == whole
    path.write_bytes(whole + b'{"id": "m"}\n')
    with pytest.raises(DataError, match=r"answers\.jsonl:3: not a CacheEntry: judge: Field required"):
        JudgeCache(path)


def test_the_key_is_that_of_everything_that_the_answer_may_depend_on() -> None:
    request = {"messages": [{"role": "user", "content": "?"}], "temperature": 0}
    key = request_key(WHO, request)
    assert key == request_key(dict(reversed(WHO.items())), dict(reversed(request.items())))
    others = [request_key(WHO | {name: "other"}, request) for name in WHO]
    others += [request_key(WHO, request | change) for change in ({"temperature": 1}, {"messages": []}, {"top_p": 1})]
    assert len({key, *others}) == 7
