"""Model card: its facts, and Markdown with YAML front matter."""

from datetime import UTC, datetime
from typing import Any

import pytest
from ruamel.yaml import YAML

from tasks.evals.model_card import METHODS, render_model_card
from tasks.models.export import ExportCheck
from tasks.runtime.provenance import Provenance
from tasks.runtime.registry import Version

ROW = {
    "n": 208, "reward_proxy": 0.9, "reward_gold": 1.2, "kl": 3.335, "kl_stderr": 0.165, "length": 7.0,
    "truncated_share": 0.05, "win_rate": 0.79, "win_rate_low": 0.733, "win_rate_high": 0.844, "win_rate_proxy": 0.87,
    "win_rate_proxy_low": 0.82, "win_rate_proxy_high": 0.91,
}  # fmt: skip
WHEN = datetime(2026, 1, 2, tzinfo=UTC)
SECTIONS = ("sft", "lora", "reward_model", "reward", "preferences", "gold_judge", "ppo", "grpo", "dpo")


def origin(**changes: Any) -> Provenance:
    parameters: dict[str, Any] = {section: {"size": 1} for section in SECTIONS}
    parameters |= {"seed": 3, "policy_seed": 5, "generation": {"temperature": 1.0, "max_new_tokens": 20}}
    parameters["base_model"] = {"id": "owner/name"}
    sources = [
        {"name": "a", "source": "pipes | here", "licence": "MIT", "rows": 5, "sha256_of_rows": "f" * 64},
        {"name": "b", "source": "file", "licence": "", "rows": 6, "sha256_of_rows": "e" * 64},
    ]
    rule_results = [{"rule": "KL to SFT", "measured": "3.33 nats", "required": "at most 10 nats", "passed": True}]
    fields: dict[str, Any] = {
        "params": "seed: 3\n", "parameters": parameters, "commit": "c0ffee", "uncommitted": (), "pipeline_run": "r",
        "stages": {"ppo": {"key": "k" * 64, "run": "", "outputs": {"artifacts/ppo/adapter": "m5.dir"}}},
        "base_model": {"kind": "hub", "source": "the hub", "parameters": 9, "layers": 2, "vocabulary": 4},
        "sources": sources, "metrics": {"sft": ROW | {"length": 14.0}, "ppo": ROW, "dpo": ROW, "grpo": ROW},
        "rule_results": rule_results,
    }  # fmt: skip
    return Provenance.model_validate(fields | changes)


def card(made_from: Provenance | None = None, *, adapter: bool = False, policy: str = "ppo", **tags: str) -> str:
    promoted = {"promoted.by": "ann", "promoted.at": "noon", "promoted.reason": ""}
    version = Version(
        4, policy, {}, {"accepted": "True", "reasons": "it is good"} | promoted | tags, ("champion",), WHEN
    )
    return render_model_card(version, made_from or origin(), ExportCheck("float32", 2e-4, 34.7), adapter=adapter)


def front(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    fields: dict[str, Any] = YAML(typ="safe").load(head)
    return fields


def test_the_front_matter_is_what_the_hub_reads() -> None:
    assert front(card()) == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", "ppo"],
        "base_model": "owner/name",
    }
    text = card(origin(base_model=origin().base_model | {"kind": "pypi", "licence": "Apache-2.0"}))
    assert front(text)["license"] == "apache-2.0"
    assert "base_model" not in front(text)
    assert "licence was not recorded" not in text
    assert front(card(adapter=True))["library_name"] == "peft"


@pytest.mark.parametrize("policy", METHODS)
def test_every_policy_has_its_method_and_parameters(policy: str) -> None:
    text = card(policy=policy)
    assert f"2. {METHODS[policy][0]}" in text
    for section in (policy, "sft", "lora", *METHODS[policy][1]):
        assert f"| `{section}." in text
    assert "| `policy_seed` | 5 |" in text


def test_a_policy_without_adapters_is_called_so() -> None:
    assert "all parameters" not in card()
    text = card(origin(parameters=origin().parameters | {"lora": None}))
    assert "adapter" not in text.replace("artifacts/ppo/adapter", "")
    assert "1. SFT on demonstrations, all parameters of the base model." in text
    assert "; all parameters of the SFT model." in text
    assert "| `lora` | null |" in text


def test_a_version_older_than_a_parameter_has_no_line_for_it() -> None:
    older = {key: value for key, value in origin().parameters.items() if key != "policy_seed"}
    assert "policy_seed" not in card(origin(parameters=older))


def test_figures_come_with_their_intervals_and_data_with_licences_in_no_broken_table() -> None:
    text = card()
    assert "| win rate against SFT by gold judge (95 % interval) | 79.0 % (73.3–84.4) | – |" in text
    assert "VADER" not in text, "it did not judge"
    assert "3.33 ± 0.17" in text or "3.34 ± 0.17" in text
    assert "0.50 times as many words as SFT's" in text
    assert r"| a | pipes \| here | MIT | 5 |" in text
    assert "| b | file | not recorded | 6 |" in text


def test_a_win_rate_stands_beside_its_controls_and_one_that_is_no_evidence_is_called_so() -> None:
    assert "no evidence" not in card()
    assert "at equal length" not in card(), "a version older than the controls has no line for them"
    controls = {"win_rate_bound": 0.98, "win_rate_length_controlled": 0.7, "win_rate_null": 0.51}
    controls |= {"win_rate_null_low": 0.47, "win_rate_null_high": 0.55}
    text = card(origin(metrics=origin().metrics | {"ppo": ROW | controls}))
    assert "| the gold judge's, at equal length | 70.0 % | – |" in text
    assert "| the gold judge's, at most by the KL; of SFT against itself | 98.0 % | 51.0 % |" in text
    assert "no evidence" not in text
    text = card(origin(metrics=origin().metrics | {"ppo": ROW | controls | {"win_rate_bound": 0.6}}))
    assert "The win rate is no evidence: a win rate of 79% is impossible at a KL of 3.3" in text


def test_the_decision_and_who_made_it_and_how_to_make_it_again() -> None:
    text = card()
    assert "The gate accepted it: it is good." in text
    assert "Promoted by ann at noon." in text
    assert "git commit `c0ffee`. In that project" in text
    assert "`rlhf reproduce 4`" in text
    assert f"| ppo | `{'k' * 16}` | `m5.dir` |" in text
    assert "```yaml\nseed: 3\n```" in text
    text = card(**{"accepted": "False", "promoted.reason": "we need one"})
    assert "The gate refused it: it is good." in text
    assert "Promoted by ann at noon: we need one." in text
    withdrawn = card(**{"withdrawn.by": "bob", "withdrawn.at": "two", "withdrawn.reason": "it swears"})
    assert "Withdrawn: bob withdrew it at two: it swears." in withdrawn
