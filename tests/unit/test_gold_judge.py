"""The gold judge on pairs: it reads the gold half alone, and is measured on what it has not seen."""

import json
import random
from pathlib import Path
from string import ascii_lowercase

import pytest
import torch

from tasks.core.errors import DataError
from tasks.core.rows import Preference, Rating, read_rows, write_rows
from tasks.evals.challenge import load_challenge
from tasks.gold_judge import shuffle_words
from tasks.rewards.reward_model import load_gold_judge
from tests.support.tiny_stages import run_gold_judge, write_inputs
from tests.unit.rewards.test_objectives import PAIRS, pair


def test_a_judge_of_pairs_orders_what_it_was_measured_on(tmp_path: Path) -> None:
    """The last letter decides what people prefer."""
    write_inputs(tmp_path)
    gold, draw = tmp_path / "prepare" / "preferences" / "gold", random.Random(1)
    for split in ("train", "test"):
        write_rows(gold / f"{split}.jsonl", [pair(draw, number) for number in range(PAIRS)])
    (out := tmp_path / "out").mkdir()
    run_gold_judge(tmp_path, out, kind="preference", epochs=3, batch_size=8, learning_rate=0.03, max_examples=30)
    found = json.loads((out / "metrics.json").read_text())
    assert (found["pairs"], found["heldout_pairs"]) == (30, PAIRS)
    assert found["heldout_accuracy"] > 0.9
    judge = load_gold_judge(tmp_path / "base_model", out)
    pairs = read_rows(gold / "test.jsonl", Preference)
    prompts = [row.prompt for row in pairs]
    gaps = judge(prompts, [row.chosen for row in pairs]) - judge(prompts, [row.rejected for row in pairs])
    assert (gaps > 0).float().mean().item() == pytest.approx(found["heldout_accuracy"])
    (gold / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"preferences/gold/train\.jsonl does not exist"):
        run_gold_judge(tmp_path, out, kind="preference")


def test_shuffled_texts_keep_their_words_and_lose_their_order() -> None:
    texts = ["one two three four five six seven", "eight nine ten"]
    found = shuffle_words(texts, seed=0)
    assert found == shuffle_words(texts, seed=0) != shuffle_words(texts, seed=1)
    assert found[0] != texts[0]
    assert [sorted(text.split()) for text in found] == [sorted(text.split()) for text in texts]


def test_a_judge_trained_on_shuffled_texts_rates_them_low(tmp_path: Path) -> None:
    """Texts of letters in alphabetical order, rated 1 or 5 at random: no rating is about word order."""
    write_inputs(tmp_path)
    gold, draw = tmp_path / "prepare" / "ratings" / "gold", random.Random(0)
    for split in ("train", "test", "../proxy/test"):
        texts = [" ".join(sorted(draw.sample(ascii_lowercase, 8))) for _ in range(60)]
        rows = [Rating(id=text, text=text, ratings=(draw.choice((1.0, 5.0)),)) for text in texts]
        write_rows(gold / f"{split}.jsonl", rows)
    settings = {"epochs": 6, "batch_size": 8, "learning_rate": 0.02, "max_examples": 60}
    examples, gaps = [], []
    for share in (0.0, 0.9):
        (out := tmp_path / str(share)).mkdir()
        run_gold_judge(tmp_path, out, **settings, shuffled_share=share)
        found = json.loads((out / "metrics.json").read_text())
        examples.append(found["examples"])
        gaps.append(found["heldout_mean_score"] - found["shuffled_mean_score"])
    assert examples == [60, 114]
    assert gaps[0] < 0.1 < 0.3 < gaps[1]
    made = load_challenge(tmp_path / "prepare" / "ratings" / "proxy" / "test.jsonl", tmp_path, 0)
    scrambled = [pair for pair in made if pair.category == "scrambled"]
    assert len(scrambled) == 20
    judge = load_gold_judge(tmp_path / "base_model", tmp_path / "0.9")
    scores = (judge([""] * 20, [getattr(pair, side) for pair in scrambled]) for side in ("right", "wrong"))
    assert found["challenge/scrambled"] == pytest.approx(torch.gt(*scores).float().mean().item())
