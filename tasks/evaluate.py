"""What did training really gain? Every policy answers the same held-out prompts; three judges compare it with SFT."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from tasks.core import tracking
from tasks.core.files import write_json, write_table
from tasks.core.models import ADAPTER, is_off, load_policy, load_reference, load_tokenizer, prepare_process
from tasks.core.schema import Prompt, write_rows
from tasks.core.sections.environment import EnvironmentParams
from tasks.core.sections.evaluate import EvaluateParams
from tasks.core.sections.generation import GenerationParams
from tasks.core.sections.reward import RewardParams
from tasks.evals.compare import JUDGES, REFERENCE, Judged, Table, compare, headline, judges_of
from tasks.evals.findings import find, plain
from tasks.evals.judges import load_judge
from tasks.evals.judging import Answer, Sampler, choose_prompts, gold_reward, judge
from tasks.evals.lineage import ingredients
from tasks.evals.pairwise import Judgement, doubts, judge_pairs, with_judgements
from tasks.evals.report import Evidence, as_json, read_table, render
from tasks.evals.text import length_counts, word_count
from tasks.rewards.composition import load_reward
from tasks.rewards.finished import SCORER

__all__ = ["evaluate"]


def evaluate(
    params: EvaluateParams,
    generation: GenerationParams,
    reward: RewardParams,
    environment: EnvironmentParams | None,
    seed: int,
    *,
    base_model: Path,
    sft: Path,
    reward_model: Path,
    gold_judge: Path,
    ppo: Path,
    grpo: Path,
    dpo: Path,
    overoptimisation: Path,
    lm_eval: Path,
    prepare: Path,
    collect: Path,
    out: Path,
) -> None:
    """Compare SFT and those of PPO, GRPO and DPO that are on, on held-out prompts.

    The gold judge is the model of that stage; where the stage is off, it is whether the answer is right, and with an
    environment, whether the conversation reached its goal. Each policy writes one response per prompt, or has one
    conversation, all with the same random numbers. Writes responses.jsonl (every response with every
    score), judgements.jsonl (every answer of the judge of pairs; empty where it is off), policies.json (policy →
    numbers, see `tasks.evals.compare` and `tasks.evals.pairwise`), metrics.json (the headline of it),
    findings.json (policy → the signs of reward hacking that were found), samples.jsonl (some prompts side by side),
    plots/*.csv, report.html and the same as report.json. All of it follows from the inputs, and from what an endpoint
    answers, alone: no time, no path.

    Raises:
        ConfigError: the judge of pairs would cost more than its budget.
        DataError: there are fewer held-out prompts than params ask for, or nothing that could judge them.
        ModelError: an upstream folder is incomplete.
        SourceError: the judge of pairs cannot be reached, or refuses.
        TrainingError: a judge gives a score that is not finite.
    """
    prepare_process()
    prompts = choose_prompts(prepare / "prompts" / "test.jsonl", params.prompts, seed)
    trained: dict[str, Path] = {"ppo": ppo, "grpo": grpo, "dpo": dpo}
    policies = {name: folder for name, folder in trained.items() if not is_off(folder)}
    sampler = Sampler(
        load_tokenizer(base_model),
        prompts,
        generation,
        batch_size=params.batch_size,
        seed=seed,
        environment=environment,
    )
    answers = _answers(sampler, policies, base_model, sft)
    proxy = load_reward(reward, prompts, base_model=base_model, sft=sft, reward_model=reward_model)
    gold = None if environment else gold_reward(prompts, base_model, gold_judge, params.gold_rule)
    accuracy = params.gold_rule is None
    records = judge(answers, proxy, gold, vader=params.vader, answer_pattern=params.answer_pattern, accuracy=accuracy)
    judgements = _judge_pairs(params, records, base_model)
    table = _compared(params, records, judgements, seed)
    histories = {name: read_table(folder / "history.csv") for name, folder in policies.items() if name != "dpo"}
    found = find(table, {name: [_numbers(row) for row in rows] for name, rows in histories.items()})
    write_rows(out / "judgements.jsonl", judgements)
    _write_tables(out, table, records, params.report_samples)
    write_json(out / "findings.json", plain(found))
    evidence = Evidence(
        table=table,
        records=records,
        findings=found,
        histories=histories,
        points=read_table(overoptimisation / "points.csv"),
        fits=json.loads((overoptimisation / "fits.json").read_text(encoding="utf-8")),
        benchmarks=json.loads((lm_eval / "results.json").read_text(encoding="utf-8")),
        accuracy=read_table(reward_model / "accuracy_by_margin.csv"),
        calibration=read_table(reward_model / "calibration.csv"),
        samples=params.report_samples,
        weights=reward.weights,
        composition=reward.composition,
        rated=not is_off(gold_judge),
        gold_rule=None if params.gold_rule is None else params.gold_rule.function,
        made_from=ingredients(base_model, collect),
        provenance=_provenance(
            seed,
            (params, generation, reward, *([environment] if environment else [])),
            {REFERENCE: sft} | policies | {"reward model": reward_model, "gold judge": gold_judge},
            prompts,
        ),
    )
    (out / "report.html").write_text(render(evidence), encoding="utf-8", newline="\n")
    write_json(out / "report.json", as_json(evidence))
    tracking.log_file(out / "report.html")


def _answers(sampler: Sampler, policies: Mapping[str, Path], base_model: Path, sft: Path) -> list[Answer]:
    """Those of the reference, then those of each policy."""
    answers = sampler.answers(REFERENCE, load_reference(base_model, sft))
    for name, folder in policies.items():
        gc.collect()  # the policy before it holds itself in reference cycles
        answers += sampler.answers(name, load_policy(base_model, sft, folder))
    return answers


def _judge_pairs(params: EvaluateParams, records: Sequence[Judged], base_model: Path) -> list[Judgement]:
    if params.judge is None:
        return []
    asked = load_judge(params.judge, base_model, batch_size=params.batch_size)
    return judge_pairs(records, asked, rubric=params.judge.rubric, prompts=params.judge.prompts)


def _compared(params: EvaluateParams, records: Sequence[Judged], judgements: Sequence[Judgement], seed: int) -> Table:
    """The table; where the judge of pairs is not to be trusted, it is said."""
    table = compare(records, samples=params.bootstrap_samples, seed=seed)
    table = with_judgements(table, judgements, samples=params.bootstrap_samples, seed=seed)
    for doubt in doubts(table):
        print(f"evaluate: warning: {doubt}", file=sys.stderr)
    return table


def _numbers(row: Mapping[str, str]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if value}


def _write_tables(out: Path, table: Table, records: Sequence[Judged], samples: int) -> None:
    """Everything that a program reads: rows, tables and the data of the plots."""
    write_rows(out / "responses.jsonl", records)
    write_json(out / "policies.json", table)
    write_json(out / "metrics.json", headline(table))
    rows = _side_by_side(records, samples)
    write_rows(out / "samples.jsonl", rows)
    tracking.log_samples("samples", rows)
    plots = out / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    write_table(plots / "reward_against_kl.csv", [
        {"policy": policy, "sqrt_kl": max(row["kl"], 0.0) ** 0.5}
        | {f"gain_{judge}": row[f"gain_{judge}"] for judge in judges_of(table)}
        for policy, row in table.items()
    ])  # fmt: skip
    write_table(plots / "win_rates.csv", [
        {"policy": policy, "judge": judge, "win_rate": row[key], "low": row[f"{key}_low"], "high": row[f"{key}_high"]}
        for policy, row in table.items() if policy != REFERENCE
        for judge, key in judges_of(table).items()
    ])  # fmt: skip
    write_table(plots / "lengths.csv", [
        {"policy": policy, "words": words, "responses": count}
        for policy in table
        for words, count in length_counts([word_count(r.response) for r in records if r.policy == policy])
    ])  # fmt: skip


def _side_by_side(records: Sequence[Judged], count: int) -> list[dict[str, object]]:
    """One row per prompt: the prompt, then each policy's response and its scores."""
    rows: dict[str, dict[str, object]] = {}
    for record in records:
        row = rows.setdefault(record.prompt_id, {"prompt": record.prompt})
        row[record.policy] = record.shown
        row |= {f"{judge}_{record.policy}": score for judge in JUDGES if (score := record.score(judge)) is not None}
        row[f"kl_{record.policy}"] = record.kl
    return list(rows.values())[:count]


def _provenance(
    seed: int, sections: Sequence[BaseModel], folders: Mapping[str, Path], prompts: Sequence[Prompt]
) -> list[tuple[str, str]]:
    """What identifies this evaluation: the seed, the parameters it read, and the weights and prompts, by content."""
    content = json.dumps([seed, *(section.model_dump() for section in sections)], sort_keys=True)
    weights = [
        (f"Weights: {name}", _digest(*_weights(folder))) for name, folder in folders.items() if not is_off(folder)
    ]
    texts = "\n".join(row.prompt for row in prompts)
    return [
        ("Seed", str(seed)),
        ("Parameters of evaluate, generation and reward", _digest(content.encode())),
        (f"The {len(prompts)} prompts", _digest(texts.encode())),
        *weights,
    ]


def _weights(folder: Path) -> list[bytes]:
    """The adapter that a stage trained, or the finished reward model that it took."""
    adapter = folder / ADAPTER / "adapter_model.safetensors"
    files = [adapter] if adapter.is_file() else sorted((folder / SCORER).glob("*.safetensors"))
    return [file.read_bytes() for file in files]


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("evaluate")
