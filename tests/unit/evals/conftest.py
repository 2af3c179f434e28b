from collections.abc import Callable

import pytest

from tasks.evals.compare import ScoredResponse


@pytest.fixture
def judged() -> Callable[..., ScoredResponse]:
    """A record of one response in which all that a test does not name is neutral."""

    def make(policy: str, prompt_id: str, **values: object) -> ScoredResponse:
        neutral: dict[str, object] = {
            "id": f"{policy}/{prompt_id}", "policy": policy, "prompt_id": prompt_id, "prompt": f"prompt {prompt_id}",
            "response": " some words", "tokens": 3, "ended": True, "kl": 0.0, "kl_k3": 0.0, "proxy": 0.0,
            "rewards": {"learned": 0.0, "repetition": 0.0}, "gold": 0.0, "vader": 0.0,
        }  # fmt: skip
        return ScoredResponse.model_validate(neutral | values)

    return make
