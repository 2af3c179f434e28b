"""Comparison of params.yaml with the prepared data, the base model and this machine, before anything trains.

Each stage finds its own misfits too, but one at a time and late. Here they are found together, with the values to set.
Two things only the stages themselves find: conversations that are too long, and what does not fit another model than
the base model (`reward_model.backbone` or `pretrained`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from tasks.config.params import Params, load_params
from tasks.core.paths import project_root, stage_dir
from tasks.core.rows import SPLITS, Preference, Rating, Split
from tasks.core.text_stats import quantile_99
from tasks.data.pairs import draw_pairs, label_by_all
from tasks.data.prepared_rows import PreparedRows
from tasks.data.token_lengths import TokenCounter

if TYPE_CHECKING:
    from tasks.config.rules import RuleOptions
    from tasks.config.training import RewardModelParams

__all__ = ["READS", "Misfit", "find_misfits", "format_misfits", "project_misfits", "row_lengths"]

READS = ("base_model", "prepare")
"""The stages whose outputs are compared with params.yaml."""

ANSWER_RULES = ("answer", "code", "contains_facts", "math")
"""Rules that need the right answer of each prompt."""

RULE_PACKAGES = {
    "code": ("pyseccomp", "code"), "language": ("py3langid", "rules"), "math": ("math_verify", "rules"),
    "poem": ("pronouncing", "poem"),
}  # fmt: skip
"""Rule → the module without which it scores nothing, and the extra that brings it."""


@dataclass(frozen=True)
class Misfit:
    """A setting that does not fit.

    Attributes:
        stage: the stage that would fail.
        key: of params.yaml, dotted.
        value: what is set.
        suggestion: the value to set, in YAML; empty where no value mends it, and `reason` says what does.
        reason: what was found.
        blocks: whether the stage would fail; else the run goes on after a warning.
    """

    stage: str
    key: str
    value: object
    suggestion: str
    reason: str
    blocks: bool = True

    def __str__(self) -> str:
        arrow = f" → {self.suggestion}" if self.suggestion else ""
        return f"{self.key}: {'null' if self.value is None else self.value}{arrow}  ({self.reason})"


def project_misfits() -> list[Misfit]:
    """Find the misfits of the project's own params.yaml and outputs, which must be up to date.

    Raises:
        ConfigError: params.yaml is not valid.
    """
    base_model, prepare = map(stage_dir, READS)
    return find_misfits(load_params(project_root() / "params.yaml"), base_model, prepare)


def find_misfits(params: Params, base_model: Path, prepare: Path) -> list[Misfit]:
    """Compare params.yaml with what the stages base_model and prepare wrote to their folders."""
    card = json.loads((base_model / "card.json").read_text(encoding="utf-8"))
    layers, tokens = card["layers"], TokenCounter(base_model / "model", card["context"])
    rows, too_long = _drop_long_pairs(params, prepare, tokens)
    return [
        *too_long,
        *_module_misfits(params, card["linear_modules"]),
        *_sft_misfits(params, rows),
        *_length_misfits(params, rows, tokens),
        *_pair_misfits(params, rows),
        *_rating_misfits(params, rows),
        *_layer_misfits(params, layers),
        *_gold_misfits(params, rows, layers),
        *_prompt_misfits(params, rows),
        *_answer_misfits(params, rows),
        *_package_misfits(params),
    ]


def row_lengths(params: Params, base_model: Path, prepare: Path) -> dict[str, list[int]]:
    """Stage → tokens of each row that it trains on, before any limit; and those of the training `prompts`."""
    tokens, rows = TokenCounter(base_model / "model"), PreparedRows(params, prepare)
    found = {stage: files[0] for stage, files in _row_lengths(params, rows, tokens).items()}
    return found | {"prompts": tokens.prompts([row.prompt for row in rows.prompts["train"]])}


def format_misfits(found: Sequence[Misfit]) -> str:
    """Format misfits as one message."""
    cures, others = [item for item in found if item.suggestion], [item for item in found if not item.suggestion]
    lines = ["params.yaml does not fit the data and the base model; nothing was trained."]
    if cures:
        lines += ["`rlhf run --fit` sets:", *(f"  {item}" for item in cures)]
    if others:
        lines += ["Yours to decide:", *(f"  {item}" for item in others)]
    return "\n".join(lines)


def _sft_misfits(params: Params, rows: PreparedRows) -> Iterator[Misfit]:
    cure = "add a source of demonstrations, of pairs with prompts, or of ratings"
    keys: dict[Split, str] = {"train": "max_examples", "validation": "max_validation_examples"}
    for split, key in keys.items():
        if not rows.demonstrations(split):
            remedy = cure if split == "train" else "raise prepare.validation_share, or collect more"
            yield Misfit("sft", f"sft.{key}", getattr(params.sft, key), "", f"no demonstrations in {split}: {remedy}")


def _drop_long_pairs(params: Params, prepare: Path, tokens: TokenCounter) -> tuple[PreparedRows, list[Misfit]]:
    """Rows without the pairs whose prompt leaves no room for a response, and the setting that drops these."""
    rows, new = PreparedRows(params, prepare), params.generation.max_new_tokens
    pairs = rows.all_pairs()
    words = {row.id: max(len((row.prompt + side).split()) for side in (row.chosen, row.rejected)) for row in pairs}
    lengths = tokens.prompts([row.prompt for row in pairs])
    unfit = [row.id for row, length in zip(pairs, lengths, strict=True) if length + new > (tokens.context or math.inf)]
    limit = min((words[name] - 1 for name in unfit), default=0)
    dropped = {name for name, count in words.items() if count > limit}
    if len(dropped) == len(words) or not unfit:
        return rows, []
    reason = (
        f"{len(unfit)} of {len(pairs)} prompts leave no room for {new} new tokens in the model's context, "
        f"{tokens.context}; {len(pairs) - len(dropped)} pairs are left"
    )
    key, value = "prepare.max_preference_words", params.prepare.max_preference_words
    return PreparedRows(params, prepare, dropped), [Misfit("reward_model", key, value, str(limit), reason)]


def _length_misfits(params: Params, rows: PreparedRows, tokens: TokenCounter) -> Iterator[Misfit]:
    """Rows that are longer than max_length or the model's context, and responses that have no room."""
    if params.environment is None:
        yield from _response_misfits(params, rows, tokens)
    for stage, files in _row_lengths(params, rows, tokens).items():
        section = getattr(params, stage)
        if tokens.context and section.max_length != "auto" and section.max_length > tokens.context:
            reason = f"the base model's context is {tokens.context} tokens"
            yield Misfit(stage, f"{stage}.max_length", section.max_length, "auto", reason)
        limit = min((n for n in (section.max_length, tokens.context) if isinstance(n, int)), default=math.inf)
        cut, lengths = max(
            ((sum(length > limit for length in own), own) for own in files if own),
            key=lambda pair: pair[0] / len(pair[1]), default=(0, []),
        )  # fmt: skip
        if cut <= section.max_cut_share * len(lengths):
            continue
        reason = f"{cut} of {len(lengths)} rows are longer than {limit} tokens, the longest has {max(lengths)}"
        if section.max_length != "auto" and tokens.context != limit:
            yield Misfit(stage, f"{stage}.max_length", section.max_length, "auto", reason)
            continue
        reason += (
            ": their prompts lose the first words, or they are dropped; or leave them out by "
            "prepare.max_preference_words or max_words"
        )
        share = math.ceil(20 * cut / len(lengths) + 1) / 20  # and a little more: a stage may draw fewer rows
        suggestion = f"{share:g}" if share < 1 else ""
        yield Misfit(stage, f"{stage}.max_cut_share", section.max_cut_share, suggestion, reason)


def _response_misfits(params: Params, rows: PreparedRows, tokens: TokenCounter) -> Iterator[Misfit]:
    """Responses for which the model's context has no room, or of which sampling would cut off most."""
    new, key = params.generation.max_new_tokens, "generation.max_new_tokens"
    longest = max(tokens.prompts([row.prompt for own in rows.prompts.values() for row in own]), default=0)
    room = tokens.context - longest if tokens.context else new
    if new > room:
        reason = f"the longest prompt has {longest} tokens, the model's context is {tokens.context}"
        cure = "" if room > 0 else ": leave long prompts out by prepare.max_preference_words or max_words"
        yield Misfit("reward_model", key, new, str(room) if room > 0 else "", reason + cure)
    elif shown := rows.demonstrations("train"):
        lengths = sorted(tokens.rows([""] * len(shown), [row.response for row in shown]))
        median, most = lengths[len(lengths) // 2], quantile_99(lengths)
        suggestion = min(most, room) if tokens.context else most
        if min(median, suggestion) > new:
            reason = f"half of the demonstrated responses have {median} tokens or more, so most samples are cut off"
            yield Misfit("reward_model", key, new, str(suggestion), reason, blocks=False)


def _row_lengths(params: Params, rows: PreparedRows, tokens: TokenCounter) -> dict[str, list[list[int]]]:
    """Stage → lengths of the rows of each file that it trains on."""

    def of_pairs(own: Sequence[Preference]) -> list[int]:
        return tokens.rows([r.prompt for r in own], [r.chosen for r in own], [r.rejected for r in own])

    def of_texts(own: Sequence[Rating]) -> list[int]:
        return tokens.rows([""] * len(own), [row.text for row in own])

    pairs = _pairs(params, rows, "train") if params.preferences else []
    if params.preferences and params.preferences.source_pairs == "prepend":
        pairs += rows.pairs("train")
    found = {}
    if params.environment is None:
        shown = [rows.demonstrations("train")[: params.sft.max_examples]]
        shown.append(rows.demonstrations("validation")[: params.sft.max_validation_examples])
        found["sft"] = [tokens.rows([row.prompt for row in own], [row.response for row in own]) for own in shown]
    if model := _on_base_model(params):
        rated = rows.ratings("proxy", "train")[: model.max_examples]
        found["reward_model"] = [of_pairs(pairs) if model.pairwise else of_texts(rated)]
    if params.dpo:
        found["dpo"] = [of_pairs(pairs)]
    if judge := params.gold_judge:
        by_pairs, rated = rows.judge == "model of pairs", rows.ratings("gold", "train")[: judge.max_examples]
        found["gold_judge"] = [of_pairs(rows.gold_pairs("train")) if by_pairs else of_texts(rated)]
    return found


def _on_base_model(params: Params) -> RewardModelParams | None:
    """The section of the reward model, if that is trained on the SFT model and so fits what the base model fits."""
    model = params.reward_model
    return None if model is None or model.backbone or model.pretrained else model


NO_PAIRS = {
    "train_pairs": ": add a source of preferences or ratings, or set preferences, reward_model and dpo to null",
    "heldout_pairs": ": raise prepare.validation_share and prepare.test_share, or collect more",
}
"""Key of `preferences` → what to do where there are none."""


def _pair_misfits(params: Params, rows: PreparedRows) -> Iterator[Misfit]:
    wanted = params.preferences
    if wanted is None:
        return
    splits_of: dict[str, tuple[Split, ...]] = {"train_pairs": ("train",), "heldout_pairs": ("validation", "test")}
    for key, splits in splits_of.items():
        target = getattr(wanted, key)
        counts = {split: min(len(_pairs(params, rows, split)), target) for split in splits}
        least = min(counts.values())
        if least < target:
            found = " and ".join(f"{count} pairs in {split}" for split, count in counts.items())
            cure = "" if least else NO_PAIRS[key]
            yield Misfit("preferences", f"preferences.{key}", target, str(least or ""), f"there are {found}{cure}")


def _pairs(params: Params, rows: PreparedRows, split: Split) -> list[Preference]:
    """Pairs of which stage preferences takes some: all those of the sources, or as many as it draws from ratings."""
    wanted = params.preferences
    assert wanted is not None
    if wanted.source_pairs == "only" and any(rows.pairs(name) for name in SPLITS):
        return rows.pairs(split)
    margin, count = (wanted.min_margin, wanted.train_pairs) if split == "train" else (0.0, wanted.heldout_pairs)
    rng = Random(f"{params.seed}/{split}/pairs")
    drawn = islice(draw_pairs(rows.ratings("proxy", split), min_margin=margin, rng=rng), count)
    return [label_by_all(pair) for pair in drawn]


def _rating_misfits(params: Params, rows: PreparedRows) -> Iterator[Misfit]:
    model = params.reward_model
    if model is None or model.pairwise or all(rows.ratings("proxy", split) for split in SPLITS):
        return
    simple = model.kind == "rating" and model.max_examples is None and params.preferences is not None
    reason = f"kind {model.kind} learns from ratings in all splits, which are missing"
    suggestion = "preference" if simple and rows.pairs("train") else ""
    yield Misfit("reward_model", "reward_model.kind", model.kind, suggestion, reason)


def _module_misfits(params: Params, known: Sequence[str]) -> Iterator[Misfit]:
    """Modules that LoRA shall adapt and the base model lacks."""
    if params.lora is None:
        return
    scorer = "reward_model" if _on_base_model(params) else "gold_judge" if params.gold_judge else None
    for stage, key in (("sft", "target_modules"), (scorer, "reward_model_modules")):
        names = getattr(params.lora, key)
        if stage and not isinstance(names, str) and set(names) - set(known):
            reason = f"the base model's linear modules are {', '.join(known)}"
            yield Misfit(stage, f"lora.{key}", f"[{', '.join(names)}]", "all-linear", reason)


def _layer_misfits(params: Params, layers: int) -> Iterator[Misfit]:
    for stage, section in (("reward_model", _on_base_model(params)), ("gold_judge", params.gold_judge)):
        if section and section.lora_first_layer >= layers:
            key, reason = f"{stage}.lora_first_layer", f"the base model has {layers} layers, counted from 0"
            yield Misfit(stage, key, section.lora_first_layer, str(layers // 2), reason)


def _gold_misfits(params: Params, rows: PreparedRows, layers: int) -> Iterator[Misfit]:
    """Misfits of the judge that training never sees, without which `evaluate` cannot end."""
    kind = params.gold_judge.kind if params.gold_judge else None
    reason = {
        None: "nothing independent can judge the policies: no evaluate.gold_rule, and not every prompt has an `answer`",
        "rating": "no ratings are held out for the judge",
        "preference": "there are no pairs to hold out for the judge",
    }[kind]
    if rows.judge == "none":
        cure = "; add a source of ratings or preferences, give prompts an `answer`, or set evaluate.gold_rule"
        yield Misfit("evaluate", "gold_judge", kind, "", reason + cure)
    elif rows.judge == "other":
        if kind and not (rows.has_ratings if kind == "rating" else any(map(rows.gold_pairs, SPLITS))):
            yield Misfit("gold_judge", "gold_judge", f"kind {kind}", "null", f"{reason}; others judge")
    else:
        yield from _judge_model_misfits(params, rows, layers, reason)


def _judge_model_misfits(params: Params, rows: PreparedRows, layers: int, reason: str) -> Iterator[Misfit]:
    """Misfits where a model of ratings or pairs is the judge."""
    judge, share = params.gold_judge, params.prepare.gold_pair_share
    kind = "preference" if rows.judge == "model of pairs" else "rating"
    if judge is None:
        found = rows.gold_pairs("train") if kind == "preference" else rows.ratings("gold", "train")
        yield Misfit("evaluate", "gold_judge", None, _judge_section(params, kind, len(found), layers), reason)
    elif judge.kind != kind:
        yield Misfit("gold_judge", "gold_judge.kind", judge.kind, kind, reason)
    if kind == "preference" and not share:
        text = f"keeps {len(rows.gold_pairs('train'))} training pairs for the judge"
        yield Misfit("gold_judge", "prepare.gold_pair_share", share, str(rows.gold_share), text)
    if kind == "preference" and not (rows.gold_pairs("train") and rows.gold_pairs("test")):
        counts = f"{len(rows.gold_pairs('train'))} in train, {len(rows.gold_pairs('test'))} in test"
        cure = "raise prepare.gold_pair_share or prepare.test_share, or collect more"
        yield Misfit("gold_judge", "gold_judge.max_examples", "set", "", f"pairs for the judge: {counts}; {cure}")


def _judge_section(params: Params, kind: str, examples: int, layers: int) -> str:
    """A whole section, with the settings of the stage that trains most like it."""
    like = params.reward_model or params.sft
    settings = {"kind": kind, "lora_first_layer": layers // 2, "max_examples": max(examples, 1)}
    settings |= {name: getattr(like, name) for name in ("epochs", "batch_size", "learning_rate", "max_length")}
    return "{" + ", ".join(f"{name}: {value}" for name, value in settings.items()) + "}"


def _prompt_misfits(params: Params, rows: PreparedRows) -> Iterator[Misfit]:
    count, heldout = len(rows.prompts["train"]), len(rows.prompts["test"])
    for section in (params.ppo, params.grpo):
        if section and section.prompts_per_update > count:
            fitting = (n for n in range(count, 0, -1) if n * section.samples_per_prompt % section.minibatches == 0)
            key, reason = f"{section.stage}.prompts_per_update", f"there are {count} prompts in train"
            yield Misfit(section.stage, key, section.prompts_per_update, str(next(fitting, "")), reason)
    reason = f"there are {heldout} prompts in test" + ("" if heldout else ": raise prepare.test_share, or collect more")
    judge, curve = params.evaluate.llm_judge, params.overoptimisation
    for stage, key, asked in (
        ("evaluate", "evaluate.prompts", params.evaluate.prompts),
        ("evaluate", "evaluate.llm_judge.prompts", judge.prompts if judge else 0),
        ("overoptimisation", "overoptimisation.prompts", curve.prompts if curve else 0),
    ):
        if asked > heldout:
            yield Misfit(stage, key, asked, str(heldout or ""), reason)


def _answer_misfits(params: Params, rows: PreparedRows) -> Iterator[Misfit]:
    """Rules that need right answers where prompts have none."""
    lacking = {
        split: f"{missing} of {len(own)} prompts in {split} have no `answer`: give each one, or take another rule"
        for split, own in rows.prompts.items()
        if (missing := sum(row.answer is None for row in own))
    }
    for key, rule in _rules(params).items():
        if rule.function not in ANSWER_RULES:
            continue
        if (stage := _scoring_stage(params, key)) != "evaluate" and "train" in lacking:
            yield Misfit(stage, key, rule.function, "", lacking["train"])
        elif "test" in lacking:
            yield Misfit("evaluate", key, rule.function, "", lacking["test"])


GOLD_RULE = "evaluate.gold_rule"


def _rules(params: Params) -> dict[str, RuleOptions]:
    """Key of params.yaml → each rule that scores."""
    rules = {f"reward.weights.{name}": rule for name, rule in params.reward.rules.items()}
    return rules | ({GOLD_RULE: params.evaluate.gold_rule} if params.evaluate.gold_rule else {})


def _scoring_stage(params: Params, key: str) -> str:
    """The first stage that scores by the rule of this key."""
    return next((item.stage for item in (params.ppo, params.grpo) if item and key != GOLD_RULE), "evaluate")


def _package_misfits(params: Params) -> Iterator[Misfit]:
    """Extras and programs that a stage will need and this machine lacks."""
    judge = params.evaluate.llm_judge
    needed = [("lm_eval", "lm_eval", "lm_eval", "lm-eval")] if params.lm_eval else []
    if judge and judge.kind == "endpoint":
        needed.append(("evaluate", "evaluate.llm_judge.kind", "openai", "judge"))
    for key, rule in _rules(params).items():
        stage, sandboxed = _scoring_stage(params, key), getattr(rule, "isolation", "bubblewrap") == "bubblewrap"
        if rule.function in RULE_PACKAGES and sandboxed:
            needed.append((stage, key, *RULE_PACKAGES[rule.function]))
        if rule.function == "code" and sandboxed and not shutil.which("bwrap"):
            yield Misfit(stage, key, "code", "", "the program bwrap is missing: install bubblewrap")
    for stage, key, module, extra in needed:
        if find_spec(module) is None:
            yield Misfit(stage, key, "on", "", f"the package of {module} is missing: `pip install -e '.[{extra}]'`")
