"""Stage evaluate: compare the trained policies with SFT on held-out prompts."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from tasks.core import tracking
from tasks.core.paths import Artifacts
from tasks.core.rows import Prompt, write_json, write_rows, write_table
from tasks.core.text_stats import word_count
from tasks.evals.compare import REFERENCE, WIN_RATE_KEYS, ScoredResponse, Table, compare_policies, headline, judges_of
from tasks.evals.hacking_report import find_hacking, findings_to_dict
from tasks.evals.llm_judge import load_judge
from tasks.evals.pairwise import Judgement, add_judge_metrics, judge_pairs, reliability_warnings
from tasks.evals.report import (
    ReportData,
    collect_sources,
    length_counts,
    read_table,
    render_report,
    report_to_dict,
)
from tasks.evals.scoring import PolicySampler, SampledResponse, load_gold_reward, sample_prompts, score_responses
from tasks.models.loading import ADAPTER_DIR, init_process, is_disabled, load_policy, load_reference, load_tokenizer
from tasks.rewards.composition import load_reward
from tasks.rewards.pretrained import PRETRAINED_DIR

if TYPE_CHECKING:
    from tasks.config.evaluation import EvaluateParams
    from tasks.config.reward import RewardParams
    from tasks.config.training import EnvironmentParams, GenerationParams

__all__ = ["evaluate"]


def evaluate(
    params: EvaluateParams,
    generation: GenerationParams,
    reward: RewardParams,
    environment: EnvironmentParams | None,
    seed: int,
    artifacts: Artifacts,
) -> None:
    """Compare SFT and those of PPO, GRPO and DPO that are on, on held-out prompts.

    The gold judge is the model of that stage; where the stage is off, it is whether the answer is right, and with an
    environment, whether the conversation reached its goal. Each policy writes one response per prompt, or has one
    conversation, all with the same random numbers. Writes responses.jsonl (every response with every
    score), judgements.jsonl (every answer of the judge of pairs; empty where it is off), policies.json (policy →
    numbers, see `tasks.evals.compare` and `tasks.evals.pairwise`), metrics.json (the headline of it),
    findings.json (policy → reward-hacking findings), samples.jsonl (some prompts side by side),
    plots/*.csv, report.html and the same as report.json. All of it follows from the inputs, and from what an endpoint
    responses, alone: no time, no path.

    Raises:
        ConfigError: the judge of pairs would cost more than its budget.
        DataError: there are fewer held-out prompts than params ask for, or nothing that could judge them.
        ModelError: an upstream folder is incomplete.
        SourceError: the judge of pairs cannot be reached, or refuses.
        TrainingError: a judge gives a score that is not finite.
    """
    init_process()
    prompts = sample_prompts(artifacts.prepare / "prompts" / "test.jsonl", params.prompts, seed)
    trained: dict[str, Path] = {"ppo": artifacts.ppo, "grpo": artifacts.grpo, "dpo": artifacts.dpo}
    policies = {name: folder for name, folder in trained.items() if not is_disabled(folder)}
    sampler = PolicySampler(
        load_tokenizer(artifacts.base_model),
        prompts,
        generation,
        batch_size=params.batch_size,
        seed=seed,
        environment=environment,
    )
    responses = _sample_policies(sampler, policies, artifacts.base_model, artifacts.sft)
    proxy = load_reward(reward, prompts, artifacts)
    gold = (
        None if environment else load_gold_reward(prompts, artifacts.base_model, artifacts.gold_judge, params.gold_rule)
    )
    accuracy = params.gold_rule is None
    records = score_responses(
        responses, proxy, gold, vader=params.vader, answer_pattern=params.answer_pattern, accuracy=accuracy
    )
    judgements = _judge_pairs(params, records, artifacts.base_model)
    table = _build_table(params, records, judgements, seed)
    histories = {name: read_table(folder / "history.csv") for name, folder in policies.items() if name != "dpo"}
    findings = find_hacking(table, {name: [_numeric_row(row) for row in rows] for name, rows in histories.items()})
    write_rows(artifacts.out / "judgements.jsonl", judgements)
    _write_tables(artifacts.out, table, records, params.report_samples)
    write_json(artifacts.out / "findings.json", findings_to_dict(findings))
    evidence = ReportData(
        table=table,
        records=records,
        findings=findings,
        histories=histories,
        points=read_table(artifacts.overoptimisation / "points.csv"),
        fits=json.loads((artifacts.overoptimisation / "fits.json").read_text(encoding="utf-8")),
        benchmarks=json.loads((artifacts.lm_eval / "results.json").read_text(encoding="utf-8")),
        accuracy=read_table(artifacts.reward_model / "accuracy_by_margin.csv"),
        calibration=read_table(artifacts.reward_model / "calibration.csv"),
        samples=params.report_samples,
        weights=reward.weights,
        composition=reward.composition,
        has_gold_judge=not is_disabled(artifacts.gold_judge),
        gold_rule=None if params.gold_rule is None else params.gold_rule.function,
        sources=collect_sources(artifacts.base_model, artifacts.collect),
        provenance=_provenance(
            seed,
            (params, generation, reward, *([environment] if environment else [])),
            {REFERENCE: artifacts.sft}
            | policies
            | {"reward model": artifacts.reward_model, "gold judge": artifacts.gold_judge},
            prompts,
        ),
    )
    (artifacts.out / "report.html").write_text(render_report(evidence), encoding="utf-8", newline="\n")
    write_json(artifacts.out / "report.json", report_to_dict(evidence))
    tracking.log_file(artifacts.out / "report.html")


def _sample_policies(
    sampler: PolicySampler, policies: Mapping[str, Path], base_model: Path, sft: Path
) -> list[SampledResponse]:
    """Sample responses of the reference, then of each policy."""
    responses = sampler.sample(REFERENCE, load_reference(base_model, sft))
    for name, folder in policies.items():
        gc.collect()  # the previous policy is in reference cycles
        responses += sampler.sample(name, load_policy(base_model, sft, folder))
    return responses


def _judge_pairs(params: EvaluateParams, records: Sequence[ScoredResponse], base_model: Path) -> list[Judgement]:
    if params.llm_judge is None:
        return []
    llm_judge = load_judge(params.llm_judge, base_model, batch_size=params.batch_size)
    return judge_pairs(records, llm_judge, rubric=params.llm_judge.rubric, prompts=params.llm_judge.prompts)


def _build_table(
    params: EvaluateParams, records: Sequence[ScoredResponse], judgements: Sequence[Judgement], seed: int
) -> Table:
    """Build the table of metrics, and warn where the judge of pairs is unreliable."""
    table = compare_policies(records, samples=params.bootstrap_samples, seed=seed)
    table = add_judge_metrics(table, judgements, samples=params.bootstrap_samples, seed=seed)
    for doubt in reliability_warnings(table):
        print(f"evaluate: warning: {doubt}", file=sys.stderr)
    return table


def _numeric_row(row: Mapping[str, str]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if value}


def _write_tables(out: Path, table: Table, records: Sequence[ScoredResponse], samples: int) -> None:
    """Write the machine-readable outputs: rows, tables and plot data."""
    write_rows(out / "responses.jsonl", records)
    write_json(out / "policies.json", table)
    write_json(out / "metrics.json", headline(table))
    rows = _side_by_side_rows(records, samples)
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


def _side_by_side_rows(records: Sequence[ScoredResponse], count: int) -> list[dict[str, object]]:
    """One row per prompt: the prompt, then each policy's response and its scores."""
    rows: dict[str, dict[str, object]] = {}
    for record in records:
        row = rows.setdefault(record.prompt_id, {"prompt": record.prompt})
        row[record.policy] = record.display_text
        row |= {
            f"{judge}_{record.policy}": score for judge in WIN_RATE_KEYS if (score := record.score(judge)) is not None
        }
        row[f"kl_{record.policy}"] = record.kl
    return list(rows.values())[:count]


def _provenance(
    seed: int, sections: Sequence[BaseModel], folders: Mapping[str, Path], prompts: Sequence[Prompt]
) -> list[tuple[str, str]]:
    """Provenance of this evaluation: the seed, and digests of parameters, weights and prompts."""
    content = json.dumps([seed, *(section.model_dump() for section in sections)], sort_keys=True)
    weights = [
        (f"Weights: {name}", _digest(*_weight_bytes(folder)))
        for name, folder in folders.items()
        if not is_disabled(folder)
    ]
    texts = "\n".join(row.prompt for row in prompts)
    return [
        ("Seed", str(seed)),
        ("Parameters of evaluate, generation and reward", _digest(content.encode())),
        (f"The {len(prompts)} prompts", _digest(texts.encode())),
        *weights,
    ]


def _weight_bytes(folder: Path) -> list[bytes]:
    """The bytes of the adapter that a stage trained, or of the pretrained reward model."""
    adapter = folder / ADAPTER_DIR / "adapter_model.safetensors"
    files = [adapter] if adapter.is_file() else sorted((folder / PRETRAINED_DIR).glob("*.safetensors"))
    return [file.read_bytes() for file in files]


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("evaluate")
