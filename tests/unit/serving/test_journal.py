"""Answers and feedback on their way to a real store of MLflow."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import StageError
from tasks.runtime import mlflow_store
from tasks.runtime.mlflow_traces import Feedback, TraceQueue, delete_feedback, read_feedback
from tasks.serving import journal

ROOT = Path(__file__).resolve().parents[3]
FIRST, SECOND = "tr-" + "1" * 32, "tr-" + "2" * 32


def answer(answer_id: str, **more: Any) -> dict[str, Any]:
    row = {"id": answer_id, "time": 1_700_000_000_000, "latency": 20, "version": 3, "user": "person-a"}
    return (
        row
        | {"finish_reason": "stop", "input_tokens": 2, "output_tokens": 3, "prompt": "a b", "answer": " c d e"}
        | more
    )


def remark(number: int, answer_id: str, kind: str, value: Any, user: str = "person-b") -> dict[str, Any]:
    return {"id": str(number), "answer_id": answer_id, "kind": kind, "value": value, "user": user}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("store")
    (root / "dvc.yaml").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_ROOT", str(root))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield root


@pytest.fixture
def idle(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose MLflow is away."""
    monkeypatch.setattr(journal, "deliver", lambda: None)
    return root


KILLED = """
import os, sys
from tasks.serving import journal
from tasks.runtime.mlflow_traces import TraceQueue
journal.deliver = lambda: None
kept = journal.Journal()
for number in range(100):
    kept.append(TraceQueue.log_feedback, {"id": number}, durable=True)
    print(number, flush=True)
    if number == 50:
        os.kill(os.getpid(), 9)
"""


def test_what_a_killed_server_acknowledged_is_delivered_by_the_next(idle: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    acknowledged = [int(line) for line in done.stdout.split()]
    lines = [json.loads(line) for line in journal.waiting_lines()]
    assert [args[0]["id"] for name, _, args, _ in lines] == acknowledged == list(range(51))
    delivered: list[str] = []

    class Taker(TraceQueue):
        def __init__(self, queue: Path) -> None:
            mlflow_store.QueuedRun.__init__(self, queue)

        def _call(self, line: str) -> None:
            delivered.append(line)

    mlflow_store.flush_stale(journal.journal_dir(), Taker)
    assert len(delivered) == 51
    assert journal.waiting_lines() == []


def test_a_full_journal_refuses_and_counts(idle: Path) -> None:
    kept = journal.Journal(max_bytes=200)
    kept.append(TraceQueue.log_feedback, {"id": 1}, durable=False)
    with pytest.raises(StageError, match="is full; nothing was stored"):
        kept.append(TraceQueue.log_feedback, {"id": "x" * 200}, durable=True)
    assert (kept.dropped, len(journal.waiting_lines())) == (1, 1)
    kept.close()


def test_answers_and_feedback_reach_mlflow_once_and_can_be_deleted(store: Path) -> None:
    rows = [
        (TraceQueue.log_answer, answer(FIRST)),
        (TraceQueue.log_answer, answer(SECOND, answer=" x", user="person-b")),
        (TraceQueue.log_feedback, remark(1, FIRST, "thumb", False)),
        (TraceQueue.log_feedback, remark(2, FIRST, "correction", " z")),
        (TraceQueue.log_feedback, remark(3, FIRST, "preferred_over", SECOND)),
        (TraceQueue.log_feedback, remark(4, SECOND, "rating", 0.5, user="person-a")),
        (TraceQueue.log_feedback, remark(5, "tr-" + "3" * 32, "thumb", True)),
    ]
    folder = journal.journal_dir()
    folder.mkdir(parents=True)
    lines = [json.dumps([write.__qualname__, 0, [content], {}]) + "\n" for write, content in rows]
    for name in ("a", "b"):  # the second as after a kill in the middle of the first delivery
        (folder / f"{name}.jsonl").write_text("".join(lines))
    journal.deliver()
    assert list(folder.iterdir()) == []
    first, second = ("a b", " c d e"), ("a b", " x")
    expected = {
        Feedback(FIRST, *first, "person-b", "rating", -1.0),
        Feedback(FIRST, *first, "person-b", "demonstration", " z"),
        Feedback(FIRST, *first, "person-b", "preference", " x"),
        Feedback(SECOND, *second, "person-a", "rating", 0.5),
    }
    found = list(read_feedback())
    assert len(found) == 4
    assert set(found) == expected
    client, _ = mlflow_store.open_store()
    info = client.get_trace(FIRST).info
    assert (info.execution_duration, info.trace_metadata["rlhf.version"]) == (20, "3")
    assert info.token_usage == {"input_tokens": 2, "output_tokens": 3, "total_tokens": 5}
    assert delete_feedback({"person-b"}) == 4, "her answer, and her three remarks on the other"
    assert list(read_feedback()) == []
    assert os.listdir(folder) == []
