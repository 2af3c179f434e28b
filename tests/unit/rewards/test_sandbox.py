"""Sandbox: the codec both ways, each result of honest programs, and error messages."""

# ruff: noqa: E501 — a program on one line is easier to compare with its neighbours

import math
import os
import random
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import pytest

from tasks.config.rules import CodeRule
from tasks.core.errors import ConfigError, DataError
from tasks.rewards.sandbox import bubblewrap
from tasks.rewards.sandbox.bubblewrap import ALLOWED
from tasks.rewards.sandbox.inside import codec
from tasks.rewards.sandbox.sandbox import Job, Sandbox, Status
from tests.unit.rewards.conftest import sandbox_or_skip

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap on this machine")

VALUES = [
    None, True, False, 0, -1, 2**200, -(2**200), 0.0, -0.0, 0.1, 1e308, math.inf, -math.inf, math.nan, 1 + 2j,
    complex(-0.0, math.inf), "", "ä\n\0", "\udc80", "7:", b"", b"\0\xff", [], [1, [2, [3]]], (), (1,), ((), ()), set(),
    {1, "1", (2,)}, frozenset({1}), {frozenset({1}): [2]}, {}, {"a": {"b": [1.5, None]}, 1: "x", (1, 2): b"y"},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_a_value_arrives_as_it_was(value: object) -> None:
    arrived = codec.decode(codec.encode(value, 1000))
    assert repr(arrived) == repr(value)
    assert type(arrived) is type(value)


def test_random_values_arrive() -> None:
    choose = random.Random(0)

    def value(depth: int) -> object:
        kind = choose.randrange(7 if depth else 4)
        if kind < 4:
            return (choose.randrange(-(10**30), 10**30), choose.random(), chr(choose.randrange(0xD7FF)), None)[kind]
        items = [value(depth - 1) for _ in range(choose.randrange(5))]
        return (items, tuple(items), {str(item): item for item in items})[kind - 4]

    for _ in range(500):
        made = value(4)
        assert codec.decode(codec.encode(made, 1 << 20)) == made


def test_a_subclass_arrives_as_its_base() -> None:
    liar = type("Liar", (int,), {"__eq__": lambda *_: True})
    arrived = codec.decode(codec.encode([liar(5)], 1000))
    assert arrived == [5]
    assert arrived != [6]
    assert type(arrived[0]) is int  # type: ignore[index]


NOT_PLAIN = (object(), range(3), iter([1]), len, NotImplemented, bytearray(b"x"), {1: object()})
TOO_LARGE = ("x" * 1001, b"x" * 1001, [None] * 1001, 1 << 8008, [["x" * 500] * 2])


@pytest.mark.parametrize(
    ("error", "value"),
    [*product([codec.UnsupportedTypeError], NOT_PLAIN), *product([codec.MessageTooLargeError], TOO_LARGE)],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_plain_data_or_too_large_does_not_leave(error: type[Exception], value: object) -> None:
    with pytest.raises(error):
        codec.encode(value, 1000)


@pytest.mark.parametrize(
    "text",
    [b"", b"?", b"i", b"izz;", b"s5:abcd", b"s-1:", b"l2:n", b"nn", b"m1:l0:n", b"x1:l0:", b"s1:\xff", b"c1;", b"d;",
     b"l1:" * 99 + b"n", b"l" + b"9" * 5000 + b":", b"s:"],
)  # fmt: skip
def test_bytes_that_are_no_value_are_refused(text: bytes) -> None:
    with pytest.raises(codec.UnsupportedTypeError):
        codec.decode(text)


def test_random_bytes_give_a_plain_value_or_are_refused() -> None:
    choose = random.Random(1)
    alphabet = b"ntfidcsbluxzm0123:;,-e"
    for _ in range(5000):
        text = bytes(choose.choices(alphabet, k=choose.randrange(12)))
        try:
            codec.encode(codec.decode(text), 1 << 16)
        except codec.UnsupportedTypeError:
            continue


def test_frames_end_where_the_other_side_ends() -> None:
    end, start = os.pipe()
    codec.write_frame(start, b"one")
    codec.write_frame(start, b"")
    os.write(start, b"\0\0\0\7cut")
    os.close(start)
    assert [codec.read_frame(end, 9) for _ in range(4)] == [b"one", b"", None, None]
    os.close(end)


def test_a_frame_that_announces_too_much_is_not_read() -> None:
    end, start = os.pipe()
    os.write(start, b"\0\0\0\7")
    with pytest.raises(codec.MessageTooLargeError):
        codec.read_frame(end, 6)
    os.close(end)
    os.close(start)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_or_skip(CodeRule(cpu_seconds=1, workers=2))


ADD = "def add(a, b):\n    return a + b\n"

CASES = {
    "asserts": (ADD, "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'", "passed"),
    "check": (ADD, "def check(f):\n    assert f(1, b=2) == 3\n    assert f([1], [2]) == [1, 2]", "passed"),
    "last assert": (ADD, "assert add(1, 2) == 3\nassert add(1, 2) == 4", "failed"),
    "expected exception": ("def add(a, b): raise ValueError", "try:\n    add(1, 2)\nexcept ValueError: pass", "passed"),
    "other exception": ("def add(a, b): raise KeyError", "try:\n    add(1, 2)\nexcept ValueError: pass", "error"),
    "exception with arguments": ("def add(a, b): return b'\\xff'.decode()", "add(1, 2)", "error"),
    "tuple": ("def add(a, b): return a, {b}", "assert add(1, 2) == (1, {2})", "passed"),
    "state": ("n = []\ndef add(a, b):\n    n.append(a)\n    return len(n)", "assert (add(1, 1), add(1, 1)) == (1, 2)", "passed"),
    "prints": ("print('loading')\n" + ADD + "    print(a)", "assert add(1, 2) == 3", "passed"),
    "imports": ("import math, re, json, collections, itertools, datetime\n" + ADD, "assert add(1, 2) == 3", "passed"),
    "default dict": (
        "import collections\ndef add(a, b): return collections.defaultdict(int, a=a, b=b)",
        "assert add(1, 2) == {'a': 1, 'b': 2}", "passed",
    ),
    "lambda": ("add = lambda a, b: a + b", "assert add(1, 2) == 3", "passed"),
    "scratch": ("def add(a, b):\n    open('x', 'w').write(str(a + b))\n    return int(open('x').read())", "assert add(1, 2) == 3", "passed"),
    "tests print": (ADD, "print('x' * 10**6)\nassert add(1, 2) == 3", "passed"),
    "tests loop": (ADD, "add(1, 2)\nwhile True: pass", "timeout"),
    "tests index a result": ("def add(a, b): return None", "assert add(1, 2)[0] == 3", "failed"),
    "tests exit": (ADD, "add(1, 2)\nraise SystemExit(0)", "failed"),
    "arguments are the tests' own": ("def add(a, b):\n    a.append(b)", "x = [1]\nadd(x, 2)\nassert x == [1]", "passed"),
    "calls with what is no plain data": (ADD, "add(1, 2)\nadd(print, 2)", "refused"),
}  # fmt: skip


@needs_bubblewrap
@pytest.mark.parametrize(("program", "tests", "status"), CASES.values(), ids=CASES)
def test_results(program: str, tests: str, status: str, sandbox: Sandbox) -> None:
    (result,) = sandbox.run([Job(program, tests, "add")])
    assert result.status == status, result.reason
    assert status != "refused" or result.reason == "the tests pass a value of type builtin_function_or_method"


EXPECTING = {
    "except": "try:\n    add(1, 2)\nexcept ValueError: pass",
    "except in a function": "def check(f):\n    for _ in range(2):\n        try: f(1, 2)\n        except ValueError: continue\n        finally: f",
    "bare except": "def check(f):\n    try: return f(1, 2)\n    except: return",
    "suppress": "import contextlib\nwith contextlib.suppress(ValueError): add(1, 2)",
    "suppress in a function": "import contextlib\ndef check(f):\n    with contextlib.suppress(ValueError): return f(1, 2)",
    "context manager of the tests": (
        "import contextlib\n@contextlib.contextmanager\ndef expect(kind):\n    try: yield\n    except kind: return\n    assert False\n"
        "with expect(ValueError): add(1, 2)"
    ),
    "generator": "def kinds():\n    try: add(1, 2)\n    except ValueError as error: yield type(error).__name__\nassert [*kinds()] == ['ValueError']",
    "assertRaises": "import unittest\nunittest.TestCase().assertRaises(ValueError, add, 1, 2)",
    "with assertRaises": "import unittest\nwith unittest.TestCase().assertRaises(ValueError): add(1, 2)",
}  # fmt: skip


@needs_bubblewrap
def test_tests_may_expect_an_exception_by_any_means_of_their_own(sandbox: Sandbox) -> None:
    right = sandbox.run([Job("def add(a, b): raise ValueError", tests, "add") for tests in EXPECTING.values()])
    assert {name: str(result.status) for name, result in zip(EXPECTING, right, strict=True)} == dict.fromkeys(
        EXPECTING, "passed"
    )
    wrong = sandbox.run(
        [
            Job("def add(a, b): raise KeyError", tests, "add")
            for name, tests in EXPECTING.items()
            if name != "bare except"
        ]
    )
    assert {str(result.status) for result in wrong} == {"error"}


ANSWERS = [
    *map(repr, VALUES),
    "10**5000",
    "-10**5000",
    "[10**5000]",
    "{10**5000: 10**5000}",
    "'x' * 10**6",
    "[set()] * 300_000",
    "[[]] * 10**5",
]
ANSWER = """
import os
from tasks.rewards.sandbox.inside import codec
from math import inf, nan
real = codec.read_frame
def answer(channel, limit):
    text = real(channel, limit)
    ticket = codec.decode(text)[0]
    codec.write_frame(4, codec.encode((ticket, {kind}, {value}), 1 << 22))
    return text
codec.read_frame = answer
def add(a, b): return 0
"""


@needs_bubblewrap
def test_whatever_the_program_answers_is_its_own_fault() -> None:
    choose = random.Random(2)
    kinds = [
        *map(repr, ("returned", "raised", "not plain", "loaded", "passed", "invalid", "broken")),
        "10**5000",
        "None",
    ]
    programs = [ANSWER.format(kind=choose.choice(kinds), value=choose.choice(ANSWERS)) for _ in range(60)]
    programs += [ANSWER.format(kind=kinds[0], value=f"({value}, [1, 2])") for value in ANSWERS[-7:]]
    results = Sandbox(CodeRule(memory_mb=64, workers=2)).run(
        [Job(program, "assert add(1, 2) == 3", "add") for program in programs]
    )
    assert Status.PASSED not in {result.status for result in results}
    assert {Status.MEMORY, Status.REFUSED, Status.ERROR, Status.FAILED} <= {result.status for result in results}


@needs_bubblewrap
def test_a_program_of_megabytes_is_refused(sandbox: Sandbox) -> None:
    sizes = {"passed": 1 << 19, "refused": 1 << 20, "refused ": 1 << 26}
    programs = [ADD + "#" * size for size in sizes.values()]
    results = sandbox.run([Job(program, "assert add(1, 2) == 3", "add") for program in programs])
    assert [str(result.status) for result in results] == [status.strip() for status in sizes]


@needs_bubblewrap
@pytest.mark.parametrize(
    ("tests", "accepted"),
    [
        ("assert not abs(add(1, 2) - 3) > 1e-6", "NaN"),
        ("for x in add(1, 2): assert x == 3", "[], ''"),
        ("assert not add(1, 2)", "None, [], ''"),
        ("try: assert add(1, 2) == 3\nexcept RuntimeError: pass", "an exception"),
        ("class A:\n    def __getitem__(self, i): return add(i, 1)[0]\nassert not [*A()]", "[], ''"),
        ("assert abs(add(1, 2) - 3) <= 1e-6", ""),
        ("while add(1, 2) != 3: pass", ""),
    ],
)
def test_tests_that_accept_trivial_answers_are_found(tests: str, accepted: str, sandbox: Sandbox) -> None:
    assert sandbox.trivial_answers([Job("", tests, "add")]) == [accepted]


@needs_bubblewrap
def test_a_batch_keeps_its_order_and_repeats_cost_nothing(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Mock(side_effect=sandbox._run_job)
    monkeypatch.setattr(sandbox, "_run_job", spy)
    right, false = Job(ADD, "assert add(1, 2) == 3", "add"), Job(ADD, "assert add(1, 2) == 4", "add")
    results = sandbox.run([right, false, right, right, false])
    assert [result.status for result in results] == ["passed", "failed", "passed", "passed", "failed"]
    assert spy.call_count == 2


@needs_bubblewrap
def test_in_place_functions_where_the_tests_want_them() -> None:
    sandbox = Sandbox(CodeRule(in_place=True, cpu_seconds=1))
    programs = ["def f(a, b, c):\n    a.sort()\n    b['k'] = 1\n    c.clear()", "def f(a, b, c):\n    sorted(a)"]
    tests = "a, b, c = [2, 1], {}, {3}\nassert f(a, b, c) is None\nassert (a, b, c) == ([1, 2], {'k': 1}, set())"
    results = sandbox.run([Job(program, tests, "f") for program in programs])
    assert [result.status for result in results] == ["passed", "failed"]


@needs_bubblewrap
def test_helpers_come_from_the_preamble_and_not_from_the_program(sandbox: Sandbox) -> None:
    program = "def twice(x): return 0\ndef half(x): return 0"
    job = Job(program, "assert twice(half(4)) == 4", "half", "def twice(x): return 2 * x\ndef half(x): pass")
    assert sandbox.run([job])[0].status is Status.FAILED


@needs_bubblewrap
@pytest.mark.parametrize(
    ("tests", "problem"),
    [
        ("def chekc(f): assert f(1, 2) == 3", "they never call add"),
        ("assert add(1, 2 == 3", "SyntaxError before they call the function"),
        ("import numpy", "ModuleNotFoundError before they call the function: No module named 'numpy'"),
        ("assert missing(1)", "NameError before they call the function"),
        ("add(print, 2)", "the tests pass a value of type builtin_function_or_method"),
    ],
)
def test_tests_that_cannot_judge_are_an_error_and_no_verdict(tests: str, problem: str, sandbox: Sandbox) -> None:
    for run in (sandbox.run, sandbox.trivial_answers):
        with pytest.raises(DataError, match=problem):
            run([Job(ADD, tests, "add")])


def test_without_bubblewrap_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"no `bwrap` on PATH: install it .* or set isolation: unsafe_no_isolation"):
        Sandbox(CodeRule())


def test_where_bubblewrap_does_not_work_it_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ConfigError, match=r"(?s)does not work on this machine: .*No permissions .*kernel.unprivileged"):
        Sandbox(CodeRule())


@needs_bubblewrap
def test_isolation_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*bubblewrap._bwrap_args(1 << 20)[:-2], "--ro-bind", "/etc", "/etc"]
    monkeypatch.setattr(bubblewrap, "_bwrap_args", lambda _: arguments)
    with pytest.raises(ConfigError, match="the sandbox does not hold on this machine: failed"):
        Sandbox(CodeRule())


def test_without_libseccomp_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    bubblewrap.seccomp_program.cache_clear()
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    monkeypatch.setattr(bubblewrap, "_bwrap_args", lambda _: [])
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[code\]'.*apt-get install libseccomp2"):
        Sandbox(CodeRule())


def test_without_isolation_there_are_still_limits() -> None:
    sandbox = Sandbox(CodeRule(isolation="unsafe_no_isolation", cpu_seconds=1, memory_mb=128, workers=4))
    programs = {
        ADD: "passed",
        "def add(a, b):\n    while True: pass": "timeout",
        "def add(a, b): return len([0] * 10**9)": "memory",
        "import os\ndef add(a, b): return os.environ.get('PATH')": "failed",
    }
    results = sandbox.run([Job(program, "assert add(1, 2) == 3", "add") for program in programs])
    assert [result.status for result in results] == [*programs.values()]


@needs_bubblewrap
def test_sets_have_the_same_order_in_every_run(sandbox: Sandbox) -> None:
    words = [sys.executable, "-c", "print(hash('ab'))"]
    expected = subprocess.run(words, env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=True).stdout
    job = Job("def add(a, b): return hash(a + b)", f"assert add('a', 'b') == {expected}", "add")
    assert sandbox.run([job])[0].status is Status.PASSED


def test_the_filter_lets_no_process_start() -> None:
    forbidden = "clone clone3 fork vfork execve execveat kill tgkill socket ptrace mount"
    assert not {*forbidden.split()} & {*ALLOWED}


def test_the_programs_side_imports_little_and_nothing_of_ours_outside_its_folder() -> None:
    """Every program pays for each import; json alone would double the start."""
    allowed = {"__future__", "collections.abc", "builtins", "ctypes", "os", "resource", "select", "sys", "typing"}
    allowed.add("opcode")  # where a call raised something
    for file in Path(codec.__file__).parent.glob("*.py"):
        lines = [line.split() for line in file.read_text().splitlines()]
        found = {words[1] for words in lines if words and words[0] in ("import", "from")}
        ours = {name for name in found if name.startswith("tasks.rewards.sandbox.inside")}
        assert found - ours <= allowed, file.name
