"""The film-review sentences of Hutto & Gilbert (2014), each with every single human rating.

C. J. Hutto and E. Gilbert, "VADER: a parsimonious rule-based model for sentiment analysis of social media text",
ICWSM 2014. The archive lies inside the source distribution of vaderSentiment (MIT). Two files go together line by line:
`…_GroundTruth.txt` holds id, mean, text; `…_anonDataRatings.txt` holds id, mean, deviation, [ratings −4 … +4].
Only the two members are read, in memory; nothing is unpacked or run.

Every 30 lines were rated by the same people in the same order: within such a batch the k-th ratings of two sentences
deviate alike from the sentences' means (correlation 0.277; 0.000 with ratings in random order), across two batches they
do not (0.001). So the rows of a batch share a `group`: prepare then gives each batch to one split, and to one of reward
model and gold judge, so that neither reads ratings that the other's raters gave in that batch.
"""

import html
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tasks.core.errors import SourceError

__all__ = ["clean_text", "read_film_reviews"]

INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
TEXTS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt"

BATCH = 30  # sentences that the same people rated

# The published means have nine or more decimals; a larger gap means that the files do not belong together.
_MEAN_TOLERANCE = 1e-4


def read_film_reviews(sdist: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Line number in the text file, and the row {id, group, text, ratings}, for every sentence.

    Raises:
        SourceError: a member is missing, the two files disagree, or a line is not in the described form.
    """
    with tarfile.open(sdist) as outer:
        names = [member.name for member in outer.getmembers() if member.name.endswith(INNER)]
        inner = _member(outer, names[0] if names else INNER, sdist.name)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        texts = _lines(_member(archive, TEXTS, sdist.name))
        ratings = _lines(_member(archive, RATINGS, sdist.name))
    if len(texts) != len(ratings):
        raise SourceError(f"{sdist.name}: {len(texts)} texts but {len(ratings)} lists of ratings; fetch it again")
    for line, (text, rated) in enumerate(zip(texts, ratings, strict=True), start=1):
        batch = f"batch-{(line - 1) // BATCH + 1}"
        yield line, {"group": batch, **_row(text, rated, f"{Path(TEXTS).name}:{line}")}


def clean_text(text: str) -> str:
    """Repair what the corpus's export did to the text.

    Entities become characters; two apostrophes were a quotation mark; a dash between words was lost and left three or
    more spaces; quotation marks around the whole sentence say nothing.
    """
    text = html.unescape(html.unescape(text)).replace("''", '"').translate(str.maketrans("’‘`", "'''"))
    text = re.sub(r"(?<=\S)\s{3,}(?=\S)", " – ", text)
    text = " ".join(text.split())
    for mark in ('"', "'"):
        if text.startswith(mark) and text.endswith(mark) and text.count(mark) == 2 and len(text) > 2:
            text = text[1:-1].strip()
    return text


def _row(text: str, rated: str, where: str) -> dict[str, object]:
    try:
        number, mean, sentence = text.split("\t")
        same_number, _, _, listed = rated.split("\t")
        ratings = [float(value) for value in json.loads(listed)]
        gap = abs(sum(ratings) / len(ratings) - float(mean))
    except (ValueError, ZeroDivisionError, TypeError) as error:
        raise SourceError(f"{where}: not in the expected form ({error}): {text[:80]!r}; pin another version") from error
    if number != same_number or gap > _MEAN_TOLERANCE:
        raise SourceError(
            f"{where}: text {number} with mean {mean} stands beside ratings of {same_number} with a mean off by "
            f"{gap:.4f}: the two files do not belong together; pin another version"
        )
    return {"id": number, "text": clean_text(sentence), "ratings": ratings}


def _lines(content: bytes) -> list[str]:
    return [_decode(line.rstrip(b"\r")) for line in content.split(b"\n") if line.strip()]


def _decode(line: bytes) -> str:
    """A line is UTF-8, or else what Windows wrote."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace")


def _member(archive: tarfile.TarFile, name: str, where: str) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise SourceError(f"{where} holds no file {name}; pin the version that the default params.yaml names")
    return file.read()
