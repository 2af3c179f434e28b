"""Question answering with retries, for tasks of reasoning-gym."""

from __future__ import annotations

from tasks.core.errors import DataError
from tasks.core.rows import Prompt
from tasks.rewards.rules.answers import exact_match
from tasks.rl.environments.base import Step

__all__ = ["RetryEnvironment"]


class RetryEnvironment:
    """Reward 1 for the right answer, at whichever try; γ makes an earlier one earn more.

    Gamed by: trying until it fits, which `environment.max_turns` bounds; naming several numbers does not help, for the
    last one counts. The answer to a wrong try does not say in what it is wrong, so there is nothing in it to parrot. A
    wrong first try on purpose gains nothing, for the question stays the same and the reward only shrinks.
    """

    def __init__(self) -> None:
        self._expected = ""

    def reset(self, row: Prompt) -> str:
        """The row's prompt.

        Raises:
            DataError: the row has no right answer.
        """
        if row.answer is None:
            raise DataError(
                f"the environment reasoning_gym needs rows with an `answer`, and {row.id!r} has none: use a source of "
                "kind reasoning_gym, or map the column to `answer`"
            )
        self._expected = row.answer
        return row.prompt

    def step(self, action: str) -> Step:
        """Grade the last number of the turn."""
        if exact_match(action, self._expected):
            return Step("That is right.", 1.0, done=True)
        return Step("That is not right. Try again.", 0.0, done=False)
