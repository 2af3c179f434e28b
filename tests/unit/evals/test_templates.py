import pytest
from jinja2 import UndefinedError

from tasks.evals.templates import load_template


@pytest.mark.parametrize("name", ["report.html.j2", "card.md.j2"])
def test_a_name_that_nothing_defines_is_an_error(name: str) -> None:
    filters = dict.fromkeys(("escape_control_chars", "format_signed", "cell", "name"), str)
    with pytest.raises(UndefinedError):
        load_template(name, filters, autoescape=True).render()
