"""Several values of some parameters, every combination a variant of the project."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows import screen
from flows.variants import begin, run_variant
from tasks.config.params import parse_override
from tasks.core.errors import ConfigError, RLHFError, StageError
from tasks.evals.experiments import write_comparison

__all__ = ["sweep", "variants_of"]


def sweep(settings: Sequence[str], words: Sequence[str]) -> Path:
    """Run every combination, one after another, and compare them; the folder with the comparison.

    Args:
        settings: `key=value,value,…` each.
        words: what to pass to each `rlhf run`.

    Raises:
        ConfigError: a setting is malformed, or a combination is not valid.
        StageError: there is no git commit to start from, or a variant failed; those before it are kept.
    """
    variants = variants_of(settings)
    folder = begin("sweeps")
    found: dict[str, Any] = {}
    for number, variant in enumerate(variants, start=1):
        screen.variant_begins(number, len(variants), variant)
        name = " ".join(variant)
        try:
            with run_variant(folder, variant, words) as artifacts:
                evaluated = artifacts / "evaluate" / "policies.json"
                if evaluated.is_file():
                    found[name] = json.loads(evaluated.read_text(encoding="utf-8"))
        except RLHFError as error:
            raise StageError(f"the variant {name} failed: {error}; run the sweep again to go on from there") from error
        if found:
            write_comparison(folder, found)
    return folder


def variants_of(settings: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of the values, each as `key=value` words.

    A list or mapping counts as one value: commas within brackets do not separate.

    Raises:
        ConfigError: a setting has no key or no value.
    """
    choices = []
    for setting in settings:
        key, sign, values = setting.partition("=")
        words = [f"{key}{sign}{value}" for value in _separated(values)]
        for word in words:
            parse_override(word)
        choices.append(words)
    if not choices:
        raise ConfigError("a sweep needs values to try: rlhf sweep -S ppo.kl_coef=0.02,0.05,0.1")
    return list(itertools.product(*choices))


def _separated(values: str) -> list[str]:
    parts, depth = [""], 0
    for sign in values:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts
