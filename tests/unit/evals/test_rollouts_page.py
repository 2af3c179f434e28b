"""The page of rollouts as a file: its data, untrusted text in it, and the detectors of each update."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import DataError
from tasks.evals.rollouts_page import render_page
from tests.support.rollouts import record, write_stage

HOSTILE = "</script><script>document.title = 'gone'</script><!-- <img src=x onerror=alert(1)> \u2028 & \" \\"


def data_of(page: str) -> list[dict[str, Any]]:
    """The data, read as a browser does: up to the first end tag."""
    text = page.partition('<script type="application/json" id="data">')[2].partition("</script")[0]
    found: list[dict[str, Any]] = json.loads(text)
    return found


def test_the_page_holds_the_records_as_they_were_written(tmp_path: Path) -> None:
    records = [record(sample=0), record(sample=1, tokens=(HOSTILE, "\n", "é")), record(2, prompt=HOSTILE)]
    folder = write_stage(tmp_path / "ppo", records)
    page = render_page({"ppo": folder}, HOSTILE, has_report=True)
    (stage,) = data_of(page)
    assert (stage["name"], stage["rollouts"]) == ("PPO", records)
    assert page.count("<script") == 2, "the data, and the page's own"
    assert page.count("</script") == 2
    assert "<img" not in page
    assert "<!--" not in page


def test_nothing_in_the_page_leads_out_of_it(tmp_path: Path) -> None:
    page = render_page({"ppo": write_stage(tmp_path, [record()])}, "", has_report=False)
    assert re.findall(r"(?:src|href)\s*=|url\(", page) == [], "without a report there is no link either"
    assert "default-src 'none'" in page
    assert "innerHTML" not in page


def test_the_detectors_of_each_update(tmp_path: Path) -> None:
    # It fires at 0.25 and above.
    folder = write_stage(tmp_path, [record()], truncation=(0.0, 0.25, 0.2, 0.5))
    (stage,) = data_of(render_page({"grpo": folder}, "", has_report=False))
    assert stage["fired"] == {"2": ["truncation"], "4": ["truncation"]}
    (finding,) = stage["findings"]
    assert (finding["detector"], finding["update"]) == ("truncation", 2)
    assert finding["text"].startswith("truncation 0.50 (threshold 0.25")


def test_without_rollouts_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").write_text("")  # a stage that is off
    for folders in ({"ppo": tmp_path}, {}):
        with pytest.raises(DataError, match="no rollouts are recorded here: `rlhf run`"):
            render_page(folders, "", has_report=False)
