"""Makes infra/presets/code.jsonl: small functions as prompts, their bodies as demonstrations, their tests as answers.

    python scripts/code_rows.py

Prompts show no test. Expected values come from the formulas below, evaluated here; the demonstrations have to pass in
the sandbox before anything is written. Every second value is tried by the tests that pay, the others by those held out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tasks.config.rules import CodeRule
from tasks.rewards.code import CodeReward

FILE = Path(__file__).resolve().parents[1] / "infra" / "presets" / "code.jsonl"

NUMBERS = (-7, -1, 0, 1, 2, 5, 12, 40)
LISTS = ([], [1], [3, 1, 2], [5, 5, -2, 9], [0, -4, 10, 7, 7])
WORDS = ("", "a", "Hello", "two words", "abcabc")

# What is asked, with {n} for a number → the name, its argument, the expression, and what it is tried on.
WITH_NUMBER = (
    ("x plus {n}", "add_{n}", "x", "x + {n}", NUMBERS, range(1, 21)),
    ("x minus {n}", "subtract_{n}", "x", "x - {n}", NUMBERS, range(1, 21)),
    ("x times {n}", "times_{n}", "x", "x * {n}", NUMBERS, range(2, 21)),
    ("{n} minus x", "from_{n}", "x", "{n} - x", NUMBERS, range(1, 21)),
    ("the remainder of x divided by {n}", "remainder_{n}", "x", "x % {n}", NUMBERS, range(2, 17)),
    ("x to the power of {n}", "power_{n}", "x", "x ** {n}", NUMBERS, range(2, 6)),
    ("whether x is greater than {n}", "above_{n}", "x", "x > {n}", NUMBERS, range(0, 16)),
    ("whether x is less than {n}", "below_{n}", "x", "x < {n}", NUMBERS, range(0, 16)),
    ("whether x is divisible by {n}", "divisible_by_{n}", "x", "x % {n} == 0", NUMBERS, range(2, 13)),
    ("the larger of x and {n}", "at_least_{n}", "x", "max(x, {n})", NUMBERS, range(0, 11)),
    ("the smaller of x and {n}", "at_most_{n}", "x", "min(x, {n})", NUMBERS, range(0, 11)),
    ("the first {n} items of the list", "first_{n}", "items", "items[:{n}]", LISTS, range(1, 6)),
    ("the list without its first {n} items", "without_{n}", "items", "items[{n}:]", LISTS, range(1, 6)),
    ("the text repeated {n} times", "repeat_{n}", "text", "text * {n}", WORDS, range(2, 9)),
    ("the first {n} letters of the text", "start_{n}", "text", "text[:{n}]", WORDS, range(1, 6)),
)
PLAIN = (
    ("the sum of the list", "total", "items", "sum(items)", LISTS),
    ("the length of the list", "count", "items", "len(items)", LISTS),
    ("the list in reverse order", "backwards", "items", "items[::-1]", LISTS),
    ("the list sorted", "in_order", "items", "sorted(items)", LISTS),
    ("the text in upper case", "upper", "text", "text.upper()", WORDS),
    ("the text in lower case", "lower", "text", "text.lower()", WORDS),
    ("the text in reverse order", "mirror", "text", "text[::-1]", WORDS),
    ("the words of the text as a list", "split", "text", "text.split()", WORDS),
)


def functions() -> Iterator[tuple[str, str, str, str, Iterable[object]]]:
    """What, name, argument, expression and what to try it on."""
    for what, name, argument, expression, tried, numbers in WITH_NUMBER:
        for n in numbers:
            yield what.format(n=n), name.format(n=n), argument, expression.format(n=n), tried
    yield from PLAIN


def rows() -> Iterator[dict[str, str]]:
    for what, name, argument, expression, tried in functions():
        cases = [(value, eval(expression, {}, {argument: value})) for value in tried]
        tests = [f"assert {name}({value!r}) == {expected!r}" for value, expected in cases]
        yield {
            "id": name,
            "prompt": f'def {name}({argument}):\n    """Return {what}."""\n',
            "response": f"    return {expression}",
            "answer": "\n".join([*tests[1::2], "# held out", *tests[::2]]),
        }


def main() -> None:
    made = list(rows())
    prompts, responses = [row["prompt"] for row in made], [row["response"] for row in made]
    wrong = []
    for held_out in (False, True):
        options = CodeRule(program="completion", held_out=held_out)
        results = CodeReward(options, {row["prompt"]: row["answer"] for row in made}).results(prompts, responses)
        wrong += [row["id"] for row, result in zip(made, results, strict=True) if result.status != "passed"]
    if wrong:
        sys.exit(f"these demonstrations do not pass their own tests: {', '.join(wrong)}")
    FILE.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8", newline="\n")
    print(f"{len(made)} rows in {FILE}")


if __name__ == "__main__":
    main()
