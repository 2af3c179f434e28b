"""PPO under several seeds on the same SFT policy and reward model, with the number that collapse: `make bench-seeds`.

Needs a finished pipeline (`rlhf run`): it takes the stages' functions, the parameters of params.yaml and the artifacts,
and changes nothing but PPO's seed. What counts as collapsed: `tasks.evals.experiments.collapse_reason`. Unlike `rlhf
run --seeds` it draws the curves of training, into docs/ppo_seeds.svg. Prints a line per seed and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tasks.config.params import load_params
from tasks.core.paths import DISABLED_MARKER, Artifacts
from tasks.core.rows import read_table
from tasks.evals.experiments import collapse_reason
from tasks.evaluate import evaluate
from tasks.ppo import ppo

ROOT = Path(__file__).resolve().parents[1]
ARTIFACTS, OUT = ROOT / "artifacts", ROOT / ".rlhf" / "bench-seeds"
PLOT = ROOT / "docs" / "ppo_seeds.svg"
CURVES = {"reward": "Reward", "kl": "KL to the reference, nats per response", "entropy": "Entropy, nats per token"}


def run_seed(seed: int) -> dict[str, float]:
    """Train and evaluate under one seed; return the metrics of both."""
    params = load_params(ROOT / "params.yaml")
    if params.ppo is None:
        sys.exit("params.yaml switches ppo off: `git checkout params.yaml`")
    upstream = {name: ARTIFACTS / name for name in ("base_model", "sft", "reward_model", "prepare")}
    ppo_out, evaluate_out, disabled = OUT / f"ppo-{seed}", OUT / f"evaluate-{seed}", OUT / "off"
    for folder in (ppo_out, evaluate_out, disabled / "adapter"):
        folder.mkdir(parents=True, exist_ok=True)
    (disabled / "adapter" / DISABLED_MARKER).touch()
    (disabled / "points.csv").touch()
    (disabled / "fits.json").write_text("{}")
    (disabled / "results.json").write_text("{}")
    ppo(
        params.ppo, params.lora, params.generation, params.reward, params.environment, seed,
        Artifacts(**upstream, out=ppo_out),
    )  # fmt: skip
    evaluate(
        params.evaluate, params.generation, params.reward, params.environment, params.seed, Artifacts(**upstream,
        gold_judge=ARTIFACTS / "gold_judge", ppo=ppo_out, grpo=disabled, dpo=disabled, overoptimisation=disabled,
        lm_eval=disabled, out=evaluate_out),
    )  # fmt: skip
    row = json.loads((evaluate_out / "metrics.json").read_text())["ppo"]
    last = json.loads((ppo_out / "metrics.json").read_text())
    figures = {name: float(row[name]) for name in ("win_rate", "win_rate_low", "win_rate_high", "kl", "length")}
    return figures | {"reward": float(last["reward"]), "degenerate_count": float(last["degenerate_count"])}


def plot_curves(seeds: list[int]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    # Text as text, and equal bytes each time.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "seeds"}
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for seed in seeds:
            rows = read_table(OUT / f"ppo-{seed}" / "history.csv")
            axes.plot([float(row["step"]) for row in rows], [float(row[column]) for row in rows], label=f"seed {seed}")
        axes.set(title=title, xlabel="update")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    seeds = list(range(parser.parse_args().seeds))
    if not (ARTIFACTS / "gold_judge" / "adapter").is_dir():
        sys.exit("the pipeline has not run yet: `rlhf run` first")
    results = {}
    for seed in seeds:
        row = results[seed] = run_seed(seed)
        row["collapsed"] = float(collapse_reason(row, row["degenerate_count"]) is not None)
        print(
            f"seed {seed}: win rate {row['win_rate']:.1%} ({row['win_rate_low']:.1%} to {row['win_rate_high']:.1%}), "
            f"reward {row['reward']:.2f}, KL {row['kl']:.1f}, {row['length']:.1f} words",
            flush=True,
        )
    plot_curves(seeds)
    wins = [row["win_rate"] for row in results.values()]
    collapsed = sum(row["collapsed"] for row in results.values())
    print(json.dumps({"seeds": len(seeds), "collapsed": collapsed, "lowest": min(wins), "highest": max(wins)}))


if __name__ == "__main__":
    main()
