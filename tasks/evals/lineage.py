"""Sources of an evaluation: the base model and the data, read from their cards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SourceInfo", "collect_sources"]


@dataclass(frozen=True)
class SourceInfo:
    """Base model or data source.

    Attributes:
        licence: "" if it was not recorded.
        size: number of parameters or rows, with the unit.
        digest: first 16 characters of a hash that identifies this version; "" if there is none.
    """

    name: str
    source: str
    licence: str
    size: str
    digest: str


def collect_sources(base_model: Path, collect: Path) -> list[SourceInfo]:
    """Collect the base model, then the data sources by name; the arguments are the folders of those stages."""
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
