"""The whole stage on models of two layers, and each of its numbers against a second, plainer computation."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tasks.config.evaluation import EvaluateParams, JudgeParams
from tasks.config.reward import RewardParams
from tasks.config.rules import CodeRule
from tasks.config.training import GenerationParams, LoraParams
from tasks.core import tracking
from tasks.core.errors import DataError
from tasks.core.paths import DISABLED_MARKER, Artifacts
from tasks.core.rows import Preference, Prompt, Rating, read_rows, write_json, write_rows
from tasks.core.text_stats import repetition_rate
from tasks.evals.champion import compare_with_champion
from tasks.evals.compare import ScoredResponse, by_policy, first_draws
from tasks.evals.gate import METRICS
from tasks.evals.pairwise import Judgement
from tasks.evals.scoring import PolicySampler, SampledResponse, load_gold_reward, sample_prompts, score_responses
from tasks.evaluate import _weights, evaluate
from tasks.models.loading import (
    add_lora,
    load_beside,
    load_policy,
    load_reference,
    load_tokenizer,
    new_reward_model,
    save_weights,
)
from tasks.rewards.composition import build_reward
from tasks.rewards.reward_model import NORMALISATION, OOD_DETECTOR, MahalanobisOOD, RewardModel, load_gold_judge
from tests.conftest import LETTERS, letter_tokenizer, tiny_model
from tests.support.chat_server import longer, serving
from tests.support.tiny_stages import run_reward_model, write_inputs
from tests.unit.rewards.conftest import sandbox_or_skip
from tests.unit.rewards.test_objectives import write_classifier

LORA = LoraParams(r=4, alpha=8, target_modules="all-linear", reward_model_modules="all-linear")
PARAMS = EvaluateParams(prompts=6, batch_size=4, bootstrap_samples=40, report_samples=2, vader=True, llm_judge=None)
GENERATION = GenerationParams(max_new_tokens=7, temperature=1.3)
REWARD = RewardParams(weights={"learned": 1.0, "repetition": 0.5})
PROMPTS = [
    Prompt(id=f"p{number}", prompt=text)
    for number, text in enumerate(["good film", "awful end", "good", "so so", "x", "is it", "zz"])
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every upstream folder: a letter-level tokenizer, random weights, adapters that really change the model."""
    root = tmp_path_factory.mktemp("artifacts")
    names = ("base_model", "sft", "reward_model", "gold_judge", "ppo", "grpo", "dpo", "overoptimisation", "lm_eval",
             "prepare", "collect")  # fmt: skip
    folders = {name: root / name for name in names}
    write_json(folders["overoptimisation"] / "fits.json", {})
    benchmarks = {"sft": {"held_out": {"acc": [0.5, None]}}, "ppo": {"held_out": {"acc": [0.8125, 0.1]}}}
    write_json(folders["lm_eval"] / "results.json", benchmarks)
    (folders["overoptimisation"] / "points.csv").touch()
    card = {"name": "letters", "source": "nowhere", "licence": "CC0", "parameters": 7, "rows": 3}
    base = folders["base_model"]
    write_json(base / "card.json", card)
    write_json(folders["collect"] / "cards" / "letters.json", card | {"sha256_of_rows": "e" * 64})
    letter_tokenizer(LETTERS + "XYZ").save_pretrained(base / "model")
    tiny_model().save_pretrained(base / "model")
    for seed, name in enumerate(("sft", "ppo", "grpo", "dpo", "reward_model", "gold_judge")):
        scorer = name in ("reward_model", "gold_judge")
        start = new_reward_model(base, None, seed=seed) if scorer else load_reference(base, None)
        model = add_lora(start, LORA, seed=seed, head="score" if scorer else None)
        draw = torch.Generator().manual_seed(seed)
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.data.copy_(0.1 * torch.randn(weight.shape, generator=draw))
        save_weights(model, folders[name])
        if scorer:
            write_json(folders[name] / NORMALISATION, {"mean": 0.5, "std": 2.0})
    MahalanobisOOD(torch.ones(32), torch.eye(32), 8.0).save(folders["reward_model"] / OOD_DETECTOR)
    (folders["ppo"] / "history.csv").write_text("step,reward,hacking/repetition\n1,0.1,0.0\n2,0.3,0.2\n")
    write_rows(folders["prepare"] / "prompts" / "test.jsonl", PROMPTS)
    rated = [Rating(id=row.id, text=f"{row.prompt} is good", ratings=(1.0,)) for row in PROMPTS[:4]]
    write_rows(folders["prepare"] / "ratings" / "proxy" / "test.jsonl", rated[:1])
    write_rows(folders["prepare"] / "ratings" / "gold" / "test.jsonl", rated[1:])
    return folders


def _run(
    world: dict[str, Path], out: Path, seed: int = 0, params: EvaluateParams = PARAMS, reward: RewardParams = REWARD
) -> Path:
    out.mkdir()
    evaluate(params, GENERATION, reward, None, seed, Artifacts(**world, out=out))
    return out


@pytest.fixture(scope="module")
def out(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(world, tmp_path_factory.mktemp("evaluate") / "out")


@pytest.fixture
def records(out: Path) -> list[ScoredResponse]:
    return read_rows(out / "responses.jsonl", ScoredResponse)


def test_outputs_are_complete_and_the_same_bytes_with_a_tracker(
    world: dict[str, Path], out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Meanwhile the progress names the policy that answers."""
    kept: list[tuple[str, int]] = []
    recorder = SimpleNamespace(
        log_file=lambda path, folder: kept.append((path.name, path.stat().st_size)),
        log_samples=lambda name, rows, step: kept.append((name, len(rows))),
    )
    with tracking.active_run(tracking.ActiveRun("evaluate", recorder)):
        again = _run(world, tmp_path / "again")
    assert kept == [("samples", 2), ("report.html", (again / "report.html").stat().st_size)]
    shown = capfd.readouterr().err
    assert "answers of sft: batch 6 of 6" in shown, "eight draws of a prompt are more than a batch of four"
    assert all(f"answers of {name}: batch 3 of 3" in shown for name in ("ppo", "grpo", "dpo")), shown
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == [
        "controls.json", "findings.json", "judgements.jsonl", "metrics.json", "plots/lengths.csv",
        "plots/reward_against_kl.csv", "plots/win_rates.csv", "policies.json", "report.html", "report.json",
        "responses.jsonl", "samples.jsonl",
    ]  # fmt: skip
    for name in files:
        content = (out / name).read_bytes()
        assert content == (again / name).read_bytes(), name
        assert str(world["sft"].parent).encode() not in content, f"{name} holds a path of this machine"


def test_the_report_is_there_as_json_too_and_what_training_found_is_a_finding(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    assert report["policies"] == json.loads((out / "policies.json").read_text())
    assert report["controls"] == json.loads((out / "controls.json").read_text())
    assert [f"{item['name']}, {item['licence']}" for item in report["sources"]] == [
        "Base model, CC0",
        "Data: letters, CC0",
    ]
    assert set(report["examples"]) == {"ppo", "grpo", "dpo"}
    found = json.loads((out / "findings.json").read_text())
    assert report["findings"] == found
    assert "0.8125<small>± 0.1</small>" in (out / "report.html").read_text(), "the benchmarks are in the report"
    assert list(found) == ["ppo", "grpo", "dpo"]
    first = found["ppo"][0]
    assert (first["detector"], first["phase"]) == ("repetition", "training, update 2")
    assert first["text"].startswith("repetition 0.20 (threshold 0.1")


def test_every_policy_answers_the_same_prompts_and_has_the_promised_keys(
    out: Path, records: list[ScoredResponse]
) -> None:
    asked = {policy: [row.prompt_id for row in own] for policy, own in by_policy(records).items()}
    assert asked["sft"] == asked["null"] == [prompt for prompt in asked["best_of_n"] for _ in range(4)]
    assert asked["ppo"] == asked["grpo"] == asked["dpo"] == [prompt for prompt in asked["best_of_n"] for _ in range(2)]
    assert len(set(asked["sft"])) == 6
    table = json.loads((out / "policies.json").read_text())
    assert list(table) == ["sft", "ppo", "grpo", "dpo"]
    promised = {"reward_proxy", "reward_gold", "win_rate", "win_rate_low", "win_rate_high", "kl", "length"}
    assert all(promised <= set(row) for row in table.values())
    sft = table["sft"]
    assert (sft["win_rate"], sft["win_rate_low"], sft["win_rate_high"], sft["kl"]) == (0.5, 0.5, 0.5, 0.0)
    assert json.loads((out / "metrics.json").read_text())["ppo"]["win_rate"] == table["ppo"]["win_rate"]


def test_kl_is_that_of_a_plain_forward_pass_over_each_response(
    world: dict[str, Path], records: list[ScoredResponse]
) -> None:
    tokenizer = load_tokenizer(world["base_model"])
    reference = load_reference(world["base_model"], world["sft"])
    compared = 0
    for name in ("ppo", "grpo", "dpo"):
        policy = load_policy(world["base_model"], world["sft"], world[name])
        for record in by_policy(records)[name]:
            prompt = tokenizer(record.prompt).input_ids
            response = tokenizer(record.response).input_ids + [tokenizer.eos_token_id] * record.ended
            if len(response) < record.tokens:
                continue  # random weights sampled the padding token, which the text does not show
            compared += 1
            assert len(response) == record.tokens <= GENERATION.max_new_tokens
            ids = torch.tensor([prompt + response])
            gaps = []
            for place, token in enumerate(response, start=len(prompt)):
                logits = (model(ids[:, :place]).logits[0, -1] for model in (policy, reference))
                own, other = (torch.log_softmax(one / GENERATION.temperature, dim=-1)[token].item() for one in logits)
                gaps.append(own - other)
            assert record.kl == pytest.approx(sum(gaps), abs=1e-4)
            k3 = sum(torch.exp(torch.tensor(-gap)).item() - 1 + gap for gap in gaps)
            assert record.kl_k3 == pytest.approx(k3, abs=1e-4)
    assert compared >= 6
    assert any(abs(record.kl or 0) > 0.05 for record in records), "the adapters change nothing, so this shows nothing"


def test_scores_are_each_judges_own_and_what_the_reward_model_notices_is_reported(
    world: dict[str, Path], out: Path, records: list[ScoredResponse]
) -> None:
    learned = RewardModel.load(world["base_model"], world["sft"], world["reward_model"])
    gold = load_gold_judge(world["base_model"], world["gold_judge"])
    for record in records:
        prompt, response = [record.prompt], [record.response]
        assert record.rewards["learned"] == pytest.approx(learned(prompt, response).item(), abs=1e-5)
        assert record.gold == pytest.approx(gold(prompt, response).item(), abs=1e-5)
        assert record.proxy == pytest.approx(record.rewards["learned"] + 0.5 * record.rewards["repetition"], abs=1e-5)
        assert record.vader is not None
        assert -1 <= record.vader <= 1
    expected = learned.score_with_metrics([r.prompt for r in records], [r.response for r in records])[1]["ood_share"]
    assert [record.metrics["ood_share"] for record in records] == expected.tolist()
    table = json.loads((out / "policies.json").read_text())
    for policy, row in (table | json.loads((out / "controls.json").read_text())).items():
        assert row["ood_share"] == pytest.approx(mean(r.metrics["ood_share"] for r in records if r.policy == policy))
    assert 0 < expected.mean() < 1, "a threshold that shows nothing"


def test_all_draws_have_random_numbers_of_their_own(world: dict[str, Path], records: list[ScoredResponse]) -> None:
    """SFT under four names: the same numbers would give the same texts."""
    texts = [[record.response for record in by_policy(records)[name]] for name in ("sft", "null")]
    prompts = [row for row in PROMPTS if row.id in {record.prompt_id for record in records}]
    beside = partial(load_beside, world["base_model"], world["sft"])
    tokenizer = load_tokenizer(world["base_model"])
    sampler = PolicySampler(tokenizer, prompts, GENERATION, batch_size=4, seed=0, load_beside=beside)
    model = load_reference(world["base_model"], world["sft"])
    answers = sampler.sample_each({"one": lambda: model, "two": lambda: model}, samples_per_prompt=3)
    assert [answer.draw for answer in answers] == [0, 1, 2] * 12
    assert [answer.kl for answer in answers] == pytest.approx([0.0] * 36, abs=1e-5)
    texts += [[answer.response for answer in answers if answer.policy == name] for name in ("one", "two")]
    own = [[texts[0][row::4] for row in range(4)], [texts[1][row::4] for row in range(4)]]
    own += [[texts[place][row::3] for row in range(3)] for place in (2, 3)]
    draws = [tuple(draw) for policy in own for draw in policy]
    assert len(set(draws)) == len(draws) == 14


def test_a_model_without_an_adapter_has_its_kl_to_the_reference_that_is_given(world: dict[str, Path]) -> None:
    """The base model against SFT, token by token as in a plain forward pass; greedy decoding draws nothing."""
    tokenizer = load_tokenizer(world["base_model"])
    beside = partial(load_beside, world["base_model"], world["sft"])
    sampler = PolicySampler(tokenizer, PROMPTS[:2], GENERATION, batch_size=4, seed=0, load_beside=beside)
    base, sft = load_reference(world["base_model"], None), load_reference(world["base_model"], world["sft"])
    answers = sampler.sample("base", base, reference=sft)
    assert sampler.sample("base", base) == answers, "it is loaded beside a policy without an adapter"
    assert [answer.kl for answer in sampler.sample("sft", sft)] == [0.0] * 2, "it is itself"
    for answer in answers:
        prompt = tokenizer(answer.prompt.prompt).input_ids
        response = tokenizer(answer.response).input_ids + [tokenizer.eos_token_id] * answer.ended
        if len(response) < answer.tokens:
            continue
        ids = torch.tensor([prompt + response])
        own, other = (torch.log_softmax(m(ids).logits[0] / GENERATION.temperature, -1) for m in (base, sft))
        gaps = [(own - other)[place - 1, ids[0, place]].item() for place in range(len(prompt), ids.shape[1])]
        assert answer.kl == pytest.approx(sum(gaps), abs=1e-4)
    greedy = sampler.sample("base", base, greedy=True)
    assert [row.response for row in greedy] == [row.response for row in sampler.sample("other", base, greedy=True)]
    token = base(torch.tensor([tokenizer(PROMPTS[0].prompt).input_ids])).logits[0, -1].argmax().item()
    assert greedy[0].response[:1] == tokenizer.decode([token])[:1]


def test_the_digest_of_a_stages_weights_is_that_of_either_kind(world: dict[str, Path], tmp_path: Path) -> None:
    """One file, or shards in their order; what else lies in the folder is no weight."""
    assert [*_weights(world["reward_model"])] == [
        (world["reward_model"] / "adapter/adapter_model.safetensors").read_bytes()
    ]
    (tmp_path / "adapter").mkdir()
    for name in ("model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors", "ood.safetensors"):
        (tmp_path / "adapter" / name).write_text(name)
    assert [part[:11] for part in _weights(tmp_path)] == [b"model-00001", b"model-00002"]


def test_controls_are_rows_of_their_own(out: Path, records: list[ScoredResponse]) -> None:
    """The best of the null's four draws by the proxy; a person's text after each prompt that begins a rated one."""
    controls = json.loads((out / "controls.json").read_text())
    assert set(controls) == {"null", "best_of_n", "human"}
    null, best = by_policy(records)["null"], by_policy(records)["best_of_n"]
    for place, record in enumerate(best):
        own = null[4 * place : 4 * place + 4]
        assert {row.prompt_id for row in own} == {record.prompt_id}
        assert record.proxy == max(row.proxy for row in own)
        assert (record.kl, record.draw) == (pytest.approx(0.636294), 0)  # log 4 − ¾
    assert controls["best_of_n"]["kl"] == pytest.approx(0.636294)
    human = by_policy(records)["human"]
    assert {record.prompt_id for record in human} == {"p0", "p1", "p2", "p3"} & {record.prompt_id for record in null}
    assert all((record.response, record.ended, record.kl) == (" is good", True, None) for record in human)
    assert (controls["human"]["n"], "kl" in controls["human"]) == (len(human), False)
    table = json.loads((out / "policies.json").read_text())
    assert table["ppo"]["win_rate_null"] == controls["null"]["win_rate"]
    assert json.loads((out / "metrics.json").read_text())["null"]["win_rate"] == controls["null"]["win_rate"]


KINDS: dict[str, dict[str, Any]] = {
    "rating": {"kind": "rating", "ensemble_size": 2},
    "multi_objective": {"kind": "multi_objective", "objectives": {"kind": 0.7, "short": 0.3}},
    "backbone": {"backbone": {"kind": "random"}, "length_debias": True},
    "pretrained": {"pretrained": {"id": "theirs", "template": "chat"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_reward_model_is_reported(
    world: dict[str, Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.setenv("RLHF_ROOT", str(tmp_path))
    write_classifier(tmp_path / "theirs", 1)
    write_inputs(tmp_path)
    for name in ("base_model", "sft"):
        shutil.rmtree(tmp_path / name)
        (tmp_path / name).symlink_to(world[name])
    for split in ("train", "validation", "test"):
        rated = [Rating(id=str(n), text="ab"[n % 2] * (n + 1), ratings=(float(n % 2),)) for n in range(12)]
        write_rows(tmp_path / "prepare" / "ratings" / "proxy" / f"{split}.jsonl", rated)
        path = tmp_path / "preferences" / f"{split}.jsonl"
        about = ({"objective": "kind", "margin": None if kind == "pretrained" else 1.0}, {"objective": "short"})
        pairs = enumerate(read_rows(path, Preference))
        write_rows(path, [row.model_copy(update=about[n % 2]) for n, row in pairs])
    (tmp_path / "reward_model").mkdir()
    run_reward_model(tmp_path, tmp_path / "reward_model", **KINDS[kind])
    out = _run({**world, "reward_model": tmp_path / "reward_model"}, tmp_path / "out")
    page, table = (out / "report.html").read_text(), json.loads((out / "policies.json").read_text())
    assert "Weights: reward model" in page
    assert ("Reward model: accuracy by margin" in page) == (kind != "pretrained"), "its pairs have no margins"
    assert ("Reward model: calibration" in page) == (kind != "rating")
    assert "disagreement" in table["ppo"] or kind != "rating"
    if kind == "multi_objective":
        records = read_rows(out / "responses.jsonl", ScoredResponse)
        for record in records:
            parts = {name: record.metrics[f"objective/{name}"] for name in ("kind", "short")}
            assert record.rewards["learned"] == pytest.approx(0.7 * parts["kind"] + 0.3 * parts["short"], abs=1e-5)
        own = [record.metrics["objective/kind"] for record in records if record.policy == "ppo"]
        assert table["ppo"]["objective/kind"] == pytest.approx(mean(own))


def test_vader_reads_prompt_and_response(records: list[ScoredResponse]) -> None:
    """One word of the lexicon, of valence v, gives v / √(v² + 15): good is 1.9, awful −2.0, random letters nothing."""
    expected = {"good film": 1.9 / (1.9**2 + 15) ** 0.5, "awful end": -2.0 / (2.0**2 + 15) ** 0.5}
    found = {record.prompt: record.vader for record in records}
    assert {prompt: found[prompt] for prompt in expected} == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def nobody_rated(world: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The stages that learn from people are off; every prompt has a right answer."""
    off = {name: tmp_path / name for name in ("reward_model", "gold_judge", "dpo")}
    for folder in off.values():
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / DISABLED_MARKER).touch()
    rows = [row.model_copy(update={"answer": str(number)}) for number, row in enumerate(PROMPTS)]
    write_rows(tmp_path / "prepare" / "prompts" / "test.jsonl", rows)
    return world | off | {"prepare": tmp_path / "prepare"}


def test_without_ratings_the_right_answer_is_the_gold_judge(nobody_rated: dict[str, Path], tmp_path: Path) -> None:
    params = PARAMS.model_copy(update={"vader": False})
    out = _run(nobody_rated, tmp_path / "out", params=params, reward=RewardParams(weights={"answer": 2.0}))
    table = json.loads((out / "policies.json").read_text())
    assert list(table) == ["sft", "ppo", "grpo"]
    assert not any("vader" in key for row in table.values() for key in row)
    assert set(json.loads((out / "controls.json").read_text())) == {"null", "best_of_n"}, "nobody wrote anything"
    assert all({"accuracy_greedy", "accuracy_greedy_low", "pass_at_2"} <= set(row) for row in table.values())
    records = read_rows(out / "responses.jsonl", ScoredResponse)
    assert all(record.gold in (0.0, 1.0) and record.proxy == 2 * record.gold for record in records)
    html = (out / "report.html").read_text()
    assert "Right<br>answers" in html
    assert "VADER" not in html
    assert "<i>Learned</i>" not in html


def test_where_answers_are_known_accuracy_is_read_in_the_demanded_form_and_as_the_last_number(
    nobody_rated: dict[str, Path], tmp_path: Path
) -> None:
    """The models write letters alone: no response is `e`, but in some an e stands where the pattern looks."""
    rows = [row.model_copy(update={"answer": "e"}) for row in PROMPTS]
    write_rows(nobody_rated["prepare"] / "prompts" / "test.jsonl", rows)
    params = PARAMS.model_copy(update={"vader": False, "answer_pattern": "([aeiou])"})
    out = _run(nobody_rated, tmp_path / "out", params=params, reward=RewardParams(weights={"answer": 2.0}))
    records = read_rows(out / "responses.jsonl", ScoredResponse)
    first = [next((letter for letter in record.response if letter in "aeiou"), "") for record in records]
    assert [record.correct for record in records] == [{"strict": vowel == "e", "flexible": False} for vowel in first]
    assert "e" in first
    for policy, row in json.loads((out / "metrics.json").read_text()).items():
        own = [vowel for record, vowel in zip(records, first, strict=True) if record.policy == policy]
        assert row["accuracy_strict"] == pytest.approx(own.count("e") / len(own), abs=1e-6)


def test_nothing_that_could_judge_is_an_error(nobody_rated: dict[str, Path], tmp_path: Path) -> None:
    write_rows(nobody_rated["prepare"] / "prompts" / "test.jsonl", PROMPTS)
    with pytest.raises(DataError, match=r"gold_judge is off.*only 0 of 6 held-out prompts have a right answer"):
        _run(nobody_rated, tmp_path / "out", reward=RewardParams(weights={"repetition": 1.0}))


def test_a_judge_of_pairs_joins_the_table(
    world: dict[str, Path],
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By length, of four of the six prompts; then by a judge that always says A, about which the stage warns."""
    assert (out / "judgements.jsonl").read_text() == ""
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.setenv("RLHF_ROOT", str(tmp_path))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    tables = {}
    for name, say in {"longer": longer, "first": lambda _: "A"}.items():
        with serving(say) as chat:
            params = JudgeParams(kind="endpoint", model=name, base_url=chat.url, prompts=4)
            judged = _run(world, tmp_path / name, params=PARAMS.model_copy(update={"llm_judge": params}))
        tables[name] = json.loads((judged / "policies.json").read_text())
        stderr = capfd.readouterr().err
        assert ("evaluate: warning: the judge contradicts itself" in stderr) == (name == "first")
    rows = read_rows(tmp_path / "longer" / "judgements.jsonl", Judgement)
    assert len(rows) == 3 * 4 * 2
    responses = first_draws(read_rows(out / "responses.jsonl", ScoredResponse))
    length = {(row.policy, row.prompt_id): len(row.response.strip()) for row in responses}
    asked = [row.prompt_id for row in responses if row.policy == "sft"][:4]
    for policy in ("ppo", "grpo", "dpo"):
        pairs = [(length[policy, prompt], length["sft", prompt]) for prompt in asked]
        expected = mean((a > b) + (a == b) / 2 for a, b in pairs)
        assert tables["longer"][policy]["win_rate_judge"] == expected
        assert tables["first"][policy]["win_rate_judge"] == 0.5
    metrics = json.loads((tmp_path / "first" / "metrics.json").read_text())
    assert metrics["ppo"]["judge_first"] == 1.0
    assert "win_rate_judge" not in metrics["sft"]


def test_another_seed_gives_other_responses_to_the_same_prompt(world: dict[str, Path], tmp_path: Path) -> None:
    """One prompt alone, so that the order of prompts, which follows from the seed too, cannot matter."""
    write_rows(tmp_path / "prepare" / "prompts" / "test.jsonl", PROMPTS[:1])
    alone = world | {"prepare": tmp_path / "prepare"}
    params = PARAMS.model_copy(update={"prompts": 1})
    runs = [_run(alone, tmp_path / str(seed), seed, params) / "responses.jsonl" for seed in (0, 1)]
    first, second = ([record.response for record in read_rows(path, ScoredResponse)] for path in runs)
    assert first != second


def test_prompts_are_a_seeded_choice_of_those_there_are(world: dict[str, Path]) -> None:
    path = world["prepare"] / "prompts" / "test.jsonl"
    first = [row.id for row in sample_prompts(path, 7, 0)]
    assert sorted(first) == [row.id for row in PROMPTS]
    assert first == [row.id for row in sample_prompts(path, 7, 0)]
    assert first[:3] == [row.id for row in sample_prompts(path, 3, 0)]
    assert any(first != [row.id for row in sample_prompts(path, 7, seed)] for seed in (1, 2))
    with pytest.raises(DataError, match=r"test\.jsonl holds 7 prompts, evaluate\.prompts asks for 8; lower it to 7"):
        sample_prompts(path, 8, 0)


def test_where_answers_are_tests_the_truth_is_whether_programs_pass(tmp_path: Path) -> None:
    sandbox_or_skip(CodeRule())
    prompt = Prompt(id="1", prompt="def add_3(x):\n", answer="assert add_3(1) == 4")
    params = RewardParams(weights={"code": 1.0}, rules={"code": {"program": "completion"}})
    responses = ["    return x + 3", "    return x"]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / DISABLED_MARKER).touch()
    gold = load_gold_reward([prompt], tmp_path, tmp_path, params.rules["code"])
    answers = [SampledResponse("sft", prompt, response, 4, True, 0.0, 0.0) for response in responses]
    judged = score_responses(answers, build_reward(params, [prompt], None), gold, vader=False, accuracy=False)
    assert [(row.gold, row.correct) for row in judged] == [(1, None), (0, None)]


def test_without_a_reward_only_the_judges_score() -> None:
    prompt = Prompt(id="1", prompt="hello")
    answers = [SampledResponse("champion", prompt, " yes", 1, True, 0.0, 0.0, environment_reward=0.5)]
    (scored,) = score_responses(answers, None, None, vader=False)
    assert (scored.gold, scored.rewards) == (0.5, {})
    assert math.isnan(scored.proxy)


def test_the_champion_answers_the_same_prompts(
    world: dict[str, Path], out: Path, records: list[ScoredResponse], tmp_path: Path
) -> None:
    """PPO against GRPO as champion, all pairs of draws of a prompt: GRPO's new answers, scored by themselves."""
    for part, folder in {**world, "evaluate": out}.items():
        shutil.copytree(folder, tmp_path / part)
    found = compare_with_champion(
        "ppo", PARAMS, GENERATION, 0, metrics=METRICS, artifacts=tmp_path, champion=tmp_path, champion_policy="grpo"
    )
    prompts = sample_prompts(world["prepare"] / "prompts" / "test.jsonl", 6, 0)
    beside = partial(load_beside, world["base_model"], world["sft"])
    tokenizer = load_tokenizer(world["base_model"])
    sampler = PolicySampler(tokenizer, prompts, GENERATION, batch_size=4, seed=0, load_beside=beside)
    champion = load_policy(world["base_model"], world["sft"], world["grpo"])
    answers = sampler.sample("champion", champion, samples_per_prompt=2)
    gold = load_gold_judge(world["base_model"], world["gold_judge"])
    theirs = [(answer, gold([answer.prompt.prompt], [answer.response]).item()) for answer in answers]
    pairs = [(a, b, score) for a in by_policy(records)["ppo"] for b, score in theirs if a.prompt_id == b.prompt.id]
    assert len(pairs) == 6 * 2 * 2
    expected = {
        "win_rate": mean(0.5 if abs(a.gold - score) < 1e-5 else float(a.gold > score) for a, b, score in pairs),
        "reward_gold": mean(a.gold - score for a, b, score in pairs),
        "repetition": mean(repetition_rate(a.response) - repetition_rate(b.response) for a, b, _ in pairs),
        "truncated_share": mean((not a.ended) - (not b.ended) for a, b, _ in pairs),
        "kl": mean((a.kl or 0) - (b.kl or 0) for a, b, _ in pairs),
    }
    assert {name: found[name].mean for name in expected} == pytest.approx(expected, abs=1e-5)
    assert all(interval.low <= interval.mean <= interval.high for interval in found.values())
    own = [record.response for record in by_policy(records)["grpo"]]
    assert own != [answer.response for answer in answers], "random numbers of its own"
