"""Latency of `rlhf serve` under load: 1,000 requests from 32 clients to the two-layer model of the tests.

The server runs in a process of its own with a real journal and a real MLflow store, in a folder that is removed at the
end. Every request must be answered, and every answer must be in MLflow in the end.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
import uvicorn

from tasks.config.training import GenerationParams
from tasks.runtime import mlflow_store
from tasks.runtime.registry import Version
from tasks.serving.access import Access
from tasks.serving.app import Recording, create_app
from tasks.serving.engine import Engine
from tasks.serving.journal import Journal, waiting_lines
from tasks.serving.versions import Served, Versions
from tests.conftest import letter_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parents[1]
MAX_TOKENS = 16
GENERATION = GenerationParams(max_new_tokens=MAX_TOKENS, temperature=1.0)


def serve(port: int) -> None:
    """Serve the model until the parent ends this process."""
    _, os.environ[mlflow_store.EXPERIMENT_ID_VAR] = mlflow_store.open_store()
    version = Version(1, "ppo", {}, {}, ("champion",), datetime.now(UTC))
    engine = Engine(tiny_model(), letter_tokenizer())
    versions = Versions("champion", find=lambda _: version, load=lambda _: Served(1, engine, GENERATION))
    asyncio.run(versions.refresh())
    access = Access(Path(os.environ["RLHF_ROOT"]) / "access.json")
    app = create_app(versions, Journal(), access, Recording(), keys=False, refresh_seconds=10)
    uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=10)).run()


async def load(url: str, requests: int, clients: int) -> tuple[list[float], int]:
    """Seconds of each answer, and how many requests had none."""
    numbers, seconds, lost = iter(range(requests)), list[float](), 0

    async def ask(client: httpx.AsyncClient) -> None:
        nonlocal lost
        for number in numbers:
            start = time.perf_counter()
            body = {"prompt": "the film is", "max_tokens": MAX_TOKENS, "seed": number, "user": f"user{number}"}
            reply = await client.post(f"{url}/v1/completions", json=body)
            lost += reply.status_code != 200
            seconds.append(time.perf_counter() - start)

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as client:
        await asyncio.gather(*[ask(client) for _ in range(clients)])
    return seconds, lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--server", action="store_true", help="be the server")
    options = parser.parse_args()
    if options.server:
        serve(options.port)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "dvc.yaml").touch()
        os.environ["RLHF_ROOT"] = folder
        url = f"http://127.0.0.1:{options.port}"
        command = [sys.executable, "-m", "benchmarks.serve", "--server", "--port", str(options.port)]
        with subprocess.Popen(command, cwd=ROOT) as server:
            try:
                wait_until_up(url, server)
                start = time.perf_counter()
                seconds, lost = asyncio.run(load(url, options.requests, options.clients))
                wall = time.perf_counter() - start
                while httpx.get(f"{url}/health", timeout=600).json()["journal"]["bytes"] or waiting_lines():
                    time.sleep(1)
                recorded = time.perf_counter() - start
            finally:
                server.terminate()
        client, experiment = mlflow_store.open_store()
        page = client.search_traces(locations=[experiment], include_spans=False, max_results=500)
        traces = len(page)
        while page.token:
            page = client.search_traces(
                locations=[experiment], include_spans=False, max_results=500, page_token=page.token
            )
            traces += len(page)
    cuts = statistics.quantiles(seconds, n=100)
    figures = {"requests": len(seconds), "clients": options.clients, "lost": lost, "traces": traces}
    figures |= {"p50_ms": round(1000 * cuts[49]), "p99_ms": round(1000 * cuts[98])}
    figures |= {"seconds": round(wall, 1), "seconds_until_recorded": round(recorded, 1)}
    print(json.dumps(figures))


def wait_until_up(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Return when the server answers."""
    while server.poll() is None:
        try:
            httpx.get(f"{url}/health", timeout=600).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.5)
    sys.exit("the server ended")


if __name__ == "__main__":
    main()
