"""Row types, and reading and writing JSON and CSV such that equal content is equal bytes on every machine."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from tasks.core.errors import DataError

__all__ = [
    "ROW_TYPES", "SPLITS", "Demonstration", "Preference", "Prompt", "Rating", "Row", "SourceRow", "Split", "flatten",
    "format_json_error", "format_validation_error", "read_rows", "write_json", "write_rows", "write_table",
]  # fmt: skip

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def flatten(value: object, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: `{"a": {"b": 1}}` becomes `{"a.b": 1}`, each key after the prefix if there is one."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write readable JSON, keys in the given order; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def write_table(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> None:
    """Write rows as CSV under a header; the columns are those of the first row unless given."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns or rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Beyond any scale that people rate on; squared errors of such numbers are finite in 32 bits.
MAX_RATING = 1e6
Score = Annotated[FiniteFloat, Field(ge=-MAX_RATING, le=MAX_RATING)]


class Row(BaseModel):
    """Base of all rows: an identifier that is unique within its file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=1)


class SourceRow(Row):
    """Base of the rows that a source yields. Rows of one group go to the same split, whatever their texts."""

    group: str | None = Field(default=None, min_length=1, description="What they share: a template, a document.")

    # Fields that a file holds only where they are known.
    omitted_if_none: ClassVar[tuple[str, ...]] = ("group",)

    @model_serializer(mode="wrap")
    def _omit_unknown(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialise(self)
        return {k: value for k, value in content.items() if value is not None or k not in self.omitted_if_none}


class Prompt(SourceRow):
    """A prompt, with the right answer where there is one."""

    prompt: str = Field(min_length=1)
    answer: str | None = Field(default=None, description="The right answer, where there is one that a rule can check.")


class Demonstration(SourceRow):
    """A response that a person wrote. `prompt + response` is the whole text: the response carries its own space."""

    prompt: str
    response: str = Field(min_length=1)
    answer: str | None = Field(default=None, description="As in `Prompt`.")


class Preference(SourceRow):
    """Two responses to one prompt, of which a person preferred `chosen`.

    `margin` is the difference of the two mean ratings (points of the rating scale), negative where the sampled raters
    disagree with the mean of all; of a label it is how much better the labeller finds the chosen one: 1 slightly,
    2 clearly, 3 far. `objective` names what they were asked to compare. A file holds the last four only where known.
    """

    prompt: str
    chosen: str = Field(min_length=1)
    rejected: str = Field(min_length=1)
    margin: FiniteFloat | None = Field(default=None, ge=-2 * MAX_RATING, le=2 * MAX_RATING)
    labelled_by: tuple[str, ...] | None = Field(default=None, description="People, or `model:` and its name.")
    confidence: float | None = Field(default=None, ge=0, le=1, description="That the chosen one is what they mean.")
    guidelines: tuple[str, ...] | None = Field(default=None, description="sha256 of what the labellers were shown.")
    objective: str | None = Field(default=None, min_length=1)

    omitted_if_none: ClassVar = (*SourceRow.omitted_if_none, "labelled_by", "confidence", "guidelines", "objective")

    @model_validator(mode="after")
    def _check_sides_differ(self) -> Self:
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same text, so the pair says nothing")
        return self


class Rating(SourceRow):
    """A text and every single rating that people gave it."""

    text: str = Field(min_length=1)
    ratings: tuple[Score, ...] = Field(min_length=1)

    @property
    def mean(self) -> float:
        """Mean rating, in points of the source's scale."""
        return sum(self.ratings) / len(self.ratings)


ROW_TYPES: dict[str, type[SourceRow]] = {
    "prompts": Prompt,
    "demonstrations": Demonstration,
    "preferences": Preference,
    "ratings": Rating,
}

RowT = TypeVar("RowT", bound=Row)


def format_json_error(error: ValueError | RecursionError) -> str:
    """Format why a text is not read as JSON; too many digits or open brackets are JSON, but more than Python reads."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return f"not JSON that can be read: {str(error).partition(':')[0]}"


def format_validation_error(error: ValidationError) -> str:
    """Format a validation error in one line: each field, what is wrong with it, and the value found."""
    parts = []
    for item in error.errors():
        location = ".".join(str(part) for part in item["loc"]) or "row"
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{location}: {message} (got {str(item['input'])[:80]!r})")
    return "; ".join(parts)


def read_rows(path: Path, row_type: type[RowT]) -> list[RowT]:
    """Read all rows of a file that an earlier stage wrote; any flaw is an error, for they were validated.

    Raises:
        DataError: the file is missing or empty, or a line does not fit; it names the file and the line.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: run the stage that writes it (`rlhf run`), or check the path")
    with path.open(encoding="utf-8") as file:
        rows = [_parse(line, row_type, path, number) for number, line in enumerate(file, start=1) if line.strip()]
    if not rows:
        needed = f"at least one {row_type.__name__} is needed"
        raise DataError(f"{path} holds no rows: {needed}; look at what prepare dropped")
    return rows


def write_rows(path: Path, rows: Iterable[Row | dict[str, Any]]) -> int:
    """Write rows as JSON Lines and return how many there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            content = row.model_dump() if isinstance(row, Row) else row
            file.write(json.dumps(content, ensure_ascii=False) + "\n")
            count += 1
    return count


def _parse(line: str, row_type: type[RowT], path: Path, number: int) -> RowT:
    try:
        return row_type.model_validate_json(line)
    except ValidationError as error:
        raise DataError(f"{path}:{number}: not a {row_type.__name__}: {format_validation_error(error)}") from error
