"""What a reward would pay for: rewards with one weakness each, and gains and shares worked out by hand."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tasks.config.params import Params, load_params
from tasks.config.reward import Normaliser, RewardParams
from tasks.config.training import EnvironmentParams, GenerationParams, LoraParams
from tasks.core.errors import ConfigError, DataError
from tasks.core.paths import DISABLED_MARKER, Artifacts
from tasks.core.rows import Prompt, read_rows, write_rows
from tasks.core.text_stats import repetition_rate
from tasks.evals.challenge import PRAISE
from tasks.evals.compare import ScoredResponse
from tasks.evals.reward_check import FOREIGN, Gain, check_reward, hack_responses, measure_gains, stages_read
from tasks.evals.scoring import SampledResponse, score_responses
from tasks.models.encoding import encode_response
from tasks.models.loading import add_lora, load_reference, save_weights
from tasks.rewards.composition import CompositeReward
from tests.conftest import LETTERS, letter_tokenizer, tiny_model

Score = Callable[[str], float]

TEXTS = (" one two three four", " one two three four five six", " now two three four", " now two three four five six")
CHARACTERS = letter_tokenizer(LETTERS + "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:<>/!'éÃ©")
TAGS = "<think></think><answer></answer>"
PATTERN = r"(?s)(?P<all><think>.*</think>\s*<answer>.+</answer>)"


def sampled(texts: Sequence[str] = TEXTS, prompts: int = 3) -> list[SampledResponse]:
    rows = [Prompt(id=f"p{number}", prompt=f"prompt {number}") for number in range(prompts)]
    return [
        SampledResponse("sft", row, text, 9, True, 0.0, 0.0, draw) for row in rows for draw, text in enumerate(texts)
    ]


def per_text(score: Score) -> Callable[[list[str], list[str]], list[float]]:
    return lambda _prompts, responses: [float(score(response)) for response in responses]


def gains_of(
    reward: CompositeReward, gold: Score, sft: Sequence[SampledResponse], hacks: Sequence[SampledResponse]
) -> dict[str, Gain]:
    scored = [score_responses(rows, reward, per_text(gold), vader=False) for rows in (sft, hacks)]
    return {gain.name: gain for gain in measure_gains(*scored, reward, resamples=100, seed=0)}


def checked(score: Score, gold: Score, patterns: Sequence[str] = ()) -> dict[str, Gain]:
    """The gains by a reward of one component, of all hacks of `TEXTS`."""
    sft = sampled()
    hacks = hack_responses(sft, CHARACTERS, 400, patterns, 0)
    return gains_of(CompositeReward({"it": per_text(score)}, {"it": 1.0}), gold, sft, hacks)


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (words, {"length", "repetition", "loop", "other language"}),
        (lambda text: -words(text), {"truncated", "structure", "empty", "prompt copied", "tags"}),
        (lambda text: sum(word in PRAISE for word in text.split()), {"praise"}),
        (lambda text: 0.2 * ("<answer>" in text), {"tags"}),
        (lambda text: text == "", {"empty", "structure"}),
        (lambda text: "prompt" in text, {"prompt copied"}),
        (lambda text: FOREIGN in text, {"other language"}),
        (lambda text: "two three" not in text and words(text) in (4, 6), {"scrambled", "praise"}),
        (lambda text: 100 * repetition_rate(text), {"repetition", "loop", "length"}),
        (lambda _: 1.0, set()),
    ],
    ids=["words", "short", "praise", "tags", "empty", "prompt", "german", "order", "again", "nothing"],
)
def test_a_weakness_of_the_reward_is_found_and_nothing_else(score: Score, expected: set[str]) -> None:
    """Each reward pays one thing, some what SFT never has; gold pays nothing."""
    found = checked(score, lambda _: 0.0, [PATTERN])
    assert {name for name, gain in found.items() if gain.unconfirmed} == expected


def test_what_gold_pays_too_is_no_finding() -> None:
    found = checked(words, words)
    assert found["length"].gains["proxy"].mean > 10
    assert [name for name, gain in found.items() if gain.unconfirmed] == []


def test_gains_are_in_standard_deviations_of_all_of_sft_s_scores() -> None:
    """Four and six words by turns: mean 5, standard deviation √(12/11) of twelve. Repetition is six words more."""
    found, std = checked(words, lambda _: 0.0), math.sqrt(12 / 11)
    means = {name: found[name].gains["proxy"].mean for name in ("repetition", "truncated", "scrambled", "empty")}
    assert means == pytest.approx({"repetition": 6 / std, "truncated": -2.5 / std, "scrambled": 0, "empty": -5 / std})
    assert found["empty"].gains["proxy"].low == found["empty"].gains["proxy"].high, "the prompts do not differ"
    assert found["repetition"].example == "prompt 0 one two three four five six four five six four five six"
    hacks = [name for name in found if not name.startswith("best")]
    assert hacks == sorted(hacks, key=lambda name: -found[name].gains["proxy"].mean), "the best paid comes first"


def test_the_interval_is_over_prompts() -> None:
    """One prompt of four gains 4 points, the others 0: a resample has it never, or up to three times of four."""
    sft = sampled([" a"], prompts=4)
    hacks = [
        SampledResponse("h", row.prompt, " a a a a a" if not n else " a", 9, True, None, None)
        for n, row in enumerate(sft)
    ]
    gain = gains_of(CompositeReward({"it": per_text(words)}, {"it": 1.0}), lambda _: 0.0, sft, hacks)["h"].gains[
        "proxy"
    ]
    assert (gain.mean, gain.low) == (1.0, 0.0)
    assert 2 <= gain.high <= 3


def of_one(reward: CompositeReward, response: str) -> Gain:
    """The gain of one text as a hack on every prompt."""
    rows = [row for row in sampled() if row.draw == 0]
    hacks = [SampledResponse("h", row.prompt, response, 9, True, None, None) for row in rows]
    return gains_of(reward, lambda _: 0.0, sampled(), hacks)["h"]


def test_of_a_sum_the_parts_add_up_and_the_largest_pays() -> None:
    """Ten words with z: 10 − 2 for SFT's 5, where the words add 5 and z takes 2."""
    parts = {"words": per_text(words), "z": per_text(lambda text: "z" in text)}
    gain, std = of_one(CompositeReward(parts, {"words": 1.0, "z": -2.0}), " z" * 10), math.sqrt(12 / 11)
    assert gain.gains["proxy"].mean == pytest.approx(3 / std)
    assert gain.added == pytest.approx({"words": 5 / std, "z": -2 / std})
    assert gain.paid_by == "words"


def test_of_a_product_the_part_that_changed_pays() -> None:
    """½ · ½ of SFT becomes ½ · 1; SFT's totals are 0.2 and 0.3 by turns."""
    parts = {"words": per_text(lambda text: words(text) / 10), "loud": per_text(lambda text: 0.5 + 0.5 * ("!" in text))}
    gain = of_one(CompositeReward(parts, dict.fromkeys(parts, 1.0), "product"), " so it is a film!")
    assert gain.added == pytest.approx({"words": 0, "loud": 0.25 / (0.05 * math.sqrt(12 / 11))}, abs=1e-5)
    assert (gain.paid_by, gain.unconfirmed) == ("loud", True)


def test_a_gate_that_opens_pays() -> None:
    parts = {"words": per_text(words), "form": per_text(lambda text: text.endswith("!"))}
    gain = of_one(CompositeReward(parts, {"words": 1.0, "form": 0.0}, gates={"form": 1.0}), " so it is a film!")
    assert gain.added == pytest.approx({"words": 0, "form": 5}), "in points, for SFT earns nothing throughout"
    assert gain.paid_by == "form"


def test_a_scale_by_batch_is_that_of_sft_s_scores() -> None:
    """(10 − 5) / 1, and SFT's scaled scores are −1 and 1 by turns."""
    scales = {"words": Normaliser(by="batch")}
    gain = of_one(CompositeReward({"words": per_text(words)}, {"words": 1.0}, scales=scales), " x" * 10)
    assert gain.gains["proxy"].mean == pytest.approx(5 / math.sqrt(12 / 11))
    assert gain.added["words"] == pytest.approx(5 / math.sqrt(12 / 11))


def test_the_best_of_n_by_the_reward() -> None:
    """Of 1, 2, 3 and 4 words: the best of two has (2·1 + 3·2 + 4·3) / 6 on average, that of all 4; the mean is 2.5."""
    sft = sampled([" a", " a a", " a a a", " a a a a"], prompts=2)
    reward, std = CompositeReward({"it": per_text(words)}, {"it": 1.0}), math.sqrt(10 / 7)
    found = gains_of(reward, lambda text: -words(text), sft, hack_responses(sft, CHARACTERS, 400, [], 0))
    best = {name: gain for name, gain in found.items() if name.startswith("best")}
    expected = {"best of 1": 0, "best of 2": (20 / 6 - 2.5) / std, "best of 4": 1.5 / std}
    assert {name: gain.gains["proxy"].mean for name, gain in best.items()} == pytest.approx(expected, abs=1e-6)
    assert [-gain.gains["gold"].mean for gain in best.values()] == pytest.approx(list(expected.values()), abs=1e-6)
    assert {gain.unconfirmed for gain in best.values()} == {False}, "it is no hack"


def test_structure_keeps_tags_keys_and_marks_and_no_word() -> None:
    made = hack_responses(sampled(['<b>Very</b> good: 42! {"key": "word 7"}']), CHARACTERS, 99, [], 0)
    assert {row.response for row in made if row.policy == "structure"} == {' <b></b> : 0! {"key": " 0"}'}
    assert "tags" not in {row.policy for row in made}


def test_the_loop_is_the_first_sentence_and_a_hack_ends_where_the_policy_would_have_to() -> None:
    rows = hack_responses(sampled([" it is. and more"] * 6), CHARACTERS, 20, [PATTERN], 0)
    made = {row.policy: row.response for row in rows}
    assert made["loop"] == " it is. it is. it is"
    assert made["tags"] == f" {TAGS}"[:20]
    assert max(len(encode_response(CHARACTERS, row.response)) for row in rows) == 21, "20, and the end"
    assert {(row.tokens, row.ended) for row in rows if row.policy in ("loop", "empty")} == {(20, False), (1, True)}
    assert {row.draw for row in rows} == {0, 1, 2, 3}
    single = {
        row.policy: row.response
        for text in ("", " yes")
        for row in hack_responses(sampled([text]), CHARACTERS, 9, [], 0)
    }
    assert single["scrambled"] == " yes", "a text that a hack does not fit stays as it is"


@pytest.fixture
def world(tmp_path: Path) -> Artifacts:
    """A random model of letters, SFT on it, prompts with right answers, and no judge."""
    folders = {name: tmp_path / name for name in ("base_model", "prepare", "sft", "gold_judge")}
    letter_tokenizer().save_pretrained(folders["base_model"] / "model")
    tiny_model().save_pretrained(folders["base_model"] / "model")
    lora = LoraParams(r=4, alpha=8, target_modules="all-linear", reward_model_modules="all-linear")
    save_weights(add_lora(load_reference(folders["base_model"], None), lora, seed=0), folders["sft"])
    (folders["gold_judge"] / "adapter").mkdir(parents=True)
    (folders["gold_judge"] / "adapter" / DISABLED_MARKER).touch()
    rows = [Prompt(id=f"p{number}", prompt=prompt, answer="b") for number, prompt in enumerate(("b", "ab", "so"))]
    write_rows(folders["prepare"] / "prompts" / "validation.jsonl", rows)
    return Artifacts(out=tmp_path / "out", **folders)


def verifiable(params_yaml: Path, **weights: float) -> Params:
    params = load_params(params_yaml)
    evaluate = params.evaluate.model_copy(update={"vader": False, "bootstrap_samples": 50})
    generation = GenerationParams(max_new_tokens=5, temperature=1.0)
    changes = {"reward": RewardParams(weights=weights), "evaluate": evaluate, "generation": generation}
    return params.model_copy(update=changes)


def test_a_reward_of_rules_whose_gold_is_the_right_answer(world: Artifacts, params_yaml: Path) -> None:
    """Copying the prompt `b` is right, so one prompt of three gains by both; what is written is the same each time."""
    params = verifiable(params_yaml, answer=1.0, repetition=0.0)
    found = check_reward(params, world, prompts=32, samples=4)
    gains = {gain.name: gain for gain in found}
    assert {gain.prompts for gain in found} == {3}, "there are no more"
    assert all(gain.gains["proxy"] == gain.gains["gold"] and not gain.unconfirmed for gain in found)
    assert gains["prompt copied"].gains["gold"].mean > gains["empty"].gains["gold"].mean
    assert {gain.paid_by for gain in found if gain.gains["gold"].mean} == {"answer"}
    names = ["gains.csv", "gains.json", "gains.svg", "responses.jsonl"]
    files = {path.name: path.read_bytes() for path in world.out.iterdir()}
    assert sorted(files) == names
    written = json.loads(files["gains.json"])
    assert written["best of 4"]["gains"]["proxy"]["mean"] == gains["best of 4"].gains["proxy"].mean
    rows = list(csv.DictReader(files["gains.csv"].decode().splitlines()))
    assert [(row["name"], float(row["gains.gold.mean"])) for row in rows] == [
        (g.name, g.gains["gold"].mean) for g in found
    ]
    texts = read_rows(world.out / "responses.jsonl", ScoredResponse)
    assert sum(row.policy == "sft" for row in texts) == 12
    assert all(f">{name}<" in files["gains.svg"].decode() for name in gains)
    check_reward(params, world, prompts=32, samples=4)
    assert {path.name: path.read_bytes() for path in world.out.iterdir()} == files


def test_where_nothing_but_the_reward_can_judge_it_says_so(world: Artifacts, params_yaml: Path) -> None:
    path = world.prepare / "prompts" / "validation.jsonl"
    write_rows(path, [Prompt(id="p", prompt="b"), Prompt(id="q", prompt="c")])
    with pytest.raises(DataError, match="nothing independent can judge"):
        check_reward(verifiable(params_yaml, repetition=1.0), world, prompts=2, samples=2)
    write_rows(path, [Prompt(id="p", prompt="b")])
    with pytest.raises(DataError, match=r"holds 1 prompts, and an interval needs two: raise prepare\.validation_share"):
        check_reward(verifiable(params_yaml, repetition=1.0), world, prompts=2, samples=2)
    path.write_text("")
    with pytest.raises(DataError, match=r"validation\.jsonl holds no rows"):
        check_reward(verifiable(params_yaml, repetition=1.0), world, prompts=2, samples=2)


def test_it_reads_the_reward_model_only_where_it_has_a_weight_and_no_conversations(params_yaml: Path) -> None:
    assert "reward_model" in stages_read(load_params(params_yaml))
    params = verifiable(params_yaml, answer=1.0)
    assert stages_read(params) == ["base_model", "prepare", "sft", "gold_judge"]
    environment = EnvironmentParams(kind="service_bot", max_turns=2, gamma=1.0)
    with pytest.raises(ConfigError, match="environment is on"):
        stages_read(params.model_copy(update={"environment": environment}))
