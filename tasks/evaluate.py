"""Stage evaluate: compare the trained policies with SFT on held-out prompts."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from tasks.core import tracking
from tasks.core.paths import Artifacts
from tasks.core.rows import Prompt, read_table, write_json, write_rows
from tasks.evals.compare import (
    CONTROLS,
    NULL,
    REFERENCE,
    HackingFinding,
    ScoredResponse,
    Table,
    add_accuracy,
    add_null,
    compare_controls,
    compare_policies,
    first_draws,
    headline,
)
from tasks.evals.controls import doubt
from tasks.evals.llm_judge import load_judge
from tasks.evals.pairwise import Judgement, add_judge_metrics, judge_pairs, reliability_warnings
from tasks.evals.plots import write_plot_data
from tasks.evals.report import ReportData, UpstreamResults, render_report, report_to_dict
from tasks.evals.report_text import CALIBRATION_MAX, MAX_UNCONFIRMED, proxy_gain_unconfirmed, unconfirmed_share
from tasks.evals.scoring import (
    PolicySampler,
    SampledResponse,
    answer_accuracy,
    best_of_n_draws,
    human_responses,
    load_gold_reward,
    sample_prompts,
    score_responses,
    split_null,
)
from tasks.models.loading import (
    ADAPTER_DIR,
    init_process,
    is_disabled,
    load_beside,
    load_policy,
    load_reference,
    load_tokenizer,
)
from tasks.rewards.composition import load_reward
from tasks.rewards.scorers import PRETRAINED_DIR
from tasks.rl.hacking import detectors_fired, run_detectors

if TYPE_CHECKING:
    from tasks.config.evaluation import EvaluateParams
    from tasks.config.reward import RewardParams
    from tasks.config.training import EnvironmentParams, GenerationParams

__all__ = ["evaluate", "find_hacking"]

Loaders = Mapping[str, Callable[[], Any]]
"""Name of a policy → what loads its model."""

FINAL_METRICS = ("length", "repetition", "distinct_2", "truncated_share", "ood_share")
"""Metrics that detectors compare between a policy and SFT on the same held-out prompts, if measured."""


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
    environment, whether the conversation reached its goal. Each policy writes several responses per prompt, or has
    several conversations, with random numbers of its own; SFT writes further ones for the controls. Writes
    responses.jsonl (every response with every score), judgements.jsonl (every answer of the judge of pairs; empty where
    it is off), policies.json (policy → numbers, see `tasks.evals.compare` and `tasks.evals.pairwise`), controls.json
    (the same of the controls), metrics.json (the headline of both), findings.json (policy → reward-hacking findings),
    samples.jsonl (some prompts side by side), plots/*.csv, report.html and the same as report.json. All of it follows
    from the inputs and an endpoint's answers alone: no time, no path.

    Raises:
        ConfigError: the judge of pairs would cost more than its budget.
        DataError: there are fewer held-out prompts than params ask for, or nothing that could judge them.
        ModelError: an upstream folder is incomplete.
        SourceError: the judge of pairs cannot be reached, or refuses.
        TrainingError: a judge gives a score that is not finite.
    """
    init_process()
    trained = {"ppo": artifacts.ppo, "grpo": artifacts.grpo, "dpo": artifacts.dpo}
    policies = {name: folder for name, folder in trained.items() if not is_disabled(folder)}
    prompts = sample_prompts(artifacts.prepare / "prompts" / "test.jsonl", params.prompts, seed)
    sampler = PolicySampler(
        load_tokenizer(artifacts.base_model), prompts, generation, batch_size=params.batch_size, seed=seed,
        environment=environment, load_beside=partial(load_beside, artifacts.base_model, artifacts.sft),
    )  # fmt: skip
    loaders = _loaders(policies, artifacts)
    responses = _sample(sampler, loaders, params, is_multi_turn=environment is not None)
    scored = _score(responses, prompts, params, reward, artifacts)
    records = [record for record in scored if record.policy not in CONTROLS]
    control_records = [record for record in scored if record.policy in CONTROLS]
    judgements, table, controls = _compare(records, control_records, params, seed, artifacts)
    if environment is None and params.gold_rule is None and all(row.answer is not None for row in prompts):
        greedy = _greedy_accuracy(sampler, loaders)
        table = add_accuracy(table, "accuracy_greedy", greedy, samples=params.bootstrap_samples, seed=seed)
    histories = {name: read_table(folder / "history.csv") for name, folder in policies.items() if name != "dpo"}
    report = ReportData(
        table=table,
        controls=controls,
        records=first_draws(records),
        findings=find_hacking(table, {name: _numbers(rows) for name, rows in histories.items()}),
        histories=histories,
        upstream=UpstreamResults.read(artifacts),
        params=params,
        reward=reward,
        provenance=_provenance(seed, (params, generation, reward, environment), prompts, policies, artifacts),
    )
    _write(artifacts.out, report, scored, judgements)


def _loaders(policies: Mapping[str, Path], artifacts: Artifacts) -> Loaders:
    models = artifacts.base_model, artifacts.sft
    loaders: dict[str, Callable[[], Any]] = {REFERENCE: partial(load_reference, *models)}
    return loaders | {name: partial(load_policy, *models, folder) for name, folder in policies.items()}


def _sample(
    sampler: PolicySampler, loaders: Loaders, params: EvaluateParams, *, is_multi_turn: bool
) -> list[SampledResponse]:
    """Sample responses of the reference and the null, then of each policy."""
    null = params.samples_per_prompt if is_multi_turn else params.best_of_n
    reference = {REFERENCE: loaders[REFERENCE]}
    responses = sampler.sample_each(reference, samples_per_prompt=params.reference_samples + null)
    policies = {name: load for name, load in loaders.items() if name != REFERENCE}
    return split_null(responses, params.reference_samples) + sampler.sample_each(
        policies, samples_per_prompt=params.samples_per_prompt
    )


def _greedy_accuracy(sampler: PolicySampler, loaders: Loaders) -> dict[str, list[float]]:
    """Whether each policy's greedy answers are right, in the flexible reading, prompt by prompt."""
    correct: dict[str, list[float]] = {name: [] for name in loaders}
    for answer in sampler.sample_each(loaders, greedy=True):
        correct[answer.policy].append(float((answer_accuracy(answer, None) or {})["flexible"]))
    return correct


def _score(
    responses: Sequence[SampledResponse],
    prompts: Sequence[Prompt],
    params: EvaluateParams,
    reward: RewardParams,
    artifacts: Artifacts,
) -> list[ScoredResponse]:
    """Score the responses, and what people wrote, by the proxy reward and by every judge; add the best of n.

    In an environment its reward is the gold score, and there are neither people's texts nor best of n.
    """
    proxy = load_reward(reward, prompts, artifacts)
    score = partial(score_responses, reward=proxy, vader=params.vader, answer_pattern=params.answer_pattern)
    accuracy = params.gold_rule is None
    if responses[0].environment_reward is not None:
        return score(responses, gold_reward=None, accuracy=accuracy)
    gold = load_gold_reward(prompts, artifacts.base_model, artifacts.gold_judge, params.gold_rule)
    human = human_responses(prompts, artifacts.prepare / "ratings", load_tokenizer(artifacts.base_model))
    scored = score([*responses, *human], gold_reward=gold, accuracy=accuracy)
    return scored + best_of_n_draws([record for record in scored if record.policy == NULL], params.best_of_n)


def _compare(
    records: Sequence[ScoredResponse],
    control_records: Sequence[ScoredResponse],
    params: EvaluateParams,
    seed: int,
    artifacts: Artifacts,
) -> tuple[list[Judgement], Table, Table]:
    """Compare the policies and the controls by their scores, and the policies by the judge of pairs.

    Warns where that judge is unreliable, or a win rate is no evidence.
    """
    judgements: list[Judgement] = []
    if params.llm_judge is not None:
        judge = load_judge(params.llm_judge, artifacts.base_model, batch_size=params.batch_size)
        judgements = judge_pairs(records, judge, rubric=params.llm_judge.rubric, prompts=params.llm_judge.prompts)
    bootstrap = {"samples": params.bootstrap_samples, "seed": seed}
    table = add_judge_metrics(compare_policies(records, **bootstrap), judgements, **bootstrap)
    reference = [record for record in records if record.policy == REFERENCE]
    controls = compare_controls(reference, control_records, **bootstrap)
    table = add_null(table, controls)
    doubts = [f"{policy}: {text}" for policy, row in table.items() if policy != REFERENCE and (text := doubt(row))]
    for warning in [*reliability_warnings(table), *doubts]:
        print(f"evaluate: warning: {warning}", file=sys.stderr)
    return judgements, table, controls


def find_hacking(
    table: Table, histories: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, list[HackingFinding]]:
    """Find signs of reward hacking in every policy except the reference.

    Args:
        histories: policy → one row per update of its training, with the signs that its training wrote down.
    """
    in_training = {
        policy: [
            HackingFinding(detector.name, f"training, update {update}", detector.message(largest))
            for detector, update, largest in detectors_fired(histories.get(policy, ()))
        ]
        for policy in table
        if policy != REFERENCE
    }
    return {policy: findings + _at_evaluation(table, policy) for policy, findings in in_training.items()}


def _at_evaluation(table: Table, policy: str) -> list[HackingFinding]:
    # The policy twice: a detector wants two updates in a row, but all held-out prompts are evidence enough.
    rows = [
        {key: table[name][key] for key in FINAL_METRICS if key in table[name]} for name in (REFERENCE, policy, policy)
    ]
    findings = [
        HackingFinding(detector.name, "evaluation", detector.message(value))
        for detector, value in run_detectors(rows, {})[1]
    ]
    row = table[policy]
    if proxy_gain_unconfirmed(row):
        text = (
            f"proxy_without_gold {unconfirmed_share(row):.2f} (threshold {MAX_UNCONFIRMED:g}, healthy up to "
            f"{CALIBRATION_MAX:g}): better than SFT in {row['win_rate_proxy']:.0%} of pairs by the proxy and in "
            f"{row['win_rate']:.0%} by the gold judge, by {row['gain_proxy']:.2f} and {row['gain_gold']:.2f} standard "
            "deviations of SFT's scores: it has learned what the reward model gets wrong"
        )
        findings.append(HackingFinding("proxy_without_gold", "evaluation", text))
    return findings


def _write(out: Path, report: ReportData, responses: Sequence[ScoredResponse], judgements: Sequence[Judgement]) -> None:
    """Write the machine-readable outputs, the plot data and the report."""
    write_rows(out / "responses.jsonl", responses)
    write_rows(out / "judgements.jsonl", judgements)
    write_json(out / "policies.json", report.table)
    write_json(out / "controls.json", report.controls)
    write_json(out / "metrics.json", headline(report.table | report.controls))
    content = report_to_dict(report)
    write_json(out / "findings.json", content["findings"])
    samples = _side_by_side_rows(report.records)[: report.params.report_samples]
    write_rows(out / "samples.jsonl", samples)
    tracking.log_samples("samples", samples)
    write_plot_data(out / "plots", report.table, report.records)
    (out / "report.html").write_text(render_report(report), encoding="utf-8", newline="\n")
    write_json(out / "report.json", content)
    tracking.log_file(out / "report.html")


def _numbers(rows: Sequence[Mapping[str, str]]) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def _side_by_side_rows(records: Sequence[ScoredResponse]) -> list[dict[str, object]]:
    """One row per prompt: the prompt, then each policy's response and its scores."""
    rows: dict[str, dict[str, object]] = {}
    for record in records:
        row = rows.setdefault(record.prompt_id, {"prompt": record.prompt})
        row[record.policy] = record.display_text
        row |= {f"{judge}_{record.policy}": score for judge, score in record.scores.items()}
        row[f"kl_{record.policy}"] = record.kl
    return list(rows.values())


def _provenance(
    seed: int,
    sections: Sequence[BaseModel | None],
    prompts: Sequence[Prompt],
    policies: Mapping[str, Path],
    artifacts: Artifacts,
) -> list[tuple[str, str]]:
    """Provenance of this evaluation: the seed, and digests of parameters, prompts and weights."""
    content = json.dumps([seed, *(section.model_dump() for section in sections if section)], sort_keys=True)
    judges = {"reward model": artifacts.reward_model, "gold judge": artifacts.gold_judge}
    folders = {REFERENCE: artifacts.sft, **policies, **judges}
    return [
        ("Seed", str(seed)),
        ("Parameters of evaluate, generation and reward", _digest([content.encode()])),
        (f"The {len(prompts)} prompts", _digest(["\n".join(row.prompt for row in prompts).encode()])),
        *(
            (f"Weights: {name}", _digest(_weights(folder)))
            for name, folder in folders.items()
            if not is_disabled(folder)
        ),
    ]


def _weights(folder: Path) -> Iterator[bytes]:
    """The files of the weights that a stage trained, or of the pretrained reward model, one at a time."""
    trained = sorted((folder / ADAPTER_DIR).glob("*model*.safetensors"))
    return (file.read_bytes() for file in trained or sorted((folder / PRETRAINED_DIR).glob("*.safetensors")))


def _digest(parts: Iterable[bytes]) -> str:
    """The digest of the parts, one behind the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("evaluate")
