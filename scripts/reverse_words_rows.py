"""Makes infra/presets/reverse_words.jsonl: lists of four words, and the same words in reverse order.

    python scripts/reverse_words_rows.py

The words are in 40 blocks of 20. Each row has words of one block, and `group` is that block. Rows of one group go
to one split, so no word of a test prompt is in a training prompt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "infra" / "presets" / "reverse_words.jsonl"
BLOCK, ROWS, WORDS = 20, 20, 4  # words and rows of a block, words of a row

# Frequent English words of one token in SmolLM2, in random order.
LEXICON = """
actual older figure format easy parts brain policy pick action simple tell visual easier novel ocean memory critic
mental role bridge draw saving lesson slow summer avoid motion choice code depend gift giving plain wind media rising
doubt grand women fewer walk heavy alert frame trust false crew youth held worse buried thick aside dose stage search
cash nerve left alone grade runs bare center worst meal little beyond hold sees love stock close pair notice live load
dream record strong limits drink dogs manner field smart indeed mood multi effort cheese crisis music logic finish
anger talk visit fair reason near went outer style tall farm emerge send legend break theme mouth enough appeal wonder
cool peace wrong skill salt black spot plenty short land large depth wars mouse bear skin wear task head invest rich
wife calm tiny cost aware cold video decide spirit single female aging roll works double luck debate full pray duty
catch steam rock giant advice ahead author friend yellow kept eating master combat rate scene movie phrase grab give
craft fluid green wanted favor happy honest sets relate hair brown ended gender goal side voice facing wait detail
heart house secret mother mask took bigger club drag waste foot begin text demand kind page hour share famous phone
image road warm strike latest event teeth wrote lower medium magic fine seek title vision adult charge source reveal
watch wide soul taking mess formed train legacy town random intent fall aged happen sleep young urban carry door fault
globe except remain subtle plot issue king leave store whole swim paint severe places legal milk hall fail hope relief
winter length least rest ready market blue couple award answer dance told lock chief expect gentle sharp ethics force
county blank rank ground sick basic touch rose former wise boat metal meant earth coffee shut spent manage border
super alive proud doing anti member block beings bright case convey father city extent saying burn labor next sense
grew ethnic away sound tale reach silver laid nation writer arts stake card heat allows sand pace making horse inject
settle eager lies entry quick risk aims sudden today losing vital stroke room twice peak reduce clean haven film
nature dish ends agent stay lots grown unable root spring square night exist money layers spread target pure week
apart river thesis photo enjoy bodies inner police minute prefer sugar fourth suffer poetry poor middle bone huge
major adds decade inside artist orange score solid dense meat blow period maybe tone brand east range offer rules
price color flat white grant fight bottom ship twenty ways suit bond sure prey quiet stuff hole amount never series
handle proof idea grace trial crack wall smooth camp step object worked drawn area stick sport order trace flow taken
earn thank hidden fast beauty check feat built boys strain date team dark teach future behind candid race serve fresh
space flash rent danger days driven assume tight line shape post prove book felt bound notion parent final push excess
tried sweet save harsh screen desire piece teen factor woman board angle poem auto rapid budget fish almost came
unique second mind soon spin mild divide size ears lack upper coming below note latter weight fabric news minor rise
jump acting realm shock genre living snow broad serial empty meet weak late baby corner sell recent brief cover tool
focus entire third nice true wisdom born path alike miss given bill soft rare free broken equal tour mature wave
animal spend wants game foster cheap paid wooden matter hard review court local host along mere grasp park raise once
eyes fire adding south office core come aspect thin west worth ideal degree lost scope prime pool accept face appear
deal ring stop deep escape front season mill please since term story course hybrid shop modern travel breath remote
extra table times forth island enter zone argue floor noise think topic ease track pretty drive claims usual museum
camera letter window past cast cross forget aimed seem chosen truth pain street paying caught status hurt placed wish
gold band hear feet spark seeing safe impact wood chain total half icon vast guess chick rice scale always resist able
drop glass acute script bring either rural nose credit above chance chest ages ball thing girl string star trying
stone press sight party hero listen fellow fear planet threat finds lose beat fill seat moving sent moment honor wild
word fest pull song ignore copy knows pack wound tend faith speak mixed heaven battle base acts dress tough remind
theory tick engage turn taste button across value view basis regard trip added divine choose rain brow group sister
gone round male cause match loss kids church blind edge worry busy moral needed device paper twist zero clear
"""


def rows() -> Iterator[dict[str, str]]:
    """Rows of each block, from one seed."""
    source, words = random.Random(0), LEXICON.split()
    for start in range(0, len(words), BLOCK):
        for _ in range(ROWS):
            chosen = source.sample(words[start : start + BLOCK], WORDS)
            yield {
                "group": f"block {start // BLOCK}",
                "words": " ".join(chosen),
                "reversed": " ".join(reversed(chosen)),
            }


def main() -> None:
    made = list(rows())
    FILE.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8", newline="\n")
    print(f"{len(made)} rows in {FILE}")


if __name__ == "__main__":
    main()
