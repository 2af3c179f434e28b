"""The table of results with its controls, over whole chains: `make bench-results`.

Needs `rlhf run base_model collect`. Each seed draws everything anew: split, SFT, reward model, gold judge, policies.
Beside the policies of the pipeline stand what a user would try first: SFT on the best rated texts (filtered behaviour
cloning), SFT on the best of several responses (RAFT: Dong et al. 2023, arXiv 2304.06767; with as many rollouts as PPO),
best-of-n by the same reward model, and the snapshots of PPO and GRPO at the KL of best-of-8. DPO learns from all pairs.
Writes benchmarks/results.csv, a line per seed and row, and prints the means over seeds last. A second call goes on: it
keeps the lines of the file that have its settings, and the trained stages of an interrupted chain in
.rlhf/bench-results. A chain takes about two hours of a core; lines of several machines can be put into one file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from tasks.config.params import Params, load_params
from tasks.core.paths import Artifacts
from tasks.core.rows import Demonstration, Prompt, Rating, read_rows, read_table, write_rows, write_table
from tasks.evals.compare import NULL, REFERENCE, ScoredResponse, by_policy, compare_controls
from tasks.evals.controls import pair_wins
from tasks.evals.overoptimisation import best_of_n_kl
from tasks.evals.scoring import (
    PolicySampler,
    SampledResponse,
    best_of_n_draws,
    human_responses,
    load_gold_reward,
    sample_prompts,
    score_responses,
    split_null,
)
from tasks.evals.seed_statistics import bootstrap_seeds, detectable_difference, variance_components, wins_by_prompt
from tasks.evals.statistics import t_interval
from tasks.models.loading import init_process, load_beside, load_policy, load_reference, load_tokenizer
from tasks.rewards.composition import load_reward
from tasks.rewards.rules.base import RewardFunction
from tasks.runtime.dvc_stages import graph
from tasks.runtime.stage_runner import stage_arguments

ROOT = Path(__file__).resolve().parents[1]
OUT, TABLE = ROOT / ".rlhf" / "bench-results", ROOT / "benchmarks" / "results.csv"
CHAIN = ("prepare", "sft", "preferences", "reward_model", "gold_judge", "ppo", "grpo", "dpo")
DRAWS, REFERENCE_DRAWS, NULL_DRAWS, RAFT_SAMPLES = 2, 8, 16, 4
Folders = Mapping[str, Path]
"""Stage → the folder of its outputs."""

Line = dict[str, Any]
"""Column → value, of a seed and row."""

MATCHED_KL = best_of_n_kl(8)
PAIRS = (
    ("ppo", "best of 16"), ("grpo", "best of 16"), ("ppo", "grpo"), ("ppo", "dpo"), ("ppo", "raft"),
    (f"ppo at KL {MATCHED_KL:.1f}", "best of 4"), (f"grpo at KL {MATCHED_KL:.1f}", "best of 4"),
)  # fmt: skip
"""Differences of win rates that are printed, paired by seed and prompt."""

COLUMNS = (
    "win_rate", "win_rate_low", "win_rate_high", "win_rate_length_controlled", "win_rate_finished",
    "win_rate_same_length", "win_rate_bound", "win_rate_vader", "win_rate_proxy", "gain_gold", "gain_proxy", "kl",
    "length", "truncated_share",
)  # fmt: skip
WIN_RATE = COLUMNS[:3]
SEEDS = frozenset({"seed", "policy_seed"})


def run_stage(stage: str, params: Params, out: Path, folders: Folders) -> None:
    """Run the function of a stage, unless its outputs are there; a mark says that they are whole."""
    if (out / "done").is_file():
        return
    print(f"{out.parent.name}: {out.name}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    function = getattr(importlib.import_module(f"tasks.{stage}"), stage)
    function(*stage_arguments(function, stage, params), Artifacts(**folders, out=out))
    (out / "done").touch()


def train_chain(params: Params, folder: Path) -> dict[str, Path]:
    """Train all stages of one seed; return their folders."""
    folders = {name: ROOT / "artifacts" / name for name in ("base_model", "collect")}
    for stage in CHAIN:
        upstream = {name: folders[name] for name in graph()[stage]}
        run_stage(stage, params, folder / stage, upstream)
        folders[stage] = folder / stage
    return folders


def demonstrations_of(texts: Sequence[Demonstration], prepare: Path, folder: Path) -> Path:
    """A folder like that of stage prepare, with these demonstrations to train on."""
    write_rows(folder / "demonstrations" / "train.jsonl", texts)
    validation = read_rows(prepare / "demonstrations" / "validation.jsonl", Demonstration)
    write_rows(folder / "demonstrations" / "validation.jsonl", validation)
    return folder


def merged_sft(folders: Folders, folder: Path) -> Path:
    """The SFT model as a base model of its own, so that an adapter trained on it stands on the reference."""
    if not (folder / "done").is_file():
        load_reference(folders["base_model"], folders["sft"]).save_pretrained(folder / "model")
        load_tokenizer(folders["base_model"]).save_pretrained(folder / "model")
        (folder / "done").touch()
    return folder


def top_rated(folders: Folders, count: int) -> list[Demonstration]:
    """The demonstrations whose texts people rated best."""
    means = {row.id: row.mean for row in read_rows(folders["prepare"] / "ratings" / "proxy" / "train.jsonl", Rating)}
    rows = read_rows(folders["prepare"] / "demonstrations" / "train.jsonl", Demonstration)
    rated = [row for row in rows if row.id in means]
    return sorted(rated, key=lambda row: (-means[row.id], row.id))[:count]


def best_responses(params: Params, folders: Folders, count: int) -> list[Demonstration]:
    """SFT's own responses to training prompts, of several each the one that the reward prefers."""
    prompts = read_rows(folders["prepare"] / "prompts" / "train.jsonl", Prompt)[:count]
    sampler = make_sampler(params, folders, prompts)
    answers = sampler.sample(REFERENCE, _load_sft(folders), samples_per_prompt=RAFT_SAMPLES)
    reward = load_reward(params.reward, prompts, Artifacts(**folders, out=OUT))
    scores = reward([answer.prompt.prompt for answer in answers], [answer.response for answer in answers]).total
    best = scores.reshape(-1, RAFT_SAMPLES).argmax(1) + torch.arange(len(prompts)) * RAFT_SAMPLES
    chosen = [answers[row] for row in best.tolist()]
    return [
        Demonstration(id=own.prompt.id, prompt=own.prompt.prompt, response=own.response)
        for own in chosen
        if own.response  # where all are empty, there is nothing to learn
    ]


def train_baselines(params: Params, folders: Folders, folder: Path) -> dict[str, Path]:
    """SFT on the best rated texts, and on the best of its own responses; both as adapters on the SFT model."""
    assert params.ppo is not None
    base, trained = merged_sft(folders, folder / "merged"), {}
    rollouts = params.ppo.updates * params.ppo.prompts_per_update * params.ppo.samples_per_prompt
    makers = {
        "top_rated": partial(top_rated, folders, params.sft.max_examples),
        "raft": partial(best_responses, params, folders, rollouts // RAFT_SAMPLES),
    }
    for name, make in makers.items():
        data = folder / f"{name}_data"
        if not data.is_dir():
            demonstrations_of(make(), folders["prepare"], data)
        run_stage("sft", params, folder / name, {"base_model": base, "prepare": data})
        trained[name] = folder / name
    return trained


def matched_snapshot(stage: Path) -> Path:
    """The snapshot whose KL in training was nearest to that of best-of-8."""
    kl = {int(row["step"]): float(row["kl"]) for row in read_table(stage / "history.csv")}
    snapshots = [path for path in sorted((stage / "policies").iterdir()) if int(path.name) + 1 in kl]
    return min(snapshots, key=lambda path: abs(kl[int(path.name) + 1] - MATCHED_KL))  # a row has the KL before its step


def evaluate_chain(params: Params, folders: Folders, baselines: Mapping[str, Path]) -> list[Line]:
    """A line of each policy and control, on the same held-out prompts; `wins` are its win rates on each of these."""
    prompts = sample_prompts(folders["prepare"] / "prompts" / "test.jsonl", params.evaluate.prompts, params.seed)
    sampler, models = make_sampler(params, folders, prompts), (folders["base_model"], folders["sft"])
    responses = sampler.sample(REFERENCE, _load_sft(folders), samples_per_prompt=REFERENCE_DRAWS + NULL_DRAWS)
    responses = split_null(responses, REFERENCE_DRAWS)
    base_model = partial(load_reference, folders["base_model"], None)
    responses += sampler.sample("base", base_model(), samples_per_prompt=DRAWS, reference=_load_sft(folders))
    policies = {name: folders[name] for name in ("ppo", "grpo", "dpo")} | dict(baselines)
    policies |= {f"{name} at KL {MATCHED_KL:.1f}": matched_snapshot(folders[name]) for name in ("ppo", "grpo")}
    loaders = {name: partial(load_policy, *models, folder) for name, folder in policies.items()}
    responses += sampler.sample_each(loaders, samples_per_prompt=DRAWS)
    responses += human_responses(prompts, folders["prepare"] / "ratings", load_tokenizer(folders["base_model"]))
    scored = score_answers(params, folders, prompts, responses)
    null = [record for record in scored if record.policy == NULL]
    for n in (2, 4, 8, 16):
        chosen = best_of_n_draws(null, n)
        scored += [record.model_copy(update={"policy": f"best of {n}"}) for record in chosen]
    reference = [record for record in scored if record.policy == REFERENCE]
    others = [record for record in scored if record.policy != REFERENCE]
    gold = load_gold_reward(prompts, folders["base_model"], folders["gold_judge"])
    table = compare_controls(reference, others, samples=params.evaluate.bootstrap_samples, seed=params.seed)
    groups = by_policy(others)
    wins = wins_by_prompt([record.model_dump() for record in scored], REFERENCE)
    return [
        {"row": name} | {key: row.get(key, "") for key in COLUMNS}
        | {"win_rate_cut": cut_win_rate(groups[name], reference, gold) if name in policies else ""}
        | {"wins": " ".join(f"{rate:.4g}" for rate in wins[name].values())} for name, row in table.items()
    ]  # fmt: skip


def cut_win_rate(group: Sequence[ScoredResponse], reference: Sequence[ScoredResponse], gold: RewardFunction) -> float:
    """Win rate of the first draws, where the longer of the two is cut to as many words as the other and judged anew."""
    base = {record.prompt_id: record.response for record in reference if record.draw == 0}
    first = [record for record in group if record.draw == 0]
    pairs = [(record.response.split(), base[record.prompt_id].split()) for record in first]
    cut = [[" " + " ".join(words[: min(map(len, pair))]) for words in pair] for pair in pairs]
    scores = (gold([record.prompt for record in first], list(texts)) for texts in zip(*cut, strict=True))
    own, others = (np.asarray(column, dtype=float)[:, None] for column in scores)
    return round(float(pair_wins(own, others).mean()), 6)


def make_sampler(params: Params, folders: Folders, prompts: Sequence[Prompt]) -> PolicySampler:
    tokenizer, size = load_tokenizer(folders["base_model"]), params.evaluate.batch_size
    beside = partial(load_beside, folders["base_model"], folders["sft"])
    return PolicySampler(tokenizer, prompts, params.generation, batch_size=size, seed=params.seed, load_beside=beside)


def score_answers(
    params: Params, folders: Folders, prompts: Sequence[Prompt], answers: Sequence[SampledResponse]
) -> list[ScoredResponse]:
    """Score the answers to the prompts by the reward and by every judge."""
    proxy = load_reward(params.reward, prompts, Artifacts(**folders, out=OUT))
    gold = load_gold_reward(prompts, folders["base_model"], folders["gold_judge"], params.evaluate.gold_rule)
    return score_responses(answers, proxy, gold, vader=params.evaluate.vader)


def _load_sft(folders: Folders) -> Any:
    return load_reference(folders["base_model"], folders["sft"])


def run_seed(params: Params, folder: Path) -> list[Line]:
    """Train and evaluate one chain."""
    assert params.dpo is not None
    assert params.preferences is not None
    all_pairs = params.dpo.model_copy(update={"max_pairs": params.preferences.train_pairs})
    params = params.model_copy(update={"dpo": all_pairs})
    folders = train_chain(params, folder)
    return evaluate_chain(params, folders, train_baselines(params, folders, folder))


def settings_digest(params: Params, apart_from: Set[str] = SEEDS) -> str:
    """What says that two lines were measured with the same settings, apart from these keys."""
    settings = params.model_dump_json(exclude=set(apart_from))
    return hashlib.sha256(settings.encode()).hexdigest()[:8]


def print_means(lines: Sequence[Line]) -> None:
    """Each row's means over seeds, the win rate's with its bootstrap over seeds and prompts; then differences."""
    wins: dict[str, list[dict[str, float]]] = {}
    for line in lines:
        rates = {f"{line['seed']}/{place}": float(rate) for place, rate in enumerate(line["wins"].split())}
        wins.setdefault(line["row"], []).append(rates)
    for name, own in wins.items():
        rows = [line for line in lines if line["row"] == name]
        found = bootstrap_seeds(own, null=0.5)
        print(f"{name}: {found['mean']:.1%} ({found['low']:.1%} to {found['high']:.1%}){_other_means(rows)}")
    for name, other in PAIRS:
        pairs = zip(wins[name], wins[other], strict=True)
        gaps = [{key: rate - others[key] for key, rate in own.items()} for own, others in pairs]
        found = bootstrap_seeds(gaps, null=0.0)
        interval = f"({100 * found['low']:+.1f} to {100 * found['high']:+.1f}; p = {found['p_value']:.3f})"
        print(f"{name} less {other}: {100 * found['mean']:+.1f} points {interval}{_over_seeds(gaps)}")


def _other_means(rows: Sequence[Line]) -> str:
    """Means over seeds of the other columns that the row has, and each seed's win rate."""
    names = [*(name for name in COLUMNS if name not in WIN_RATE), "win_rate_cut"]
    found = {name: [float(row[name]) for row in rows if row[name] != ""] for name in names}
    each = " ".join(f"{float(row['win_rate']):.0%}" for row in rows)
    return f", seeds {each}" + "".join(f", {name} {fmean(own):.3g}" for name, own in found.items() if own)


def _over_seeds(gaps: Sequence[Mapping[str, float]]) -> str:
    """Each seed's difference, Student's interval over them, and the least difference seen with a power of 80 %."""
    if len(gaps) < 2:
        return ""
    means = [100 * fmean(own.values()) for own in gaps]
    student = t_interval(means)
    seen = detectable_difference(*variance_components(gaps), seeds=len(gaps), prompts=len(gaps[0]))
    each = " ".join(f"{mean:+.1f}" for mean in means)
    return f"; Student {student.low:+.1f} to {student.high:+.1f}; seeds {each}; {100 * seen:.1f} seen at 80 % power"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    seeds = parser.parse_args().seeds
    if not (ROOT / "artifacts" / "collect").is_dir():
        sys.exit("run this first: rlhf run base_model collect")
    init_process()
    params = load_params(ROOT / "params.yaml")
    settings = settings_digest(params)
    lines: list[Line] = [dict(line) for line in read_table(TABLE) if line["settings"] == settings]
    for seed in seeds:
        if str(seed) not in {str(line["seed"]) for line in lines}:
            own = params.model_copy(update={"seed": seed, "policy_seed": seed})
            found = run_seed(own, OUT / settings / f"seed-{seed}")
            lines += [{"settings": settings, "seed": seed} | line for line in found]
            write_table(TABLE, lines)
    print_means(lines)


if __name__ == "__main__":
    main()
