"""Stage ppo: PPO with the composed reward and a KL penalty to the SFT policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.core import tracking
from tasks.core.paths import Artifacts
from tasks.core.rows import Demonstration, Prompt, read_rows, write_json, write_rows
from tasks.models.hf_training import write_history
from tasks.models.loading import init_process, load_beside, load_reference, load_tokenizer, make_trainable, save_weights
from tasks.rewards.composition import load_reward
from tasks.rl.callbacks import Checkpoint, ProgressCallback, SnapshotCallback
from tasks.rl.multi_turn import with_environment
from tasks.rl.policy import Policy
from tasks.rl.ppo import PPO
from tasks.rl.ptx import Demonstrations
from tasks.rl.rollout_records import with_texts
from tasks.rl.trainer import RLTrainer
from tasks.rl.vllm_engine import open_sampler

if TYPE_CHECKING:
    from tasks.config.reward import RewardParams
    from tasks.config.rl import PPOParams, RolloutParams
    from tasks.config.training import EnvironmentParams, GenerationParams, LoraParams

__all__ = ["ppo"]


def ppo(
    params: PPOParams,
    lora: LoraParams | None,
    generation: GenerationParams,
    reward: RewardParams,
    environment: EnvironmentParams | None,
    rollout: RolloutParams,
    policy_seed: int,
    artifacts: Artifacts,
) -> None:
    """Train the policy by PPO.

    Writes adapter/, policies/ (the weights of every `snapshot_every` updates), history.csv (one row per update),
    samples.jsonl, rollouts.jsonl (groups of responses, token by token) and metrics.json (the last update's figures).
    """
    init_process()
    tokenizer = load_tokenizer(artifacts.base_model)
    prompts = read_rows(artifacts.prepare / "prompts" / "train.jsonl", Prompt)
    model = make_trainable(load_reference(artifacts.base_model, artifacts.sft), lora, seed=policy_seed).eval()
    reference = load_beside(artifacts.base_model, artifacts.sft, model)
    policy = Policy(model, temperature=generation.temperature, value_head=params.has_values, reference=reference)
    turn_gamma = environment.gamma if environment else 1.0
    demonstrations = None
    if params.ptx_coef:
        rows = read_rows(artifacts.prepare / "demonstrations" / "train.jsonl", Demonstration)
        demonstrations = Demonstrations(rows, tokenizer, model, params.ptx_coef)
    with open_sampler(
        policy, tokenizer, generation, rollout, lora, artifacts, micro_batch_size=params.micro_batch_size
    ) as sampler:
        trainer = RLTrainer(
            policy,
            with_environment(sampler, environment),
            prompts,
            load_reward(reward, prompts, artifacts),
            PPO(params, max_new_tokens=generation.max_new_tokens, turn_gamma=turn_gamma),
            seed=policy_seed,
            checkpoint=Checkpoint(tracking.checkpoint_dir()),
            callbacks=[
                ProgressCallback("ppo", params.updates),
                SnapshotCallback(model, params.snapshot_every, artifacts.out),
            ],
            rollout_params=rollout,
            demonstrations=demonstrations,
        )
        trainer.train()
    save_weights(model, artifacts.out)
    write_history(artifacts.out / "history.csv", trainer.history)
    write_rows(artifacts.out / "samples.jsonl", trainer.samples)
    write_rows(artifacts.out / "rollouts.jsonl", with_texts(trainer.rollouts, tokenizer))
    write_json(artifacts.out / "metrics.json", trainer.history[-1])


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("ppo")
