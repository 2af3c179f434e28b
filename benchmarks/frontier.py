"""Win rate against KL of variants of PPO and GRPO at equal rollouts: `make bench-frontier`.

Needs a finished pipeline (`rlhf run`): all variants share its SFT policy, reward model and gold judge, and each trains
with `policy_seed`. Their snapshots answer the same held-out prompts. Writes benchmarks/frontier.csv, a line per
snapshot with the settings, the CPU time of the training and columns of `tasks.evals.compare`; what is there is not
computed again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from results import ROOT, Folders, make_sampler, run_stage, score_answers

from tasks.config.params import Params, load_params, parse_override
from tasks.core.rows import read_table, write_table
from tasks.evals.compare import REFERENCE, ScoredResponse, compare_controls
from tasks.evals.scoring import sample_prompts
from tasks.models.loading import init_process, load_policy, load_reference

OUT, TABLE = ROOT / ".rlhf" / "bench-frontier", ROOT / "benchmarks" / "frontier.csv"
DRAWS, REFERENCE_DRAWS = 2, 8
COLUMNS = ("win_rate", "win_rate_low", "win_rate_high", "win_rate_length_controlled", "kl", "gain_proxy", "length")

LEAVE_ONE_OUT = (
    "ppo.advantage=leave_one_out", "ppo.samples_per_prompt=4", "ppo.prompts_per_update=16", "ppo.value_coef=0",
)  # fmt: skip
ALL_LINEAR = ("lora.target_modules=all-linear",)
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "ppo": (),
    "ppo, half the learning rate": ("ppo.learning_rate=1.0e-3",),
    "ppo, two epochs": ("ppo.epochs=2", "ppo.learning_rate=1.0e-3"),
    "ppo, KL coefficient 0.02": ("ppo.kl_coef=0.02",),
    "ppo, KL coefficient 0.1": ("ppo.kl_coef=0.1",),
    "ppo, all linear layers": (*ALL_LINEAR, "ppo.learning_rate=1.0e-3"),
    "ppo, rank 4": ("lora.r=4", "lora.alpha=8"),
    "ppo, leave one out": LEAVE_ONE_OUT,
    "ppo, leave one out, half the learning rate": (*LEAVE_ONE_OUT, "ppo.learning_rate=1.0e-3"),
    "ppo, leave one out, all linear layers": (*LEAVE_ONE_OUT, *ALL_LINEAR, "ppo.learning_rate=1.0e-3"),
    "ppo, leave one out of eight": (*LEAVE_ONE_OUT, "ppo.samples_per_prompt=8", "ppo.prompts_per_update=8"),
    "ppo, six updates of 128": ("ppo.updates=6", "ppo.prompts_per_update=128", "ppo.minibatches=8"),
    "grpo": (),
    "grpo, half the learning rate": ("grpo.learning_rate=1.0e-3",),
    "grpo, all linear layers": (*ALL_LINEAR, "grpo.learning_rate=1.0e-3"),
    "grpo, rewards not scaled": ("grpo.scale_rewards=none",),
    "grpo, clip higher": ("grpo.clip_range_high=0.28",),
    "grpo, KL coefficient 0.02": ("grpo.kl_coef=0.02",),
}
"""Name, whose first word is the stage → settings."""


def score(params: Params, folders: Folders, loaders: Mapping[str, Any], draws: int) -> list[ScoredResponse]:
    """Responses of each policy to the held-out prompts, with their scores."""
    prompts = sample_prompts(folders["prepare"] / "prompts" / "test.jsonl", params.evaluate.prompts, params.seed)
    answers = make_sampler(params, folders, prompts).sample_each(loaders, samples_per_prompt=draws)
    return score_answers(params, folders, prompts, answers)


def run_variant(
    name: str, base: Params, folders: Folders, reference: list[ScoredResponse]
) -> Iterator[dict[str, object]]:
    """Train a variant, and compare a third, two thirds and all of its updates with SFT."""
    stage, params = name.split(",")[0], base
    for setting in VARIANTS[name]:
        params = override(params, setting)
    out, started = OUT / name.replace(", ", "-").replace(" ", "_"), time.process_time()
    run_stage(stage, params, out, folders)
    seconds = round(time.process_time() - started)
    snapshots = sorted((out / "policies").iterdir())
    chosen = sorted({snapshots[-(-len(snapshots) * part // 3) - 1] for part in (1, 2, 3)})
    models = folders["base_model"], folders["sft"]
    scored = score(params, folders, {path.name: partial(load_policy, *models, path) for path in chosen}, DRAWS)
    table = compare_controls(reference, scored, samples=params.evaluate.bootstrap_samples, seed=params.seed)
    for update, row in table.items():
        settings = " ".join(VARIANTS[name])
        yield {"variant": name, "settings": settings, "cpu_s": seconds, "update": int(update)} | {
            key: row[key] for key in COLUMNS
        }


def override(params: Params, setting: str) -> Params:
    """The parameters with one setting, `section.key=value`."""
    ((section, values),) = parse_override(setting).items()
    own = getattr(params, section)
    return params.model_copy(update={section: type(own)(**(own.model_dump() | values))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", help=f"of: {'; '.join(VARIANTS)}; none: all")
    names = parser.parse_args().variants or list(VARIANTS)
    if not (ROOT / "artifacts" / "gold_judge" / "adapter").is_dir():
        sys.exit("the pipeline has not run yet: `rlhf run` first")
    init_process()
    params = load_params(ROOT / "params.yaml")
    stages = ("base_model", "prepare", "sft", "reward_model", "gold_judge")
    folders = {stage: ROOT / "artifacts" / stage for stage in stages}
    rows: list[dict[str, object]] = list(read_table(TABLE)) if TABLE.is_file() else []
    done = {row["variant"] for row in rows}
    sft = {REFERENCE: partial(load_reference, folders["base_model"], folders["sft"])}
    reference = score(params, folders, sft, REFERENCE_DRAWS)
    for name in names:
        if name not in done:
            rows += run_variant(name, params, folders, reference)
            write_table(TABLE, rows)
            print(*(f"{name}, update {row['update']}: {row['win_rate']:.1%} at KL {row['kl']:.2f}"
                    for row in rows if row["variant"] == name), sep="\n", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
