"""What a model is trained on is what it reads while it samples, in every preset, whatever the tokenizer merges."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tasks.collect import collect
from tasks.config.params import Params, load_params, load_preset, write_overrides
from tasks.core.paths import Artifacts
from tasks.core.rows import Demonstration, Preference, Prompt, read_rows
from tasks.dpo import _fit_pairs
from tasks.prepare import prepare
from tasks.rewards.scorers import TextScorer
from tasks.rewards.training import TrainingData
from tasks.rl.multi_turn import ENVIRONMENTS, _Episode
from tasks.rl.rollout import PromptBatch, Sampler
from tasks.sft import _dataset
from tests.conftest import SHIPPED_PARAMS
from tests.support.tokenizers import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
PRESETS = sorted(path.stem for path in (ROOT / "infra" / "presets").glob("*.yaml"))
HUB = {"Anthropic/hh-rlhf": DATA / "hh-harmless" / "pairs.jsonl.gz", "openai/gsm8k": DATA / "gsm8k" / "train.jsonl.gz"}
ROWS = 60
PAIRS = [
    {"prompt": "Say it:\n", "chosen": "  It is so.", "rejected": "  No."},
    {"prompt": "The film", "chosen": " is good.", "rejected": " is not."},
]
END = "<end>"


def offline(source: dict[str, Any]) -> dict[str, Any]:
    """The source, or for one that needs a network a file of the same columns."""
    source = {**source, "limit": ROWS}
    if source["kind"] == "film_reviews":
        return source | {"kind": "local", "id": str(ROOT / "infra" / "presets" / "tiny.jsonl"), "sha256": ""}
    if source["kind"] == "hub":
        if not (file := HUB[source["id"]]).is_file():
            pytest.skip(f"no {file} on this machine")
        return source | {"kind": "local", "id": str(file)}
    return source


@dataclass
class Prepared:
    """A preset's parameters and prepared rows, and a tokenizer made from them."""

    params: Params
    folder: Path
    demonstrations: list[Demonstration]
    pairs: list[Preference]
    tokenizer: Any


@pytest.fixture(params=["", *PRESETS])
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> Prepared:
    path = Path(shutil.copy(SHIPPED_PARAMS, tmp_path))
    write_overrides(path, [load_preset(ROOT, request.param)] if request.param else [])
    sources = [offline(source.model_dump()) for source in load_params(path).collect.sources]
    write_overrides(
        path,
        [
            {
                "collect": {"sources": sources},
                "prepare": {"min_words": 4, "test_share": 0.1},
                "sft": {"max_length": "auto"},
            }
        ],
    )
    params, folder = load_params(path), tmp_path / "prepare"
    collect(params.collect, 0, Artifacts(out=tmp_path / "collect"))
    base_model = write_tokenizer(tmp_path / "base_model")
    prepare(params.prepare, 0, Artifacts(base_model=base_model, collect=tmp_path / "collect", out=folder))
    demonstrations = read_rows(folder / "demonstrations" / "train.jsonl", Demonstration)[:ROWS]
    file = folder / "preferences" / "train.jsonl"
    made_up = [Preference(id=str(number), **pair) for number, pair in enumerate(PAIRS)]
    pairs = read_rows(file, Preference) if file.stat().st_size else made_up
    texts = [row.prompt + row.response for row in demonstrations] + [row.prompt + row.chosen for row in pairs]
    return Prepared(params, folder, demonstrations, pairs, merging_tokenizer(texts))


def merging_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte pairs that merge across words, line breaks and any other boundary, and so across a prompt's end."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=["<pad>", END], initial_alphabet=alphabet,
                                   show_progress=False, max_token_length=6),
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token=END)


def sampler_ids(rows: Prepared, prompt: str) -> list[int]:
    """The ids of a prompt as a sampler reads it."""
    sampler = Sampler(None, rows.tokenizer, rows.params.generation)
    return PromptBatch.encode([prompt], rows.tokenizer, 1, sampler._encode).token_ids[0]


def sampled_prompt(rows: Prepared, demonstration: Demonstration) -> list[int]:
    """The ids from which a policy samples a response to this demonstration's prompt."""
    if rows.params.environment is None:
        return sampler_ids(rows, demonstration.prompt)
    fields = {name: getattr(demonstration, name) for name in ("id", "prompt", "answer")}
    environment = ENVIRONMENTS[rows.params.environment.kind]()
    return _Episode(environment, Prompt(**fields), rows.tokenizer).prompt_ids


def test_sft_learns_responses_in_the_context_from_which_they_are_sampled(prepared: Prepared) -> None:
    """Where the tokenizer would merge across the prompt's end, too."""
    tokenizer, dialogues = prepared.tokenizer, prepared.params.environment is not None
    path = prepared.folder / "demonstrations" / "train.jsonl"
    columns, counts = _dataset(prepared.params.sft, tokenizer, path, ROWS, context=None, dialogues=dialogues)
    assert len(columns) == counts["rows/kept"] == len(prepared.demonstrations)
    merged = 0
    for row, demonstration in zip(columns, prepared.demonstrations, strict=True):
        context = row["input_ids"][: row["completion_mask"].index(1)]
        assert context == sampled_prompt(prepared, demonstration)
        assert row["input_ids"][-1] == tokenizer.eos_token_id
        written = [token for token in row["input_ids"] if token != tokenizer.eos_token_id]
        assert tokenizer.decode(written) == demonstration.prompt + demonstration.response
        merged += row["input_ids"][:-1] != tokenizer(demonstration.prompt + demonstration.response).input_ids
    assert merged, "no row merges across its prompt's end, so this test shows nothing"


def test_pairs_are_learned_in_the_context_from_which_responses_are_sampled(prepared: Prepared) -> None:
    """By DPO and by the reward model, which then reads a sampled response alike."""
    tokenizer = prepared.tokenizer
    fits = SimpleNamespace(max_length="auto", max_cut_share=0.0)
    columns, _ = _fit_pairs(cast(Any, fits), prepared.pairs, tokenizer, None)
    data, _ = TrainingData({"train": prepared.pairs}).fit(
        tokenizer, cast(Any, fits), section="reward_model", context=None
    )
    scorer = TextScorer(SimpleNamespace(config=LlamaConfig(max_position_embeddings=4096)), tokenizer)
    for row, encoded, pair in zip(columns, data.encoded["train"], data.pairs["train"], strict=True):
        prompt = sampler_ids(prepared, pair.prompt)
        assert row["prompt_ids"] == encoded.prompt == prompt
        for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            response = [*tokenizer(side).input_ids, tokenizer.eos_token_id]
            assert row[f"{name}_ids"] == response
            assert scorer._encode(pair.prompt, side) == prompt + response
