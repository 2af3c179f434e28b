import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import pytest

from tasks.evals import plots
from tasks.evals.compare import ScoredResponse, Table


def _row(kl: float, gain: float) -> dict[str, float]:
    row = {"kl": kl}
    for judge, key in (("gold", "win_rate"), ("vader", "win_rate_vader"), ("proxy", "win_rate_proxy")):
        row |= {f"gain_{judge}": gain, f"gain_{judge}_stderr": 0.1, key: 0.6, f"{key}_low": 0.5, f"{key}_high": 0.7}
    return row


TABLE: Table = {"sft": _row(0, 0), "ppo": _row(4, 1.0), "grpo": _row(1, 0.5)}
ROWS = [{"bucket": "0-0.5", "pairs": "9", "accuracy": "0.6", "ceiling": "0.7"},
        {"bucket": "3+", "pairs": "0", "accuracy": "", "ceiling": ""}]  # fmt: skip
CURVE = [
    {"method": method, "level": level, "distance": distance, "gain_proxy": "1.0", "gain_proxy_stderr": "0.1",
     "gain_gold": gold, "gain_gold_stderr": "0.1"}
    for method, level, distance, gold in (("best_of_n", "2", "0.5", "0.2"), ("ppo", "2", "1.0", "0.6"),
                                          ("ppo", "4", "2.0", "-0.8"))
]  # fmt: skip
FITS = {"ppo": {"gold": {"form": "rl", "alpha": {"mean": 1.0}, "beta": {"mean": 0.8}, "peak": 1.3}}}
DRAWN: dict[str, Callable[[], str]] = {
    "win_rates": lambda: plots.win_rates(TABLE),
    "reward_against_kl": lambda: plots.reward_against_kl(TABLE),
    "curve_reward": lambda: plots.curves("reward", {"ppo": [(1, 0.0), (2, 1.0)], "dpo": [(1, 2.0)]}, y_label="y"),
    "accuracy_by_margin": lambda: plots.accuracy_by_margin(ROWS),
    "calibration": lambda: plots.calibration([{"predicted": "0.6", "observed": "0.5", "count": "3"}]),
    "overoptimisation_ppo": lambda: plots.overoptimisation(CURVE, FITS)["ppo"],
    "lengths": lambda: plots.lengths({"sft": [(3, 1), (4, 0), (5, 2)], "ppo": [(900, 1)]}),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_the_same_each_time_follows_the_page_and_has_its_own_identifiers(name: str) -> None:
    svg = DRAWN[name]()
    assert svg == DRAWN[name]()
    ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))
    assert "var(--ink)" in svg
    assert "var(--line)" in svg
    assert not re.search(r"#[0-9a-f]{6}|http|font-family|<metadata|<style", svg), "a fixed colour, font or address"
    assert re.match(r'<svg viewBox="[^"]+" aria-hidden="true">', svg), "a fixed size would not fit a phone"
    identifiers = re.findall(r'\bid="([^"]+)"', svg)
    assert len(set(identifiers)) == len(identifiers)
    assert all(identifier.startswith(f"{name}-") for identifier in identifiers)
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)) <= set(identifiers)


def test_methods_of_the_curve_share_their_scales() -> None:
    """√KL goes to 2 for PPO and to 0.5 for best of n, gold from −0.8 − 0.2 to 0.8, proxy to 1.2."""
    drawn = plots.overoptimisation(CURVE, FITS)
    assert list(drawn) == ["best_of_n", "ppo"]
    ticks = [re.findall(r">([−\d.]+)<", svg) for svg in drawn.values()]
    assert ticks[0] == ticks[1]
    assert "2.0" in ticks[0] or "2.00" in ticks[0]


def test_the_names_of_near_policies_do_not_touch() -> None:
    table: Table = {"sft": _row(0, 0), "ppo": _row(4, 1.0), "grpo": _row(3.9, 0.9), "dpo": _row(3.8, 0.8)}
    svg = plots.reward_against_kl(table)
    found = {name: float(x) for x, name in re.findall(r'x="([\d.]+)"[^>]*>(PPO|GRPO|DPO)<', svg)}
    assert found["DPO"] < found["GRPO"] < found["PPO"]
    assert min(found["GRPO"] - found["DPO"], found["PPO"] - found["GRPO"]) > 30, "names are about 30 wide"


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([0.5], [0.5]),
        ([0.5, 0.8, 0.2], [0.5, 0.8, 0.2]),
        ([1.0, 0.95], [0.94, 0.82]),
        ([0.0, 0.0], [0.06, 0.18]),
        ([0.9, 0.89, 0.91], [0.79, 0.67, 0.91]),
    ],
)
def test_labels_move_only_as_far_as_they_must(shares: list[float], expected: list[float]) -> None:
    assert plots._spread_labels(shares) == pytest.approx(expected)


def test_policies_have_their_own_colours_and_names_and_a_judge_of_one_alone_is_drawn() -> None:
    svg = plots.win_rates(TABLE)
    assert all(text in svg for text in ("var(--ppo)", "var(--grpo)", ">PPO<", ">GRPO<"))
    assert not any(text in svg for text in ("var(--dpo)", ">LLM judge<"))
    rates = {"win_rate_judge": 0.6, "win_rate_judge_low": 0.5, "win_rate_judge_high": 0.7}
    assert ">LLM judge<" in plots.win_rates(TABLE | {"ppo": TABLE["ppo"] | rates})


def test_the_plane_of_reward_and_kl_reaches_every_policy() -> None:
    """√KL goes to 2 and the gain to 1, so both scales must show numbers that large."""
    svg = plots.reward_against_kl(TABLE)
    ticks = [float(text.replace("−", "-")) for text in re.findall(r">(−?\d+\.\d+)<", svg)]
    assert {1.0, 2.0} <= set(ticks), f"the points lie outside the axes: {ticks}"
    assert ticks.count(1.0) == 2
    assert ">PPO<" in plots.reward_against_kl({"sft": _row(0, 0), "ppo": _row(0, 0)})


def test_length_counts_have_no_gaps_and_many_lengths_share_bars(judged: Callable[..., ScoredResponse]) -> None:
    paths = plots.lengths({"sft": [(length, 1) for length in range(1, 2001)]}).count("var(--sft)")
    assert paths <= plots.MAX_BARS + 1
    texts = {"sft": (" a , b c", " a .", " a b c"), "ppo": ("",)}
    records = [judged(policy, str(n), response=text) for policy, own in texts.items() for n, text in enumerate(own)]
    assert plots.length_counts(records) == {"sft": [(1, 1), (2, 0), (3, 2)], "ppo": [(0, 1)]}
