"""`rlhf rollouts`: which rollouts it shows, and its page in a browser, with 10,000 responses."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.cli import rollouts
from tasks.core.errors import ConfigError
from tasks.evals.rollouts_page import render_page
from tasks.runtime import dvc_repo, mlflow_pipeline, mlflow_runs, provenance, registry
from tasks.runtime.dvc_stages import Inputs
from tasks.runtime.stage_runner import Outcome
from tests.support.rollouts import many, record, write_stage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror=\"document.title='gone'\"></script><script>document.title = 'gone'</script>"


@pytest.fixture
def restored(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose cache gives for each md5 a file with the md5 in it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")

    def restore(md5: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(md5)

    monkeypatch.setattr(dvc_repo, "restore", restore)
    return root


def texts(folders: dict[str, Path]) -> dict[str, tuple[str, str]]:
    names = ("rollouts.jsonl", "history.csv")
    return {stage: tuple((folder / name).read_text() for name in names) for stage, folder in folders.items()}  # type: ignore[misc]


def test_the_rollouts_of_artifacts_and_of_one_stage(root: Path, tmp_path: Path) -> None:
    for stage in ("ppo", "grpo"):
        write_stage(root / "artifacts" / stage, [record()])
    (root / "artifacts" / "dpo").mkdir()
    assert list(rollouts._find_folders(None, tmp_path)) == ["grpo", "ppo"]
    assert rollouts._find_folders("ppo", tmp_path) == {"ppo": root / "artifacts" / "ppo"}


def test_the_rollouts_of_an_mlflow_run_of_a_stage_and_of_a_pipeline(restored: Path, tmp_path: Path) -> None:
    ids = {}
    for stage in ("sft", "ppo", "grpo"):
        with mlflow_runs.stage_run(stage, Inputs(f"key of {stage}", {}), {}, {}) as run:
            own = {} if stage == "sft" else {f"artifacts/{stage}/rollouts.jsonl": f"rollouts of {stage}"}
            run.log_outputs({f"artifacts/{stage}/history.csv": f"history of {stage}", **own})
            ids[stage] = run.run_id
    with mlflow_pipeline.pipeline_run("flow", {}) as pipeline:
        for stage in ids:
            pipeline.log_stage(Outcome(stage, "executed", f"key of {stage}", (), 1.0, {}, []))
        ids["pipeline"] = pipeline.run_id
    expected = {stage: (f"rollouts of {stage}", f"history of {stage}") for stage in ("ppo", "grpo")}
    assert texts(rollouts._find_folders(ids["ppo"], tmp_path / "one")) == {"ppo": expected["ppo"]}
    assert texts(rollouts._find_folders(ids["pipeline"], tmp_path / "all")) == expected
    assert rollouts._find_folders(ids["sft"], tmp_path) == {}
    with pytest.raises(ConfigError, match=r"MLflow at sqlite\S+ has no run '0{32}'; stages here .*: none"):
        rollouts._find_folders("0" * 32, tmp_path)


def test_the_rollouts_of_a_registered_version(restored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = {"artifacts/ppo/rollouts.jsonl": "rollouts", "artifacts/ppo/history.csv": "history", "a/adapter": "x.dir"}
    made_from = SimpleNamespace(stages={"ppo": SimpleNamespace(outputs=outputs), "grpo": None})
    monkeypatch.setattr(registry, "find", lambda name: {"champion": SimpleNamespace(policy="ppo")}[name])
    monkeypatch.setattr(provenance, "provenance_of", lambda version: made_from)
    assert texts(rollouts._find_folders("champion", tmp_path)) == {"ppo": ("rollouts", "history")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, tmp_path: Path, **stages: Path) -> Any:
    path = tmp_path / "rollouts.html"
    path.write_text(render_page(stages, "", has_report=False), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1280, "height": 900}, offline=True)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text))
    page.goto(path.as_uri())
    page.locator(".token").first.wait_for()
    return page


def shown(page: Any) -> list[str]:
    """Texts of the responses that match the filter."""
    page.wait_for_timeout(300)  # a search waits until the typing ends
    return list(page.locator(".answer:not(.other) .text").all_inner_texts())


@pytest.mark.slow
def test_ten_thousand_responses_are_shown_filtered_and_turned_over(browser: Any, tmp_path: Path) -> None:
    ppo, grpo = many(5000, group=1, updates=25, seed=0), many(5000, group=4, updates=25, seed=1)
    needle = record(7, 9999, 0, (" need", "le", ""), ended=False, reward=-20.0)
    stages = {
        "ppo": write_stage(tmp_path / "ppo", ppo, truncation=(0.0,) * 20 + (0.3,) * 5),
        "grpo": write_stage(tmp_path / "grpo", [*grpo[:-1], needle]),
    }
    page = opened(browser, tmp_path, **stages)
    assert page.inner_text("#count") == "10,000 of 10,000 responses, of 6,251 prompts"
    assert page.locator(".token").count() < 30 * 40, "a page of them, not all"
    first = shown(page)
    assert first[0] == "".join(ppo[0]["tokens"]) + "‹end›"
    page.get_by_role("button", name="Next").click()
    assert page.inner_text("#place").startswith("page 2 of ")
    assert shown(page)[0] != first[0]
    page.get_by_label("Search").fill("NEEDLE")
    assert shown(page) == [" needle‹end›"]
    page.get_by_label("Ending").select_option("ended by itself")
    assert shown(page) == []
    assert page.inner_text("#place") == "nothing matches"
    page.get_by_label("Ending").select_option("all")
    page.get_by_label("Search").fill("")
    page.get_by_label("Reward to").fill("-10")
    assert shown(page) == [" needle‹end›"]
    page.get_by_label("Reward to").fill("")
    page.get_by_label("Order").select_option("lowest reward")
    assert shown(page)[0] == " needle‹end›"
    page.get_by_label("Detector fired").select_option("truncation")
    assert page.inner_text("#count").startswith("1,000 of 10,000 responses"), "updates 21 to 25 of PPO"
    page.get_by_label("Update").select_option("21")
    assert page.inner_text("#count").startswith("200 of 10,000 responses")
    page.get_by_label("Detector fired").select_option("any or none")
    page.get_by_label("Stage").select_option("GRPO")
    assert page.inner_text("#count") == "200 of 10,000 responses, of 50 prompts"
    assert page.problems == []


@pytest.mark.slow
def test_a_group_stands_side_by_side_with_the_numbers_of_each_token(browser: Any, tmp_path: Path) -> None:
    one = record(sample=0, tokens=("good", "\n", ""))
    two = record(sample=1, tokens=("bad",), ended=False)
    one["values"] = {"advantage": [2.0, -1.0, 0.0], "kl": [0.1, 0.2, 0.3]}
    two["values"] = {"advantage": [-2.0], "kl": [0.5]}
    page = opened(browser, tmp_path, grpo=write_stage(tmp_path, [one, two], truncation=(0.3,)))
    left, right = (page.locator(".answer").nth(place).bounding_box() for place in (0, 1))
    assert left["y"] == right["y"]
    assert "detectors: truncation" in page.inner_text(".group h2")
    tokens = page.locator(".token")
    assert [tokens.nth(place).get_attribute("class") for place in range(4)] == [
        "token plus", "token minus", "token end", "token minus",
    ]  # fmt: skip
    assert [tokens.nth(place).get_attribute("style") for place in (0, 1)] == ["--share: 100%;", "--share: 50%;"]
    assert tokens.nth(1).get_attribute("title") == "advantage -1 · KL 0.2"
    assert page.locator("#quantity option").all_inner_texts() == ["advantage", "KL"], "only what was recorded"
    page.get_by_label("Colour by").select_option("KL")
    assert tokens.nth(3).get_attribute("class") == "token plus"
    page.locator(".text").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#detail") == 'token 2 of 3, "\\n": advantage -1 · KL 0.2'
    page.get_by_label("Search").fill("bad")
    assert shown(page) == ["bad"]
    assert page.locator(".answer").count() == 2, "the whole group"
    page.get_by_label("whole groups").uncheck()
    page.wait_for_timeout(300)
    assert page.locator(".answer").count() == 1


@pytest.mark.slow
def test_hostile_text_stays_text(browser: Any, tmp_path: Path) -> None:
    tokens = (HOSTILE, "\u202eabc", "")
    row = record(prompt=HOSTILE, tokens=tokens, components={HOSTILE: 1.0})
    page = opened(browser, tmp_path, ppo=write_stage(tmp_path, [row]))
    assert page.locator(".token").first.inner_text() == HOSTILE
    assert page.inner_text(".prompt") == HOSTILE
    assert page.locator("img").count() == 0
    assert page.title() == "Rollouts"
    assert page.problems == []


@pytest.mark.slow
def test_the_turns_of_an_episode(browser: Any, tmp_path: Path) -> None:
    tokens = (" What", " time?", "", "\nUser: At", " seven.\nBot:", " At seven?", "")
    row = record(tokens=tokens, is_policy=[1, 1, 1, 0, 0, 1, 1])
    row["response"] += "\nUser: Yes."
    page = opened(browser, tmp_path, ppo=write_stage(tmp_path, [row]))
    labels = page.locator(".turn > small").all_inner_texts()
    assert labels == ["Turn 1", "Environment", "Turn 2", "Environment"]
    assert page.locator(".turn").nth(1).inner_text().split() == ["Environment", "User:", "At", "seven.", "Bot:"]
    assert page.locator(".turn").nth(3).inner_text().split() == ["Environment", "User:", "Yes."]
    assert page.locator(".environment .plus, .environment .minus").count() == 0
    assert page.locator(".token.end").count() == 2, "each turn has its end token"
