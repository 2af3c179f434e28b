"""What an answer costs: one sample of PPO beside the best of 16 of SFT by the reward model, `make bench-inference`.

Needs a finished pipeline (`rlhf run`). Both answer the same held-out prompts in batches of as many sequences. They take
turns, and the median over the repetitions is printed, in seconds of wall time per answer.
"""

import json
import statistics
import time
from functools import partial

from results import ROOT, make_sampler

from tasks.config.params import load_params
from tasks.core.paths import Artifacts
from tasks.evals.scoring import sample_prompts
from tasks.models.loading import init_process, load_policy, load_reference
from tasks.rewards.composition import load_reward

PROMPTS, REPETITIONS, N = 64, 3, 16
STAGES = ("base_model", "sft", "reward_model", "ppo")


def main() -> None:
    init_process()
    params = load_params(ROOT / "params.yaml")
    folders = {stage: ROOT / "artifacts" / stage for stage in STAGES}
    models = folders["base_model"], folders["sft"]
    prompts = sample_prompts(ROOT / "artifacts" / "prepare" / "prompts" / "test.jsonl", PROMPTS, params.seed)
    sampler = make_sampler(params, folders, prompts)
    reward = load_reward(params.reward, prompts, Artifacts(**folders, out=ROOT))
    policy, sft = load_policy(*models, folders["ppo"]).merge_and_unload(), load_reference(*models)

    def best_of_n() -> None:
        answers = sampler.sample("sft", sft, samples_per_prompt=N)
        reward([answer.prompt.prompt for answer in answers], [answer.response for answer in answers])

    ways = {"ppo": partial(sampler.sample, "ppo", policy), f"best of {N}": best_of_n}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPETITIONS):
        for name, answer in ways.items():
            started = time.perf_counter()
            answer()
            seconds[name].append((time.perf_counter() - started) / PROMPTS)
    medians = {name: round(statistics.median(own), 4) for name, own in seconds.items()}
    print(json.dumps(medians | {"ratio": round(medians[f"best of {N}"] / medians["ppo"], 1)}))


if __name__ == "__main__":
    main()
