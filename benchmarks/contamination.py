"""Do training texts, or the base model, already know the held-out texts? `make bench-contamination`.

Needs `rlhf run base_model prepare`. What the base model was trained on is not public here, so it is asked: how well it
predicts held-out texts beside training texts of the same source, and how often, from the first words of a text, it
writes the next ones word for word (the test of Carlini et al. 2023, arXiv 2202.07646, of memorised text).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tasks.core.rows import Rating, read_rows
from tasks.core.text_stats import ngrams, tokenize_words
from tasks.evals.statistics import bootstrap_mean, wilson_interval
from tasks.models.encoding import encode_prompt
from tasks.models.loading import init_process, load_reference, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXTS, RUN, GIVEN, CONTINUED = 256, 8, 8, 5
"""Texts of each kind; words of a shared run; words that are given, and that must follow word for word."""


def rated_texts(split: str) -> list[str]:
    """The rated texts of a split that are long enough, of both halves."""
    folders = [ROOT / "artifacts" / "prepare" / "ratings" / half for half in ("proxy", "gold")]
    texts = [row.text for folder in folders for row in read_rows(folder / f"{split}.jsonl", Rating)]
    return [text for text in dict.fromkeys(texts) if len(tokenize_words(text)) >= GIVEN + CONTINUED]


@torch.no_grad()
def nats_per_token(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[float]:
    """Mean negative log-probability of the tokens of each text after its first."""
    rows = [torch.tensor([encode_prompt(tokenizer, text)]) for text in texts]
    return [model(ids, labels=ids).loss.item() for ids in rows]


@torch.no_grad()
def is_continued(model: Any, tokenizer: Any, text: str) -> bool:
    """Whether the most probable words after the first ones are those of the text."""
    words = text.split()
    ids = torch.tensor([encode_prompt(tokenizer, " ".join(words[:GIVEN]))])
    written = model.generate(ids, max_new_tokens=4 * CONTINUED, do_sample=False, attention_mask=torch.ones_like(ids))
    continuation = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return tokenize_words(continuation)[:CONTINUED] == tokenize_words(" ".join(words[GIVEN:]))[:CONTINUED]


def main() -> None:
    base_model = ROOT / "artifacts" / "base_model"
    if not (ROOT / "artifacts" / "prepare").is_dir():
        sys.exit("run this first: rlhf run base_model prepare")
    init_process()
    train, test = rated_texts("train"), rated_texts("test")
    if not train or not test:
        sys.exit(f"no rated texts of {GIVEN + CONTINUED} words or more in artifacts/prepare/ratings")
    known = {run for text in train for run in ngrams(tokenize_words(text), RUN)}
    shared = sum(any(run in known for run in ngrams(tokenize_words(text), RUN)) for text in test)
    print(f"held-out texts that share {RUN} words in a row with a training text: {shared} of {len(test)}")
    model, tokenizer = load_reference(base_model, None), load_tokenizer(base_model)
    for name, texts in (("training", train[:TEXTS]), ("held-out", test[:TEXTS])):
        loss = bootstrap_mean(nats_per_token(model, tokenizer, texts), samples=2000, seed=0)
        right = sum(is_continued(model, tokenizer, text) for text in texts)
        share = wilson_interval(right / len(texts), len(texts))
        print(
            f"{name} texts, base model: {loss.mean:.2f} nats a token ({loss.low:.2f} to {loss.high:.2f}); "
            f"{right} of {len(texts)} continued word for word ({share.low:.1%} to {share.high:.1%})"
        )


if __name__ == "__main__":
    main()
