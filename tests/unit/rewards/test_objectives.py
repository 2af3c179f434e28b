"""Each kind of reward model: it learns, loads with the metrics it was measured with, and refuses unfit data."""

import csv
import filecmp
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tasks.config.training import PretrainedRewardParams
from tasks.core.errors import DataError, ModelError, SourceError, TrainingError
from tasks.core.rows import Preference, Rating, read_rows, write_rows
from tasks.rewards.reward_model import (
    NORMALISATION,
    OOD_DETECTOR,
    EnsembleMember,
    MahalanobisOOD,
    RewardModel,
    ScoreHead,
)
from tasks.rewards.scorers import BACKBONE, PRETRAINED_DIR, fetch_pretrained_scorer, load_pretrained_scorer
from tests.conftest import letter_tokenizer, tiny_model
from tests.support import tiny_stages
from tests.support.tiny_stages import run_reward_model, write_inputs

PAIRS, TEXTS = 40, 64
LEARN = {"epochs": 3, "batch_size": 8, "learning_rate": 0.03, "normalisation_samples": 16}


def word(draw: random.Random, last: str) -> str:
    return "".join(draw.choices("abcdefg", k=draw.randint(2, 8))) + last


def pair(draw: random.Random, number: int) -> Preference:
    """About kindness people like a text that ends in x better than one in y, about brevity z better than w."""
    objective, good, bad = random.Random(number).choice([("kind", "x", "y"), ("short", "z", "w")])
    chosen, rejected = word(draw, good), word(draw, bad)
    return Preference(
        id=str(number), prompt="a", chosen=chosen, rejected=rejected, margin=draw.choice([-0.5, 1.0, 2.0]),
        objective=objective,
    )  # fmt: skip


def rating(draw: random.Random, number: int) -> Rating:
    last = draw.choice("xyzw")
    mean = {"x": 2.0, "y": -2.0, "z": 1.0, "w": -1.0}[last]
    return Rating(id=str(number), text=word(draw, last), ratings=(mean - 0.5, mean + 0.5))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and rated texts that a last letter decides."""
    of = tmp_path_factory.mktemp("inputs")
    write_inputs(of)
    draw = random.Random(1)
    for split in ("train", "validation", "test"):
        write_rows(of / "preferences" / f"{split}.jsonl", [pair(draw, number) for number in range(PAIRS)])
        rated = [rating(draw, number) for number in range(TEXTS)]
        write_rows(of / "prepare" / "ratings" / "proxy" / f"{split}.jsonl", rated)
    return of


def figures(out: Path) -> dict[str, float]:
    content: dict[str, float] = json.loads((out / "metrics.json").read_text())
    return content


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def load(inputs: Path, out: Path) -> RewardModel:
    return RewardModel.load(inputs / "base_model", inputs / "sft", out)


def accuracy(inputs: Path, out: Path) -> float:
    """Of the loaded model, over held-out pairs."""
    model, pairs = load(inputs, out), read_rows(inputs / "preferences" / "test.jsonl", Preference)
    prompts = [row.prompt for row in pairs]
    gaps = model(prompts, [row.chosen for row in pairs]) - model(prompts, [row.rejected for row in pairs])
    return (gaps > 0).float().mean().item()


def test_pairs_with_margins_are_learned_and_counted(inputs: Path, tmp_path: Path) -> None:
    run_reward_model(inputs, tmp_path, **LEARN, margin="scaled", margin_scale=0.5)
    found, rows = figures(tmp_path), read_rows(inputs / "preferences" / "train.jsonl", Preference)
    assert found["accuracy"] > 0.9
    assert found["pairs_with_margin"] == sum((row.margin or 0) > 0 for row in rows)
    assert found["pairs_against_margin"] == sum((row.margin or 0) < 0 for row in rows)
    assert accuracy(inputs, tmp_path) == pytest.approx(found["accuracy"])


def test_ratings_are_learned_and_pairs_only_measure(inputs: Path, tmp_path: Path) -> None:
    run_reward_model(inputs, tmp_path, **LEARN, kind="rating", ensemble_size=2)
    found = figures(tmp_path)
    assert min(found[f"{kind}_correlation"] for kind in ("heldout", "heldout_rank", "ensemble")) > 0.8
    assert found["heldout_mean_absolute_error"] < 1.0
    assert found["texts"] == TEXTS
    assert found["accuracy"] > 0.9
    assert len(load(inputs, tmp_path).member_scores([""], ["abx"])) == 2
    assert table(tmp_path / "calibration.csv") == []
    assert table(tmp_path / "accuracy_by_margin.csv")


def test_classes_are_learned_and_calibrated_by_text(inputs: Path, tmp_path: Path) -> None:
    run_reward_model(inputs, tmp_path, **LEARN, kind="classification", threshold=0.0, ensemble_size=2)
    found = figures(tmp_path)
    assert found["heldout_accuracy"] > 0.9
    assert found["heldout_auc"] > 0.95
    assert found["ensemble_auc"] > 0.95
    assert sum(int(row["count"]) for row in table(tmp_path / "calibration.csv")) == TEXTS
    assert 0 <= found["calibration_error"] < 0.5


def test_ratings_need_no_pairs(inputs: Path, tmp_path: Path) -> None:
    """Stage preferences off: its files are there and empty, and so is the table that needs pairs."""
    of = tmp_path / "of"
    (of / "preferences").mkdir(parents=True)
    for name in ("base_model", "sft", "prepare"):
        (of / name).symlink_to(inputs / name)
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "ceiling.csv"):
        (of / "preferences" / name).touch()
    run_reward_model(of, tmp_path / "out", kind="rating", max_examples=12, epochs=1)
    found = figures(tmp_path / "out")
    assert (found["texts"], found["heldout_pairs"], found["accuracy"]) == (12, 0, 0.0)
    assert (tmp_path / "out" / "accuracy_by_margin.csv").read_text() == "bucket,pairs,accuracy,ceiling\n"
    with pytest.raises(DataError, match="holds no rows"):
        run_reward_model(of, tmp_path / "pairs")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "model.safetensors"])
def test_objectives_are_learned_each_by_its_own_head_and_the_score_is_their_weighted_sum(
    file: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an adapter, and in all parameters."""
    if file == "model.safetensors":
        monkeypatch.setattr(tiny_stages, "LORA", None)
    run_reward_model(inputs, tmp_path, **LEARN, kind="multi_objective", objectives={"short": 0.25, "kind": 0.75})
    found, rows = figures(tmp_path), read_rows(inputs / "preferences" / "train.jsonl", Preference)
    assert min(found["accuracy/short"], found["accuracy/kind"], found["accuracy"]) > 0.9
    assert found["pairs/kind"] == sum(row.objective == "kind" for row in rows)
    weights = load_file(tmp_path / "adapter" / file)
    assert [weight.shape for name, weight in weights.items() if "score" in name] == [(2, 32)]
    model, prompts, responses = load(inputs, tmp_path), ["a", "a", ""], ["bcx", "bcy", "bcz"]
    value, metrics = model.score_with_metrics(prompts, responses)
    assert list(metrics) == ["ood_share", "objective/short", "objective/kind"]
    torch.testing.assert_close(value, 0.25 * metrics["objective/short"] + 0.75 * metrics["objective/kind"])
    normalisation = json.loads((tmp_path / NORMALISATION).read_text())["objectives"]
    raw = model.members[0].scorer([("a", "bcx"), ("a", "bcy"), ("", "bcz")])
    for column, name in enumerate(("short", "kind")):
        expected = (raw[:, column] - normalisation[name]["mean"]) / normalisation[name]["std"]
        torch.testing.assert_close(metrics[f"objective/{name}"], expected)
    assert torch.equal(model.member_scores(prompts, responses)[0], value)


def test_length_is_taken_off_as_least_squares_say() -> None:
    """raw = 3 + 2·length: nothing but the mean is left; of (1, 3, 2) at lengths 1, 2, 3 the slope is ½."""
    lengths = torch.tensor([1.0, 2.0, 4.0])
    head = ScoreHead.fit(3 + 2 * lengths + torch.tensor([1.0, -1.5, 0.5]), lengths)
    assert head.length_slope == pytest.approx(2.0), "the noise is uncorrelated with length"
    head = ScoreHead.fit(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert head.length_slope == pytest.approx(0.5)
    assert head.mean == pytest.approx(1.0)
    assert head.debias(torch.tensor([5.0]), torch.tensor([4.0])).item() == pytest.approx(3.0)
    assert ScoreHead.fit(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0])).length_slope == 0.0


class Letters:
    """Scores a text by a function of it; tokens are letters, and a response's end token."""

    def __init__(self, score: Callable[[str], float]) -> None:
        self._score = score

    def scores_and_states(self, samples: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([float(self._score("".join(sample))) for sample in samples]), torch.zeros(len(samples), 2)

    def response_lengths(self, samples: list[tuple[str, str]]) -> torch.Tensor:
        return torch.tensor([float(len(response) + 1) for _, response in samples])


def test_without_length_equal_texts_of_any_length_score_the_same() -> None:
    scorer: Any = Letters(lambda text: 0.5 * len(text) + (text[0] == "a"))
    texts = ["a", "abcd", "bcd", "b" * 4, "bb", "aaaaa"]
    samples = [("", text) for text in texts]
    lengths, first = scorer.response_lengths(samples), torch.tensor([float(text[0] == "a") for text in texts])
    biased, _ = EnsembleMember.fit(scorer, samples, {"": 1.0}, length_debias=False)
    fair, _ = EnsembleMember.fit(scorer, samples, {"": 1.0}, length_debias=True)
    slope = 0.5 + (torch.cov(torch.stack([first, lengths]))[0, 1] / lengths.var()).item()
    assert fair.heads[""].length_slope == pytest.approx(slope)
    assert torch.corrcoef(torch.stack([fair.raw_scores(samples)[0][:, 0], lengths]))[0, 1].abs() < 1e-5
    gaps = [member.raw_scores([("", "b"), ("", "b" * 9)])[0].diff(dim=0).item() for member in (biased, fair)]
    assert gaps[0] == pytest.approx(4.0)
    assert abs(gaps[1]) < 1.0
    assert "length_slope" not in biased.to_dict()


def test_the_length_of_the_prompt_does_not_count() -> None:
    """Every prompt with every response, so nothing but the response's length, after the bar, explains ½ a token."""
    scorer: Any = Letters(lambda text: 0.5 * len(text.partition("|")[2]) - 0.25 * len(text.partition("|")[0]))
    samples = [("a" * prompt + "|", "b" * response) for prompt in (10, 50, 120) for response in (1, 5, 9)]
    fair, _ = EnsembleMember.fit(scorer, samples, {"": 1.0}, length_debias=True)
    assert fair.heads[""].length_slope == pytest.approx(0.5)
    values, _ = fair.raw_scores([("aa|", "b"), ("aa|", "bbbbb"), ("aaaa|", "b")])
    assert values[0].item() == pytest.approx(values[1].item())
    assert (values[0] - values[2]).item() == pytest.approx(0.5), "what the prompt adds stays"
    model = RewardModel([fair], MahalanobisOOD(torch.zeros(2), torch.eye(2), 1.0))
    for score in (model, model.member_scores):
        assert score(["aa|", "aa|"], ["b", "b" * 9]).diff().item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("raw", [[1.0], [0.1] * 8, [2.5, 2.5]])
def test_a_raw_reward_that_does_not_vary_cannot_be_normalised(raw: list[float]) -> None:
    with pytest.raises(TrainingError, match=rf"does not vary over the {len(raw)} responses.*learning_rate"):
        ScoreHead.fit(torch.tensor(raw))


def test_length_debias_is_stored_reported_and_loaded(inputs: Path, tmp_path: Path) -> None:
    run_reward_model(inputs, tmp_path, **LEARN, length_debias=True)
    found, normalisation = figures(tmp_path), json.loads((tmp_path / NORMALISATION).read_text())
    assert found["length_slope"] == normalisation["length_slope"] != 0
    assert found["length_correlation"] != found["length_correlation_before"]
    model = load(inputs, tmp_path)
    texts, lengths = ["abx", "abcdefgx", "cy"], torch.tensor([4.0, 9.0, 3.0])
    raw = model.members[0].scorer([("", text) for text in texts]) - normalisation["length_slope"] * lengths
    torch.testing.assert_close(model([""] * 3, texts), (raw - normalisation["mean"]) / normalisation["std"])


def test_another_backbone_has_its_own_tokenizer(inputs: Path, tmp_path: Path) -> None:
    """Letters have other numbers there, so with the policy's tokenizer every score would be another one."""
    folder, tokenizer = tmp_path / "other", letter_tokenizer("Ġzyxwvutsrqponmlkjihgfedcba")
    tiny_model(seed=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out = tmp_path / "out"
    run_reward_model(inputs, out, **LEARN, backbone={"kind": "folder", "id": str(folder)}, ensemble_size=2)
    assert figures(out)["accuracy"] > 0.9
    assert json.loads((out / BACKBONE / "card.json").read_text())["source"] == "local folder other"
    folder.rename(tmp_path / "moved")  # the stage's own copy is all that is needed
    model = load(inputs, out)
    assert model.members[1].scorer._tokenizer("abc").input_ids == tokenizer("abc").input_ids
    assert accuracy(inputs, out) > 0.9


def test_a_backbone_that_is_missing_is_named(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"reward_model\.backbone, whose keys .* is no folder"):
        run_reward_model(inputs, tmp_path, backbone={"kind": "folder", "id": "none"})


def write_classifier(folder: Path, outputs: int, *, bert: bool = False) -> Any:
    """A random classifier over letters that are numbered backwards, with a chat template."""
    tokenizer = letter_tokenizer("Ġzyxwvutsrqponmlkjihgfedcba:")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }} {% endfor %}"
    torch.manual_seed(outputs)
    size = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "pad_token_id": 0, "num_labels": outputs, "initializer_range": 0.3}  # fmt: skip
    kind, config = (
        (BertForSequenceClassification, BertConfig) if bert else (LlamaForSequenceClassification, LlamaConfig)
    )
    model = kind(config(**size)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize(("outputs", "bert"), [(1, False), (2, False), (1, True), (2, True)])
def test_a_pretrained_model_scores_as_transformers_does(inputs: Path, tmp_path: Path, outputs: int, bert: bool) -> None:
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    classifier, tokenizer = write_classifier(theirs, outputs, bert=bert)
    pretrained = {"id": str(theirs), "template": "q:{prompt} r:{response}"}
    run_reward_model(inputs, out, normalisation_samples=16, pretrained=pretrained)
    normalisation = json.loads((out / NORMALISATION).read_text())

    def score(prompt: str, response: str) -> float:
        with torch.no_grad():
            logits = classifier(torch.tensor([tokenizer(f"q:{prompt} r:{response}").input_ids])).logits[0]
        return (logits[0] if outputs == 1 else logits[1] - logits[0]).item()

    responses = ["bc{prompt}", "d", "efghijk"]
    expected = [(score("a", response) - normalisation["mean"]) / normalisation["std"] for response in responses]
    assert load(inputs, out)(["a"] * 3, responses).tolist() == pytest.approx(expected, abs=1e-4)
    pairs = read_rows(inputs / "preferences" / "test.jsonl", Preference)
    right = [score(row.prompt, row.chosen) > score(row.prompt, row.rejected) for row in pairs]
    assert figures(out)["accuracy"] == pytest.approx(sum(right) / len(right))
    assert (out / "history.csv").read_text() == "step\n"
    assert MahalanobisOOD.load(out / OOD_DETECTOR).mean.shape == (32,)
    assert filecmp.cmp(out / PRETRAINED_DIR / "model.safetensors", theirs / "model.safetensors", shallow=False)


def test_the_head_of_a_scorer_may_have_another_name(tmp_path: Path) -> None:
    """As in UltraRM: its class is not of transformers, and its configuration states no number of outputs."""
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    classifier, tokenizer = write_classifier(theirs, 1)
    weights = load_file(theirs / "model.safetensors")
    weights["regression_head.weight"] = weights.pop("score.weight")
    save_file(weights, theirs / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((theirs / "config.json").read_text()) | {"architectures": ["LlamaRewardModel"]}
    (theirs / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("id2label", "label2id")})
    )
    fetch_pretrained_scorer(PretrainedRewardParams(id=str(theirs), head="regression_head"), 40, out)
    with torch.no_grad():
        expected = classifier(torch.tensor([tokenizer("abc de").input_ids])).logits[0, 0].item()
    assert load_pretrained_scorer(out)([("abc", " de")]).item() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ModelError, match=r"has no weights for score\.weight"):
        fetch_pretrained_scorer(PretrainedRewardParams(id=str(theirs), head="head"), 40, tmp_path / "other")


def test_a_scorer_s_limit_leaves_out_positions_that_it_cannot_use_and_must_be_known(tmp_path: Path) -> None:
    """RoBERTa counts positions from the padding's, here 1, plus one: of twenty, eighteen are left."""

    def fetch(model: Any, max_length: Any = "auto") -> int:
        model.save_pretrained(tmp_path / "theirs")
        letter_tokenizer().save_pretrained(tmp_path / "theirs")
        fetch_pretrained_scorer(PretrainedRewardParams(id=str(tmp_path / "theirs")), max_length, tmp_path / "out")
        return int(json.loads((tmp_path / "out" / PRETRAINED_DIR / "card.json").read_text())["max_length"])

    size = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_labels": 1}
    roberta = RobertaForSequenceClassification(
        RobertaConfig(**size, num_attention_heads=4, intermediate_size=32, max_position_embeddings=20, pad_token_id=1)
    )
    assert fetch(roberta) == 18
    assert load_pretrained_scorer(tmp_path / "out")([("", "a" * 40)]).isfinite().all()
    with pytest.raises(ModelError, match=r"lower reward_model\.max_length: that is 19 tokens, .* context is 18"):
        fetch(roberta, 19)
    bloom = BloomForSequenceClassification(BloomConfig(**size, n_head=4, pad_token_id=1))
    assert fetch(bloom, 7) == 7
    with pytest.raises(ModelError, match=r"does not state how many tokens it can read: set reward_model\.max_length"):
        fetch(bloom)


def test_a_chat_template_is_the_scorers_own(inputs: Path, tmp_path: Path) -> None:
    write_classifier(tmp_path / "theirs", 1)
    run_reward_model(inputs, tmp_path / "out", pretrained={"id": str(tmp_path / "theirs"), "template": "chat"})
    assert load_pretrained_scorer(tmp_path / "out").format("why", " so") == "u:why a:so "


def test_a_scorer_that_cannot_be_one_is_refused(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classifier(tmp_path / "three", 3)
    with pytest.raises(ModelError, match=r"scorer .*three has 3 outputs"):
        run_reward_model(inputs, tmp_path / "out", pretrained={"id": str(tmp_path / "three")})
    with pytest.raises(ModelError, match=r"has no weights for score\.weight, which would be random numbers"):
        run_reward_model(inputs, tmp_path / "out", pretrained={"id": str(inputs / "base_model" / "model")})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"model 'owner/name' .* make reward_model\.pretrained\.id a local folder"):
        run_reward_model(inputs, tmp_path / "out", pretrained={"id": "owner/name"})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kind": "rating", "margin": "scaled"}, "margin: scaled is for kinds that learn from pairs; kind is rating"),
        ({"kind": "classification"}, "kind classification needs a threshold"),
        ({"threshold": 1.0}, "threshold is for kind classification; kind is preference"),
        ({"kind": "multi_objective", "objectives": {"kind": 1.0}}, "needs two objectives or more"),
        ({"objectives": {"kind": 1.0, "short": 1.0}}, "objectives are for kind multi_objective"),
        ({"max_examples": 3}, "max_examples counts rated texts"),
        ({"normalisation_samples": 1}, "normalisation_samples\n.*greater than or equal to 2"),
        ({"pretrained": {"id": "a/b"}, "ensemble_size": 2}, "pretrained is set, so nothing is trained"),
        ({"pretrained": {"id": "a/b", "template": "{prompt}"}}, r"template needs \{prompt\} and \{response\}"),
    ],
)
def test_what_does_not_fit_a_kind_is_refused(inputs: Path, tmp_path: Path, changes: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        run_reward_model(inputs, tmp_path, **changes)


def test_rows_that_do_not_fit_a_kind_are_named(inputs: Path, tmp_path: Path) -> None:
    several: dict[str, Any] = {"kind": "multi_objective"}
    with pytest.raises(DataError, match=r"train\.jsonl: pair '\d+' is about objective 'short'; .* knows kind, fair"):
        run_reward_model(inputs, tmp_path, **several, objectives={"kind": 1.0, "fair": 1.0})
    with pytest.raises(DataError, match=r"train\.jsonl has no pair about fair"):
        run_reward_model(inputs, tmp_path, **several, objectives={"kind": 1.0, "short": 1.0, "fair": 1.0})
    with pytest.raises(DataError, match=r"threshold 9 parts nothing: all 64 texts of .*train\.jsonl"):
        run_reward_model(inputs, tmp_path, kind="classification", threshold=9.0)
    write_inputs(tmp_path)
    with pytest.raises(DataError, match=r"kind rating learns from rated texts: .*proxy/train\.jsonl does not exist"):
        run_reward_model(tmp_path, tmp_path / "out", kind="rating")
    with pytest.raises(DataError, match=r"margin is scaled, but no pair of .*train\.jsonl has a positive margin"):
        run_reward_model(tmp_path, tmp_path / "out", margin="scaled")
