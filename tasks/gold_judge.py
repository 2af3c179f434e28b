"""The gold judge: what would people rate this text? Regression on mean ratings of texts that no other stage sees."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tasks.core.files import write_json
from tasks.core.models import add_lora, load_tokenizer, new_scorer, prepare_process, save_adapter
from tasks.core.schema import Rating, read_rows
from tasks.core.sections.gold_judge import GoldJudgeParams
from tasks.core.sections.lora import LoraParams
from tasks.core.training import HistoryCallback, train_or_resume, write_history
from tasks.evals.assessment import rating_figures
from tasks.rewards.learned import NORMALISATION
from tasks.rewards.scorers import TextScorer
from tasks.rewards.training import target_trainer

__all__ = ["gold_judge"]


def gold_judge(
    params: GoldJudgeParams, lora: LoraParams, seed: int, *, base_model: Path, prepare: Path, out: Path
) -> None:
    """Fit a linear head on the base model to mean ratings by squared error.

    The judge starts from the base model, not from the SFT model, and reads only the gold half of the rated texts, so
    that it shares neither texts nor mistakes with the reward model. Writes adapter/, history.csv and metrics.json
    (correlation with held-out mean ratings, and the error in points).
    """
    prepare_process()
    tokenizer = load_tokenizer(base_model)
    train = read_rows(prepare / "ratings" / "gold" / "train.jsonl", Rating)[: params.max_examples]
    test = read_rows(prepare / "ratings" / "gold" / "test.jsonl", Rating)
    history = HistoryCallback("gold_judge")
    fresh = new_scorer(base_model, None, seed=seed)
    model = add_lora(fresh, lora, seed=seed, head="score", first_layer=params.first_layer)
    texts, means = [row.text for row in train], [row.mean for row in train]
    trainer = target_trainer(params, model, tokenizer, texts, means, seed=seed, callbacks=[history])
    train_or_resume(trainer)
    save_adapter(model, out)
    (out / NORMALISATION).write_text(json.dumps({"max_length": params.max_length}) + "\n", encoding="utf-8")
    write_history(out / "history.csv", history.rows)
    scores = TextScorer(model, tokenizer, max_length=params.max_length)([row.text for row in test])
    figures = rating_figures(scores, torch.tensor([row.mean for row in test]))
    write_json(out / "metrics.json", {"examples": len(train), **figures})


if __name__ == "__main__":
    from tasks.core.stage import run_stage

    run_stage("gold_judge")
