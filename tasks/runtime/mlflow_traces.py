"""Served answers as MLflow traces, and people's feedback on them, from `POST /v1/feedback` and MLflow's page alike."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.runtime.mlflow_store import QueuedRun, open_store, queued

if TYPE_CHECKING:
    from mlflow.entities import Trace

__all__ = ["Feedback", "TraceQueue", "delete_feedback", "read_feedback"]

SERVED_TAG = "rlhf.served"
REJECTED = "preferred_over"  # the name of feedback whose value is the id of a worse answer
GONE = "RESOURCE_DOES_NOT_EXIST"  # MLflow's code
VERSION_KEY, USER_KEY = "rlhf.version", "mlflow.trace.user"
PREVIEW = 1000  # characters of the texts in MLflow's list of traces

Kind = Literal["rating", "demonstration", "preference"]


@dataclass(frozen=True)
class Feedback:
    """What a person says of an answer; `prompt` and `answer` are None where the trace does not hold them.

    `value`: a number, for a thumb 1 or −1; the text that should have been the answer; or the worse answer's text, None
    where that was to another prompt or is gone.
    """

    answer_id: str
    prompt: str | None
    answer: str | None
    user: str
    kind: Kind
    value: float | str | None


class TraceQueue(QueuedRun):
    """Writes answers and feedback; a repeated write does no harm."""

    def __init__(self, queue: Path) -> None:
        super().__init__(queue)
        self._client, self._experiment = open_store()

    @queued
    def log_answer(self, answer: dict[str, Any]) -> None:
        """Record an answer: id, time and latency in ms, version, user, tokens, finish, and texts if they may be."""
        from mlflow.entities import Span, TraceInfo, TraceLocation, TraceState
        from mlflow.tracing.client import TracingClient

        prompt, text, start = answer.get("prompt"), answer.get("answer"), answer["time"]
        usage = {f"{name}_tokens": answer[f"{name}_tokens"] for name in ("input", "output")}
        usage["total_tokens"] = sum(usage.values())
        info = TraceInfo(
            trace_id=answer["id"],
            trace_location=TraceLocation.from_experiment_id(self._experiment),
            request_time=start,
            execution_duration=answer["latency"],
            state=TraceState.OK,
            request_preview=prompt and prompt[:PREVIEW],
            response_preview=text and text[:PREVIEW],
            trace_metadata={
                VERSION_KEY: str(answer["version"]),
                USER_KEY: answer["user"],
                "rlhf.finish_reason": answer["finish_reason"],
                "mlflow.trace.tokenUsage": json.dumps(usage),
            },
            tags={"mlflow.traceName": f"version {answer['version']}", SERVED_TAG: "true"},
        )
        client = TracingClient(self._client.tracking_uri)
        client.start_trace(info)
        client.log_spans(self._experiment, [Span.from_dict(_span(answer, usage))])

    @queued
    def log_feedback(self, feedback: dict[str, Any]) -> None:
        """Record feedback: id, answer's id, user, kind and value; dropped if the answer's trace was deleted."""
        from mlflow.entities import AssessmentSource, Expectation
        from mlflow.entities import Feedback as MLflowFeedback
        from mlflow.exceptions import MlflowException
        from mlflow.tracing.client import TracingClient

        make = Expectation if feedback["kind"] == "correction" else MLflowFeedback
        source, key = AssessmentSource("HUMAN", feedback["user"]), {"rlhf.id": feedback["id"]}
        client, answer_id = TracingClient(self._client.tracking_uri), feedback["answer_id"]
        try:
            known = client.get_trace_info(answer_id).assessments
        except MlflowException as error:
            if error.error_code != GONE:
                raise
            return
        if key not in [item.metadata for item in known]:
            item = make(name=feedback["kind"], value=feedback["value"], source=source, metadata=key, trace_id=answer_id)
            client.log_assessment(answer_id, item)


def _span(answer: dict[str, Any], usage: dict[str, int]) -> dict[str, Any]:
    number, start = bytes.fromhex(answer["id"].removeprefix("tr-")), answer["time"] * 10**6
    attributes = {"mlflow.traceRequestId": answer["id"], "mlflow.spanType": "LLM", "mlflow.chat.tokenUsage": usage}
    if "prompt" in answer:
        attributes |= {"mlflow.spanInputs": {"prompt": answer["prompt"]}, "mlflow.spanOutputs": answer["answer"]}
    return {
        "trace_id": base64.b64encode(number).decode(),
        "span_id": base64.b64encode(number[:8]).decode(),
        "parent_span_id": None,
        "name": "answer",
        "start_time_unix_nano": start,
        "end_time_unix_nano": start + answer["latency"] * 10**6,
        "events": [],
        "status": {"code": "STATUS_CODE_OK", "message": ""},
        "attributes": {key: json.dumps(value) for key, value in attributes.items()},
    }


def read_feedback() -> Iterator[Feedback]:
    """Every person's feedback on served answers, the oldest answer first; what models say of them is left out."""
    for trace in _served_traces("timestamp_ms ASC"):
        assessments: list[Any] = trace.info.assessments
        given = [item for item in assessments if item.source.source_type == "HUMAN" and item.valid is not False]
        prompt, text = _texts(trace.info.trace_id) if given else (None, None)
        for item in sorted(given, key=lambda item: item.create_time_ms or 0):
            if meaning := _meaning(item, prompt):
                yield Feedback(trace.info.trace_id, prompt, text, str(item.source.source_id), *meaning)


def _meaning(item: Any, prompt: str | None) -> tuple[Kind, float | str | None] | None:
    """Kind and value of `Feedback` by an assessment's name and type; None: words, from which no row can be made."""
    value = item.value
    if item.name == REJECTED:
        other_prompt, other = _texts(str(value))
        return "preference", other if other_prompt == prompt else None
    if isinstance(value, str):
        return ("demonstration", value) if item.expectation is not None else None
    if isinstance(value, bool):
        return "rating", 1.0 if value else -1.0
    return ("rating", float(value)) if isinstance(value, int | float) else None


def _texts(trace_id: str) -> tuple[str | None, str | None]:
    """Prompt and answer of a trace, each None if it does not hold it or is gone."""
    client, _ = open_store()
    from mlflow.exceptions import MlflowException

    try:
        spans = client.get_trace(trace_id, display=False).data.spans
    except MlflowException as error:
        if error.error_code != GONE:
            raise
        return None, None
    texts = [((span.inputs or {}).get("prompt"), span.outputs) for span in spans]
    return texts[0] if texts else (None, None)


def delete_feedback(users: set[str]) -> int:
    """Delete the answers that were given to these users, and their feedback on other answers; return how many."""
    client, experiment = open_store()
    from mlflow.tracing.client import TracingClient

    tracing, traces, count = TracingClient(client.tracking_uri), list(_served_traces()), 0
    for trace in traces:
        for item in trace.info.assessments:
            if item.source.source_id in users:
                tracing.delete_assessment(trace.info.trace_id, str(item.assessment_id))
                count += 1
    own = [trace.info.trace_id for trace in traces if trace.info.trace_metadata.get(USER_KEY) in users]
    for start in range(0, len(own), 100):
        client.delete_traces(experiment, trace_ids=own[start : start + 100])
    return count + len(own)


def _served_traces(order: str = "timestamp_ms DESC") -> Iterator[Trace]:
    client, experiment = open_store()
    token, which = None, f"tags.`{SERVED_TAG}` = 'true'"
    while True:
        page = client.search_traces(
            locations=[experiment], filter_string=which, order_by=[order], include_spans=False, page_token=token
        )
        yield from page
        if not (token := page.token):
            return
