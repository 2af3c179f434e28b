"""What an answer costs: one sample of PPO beside the best of 16 of SFT by the reward model, `make bench-inference`.

Needs a finished pipeline (`rlhf run`). Both answer the same held-out prompts in batches of as many sequences. They take
turns, and the median over the repetitions is printed, in seconds of wall time per answer.
"""

import json
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from peft import PeftModel
from results import ROOT

from tasks.config.params import load_params
from tasks.core.paths import Artifacts
from tasks.evals.scoring import sample_prompts
from tasks.models.loading import init_process, load_policy, load_reference, load_tokenizer
from tasks.rewards.composition import load_reward
from tasks.rl.rollout import LocalSampler, derive_generator

PROMPTS, REPETITIONS, N, BATCH = 64, 3, 16, 64
STAGES = ("base_model", "sft", "reward_model", "ppo")


def main() -> None:
    init_process()
    params = load_params(ROOT / "params.yaml")
    folders = {stage: ROOT / "artifacts" / stage for stage in STAGES}
    models, tokenizer = (folders["base_model"], folders["sft"]), load_tokenizer(folders["base_model"])
    prompts = sample_prompts(ROOT / "artifacts" / "prepare" / "prompts" / "test.jsonl", PROMPTS, params.seed)
    reward = load_reward(params.reward, prompts, Artifacts(**folders, out=ROOT))
    policy: Any = load_policy(*models, folders["ppo"])
    if isinstance(policy, PeftModel):
        policy = policy.merge_and_unload()
    ppo, sft = (LocalSampler(model, tokenizer, params.generation) for model in (policy, load_reference(*models)))

    def answer(sampler: LocalSampler, samples: int) -> Sequence[str]:
        texts, size = list[str](), BATCH // samples
        for start in range(0, PROMPTS, size):
            batch, generator = prompts[start : start + size], derive_generator(params.seed, start)
            texts += sampler.sample(batch, generator, samples_per_prompt=samples).texts
        return texts

    def best_of_n() -> None:
        reward([row.prompt for row in prompts for _ in range(N)], answer(sft, N))

    ways = {"ppo": partial(answer, ppo, 1), f"best of {N}": best_of_n}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPETITIONS):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append((time.perf_counter() - started) / PROMPTS)
    medians = {name: round(statistics.median(own), 4) for name, own in seconds.items()}
    print(json.dumps(medians | {"ratio": round(medians[f"best of {N}"] / medians["ppo"], 1)}))


if __name__ == "__main__":
    main()
