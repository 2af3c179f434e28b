"""The stages that train, at their smallest: inputs to write, and a call for each stage.

Texts differ in length, so that the order of the data matters; two epochs of ten steps each unless it says otherwise.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.config.reward import RewardParams
from tasks.config.rl import GRPOParams, RolloutParams
from tasks.config.training import DPOParams, GenerationParams, GoldJudgeParams, LoraParams, RewardModelParams, SFTParams
from tasks.core.paths import Artifacts
from tasks.core.rows import Demonstration, Preference, Prompt, Rating, write_rows
from tasks.dpo import dpo
from tasks.gold_judge import gold_judge
from tasks.grpo import grpo
from tasks.models.loading import add_lora, save_weights
from tasks.reward_model import reward_model
from tasks.sft import sft
from tests.conftest import letter_tokenizer, tiny_model

ROWS = 20
LORA = LoraParams(r=4, alpha=8, target_modules=("q_proj", "v_proj"), reward_model_modules="all-linear")
GENERATION = GenerationParams(max_new_tokens=4, temperature=1.0)
ROLLOUT = RolloutParams.model_validate({})
REWARD = RewardParams(weights={"length": 1.0, "repetition": 0.5}, rules={"length": {"target": 2, "tolerance": 4}})

_COMMON = {"epochs": 2, "batch_size": 2, "learning_rate": 0.01, "max_length": 32}
_SFT = SFTParams(max_examples=ROWS, max_validation_examples=4, **_COMMON)
_REWARD_MODEL = RewardModelParams(
    ensemble_size=1, lora_first_layer=0, normalisation_samples=4, min_accuracy=0.0, **_COMMON
)
_GOLD_JUDGE = GoldJudgeParams(lora_first_layer=0, max_examples=ROWS, **_COMMON)
_DPO = DPOParams(max_pairs=ROWS - 2, beta=0.1, **_COMMON)
"""Nine steps an epoch: the last logged step is that of a checkpoint, and a run going on from there logs no other."""
_GRPO = GRPOParams(
    updates=4, prompts_per_update=2, samples_per_prompt=4, epochs=2, minibatches=2, micro_batch_size=4,
    learning_rate=0.01, loss_type="grpo", clip_range=0.2, max_grad_norm=1.0, kl_coef=0.1, missing_eos_penalty=0.5,
    checkpoint_every=1, snapshot_every=2,
)  # fmt: skip

Run = Callable[[Path, Path], None]
"""(folder of inputs, folder for outputs) → None."""


def run_reward_model(of: Path, out: Path, *, seed: int = 0, **changes: Any) -> None:
    params = RewardModelParams.model_validate(_REWARD_MODEL.model_dump() | changes)
    inputs = {name: of / name for name in ("base_model", "sft", "prepare", "preferences")}
    reward_model(params, LORA, GENERATION, seed, Artifacts(**inputs, out=out))


def run_gold_judge(of: Path, out: Path, **changes: Any) -> None:
    params = GoldJudgeParams.model_validate(_GOLD_JUDGE.model_dump() | changes)
    gold_judge(params, LORA, 0, Artifacts(base_model=of / "base_model", prepare=of / "prepare", out=out))


RUNS: dict[str, Run] = {
    "sft": lambda of, out: sft(
        _SFT, LORA, None, 0, Artifacts(base_model=of / "base_model", prepare=of / "prepare", out=out)
    ),
    "reward_model": run_reward_model,
    "gold_judge": run_gold_judge,
    "dpo": lambda of, out: dpo(
        _DPO, LORA, 0, Artifacts(base_model=of / "base_model", sft=of / "sft", preferences=of / "preferences", out=out)
    ),
    "grpo": lambda of, out: grpo(
        _GRPO, LORA, GENERATION, REWARD, None, ROLLOUT, 0, Artifacts(base_model=of / "base_model", sft=of / "sft",
        reward_model=of / "reward_model", prepare=of / "prepare", out=out),
    ),
}  # fmt: skip


def write_base_model(of: Path) -> None:
    tiny_model().save_pretrained(of / "base_model" / "model")
    letter_tokenizer().save_pretrained(of / "base_model" / "model")


def write_parts(of: Path) -> Path:
    """Base model, SFT and PPO, with adapters that change what they lie on; the folder itself."""
    write_base_model(of)
    for seed, stage in enumerate(("sft", "ppo")):
        adapter = add_lora(tiny_model(), LORA, seed=seed)
        for name, weight in adapter.named_parameters():
            if "lora_B" in name:
                weight.data.fill_(0.05 * (seed + 1))
        save_weights(adapter, of / stage)
    return of


def write_inputs(of: Path) -> None:
    """A random model, an SFT adapter that changes nothing, and rows of random letters."""
    write_base_model(of)
    save_weights(add_lora(tiny_model(), LORA, seed=0), of / "sft")
    draw = random.Random(0)

    def text() -> str:
        return " " + "".join(draw.choices("abcdefgh ", k=draw.randint(1, 20)))

    def pairs() -> list[Preference]:
        return [Preference(id=str(i), prompt="a", chosen=f"{text()}a", rejected=f"{text()}b") for i in range(ROWS)]

    prepare, preferences = of / "prepare", of / "preferences"
    for part in ("train", "validation"):
        rows = [Demonstration(id=str(i), prompt=f"{draw.choice('abc')}", response=text()) for i in range(ROWS)]
        write_rows(prepare / "demonstrations" / f"{part}.jsonl", rows)
    write_rows(prepare / "prompts" / "train.jsonl", [Prompt(id=letter, prompt=letter) for letter in "abcd"])
    for part in ("train", "test"):
        ratings = [Rating(id=str(i), text=text(), ratings=(draw.uniform(-4, 4),)) for i in range(ROWS)]
        write_rows(prepare / "ratings" / "gold" / f"{part}.jsonl", ratings)
        write_rows(preferences / f"{part}.jsonl", pairs())
    write_rows(preferences / "validation.jsonl", pairs())
    (preferences / "ceiling.csv").write_text("bucket,agreement\n", encoding="utf-8")
    for part in ("train", "test"):
        write_rows(prepare / "preferences" / "gold" / f"{part}.jsonl", pairs())
