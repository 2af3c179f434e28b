"""The decode loop against plain forward passes of the same model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tasks.config.training import GenerationParams
from tasks.core.rows import Prompt
from tasks.rl.rollout import BatchRows, LocalSampler, Rollout, derive_generator, extend_generator
from tests.conftest import tiny_policy
from tests.support.tiny_trainer import NumberTokenizer

PAD, EOS = 0, 1
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
HALVES = [[[5, 6, 7], [8]], [[9, 10, 11, 12, 13], [5, 6, 7]]]


def sample(
    model, prompts=PROMPTS, *, seed=0, max_new_tokens=12, temperature=1.0, value_head=None, **options
) -> Rollout:
    generation = GenerationParams(max_new_tokens=max_new_tokens, temperature=temperature)
    sampler = LocalSampler(model, NumberTokenizer(), generation, value_head)
    return sampler.sample(prompts, torch.Generator().manual_seed(seed), **options)


def fresh_logprobs(model, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """One row, no padding, no cache: what the log-probabilities are by definition."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_fresh_forward_pass(model, temperature):
    rollout = sample(model, samples_per_prompt=4, temperature=temperature)
    assert rollout.has_eos.any(), "the check should cover rows that left the batch early"
    assert not rollout.has_eos.all()
    for row in range(len(rollout.responses)):
        length = int(rollout.response_mask[row].sum())
        response = rollout.responses[row, :length].tolist()
        expected = fresh_logprobs(model, PROMPTS[row // 4], response, temperature)
        torch.testing.assert_close(rollout.logprobs[row, :length], expected, rtol=1e-5, atol=1e-5)


def test_logprobs_equal_a_fresh_forward_pass_with_an_adapter():
    """On the path that merges the adapter, with rows that change places as others end."""
    policy = tiny_policy()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    rollout = sample(policy, PROMPTS * 4, samples_per_prompt=2, temperature=0.7)
    assert 3 < rollout.has_eos.sum() < 24
    for row in range(len(rollout.responses)):
        length = int(rollout.response_mask[row].sum())
        response = rollout.responses[row, :length].tolist()
        expected = fresh_logprobs(policy, (PROMPTS * 4)[row // 2], response, 0.7)
        torch.testing.assert_close(rollout.logprobs[row, :length], expected, rtol=1e-4, atol=1e-5)


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
