"""Stage lm_eval: run SFT and the policies on tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import gc
from functools import partial
from typing import TYPE_CHECKING

from tasks.core.paths import Artifacts, project_root
from tasks.core.rows import flatten, write_json
from tasks.evals.compare import REFERENCE
from tasks.evals.lm_harness import load_tasks, run_tasks
from tasks.models.loading import init_process, is_disabled, load_policy, load_reference, load_tokenizer

if TYPE_CHECKING:
    from tasks.config.evaluation import LmEvalParams

__all__ = ["lm_eval"]


def lm_eval(params: LmEvalParams, seed: int, artifacts: Artifacts) -> None:
    """Measure SFT and those of PPO, GRPO and DPO that are on, in every task.

    Writes results.json (policy → task → metric → [value, standard error or null]) and metrics.json (policy →
    `<task>.<metric>` → value). Tasks read held-out demonstrations and preferences, or the hub.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task.
        SourceError: the data of a task cannot be read.
    """
    init_process()
    tokenizer = load_tokenizer(artifacts.base_model)
    trained = {"ppo": artifacts.ppo, "grpo": artifacts.grpo, "dpo": artifacts.dpo}
    data = (artifacts.prepare / "demonstrations", artifacts.preferences / "test.jsonl")
    with load_tasks(params, project_root() / params.include, data, seed) as tasks:
        evaluate = partial(run_tasks, tokenizer=tokenizer, tasks=tasks, params=params, seed=seed)
        results = {REFERENCE: evaluate(load_reference(artifacts.base_model, artifacts.sft))}
        for name, folder in trained.items():
            if not is_disabled(folder):
                gc.collect()  # the previous policy is in reference cycles
                results[name] = evaluate(load_policy(artifacts.base_model, artifacts.sft, folder))
    write_json(artifacts.out / "results.json", results)
    metrics = {name: {key: value for key, (value, _) in flatten(scores).items()} for name, scores in results.items()}
    write_json(artifacts.out / "metrics.json", metrics)


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("lm_eval")
