from pathlib import Path

import pytest

from tasks.core.errors import DataError
from tasks.evals.llm_judge import JudgeCache, request_key
from tasks.evals.pairwise import Reply

WHO = {"kind": "endpoint", "model": "m", "base_url": "http://x/v1"}
REPLY = Reply(text="A\u2028\n\U0001f600", model="m-1", tokens=3)


def test_what_was_written_down_is_there_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    book = JudgeCache(path)
    assert "k" not in book
    book.add("k", WHO, REPLY)
    assert JudgeCache(path)["k"] == book["k"] == REPLY
    JudgeCache(path).add("l", WHO, REPLY)
    assert JudgeCache(path)["k"] == JudgeCache(path)["l"] == REPLY


def test_a_line_that_was_torn_is_forgotten_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    for key in ("k", "l"):
        JudgeCache(path).add(key, WHO, REPLY)
    whole = path.read_bytes()
    for cut in (1, 5, len(whole.splitlines()[1])):
        path.write_bytes(whole[:-cut])
        book = JudgeCache(path)
        assert "k" in book
        assert "l" not in book
        book.add("l", WHO, REPLY)
        assert path.read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    JudgeCache(path).add("k", WHO, REPLY)
    path.write_bytes(path.read_bytes() + b'{"id": "l"}\n')
    with pytest.raises(DataError, match=r"answers\.jsonl:2: not a CacheEntry: judge: Field required"):
        JudgeCache(path)


def test_the_key_is_that_of_everything_that_the_answer_may_depend_on() -> None:
    request = {"messages": [{"role": "user", "content": "?"}], "temperature": 0}
    key = request_key(WHO, request)
    assert key == request_key(dict(reversed(WHO.items())), dict(reversed(request.items())))
    others = [request_key(WHO | {name: "other"}, request) for name in WHO]
    others += [request_key(WHO, request | change) for change in ({"temperature": 1}, {"messages": []}, {"top_p": 1})]
    assert len({key, *others}) == 7
