"""Saves labels until it is killed, and prints the token of each one that counts as saved: the database's URL."""

import sys
from itertools import count

from tasks.labelling.labels import Label
from tasks.labelling.store import LabelStore
from tests.support.labels import make_question, token


def main(url: str) -> None:
    store = LabelStore(url)
    store.add_labeller("ann", "hash")
    for number in count():
        store.add_questions([make_question(f"item{number}")])
        mark = token()
        store.save_label(Label(f"item{number}", "ann", "a"), token=mark, previous_event=0)
        print(mark, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
