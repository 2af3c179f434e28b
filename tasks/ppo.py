"""PPO against the composed reward, with a KL penalty to the SFT policy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tasks.core import ranks, tracking
from tasks.core.files import write_json
from tasks.core.models import add_lora, load_reference, load_tokenizer, prepare_process, save_adapter
from tasks.core.schema import Prompt, read_rows, write_rows
from tasks.core.sections.environment import EnvironmentParams
from tasks.core.sections.generation import GenerationParams
from tasks.core.sections.lora import LoraParams
from tasks.core.sections.ppo import PPOParams
from tasks.core.sections.reward import RewardParams
from tasks.core.training import PolicyKeeper, write_history
from tasks.rewards.composition import load_reward
from tasks.rl.conversation import load_talk
from tasks.rl.policy import Policy
from tasks.rl.trainer import PPOTrainer, TextCodec

__all__ = ["ppo"]


def ppo(
    params: PPOParams,
    lora: LoraParams,
    generation: GenerationParams,
    reward: RewardParams,
    environment: EnvironmentParams | None,
    policy_seed: int,
    *,
    base_model: Path,
    sft: Path,
    reward_model: Path,
    prepare: Path,
    out: Path,
) -> None:
    """Train the policy with the project's own PPO.

    Writes adapter/, policies/ (the adapter of every `keep_every` updates), history.csv (one row per update),
    samples.jsonl and metrics.json (the last update's figures).
    """
    prepare_process()
    tokenizer = load_tokenizer(base_model)
    rows = read_rows(prepare / "prompts" / "train.jsonl", Prompt)
    prompts = [row.prompt for row in rows]
    model = add_lora(load_reference(base_model, sft), lora, seed=policy_seed).eval()
    progress = _Progress(params.updates)
    keeper = PolicyKeeper(params.keep_every, out)
    trainer = PPOTrainer(
        Policy(model, temperature=generation.temperature),
        TextCodec(
            prompts=prompts,
            prompt_ids=[tokenizer(prompt).input_ids for prompt in prompts],
            decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        load_reward(reward, rows, base_model=base_model, sft=sft, reward_model=reward_model),
        params,
        generation,
        seed=policy_seed,
        talk=load_talk(environment, rows, tokenizer, generation) if environment else None,
        checkpoints=tracking.current_checkpoints(),
        log=progress.log,
        log_samples=lambda rows, step: tracking.log_samples("samples", rows, step=step),
        tell=lambda message: tqdm.write(f"ppo: {message}", file=sys.stderr),
        keep=lambda update: keeper.keep(update, model),
    )
    trainer.train()
    progress.close()
    save_adapter(model, out)
    keeper.finish()
    write_history(out / "history.csv", trainer.history)
    write_rows(out / "samples.jsonl", trainer.samples)
    write_json(out / "metrics.json", trainer.history[-1])


class _Progress:
    """Sends each update's metrics to the tracker and shows the three that matter beside the bar."""

    def __init__(self, updates: int) -> None:
        self._updates = updates
        self._bar: Any = None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        tracking.log_metrics(metrics, step=step)
        if "reward" in metrics:
            self._bar = self._bar or tqdm(
                total=self._updates, initial=step - 1, desc="ppo", unit="update", disable=ranks.rank() > 0
            )
            self._bar.update()
            self._bar.set_postfix({name: f"{metrics[name]:.3g}" for name in ("reward", "kl", "entropy")})

    def close(self) -> None:
        if self._bar:
            self._bar.close()


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("ppo")
