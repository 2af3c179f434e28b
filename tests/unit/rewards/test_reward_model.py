"""Scores of texts: independent of padding, of order and of what stands beside them; one model, and an ensemble."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.covariance import LedoitWolf

from tasks.config.reward import RewardParams
from tasks.config.training import LoraParams
from tasks.core.errors import ModelError, TrainingError
from tasks.models.loading import (
    add_adapter,
    add_lora,
    load_reward_model,
    make_trainable,
    new_reward_model,
    save_weights,
)
from tasks.models.onednn_linear import FrozenLora
from tasks.rewards.reward_model import (
    ENSEMBLE_REDUCTIONS,
    MEMBERS,
    NORMALISATION,
    OOD_DETECTOR,
    EnsembleMember,
    MahalanobisOOD,
    RewardModel,
    ScoreHead,
    member_folder,
)
from tasks.rewards.scorers import TextScorer
from tests.conftest import letter_tokenizer, tiny_model
from tests.unit.models.test_loading import base_model  # noqa: F401

TEXTS = [("", "w3"), ("w4", " w5 w6 w7 w8"), ("", "w9 w10"), ("", "w3")]


class Words:
    """The word-level tokenizer, splitting at spaces."""

    pad_token_id, eos_token_id, bos_token_id = 0, 1, None

    def __call__(self, text, **options):
        ids = [int(word[1:] or 2) for word in text.split()]
        return SimpleNamespace(input_ids=ids, special_tokens_mask=[0] * len(ids))


@pytest.fixture
def scorer(base_model):  # noqa: F811
    return new_reward_model(base_model, None, seed=1).eval()


def test_what_is_beyond_the_context_loses_the_prompts_first_tokens_then_the_responses_last(scorer):
    """The model's context is 64: of 70 prompt tokens and 4 of the response 60 are left, of 80 of a response 63."""
    prompt, response = " ".join(["w5"] * 10 + ["w6"] * 60), "w7 w8 w9"
    reader = TextScorer(scorer, Words())
    assert reader._encode(prompt, response) == [6] * 60 + [7, 8, 9, 1]
    assert reader._encode(prompt, " ".join(["w7"] * 80)) == [7] * 63 + [1]
    assert reader([(prompt, response)]).isfinite().all()


def test_score_is_the_head_at_the_end_token_whatever_stands_beside(scorer):
    """In the same pass: score = w · state, and the state is that of the text read alone."""
    scores, states = TextScorer(scorer, Words()).scores_and_states(TEXTS)
    torch.testing.assert_close(states @ scorer.score.weight[0], scores)
    for text, score, state in zip(TEXTS, scores, states, strict=True):
        ids = [int(word[1:]) for word in "".join(text).split()] + [1]
        alone = scorer.model(torch.tensor([ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(state, alone, rtol=1e-4, atol=1e-4)
        assert score.item() == pytest.approx(scorer.score(alone).item(), abs=1e-5)
    assert scores[0] == scores[3]
    assert not scorer.score._forward_pre_hooks, "nothing may stay on the model"


def test_batching_does_not_move_scores(scorer):
    whole = TextScorer(scorer, Words())(TEXTS)
    single = TextScorer(scorer, Words(), batch_size=1)(TEXTS)
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-5)


class Fixed:
    """Scores that a test has set, and a state that is the same for all texts."""

    def __init__(self, state=0.0, **scores):
        self._state, self._scores = state, scores

    def scores_and_states(self, samples):
        scores = [self._scores[prompt + response] for prompt, response in samples]
        return torch.tensor(scores), torch.full((len(samples), 2), self._state)


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
    assert alone.score_with_metrics([""], ["a"])[1] == {"ood_share": torch.tensor([1.0])}


LORA = LoraParams(r=4, alpha=8, target_modules="all-linear", reward_model_modules="all-linear")


def save_trained(model, folder, seed):
    """Save the adapter, changed as by training."""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=draw))
    save_weights(model, folder)


@pytest.fixture
def artifacts(tmp_path):
    """A base model, an SFT adapter that changes it, and a reward model of three members, each unlike the others."""
    base = tmp_path / "base_model"
    tiny_model().save_pretrained(base / "model")
    letter_tokenizer().save_pretrained(base / "model")
    save_trained(add_lora(tiny_model(), LORA, seed=9), tmp_path / "sft", 9)
    for number in range(3):
        folder = member_folder(tmp_path / "reward_model", number)
        model = add_lora(new_reward_model(base, None, seed=number), LORA, seed=number, head="score")
        save_trained(model, folder, number)
        normalisation = {"mean": 0.1 * number, "std": 1.0 + number}
        (folder / NORMALISATION).write_text(json.dumps(normalisation))
    MahalanobisOOD(torch.zeros(32), torch.eye(32), 1.0).save(tmp_path / "reward_model" / OOD_DETECTOR)
    return tmp_path


def folders(artifacts):
    return artifacts / "base_model", artifacts / "sft", artifacts / "reward_model"


PROMPTS = ["a film", "the end", "so", "is it"]
RESPONSES = [" so so", " is near", "", " good good good good"]


def assert_members_are_those_loaded_alone(artifacts, model, together):
    base, sft, reward_model = folders(artifacts)
    for number in range(3):
        alone = load_reward_model(base, sft, member_folder(reward_model, number))
        raw = TextScorer(alone, letter_tokenizer())(list(zip(PROMPTS, RESPONSES, strict=True)))
        torch.testing.assert_close(together[number], (raw - 0.1 * number) / (1 + number), rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().min() > 1e-3, "members that are equal show nothing"
    assert torch.equal(model.member_scores(PROMPTS, RESPONSES), together)


def test_members_on_one_backbone_are_those_loaded_alone(artifacts):
    """In any order, again and again: switching changes nothing and makes nothing trainable."""
    base, sft, reward_model = folders(artifacts)
    model = RewardModel.load(base, sft, reward_model)
    together = model.member_scores(PROMPTS, RESPONSES)
    assert together.shape == (3, 4)
    assert_members_are_those_loaded_alone(artifacts, model, together)
    assert torch.equal(model(PROMPTS, RESPONSES), together.mean(0))
    assert not any(weight.requires_grad for weight in model.members[0].scorer._model.parameters())


def test_members_of_all_parameters_are_those_loaded_alone(artifacts):
    base, sft, reward_model = folders(artifacts)
    for number in range(3):
        model = make_trainable(new_reward_model(base, sft, seed=number), None, seed=number, head="score")
        draw = torch.Generator().manual_seed(number)
        for weight in model.parameters():
            weight.data += 0.05 * torch.randn(weight.shape, generator=draw)
        normalisation = (member_folder(reward_model, number) / NORMALISATION).read_bytes()
        save_weights(model, member_folder(reward_model, number))
        (member_folder(reward_model, number) / NORMALISATION).write_bytes(normalisation)
        if number == 0:
            raw = TextScorer(model.eval(), letter_tokenizer())(list(zip(PROMPTS, RESPONSES, strict=True)))
    MahalanobisOOD(torch.zeros(32), torch.eye(32), 1.0).save(reward_model / OOD_DETECTOR)
    model = RewardModel.load(base, sft, reward_model)
    together = model.member_scores(PROMPTS, RESPONSES)
    torch.testing.assert_close(together[0], raw, rtol=0, atol=1e-5)
    assert_members_are_those_loaded_alone(artifacts, model, together)


def test_every_member_has_its_own_head_and_the_fast_layers(artifacts):
    scorer = load_reward_model(*folders(artifacts))
    add_adapter(scorer, "second", member_folder(artifacts / "reward_model", 1))
    layers = [module for module in scorer.modules() if isinstance(module, FrozenLora)]
    assert len(layers) == 14
    scorer.set_adapter("second", inference_mode=True)
    assert all(layer._is_simple_adapter() and set(layer.lora_A) == {"default", "second"} for layer in layers)
    file = member_folder(artifacts / "reward_model", 1) / "adapter" / "adapter_model.safetensors"
    (head,) = (value for name, value in load_file(file).items() if "score" in name)
    assert torch.equal(scorer.score.weight, head)


def test_a_member_that_lacks_a_file_is_named_and_one_member_needs_no_folder_of_members(artifacts):
    (member_folder(artifacts / "reward_model", 2) / NORMALISATION).unlink()
    with pytest.raises(ModelError, match=r"members/2/adapter/normalisation\.json does not exist"):
        RewardModel.load(*folders(artifacts))
    shutil.rmtree(artifacts / "reward_model" / MEMBERS)
    value, metrics = RewardModel.load(*folders(artifacts), "uncertainty").score_with_metrics(PROMPTS, RESPONSES)
    assert (len(value), list(metrics)) == (4, ["ood_share"])


def sentences(count, seed, words):
    draw = random.Random(seed)
    return [("", " ".join(f"w{draw.choice(words)}" for _ in range(draw.randint(8, 14)))) for _ in range(count)]


def test_gibberish_and_repetition_are_far_from_what_was_read_in_training(scorer):
    """States of a (random) model for sentences of five words, for other words at random, and for one word repeated."""
    reader = TextScorer(scorer, Words())
    training, heldout, unseen = (reader.scores_and_states(sentences(400, seed, range(2, 7)))[1] for seed in (1, 2, 3))
    detector = MahalanobisOOD.fit(training, heldout)
    assert detector.is_ood(unseen).mean().item() == pytest.approx(0.01, abs=0.02)
    repeated = [("", " ".join([f"w{word}"] * 12)) for word in (*range(2, 7), *range(12, 32))]
    for far in (sentences(60, 4, range(12, 32)), repeated):
        assert detector.is_ood(reader.scores_and_states(far)[1]).mean() > 0.8


# -- out of distribution ---------------------------------------------------------------------------------------

WIDTH = 24


def states(count: int, seed: int, *, spread: float = 1.0) -> torch.Tensor:
    """States whose dimensions depend on one another and differ in scale."""
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, WIDTH)
    return spread * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) @ mixing + 5.0


def test_distance_is_the_root_of_the_quadratic_form() -> None:
    training, other = states(200, 1), states(7, 2, spread=3.0)
    fitted = MahalanobisOOD.fit(training, states(50, 3))
    precision = np.linalg.inv(LedoitWolf().fit(training.double().numpy()).covariance_)
    gaps = (other - training.mean(0)).double().numpy()
    expected = np.sqrt(np.einsum("nd,de,ne->n", gaps, precision, gaps))
    np.testing.assert_allclose(fitted.distances(other).numpy(), expected, rtol=1e-4)


def test_one_in_a_hundred_held_out_texts_is_unfamiliar_and_what_lies_elsewhere_is() -> None:
    heldout = states(1000, 2)
    fitted = MahalanobisOOD.fit(states(400, 1), heldout)
    assert fitted.is_ood(heldout).sum() == 10
    assert fitted.is_ood(states(2000, 3)).mean().item() == pytest.approx(0.01, abs=0.008)
    assert fitted.is_ood(states(50, 4, spread=10.0)).tolist() == [1.0] * 50
    assert fitted.is_ood(fitted.mean.unsqueeze(0)).tolist() == [0.0]


def test_it_is_kept_in_a_file(tmp_path: Path) -> None:
    fitted = MahalanobisOOD.fit(states(100, 1), states(100, 2))
    fitted.save(tmp_path / "ood.safetensors")
    again = MahalanobisOOD.load(tmp_path / "ood.safetensors")
    assert torch.equal(again.distances(states(9, 3)), fitted.distances(states(9, 3)))
    assert again.threshold == pytest.approx(fitted.threshold, rel=1e-6)
    with pytest.raises(ModelError, match=r"other\.safetensors does not exist: run the stage reward_model"):
        MahalanobisOOD.load(tmp_path / "other.safetensors")


def test_states_that_do_not_vary_are_no_measure() -> None:
    with pytest.raises(TrainingError, match="sees no difference between its 5 training texts"):
        MahalanobisOOD.fit(torch.ones(5, 3), torch.ones(2, 3))
