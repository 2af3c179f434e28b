"""The plan's memory beside measured peaks of real trainers and updates, and its parts by hand."""

import copy
import random
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, Trainer
from trl import SFTConfig, SFTTrainer

from tasks.config.params import load_params
from tasks.config.rl import GRPOParams, PPOParams, RLParams
from tasks.config.training import DPOParams, GenerationParams, LoraParams, RewardModelParams, SFTParams
from tasks.core.errors import ConfigError
from tasks.core.rows import Preference, Prompt
from tasks.dpo import make_trainer as make_dpo_trainer
from tasks.models.encoding import EncodedRow
from tasks.models.hf_training import trainer_arguments, trainer_config
from tasks.models.loading import freeze_for_onednn, init_process, lora_config, make_trainable
from tasks.models.plan import Memory, ModelSize, Phase, trainer_phases, update_phases
from tasks.models.stage_plans import GPUS, Hardware, known_gpu, memory_misfits, plan_stages
from tasks.rewards.training import TrainingData
from tasks.rewards.training import make_trainer as make_reward_trainer
from tests.conftest import SHIPPED_PARAMS, letter_tokenizer
from tests.support.tiny_trainer import GRPO_PARAMS, PARAMS, NumberTokenizer, low_tokens, trainer_of

FEW = LoraParams(r=8, alpha=16, target_modules=("q_proj", "v_proj"), reward_model_modules="all-linear")
ALL = FEW.model_copy(update={"target_modules": "all-linear"})
STEPS = {"epochs": 1, "learning_rate": 1e-3}


class PeakBytes(TorchDispatchMode):
    """Bytes of all storages that live at once, at most; those of a module that is there already are added first."""

    def __init__(self, *modules: Any) -> None:
        super().__init__()
        self.peak, self._sizes = 0, dict[int, int]()
        for module in modules:
            for weight in module.parameters():
                self._add(weight)

    def _add(self, tensor: torch.Tensor) -> None:
        opaque = tensor.layout is torch._mkldnn  # weights as oneDNN wants them, which have no storage
        owner: Any = tensor if opaque else tensor.untyped_storage()
        key = id(tensor) if opaque else owner._cdata
        if key not in self._sizes:
            self._sizes[key] = tensor.numel() * tensor.itemsize if opaque else owner.nbytes()
            self.peak = max(self.peak, sum(self._sizes.values()))
            weakref.finalize(owner, self._sizes.pop, key, None)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return result


def config(vocabulary: int, width: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=layers,
        num_attention_heads=width // 16, num_key_value_heads=width // 32, max_position_embeddings=512, pad_token_id=0,
        eos_token_id=1, bos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip


SMALL, WIDE, LARGE = config(300, 128, 3), config(8000, 64, 3), config(40000, 128, 4)


def frozen(of: LlamaConfig, kind: Any = AutoModelForCausalLM) -> Any:
    """The model as `load_reference` leaves it."""
    model = kind.from_config(of, dtype=torch.float32)
    freeze_for_onednn(model)
    return model.eval()


def ids(count: int) -> list[int]:
    return random.choices(range(3, 20), k=count)


def worst(phases: list[Phase]) -> float:
    return max(phase.memory(phase.value).total for phase in phases)


def sft(of: LlamaConfig, lora: LoraParams | None, batch: int, length: int, *, evaluates: bool) -> tuple[float, float]:
    """Peak of SFT's trainer, and the plan's."""
    model = make_trainable(frozen(of), lora, seed=0)
    params = SFTParams(max_examples=1, max_validation_examples=1, batch_size=batch, **STEPS)
    row = {"input_ids": ids(length), "completion_mask": [0] * 3 + [1] * (length - 3)}
    short = {"input_ids": ids(length - 2), "completion_mask": [0] * 3 + [1] * (length - 5)}
    rows = Dataset.from_list([row, short] * (2 * batch))
    arguments = trainer_config(SFTConfig, params, "sft", **trainer_arguments(params, seed=0), max_length=None)
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=letter_tokenizer()
    )
    with PeakBytes(trainer.model) as measured:
        trainer.train()
        if evaluates:
            trainer.evaluate()
    size = ModelSize(of, lora, on_gpu=False)
    return measured.peak, worst(trainer_phases(size, "batch", batch, length, heldout=len(rows) if evaluates else 0))


def trained_peak(trainer: Trainer, *beside: Any) -> float:
    with PeakBytes(trainer.model, *beside) as measured:
        trainer.train()
    return measured.peak


def dpo(of: LlamaConfig, lora: LoraParams | None, batch: int, length: int) -> tuple[float, float]:
    """Peak of DPO's trainer, and the plan's."""
    params = DPOParams(max_pairs=1, beta=0.1, batch_size=batch, **STEPS)
    row = {"prompt_ids": ids(5), "chosen_ids": ids(length - 5), "rejected_ids": ids(length - 7)}
    model, reference = frozen(of), frozen(of)
    options: dict[str, Any] = {"peft_config": lora_config(model, lora)} if lora else {"ref_model": reference}
    model = model if lora else make_trainable(model, None, seed=0)
    rows = Dataset.from_list([row] * (3 * batch))
    trainer = make_dpo_trainer(
        params, 0, rows, model=model, processing_class=letter_tokenizer(), callbacks=[], **options
    )
    size = ModelSize(of, lora, on_gpu=False)
    phases = trainer_phases(size, "batch", batch, length, rows=2, beside=0 if lora else size.weights)
    return trained_peak(trainer, *([] if lora else [reference])), worst(phases)


def reward_model(
    of: LlamaConfig, lora: LoraParams | None, batch: int, length: int, first_layer: int
) -> tuple[float, float]:
    """Peak of the reward model's trainer, and the plan's."""
    own = copy.deepcopy(of)
    own.num_labels = 1
    model = frozen(own, AutoModelForSequenceClassification)
    model = make_trainable(model, lora, seed=0, head="score", first_layer=first_layer)
    params = RewardModelParams(lora_first_layer=first_layer, normalisation_samples=2, batch_size=batch, **STEPS)
    pair = Preference(id="0", prompt="", chosen="a", rejected="b")
    encoded = [EncodedRow([], [ids(length), ids(length - 2)])] * (3 * batch)
    data = TrainingData({"train": [pair] * len(encoded)}, encoded={"train": encoded})
    trainer = make_reward_trainer(params, model, letter_tokenizer(), data, seed=0, callbacks=[])
    size = ModelSize(of, lora, on_gpu=False, score=True, first_layer=first_layer)
    return trained_peak(trainer), worst(trainer_phases(size, "batch", batch, length, rows=2, head="score"))


class EndlessTokenizer(NumberTokenizer):
    """No token ends a response, so all are as long as they can be."""

    eos_token_id = -1


def rl(
    of: LlamaConfig, lora: LoraParams | None, params: RLParams, prompt: int, response: int, temperature: float = 1.0
) -> tuple[float, float]:
    """Peak of two updates of the RL trainer, and the plan's."""
    model = make_trainable(frozen(of), lora, seed=0).eval()
    reference = None if lora else frozen(of)
    generation = GenerationParams(max_new_tokens=response, temperature=temperature)
    prompts = [Prompt(id=str(i), prompt=" ".join(map(str, ids(prompt)))) for i in range(12)]
    trainer = trainer_of(
        params, model, low_tokens, tokenizer=EndlessTokenizer(), prompts=prompts, generation=generation,
        reference=reference,
    )  # fmt: skip
    with PeakBytes(trainer.policy) as measured:
        trainer.train()
    size = ModelSize(of, lora, on_gpu=False)
    return measured.peak, worst(update_phases(size, params, prompt, generation, beside=0 if lora else size.weights))


def ppo_params(**changes: Any) -> PPOParams:
    return PARAMS.model_copy(update={"updates": 2, **changes})


def grpo_params(**changes: Any) -> GRPOParams:
    return GRPO_PARAMS.model_copy(update={"updates": 2, **changes})


SHAPES: dict[str, Callable[[], tuple[float, float]]] = {
    "sft, adapters": partial(sft, SMALL, ALL, 8, 48, evaluates=False),
    "sft with evaluation, adapters": partial(sft, WIDE, FEW, 4, 40, evaluates=True),
    "sft, all parameters": partial(sft, WIDE, None, 8, 32, evaluates=False),
    "dpo, adapters": partial(dpo, WIDE, ALL, 4, 40),
    "dpo, all parameters": partial(dpo, SMALL, None, 6, 64),
    "reward model, adapters": partial(reward_model, SMALL, ALL, 8, 64, 0),
    "reward model, upper layers": partial(reward_model, SMALL, ALL, 8, 64, 1),
    "reward model, all parameters": partial(reward_model, WIDE, None, 4, 32, 0),
    "ppo, adapters": partial(rl, WIDE, ALL, ppo_params(micro_batch_size=6), 6, 24),
    "ppo, all parameters": partial(rl, SMALL, None, ppo_params(prompts_per_update=8, micro_batch_size=16), 8, 40),
    "grpo, adapters, temperature": partial(rl, LARGE, FEW, grpo_params(micro_batch_size=4), 6, 16, 0.7),
    "grpo, all parameters": partial(rl, WIDE, None, grpo_params(prompts_per_update=4, micro_batch_size=8), 10, 30),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_planned_memory_is_within_15_percent_of_what_lives_at_once(shape: str) -> None:
    init_process()
    measured, planned = SHAPES[shape]()
    print(f"{shape}: measured {measured / 1e6:.2f} MB, planned {planned / 1e6:.2f} MB, {planned / measured - 1:+.1%}")
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.fixture(params=[False, True])
def size(request: pytest.FixtureRequest) -> ModelSize:
    return ModelSize(SMALL, None if request.param else FEW, on_gpu=False)


def test_parameters_are_those_of_the_model(size: ModelSize) -> None:
    model = make_trainable(frozen(SMALL), size.lora, seed=0)
    weights = list(model.parameters())
    assert size.weights == 4 * sum(weight.numel() for weight in weights)
    assert size.trained == sum(weight.numel() for weight in weights if weight.requires_grad)
    if size.lora:  # rank 8, 3 layers, q: 128 → 128, v: 128 → 64
        assert size.trained == 8 * 3 * (128 + 128 + 128 + 64)


def test_flops_of_a_forward_pass_are_those_that_torch_counts() -> None:
    model = AutoModelForCausalLM.from_config(SMALL, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones((2, 64), dtype=torch.long))
    planned = ModelSize(SMALL, None, on_gpu=False).forward_flops(2 * 64, 64)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_training_all_parameters_costs_three_forward_passes_and_adapters_two() -> None:
    everything, adapters = (ModelSize(SMALL, lora, on_gpu=False) for lora in (None, FEW))
    assert everything.training_flops(1000, 1) == pytest.approx(3 * everything.forward_flops(1000, 1), rel=0.1)
    assert adapters.training_flops(1000, 1) == pytest.approx(2 * adapters.forward_flops(1000, 1), rel=0.1)


def test_the_largest_value_is_the_last_that_fits() -> None:
    phase = Phase("ppo.micro_batch_size", 4, lambda rows: Memory(weights=100, activations=7 * rows))
    assert phase.largest(100 + 7 * 13) == 13
    assert phase.largest(100 + 7 * 13 - 1) == 12
    assert phase.largest(99) == 0


def test_keys_and_values_by_hand() -> None:
    """Two tensors, 3 layers, 4 heads of 16, 10 tokens, 4 bytes; half of that in bfloat16."""
    assert ModelSize(SMALL, FEW, on_gpu=False).cache(10) == 2 * 3 * 4 * 16 * 10 * 4
    assert ModelSize(SMALL, FEW, on_gpu=True).cache(10) == 2 * 3 * 4 * 16 * 10 * 2


def test_gpus_by_name_and_number() -> None:
    assert known_gpu("H100:4", nodes=2) == Hardware("H100", *GPUS["h100"], count=8)
    for wrong in ("h101", "h100:0", "h100:x"):
        with pytest.raises(ConfigError, match="NAME:COUNT"):
            known_gpu(wrong)


@pytest.mark.slow
def test_what_does_not_fit_names_the_setting_and_the_value_that_fits() -> None:
    params = load_params(SHIPPED_PARAMS)
    base = params.base_model.model_copy(update={"kind": "random", "layers": 2, "hidden_size": 64})
    params = params.model_copy(update={"base_model": base, "lora": FEW})
    for section in ("reward_model", "gold_judge"):
        own = getattr(params, section).model_copy(update={"lora_first_layer": 0})
        params = params.model_copy(update={section: own})
    room = Hardware("test", 8e9, 1e12, 1e11, on_gpu=False)
    plans = plan_stages(params, None, None, room)
    assert all(plan.fits for plan in plans)
    assert not list(memory_misfits(plans, {"sft", "ppo"}, room, blocks=True))
    sft_plan = plans[0]
    half = Hardware("test", sft_plan.memory.total / 2, 1e12, 1e11, on_gpu=False)
    (found,) = memory_misfits(plan_stages(params, None, None, half)[:1], {"sft"}, half, blocks=True)
    assert (found.key, found.value) == ("sft.batch_size", 8)
    assert 1 <= int(found.suggestion) < 8
    lower = params.model_copy(update={"sft": params.sft.model_copy(update={"batch_size": int(found.suggestion)})})
    assert plan_stages(lower, None, None, half)[0].fits
