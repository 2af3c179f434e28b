import dataclasses
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tasks.evals.compare import Judged, compare
from tasks.evals.findings import Finding
from tasks.evals.report import Evidence, read_table, render, signed, visible

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Checks that tags close in order, and collects what the tests ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.text: list[str] = []
        self.headers: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if "id" in values:
            self.ids.append(str(values["id"]))
        if "aria-labelledby" in values:
            self.labels.append(str(values["aria-labelledby"]))
        if tag == "th":
            self.headers.append(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def evidence(judged: Callable[..., Judged]) -> Evidence:
    records = [
        judged(policy, str(number), gold=gold + number, proxy=gold, kl=gold, response=f" answer {policy} {number}")
        for policy, gold in (("sft", 0.0), ("ppo", 1.5), ("grpo", 1.0), ("dpo", 0.0))
        for number in range(3)
    ]
    return Evidence(
        table=compare(records, samples=50, seed=0),
        records=records,
        findings={"ppo": [Finding("repetition", "training, update 7", "it repeats itself")], "grpo": []},
        points=[
            {"method": method, "level": str(level), "kl": "4", "distance": str(distance), "gain_proxy": "1.5",
             "gain_proxy_stderr": "0.1", "gain_gold": "0.5", "gain_gold_stderr": "0.1"}
            for method, level, distance in (("best_of_n", 2, 0.4), ("best_of_n", 4, 0.8), ("ppo", 2, 1), ("ppo", 4, 2))
        ],
        fits={"ppo": {"gold": fitted("rl", 1.2, peak=1.7), "proxy": fitted("rl", 1.4, peak=None)}},
        histories={
            "ppo": [{"step": "1", "reward": "0.1", "reward/learned": "0.1", "kl": "0.0"},
                    {"step": "2", "reward": "0.4", "reward/learned": "0.4", "kl": ""}],
            "grpo": [{"step": "1", "reward": "0.2", "entropy": "3.0", "strange": "7"}],
        },
        accuracy=[{"bucket": "1-2", "pairs": "5", "accuracy": "0.8", "ceiling": "0.9"}],
        calibration=[{"predicted": "0.7", "observed": "0.6", "count": "5"}],
        samples=2,
        weights={"learned": 1.0, "repetition": 0.5},
        rated=True,
        provenance=[("Seed", "0"), ("Weights: ppo", "0123456789abcdef")],
    )  # fmt: skip


def fitted(form: str, alpha: float, peak: float | None) -> dict[str, Any]:
    interval = {"low": alpha - 0.1, "high": alpha + 0.1}
    return {"form": form, "alpha": {"mean": alpha, **interval}, "beta": {"mean": 0.5, "low": 0.4, "high": 0.6},
            "peak": peak, "peak_share": 1.0, "r2": 0.98}  # fmt: skip


def _read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [], f"never closed: {reader.open}"
    return reader


def test_page_is_well_formed_self_contained_and_the_same_each_time(evidence: Evidence) -> None:
    html = render(evidence)
    assert html == render(evidence)
    reader = _read(html)
    assert len(set(reader.ids)) == len(reader.ids)
    assert set(reader.labels) <= set(reader.ids)
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)|<script|<link|https?://""", html), "no network"
    assert "prefers-color-scheme: dark" in html
    assert "width=device-width" in html
    assert all(header.get("scope") in ("row", "col") for header in reader.headers)


def test_every_colour_of_the_figures_is_defined_in_light_and_in_dark(evidence: Evidence) -> None:
    html = render(evidence)
    for variable in set(re.findall(r"var\((--(?!own)[a-z-]+)", html)):
        assert html.count(f"{variable}: #") == 2, f"{variable} needs a light and a dark value"


def test_verdict_table_figures_samples_and_origin_are_there(evidence: Evidence) -> None:
    text = " ".join(" ".join(_read(render(evidence)).text).split())
    assert "By the gold judge, PPO (preferred on 100% of prompts, 95% interval 100–100%) and GRPO" in text
    assert "Only 3 prompts were compared" in text
    assert "1 × learned + 0.5 × repetition" in text
    for title in ("Win rates", "Reward against distance from SFT", "Length of responses", "Reward during training",
                  "Reward component: learned", "Distance from SFT during training", "Entropy during training",
                  "Reward model: accuracy by margin", "Reward model: calibration"):  # fmt: skip
        assert title in text
    assert "answer grpo 1" in text
    assert "answer grpo 2" not in text, "two prompts were asked for"
    assert "0123456789abcdef" in text


def test_findings_stand_above_the_results(evidence: Evidence) -> None:
    text = " ".join(" ".join(_read(render(evidence)).text).split())
    assert "PPO , training, update 7: it repeats itself." in text
    assert text.index("update 7") < text.index("Means over 3 prompts")
    clean = render(dataclasses.replace(evidence, findings={"ppo": [], "grpo": []}))
    assert "None of 10 detectors fired" in clean


def test_the_curve_of_over_optimisation_has_its_coefficients(evidence: Evidence) -> None:
    text = " ".join(" ".join(_read(render(evidence)).text).split())
    assert "Where more reward stops being better" in text
    assert "PPO gold +1.20 +1.10 to +1.30 +0.50 +0.40 to +0.60 1.7 0.98" in text
    assert "Where more reward" not in render(dataclasses.replace(evidence, points=[], fits={}))
    assert "dvc repro" in text


def test_what_does_not_exist_is_left_out(evidence: Evidence) -> None:
    text = " ".join(
        _read(render(dataclasses.replace(evidence, histories={"ppo": []}, accuracy=[], calibration=[]))).text
    )
    assert "wrote no curves" in text
    assert "How good the reward model is" not in text


def test_a_weight_of_the_kl_penalty_is_drawn_only_where_it_changes(evidence: Evidence) -> None:
    def page(*weights: str) -> str:
        rows = [{"step": str(step), "kl_coef": weight} for step, weight in enumerate(weights)]
        return render(dataclasses.replace(evidence, histories={"ppo": rows}))

    assert "Weight of the KL penalty" in page("0.05", "0.06")
    assert "Weight of the KL penalty" not in page("0.05", "0.05")


def test_a_policy_cannot_write_into_the_page(evidence: Evidence, judged: Callable[..., Judged]) -> None:
    evil = judged("sft", "0", response=" <script>alert('x')</script>\x00\x1b[31m", prompt="<b>bold", ended=False)
    empty = judged("ppo", "0", response="")
    html = render(dataclasses.replace(evidence, records=[evil, empty], table=compare([evil, empty], samples=9, seed=0)))
    assert "<script" not in html
    assert "<b>bold" not in html
    assert "\x00" not in html
    assert "\x1b" not in html
    assert "&lt;script&gt;" in html
    assert "\ufffd[31m" in html
    assert "(wrote nothing)" in html
    assert "[…cut]" in html


def test_small_helpers(tmp_path: Path) -> None:
    assert visible("a\tb\n\x07é") == "a\tb\n\ufffdé"
    assert [signed(value) for value in (1.234, -0.5, 0.001, -0.001)] == ["+1.23", "−0.50", "0.00", "0.00"]
    assert read_table(tmp_path / "none.csv") == []
    (tmp_path / "some.csv").write_text("step,kl\n1,\n")
    assert read_table(tmp_path / "some.csv") == [{"step": "1", "kl": ""}]
