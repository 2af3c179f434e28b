"""Change values in the text of a YAML file and keep the rest byte for byte: comments, quotes, spacing, line ends.

The text is parsed to nodes, which know where they begin and end. A value that differs is replaced in its part of the
text, and a new key becomes a new line after the last one of its mapping.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter, SafeRepresenter

__all__ = ["edit_yaml"]

Edit: TypeAlias = tuple[int, int, str]
"""(start, end, text): what stands from `start` up to `end` becomes the text."""

STEP = 2  # spaces by which an inner block is indented
WIDTH = 120


def edit_yaml(text: str, before: Any, document: Any) -> str:
    """Change the text of `before` so that it means `document`, a mapping that ruamel has loaded for a round trip.

    Where aliases or a rare style do not let single values be replaced, the whole is written anew, with its comments,
    unless ruamel cannot keep those.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    edited = text
    try:
        edits = sorted(_inner_edits(text, YAML().compose(text), before, document), key=lambda edit: edit[0])
        for start, end, new in reversed(edits):  # those at one place stay in their order
            edited = edited[:start] + new.replace("\n", newline) + edited[end:]
    except (LookupError, ValueError):
        edited = ""
    written = (edited, _dump(document).replace("\n", newline))
    return next((text for text in written if _means(text, document)), _dump(_plain(document)))


def _means(text: str, document: Any) -> bool:
    try:
        return bool(YAML(typ="safe").load(text) == document)
    except YAMLError:
        return False


def _inner_edits(text: str, node: Any, before: Any, after: Any) -> Iterator[Edit]:
    """Edits of the parts of a mapping or list that stays one."""
    if not isinstance(node, MappingNode):
        for item, old, new in zip(node.value, before, after, strict=False):
            if old != new:
                yield from _edits(text, None, item, old, new)
        for item in node.value[len(after) :]:
            yield _remove_lines(text, text.rindex("-", 0, item.start_mark.index), item)
        if more := list(after[len(before) :]):
            yield _insert_lines(text, node.value[-1], _block(more, node.start_mark.column))
        return
    entries = {key.value: (key, value) for key, value in node.value}
    for name, old in before.items():
        key, value = entries[str(name)]
        if name not in after:
            yield _remove_lines(text, key.start_mark.index, value)
        elif old != after[name]:
            yield from _edits(text, None if node.flow_style else key, value, old, after[name])
    if added := {name: value for name, value in after.items() if name not in before}:
        last = [value for key, value in node.value if key.value in map(str, after)][-1]
        yield _insert_lines(text, last, _block(added, node.value[0][0].start_mark.column))


def _edits(text: str, key: Node | None, node: Any, before: Any, after: Any) -> Iterator[Edit]:
    """Edits that change one value; `key` is that of a block mapping's entry, None for another part."""
    if _keeps_its_form(node, before, after):
        yield from _inner_edits(text, node, before, after)
        return
    start, end = node.start_mark.index, _end(text, node)
    if key is not None and start == end:  # there is no value, and the mark is that of what follows
        start = end = text.index(":", key.end_mark.index) + 1
    is_collection = isinstance(node, CollectionNode)
    is_block = is_collection and not node.flow_style
    if key is None or (is_collection and not is_block and node.value):
        yield start, end, _flow(after)
    elif _needs_block(after):
        lines = "\n" + _block(after, key.start_mark.column + STEP)
        if is_block:
            yield _line_end(text, key.end_mark.index), end, lines
        else:
            yield len(text[:start].rstrip(" ")), end, ""
            yield _line_end(text, end), _line_end(text, end), lines
    elif is_block:
        colon = text.index(":", key.end_mark.index) + 1
        yield colon, colon, " " + _flow(after)
        yield _line_end(text, colon), end, ""
    else:
        yield start, end, " " * (text[start - 1] == ":") + _flow(after)


def _keeps_its_form(node: Any, before: Any, after: Any) -> bool:
    """Whether it can be changed part by part; within brackets and braces only if no part comes or goes."""
    if isinstance(node, ScalarNode) or not isinstance(after, dict if isinstance(node, MappingNode) else list):
        return False
    if isinstance(after, dict):
        return before.keys() == after.keys() if node.flow_style else bool(before.keys() & after.keys())
    return len(before) == len(after) if node.flow_style else bool(after)


def _needs_block(value: Any) -> bool:
    """Whether the value is written on lines of its own: a mapping, or a list that holds one."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(value) and (isinstance(value, dict) or any(isinstance(part, dict | list) and part for part in parts))


def _insert_lines(text: str, after: Node, lines: str) -> Edit:
    place = _line_end(text, _end(text, after))
    return place, place, "\n" + lines


def _remove_lines(text: str, start: int, last: Node) -> Edit:
    """From the line of `start` to that on which the node ends."""
    end = text.find("\n", _end(text, last))
    return text.rfind("\n", 0, start) + 1, end + 1 if end >= 0 else len(text), ""


def _end(text: str, node: Any) -> int:
    """Where a node's own text ends: before comments and empty lines that follow."""
    while isinstance(node, CollectionNode) and not node.flow_style and node.value:
        node = node.value[-1][1] if isinstance(node, MappingNode) else node.value[-1]
    start, end = node.start_mark.index, node.end_mark.index
    return int(start + len(text[start:end].rstrip()))


def _line_end(text: str, place: int) -> int:
    """The end of the line, before its line break."""
    end = text.find("\n", place)
    end = len(text) if end < 0 else end
    return end - 1 if text[end - 1 : end] == "\r" and end > place else end


# -- writing values --------------------------------------------------------------------------------------------


class _Representer(RoundTripRepresenter):
    """Writes `null`, and texts of several lines in quotes; a class of its own, since DVC writes by ruamel's."""

    def represent_text(self, value: str) -> Node:
        return self.represent_scalar("tag:yaml.org,2002:str", value, style='"' if "\n" in value else None)


_Representer.add_representer(type(None), SafeRepresenter.represent_none)
_Representer.add_representer(str, _Representer.represent_text)


def _flow(value: Any) -> str:
    """A value within a line, where it may stand between brackets, too."""
    return _dump([_plain(value)], width=2**20, flow=True)[1:-2]


def _block(value: Any, indent: int) -> str:
    """Lines of a mapping or list, without the last line break."""
    parts = [_plain(item) for item in value] if isinstance(value, list) else _plain(value)
    lines = textwrap.dedent(_dump(parts)).splitlines()
    return "\n".join(" " * indent + line if line else line for line in lines)


def _plain(value: Any) -> Any:
    """A value without its former comments, in which lists without mappings are written within a line."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if not isinstance(value, list):
        return str(value) if isinstance(value, str) else value
    plain: Any = YAML().seq([_plain(inner) for inner in value])
    if not _needs_block(value):
        plain.fa.set_flow_style()
    return plain


def _dump(value: Any, *, width: int = WIDTH, flow: bool = False) -> str:
    yaml, stream = YAML(), io.StringIO()
    yaml.width, yaml.default_flow_style, yaml.Representer = width, flow, _Representer
    yaml.brace_single_entry_mapping_in_flow_sequence = True
    yaml.indent(mapping=STEP, sequence=2 * STEP, offset=STEP)
    yaml.dump(value, stream)
    return stream.getvalue()
