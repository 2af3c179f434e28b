"""Labels by a model in a process of its own, so that it can be killed: database, address of the judge, project."""

import sys
from pathlib import Path

from tasks.config.evaluation import JudgeParams
from tasks.evals.llm_judge import EndpointJudge, JudgeCache
from tasks.labelling.ai_labels import Budget, Constitution, auto_label
from tasks.labelling.store import LabelStore


def main(database: str, base_url: str, folder: Path) -> None:
    params = JudgeParams(kind="endpoint", model="strong", base_url=base_url, prompts=1)
    judge = EndpointJudge(params, JudgeCache(folder / "answers.jsonl"))
    auto_label(LabelStore(database), judge, Constitution("Be kind.", "kind"), budget=Budget(1000, 10**6))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
