"""The engine generates what the sampler of training would, whoever else is served at the time."""

import queue

import pytest
import torch
from torch import Tensor

from tasks.config.rl import RolloutParams
from tasks.config.training import GenerationParams
from tasks.core.errors import TrainingError
from tasks.rl.rollout import LocalSampler
from tasks.serving import engine as engine_module
from tasks.serving.engine import Engine, Job, OverloadError, Token
from tasks.serving.versions import serve_policy
from tests.conftest import EOS, letter_tokenizer, tiny_model, tiny_policy

PROMPTS = [[3, 4, 5], [9], [7, 8, 6, 5, 4, 3, 2]]


def generate(engine: Engine, jobs: list[Job]) -> list[list[Token]]:
    """Submit all jobs and wait for their ends."""
    found: list[queue.SimpleQueue[Token | Exception]] = [queue.SimpleQueue() for _ in jobs]
    for job, tokens in zip(jobs, found, strict=True):
        job.emit = tokens.put
        engine.submit(job)
    answers: list[list[Token]] = []
    for tokens in found:
        answer: list[Token] = []
        while not answer or answer[-1].finish is None:
            token = tokens.get(timeout=60)
            assert isinstance(token, Token), token
            answer.append(token)
        answers.append(answer)
    return answers


def job(ids: list[int], *, seed: int = 0, temperature: float = 0.7, length: int = 8) -> Job:
    return Job(ids, length, temperature, seed, lambda _: None)


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny_model(), letter_tokenizer())


def test_a_seed_gives_what_the_sampler_of_training_gives(engine: Engine) -> None:
    sampler = LocalSampler(tiny_model(), letter_tokenizer(), GenerationParams(max_new_tokens=8, temperature=0.7))
    answers = generate(engine, [job(ids, seed=seed) for seed, ids in enumerate(PROMPTS)])
    for seed, (ids, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        expected = sampler.sample([ids], torch.Generator().manual_seed(seed))
        assert [token.id for token in answer] == expected.responses[0].tolist()
        torch.testing.assert_close(torch.tensor([token.logprob for token in answer]), expected.logprobs[0])


def test_temperature_zero_takes_the_most_probable_token(engine: Engine) -> None:
    (answer,) = generate(engine, [job(PROMPTS[0], temperature=0, length=4)])
    ids, model = list(PROMPTS[0]), tiny_model()
    for token in answer:
        logits: Tensor = model(torch.tensor([ids])).logits[0, -1]
        assert token.id == logits.argmax()
        torch.testing.assert_close(torch.tensor(token.logprob), logits.log_softmax(0).max())
        ids.append(token.id)


def test_an_answer_ends_by_the_end_token_or_its_own_length(engine: Engine) -> None:
    jobs = [job(PROMPTS[0], seed=seed, length=1 + seed % 7) for seed in range(40)]
    answers = generate(engine, jobs)
    for asked, answer in zip(jobs, answers, strict=True):
        assert all(token.finish is None for token in answer[:-1])
        assert answer[-1].finish == ("stop" if answer[-1].id == EOS else "length")
        assert len(answer) == asked.max_tokens or answer[-1].id == EOS
    assert {answer[-1].finish for answer in answers} == {"stop", "length"}


def test_a_full_queue_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_WAITING", 2)
    monkeypatch.setattr(Engine, "_run", lambda self: None)
    engine = Engine(tiny_model(), letter_tokenizer())
    for _ in range(2):
        engine.submit(job(PROMPTS[0]))
    with pytest.raises(OverloadError, match="2 requests wait already"):
        engine.submit(job(PROMPTS[0]))
    assert engine.waiting == 2


def test_an_error_reaches_whoever_waits_and_the_next_is_served(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    found: queue.SimpleQueue[Token | Exception] = queue.SimpleQueue()
    monkeypatch.setattr(engine_module, "Decoder", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
    engine.submit(Job(PROMPTS[0], 8, 1.0, 0, found.put))
    assert isinstance(found.get(timeout=60), MemoryError)
    monkeypatch.undo()
    assert generate(engine, [job(PROMPTS[0])])


def test_a_cancelled_job_ends_and_others_go_on(engine: Engine) -> None:
    first, second = job(PROMPTS[0], length=40, temperature=1.0), job(PROMPTS[1], seed=3)
    seen = 0

    def cancel(_: Token | Exception) -> None:
        nonlocal seen
        seen, first.cancelled = seen + 1, True

    first.emit = cancel
    engine.submit(first)
    alone = generate(Engine(tiny_model(), letter_tokenizer()), [job(PROMPTS[1], seed=3)])
    assert [token.id for token in generate(engine, [second])[0]] == [token.id for token in alone[0]]
    assert seen == 1


def test_a_closed_engine_finishes_what_it_was_given(engine: Engine) -> None:
    jobs = [job(PROMPTS[0], seed=seed) for seed in range(5)]
    found: queue.SimpleQueue[Token | Exception] = queue.SimpleQueue()
    for item in jobs:
        item.emit = found.put
        engine.submit(item)
    engine.close()
    ends = 0
    while ends < 5:
        token = found.get(timeout=60)
        assert isinstance(token, Token)
        ends += token.finish is not None


def test_a_policy_is_served_as_it_was_trained_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, generation = tiny_policy(), GenerationParams(max_new_tokens=8, temperature=0.7)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    params = RolloutParams.model_validate({"max_mismatch_kl": 1e-6})
    engine = serve_policy(policy, letter_tokenizer(), generation, ["abc", "de"], params)
    engine.close()

    def score_wrongly(self: Engine, ids: list[int], tokens: list[int], temperature: float) -> list[float]:
        return [-9.0] * len(tokens)

    monkeypatch.setattr(Engine, "score", score_wrongly)
    with pytest.raises(TrainingError, match="does not sample from the policy that is trained"):
        serve_policy(tiny_policy(), letter_tokenizer(), generation, ["abc", "de"], params)
