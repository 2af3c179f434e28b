"""Win rate against KL of variants of PPO, GRPO and DPO at equal rollouts, over seeds: `make bench-frontier`.

Needs a finished pipeline (`rlhf run`) whose responses are single texts: all variants share its SFT policy, reward model
and gold judge. Each trains with several values of `policy_seed`, and its snapshots answer the same held-out prompts.
Writes benchmarks/frontier.csv, a line per snapshot with a digest of all settings, the CPU time of the training and
columns of `tasks.evals.compare`; what is there is not computed again. Prints the last snapshots' means over seeds, and
the differences to the stage without changes, paired by seed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from results import ROOT, Folders, make_sampler, run_stage, score_answers, settings_digest

from tasks.config.params import Params, load_params, parse_override
from tasks.core.rows import read_table, write_table
from tasks.evals.compare import REFERENCE, ScoredResponse, compare_controls
from tasks.evals.scoring import sample_prompts
from tasks.evals.statistics import t_interval
from tasks.models.loading import init_process, load_policy, load_reference
from tasks.runtime.dvc_stages import graph

OUT, TABLE = ROOT / ".rlhf" / "bench-frontier", ROOT / "benchmarks" / "frontier.csv"
DRAWS, REFERENCE_DRAWS = 2, 8
COLUMNS = (
    "win_rate", "win_rate_low", "win_rate_high", "win_rate_length_controlled", "reward_gold", "gain_gold", "gain_proxy",
    "kl", "length", "truncated_share",
)  # fmt: skip
PRINTED = ("win_rate", "win_rate_length_controlled", "reward_gold", "gain_proxy", "kl", "length", "truncated_share")

Line = Mapping[str, Any]

LEAVE_ONE_OUT = (
    "ppo.advantage=leave_one_out", "ppo.samples_per_prompt=4", "ppo.prompts_per_update=16", "ppo.value_coef=0",
)  # fmt: skip
ALL_LINEAR = ("lora.target_modules=all-linear",)
ALL_PAIRS = ("dpo.max_pairs=800",)
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "ppo": (),
    "ppo, half the learning rate": ("ppo.learning_rate*=0.5",),
    "ppo, two epochs": ("ppo.epochs=2", "ppo.learning_rate*=0.5"),
    "ppo, one step an update": ("ppo.minibatches=1", "ppo.learning_rate*=2"),
    "ppo, twice the KL coefficient": ("ppo.kl_coef*=2",),
    "ppo, KL in the loss": ("ppo.kl_penalty=loss",),
    "ppo, all linear layers": (*ALL_LINEAR, "ppo.learning_rate*=0.5"),
    "ppo, rank 4": ("lora.r=4", "lora.alpha=8"),
    "ppo, leave one out": LEAVE_ONE_OUT,
    "ppo, leave one out of eight": (*LEAVE_ONE_OUT, "ppo.samples_per_prompt=8", "ppo.prompts_per_update=8"),
    "ppo, REINFORCE++": ("ppo.advantage=return", "ppo.value_coef=0"),
    "ppo, two updates of warmup": ("ppo.warmup_updates=2",),
    "ppo, values by lambda 1": ("ppo.value_lam=1.0",),
    "ppo, entropy bonus": ("ppo.entropy_coef=0.01",),
    "ppo, clip higher": ("ppo.clip_range_high=0.28",),
    "ppo, demonstrations": ("ppo.ptx_coef=0.1",),
    "ppo, six updates of 128": ("ppo.updates=6", "ppo.prompts_per_update=128", "ppo.minibatches=8"),
    "grpo": (),
    "grpo, half the learning rate": ("grpo.learning_rate*=0.5",),
    "grpo, two updates of warmup": ("grpo.warmup_updates=2",),
    "grpo, DAPO's loss": ("grpo.loss_type=dapo",),
    "grpo, Dr. GRPO": ("grpo.loss_type=dr_grpo", "grpo.scale_rewards=none"),
    "grpo, CISPO": ("grpo.loss_type=cispo", "grpo.clip_range=null", "grpo.clip_range_high=5.0"),
    "grpo, GSPO": ("grpo.importance_level=sequence",),
    "grpo, rewards not scaled": ("grpo.scale_rewards=none",),
    "grpo, clip higher": ("grpo.clip_range_high=0.28",),
    "grpo, dynamic sampling": ("grpo.resample_rounds=2",),
    "grpo, top fifth of entropies": ("grpo.top_entropy_share=0.2",),
    "grpo, twice the KL coefficient": ("grpo.kl_coef*=2",),
    "dpo": (),
    "dpo, all pairs": ALL_PAIRS,
    "dpo, all pairs, a quarter of the learning rate": (*ALL_PAIRS, "dpo.learning_rate*=0.25"),
    "dpo, all pairs, beta 0.5": (*ALL_PAIRS, "dpo.beta=0.5"),
    "dpo, all pairs, robust": (*ALL_PAIRS, "dpo.loss_type=robust", "dpo.label_smoothing=0.2"),
    "dpo, all pairs, IPO": (*ALL_PAIRS, "dpo.loss_type=ipo"),
}
"""Name, whose first word is the stage → settings; `*=` multiplies what params.yaml has."""


def score(params: Params, folders: Folders, loaders: Mapping[str, Any], draws: int) -> list[ScoredResponse]:
    """Responses of each policy to the held-out prompts, with their scores."""
    prompts = sample_prompts(folders["prepare"] / "prompts" / "test.jsonl", params.evaluate.prompts, params.seed)
    answers = make_sampler(params, folders, prompts).sample_each(loaders, samples_per_prompt=draws)
    return score_answers(params, folders, prompts, answers)


def run_variant(
    name: str, params: Params, folders: Folders, reference: list[ScoredResponse], out: Path
) -> Iterator[dict[str, object]]:
    """Train a variant, and compare a third, two thirds and all of its updates with SFT; of DPO the end alone."""
    stage, started, timed = stage_of(name), time.process_time(), out / "cpu_s"
    run_stage(stage, params, out, {need: folders[need] for need in graph()[stage]})
    if not timed.is_file():
        timed.write_text(str(round(time.process_time() - started)), encoding="utf-8")
    models = folders["base_model"], folders["sft"]
    scored = score(params, folders, {key: partial(load_policy, *models, path) for key, path in policies(out)}, DRAWS)
    table = compare_controls(reference, scored, samples=params.evaluate.bootstrap_samples, seed=params.seed)
    for update, row in table.items():
        yield {"variant": name, "policy_seed": params.policy_seed, "changes": " ".join(VARIANTS[name])} | {
            "cpu_s": timed.read_text(encoding="utf-8"), "update": update, **{key: row[key] for key in COLUMNS}
        }  # fmt: skip


def stage_of(name: str) -> str:
    """The stage that a variant changes."""
    return name.partition(",")[0]


def policies(out: Path) -> list[tuple[str, Path]]:
    """Update and folder of the snapshots at a third, two thirds and the end; `end` where a stage takes none."""
    snapshots = sorted(out.glob("policies/*"))
    if not snapshots:
        return [("end", out)]
    chosen = sorted({snapshots[-(-len(snapshots) * part // 3) - 1] for part in (1, 2, 3)})
    return [(str(int(path.name)), path) for path in chosen]


def override(params: Params, settings: Sequence[str]) -> Params:
    """The parameters with these settings, `section.key=value` or `section.key*=factor`, each section checked once."""
    values: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, times, factor = setting.partition("*=")
        section, _, name = key.partition(".")
        scaled = f"{key}={getattr(getattr(params, section), name) * float(factor)}" if times else setting
        ((section, found),) = parse_override(scaled).items()
        values[section] = values.get(section, {}) | found
    own = {section: getattr(params, section) for section in values}
    changed = {section: type(part)(**(part.model_dump() | values[section])) for section, part in own.items()}
    return params.model_copy(update=changed)


def digest(params: Params) -> str:
    """A digest of all settings but `policy_seed`: all variants of one `seed` share what that draws."""
    return settings_digest(params, frozenset({"policy_seed"}))


def print_means(lines: Sequence[Line], names: Sequence[str]) -> None:
    """Means over seeds of each variant's last snapshot, and its difference to the stage without changes."""
    last: dict[str, dict[int, Line]] = {}
    for line in lines:  # of a variant and seed the last line is the end
        last.setdefault(line["variant"], {})[int(line["policy_seed"])] = line
    for name in names:
        own = last[name]
        means = ", ".join(f"{key} {fmean(float(line[key]) for line in own.values()):.3g}" for key in PRINTED)
        print(f"{name}: {len(own)} seeds, {means}{_difference(own, last.get(stage_of(name), {}))}")


def _difference(own: Mapping[int, Line], plain: Mapping[int, Line]) -> str:
    gaps = [100 * (float(own[seed]["win_rate"]) - float(plain[seed]["win_rate"])) for seed in own if seed in plain]
    if own is plain or len(gaps) < 2:
        return ""
    student = t_interval(gaps)
    return f"; {fmean(gaps):+.1f} points of win rate (Student {student.low:+.1f} to {student.high:+.1f})"


def variants_of(params: Params, names: Collection[str] = ()) -> dict[str, Params]:
    """Name → parameters of these variants, or of all whose stage is on and whose sections are there to be changed."""
    possible = [
        name
        for name, settings in VARIANTS.items()
        if getattr(params, stage_of(name)) and all(getattr(params, key.partition(".")[0]) for key in settings)
    ]
    if unknown := set(names) - set(possible):
        sys.exit(f"no variant {', '.join(sorted(unknown))} of these parameters; there is: {'; '.join(possible)}")
    return {name: override(params, VARIANTS[name]) for name in possible if not names or name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", help=f"of: {'; '.join(VARIANTS)}; none: all whose stage is on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="values of policy_seed")
    arguments = parser.parse_args()
    if not (ROOT / "artifacts" / "evaluate" / "policies.json").is_file():
        sys.exit("the pipeline has not run yet: `rlhf run` first")
    init_process()
    params = load_params(ROOT / "params.yaml")
    if params.environment:
        sys.exit("environment is on (params.yaml), so responses are conversations; this compares single texts")
    folders = {stage: ROOT / "artifacts" / stage for stage in graph()}
    rows: list[dict[str, object]] = [dict(line) for line in read_table(TABLE)] if TABLE.is_file() else []
    asked = variants_of(params, arguments.variants)
    variants = {(name, digest(own)): own for name, own in asked.items()}
    sft = {REFERENCE: partial(load_reference, folders["base_model"], folders["sft"])}
    reference = score(params, folders, sft, REFERENCE_DRAWS)
    for (name, settings), changed in variants.items():
        done = {str(row["policy_seed"]) for row in rows if (row["variant"], row["settings"]) == (name, settings)}
        for seed in [seed for seed in arguments.seeds if str(seed) not in done]:
            own = changed.model_copy(update={"policy_seed": seed})
            out = OUT / f"{stage_of(name)}-{settings}-{seed}"
            found = [{"settings": settings} | line for line in run_variant(name, own, folders, reference, out)]
            rows += found
            write_table(TABLE, rows)
            print(*(f"{name}, seed {seed}, update {row['update']}: {row['win_rate']:.1%} at KL {row['kl']:.2f}"
                    for row in found), sep="\n", flush=True)  # fmt: skip
    stages = {stage_of(name): params for name in asked}
    known = {(name, digest(own)) for name, own in (stages | asked).items()}
    print_means([row for row in rows if (row["variant"], row["settings"]) in known], list(asked))


if __name__ == "__main__":
    main()
