"""The card of a registered policy: what it is, what it was made from, how good it is and what it is not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tasks.core.exporting import Exported
from tasks.evals.compare import JUDGE_NAMES, REFERENCE, win_rates_of
from tasks.evals.templates import template
from tasks.evals.verdict import NAMES
from tasks.runtime.provenance import Provenance
from tasks.runtime.registry import Version

__all__ = ["Card", "render"]

METHODS = {
    "ppo": (
        "PPO against the reward below, with a KL penalty to the SFT model",
        ("reward_model", "reward", "generation"),
    ),
    "grpo": (
        "GRPO against the reward below, with a KL penalty to the SFT model",
        ("reward_model", "reward", "generation"),
    ),
    "dpo": ("DPO on pairs of responses", ("preferences",)),
}
"""How a policy is trained, and the sections of params.yaml that count beside its own, those of SFT and `lora`."""


@dataclass(frozen=True)
class Card:
    """What a card tells.

    Attributes:
        adapter: the folder holds the SFT model and an adapter, and not one merged model.
    """

    version: Version
    origin: Provenance
    exported: Exported
    adapter: bool


def render(card: Card) -> str:
    """The text of README.md, with front matter as the Hugging Face hub reads it."""
    origin, policy = card.origin, card.version.policy
    method, sections = METHODS[policy]
    return template("card.md.j2", {"cell": _cell}, autoescape=False).render(
        card=card,
        version=card.version,
        origin=origin,
        front=_front_matter(card),
        licence=_licence(origin),
        name=NAMES[policy],
        method=method,
        reference=origin.metrics[REFERENCE],
        row=origin.metrics[policy],
        judges={JUDGE_NAMES[judge]: key for judge, key in win_rates_of({policy: origin.metrics[policy]}).items()},
        parameters=[
            line
            for section in (REFERENCE, policy, *sections, "lora", "seed", "policy_seed")
            if section in origin.parameters  # a version may be older than one of them
            for line in _flat(section, origin)
        ],
    )


def _front_matter(card: Card) -> list[str]:
    """Each line as `key: JSON`, which is YAML."""
    base = card.origin.base_model
    fields: dict[str, Any] = {
        "license": _licence(card.origin),
        "library_name": "peft" if card.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", card.version.policy],
    }
    if base.get("kind") == "hub":
        fields["base_model"] = card.origin.parameters["base_model"]["id"]
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]


def _licence(origin: Provenance) -> str:
    """The base model's, as the hub writes it."""
    return str(origin.base_model.get("licence") or "unknown").lower()


def _flat(section: str, origin: Provenance) -> list[tuple[str, str]]:
    value = origin.parameters[section]
    items = value.items() if isinstance(value, dict) else [(None, value)]
    return [(f"{section}.{key}" if key else section, json.dumps(inner, ensure_ascii=False)) for key, inner in items]


def _cell(value: object) -> str:
    """Text that stays within its cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")
