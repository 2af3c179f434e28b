"""Labels by a model in a process of its own, so that it can be killed: database, address of the judge, project."""

from __future__ import annotations

import sys
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from tasks.config.evaluation import JudgeParams
from tasks.evals.llm_judge import EndpointJudge
from tasks.labelling.feedback import Budget, Constitution, CountingBook, label_by_model


def main(database: str, base_url: str, folder: Path) -> None:
    params = JudgeParams(kind="endpoint", model="strong", base_url=base_url, prompts=1)
    book = CountingBook(folder / "answers.jsonl")
    with Session(create_engine(database)) as session:
        label_by_model(
            session,
            EndpointJudge(params, book),
            Constitution("Be kind.", "kind"),
            cost=book.cost,
            budget=Budget(1000, 10**6),
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
