"""The reader of the film-review archive, on small archives of the same make."""

import io
import tarfile
from pathlib import Path

import pytest

from tasks.core.errors import SourceError
from tasks.data.film_reviews import INNER, RATINGS, TEXTS, clean_text, read_film_reviews


def packed(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def sdist(folder: Path, texts: bytes, ratings: bytes, **others: bytes) -> Path:
    path = folder / "package-1.0.tar.gz"
    inner = packed({TEXTS: texts, RATINGS: ratings, **others})
    path.write_bytes(packed({f"package-1.0/{INNER}": inner, "package-1.0/setup.py": b"raise SystemExit"}))
    return path


def test_texts_and_ratings_are_joined_whatever_their_encoding_and_line_ends(tmp_path: Path) -> None:
    texts = "1\t1.5\tA caf\xe9 film.\r\n".encode("latin-1") + "2\t-2.0\tNo château.".encode()
    ratings = b"1\t1.5\t0.5\t[1, 2]\r\n2\t-2.0\t0.0\t[-2, -2, -2]\n"
    rows = list(read_film_reviews(sdist(tmp_path, texts, ratings)))
    assert rows == [
        (1, {"id": "1", "group": "batch-1", "text": "A café film.", "ratings": [1.0, 2.0]}),
        (2, {"id": "2", "group": "batch-1", "text": "No château.", "ratings": [-2.0, -2.0, -2.0]}),
    ]


def test_thirty_sentences_in_a_row_share_their_raters(tmp_path: Path) -> None:
    texts = "".join(f"{number}\t1\tText {number}.\n" for number in range(61))
    ratings = "".join(f"{number}\t1\t0\t[1, 1]\n" for number in range(61))
    groups = [row["group"] for _, row in read_film_reviews(sdist(tmp_path, texts.encode(), ratings.encode()))]
    assert groups == ["batch-1"] * 30 + ["batch-2"] * 30 + ["batch-3"]


def test_a_member_that_would_leave_the_folder_is_never_written(tmp_path: Path) -> None:
    path = sdist(tmp_path, b"1\t1\ta\n", b"1\t1\t0\t[1]\n", **{"../../escaped": b"x", "/tmp/rlhf-escaped": b"x"})
    assert len(list(read_film_reviews(path))) == 1
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        (b"1\t1\t0\t[3, 3]\n", "with mean 1 stands beside ratings of 1 with a mean off by 2.0000"),
        (b"7\t1\t0\t[1, 1]\n", "stands beside ratings of 7"),
        (b"1\t1\t0\t[]\n", "GroundTruth.txt:1: not in the expected form"),
        (b"1\t1\t0\n", "not in the expected form"),
        (b"1\t1\t0\t[1]\n2\t1\t0\t[1]\n", "1 texts but 2 lists of ratings"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, ratings: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message.replace("[", r"\[")):
        list(read_film_reviews(sdist(tmp_path, b"1\t1\tA film.\n", ratings)))


def test_a_package_without_the_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other-1.0.tar.gz"
    path.write_bytes(packed({"other-1.0/setup.py": b""}))
    with pytest.raises(SourceError, match=f"other-1.0.tar.gz holds no file {INNER}"):
        list(read_film_reviews(path))


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("''Memento'' is  good", '"Memento" is good'),
        ("Lovely &amp; Amazing", "Lovely & Amazing"),
        ("Lovely &amp;amp; Amazing", "Lovely & Amazing"),
        ("friends    and foes    meet", "friends – and foes – meet"),
        ("''a whole quotation''", "a whole quotation"),
        ("'a whole quotation'", "a whole quotation"),
        ("''Lilo'' and ''Stitch''", '"Lilo" and "Stitch"'),
        ("the `new' and the ‘old’", "the 'new' and the 'old'"),
        ("'tis the season", "'tis the season"),
    ],
)
def test_artefacts_of_the_export_are_undone(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean
