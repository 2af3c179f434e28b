"""The commands of `rlhf label`, from the pairs of a small policy to preferences that the pipeline reads."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from flows.cli import console, labels
from tasks.config.data import SourceParams
from tasks.core.errors import ConfigError, DataError
from tasks.core.rows import Preference, read_rows
from tasks.data.sources import READERS, collect_source
from tasks.evals import llm_judge
from tasks.evals.pairwise import Cost, Reply
from tasks.labelling import pairs, quality
from tasks.labelling.labels import Label, Question, pseudonym
from tasks.labelling.pairs import PolicyResponse
from tasks.labelling.quality import LabelSummary
from tasks.labelling.store import LabelStore
from tests.conftest import SHIPPED_PARAMS
from tests.support.chat_server import longer, serving
from tests.support.labels import insert_label, make_question

ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., str]


@pytest.fixture
def project(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with an SFT model, PPO and prompts; no server is up."""
    shutil.copytree(parts, tmp_path / "artifacts")
    shutil.copy(SHIPPED_PARAMS, tmp_path)
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.setenv("RLHF_ROOT", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(labels, "enter_project", lambda: tmp_path)
    monkeypatch.setattr(labels, "enter_project_with_services", lambda: tmp_path)
    monkeypatch.setattr(labels, "announce_labels", lambda: console.console.print("it would be announced"))
    return tmp_path


@pytest.fixture
def rlhf(project: Path) -> Run:
    def run(*words: str) -> str:
        done = CliRunner().invoke(labels.app, list(words), env={"COLUMNS": "200"})
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    return run


def opened(project: Path) -> closing[LabelStore]:
    return closing(LabelStore(f"sqlite:///{project / '.rlhf' / 'labels.db'}"))


def test_pairs_of_policies_are_added_once(rlhf: Run, project: Path) -> None:
    assert "4 pairs to label added, 0 were there already" in rlhf("sample", "--pairs", "4", "--overlap", "1")
    assert "0 pairs to label added, 4 were there already" in rlhf("sample", "--pairs", "4", "--overlap", "1")
    assert "4 of them were there with another known answer, or wanting another number" in rlhf("sample", "--pairs", "4")
    with opened(project) as store:
        asked = store.questions()
    assert len({item.prompt for item in asked}) == 4, "a prompt came twice while others waited"
    assert {item.prompt for item in asked} <= set("abcdefgh")
    assert {policy for item in asked for policy in (item.policy_a, item.policy_b)} <= {"sft", "ppo"}
    assert all(item.response_a.strip() != item.response_b.strip() for item in asked)
    assert {item.labels_wanted for item in asked} == {2}
    rlhf("sample", "--pairs", "2", "--from", "ppo", "--seed", "1")
    with opened(project) as store:
        new = [item for item in store.questions() if item not in asked]
    assert {policy for item in new for policy in (item.policy_a, item.policy_b)} == {"ppo"}


def test_a_response_with_a_nul_is_skipped_and_counted(
    rlhf: Run, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampled(*words: object, **options: object) -> dict[str, list[PolicyResponse]]:
        responses = written(*words, **options)  # type: ignore[arg-type]
        first = next(iter(responses))
        responses[first] = [PolicyResponse("sft", " a\0"), *responses[first]]
        return responses

    written = pairs.sample_responses
    monkeypatch.setattr(pairs, "sample_responses", sampled)
    output = rlhf("sample", "--pairs", "4")
    assert "1 responses skipped: response: holds a NUL character" in output
    assert "4 pairs to label added" in output


def test_a_destroyed_database_is_restored(rlhf: Run, project: Path) -> None:
    rlhf("sample", "--pairs", "3")
    label(project, ann="a")
    assert "is whole, and lacks nothing that its copy holds; nothing was restored" in rlhf("restore")
    before = rlhf("report", "--json")
    file = project / ".rlhf" / "labels.db"
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"0 bytes.*`rlhf label restore`"):
        rlhf("report")
    with (project / ".rlhf" / "labels.db.jsonl").open("a") as copy:
        copy.write("torn")
    output = rlhf("restore")
    assert "restored: events 3, guidelines 0, labellers 1, questions 3" in output
    assert "1 lines of the copy could not be read" in output
    assert f"the old database is in {project / '.rlhf' / 'labels.db.old-1'}" in " ".join(output.split())
    assert rlhf("report", "--json") == before


def test_a_server_has_no_copy_to_restore_from(rlhf: Run) -> None:
    with pytest.raises(ConfigError, match="PostgreSQL has backups of its own"):
        rlhf("restore", "--database", "postgresql://localhost/labels")


def test_the_report_explains_that_alpha_needs_two_and_names_its_labeller_as_the_page_does(
    rlhf: Run, project: Path
) -> None:
    assert f"in reports and exports: {pseudonym('ann')}" in rlhf("add", "ann")
    rlhf("sample", "--pairs", "2")
    label(project, ann="a")
    output = rlhf("report")
    assert "alpha –, for it compares labellers, so it needs two, and there is one" in output
    assert pseudonym("ann") in output
    assert "The labelling page tells each labeller hers" in (project / ".rlhf" / "labels.html").read_text()


def test_policies_are_ranked_by_people(rlhf: Run, project: Path) -> None:
    """PPO wins every pair, so that no finite number of points says how much better it is."""
    rlhf("sample", "--pairs", "3", "--by", "ranking")
    with opened(project) as store:
        for item in store.questions():
            store.save_label(Label(item.id, "ann", "a" if item.policy_a == "ppo" else "b"))
    table = rlhf("report").partition("Policies, by people")[2]
    assert re.search(r"ppo +3 +100% \(100% – 100%\) +∞ \(∞ – ∞\)", table)
    assert re.search(r"sft +3 +– +0 \(0 – 0\)", table)
    best = json.loads(rlhf("report", "--json"), parse_constant=pytest.fail)["ranking"][0]
    assert (best["policy"], best["elo"]["mean"]) == ("ppo", "Infinity")
    page = (project / ".rlhf" / "labels.html").read_text()
    assert "<td>100% (100% – 100%)</td><td>∞ (∞ – ∞)</td>" in page


def test_what_cannot_be_sampled_is_one_message(rlhf: Run, project: Path) -> None:
    with pytest.raises(ConfigError, match=r"--from: no policy dpo in .*; there are: ppo, sft"):
        rlhf("sample", "--pairs", "1", "--from", "ppo,dpo")
    with pytest.raises(ConfigError, match=r"at least two members: .*reward_model\.ensemble_size=3"):
        rlhf("sample", "--pairs", "1", "--by", "disagreement")
    with pytest.raises(DataError, match="pairs to choose from, not 1000"):
        rlhf("sample", "--pairs", "1000")
    assert not (project / ".rlhf" / "labels.db").exists()


def label(project: Path, **choices: str) -> None:
    with opened(project) as store:
        for item in store.questions():
            for labeller, choice in choices.items():
                store.save_label(Label(item.id, labeller, choice))


def test_labels_become_a_source_of_preferences(rlhf: Run, project: Path) -> None:
    rlhf("sample", "--pairs", "4")
    label(project, ann="a", bob="b")
    out = project / "data" / "labels" / "preferences.jsonl"
    output = rlhf("export")
    assert "8 preferences of 4 labelled questions" in output
    assert "questions on which labellers differ: 4" in output
    assert "it would be announced" in output
    first = out.read_bytes()
    assert "announced" not in rlhf("export"), "nothing changed"
    assert out.read_bytes() == first
    card = json.loads((out.parent / "preferences.card.json").read_text())
    assert (card["rows"], card["labels"]) == (8, {"people": 8, "models": 0})
    source = SourceParams(name="labels", kind="local", row_type="preferences", id="data/labels/preferences.jsonl")
    collected = collect_source(source, 0, READERS).rows
    rows = [Preference.model_validate(row["row"]) for row in collected]
    assert [row.labelled_by for row in rows] == [row.labelled_by for row in read_rows(out, Preference)]
    assert "announced" not in rlhf("export", "--no-announce", "--aggregate", "majority", "--by", "people")
    assert out.read_bytes() == b"", "two labels each that contradict have no majority"


def test_labels_go_out_and_come_back(rlhf: Run, project: Path) -> None:
    rlhf("sample", "--pairs", "3")
    label(project, ann="a")
    assert "3 questions with 3 labels" in rlhf("export", "--format", "label-studio", "--names")
    assert (project / ".rlhf" / "labels.label-studio.xml").is_file()
    file = project / ".rlhf" / "labels.label-studio.json"
    before = file.read_bytes()
    words = ("import", str(file), "--format", "label-studio")
    assert "0 of them new; 3 labels, 0 new, 3 known from before and skipped" in rlhf(*words)
    elsewhere = f"sqlite:///{project / 'other.db'}"
    assert "3 questions, 3 of them new; 3 labels, 3 new" in rlhf(*words, "--database", elsewhere)
    rlhf("export", "--format", "label-studio", "--names", "--database", elsewhere)
    assert file.read_bytes() == before
    file.write_bytes(before.replace(b'"left"', b'"up"', 1))
    with pytest.raises(DataError, match="1 of 3 records are malformed; nothing was imported"):
        rlhf(*words, "--database", f"sqlite:///{project / 'third.db'}")
    assert not (project / "third.db").exists()


@pytest.fixture
def auto(rlhf: Run, project: Path) -> Run:
    """Labels by a judge and a constitution, of three pairs."""
    rlhf("sample", "--pairs", "3")
    (project / "c.md").write_text("Be long.")
    return lambda judge, *words: rlhf("auto", "--judge", judge, "--constitution", str(project / "c.md"), *words)


def test_a_model_labels_and_the_report_shows_it(rlhf: Run, auto: Run, project: Path) -> None:
    label(project, ann="a")
    with serving(longer) as chat:
        judge = f"{{kind: endpoint, base_url: '{chat.url}', model: strong}}"
        output = auto(judge, "--rate", "1000000", "--max-requests", "4")
        assert "4 requests, 400 tokens" in output
        assert "1 questions are left: the budget is spent" in output
        assert "2 requests, 200 tokens" in auto(judge)
        assert len(chat.asked) == 6
    with opened(project) as store:
        assert sum(label.labeller == "model:strong" for label in store.current_labels()) == 3
    output = rlhf("report")
    assert "model:strong" in output
    assert "ann" not in output
    assert "model:strong" in (project / ".rlhf" / "labels.html").read_text()
    assert json.loads(rlhf("report", "--json", "--names"))["labellers"][0]["name"] == "ann"
    wrong = {
        "{kind: endpoint}": "",
        judge.replace("}", ", rubric: x}"): "rubric has no meaning here",
        "x": ".* got 'x'",
    }
    for text, reason in wrong.items():
        with pytest.raises(ConfigError, match=f"--judge: {reason}"):
            auto(text)


def test_the_budget_may_stand_in_the_judge(auto: Run) -> None:
    with serving(longer) as chat:
        judge = f"{{kind: endpoint, base_url: '{chat.url}', model: strong, max_requests: 2}}"
        assert "2 questions are left: the budget is spent" in auto(judge)
        assert "2 requests" in auto(judge, "--max-requests", "3"), "the command line has the last word"
        assert len(chat.asked) == 4


class Letters:
    """Stands in for the base model, whose tokenizer here has no A and B."""

    judge_id: ClassVar = {"kind": "local", "model": "base_model", "base_url": ""}

    def __init__(self, base_model: Path, *, batch_size: int) -> None:
        assert (base_model / "model").is_dir()
        self.cost = Cost()

    def judge(self, questions: Sequence[str]) -> list[Reply]:
        replies = [Reply(text=longer(text), model="base_model", tokens=9) for text in questions]
        self.cost.add(*replies)
        return replies


def test_the_base_model_has_a_budget_and_is_known_by_its_weights(
    auto: Run, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_judge, "LocalJudge", Letters)
    output = auto("{kind: local}", "--max-requests", "4")
    assert "4 requests, 36 tokens" in output
    assert "1 questions are left: the budget is spent" in output
    assert "2 requests, " in auto("{kind: local}")
    assert "0 requests, " in auto("{kind: local}")
    (project / "artifacts" / "base_model" / "model" / "generation_config.json").write_text('{"do_sample": true}')
    assert "6 requests, " in auto("{kind: local}"), "another base model has labelled nothing yet"


def test_a_report_computes_while_others_answer(rlhf: Run, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a database elsewhere, in a project that has nothing in .rlhf yet."""
    address = f"sqlite:///{project / 'other.db'}"
    store = LabelStore(address)
    store.add_questions([make_question("one")])
    store.add_labeller("ann", "hash")

    def summary(questions: list[Question], labels: list[Label]) -> LabelSummary:
        insert_label(address, "one", "ann", choice="a")
        return computed(questions, labels)

    computed = quality.label_summary
    monkeypatch.setattr(quality, "label_summary", summary)
    assert not (project / ".rlhf").exists()
    assert "0 labels, 0 of 1 questions labelled" in rlhf("report", "--database", address)
    assert (project / ".rlhf" / "labels.html").is_file()
    assert len(store.current_labels()) == 1
    store.close()


def test_an_import_warns_of_responses_without_a_status(rlhf: Run, project: Path) -> None:
    fields = {"prompt": "p", "response_a": "x", "response_b": "y"}
    response = {"value": "a", "user_id": "00000000-0000-4000-8000-000000000001"}
    file = project / "theirs.json"
    file.write_text(json.dumps([{"fields": fields, "responses": {"preference": [response]}}]))
    assert "drafts and discarded answers cannot be distinguished" in rlhf("import", str(file), "--format", "argilla")


@pytest.mark.slow
def test_without_a_server_the_announcement_says_so(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    if "PREFECT_API_URL" in os.environ:
        pytest.skip("a server is configured here")
    labels.announce_labels()
    output = capsys.readouterr().out
    assert output.startswith("not announced: no Prefect server that could start a run")
