"""MLflow's page in a browser: the view whose link `rlhf ui` prints, on two pipelines."""

import re
import shutil
import signal
from typing import Any

import pytest

from flows.services import free_port
from tasks.runtime import mlflow_pipeline
from tasks.runtime.stage_runner import Outcome
from tests.pipeline.conftest import PATIENCE, Project, answers, wait_for

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")]


def write_pipelines(*names: str) -> None:
    for number, name in enumerate(names, 1):
        history = [{"step": step, "kl": step * number, "reward": step + number} for step in (1.0, 2.0, 3.0)]
        with mlflow_pipeline.pipeline_run(name, {}) as run:
            run.log_stage(Outcome("ppo", "executed", "key", (f"ppo.kl_coef: 0 → {number}",), 1.0, {}, history))
            run.log_stage(Outcome("evaluate", "executed", "key", (), 1.0, {"ppo.win_rate": 0.5 + number / 10}, []))


def test_two_pipelines_are_side_by_side_behind_the_link(fresh: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_ROOT", str(fresh.root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{fresh.root / 'mlflow.db'}")
    write_pipelines("one", "two")
    port = free_port()
    process = fresh.start("ui", "--port", str(port))
    try:
        assert process.stdout
        link = next(found[1] for line in process.stdout if (found := re.search(r"side by side: (http\S+)", line)))
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"))
        texts = page_texts(link)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert {"kl_coef=1", "kl_coef=2"} <= set(texts)
    titles = [text for text in texts if text.startswith(("Win rate over SFT", "Reward", "KL to SFT"))]
    assert len(titles) == 3, texts
    assert titles[0].startswith("Win rate"), "the sections stand in their order, before those that MLflow adds"
    assert "kl_coef=2 (ppo/reward)" in texts, "a line of the chart"


def page_texts(link: str) -> list[str]:
    """The lines that the page shows."""
    with sync_api.sync_playwright() as playwright:
        browser: Any = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1400})
        page.goto(link)
        page.get_by_text("kl_coef=2 (ppo/reward)").first.wait_for(timeout=PATIENCE * 1000)
        texts = [line.strip() for line in page.inner_text("body").splitlines()]
        browser.close()
    return texts
