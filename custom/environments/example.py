"""An environment of your own: a class without arguments that answers the turns of one conversation."""

from tasks.core.rows import Prompt
from tasks.rl.environments import Step

__all__ = ["HigherLower"]


class HigherLower:
    """Asks for the number in the row's `answer` and says whether a guess is too low or too high.

    Gamed by: guessing without calculating, for each answer halves what is left; `environment.gamma` below 1 pays less
    for every turn.
    """

    def reset(self, row: Prompt) -> str:
        """Start with the row's prompt, which ends with `Bot:`."""
        self.number = int(row.answer or 0)
        return row.prompt

    def step(self, action: str) -> Step:
        """Answer a turn; pay 1 for the number."""
        try:
            guess = int(action.strip(" .\n"))
        except ValueError:
            return Step("A number, please.", 0.0, done=False)
        if guess == self.number:
            return Step("That is right.", 1.0, done=True)
        return Step("Too low." if guess < self.number else "Too high.", 0.0, done=False)
