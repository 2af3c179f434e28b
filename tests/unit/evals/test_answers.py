from pathlib import Path

import pytest

from tasks.core.errors import DataError
from tasks.evals.answers import AnswerBook, key_of
from tasks.evals.pairwise import Reply

WHO = {"kind": "endpoint", "model": "m", "base_url": "http://x/v1"}
REPLY = Reply(text="A\u2028\n\U0001f600", model="m-1", tokens=3)


def test_what_was_written_down_is_there_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    book = AnswerBook(path)
    assert "k" not in book
    book.add("k", WHO, REPLY)
    assert AnswerBook(path)["k"] == book["k"] == REPLY
    AnswerBook(path).add("l", WHO, REPLY)
    assert AnswerBook(path)["k"] == AnswerBook(path)["l"] == REPLY


def test_a_line_that_was_torn_is_forgotten_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    for key in ("k", "l"):
        AnswerBook(path).add(key, WHO, REPLY)
    whole = path.read_bytes()
    for cut in (1, 5, len(whole.splitlines()[1])):
        path.write_bytes(whole[:-cut])
        book = AnswerBook(path)
        assert "k" in book
        assert "l" not in book
        book.add("l", WHO, REPLY)
        assert path.read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerBook(path).add("k", WHO, REPLY)
    path.write_bytes(path.read_bytes() + b'{"id": "l"}\n')
    with pytest.raises(DataError, match=r"answers\.jsonl:2: not a Entry: judge: Field required"):
        AnswerBook(path)


def test_the_key_is_that_of_everything_that_the_answer_may_depend_on() -> None:
    request = {"messages": [{"role": "user", "content": "?"}], "temperature": 0}
    key = key_of(WHO, request)
    assert key == key_of(dict(reversed(WHO.items())), dict(reversed(request.items())))
    others = [key_of(WHO | {name: "other"}, request) for name in WHO]
    others += [key_of(WHO, request | change) for change in ({"temperature": 1}, {"messages": []}, {"top_p": 1})]
    assert len({key, *others}) == 7
