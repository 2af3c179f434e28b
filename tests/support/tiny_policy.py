"""The parts of a small policy, laid out as in artifacts: random weights, and adapters that change what they lie on."""

from __future__ import annotations

from pathlib import Path

from tasks.models.loading import add_lora, save_adapter
from tests.conftest import letter_tokenizer, tiny_model
from tests.support.tiny_stages import LORA


def write_parts(of: Path) -> Path:
    """Base model, SFT and PPO; the folder itself."""
    tiny_model().save_pretrained(of / "base_model" / "model")
    letter_tokenizer().save_pretrained(of / "base_model" / "model")
    for seed, stage in enumerate(("sft", "ppo")):
        adapter = add_lora(tiny_model(), LORA, seed=seed)
        for name, weight in adapter.named_parameters():
            if "lora_B" in name:
                weight.data.fill_(0.05 * (seed + 1))
        save_adapter(adapter, of / stage)
    return of
