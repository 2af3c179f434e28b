"""PPO update against TRL 1.12.0, the last release with PPO, on equal work: `make bench-ppo`.

Each side runs in processes of its own, ours and the peer's in turn, so that a change of the machine's speed meets
both. Equal are: the model, LoRA's rank and modules, the prompts, the lengths (no response ends early), the rollout's
size, the epochs and minibatches, a reward model of the same size, float32, the number of threads, and the allocator's
settings. Not equal, because that is what is compared: TRL trains a separate critic in full, computes log-probabilities
and values of the rollout in passes of their own, and computes logits over the prompt; ours has policy and value on one
trunk and keeps what sampling has computed.

Prints the phases' medians and, last, one JSON line with `ratio_wall`, `ratio_cpu` and `ratio_rss`, peer ÷ ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inputs import MODEL, RESPONSE_TOKENS, ROOT, check_model, load_tokenizer, lora_config, prompts

PEER = ROOT / ".rlhf" / "trl-1.12.0"

RESPONSES, EPOCHS, UPDATES = 16, 4, 3
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(64 * 2**20),
}  # fmt: skip


class Stopwatch:
    """Timer of updates (wall and CPU seconds) and of their phases (wall seconds)."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []
        self._last: tuple[float, float] | None = None

    def phase(self, name: str, seconds: float) -> None:
        if self.updates:
            self.updates[-1][name] = self.updates[-1].get(name, 0.0) + seconds

    def lap(self) -> None:
        """End the last update and begin the next."""
        now = time.perf_counter(), time.process_time()
        if self._last is not None:
            self.updates[-1] |= {"wall": now[0] - self._last[0], "cpu": now[1] - self._last[1]}
        self._last = now
        self.updates.append({})

    def result(self) -> dict[str, Any]:
        """Times after the last lap, without the first update, which warms up."""
        return {"updates": self.updates[1:-1], "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def run_ours(*, own_critic: bool = False) -> dict[str, Any]:
    """Time our trainer; with `own_critic` the values come from a second trunk, trained beside the policy's."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from tasks.config.params import load_params
    from tasks.config.training import GenerationParams
    from tasks.core.rows import Prompt
    from tasks.models.onednn_linear import freeze_for_onednn, register_frozen_lora
    from tasks.rewards.composition import CompositeReward
    from tasks.rewards.scorers import TextScorer
    from tasks.rl.callbacks import Callback, Checkpoint
    from tasks.rl.policy import Policy
    from tasks.rl.ppo import PPO
    from tasks.rl.rollout import LocalSampler, Rollout
    from tasks.rl.trainer import RLTrainer

    watch = Stopwatch()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    freeze_for_onednn(model)
    tokenizer = load_tokenizer()
    judge = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=1, dtype=torch.float32)
    judge.config.pad_token_id = tokenizer.pad_token_id
    freeze_for_onednn(judge)
    scorer = TextScorer(judge, tokenizer)
    reward = CompositeReward(
        {"learned": lambda prompts, texts: scorer(list(zip(prompts, texts, strict=True)))}, {"learned": 1.0}
    )
    section = load_params(ROOT / "params.yaml").ppo
    assert section is not None
    params = section.model_copy(
        update={
            "updates": UPDATES + 1, "prompts_per_update": RESPONSES, "samples_per_prompt": 1, "epochs": EPOCHS,
            "minibatches": 1, "micro_batch_size": RESPONSES, "learning_rate": 1e-5, "target_kl": None,
        }
    )  # fmt: skip
    generation = GenerationParams(max_new_tokens=RESPONSE_TOKENS, temperature=1.0)
    rows = [Prompt(id=str(row), prompt=tokenizer.decode(ids)) for row, ids in enumerate(prompts(RESPONSES))]

    class Timer(Callback):
        def on_log(self, metrics: dict[str, float], update: int) -> None:
            for name in ("rollout", "experience", "optimise"):
                watch.phase(name, metrics[f"time/{name}_s"])
            watch.lap()

    policy = Policy(get_peft_model(model, register_frozen_lora(lora_config())).eval(), temperature=1.0)
    sampler = LocalSampler(policy.model, tokenizer, generation, policy.value_head)
    ids = dict(zip((row.prompt for row in rows), prompts(RESPONSES), strict=True))
    sample = sampler.sample

    def sample_ids(rows: Sequence[Prompt], *arguments: Any, **options: Any) -> Rollout:
        return sample([ids[row.prompt] for row in rows], *arguments, **options)

    sampler.sample = sample_ids  # type: ignore[method-assign, assignment]  # the peer's ids, not those of their texts
    trainer = RLTrainer(
        policy,
        sampler,
        rows,
        reward,
        PPO(params, max_new_tokens=RESPONSE_TOKENS),
        seed=0,
        checkpoint=Checkpoint(None),
        callbacks=[Timer()],
    )
    if own_critic:
        critic = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        freeze_for_onednn(critic)
        add_critic(trainer, get_peft_model(critic, register_frozen_lora(lora_config())).eval())
    watch.lap()
    trainer.train()
    return watch.result()


def add_critic(trainer: Any, critic: Any) -> None:
    """Compute values from this model's last hidden states instead of the policy's."""
    import torch

    from tasks.rl.policy import model_inputs

    policy, forward, sample = trainer.policy, trainer.policy.forward, trainer.sample
    policy.critic = critic
    trainer.updater.optimizer.add_param_group(
        {"params": [weight for weight in critic.parameters() if weight.requires_grad]}
    )

    def values(batch: Any) -> Any:
        inputs = model_inputs(batch) | {"logits_to_keep": 1}
        states = critic(**inputs, output_hidden_states=True).hidden_states[-1]
        return policy.value_head(states[:, batch.prompts.shape[1] - 1 :]).squeeze(-1)

    def sample_with_values() -> Any:
        rollout = sample()
        with torch.no_grad():
            return dataclasses.replace(rollout, values=values(rollout))

    policy.forward, trainer.sample = lambda batch: forward(batch)._replace(values=values(batch)), sample_with_values


def run_trl() -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    watch = Stopwatch()
    torch.manual_seed(0)
    generate = ppo_trainer.batch_generation

    def timed(*arguments: Any, **options: Any) -> Any:
        watch.lap()
        started = time.perf_counter()
        result = generate(*arguments, **options)
        watch.phase("rollout", time.perf_counter() - started)
        return result

    ppo_trainer.batch_generation = timed
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    policy = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    judges = [
        AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=1, dtype=torch.float32) for _ in range(2)
    ]
    for judge in judges:
        judge.config.pad_token_id = tokenizer.pad_token_id
    rows = Dataset.from_dict({"input_ids": prompts(RESPONSES) * (UPDATES + 1)})
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder, per_device_train_batch_size=RESPONSES, gradient_accumulation_steps=1, num_mini_batches=1,
            num_ppo_epochs=EPOCHS, total_episodes=RESPONSES * (UPDATES + 1), response_length=RESPONSE_TOKENS,
            local_rollout_forward_batch_size=RESPONSES, learning_rate=1e-5, temperature=1.0, num_sample_generations=0,
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", seed=0,
        )  # fmt: skip
        PPOTrainer(
            arguments, tokenizer, policy, None, judges[0], rows, judges[1], eval_dataset=rows,
            peft_config=lora_config(),
        ).train()  # fmt: skip
    watch.lap()
    return watch.result()


def run_in_process(side: str, python: Path) -> dict[str, Any]:
    """Run one side in its own process."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        environment = os.environ | ALLOCATOR | {
            "PYTHONPATH": str(ROOT), "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        command = [str(python), __file__, "--side", side, "--out", out.name]
        subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
        result: dict[str, Any] = json.loads(Path(out.name).read_text())
    return result


def compare_sides(repetitions: int) -> None:
    here = Path(sys.executable)
    sides = {"ours": here, "critic": here, "peer": PEER / "bin" / "python"}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for repetition in range(repetitions):
        for side, python in sides.items():
            runs[side].append(run_in_process(side, python))
            walls = ", ".join(f"{update['wall']:.1f}" for update in runs[side][-1]["updates"])
            print(f"{side}, run {repetition + 1}: {walls} s an update")
    medians = {side: medians_of(results) for side, results in runs.items()}
    for side, figures in medians.items():
        print(side, {name: round(value, 2) for name, value in figures.items()})
    ratios = {
        f"{label}_{name}": round(medians["peer"][name] / medians[side][name], 3)
        for side, label in (("critic", "own_critic_ratio"), ("ours", "ratio"))
        for name in ("wall", "cpu", "rss")
    }
    print(json.dumps(ratios | {"repetitions": repetitions, "updates": UPDATES}))


def medians_of(results: list[dict[str, Any]]) -> dict[str, float]:
    """Compute the median seconds of each phase over all updates, and the median peak memory of the runs in GiB."""
    updates = [update for result in results for update in result["updates"]]
    names = dict.fromkeys(name for update in updates for name in update)
    figures = {name: statistics.median(update[name] for update in updates) for name in names}
    return figures | {"rss": statistics.median(result["rss"] for result in results) / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "critic", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        result = run_trl() if arguments.side == "peer" else run_ours(own_critic=arguments.side == "critic")
        arguments.out.write_text(json.dumps(result))
    else:
        check_model()
        compare_sides(arguments.repetitions)


if __name__ == "__main__":
    main()
