"""Stage ppo: PPO with the composed reward and a KL penalty to the SFT policy."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.core import distributed, tracking
from tasks.core.paths import Artifacts
from tasks.core.rows import Prompt, read_rows, write_json, write_rows
from tasks.models.hf_training import PolicySnapshots, write_history
from tasks.models.loading import add_lora, init_process, load_reference, load_tokenizer, save_adapter
from tasks.rewards.composition import load_reward
from tasks.rl.multi_turn import load_multi_turn_sampler
from tasks.rl.policy import Policy
from tasks.rl.trainer import PPOTrainer, PromptSet

if TYPE_CHECKING:
    from tasks.config.reward import RewardParams
    from tasks.config.training import EnvironmentParams, GenerationParams, LoraParams, PPOParams

__all__ = ["ppo"]


def ppo(
    params: PPOParams,
    lora: LoraParams,
    generation: GenerationParams,
    reward: RewardParams,
    environment: EnvironmentParams | None,
    policy_seed: int,
    artifacts: Artifacts,
) -> None:
    """Train the policy with the project's own PPO.

    Writes adapter/, policies/ (the adapter of every `snapshot_every` updates), history.csv (one row per update),
    samples.jsonl and metrics.json (the last update's figures).
    """
    init_process()
    tokenizer = load_tokenizer(artifacts.base_model)
    rows = read_rows(artifacts.prepare / "prompts" / "train.jsonl", Prompt)
    prompts = [row.prompt for row in rows]
    model = add_lora(load_reference(artifacts.base_model, artifacts.sft), lora, seed=policy_seed).eval()
    progress = _Progress(params.updates)
    snapshots = PolicySnapshots(params.snapshot_every, artifacts.out)
    trainer = PPOTrainer(
        Policy(model, temperature=generation.temperature),
        PromptSet(
            prompts=prompts,
            prompt_ids=[tokenizer(prompt).input_ids for prompt in prompts],
            decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        load_reward(reward, rows, artifacts),
        params,
        generation,
        seed=policy_seed,
        multi_turn=load_multi_turn_sampler(environment, rows, tokenizer, generation) if environment else None,
        checkpoints=tracking.checkpoint_dir(),
        log=progress.log,
        log_samples=lambda rows, step: tracking.log_samples("samples", rows, step=step),
        warn=lambda message: tqdm.write(f"ppo: {message}", file=sys.stderr),
        save_snapshot=lambda update: snapshots.save(update, model),
    )
    trainer.train()
    progress.close()
    save_adapter(model, artifacts.out)
    snapshots.publish()
    write_history(artifacts.out / "history.csv", trainer.history)
    write_rows(artifacts.out / "samples.jsonl", trainer.samples)
    write_json(artifacts.out / "metrics.json", trainer.history[-1])


class _Progress:
    """Logs each update's metrics and shows reward, KL and entropy beside the progress bar."""

    def __init__(self, updates: int) -> None:
        self._updates = updates
        self._bar: Any = None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        tracking.log_metrics(metrics, step=step)
        if "reward" in metrics:
            self._bar = self._bar or tqdm(
                total=self._updates, initial=step - 1, desc="ppo", unit="update", disable=distributed.rank() > 0
            )
            self._bar.update()
            self._bar.set_postfix({name: f"{metrics[name]:.3g}" for name in ("reward", "kl", "entropy")})

    def close(self) -> None:
        if self._bar:
            self._bar.close()


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("ppo")
