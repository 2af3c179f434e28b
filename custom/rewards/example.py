"""A reward of your own, in three steps.

1. Write a function of one sample here or in a file beside this one. It gets the prompt, the response, and the row's
   `answer` (None where there is none), and whatever options params.yaml sets; it returns a number.
2. Name it in params.yaml:   reward.rules: {loud: {function: "example:shout", at_most: 0.5}}
3. Give it a weight there:   reward.weights: {loud: 0.2}

Where it raises or returns no finite number, the response earns `floor` (0 unless you set it beside `function`), the
failure counts in `failures/loud`, and the first one is printed; where most of a batch fails, training stops.
"""

__all__ = ["shout"]


def shout(prompt: str, response: str, answer: str | None, *, at_most: float = 1.0) -> float:
    """Share of the letters that are capitals, up to a bound; a text without a letter earns 0.

    Gamed by: "AAAA". Against that: the bound, beyond which nothing is gained, and the KL penalty.
    """
    letters = [letter for letter in response if letter.isalpha()]
    return min(at_most, sum(letter.isupper() for letter in letters) / len(letters)) if letters else 0.0
