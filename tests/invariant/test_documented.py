"""What training measures and what its algorithms offer stands in docs/ppo.md, detectors in docs/reward-hacking.md."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin

import pytest

from tasks.config.rl import GRPOParams, PPOParams, RLParams
from tests.conftest import ROOT
from tests.support.tiny_trainer import GRPO_PARAMS, PARAMS, trainer

DETECTORS_PAGE = (ROOT / "docs" / "reward-hacking.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")


def documented_metrics() -> list[str]:
    """Regular expressions of the names in the first column of the table of metrics."""
    table = PAGE.partition("| metric | meaning |")[2].partition("\n\n")[0]
    spans = re.findall(r"`([^`]+)`", " ".join(row.split("|")[1] for row in table.splitlines()[2:]))
    return [re.sub(r"<\w+>|…", ".+", re.escape(span).replace(r"\<", "<").replace(r"\>", ">")) for span in spans]


@pytest.mark.parametrize("params", [PARAMS, GRPO_PARAMS], ids=["ppo", "grpo"])
def test_every_metric_of_an_update_has_a_row(params: RLParams) -> None:
    done = trainer(params, updates=1)
    done.train()
    known = documented_metrics()
    names = set(done.history[0]) - {"step", "update"}
    assert len(names) > 20
    detectors = [name for name in names if name.startswith("hacking/")]
    assert [name for name in detectors if f"`{name.removeprefix('hacking/')}`" not in DETECTORS_PAGE] == []
    missing = sorted(names - {name for name in names for pattern in known if re.fullmatch(pattern, name)})
    missing = [name for name in missing if name not in detectors]
    assert missing == [], f"add a row for {missing} to the table of metrics in docs/ppo.md"


@pytest.mark.parametrize("params", [PPOParams, GRPOParams])
def test_every_variant_of_an_algorithm_is_described(params: type[RLParams]) -> None:
    for name, field in params.model_fields.items():
        kind: Any = field.annotation
        for value in get_args(kind) if get_origin(kind) is Literal else ():
            key = f"{params.stage}.{name}"
            assert re.search(rf"\b{value}\b", PAGE), f"add a row for {key}: {value} to docs/ppo.md"
