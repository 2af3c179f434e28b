"""The sampler of vLLM servers against a stub that speaks their protocol, with plants that it must notice."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tasks.config.rl import RolloutParams
from tasks.config.training import GenerationParams, LoraParams
from tasks.core.errors import ConfigError, ModelError, SourceError, TrainingError
from tasks.core.paths import Artifacts
from tasks.models.loading import ADAPTER_DIR, save_weights
from tasks.rl import vllm_engine, vllm_server
from tasks.rl.policy import Policy
from tasks.rl.rollout import BatchRows
from tasks.rl.vllm_engine import VLLMSampler, open_sampler, sum_adapters
from tests.conftest import tiny_model
from tests.support.tiny_trainer import GRPO_PARAMS, PARAMS, NumberTokenizer, low_tokens, trainer_of
from tests.support.vllm_stub import serving

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
MODULES = ["q_proj", "v_proj", "down_proj"]
GENERATION = GenerationParams(max_new_tokens=8, temperature=0.7)
VLLM = RolloutParams.model_validate({"engine": "vllm"})


def with_adapter(model, r: int, seed: int, *, modules=MODULES) -> PeftModel:
    """The model with an adapter that changes something."""
    policy = get_peft_model(model, LoraConfig(r=r, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return policy.eval()


@pytest.fixture
def sft(tmp_path) -> Path:
    """Folder of the SFT stage of the tiny model."""
    save_weights(with_adapter(tiny_model(), 4, 1), tmp_path / "sft")
    return tmp_path / "sft"


@pytest.fixture
def policy(sft) -> Policy:
    """A policy on the tiny model with its SFT adapter merged, and a value head that is not 0."""
    reference = PeftModel.from_pretrained(tiny_model(), sft / ADAPTER_DIR).merge_and_unload()
    found = Policy(with_adapter(reference, 2, 2), temperature=GENERATION.temperature)
    torch.nn.init.ones_(found.value_head.weight)
    return found


@pytest.fixture
def stub():
    with serving(tiny_model()) as found:
        yield found


@pytest.fixture
def sampler(policy, sft, stub, tmp_path) -> Iterator[VLLMSampler]:
    with sampler_of(policy, sft, tmp_path / "adapters", [stub.url]) as found:
        yield found


@contextmanager
def sampler_of(policy, sft, folder, urls):
    servers = [vllm_server.VLLMServer(url) for url in urls]
    found = VLLMSampler(
        policy, NumberTokenizer(), GENERATION, VLLM, servers, sft=sft, folder=folder, micro_batch_size=4
    )
    found.update_weights()
    yield found
    for server in servers:
        server.close()


def sample(sampler, *, seed=0, **options):
    return sampler.sample(PROMPTS, torch.Generator().manual_seed(seed), **options)


def prompts_asked(stub) -> list[list[int]]:
    """In order of their ids; they arrive at once."""
    return sorted(request["prompt"] for request in stub.requests)


@torch.no_grad()
def test_the_sum_of_two_adapters_is_the_policy_on_the_merged_model(policy, sft, tmp_path):
    save_weights(policy.model, tmp_path)
    sum_adapters([sft / ADAPTER_DIR, tmp_path / ADAPTER_DIR], tmp_path / "sum")
    summed, ids = PeftModel.from_pretrained(tiny_model(), tmp_path / "sum"), torch.tensor([[5, 6, 7, 20, 3]])
    assert summed.peft_config["default"].r == 6
    torch.testing.assert_close(summed(ids).logits, policy.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(summed(ids).logits, tiny_model()(ids).logits, atol=0.1)


def test_adapters_of_different_modules_have_no_sum(sft, tmp_path):
    save_weights(with_adapter(tiny_model(), 4, 1, modules=["q_proj"]), tmp_path)
    with pytest.raises(ModelError, match="adapt different modules: run sft again"):
        sum_adapters([sft / ADAPTER_DIR, tmp_path / ADAPTER_DIR], tmp_path / "sum")


@torch.no_grad()
def test_the_rollout_has_the_log_probabilities_and_values_of_the_trainers_model(sampler, policy, stub):
    rollout = sample(sampler, samples_per_prompt=2)
    assert prompts_asked(stub) == sorted(prompt for prompt in PROMPTS for _ in range(2))
    assert rollout.responses.shape[0] == 6
    lengths = rollout.response_mask.sum(1).tolist()
    assert len(set(lengths)) > 1, "the test needs responses of several lengths"
    for row, length in enumerate(lengths):
        prompt, response = PROMPTS[row // 2], rollout.responses[row, :length]
        out = policy.model(torch.cat([torch.tensor(prompt), response])[None], output_hidden_states=True)
        states = out.hidden_states[-1][0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(out.logits[0, len(prompt) - 1 : -1] / GENERATION.temperature, -1)
        expected = logprobs.gather(1, response[:, None]).squeeze(1)
        torch.testing.assert_close(rollout.logprobs[row, :length], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rollout.engine_logprobs[row, :length], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rollout.values[row, :length], states.sum(-1), rtol=1e-4, atol=1e-4)
        assert not rollout.logprobs[row, length:].any()
        assert not rollout.values[row, length:].any()


def test_a_response_depends_on_its_own_row_alone(sampler):
    whole = sample(sampler, samples_per_prompt=2)
    last = sampler.sample(
        PROMPTS[2:], torch.Generator().manual_seed(0), samples_per_prompt=2, batch_rows=BatchRows([4, 5], 6)
    )
    assert last.texts == whole.texts[4:]
    assert whole.texts[4] != whole.texts[5], "two samples of a prompt have seeds of their own"
    assert sample(sampler, seed=1, samples_per_prompt=2).texts != whole.texts


def test_prompts_are_shared_out_over_the_servers(policy, sft, stub, tmp_path):
    with serving(tiny_model()) as other, sampler_of(policy, sft, tmp_path, [stub.url, other.url]) as sampler:
        sample(sampler, samples_per_prompt=2)
    assert prompts_asked(stub) == [PROMPTS[0]] * 2 + [PROMPTS[2]] * 2
    assert prompts_asked(other) == [PROMPTS[1]] * 2


def test_each_update_has_a_name_of_its_own_and_the_one_before_goes(sampler, policy, stub, tmp_path):
    sample(sampler)
    sampler.update_weights()
    sample(sampler)
    first, second = stub.loaded
    assert first != second
    assert stub.unloaded == [first]
    assert [request["model"] for request in stub.requests] == [first] * 3 + [second] * 3
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [ADAPTER_DIR, second]


def test_two_samplers_share_a_server(sampler, policy, sft, stub, tmp_path):
    with sampler_of(policy, sft, tmp_path / "other", [stub.url]) as other:
        assert len(set(stub.loaded)) == 2
        assert sample(other).texts == sample(sampler).texts


def test_a_stale_adapter_is_a_mismatch(sampler, policy, stub):
    stub.stale = True
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.2
    sampler.update_weights()
    with pytest.raises(TrainingError, match="does not sample from the policy that is trained"):
        sample(sampler)


@pytest.mark.parametrize("plant", [{"temperature_factor": 1.5}, {"shift": 1}])
def test_another_temperature_or_position_is_a_mismatch(sampler, stub, plant):
    for name, value in plant.items():
        setattr(stub, name, value)
    with pytest.raises(TrainingError, match=r"KL .* nats per token, limit rollout.max_mismatch_kl 0.01"):
        sample(sampler)


@pytest.mark.parametrize("params", [PARAMS, GRPO_PARAMS])
def test_training_with_an_engine_that_agrees(sampler, policy, stub, params):
    trainer = trainer_of(params.model_copy(update={"updates": 2}), policy.model, low_tokens, generation=GENERATION)
    trainer.sampler, trainer.rollout_params = sampler, VLLM
    sampler._policy = trainer.policy
    trainer.train()
    assert len(stub.loaded) == 3, "once before training, and once an update"
    rows = trainer.history
    assert all(0 <= row["mismatch/kl"] < 1e-6 and row["mismatch/clipped_share"] == 0 for row in rows)
    assert all(row["mismatch/max"] < 1e-3 for row in rows)


@pytest.mark.parametrize("params", [PARAMS, GRPO_PARAMS])
def test_importance_weights_scale_the_advantages(sampler, policy, params):
    trainer = trainer_of(params, policy.model, low_tokens, generation=GENERATION)
    trainer.sampler, trainer.rollout_params = sampler, VLLM
    sampler._policy = trainer.policy
    scored = trainer.score(trainer.sample())
    plain, _ = trainer.algorithm.compute_advantages(scored)
    halved = replace(
        scored, rollout=replace(scored.rollout, engine_logprobs=scored.rollout.logprobs + torch.tensor(2.0).log())
    )
    weighted, _ = trainer.algorithm.compute_advantages(halved)
    torch.testing.assert_close(weighted.advantages, plain.advantages / 2, rtol=1e-4, atol=1e-6)
    assert weighted.advantages.any()


def test_a_server_of_ours_that_ends_is_started_again(sampler, stub, monkeypatch):
    expected = sample(sampler).texts
    restarted = []

    def restart(server) -> bool:
        restarted.append(server)
        stub.loaded.clear()
        stub.model = tiny_model()
        return True

    monkeypatch.setattr(vllm_server.VLLMServer, "restart", restart)
    stub.fails = 2
    assert sample(sampler).texts == expected
    assert len(restarted) == 1
    stub.fails = 10
    with pytest.raises(SourceError, match="HTTP 500"):
        sample(sampler)


def test_a_server_of_others_that_fails_is_an_error(sampler, stub):
    stub.fails = 1
    with pytest.raises(SourceError, match=r"refuses /v1/completions \(HTTP 500\): .*engine dead"):
        sample(sampler)


def test_a_server_that_returns_no_token_ids_is_named(sampler, stub):
    stub.plain = True
    with pytest.raises(SourceError, match="does not answer with token ids and log-probabilities: it is no vLLM server"):
        sample(sampler)


def open_with(policy, tmp_path, *, r=4, params=VLLM):
    lora = LoraParams(r=r, alpha=8, target_modules=tuple(MODULES), reward_model_modules=tuple(MODULES))
    artifacts = Artifacts(out=tmp_path / "out", base_model=tmp_path / "base_model", sft=tmp_path / "sft")
    return open_sampler(policy, NumberTokenizer(), GENERATION, params, lora, artifacts, micro_batch_size=4)


def test_servers_that_run_are_named_by_the_environment(policy, sft, stub, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_ROLLOUT_URLS", f"{stub.url}, {stub.url}/")
    monkeypatch.setattr(vllm_engine, "PROBE", "5 6")
    with open_with(policy, tmp_path) as sampler:
        assert [request["prompt"] for request in stub.requests] == [[5, 6]]
        sample(sampler)
    assert stub.unloaded == stub.loaded


@pytest.mark.parametrize(
    ("urls", "error", "message"),
    [
        ("127.0.0.1:8000", ConfigError, "'127.0.0.1:8000' is no address like http://127.0.0.1:8000"),
        ("http://127.0.0.1:9", SourceError, "http://127.0.0.1:9 does not answer: start it, or remove it there"),
    ],
)
def test_a_wrong_address_is_found_before_training(policy, tmp_path, monkeypatch, urls, error, message):
    monkeypatch.setenv("RLHF_ROLLOUT_URLS", urls)
    with pytest.raises(error, match=message), open_with(policy, tmp_path):
        pass


def test_vllm_that_is_not_installed(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_VLLM", str(tmp_path / "vllm"))
    monkeypatch.delenv("RLHF_ROLLOUT_URLS", raising=False)
    with pytest.raises(ConfigError, match=r"there is no .*vllm: `make vllm` installs it"), open_with(policy, tmp_path):
        pass


def test_a_rank_that_vllm_does_not_take(policy, tmp_path, monkeypatch):
    monkeypatch.delenv("RLHF_ROLLOUT_URLS", raising=False)
    with (
        pytest.raises(ConfigError, match=r"lora\.r is 300; .* at most 512 for vllm"),
        open_with(policy, tmp_path, r=300),
    ):
        pass


SERVER = """#!{python}
import http.server, subprocess, sys
sys.stdout.write(" ".join(sys.argv[1:]) + "\\n")
sys.stdout.flush()
if {fails}:
    sys.exit("no memory left")
port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def own_server(tmp_path, monkeypatch, *, fails: bool):
    program = tmp_path / "vllm"
    program.write_text(SERVER.format(python=sys.executable, fails=fails))
    program.chmod(0o755)
    monkeypatch.setenv("RLHF_VLLM", str(program))
    monkeypatch.setenv("RLHF_VLLM_ARGS", "--gpu-memory-utilization 0.4")
    return vllm_server.OwnServer(
        tmp_path / "model", dtype="float32", max_lora_rank=32, log=tmp_path / "logs" / "vllm.log"
    )


def test_a_server_of_ours_starts_and_ends_with_us(tmp_path, monkeypatch):
    server = own_server(tmp_path, monkeypatch, fails=False)
    process = server._process
    assert server.is_up()
    monkeypatch.setattr(vllm_server, "GRACE_SECONDS", 0.1)
    assert not server.restart(), "it runs"
    monkeypatch.undo()
    line = (tmp_path / "logs" / "vllm.log").read_text().splitlines()[0]
    assert line.startswith(f"serve {tmp_path / 'model'} --host 127.0.0.1 --port ")
    assert "--dtype float32 --enable-lora --max-lora-rank 32" in line
    assert line.endswith("--generation-config vllm --gpu-memory-utilization 0.4")
    process.kill()
    assert server.restart()
    assert server.is_up()
    again = server._process
    server.close()
    assert again.poll() is not None
    children = re.findall(r"child (\d+)", (tmp_path / "logs" / "vllm.log").read_text())
    assert len(children) == 2
    left = [psutil.Process(int(pid)) for pid in children if psutil.pid_exists(int(pid))]
    _, alive = psutil.wait_procs(left, timeout=30)
    assert alive == [], "the processes of a server end with it, killed or not"


def test_a_server_that_ends_at_once_shows_the_end_of_its_log(tmp_path, monkeypatch):
    with pytest.raises(SourceError, match=r"ended with status 1; see .*vllm.log\n.*serve(.|\n)*no memory left"):
        own_server(tmp_path, monkeypatch, fails=True)
