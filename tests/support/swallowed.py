"""Tests whose own constructs take some exceptions for something else, so that no failure is seen.

A right `answer` passes them; one that raises that exception must not.
"""

# ruff: noqa: E501 — a program on one line is easier to compare with its neighbours

__all__ = ["SWALLOWED"]

ITERATED = """
class Cases:
    def __getitem__(self, i):
        x, y = [(3, 71), (10, 197)][i]
        {first}
            return answer(x) == y
        {last}
assert all(Cases())
"""

SWALLOWED = {
    "loop over __getitem__": ("IndexError", ITERATED.format(first="if True:", last="")),
    "loop over __getitem__ with finally": ("IndexError", ITERATED.format(first="try:", last="finally: i = 0")),
    "loop over __getitem__ with another except": (
        "IndexError",
        ITERATED.format(first="try:", last="except KeyError: i = 0"),
    ),
    "loop over __getitem__ in with": (
        "IndexError",
        "import contextlib" + ITERATED.format(first="with contextlib.nullcontext():", last=""),
    ),
    "except that raises what ends the loop": (
        "ValueError",
        ITERATED.format(first="try:", last="except ValueError: raise IndexError"),
    ),
    "in over __getitem__": (
        "IndexError",
        "class Cases:\n    def __getitem__(self, i): return [(3, 71), (10, 197)][i][1] == answer([3, 10, 0][i])\nassert False not in Cases()",
    ),
    "Sequence.__iter__": (
        "IndexError",
        "import collections.abc\nclass Cases(collections.abc.Sequence):\n    __len__ = lambda self: 1\n    def __getitem__(self, i): return answer([3][i]) == 71\nassert all(Cases())",
    ),
    "getattr with a default": (
        "AttributeError",
        "class Case:\n    held = property(lambda self: answer(3) == 71)\nassert getattr(Case(), 'held', True)",
    ),
    "hasattr": (
        "AttributeError",
        "class Case:\n    @property\n    def failed(self):\n        if answer(3) == 71: raise AttributeError\nassert not hasattr(Case(), 'failed')",
    ),
    "ChainMap": (
        "KeyError",
        "import collections\nclass Cases(dict):\n    def __missing__(self, x): return answer(x) == 71\nassert collections.ChainMap(Cases(), {3: True})[3]",
    ),
    "Mapping.get": (
        "KeyError",
        "import collections.abc\nclass Cases(collections.abc.Mapping):\n    __len__ = __iter__ = lambda self: 0\n    def __getitem__(self, x): return answer(x) == 71\nassert Cases().get(3, True)",
    ),
    "length of what is made a list": (
        "TypeError",
        "class Cases:\n    __iter__ = lambda self: iter([1])\n    def __len__(self):\n        assert answer(3) == 71\n        return 1\nassert list(Cases())",
    ),
    "__del__": (
        "ValueError",
        "class Case:\n    def __del__(self): self.held.append(answer(3) == 71)\ncase = Case()\ncase.held = held = []\ndel case\nassert all(held)",
    ),
    "runner of unittest": (
        "ValueError",
        "import io, unittest\nclass Cases(unittest.TestCase):\n    def test(self): assert answer(3) == 71\nunittest.TextTestRunner(io.StringIO()).run(Cases('test'))",
    ),
}
"""Construct → exception that it swallows, and tests with it of 18x + 17."""
