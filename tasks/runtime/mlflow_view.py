"""The saved view in which MLflow's page compares pipelines: a column or a chart for each number that matters.

MLflow's page keeps such views in tags of the experiment; the format is that of its version 3.17. People can change the
view there, so a new version of it needs a new key.
"""

import json
from typing import Any

__all__ = ["VIEW_TAG", "pipelines_view", "view_path"]

KEY = "pipelines"
VIEW_TAG = f"mlflow.sharedViewState.{KEY}"

POLICIES = ("ppo", "grpo", "dpo")
COLUMNS = (
    *(f"metrics.`evaluate.{policy}.{metric}`" for policy in POLICIES for metric in ("win_rate", "kl")),
    "tags.`rlhf.why`",
)
SECTIONS = {
    "Win rate over SFT by the gold judge": [("BAR", f"evaluate.{policy}.win_rate") for policy in POLICIES],
    **{
        title: [("LINE", f"{stage}/{metric}") for stage in ("ppo", "grpo")]
        for title, metric in {
            "Reward": "reward",
            "KL to SFT, nats": "kl",
            "Entropy": "entropy",
            "Tokens": "length",
        }.items()
    },
    "Loss": [("LINE", f"{stage}/loss") for stage in ("sft", "reward_model", "dpo")],
}
LINE = {"lineSmoothness": 0, "xAxisKey": "step", "selectedXAxisMetricKey": ""}


def view_path(experiment: str) -> str:
    """The address of the view on MLflow's page."""
    return f"/#/experiments/{experiment}/runs?viewStateShareKey={KEY}&compareRunsMode=CHART"


def pipelines_view() -> str:
    """The value of the tag."""
    state = {
        "searchFilter": "", "orderByKey": "attributes.start_time", "orderByAsc": False, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
        "selectedColumns": COLUMNS, "columnOrder": [], "columnWidths": {}, "runsHiddenMode": "FIRST_10_RUNS",
        "compareRunSections": [_part(title, name=title, display=True, isReordered=True) for title in SECTIONS],
        "compareRunCharts": [_chart(*chart, title) for title, charts in SECTIONS.items() for chart in charts],
        "isAccordionReordered": True, "viewMaximized": False, "runListHidden": False, "hideEmptyCharts": True,
        "useGroupedValuesInCharts": True, "groupBy": None, "groupsExpanded": {}, "globalLineChartConfig": LINE,
    }  # fmt: skip
    return json.dumps({"name": "Pipelines", "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def _chart(kind: str, metric: str, section: str) -> dict[str, Any]:
    line = {
        **LINE, "selectedMetricKeys": [metric], "xAxisScaleType": "linear", "scaleType": "linear", "range": {},
        "yAxisKey": "metric", "yAxisExpressions": [], "ignoreOutliers": False, "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }  # fmt: skip
    own = line if kind == "LINE" else {}
    return _part(metric, type=kind, runsCountToCompare=10, metricSectionId=section, metricKey=metric, **own)


def _part(uuid: str, **settings: Any) -> dict[str, Any]:
    return {"uuid": uuid, "deleted": False, "isGenerated": False, **settings}
