"""A judge of your own: a function like a reward's, by which `evaluate` compares policies and nothing trains."""

__all__ = ["ends"]


def ends(prompt: str, response: str, answer: str | None, *, marks: str = ".!?") -> float:
    """1 where the response ends like a sentence, else 0."""
    return float(response.rstrip().endswith(tuple(marks)))
