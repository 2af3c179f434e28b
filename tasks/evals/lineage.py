"""What an evaluation was made from, as the cards of the base model and of the data tell it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SourceInfo", "collect_sources"]


@dataclass(frozen=True)
class SourceInfo:
    """The base model, or one source of rows.

    Attributes:
        licence: "" where nobody recorded it.
        size: of what, as a reader counts it.
        digest: the first 16 characters of what tells this version from another; "" where there is nothing.
    """

    name: str
    source: str
    licence: str
    size: str
    digest: str


def collect_sources(base_model: Path, collect: Path) -> list[SourceInfo]:
    """The base model, then the sources in the order of their names; the arguments are the folders of those stages."""
    card = _read_card(base_model / "card.json")
    sources = [_read_card(path) for path in sorted((collect / "cards").glob("*.json"))]
    return [_model_source(card), *[_data_source(card) for card in sources]]


def _model_source(card: Mapping[str, Any]) -> SourceInfo:
    digests = (card[key] for key in ("sha256", "sha256_of_weights", "commit") if key in card)
    size = f"{card['parameters']:,} parameters"
    return SourceInfo("Base model", card["source"], _licence(card), size, next(digests, "")[:16])


def _data_source(card: Mapping[str, Any]) -> SourceInfo:
    size = f"{card['rows']:,} rows"
    return SourceInfo(f"Data: {card['name']}", card["source"], _licence(card), size, card["sha256_of_rows"][:16])


def _licence(card: Mapping[str, Any]) -> str:
    licence = str(card["licence"])
    return "" if licence == "unknown" else licence


def _read_card(path: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card
