"""What did RL cost or bring elsewhere? SFT and the policies on tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import gc
from pathlib import Path

from tasks.core.files import write_json
from tasks.core.models import is_off, load_policy, load_reference, load_tokenizer, prepare_process
from tasks.core.paths import project_root
from tasks.core.sections.lm_eval import LmEvalParams
from tasks.evals.compare import REFERENCE
from tasks.evals.harness import Scores, measure, open_tasks

__all__ = ["lm_eval"]


def lm_eval(
    params: LmEvalParams,
    seed: int,
    *,
    base_model: Path,
    sft: Path,
    ppo: Path,
    grpo: Path,
    dpo: Path,
    prepare: Path,
    preferences: Path,
    out: Path,
) -> None:
    """Measure SFT and those of PPO, GRPO and DPO that are on, in every task.

    Writes results.json (policy → task → metric → [value, standard error or null]) and metrics.json (policy →
    `<task>.<metric>` → value). Tasks read held-out demonstrations and preferences, or the hub.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task.
        SourceError: the data of a task cannot be read.
    """
    prepare_process()
    tokenizer = load_tokenizer(base_model)
    policies = {name: folder for name, folder in (("ppo", ppo), ("grpo", grpo), ("dpo", dpo)) if not is_off(folder)}
    data = (prepare / "demonstrations", preferences / "test.jsonl")
    with open_tasks(params, project_root() / params.include, data, seed) as tasks:
        results = {REFERENCE: measure(load_reference(base_model, sft), tokenizer, tasks, params=params, seed=seed)}
        for name, folder in policies.items():
            gc.collect()  # the policy before it holds itself in reference cycles
            results[name] = measure(load_policy(base_model, sft, folder), tokenizer, tasks, params=params, seed=seed)
    write_json(out / "results.json", results)
    write_json(out / "metrics.json", {name: _flat(scores) for name, scores in results.items()})


def _flat(scores: Scores) -> dict[str, float | None]:
    return {f"{task}.{metric}": value for task, row in scores.items() for metric, (value, _) in row.items()}


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("lm_eval")
