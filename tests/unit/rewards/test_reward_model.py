"""Scores of texts: independent of padding, of order and of what stands beside them; one model, and an ensemble."""

from __future__ import annotations

import json
import random
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from tasks.config.reward import RewardParams
from tasks.config.training import LoraParams
from tasks.core.errors import ModelError
from tasks.models.loading import add_adapter, add_lora, load_reward_model, new_reward_model, save_adapter
from tasks.models.onednn_linear import FrozenLora
from tasks.rewards.ood import MahalanobisOOD
from tasks.rewards.reward_model import (
    ENSEMBLE_REDUCTIONS,
    MEMBERS,
    NORMALISATION,
    OOD_DETECTOR,
    EnsembleMember,
    RewardModel,
    ScoreHead,
    member_folder,
)
from tasks.rewards.scorers import TextScorer, encode
from tests.conftest import letter_tokenizer, tiny_model
from tests.unit.models.test_loading import base_model  # noqa: F401

TEXTS = ["w3", "w4 w5 w6 w7 w8", "w9 w10", "w3"]


class Words:
    """The word-level tokenizer, splitting at spaces."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, text, truncation=False, max_length=None):
        ids = [int(word[1:]) for word in text.split()]
        return type("Encoding", (), {"input_ids": ids[:max_length] if truncation else ids})


@pytest.fixture
def scorer(base_model):  # noqa: F811
    return new_reward_model(base_model, None, seed=1).eval()


def test_encoding_ends_with_the_end_token_also_when_cut():
    assert encode(Words(), "w3 w4", 8) == [3, 4, 1]
    assert encode(Words(), "w3 w4 w5 w6", 3) == [3, 4, 1]


def test_score_is_the_head_at_the_end_token_whatever_stands_beside(scorer):
    scores = TextScorer(scorer, Words(), max_length=16)(TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        ids = torch.tensor([encode(Words(), text, 16)])
        state = scorer.model(ids).last_hidden_state[0, -1]
        assert score.item() == pytest.approx(scorer.score(state).item(), abs=1e-5)
    assert scores[0] == scores[3]


def test_batching_does_not_move_scores(scorer):
    whole = TextScorer(scorer, Words(), max_length=16)(TEXTS)
    single = TextScorer(scorer, Words(), max_length=16, batch_size=1)(TEXTS)
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-5)


def test_states_are_what_the_head_reads_at_the_end_token(scorer):
    """In the same pass: score = w · state, and the state is that of the text read alone."""
    scores, states = TextScorer(scorer, Words(), max_length=16).scores_and_states(TEXTS)
    torch.testing.assert_close(states @ scorer.score.weight[0], scores)
    for text, state in zip(TEXTS, states, strict=True):
        alone = scorer.model(torch.tensor([encode(Words(), text, 16)])).last_hidden_state[0, -1]
        torch.testing.assert_close(state, alone, rtol=1e-4, atol=1e-4)
    assert not scorer.score._forward_pre_hooks, "nothing may stay on the model"


class Fixed:
    """Scores that a test has set, and a state that is the same for all texts."""

    def __init__(self, state=0.0, **scores):
        self._state, self._scores = state, scores

    def format(self, samples):
        return [prompt + response for prompt, response in samples]

    def scores_and_states(self, texts):
        return torch.tensor([self._scores[text] for text in texts]), torch.full((len(texts), 2), self._state)


IN_DISTRIBUTION = MahalanobisOOD(torch.zeros(2), torch.eye(2), 1.0)
OUT_OF_DISTRIBUTION = MahalanobisOOD(torch.ones(2), torch.eye(2), 1.0)


def member(scorer, **head):
    return EnsembleMember(scorer, {"": ScoreHead(**head)})


def ensemble(**options):
    """Normalised: (0, 1), (2, −1) and (−2, 3)."""
    members = [
        member(Fixed(ab=3.0, c=7.0), mean=3.0, std=4.0),
        member(Fixed(ab=2.0, c=-1.0), mean=0.0, std=1.0),
        member(Fixed(state=9.0, ab=-4.0, c=6.0), mean=0.0, std=2.0),
    ]
    return RewardModel(members, IN_DISTRIBUTION, **options)


def test_normalised_reward_is_shifted_and_scaled():
    model = RewardModel([member(Fixed(a=3.0, bc=5.0), mean=3.0, std=4.0)], IN_DISTRIBUTION)
    assert model(["", "b"], ["a", "c"]).tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("reduction", "expected"), [("mean", [0.0, 1.0]), ("worst", [-2.0, -1.0]), ("uncertainty", [-0.8, 0.2])]
)
def test_members_are_reduced(reduction, expected):
    """Both variances are 8/3, of which λ = 0.3 takes 0.8; each member is normalised by itself."""
    model = ensemble(ensemble_reduction=reduction, uncertainty_coef=0.3)
    assert model(["a", ""], ["b", "c"]).tolist() == pytest.approx(expected)
    assert model.member_scores(["a", ""], ["b", "c"]).tolist() == [[0.0, 1.0], [2.0, -1.0], [-2.0, 3.0]]


@pytest.mark.parametrize("reduction", ENSEMBLE_REDUCTIONS)
def test_one_member_is_itself_to_the_last_bit_however_it_is_reduced(reduction):
    raw = {text: random.Random(text).uniform(-9, 9) for text in "abcdefgh"}
    model = RewardModel(
        [member(Fixed(**raw), mean=0.1, std=3.3)], IN_DISTRIBUTION, ensemble_reduction=reduction, uncertainty_coef=0.5
    )
    assert torch.equal(model([""] * 8, list(raw)), (torch.tensor(list(raw.values())) - 0.1) / 3.3)


def test_the_parameters_name_every_reduction():
    assert get_args(RewardParams.model_fields["ensemble_reduction"].annotation) == tuple(ENSEMBLE_REDUCTIONS)


def test_metrics_come_from_the_same_pass():
    value, metrics = ensemble().score_with_metrics(["a", ""], ["b", "c"])
    assert value.tolist() == [0.0, 1.0]
    assert metrics["disagreement"].tolist() == pytest.approx([(8 / 3) ** 0.5] * 2)
    assert metrics["ood_share"].tolist() == [0.0, 0.0], "the OOD detector is the first member's"
    alone = RewardModel([member(Fixed(a=3.0), mean=3.0, std=4.0)], OUT_OF_DISTRIBUTION)
    assert {name: own.tolist() for name, own in alone.score_with_metrics([""], ["a"])[1].items()} == {
        "ood_share": [1.0]
    }


LORA = LoraParams(r=4, alpha=8, target_modules="all-linear", reward_model_modules="all-linear")


def write_member(of, number):
    """An adapter and a head that differ from every other member's."""
    model = add_lora(new_reward_model(of / "base_model", None, seed=number), LORA, seed=number, head="score")
    draw = torch.Generator().manual_seed(number)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=draw))
    folder = member_folder(of / "reward_model", number)
    save_adapter(model, folder)
    normalisation = {"mean": 0.1 * number, "std": 1.0 + number, "max_length": 32}
    (folder / NORMALISATION).write_text(json.dumps(normalisation))


@pytest.fixture
def artifacts(tmp_path):
    """A base model, an SFT adapter that changes it, and a reward model of three members."""
    tiny_model().save_pretrained(tmp_path / "base_model" / "model")
    letter_tokenizer().save_pretrained(tmp_path / "base_model" / "model")
    sft = add_lora(tiny_model(), LORA, seed=9)
    for name, weight in sft.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.02)
    save_adapter(sft, tmp_path / "sft")
    for number in range(3):
        write_member(tmp_path, number)
    MahalanobisOOD(torch.zeros(32), torch.eye(32), 1.0).save(tmp_path / "reward_model" / OOD_DETECTOR)
    return tmp_path


PROMPTS = ["a film", "the end", "so", "is it"]
RESPONSES = [" so so", " is near", "", " good good good good"]


def test_members_on_one_backbone_are_those_loaded_alone(artifacts):
    """In any order, again and again: switching changes nothing and makes nothing trainable."""
    model = RewardModel.load(artifacts / "base_model", artifacts / "sft", artifacts / "reward_model")
    together = model.member_scores(PROMPTS, RESPONSES)
    assert together.shape == (3, 4)
    for number in range(3):
        folder = member_folder(artifacts / "reward_model", number)
        scorer = TextScorer(
            load_reward_model(artifacts / "base_model", artifacts / "sft", folder), letter_tokenizer(), max_length=32
        )
        raw = scorer([prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)])
        torch.testing.assert_close(together[number], (raw - 0.1 * number) / (1 + number), rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().min() > 1e-3, "members that are equal show nothing"
    assert torch.equal(model.member_scores(PROMPTS, RESPONSES), together)
    assert torch.equal(model(PROMPTS, RESPONSES), together.mean(0))
    assert not any(weight.requires_grad for weight in model.members[0].scorer._model.parameters())


def test_every_member_has_its_own_head_and_the_fast_layers(artifacts):
    scorer = load_reward_model(artifacts / "base_model", artifacts / "sft", artifacts / "reward_model")
    add_adapter(scorer, "second", member_folder(artifacts / "reward_model", 1))
    layers = [module for module in scorer.modules() if isinstance(module, FrozenLora)]
    assert len(layers) == 14
    scorer.set_adapter("second", inference_mode=True)
    assert all(layer._is_simple_adapter() and set(layer.lora_A) == {"default", "second"} for layer in layers)
    file = member_folder(artifacts / "reward_model", 1) / "adapter" / "adapter_model.safetensors"
    (head,) = (value for name, value in load_file(file).items() if "score" in name)
    assert torch.equal(scorer.score.weight, head)


def test_one_member_loads_without_a_folder_of_members(artifacts):
    for number in (2, 1):
        for path in sorted(member_folder(artifacts / "reward_model", number).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        member_folder(artifacts / "reward_model", number).rmdir()
    (artifacts / "reward_model" / MEMBERS).rmdir()
    model = RewardModel.load(
        artifacts / "base_model", artifacts / "sft", artifacts / "reward_model", ensemble_reduction="uncertainty"
    )
    value, metrics = model.score_with_metrics(PROMPTS, RESPONSES)
    assert torch.equal(value, model.member_scores(PROMPTS, RESPONSES)[0])
    assert list(metrics) == ["ood_share"]


def test_a_member_that_lacks_a_file_is_named(artifacts):
    (member_folder(artifacts / "reward_model", 2) / NORMALISATION).unlink()
    with pytest.raises(ModelError, match=r"members/2/adapter/normalisation\.json does not exist"):
        RewardModel.load(artifacts / "base_model", artifacts / "sft", artifacts / "reward_model")


def sentences(count, seed, words):
    draw = random.Random(seed)
    return [" ".join(f"w{draw.choice(words)}" for _ in range(draw.randint(8, 14))) for _ in range(count)]


def test_gibberish_and_repetition_are_far_from_what_was_read_in_training(scorer):
    """States of a (random) model for sentences of five words, for other words at random, and for one word repeated."""
    reader = TextScorer(scorer, Words(), max_length=32)
    training, heldout, unseen = (reader.scores_and_states(sentences(400, seed, range(2, 7)))[1] for seed in (1, 2, 3))
    detector = MahalanobisOOD.fit(training, heldout)
    assert detector.is_ood(unseen).mean().item() == pytest.approx(0.01, abs=0.02)
    gibberish = sentences(60, 4, range(12, 32))
    repeated = [" ".join([f"w{word}"] * 12) for word in (*range(2, 7), *range(12, 32))]
    assert detector.is_ood(reader.scores_and_states(gibberish)[1]).mean() > 0.8
    assert detector.is_ood(reader.scores_and_states(repeated)[1]).mean() > 0.8
