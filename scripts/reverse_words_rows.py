"""Makes infra/presets/reverse_words.jsonl: lists of five words of one theme, and the same words in reverse order.

    python scripts/reverse_words_rows.py

`group` is the theme of a row. No word is in two themes, and rows of one theme go to one split, so no word of a test
prompt is in a training prompt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "infra" / "presets" / "reverse_words.jsonl"
ROWS, WORDS = 48, 5  # of a theme, of a row

THEMES: dict[str, str] = {
    "animals": "dog cat horse cow pig sheep goat lion tiger bear wolf fox",
    "body": "hand foot head arm leg eye ear nose mouth knee heart bone",
    "clothes": "shirt shoe hat coat dress sock glove belt scarf boot jacket pants",
    "colours": "red blue green yellow black white brown pink purple gray gold silver",
    "food": "bread cheese butter rice soup meat egg salt sugar honey pasta cake",
    "fruit": "apple lemon orange grape peach cherry banana melon plum pear berry mango",
    "house": "door window roof floor wall kitchen garden table chair bed lamp mirror",
    "materials": "iron steel copper stone glass wood plastic cotton leather rubber brick sand",
    "music": "song drum guitar piano violin dance concert band singer tune flute horn",
    "nature": "tree flower grass river lake mountain forest island beach desert valley hill",
    "people": "king queen doctor nurse farmer soldier artist writer lawyer judge pilot sailor",
    "school": "book pen paper teacher student lesson test desk class exam essay grade",
    "sport": "ball game race team goal coach player match medal prize tennis golf",
    "travel": "car train bus plane boat ship road bridge station ticket map hotel",
    "weather": "rain snow wind storm cloud sun ice fog heat cold thunder frost",
    "work": "job office boss money bank market shop factory tool engine machine wallet",
}


def rows() -> Iterator[dict[str, str]]:
    """Rows of each theme, from one seed."""
    source = random.Random(0)
    for theme, words in THEMES.items():
        for _ in range(ROWS):
            chosen = source.sample(words.split(), WORDS)
            yield {"group": theme, "words": " ".join(chosen), "reversed": " ".join(reversed(chosen))}


def main() -> None:
    made = list(rows())
    FILE.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8", newline="\n")
    print(f"{len(made)} rows in {FILE}")


if __name__ == "__main__":
    main()
