"""Makes infra/presets/code.jsonl: small functions as prompts, their bodies as demonstrations, their tests as answers.

    python scripts/code_rows.py

Prompts show no test. Expected values come from the formulas below, evaluated here; the demonstrations have to pass in
the sandbox before anything is written. Every second value is tried by the tests that pay, the others by those held out;
neither half expects one value of all calls, so that no constant passes. `group` is the template of a row: rows of one
group go to one split, so what is held out is never a training function with another number.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tasks.config.rules import CodeRule
from tasks.rewards.code import CodeReward

FILE = Path(__file__).resolve().parents[1] / "infra" / "presets" / "code.jsonl"

# Formulas of x, items or text are tried on these, where n is the function's number (3 where it has none).
TRIED: dict[str, str] = {
    "x": "[-7, n, n + 1, n - 1, 0, 2 * n, 17, -40, 40]",
    "items": "[[], [n], [3, 1, 2], [9, -4, 10, 7, 7], [n, 5, -2, n], [n + 1, 4, n, 8, 2, 6]]",
    "text": "['', 'a', 'two words', 'Some More Text Here', 'abCABc', 'xyz zyx', 'one more line of it']",
}
SMALL, MIDDLE, LARGE = (1, 2, 3), (2, 3, 4), (6, 12, 15)

# Name → what is asked, the formula, and the numbers that {n} stands for. The words and calls recur across templates.
TEMPLATES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    # numbers
    "add": ("x plus {n}", "x + {n}", LARGE),
    "subtract": ("x minus {n}", "x - {n}", LARGE),
    "times": ("x times {n}", "x * {n}", LARGE),
    "from": ("{n} minus x", "{n} - x", LARGE),
    "remainder": ("the remainder of x divided by {n}", "x % {n}", LARGE),
    "quotient": ("x divided by {n}, without the remainder", "x // {n}", LARGE),
    "power": ("x to the power of {n}", "x ** {n}", MIDDLE),
    "at_least": ("the larger of x and {n}", "max(x, {n})", LARGE),
    "at_most": ("the smaller of x and {n}", "min(x, {n})", LARGE),
    "distance": ("the distance between x and {n}", "abs(x - {n})", LARGE),
    "size_plus": ("the absolute value of x, plus {n}", "abs(x) + {n}", LARGE),
    "size_times": ("the absolute value of x, times {n}", "abs(x) * {n}", LARGE),
    "twice_plus": ("twice x, plus {n}", "2 * x + {n}", LARGE),
    "twice_minus": ("twice x, minus {n}", "2 * x - {n}", LARGE),
    "square_plus": ("the square of x, plus {n}", "x ** 2 + {n}", LARGE),
    "square_times": ("the square of x, times {n}", "x ** 2 * {n}", LARGE),
    # comparisons
    "above": ("whether x is greater than {n}", "x > {n}", LARGE),
    "below": ("whether x is less than {n}", "x < {n}", LARGE),
    "not_below": ("whether x is at least {n}", "x >= {n}", LARGE),
    "not_above": ("whether x is at most {n}", "x <= {n}", LARGE),
    "divisible": ("whether x is divisible by {n}", "x % {n} == 0", LARGE),
    "not_divisible": ("whether x is not divisible by {n}", "x % {n} != 0", LARGE),
    "size_above": ("whether the absolute value of x is greater than {n}", "abs(x) > {n}", LARGE),
    "size_below": ("whether the absolute value of x is less than {n}", "abs(x) < {n}", LARGE),
    "twice_above": ("whether twice x is greater than {n}", "2 * x > {n}", LARGE),
    "within": ("whether x is between 0 and {n}", "0 <= x <= {n}", LARGE),
    # parts of a list
    "first": ("the first {n} items of the list", "items[:{n}]", SMALL),
    "last": ("the last {n} items of the list", "items[-{n}:]", SMALL),
    "without_first": ("the list without its first {n} items", "items[{n}:]", SMALL),
    "without_last": ("the list without its last {n} items", "items[:-{n}]", SMALL),
    "smallest": ("the {n} smallest items of the list", "sorted(items)[:{n}]", SMALL),
    "largest": ("the {n} largest items of the list, sorted", "sorted(items)[-{n}:]", SMALL),
    "without_smallest": ("the list sorted, without its first {n} items", "sorted(items)[{n}:]", SMALL),
    "sum_first": ("the sum of the first {n} items of the list", "sum(items[:{n}])", SMALL),
    "sum_last": ("the sum of the last {n} items of the list", "sum(items[-{n}:])", SMALL),
    "append": ("the list with {n} at its end", "items + [{n}]", LARGE),
    "prepend": ("the list with {n} at its beginning", "[{n}] + items", LARGE),
    # a list and a number
    "occurrences": ("how many times {n} is in the list", "items.count({n})", LARGE),
    "contains": ("whether {n} is in the list", "{n} in items", LARGE),
    "lacks": ("whether {n} is not in the list", "{n} not in items", LARGE),
    "longer": ("whether the length of the list is greater than {n}", "len(items) > {n}", SMALL),
    "sum_above": ("whether the sum of the list is greater than {n}", "sum(items) > {n}", LARGE),
    "sum_plus": ("the sum of the list, plus {n}", "sum(items) + {n}", LARGE),
    "sum_times": ("the sum of the list, times {n}", "sum(items) * {n}", LARGE),
    "length_plus": ("the length of the list, plus {n}", "len(items) + {n}", LARGE),
    "length_times": ("the length of the list, times {n}", "len(items) * {n}", LARGE),
    # each item of a list
    "each_plus": ("a list of each item plus {n}", "[i + {n} for i in items]", LARGE),
    "each_minus": ("a list of each item minus {n}", "[i - {n} for i in items]", LARGE),
    "each_times": ("a list of each item times {n}", "[i * {n} for i in items]", LARGE),
    "items_above": ("the items of the list greater than {n}", "[i for i in items if i > {n}]", MIDDLE),
    "items_below": ("the items of the list less than {n}", "[i for i in items if i < {n}]", LARGE),
    "items_not": ("the items of the list that are not {n}", "[i for i in items if i != {n}]", LARGE),
    # text
    "repeat_upper": ("the text in upper case, repeated {n} times", "text.upper() * {n}", MIDDLE),
    "repeat_lower": ("the text in lower case, repeated {n} times", "text.lower() * {n}", MIDDLE),
    "start_upper": ("the first {n} letters of the text, in upper case", "text[:{n}].upper()", SMALL),
    "end_upper": ("the last {n} letters of the text, in upper case", "text[-{n}:].upper()", SMALL),
    "start_lower": ("the first {n} letters of the text, in lower case", "text[:{n}].lower()", MIDDLE),
    "shorter": ("whether the length of the text is less than {n}", "len(text) < {n}", (2, 4, 7)),
    "first_words": ("the first {n} words of the text", "text.split()[:{n}]", SMALL),
    "last_words": ("the last {n} words of the text", "text.split()[-{n}:]", SMALL),
    "more_words": ("whether the text has more than {n} words", "len(text.split()) > {n}", SMALL),
    "pad_right": ("the text, padded with spaces on the right to length {n}", "text.ljust({n})", LARGE),
    "pad_left": ("the text, padded with spaces on the left to length {n}", "text.rjust({n})", LARGE),
    # without a number
    "total": ("the sum of the list", "sum(items)", ()),
    "count": ("the length of the list", "len(items)", ()),
    "backwards": ("the list in reverse order", "items[::-1]", ()),
    "in_order": ("the list sorted", "sorted(items)", ()),
    "distinct": ("the number of different items in the list", "len(set(items))", ()),
    "upper": ("the text in upper case", "text.upper()", ()),
    "lower": ("the text in lower case", "text.lower()", ()),
    "words": ("the words of the text as a list", "text.split()", ()),
    "word_count": ("the number of words of the text", "len(text.split())", ()),
}


def rows() -> Iterator[dict[str, str]]:
    for group, (what, formula, numbers) in TEMPLATES.items():
        for n in numbers or (3,):
            name = f"{group}_{n}" if numbers else group
            yield {"group": group, **row(name, what.format(n=n), formula.format(n=n), n)}


def row(name: str, what: str, formula: str, n: int) -> dict[str, str]:
    """Row of one function; it exits where one half of the tests expects the same of all calls."""
    (argument,) = {node.id for node in ast.walk(ast.parse(formula)) if isinstance(node, ast.Name)} & TRIED.keys()
    cases = [(value, eval(formula, {argument: value})) for value in eval(TRIED[argument], {"n": n})]
    if any(len({repr(expected) for _, expected in half}) < 2 for half in (cases[::2], cases[1::2])):
        sys.exit(f"{name}: a constant passes half of the tests: {cases}")
    tests = [f"assert {name}({value!r}) == {expected!r}" for value, expected in cases]
    return {
        "id": name,
        "prompt": f'def {name}({argument}):\n    """Return {what}."""\n',
        "response": f"    return {formula}",
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
