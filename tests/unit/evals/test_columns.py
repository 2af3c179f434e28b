from tasks.evals.compare import Table
from tasks.evals.report_text import COLUMNS, cells, columns_of, format_signed

ROW = {"win_rate": 0.793, "win_rate_low": 0.733, "win_rate_high": 0.844, "kl": 3.335, "kl_stderr": 0.165}
TABLE: Table = {
    "sft": {
        "win_rate": 0.5,
        "win_rate_low": 0.5,
        "win_rate_high": 0.5,
        "kl": 0.0,
        "kl_stderr": 0.0,
        "reward_gold": -0.2,
    },
    "ppo": ROW
    | {"reward_gold": 0.6, "accuracy_strict": 0.42, "accuracy_strict_low": 0.4, "accuracy_strict_high": 0.45},
}


def test_a_column_is_shown_where_the_table_has_its_key_and_a_missing_number_is_a_dash() -> None:
    columns = columns_of(TABLE, has_gold_judge=True)
    assert [column.key for column in columns] == ["win_rate", "accuracy_strict", "reward_gold", "kl"]
    assert cells(TABLE, columns) == {
        "sft": [("–", ""), ("–", ""), ("−0.20", ""), ("0.00", "± 0.00")],
        "ppo": [("79%", "73–84"), ("42%", "40–45"), ("+0.60", ""), ("3.33", "± 0.17")],
    }


def test_the_gold_judge_is_a_share_where_it_is_the_right_answer() -> None:
    column = next(column for column in columns_of(TABLE, has_gold_judge=False) if column.key == "reward_gold")
    assert column.heading == ("Right", "answers")
    assert column.format_value(0.6) == "60%"


def test_every_column_is_explained_by_itself_or_by_its_kind_or_judge() -> None:
    unexplained = [column.key for column in COLUMNS if not column.meaning]
    assert unexplained == ["win_rate_judge", "win_rate_vader", "win_rate_proxy", "vader", "reward_proxy"]


def test_numbers_have_a_true_minus_and_no_sign_at_nothing() -> None:
    assert [format_signed(value) for value in (1.234, -0.5, 0.001, -0.001)] == ["+1.23", "−0.50", "0.00", "0.00"]
