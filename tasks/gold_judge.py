"""The gold judge: what would people say of this text? Fitted on ratings, or pairs, that no other stage sees."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tasks.core.files import write_json
from tasks.core.models import add_lora, load_tokenizer, new_scorer, prepare_process, save_adapter
from tasks.core.schema import Preference, Rating, read_rows
from tasks.core.sections.gold_judge import GoldJudgeParams
from tasks.core.sections.lora import LoraParams
from tasks.core.training import HistoryCallback, train_or_resume, write_history
from tasks.evals.assessment import rating_figures
from tasks.rewards.learned import NORMALISATION
from tasks.rewards.scorers import TextScorer
from tasks.rewards.training import pair_trainer, target_trainer

__all__ = ["gold_judge"]


def gold_judge(
    params: GoldJudgeParams, lora: LoraParams, seed: int, *, base_model: Path, prepare: Path, out: Path
) -> None:
    """Fit a linear head on the base model to mean ratings by squared error, or to pairs by Bradley–Terry.

    The judge starts from the base model, not from the SFT model, and reads only the gold half of the rated texts or
    pairs, so that it shares neither texts nor mistakes with the reward model. Writes adapter/, history.csv and
    metrics.json (correlation with held-out mean ratings, the error in points, and what the held-out texts score on
    average, as they are and with their words scrambled; or accuracy on held-out pairs).
    """
    prepare_process()
    tokenizer = load_tokenizer(base_model)
    history = HistoryCallback("gold_judge")
    fresh = new_scorer(base_model, None, seed=seed)
    model = add_lora(fresh, lora, seed=seed, head="score", first_layer=params.first_layer)
    scorer = TextScorer(model, tokenizer, max_length=params.max_length)
    learn = _from_ratings if params.kind == "rating" else _from_pairs
    metrics = learn(params, model, tokenizer, scorer, seed, history, prepare)
    save_adapter(model, out)
    (out / NORMALISATION).write_text(json.dumps({"max_length": params.max_length}) + "\n", encoding="utf-8")
    write_history(out / "history.csv", history.rows)
    write_json(out / "metrics.json", metrics)


def _from_ratings(
    params: GoldJudgeParams,
    model: Any,
    tokenizer: Any,
    scorer: TextScorer,
    seed: int,
    history: HistoryCallback,
    prepare: Path,
) -> dict[str, float]:
    train, test = (read_rows(prepare / "ratings" / "gold" / f"{split}.jsonl", Rating) for split in ("train", "test"))
    train = train[: params.max_examples]
    texts, means = [row.text for row in train], [row.mean for row in train]
    garbled = scrambled(texts[: round(params.scrambled_share * len(texts))], seed)
    texts, means = texts + garbled, means + [min(means)] * len(garbled)
    train_or_resume(target_trainer(params, model, tokenizer, texts, means, seed=seed, callbacks=[history]))
    heldout = [row.text for row in test]
    scores = scorer(heldout)
    return {
        "examples": len(texts),
        **rating_figures(scores, torch.tensor([row.mean for row in test])),
        "heldout_mean_score": scores.mean().item(),
        "scrambled_mean_score": scorer(scrambled(heldout, seed)).mean().item(),
    }


def scrambled(texts: Sequence[str], seed: int) -> list[str]:
    """Each text with its words in random order."""
    draw = random.Random(seed)
    return [" ".join(draw.sample(words, len(words))) for words in map(str.split, texts)]


def _from_pairs(
    params: GoldJudgeParams,
    model: Any,
    tokenizer: Any,
    scorer: TextScorer,
    seed: int,
    history: HistoryCallback,
    prepare: Path,
) -> dict[str, float]:
    folder = prepare / "preferences" / "gold"
    train, test = (read_rows(folder / f"{split}.jsonl", Preference) for split in ("train", "test"))
    train = train[: params.max_examples]
    train_or_resume(pair_trainer(params, model, tokenizer, train, seed=seed, callbacks=[history]))
    chosen = scorer([row.prompt + row.chosen for row in test])
    rejected = scorer([row.prompt + row.rejected for row in test])
    accuracy = (chosen > rejected).float().mean().item()
    return {"pairs": len(train), "heldout_pairs": len(test), "heldout_accuracy": accuracy}


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("gold_judge")
