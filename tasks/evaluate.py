"""What did training really gain? Every policy answers the same held-out prompts; three judges compare it with SFT."""

from __future__ import annotations

import gc
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import BaseModel
from torch import Tensor
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from tasks.core import tracking
from tasks.core.errors import DataError, TrainingError
from tasks.core.files import write_json, write_table
from tasks.core.models import ADAPTER, is_off, load_policy, load_reference, load_tokenizer, prepare_process
from tasks.core.schema import Prompt, read_rows, write_rows
from tasks.core.sections.evaluate import EvaluateParams
from tasks.core.sections.generation import GenerationParams
from tasks.core.sections.reward import RewardParams
from tasks.evals.compare import JUDGES, REFERENCE, Judged, Table, compare, headline, judges_of
from tasks.evals.report import Evidence, read_table, render
from tasks.evals.text import length_counts, word_count
from tasks.rewards.composition import CompositeReward, load_reward
from tasks.rewards.learned import GoldJudge
from tasks.rewards.rules import RewardFunction, right_answer
from tasks.rl.kl import kl_estimates, per_sequence
from tasks.rl.policy import Policy
from tasks.rl.rollout import Rollout, generate

__all__ = ["choose_prompts", "evaluate"]


def evaluate(
    params: EvaluateParams,
    generation: GenerationParams,
    reward: RewardParams,
    seed: int,
    *,
    base_model: Path,
    sft: Path,
    reward_model: Path,
    gold_judge: Path,
    ppo: Path,
    grpo: Path,
    dpo: Path,
    prepare: Path,
    out: Path,
) -> None:
    """Compare SFT and those of PPO, GRPO and DPO that are on, on held-out prompts.

    The gold judge is the model of that stage; where the stage is off, it is whether the answer is right. Each policy
    writes one response per prompt, all with the same random numbers. Writes responses.jsonl (every response with every
    score), policies.json (policy → numbers, see `tasks.evals.compare`), metrics.json (the headline of it),
    samples.jsonl (some prompts side by side), plots/*.csv and report.html. All of it follows from the inputs alone: no
    time, no path.

    Raises:
        DataError: there are fewer held-out prompts than params ask for, or nothing that could judge them.
        ModelError: an upstream folder is incomplete.
        TrainingError: a judge gives a score that is not finite.
    """
    prepare_process()
    prompts = choose_prompts(prepare / "prompts" / "test.jsonl", params.prompts, seed)
    policies = {name: folder for name, folder in (("ppo", ppo), ("grpo", grpo), ("dpo", dpo)) if not is_off(folder)}
    sampler = _Sampler(load_tokenizer(base_model), prompts, generation, batch_size=params.batch_size, seed=seed)
    answers = sampler.answers(REFERENCE, load_reference(base_model, sft))
    for name, folder in policies.items():
        gc.collect()  # the policy before it holds itself in reference cycles
        answers += sampler.answers(name, load_policy(base_model, sft, folder))
    proxy = load_reward(reward, prompts, base_model=base_model, sft=sft, reward_model=reward_model)
    records = _judge(answers, proxy, _gold(prompts, base_model, gold_judge), vader=params.vader)
    table = compare(records, samples=params.bootstrap_samples, seed=seed)
    _write_tables(out, table, records, params.report_samples)
    evidence = Evidence(
        table=table,
        records=records,
        histories={name: read_table(policies[name] / "history.csv") for name in ("ppo", "grpo") if name in policies},
        accuracy=read_table(reward_model / "accuracy_by_margin.csv"),
        calibration=read_table(reward_model / "calibration.csv"),
        samples=params.report_samples,
        weights=reward.weights,
        rated=not is_off(gold_judge),
        provenance=_provenance(
            seed,
            (params, generation, reward),
            {REFERENCE: sft} | policies | {"reward model": reward_model, "gold judge": gold_judge},
            prompts,
        ),
    )
    (out / "report.html").write_text(render(evidence), encoding="utf-8", newline="\n")
    tracking.log_file(out / "report.html")


def choose_prompts(path: Path, count: int, seed: int) -> list[Prompt]:
    """The first `count` prompts of the file after a shuffle that the seed fixes.

    Raises:
        DataError: the file holds fewer, or is missing or malformed.
    """
    rows = read_rows(path, Prompt)
    if len(rows) < count:
        raise DataError(
            f"{path} holds {len(rows)} prompts, evaluate.prompts asks for {count}; lower it to {len(rows)} or less, or "
            "raise prepare.test_share"
        )
    random.Random(seed).shuffle(rows)
    return rows[:count]


@dataclass(frozen=True)
class _Answer:
    """One response before anyone has judged it; the fields mean what they mean in `Judged`."""

    policy: str
    prompt: Prompt
    response: str
    tokens: int
    ended: bool
    kl: float
    kl_k3: float


class _Sampler:
    """Lets policies answer the prompts, always with the same random numbers."""

    def __init__(
        self, tokenizer: Any, prompts: Sequence[Prompt], generation: GenerationParams, *, batch_size: int, seed: int
    ) -> None:
        self._tokenizer, self._generation, self._seed = tokenizer, generation, seed
        self._batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]

    def answers(self, name: str, model: Any) -> list[_Answer]:
        """One response per prompt, with its KL to the reference; 0 for the reference itself, which has no adapter."""
        rollouts = self._rollouts(model)
        return [
            answer
            for prompts, rollout in zip(self._batches, rollouts, strict=True)
            for answer in self._described(name, prompts, rollout, self._reference_logprobs(model, rollout))
        ]

    def _rollouts(self, model: Any) -> list[Rollout]:
        generator = torch.Generator().manual_seed(self._seed)
        return [
            generate(
                model,
                [self._tokenizer(row.prompt).input_ids for row in batch],
                max_new_tokens=self._generation.max_new_tokens,
                temperature=self._generation.temperature,
                eos_token_id=self._tokenizer.eos_token_id,
                pad_token_id=self._tokenizer.pad_token_id,
                generator=generator,
            )
            for batch in self._batches
        ]

    def _reference_logprobs(self, model: Any, rollout: Rollout) -> Tensor:
        if not isinstance(model, PeftModel):
            return rollout.logprobs
        return Policy(model, temperature=self._generation.temperature).reference_logprobs(rollout)

    def _described(
        self, name: str, prompts: Sequence[Prompt], rollout: Rollout, reference_logprobs: Tensor
    ) -> list[_Answer]:
        mask = rollout.response_mask
        kl = kl_estimates(rollout.logprobs, reference_logprobs, mask)
        columns = zip(
            prompts,
            rollout.response_ids(),
            mask.sum(1).tolist(),
            rollout.ended.tolist(),
            per_sequence(kl.k1, mask).tolist(),
            per_sequence(kl.k3, mask).tolist(),
            strict=True,
        )
        return [
            _Answer(name, prompt, self._tokenizer.decode(ids, skip_special_tokens=True), tokens, ended, k1, k3)
            for prompt, ids, tokens, ended, k1, k3 in columns
        ]


def _gold(prompts: Sequence[Prompt], base_model: Path, gold_judge: Path) -> RewardFunction:
    """What stands for the truth: a model of people's ratings that training never saw, or the right answers.

    Raises:
        DataError: there are neither.
    """
    if not is_off(gold_judge):
        return GoldJudge.load(base_model, gold_judge)
    answers = {row.prompt: row.answer for row in prompts if row.answer is not None}
    if len(answers) < len(prompts):
        raise DataError(
            f"gold_judge is off (null in params.yaml), and only {len(answers)} of {len(prompts)} held-out prompts have "
            "a right answer, so nothing independent can judge the policies: switch it on, or give prompts an `answer`"
        )
    return lambda asked, responses: [
        right_answer(text, answers[prompt]) for prompt, text in zip(asked, responses, strict=True)
    ]


def _judge(answers: Sequence[_Answer], reward: CompositeReward, gold: RewardFunction, *, vader: bool) -> list[Judged]:
    """Every judge scores every response."""
    prompts = [answer.prompt.prompt for answer in answers]
    responses = [answer.response for answer in answers]
    proxy = reward(prompts, responses)
    truth = torch.as_tensor(gold(prompts, responses))
    if not torch.isfinite(truth).all():
        raise TrainingError("the gold judge gives a score that is not finite: retrain it with a lower learning_rate")
    lexicon: Any = SentimentIntensityAnalyzer() if vader else None
    return [
        Judged(
            id=f"{answer.policy}/{answer.prompt.id}",
            policy=answer.policy,
            prompt_id=answer.prompt.id,
            prompt=answer.prompt.prompt,
            response=answer.response,
            tokens=answer.tokens,
            ended=answer.ended,
            kl=answer.kl,
            kl_k3=answer.kl_k3,
            proxy=proxy.total[row].item(),
            rewards={name: values[row].item() for name, values in proxy.components.items()},
            gold=truth[row].item(),
            vader=lexicon.polarity_scores(answer.prompt.prompt + answer.response)["compound"] if lexicon else None,
        )
        for row, answer in enumerate(answers)
    ]


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
        row[record.policy] = record.response
        row |= {f"{judge}_{record.policy}": score for judge in JUDGES if (score := record.score(judge)) is not None}
        row[f"kl_{record.policy}"] = record.kl
    return list(rows.values())[:count]


def _provenance(
    seed: int, sections: Sequence[BaseModel], folders: Mapping[str, Path], prompts: Sequence[Prompt]
) -> list[tuple[str, str]]:
    """What identifies this evaluation: the seed, the parameters it read, and the weights and prompts, by content."""
    content = json.dumps([seed, *(section.model_dump() for section in sections)], sort_keys=True)
    weights = [
        (f"Weights: {name}", _digest((folder / ADAPTER / "adapter_model.safetensors").read_bytes()))
        for name, folder in folders.items()
        if not is_off(folder)
    ]
    texts = "\n".join(row.prompt for row in prompts)
    return [
        ("Seed", str(seed)),
        ("Parameters of evaluate, generation and reward", _digest(content.encode())),
        (f"The {len(prompts)} prompts", _digest(texts.encode())),
        *weights,
    ]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    from tasks.core.stage import run_stage

    run_stage("evaluate")
