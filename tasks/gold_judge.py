"""Stage gold_judge: train a judge on human ratings, or pairs, that no other stage sees."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tasks.core.paths import Artifacts
from tasks.core.rows import Preference, Rating, read_rows, write_json
from tasks.evals.challenge import challenge_samples, load_challenge, write_challenge
from tasks.models.hf_training import HistoryCallback, train_or_resume, write_history
from tasks.models.loading import (
    init_process,
    load_context,
    load_tokenizer,
    make_trainable,
    new_reward_model,
    save_weights,
)
from tasks.rewards.metrics import fraction_true, rating_metrics
from tasks.rewards.scorers import TextScorer
from tasks.rewards.training import TrainingData, make_trainer

if TYPE_CHECKING:
    from tasks.config.training import GoldJudgeParams, LoraParams

__all__ = ["gold_judge"]


def gold_judge(params: GoldJudgeParams, lora: LoraParams | None, seed: int, artifacts: Artifacts) -> None:
    """Fit a linear head on the base model to mean ratings by squared error, or to pairs by Bradley–Terry.

    The judge starts from the base model, not from the SFT model, and learns only from the gold half of the rated texts
    or pairs, so that it shares neither texts nor mistakes with the reward model. Writes adapter/, history.csv,
    metrics.json (correlation with held-out mean ratings, the error in points, and what the held-out texts score on
    average, as they are and with their words shuffled; or accuracy on held-out pairs), and challenge.csv: accuracy on
    pairs made by rule from test sentences, where there are ratings the reward model's own, see `tasks.evals.challenge`.
    """
    init_process()
    rating = params.kind == "rating"
    tokenizer = load_tokenizer(artifacts.base_model)
    rows = (_load_ratings if rating else _load_pairs)(params, seed, artifacts.prepare)
    data, counts = rows.fit(tokenizer, params, section="gold_judge", context=load_context(artifacts.base_model))
    history = HistoryCallback("gold_judge")
    fresh = new_reward_model(artifacts.base_model, None, seed=seed)
    model = make_trainable(fresh, lora, seed=seed, head="score", first_layer=params.lora_first_layer)
    train_or_resume(make_trainer(params, model, tokenizer, data, seed=seed, callbacks=[history]))
    scorer = TextScorer(model, tokenizer)
    metrics = _evaluate_ratings(scorer, data, seed) if rating else _evaluate_pairs(scorer, data)
    made = load_challenge(
        artifacts.prepare / "ratings" / "proxy" / "test.jsonl",
        artifacts.prepare / "preferences" / "gold" / "test.jsonl",
        seed,
    )
    scores = scorer(challenge_samples(made)) if made else torch.empty(0)
    metrics |= write_challenge(artifacts.out / "challenge.csv", made, scores)
    save_weights(model, artifacts.out)
    write_history(artifacts.out / "history.csv", history.rows)
    write_json(artifacts.out / "metrics.json", metrics | counts)


def _load_ratings(params: GoldJudgeParams, seed: int, prepare: Path) -> TrainingData:
    """The gold half of the rated texts; some training texts again with shuffled words and the lowest rating."""
    train, test = (read_rows(prepare / "ratings" / "gold" / f"{split}.jsonl", Rating) for split in ("train", "test"))
    train = train[: params.max_examples]
    texts, means = [row.text for row in train], [row.mean for row in train]
    shuffled = shuffle_words(texts[: round(params.shuffled_share * len(texts))], seed)
    return TrainingData(
        texts={"train": texts + shuffled, "test": [row.text for row in test]},
        targets={"train": means + [min(means)] * len(shuffled), "test": [row.mean for row in test]},
    )


def _load_pairs(params: GoldJudgeParams, seed: int, prepare: Path) -> TrainingData:
    folder = prepare / "preferences" / "gold"
    train, test = (read_rows(folder / f"{split}.jsonl", Preference) for split in ("train", "test"))
    return TrainingData({"train": train[: params.max_examples], "test": test})


def _evaluate_ratings(scorer: TextScorer, data: TrainingData, seed: int) -> dict[str, float]:
    heldout = data.texts["test"]
    scores, shuffled = (scorer([("", text) for text in texts]) for texts in (heldout, shuffle_words(heldout, seed)))
    return {
        "examples": len(data.texts["train"]),
        **rating_metrics(scores, torch.tensor(data.targets["test"])),
        "heldout_mean_score": scores.mean().item(),
        "shuffled_mean_score": shuffled.mean().item(),
    }


def _evaluate_pairs(scorer: TextScorer, data: TrainingData) -> dict[str, float]:
    train, test = data.pairs["train"], data.pairs["test"]
    chosen = scorer([(row.prompt, row.chosen) for row in test])
    rejected = scorer([(row.prompt, row.rejected) for row in test])
    return {
        "pairs": len(train), "heldout_pairs": len(test), "heldout_accuracy": fraction_true(chosen > rejected)
    }  # fmt: skip


def shuffle_words(texts: Sequence[str], seed: int) -> list[str]:
    """Shuffle the words of each text."""
    rng = random.Random(seed)
    return [" ".join(rng.sample(words, len(words))) for words in map(str.split, texts)]


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("gold_judge")
