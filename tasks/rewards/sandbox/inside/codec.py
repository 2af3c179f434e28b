"""Codec for plain data between processes that do not trust each other: tagged text in length-prefixed frames.

Not pickle, whose reader runs code, and not JSON, whose import takes as long as the start of Python: 8 ms.

    n t f        None, True, False           i<hex>;  d<hex>;  c<hex>,<hex>;   int, float, complex
    s<n>: b<n>:  str (UTF-8), bytes          l<n>: u<n>: x<n>: z<n>: m<n>:     list, tuple, set, frozenset, dict

Reading yields exact builtin types: a subclass with its own `__eq__` arrives as what it is made of.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as in `typing`, whose import takes as long as a third of Python's start
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

__all__ = ["MessageTooLargeError", "UnsupportedTypeError", "decode", "encode", "read_frame", "write_frame"]

MAX_DEPTH = 64  # containers within containers: what tests compare is flat, and reading is recursive
_HEADER_BYTES = 4
_CHUNK_BYTES = 1 << 16  # capacity of a pipe
_CONSTANTS = {b"n": None, b"t": True, b"f": False}
_CONTAINERS: dict[bytes, Any] = {b"l": list, b"u": tuple, b"x": set, b"z": frozenset}


class UnsupportedTypeError(ValueError):
    """A value that is no plain data, or bytes that are no value."""


class MessageTooLargeError(ValueError):
    """A value whose text is longer than agreed."""


def encode(value: object, limit: int) -> bytes:
    """Encode the value.

    Raises:
        UnsupportedTypeError: part of it is no plain data, or lies too deep.
        MessageTooLargeError: it takes more than `limit` bytes.
    """
    writer = _Writer(limit)
    writer.write(value, MAX_DEPTH)
    return b"".join(writer.parts)


def decode(text: bytes) -> object:
    """Decode an untrusted text.

    Raises:
        UnsupportedTypeError: it is no value.
    """
    reader = _Reader(text)
    try:
        value = reader.value(MAX_DEPTH)
    except (ValueError, TypeError, OverflowError) as error:  # also bad UTF-8, and lists among keys
        raise UnsupportedTypeError(str(error)) from error
    if reader.position != len(text):
        raise UnsupportedTypeError("more than one value")
    return value


def write_frame(channel: int, text: bytes) -> None:
    """Write one frame."""
    rest = memoryview(len(text).to_bytes(_HEADER_BYTES, "big") + text)
    while rest:
        rest = rest[os.write(channel, rest[:_CHUNK_BYTES]) :]


def read_frame(channel: int, limit: int) -> bytes | None:
    """Read the next text; None where the other side has ended.

    Raises:
        MessageTooLargeError: its header is over `limit`.
    """
    header = _read_exactly(channel, _HEADER_BYTES)
    if header is None:
        return None
    length = int.from_bytes(header, "big")
    if length > limit:
        raise MessageTooLargeError(f"{length} bytes")
    return _read_exactly(channel, length)


def _read_exactly(channel: int, length: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < length:
        if not (part := os.read(channel, min(length - len(parts), _CHUNK_BYTES))):
            return None
        parts += part
    return bytes(parts)


class _Writer:
    """Methods of the base types are called on the class: a subclass cannot lie about what it holds."""

    def __init__(self, limit: int) -> None:
        self.parts: list[bytes] = []
        self._remaining = limit

    def write(self, value: Any, depth: int) -> None:
        if depth < 0:
            raise UnsupportedTypeError("a value nested too deeply")
        if value is None or isinstance(value, bool):
            self._put(b"n" if value is None else b"t" if value else b"f")
        elif isinstance(value, int):
            self._check(int.bit_length(value) // 4)
            self._put(b"i%s;" % int.__format__(value, "x").encode())
        elif isinstance(value, float):
            self._put(b"d%s;" % float.hex(value).encode())
        elif isinstance(value, str):
            self._check(str.__len__(value))
            self._put_sized(b"s", str.encode(value, "utf-8", "surrogatepass"))
        elif isinstance(value, bytes):
            self._put_sized(b"b", bytes.__getitem__(value, slice(None)))
        elif isinstance(value, complex):
            self._put(b"c%s,%s;" % (value.real.hex().encode(), value.imag.hex().encode()))
        else:
            self._write_container(value, depth)

    def _write_container(self, value: Any, depth: int) -> None:
        items: Iterable[object]
        if isinstance(value, dict):
            self._put(b"m%d:" % dict.__len__(value))
            items = (part for pair in dict.items(value) for part in pair)
        else:
            tag, kind = next((pair for pair in _CONTAINERS.items() if isinstance(value, pair[1])), (b"", None))
            if kind is None:
                raise UnsupportedTypeError(f"a value of type {type(value).__name__}")
            self._put(tag + b"%d:" % kind.__len__(value))
            items = kind.__iter__(value)
        for item in items:
            self.write(item, depth - 1)

    def _put_sized(self, tag: bytes, content: bytes) -> None:
        self._put(b"%s%d:%s" % (tag, len(content), content))

    def _put(self, text: bytes) -> None:
        self._check(len(text))
        self._remaining -= len(text)
        self.parts.append(text)

    def _check(self, length: int) -> None:
        if length > self._remaining:
            raise MessageTooLargeError("a value that is too large")


class _Reader:
    def __init__(self, text: bytes) -> None:
        self._text = text
        self.position = 0

    def value(self, depth: int) -> object:
        if depth < 0:
            raise UnsupportedTypeError("nested too deeply")
        tag = self._take(1)
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag == b"i":
            return int(self._until(b";"), 16)
        if tag == b"d":
            return float.fromhex(self._until(b";").decode())
        if tag == b"c":
            real, imaginary = self._until(b";").decode().split(",")
            return complex(float.fromhex(real), float.fromhex(imaginary))
        if tag == b"s":
            return self._take(self._count()).decode("utf-8", "surrogatepass")
        if tag == b"b":
            return self._take(self._count())
        return self._container(tag, depth)

    def _container(self, tag: bytes, depth: int) -> object:
        if tag == b"m":
            return {self.value(depth - 1): self.value(depth - 1) for _ in range(self._count())}
        if tag not in _CONTAINERS:
            raise UnsupportedTypeError(f"no tag {tag!r}")
        return _CONTAINERS[tag](self.value(depth - 1) for _ in range(self._count()))

    def _count(self) -> int:
        return int(self._until(b":"))

    def _until(self, end: bytes) -> bytes:
        stop = self._text.find(end, self.position)
        if stop < 0:
            raise UnsupportedTypeError(f"no {end!r}")
        found = self._text[self.position : stop]
        self.position = stop + 1
        return found

    def _take(self, length: int) -> bytes:
        if length < 0 or self.position + length > len(self._text):
            raise UnsupportedTypeError("cut short")
        found = self._text[self.position : self.position + length]
        self.position += length
        return found
