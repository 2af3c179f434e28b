from tasks.core.rows import flatten


def test_nested_mappings_are_flattened_and_lists_are_not() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2, 3]}}, "e": None, "f": {}}) == {"a.b": 1, "a.c.d": [2, 3], "e": None}
    assert flatten({"a": 1}, "lora") == {"lora.a": 1}
    assert flatten(7, "seed") == {"seed": 7}
