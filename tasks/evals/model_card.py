"""Model card of a registered policy: training, data, evaluation, gate decision and limits."""

import json
from collections.abc import Callable
from functools import partial

from tasks.core.rows import flatten
from tasks.evals.compare import JUDGE_NAMES, REFERENCE, win_rates_of
from tasks.evals.controls import doubt
from tasks.evals.report_text import display_name, load_template
from tasks.models.export import ExportCheck
from tasks.runtime.provenance import Provenance
from tasks.runtime.registry import Version

__all__ = ["render_model_card"]

REWARD_SECTIONS = ("reward_model", "reward", "generation")
METHODS = {
    "ppo": ("PPO against the reward below, with a KL penalty to the SFT model", REWARD_SECTIONS),
    "grpo": ("GRPO against the reward below, with a KL penalty to the SFT model", REWARD_SECTIONS),
    "dpo": ("DPO on pairs of responses", ("preferences",)),
}
"""Policy → training method, and the sections of params.yaml that it uses beside its own, `sft` and `lora`."""


def render_model_card(version: Version, origin: Provenance, exported: ExportCheck, *, adapter: bool) -> str:
    """Render README.md with the front matter of the Hugging Face hub.

    Args:
        adapter: the folder holds the SFT model and an adapter, and not one merged model.
    """
    policy = version.policy
    method, sections = METHODS[policy]
    # A version may be older than one of them.
    used = [name for name in (REFERENCE, policy, *sections, "lora", "seed", "policy_seed") if name in origin.parameters]
    filters: dict[str, Callable[..., str]] = {"cell": _escape_cell, "json": partial(json.dumps, ensure_ascii=False)}
    return load_template("card.md.j2", filters, autoescape=False).render(
        version=version,
        origin=origin,
        exported=exported,
        adapter=adapter,
        licence=str(origin.base_model.get("licence") or "unknown").lower(),  # in the hub's spelling
        name=display_name(policy),
        method=method,
        reference=origin.metrics[REFERENCE],
        row=origin.metrics[policy],
        judges={JUDGE_NAMES[judge]: key for judge, key in win_rates_of({policy: origin.metrics[policy]}).items()},
        doubt=doubt(origin.metrics[policy]),
        parameters=flatten({name: origin.parameters[name] for name in used}),
    )


def _escape_cell(value: object) -> str:
    """Escape a value for a cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")
