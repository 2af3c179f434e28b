"""Where PPO's gold reward turns down, and what holds it up, over seeds: `make bench-overoptimisation`.

Needs a finished pipeline (`rlhf run`): SFT and the gold judge are its own. The preset `overoptimised` is trained on
them under several seeds, each with pairs, reward model and policy of its own, and then with a cure. Writes
benchmarks/overoptimisation.csv, a line per snapshot, and a plot of all of them; what is there is not computed again.
Prints each run's peak and end by the gold judge, what a KL budget and a stop at a detector would have kept, the turn by
the fit of Gao et al. 2022 (arXiv 2210.10760), the same with every text closed, and Student's intervals over the seeds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from frontier import override
from results import DRAWS, ROOT, Folders, make_sampler, run_stage, settings_digest

from tasks.config.params import Params, load_params, load_preset, write_overrides
from tasks.core.paths import DISABLED_MARKER
from tasks.core.rows import read_table, write_table
from tasks.evals.compare import REFERENCE
from tasks.evals.overoptimisation import fit_curve
from tasks.evals.scoring import load_gold_reward, sample_prompts
from tasks.evals.statistics import t_interval
from tasks.models.loading import init_process, load_policy, load_reference
from tasks.rl.hacking import detectors_fired
from tasks.runtime.dvc_stages import graph

OUT, TABLE = ROOT / ".rlhf" / "bench-overoptimisation", ROOT / "benchmarks" / "overoptimisation.csv"
PLOT = ROOT / "docs" / "overoptimisation.svg"
PRESET, CHAIN = "overoptimised", ("preferences", "reward_model", "ppo", "overoptimisation")

NO_CURE, KL_BUDGET = "none", 10.0
CURES: Mapping[str, tuple[str, ...]] = {
    NO_CURE: (),
    "KL penalty": ("ppo.kl_coef=0.05",),
    "ensemble": ("reward_model.ensemble_size=4", "reward.ensemble_reduction=uncertainty"),
}
"""What holds the policy back → settings."""

Line = Mapping[str, Any]


def preset_params() -> Params:
    """The parameters of the project with the preset over them."""
    OUT.mkdir(parents=True, exist_ok=True)
    copy = OUT / "params.yaml"
    shutil.copy(ROOT / "params.yaml", copy)
    write_overrides(copy, [load_preset(ROOT, PRESET)])
    return load_params(copy)


def run_seed(params: Params, cure: str, seed: int) -> list[dict[str, Any]]:
    """Train a reward model and PPO, and measure PPO's snapshots; a line of each."""
    own = override(params, CURES[cure]).model_copy(update={"seed": seed, "policy_seed": seed})
    folders = {stage: ROOT / "artifacts" / stage for stage in graph()} | {"grpo": disabled_stage()}
    is_same = (seed, own.reward_model) == (params.seed, params.reward_model)
    for stage in CHAIN[2:] if is_same else CHAIN:  # the pipeline's own reward model, if it is the same
        out = OUT / settings_digest(own) / f"seed-{seed}" / stage
        run_stage(stage, own, out, {need: folders[need] for need in graph()[stage]})
        folders[stage] = out
    rows = read_table(folders["ppo"] / "history.csv")
    fired = detectors_fired([{key: float(value) for key, value in row.items() if value} for row in rows])
    found = "; ".join(f"{detector.name} {update}" for detector, update, _ in sorted(fired, key=itemgetter(1)))
    points = [row for row in read_table(folders["overoptimisation"] / "points.csv") if row["method"] == "ppo"]
    ends = [max(points, key=lambda row: float(row["gain_gold"]))["level"], points[-1]["level"]]
    closed = gain_when_closed(own, folders, ends)
    return [
        {"cure": cure, "seed": seed, "update": point["level"], "detectors": found}
        | {key: point[key] for key in ("kl", "gain_proxy", "gain_gold", "gain_gold_stderr")}
        | {"gain_gold_closed": closed.get(point["level"], "")} for point in points
    ]  # fmt: skip


def gain_when_closed(params: Params, folders: Folders, updates: Sequence[str]) -> dict[str, float]:
    """Gold gain over SFT of the snapshots after these updates, where each text is closed with a full stop.

    A policy that is paid by the word does not end its texts, and the judge holds that against them. This is the gain
    without it: fresh draws, SFT's closed as well.
    """
    assert params.overoptimisation is not None
    prompts_file = folders["prepare"] / "prompts" / "test.jsonl"
    prompts = sample_prompts(prompts_file, params.overoptimisation.prompts, params.seed)
    models, snapshots = (folders["base_model"], folders["sft"]), sorted((folders["ppo"] / "policies").iterdir())
    loaders: dict[str, Any] = {REFERENCE: partial(load_reference, *models)}
    kept = {str(int(path.name)): path for path in snapshots}
    loaders |= {update: partial(load_policy, *models, kept[update]) for update in updates}
    answers = make_sampler(params, folders, prompts).sample_each(loaders, samples_per_prompt=DRAWS)
    gold = load_gold_reward(prompts, folders["base_model"], folders["gold_judge"])
    texts = [answer.response.rstrip(" ,;:-") + ("" if answer.ended else ".") for answer in answers]
    scores = np.asarray(gold([answer.prompt.prompt for answer in answers], texts), dtype=float)
    own = {name: scores[[answer.policy == name for answer in answers]] for name in loaders}
    base = own.pop(REFERENCE)
    return {name: round(float((values.mean() - base.mean()) / base.std(ddof=1)), 6) for name, values in own.items()}


def disabled_stage() -> Path:
    """A folder like that of a stage that is off."""
    (OUT / "off" / "adapter").mkdir(parents=True, exist_ok=True)
    (OUT / "off" / "adapter" / DISABLED_MARKER).touch()
    return OUT / "off"


def last_while(lines: Sequence[Line], holds: Callable[[Line], bool]) -> Line | None:
    """The last of the first snapshots for which this holds; None where it does not hold for the first."""
    kept = list(takewhile(holds, lines))
    return kept[-1] if kept else None


def print_summary(lines: Sequence[Line]) -> None:
    """A line per run, and the means over seeds of each cure."""
    for cure in dict.fromkeys(line["cure"] for line in lines):
        seeds = dict.fromkeys(line["seed"] for line in lines if line["cure"] == cure)
        runs = [[line for line in lines if (line["cure"], line["seed"]) == (cure, seed)] for seed in seeds]
        found = {f"{cure}, seed {run[0]['seed']}": describe(run) for run in runs}
        for name, columns in found.items():
            print(f"{name}: " + "; ".join(f"{key} {value:.2f}" for key, value in columns.items()))
        for key in dict.fromkeys(key for columns in found.values() for key in columns):
            own = [columns[key] for columns in found.values() if key in columns]
            if len(own) > 1:
                student = t_interval(own)
                print(f"{cure}, {len(own)} seeds: {key} {student.mean:.2f} ({student.low:.2f} to {student.high:.2f})")


def describe(run: Sequence[Line]) -> dict[str, float]:
    """Gains over SFT in its standard deviations, where there is such a snapshot, and where gold turns."""
    peak, end = max(run, key=lambda line: float(line["gain_gold"])), run[-1]
    places = {"at the peak": peak, "at the end": end}
    places[f"within {KL_BUDGET:g} nats"] = last_while(run, lambda line: float(line["kl"]) <= KL_BUDGET)
    for found in filter(None, end["detectors"].split("; ")):
        name, update = found.split()
        places[f"before {name}"] = last_while(run, lambda line, stop=int(update): int(line["update"]) < stop)
    gold = {f"gold {place}": float(line["gain_gold"]) for place, line in places.items() if line}
    kl, gains = (np.array([[float(line[key])] for line in run]) for key in ("kl", "gain_gold"))
    turn = fit_curve("rl", kl, gains, samples=1, seed=0).peak
    closed = {"gold at the peak, closed": peak["gain_gold_closed"], "gold at the end, closed": end["gain_gold_closed"]}
    gold |= {name: float(value) for name, value in closed.items() if value != ""}
    return {
        **gold, "gold's fall": float(peak["gain_gold"]) - float(end["gain_gold"]), "KL at the peak": float(peak["kl"]),
        "KL at the end": float(end["kl"]), "proxy at the peak": float(peak["gain_proxy"]),
        "proxy at the end": float(end["gain_proxy"]),
    } | ({} if turn is None else {"√KL of the fitted turn": turn})  # fmt: skip


def plot(lines: Sequence[Line]) -> None:
    """Proxy and gold against √KL, a panel per cure and a line per seed."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text as text, and equal bytes each time.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "overoptimisation"}
    cures = list(dict.fromkeys(line["cure"] for line in lines))
    figure = Figure(figsize=(3.2 * min(3, len(cures)), 2.8 * -(-len(cures) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(cures) // 3), min(3, len(cures)), sharex=True, sharey=True, squeeze=False)
    for axes, cure in zip(panels.flat, cures, strict=False):
        own = [line for line in lines if line["cure"] == cure]
        for seed in dict.fromkeys(line["seed"] for line in own):
            run = [line for line in own if line["seed"] == seed]
            distance = [max(float(line["kl"]), 0.0) ** 0.5 for line in run]
            for key, style in (("gain_proxy", "C1--"), ("gain_gold", "C0-")):
                axes.plot([0.0, *distance], [0.0, *(float(line[key]) for line in run)], style, linewidth=1.4)
        axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title="no cure" if cure == NO_CURE else cure, xlabel="√KL to SFT")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("gain over SFT, std. dev.")
    panels[0, 0].legend(panels[0, 0].lines[:2], ["proxy", "gold"], fontsize="small", frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cures", nargs="*", default=list(CURES), help=f"of: {'; '.join(CURES)}; none: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if unknown := set(arguments.cures) - set(CURES):
        sys.exit(f"no cure {', '.join(sorted(unknown))}; there is: {'; '.join(CURES)}")
    if not (ROOT / "artifacts" / "gold_judge" / "adapter").is_dir():
        sys.exit("the pipeline has not run yet: `rlhf run` first")
    init_process()
    params = preset_params()
    settings = settings_digest(params)
    lines: list[Line] = [line for line in read_table(TABLE) if line["settings"] == settings]
    for cure in arguments.cures:
        done = {str(line["seed"]) for line in lines if line["cure"] == cure}
        for seed in [seed for seed in arguments.seeds if str(seed) not in done]:
            lines += [{"settings": settings} | line for line in run_seed(params, cure, seed)]
            lines.sort(key=lambda line: (list(CURES).index(line["cure"]), int(line["seed"]), int(line["update"])))
            write_table(TABLE, lines)
    plot(lines)
    print_summary(lines)


if __name__ == "__main__":
    main()
