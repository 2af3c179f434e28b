from pathlib import Path

import pytest

from tasks.core.rows import write_json
from tasks.evals.report import SourceInfo, collect_sources

MODEL = {"source": "PyPI package m==1", "licence": "Apache-2.0", "parameters": 134515008, "sha256": "a" * 64}


def test_the_model_comes_first_then_the_sources_by_name(tmp_path: Path) -> None:
    write_json(tmp_path / "card.json", MODEL)
    for name in ("b", "a"):
        card = {
            "name": name,
            "source": f"file {name}",
            "licence": "unknown",
            "rows": 10605,
            "sha256_of_rows": name * 64,
        }
        write_json(tmp_path / "cards" / f"{name}.json", card)
    assert collect_sources(tmp_path, tmp_path) == [
        SourceInfo("Base model", "PyPI package m==1", "Apache-2.0", "134,515,008 parameters", "a" * 16),
        SourceInfo("Data: a", "file a", "", "10,605 rows", "a" * 16),
        SourceInfo("Data: b", "file b", "", "10,605 rows", "b" * 16),
    ]


@pytest.mark.parametrize(("key", "digest"), [("sha256_of_weights", "b" * 16), ("commit", "b" * 16), ("other", "")])
def test_the_digest_depends_on_where_the_model_is_from(tmp_path: Path, key: str, digest: str) -> None:
    write_json(tmp_path / "card.json", {k: v for k, v in MODEL.items() if k != "sha256"} | {key: "b" * 40})
    assert collect_sources(tmp_path, tmp_path)[0].digest == digest
