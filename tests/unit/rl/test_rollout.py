"""The decode loop against plain forward passes of the same model, and sampling of a policy of the artifacts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tasks.config.training import GenerationParams
from tasks.core.errors import ConfigError
from tasks.core.rows import Prompt
from tasks.models.loading import policy_stages
from tasks.rl.rollout import (
    BatchRows,
    LocalSampler,
    derive_generator,
    extend_generator,
    load_sampler,
    sample_in_batches,
)
from tests.conftest import letter_tokenizer
from tests.support.tiny_stages import write_parts
from tests.support.tiny_trainer import NumberTokenizer, moved_policy

PAD, EOS = 0, 1
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
HALVES = [[[5, 6, 7], [8]], [[9, 10, 11, 12, 13], [5, 6, 7]]]


def sample(model, prompts=PROMPTS, *, seed=0, max_new_tokens=12, temperature=1.0, value_head=None, **options):
    generation = GenerationParams(max_new_tokens=max_new_tokens, temperature=temperature)
    sampler = LocalSampler(model, NumberTokenizer(), generation, value_head)
    return sampler.sample(prompts, torch.Generator().manual_seed(seed), **options)


def fresh_logprobs(model, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """One row, no padding, no cache: what the log-probabilities are by definition."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize(
    ("adapter", "temperature", "rtol"), [(False, 1.0, 1e-5), (False, 0.7, 1e-5), (True, 0.7, 1e-4)]
)
def test_logprobs_equal_a_fresh_forward_pass(model, adapter, temperature, rtol):
    """On the path that merges the adapter too, with rows that change places as others end."""
    model = moved_policy() if adapter else model
    rollout = sample(model, PROMPTS * 4, samples_per_prompt=2, temperature=temperature)
    assert 3 < rollout.has_eos.sum() < 24, "the check should cover rows that left the batch early, and others"
    for row in range(len(rollout.responses)):
        length = int(rollout.response_mask[row].sum())
        response = rollout.responses[row, :length].tolist()
        expected = fresh_logprobs(model, (PROMPTS * 4)[row // 2], response, temperature)
        torch.testing.assert_close(rollout.logprobs[row, :length], expected, rtol=rtol, atol=1e-5)


def test_the_parts_of_a_batch_are_sampled_as_the_whole(model):
    """Two processes that share a batch write what one would."""
    whole = sample(model, PROMPTS + PROMPTS[:1], samples_per_prompt=2)
    rows = [BatchRows(range(4), 8), BatchRows(range(4, 8), 8)]
    halves = [sample(model, part, samples_per_prompt=2, batch_rows=own) for part, own in zip(HALVES, rows, strict=True)]
    for name in ("responses", "response_mask", "logprobs"):
        expected = getattr(whole, name)
        got = torch.cat([F.pad(getattr(half, name), (0, 12 - getattr(half, name).shape[1])) for half in halves])
        torch.testing.assert_close(got[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)


def test_response_ends_at_its_end_token_and_is_padded_after_it(model):
    rollout = sample(model, PROMPTS * 8)
    for tokens, mask, ended in zip(rollout.responses, rollout.response_mask, rollout.has_eos, strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert (tokens[length:] == PAD).all()
        assert (tokens[: length - 1] != EOS).all()
        assert (tokens[length - 1] == EOS) == bool(ended)
        assert ended or length == 12, "a row was dropped before its end"
    lengths = [len(text.split()) for text in rollout.texts]
    assert lengths == (rollout.response_mask.sum(1) - rollout.has_eos.long()).tolist(), "the end token is no text"


def test_prompts_are_rows_texts_or_token_ids(model):
    texts = [" ".join(map(str, ids)) for ids in PROMPTS]
    by_ids, by_text = sample(model, samples_per_prompt=2), sample(model, texts, samples_per_prompt=2)
    by_row = sample(model, [Prompt(id=text, prompt=text) for text in texts], samples_per_prompt=2)
    for rollout in (by_ids, by_text, by_row):
        assert torch.equal(rollout.responses, by_ids.responses)
        assert rollout.prompt_texts == [text for text in texts for _ in range(2)]
        assert rollout.texts == by_ids.texts
        assert rollout.values is None


def test_a_generator_derived_in_two_steps_is_that_of_all_parts():
    whole, steps = derive_generator(5, 0, 7), extend_generator(derive_generator(5, 0), 7)
    assert whole.initial_seed() == steps.initial_seed() != derive_generator(5, 7, 0).initial_seed()


def test_same_seed_same_rollout_and_another_seed_another(model):
    first, again, other = sample(model), sample(model), sample(model, seed=1)
    assert torch.equal(first.responses, again.responses)
    assert torch.equal(first.logprobs, again.logprobs)
    assert not torch.equal(first.responses, other.responses)


def test_sampling_follows_the_distribution(model):
    """4,000 first tokens against the exact probabilities: total variation below 0.05 (expected about 0.03)."""
    rollout = sample(model, [[5, 6, 7]], samples_per_prompt=4000, max_new_tokens=1)
    exact = torch.softmax(model(torch.tensor([[5, 6, 7]])).logits[0, -1], -1)
    observed = torch.bincount(rollout.responses[:, 0], minlength=len(exact)) / 4000
    assert (observed - exact).abs().sum() / 2 < 0.05


def test_values_are_the_head_on_the_state_that_chose_the_token(model):
    torch.manual_seed(3)
    head = torch.nn.Linear(32, 1)
    rollout = sample(model, [PROMPTS[2]], value_head=head)
    length = int(rollout.response_mask.sum())
    ids = torch.tensor([PROMPTS[2] + rollout.responses[0, :length].tolist()])
    states = model(ids, output_hidden_states=True).hidden_states[-1][0, 4 : 4 + length]
    torch.testing.assert_close(rollout.values[0, :length], head(states).squeeze(-1), rtol=1e-5, atol=1e-5)


# -- a policy of the artifacts -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def samples(
    parts: Path, prompts: list[str], count: int, *, policy: str = "ppo", length: int = 6, chat: bool = False
) -> list[tuple[str, str, bool]]:
    """Prompt, response and whether it ended, for each sample; in batches of 3 prompts."""
    generation = GenerationParams(max_new_tokens=length, temperature=1.0)
    sampler, generator = load_sampler(parts, policy, generation, chat_template=chat), torch.Generator().manual_seed(0)
    rollouts = sample_in_batches(sampler, prompts, generator, samples_per_prompt=count, batch_size=3)
    return [row for r in rollouts for row in zip(r.prompt_texts, r.texts, r.has_eos.tolist(), strict=True)]


def test_each_prompt_gets_its_samples_in_order_and_batches_differ(parts: Path) -> None:
    prompts = list("abcabcab")
    found = samples(parts, prompts, 2)
    assert [prompt for prompt, _, _ in found] == [prompt for prompt in prompts for _ in range(2)]
    assert found == samples(parts, prompts, 2)
    assert found[:6] != found[6:12], "a second batch must not repeat the first"


def test_has_eos_separates_an_end_token_from_a_cut(parts: Path) -> None:
    assert {ended for _, _, ended in samples(parts, ["a"], 40, length=40)} == {True, False}


def test_the_reference_is_sampled_without_the_policys_adapter(parts: Path) -> None:
    assert samples(parts, ["ab"], 8, policy="sft") != samples(parts, ["ab"], 8)


def test_an_empty_prompt_is_refused(parts: Path) -> None:
    with pytest.raises(ConfigError, match="prompt '' is empty"):
        samples(parts, [""], 1)


def test_a_chat_template_is_used_where_there_is_one(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer has no chat template: leave --chat-template out"):
        samples(parts, ["a"], 1, chat=True)
    shutil.copytree(parts, tmp_path / "parts")
    tokenizer, end = letter_tokenizer(), "{% if add_generation_prompt %}z{% endif %}"
    tokenizer.chat_template = "{{ messages[0].role }}{{ messages[0].content }}" + end
    tokenizer.save_pretrained(tmp_path / "parts" / "base_model" / "model")
    by_template, by_hand = samples(tmp_path / "parts", ["ab"], 8, chat=True), samples(parts, ["userabz"], 8)
    assert [text for _, text, _ in by_template] == [text for _, text, _ in by_hand]
    assert by_template[0][0] == "ab"


def test_stages_that_score_are_no_policies(tmp_path: Path) -> None:
    for stage, kind in {"sft": "CAUSAL_LM", "reward_model": "SEQ_CLS"}.items():
        (tmp_path / stage / "adapter").mkdir(parents=True)
        (tmp_path / stage / "adapter" / "adapter_config.json").write_text(json.dumps({"task_type": kind}))
    (tmp_path / "dpo" / "adapter").mkdir(parents=True)
    (tmp_path / "dpo" / "adapter" / "OFF").touch()
    assert policy_stages(tmp_path) == ["sft"]
