"""Options of the reward rules: `reward.rules.<component>` of params.yaml."""

import ast
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from jsonschema import Draft202012Validator, SchemaError
from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, SerializeAsAny, model_validator
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012, EMPTY_REGISTRY

from tasks.config.base import AnswerPattern, Positive, Regex, Section
from tasks.core.custom import did_you_mean, find_custom

__all__ = [
    "GROUND_TRUTH_RULES", "RULE_OPTIONS", "CodeRule", "ContainsFactsRule", "CustomJudge", "CustomRule", "FormatRule",
    "InstructionsRule", "JsonSchemaRule", "Judge", "LanguageRule", "LengthRule", "MathRule", "PoemRule",
    "ReadabilityRule", "RepetitionRule", "Rule", "RuleOptions", "VaderRule", "check_custom_rule",
]  # fmt: skip


class RuleOptions(Section):
    """Options that all rules share: function and floor."""

    function: str = Field(description="A rule's name, or `module:function` of a file in custom/rewards.")
    floor: float = Field(0.0, description="What a response earns on which the function fails; such are counted.")


def _must_be_zero(floor: float) -> float:
    if floor != 0:
        raise ValueError(f"a program that fails earns 0, whatever else is set; got {floor:g}; remove it")
    return floor


class CodeRule(RuleOptions):
    """Options of rule code: how the program is extracted from a response, and its resource limits."""

    function: str = Field("code", description="This rule's name.")
    floor: Annotated[float, AfterValidator(_must_be_zero)] = Field(0.0, description="A program that fails earns 0.")
    program: Literal["fenced", "whole", "completion"] = Field(
        "fenced",
        description="What of a response is the program: its last ```python block, or block without a language, that "
        "defines the function, all of it, or prompt and response as one text, as in HumanEval.",
    )
    in_place: bool = Field(
        False,
        description="Whether the tests see what the function did to its arguments. A function that empties them then "
        "passes `f(x) == sorted(x)`, so only for functions that work in place.",
    )
    held_out: bool = Field(
        False,
        description="Whether the tests after a row's line `# held out` run, not those before; without it, all run.",
    )
    credit: Literal["all", "share"] = Field(
        "all",
        description="What earns: 1 for all tests together, or the share of those `assert` statements that pass which "
        "call the function, each run with all other statements. A constant then earns a share, too.",
    )
    cpu_seconds: Positive = Field(2, description="CPU time of the program, and of its tests, before they are killed.")
    wall_seconds: float = Field(10.0, gt=0, description="Time from start to verdict; generous, as it varies with load.")
    memory_mb: Annotated[int, Field(ge=64)] = Field(256, description="The program's address space; Python takes 30 MB.")
    output_kb: Positive = Field(64, description="What a program may print before it is killed; nobody reads it.")
    answer_kb: Positive = Field(1024, description="Size of one result, encoded, that the tests accept.")
    scratch_mb: Positive = Field(8, description="Files that a program may write; in memory, gone with it.")
    workers: Positive | None = Field(None, description="Programs that run at once; null: one per CPU core.")
    isolation: Literal["bubblewrap", "unsafe_no_isolation"] = Field(
        "bubblewrap",
        description="What stands between a program and this machine: namespaces and seccomp (Linux, the package "
        "bubblewrap and the extra `code`), or nothing but the limits above.",
    )


def _check_json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"no JSON schema: {error.message}") from error
    _check_references(schema)
    return schema


def _check_references(schema: dict[str, Any]) -> None:
    """Check that every `$ref` resolves, without network access."""
    whole = DRAFT202012.create_resource(schema)
    known = DRAFT202012.create_resource(Draft202012Validator.META_SCHEMA) @ EMPTY_REGISTRY
    pending = [(whole, known.resolver_with_root(whole))]
    while pending:
        part, resolver = pending.pop()
        if isinstance(part.contents, dict) and "$ref" in part.contents:
            reference = part.contents["$ref"]
            try:
                resolver.lookup(reference)
            except Unresolvable as error:
                raise ValueError(f"$ref {reference!r} is not in the schema; put what it means under $defs") from error
        pending += [(inner, resolver.in_subresource(inner)) for inner in part.subresources()]


class RepetitionRule(RuleOptions):
    """Options of the repetition penalty, whose minimum is −1."""

    floor: float = Field(-1.0, description="As everywhere; the least that the rule gives.")


class LengthRule(RuleOptions):
    """Target length and tolerance."""

    target: Positive = Field(12, description="The target number of words in the response.")
    tolerance: Positive = Field(12, description="At this many words off target the rule reaches 0; at target it is 1.")


class FormatRule(RuleOptions):
    """Regular expression that a response must match."""

    pattern: Regex = Field(
        min_length=1, description="A Python regular expression; `(?s)` in front lets `.` match newlines."
    )
    match: Literal["whole", "contains"] = Field(
        "whole", description="Whether the response, without white space around it, is the form, or has it somewhere."
    )


class JsonSchemaRule(RuleOptions):
    """JSON schema that a response must satisfy."""

    json_schema: Annotated[dict[str, Any], AfterValidator(_check_json_schema)] = Field(
        description="A JSON schema (draft 2020-12) with all that its `$ref` name; what it does not require is not "
        "asked for. `format` is checked, but for those that jsonschema needs other packages for (`pip install "
        "'jsonschema[format]'`): duration, hostname, iri, uri, their references, and uri-template."
    )


class LanguageRule(RuleOptions):
    """Language that a response must be in."""

    language: str = Field("en", pattern=r"^[a-z]{2,3}$", description="Its ISO 639 code, as py3langid knows it.")
    min_words: Positive = Field(3, description="Shorter responses earn 0: too short to identify a language.")


class MathRule(RuleOptions):
    """Timeout of the comparison of mathematical answers, plain or LaTeX."""

    timeout_s: float = Field(10.0, gt=0, le=600, description="A comparison is given up after this, and counted.")


class ContainsFactsRule(RuleOptions):
    """Maximum number of words for naming the facts."""

    max_words: Positive = Field(60, description="A response with more words earns less, in proportion.")


class ReadabilityRule(RuleOptions):
    """Band of Flesch reading ease with the full reward: 60–70 is plain English, 0 is hardly readable."""

    low: float = Field(50.0, description="The lower end of the band.")
    high: float = Field(90.0, description="The upper end of the band; texts of single syllables lie above 100.")
    tolerance: float = Field(40.0, gt=0, description="So many points outside the band the rule reaches 0.")
    min_words: Positive = Field(5, description="Shorter responses earn 0: the measure says nothing of them.")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low:g} and {self.high:g}")
        return self


class VaderRule(RuleOptions):
    """Sentiment that is rewarded, by VADER."""

    sign: Literal["positive", "negative"] = Field("positive", description="The rewarded sentiment.")
    form: Literal["compound", "sum"] = Field(
        "compound",
        description="VADER's compound score, in [−1, 1]; or the plain sum of the words' valences, each from −4 to 4, "
        "without a bound and without VADER's rules for negation and emphasis.",
    )
    floor: float = Field(-1.0, description="As everywhere; the least that the rule gives.")


class InstructionsRule(RuleOptions):
    """Constraints that a program can verify; at least one."""

    min_words: Positive | None = Field(None, description="At least so many words.")
    max_words: Positive | None = Field(None, description="At most so many words.")
    min_sentences: Positive | None = Field(None, description="At least so many sentences; the last needs no end mark.")
    max_sentences: Positive | None = Field(None, description="At most so many sentences.")
    min_paragraphs: Positive | None = Field(None, description="At least so many paragraphs, an empty line between.")
    max_paragraphs: Positive | None = Field(None, description="At most so many paragraphs.")
    min_bullets: Positive | None = Field(None, description="At least so many lines that begin with `* ` or `- `.")
    max_bullets: Positive | None = Field(None, description="At most so many such lines.")
    contains: tuple[str, ...] = Field((), description="Words or phrases that must occur, each a constraint.")
    avoids: tuple[str, ...] = Field((), description="Words or phrases that must not occur, each a constraint.")
    ends_with: str = Field("", description="How the response must end, but for white space and letter case.")
    case: Literal["lower", "upper"] | None = Field(None, description="All letters in this case.")
    commas: bool = Field(True, description="False: there must be no comma.")

    @model_validator(mode="after")
    def _check_not_empty(self) -> Self:
        if not self.model_dump(exclude_defaults=True, exclude={"function", "floor"}):
            raise ValueError("no constraint is set: give at least one, for example max_words or contains")
        return self

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        for what in ("words", "sentences", "paragraphs", "bullets"):
            least, most = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{what} {least} is above max_{what} {most}")
        for name, phrases in (("contains", self.contains), ("avoids", self.avoids)):
            if not all(phrase.strip() for phrase in phrases):
                raise ValueError(f"{name} has an empty phrase: remove it")
        return self


class PoemRule(RuleOptions):
    """The form of a short rhymed poem; a limerick unless it says otherwise."""

    scheme: str = Field("AABBA", pattern="^[A-Z]{2,14}$", description="One letter a line; lines of one letter rhyme.")
    syllables: dict[str, tuple[Positive, Positive]] = Field(
        {"A": (7, 10), "B": (5, 7)},
        description="Letter → fewest and most syllables of its lines: three anapaests with or without their first "
        "syllables, and two; a letter without bounds has no metre.",
    )
    line_words: tuple[Positive, Positive] = Field((3, 12), description="Fewest and most words of a line.")
    topic: AnswerPattern | None = Field(
        None, description="What of the prompt is the topic: one group, `about (.+):`; null: all of it."
    )

    @model_validator(mode="after")
    def _check_scheme(self) -> Self:
        if unknown := set(self.syllables) - set(self.scheme):
            raise ValueError(f"syllables names {sorted(unknown)}, which scheme {self.scheme!r} does not have")
        if any(low > high for low, high in [*self.syllables.values(), self.line_words]):
            raise ValueError("syllables and line_words: the fewest must not be above the most")
        return self


SAMPLE_ARGS = 3  # that every function has: prompt, response, answer


def check_custom_rule(function: str, options: Mapping[str, object], kind: str = "rewards") -> None:
    """Check that `module:function` of custom/<kind>/ exists and accepts these options.

    Raises:
        ValueError: it does not; the message names what there is.
    """
    definition = find_custom(kind, function)
    if isinstance(definition, ast.ClassDef):
        raise ValueError(f"{function!r} is a class; name a function")
    _check_arguments(function, definition.args, options)


def _check_arguments(function: str, arguments: ast.arguments, options: Mapping[str, object]) -> None:
    names = [item.arg for item in [*arguments.posonlyargs, *arguments.args]]
    if len(names) < SAMPLE_ARGS:
        raise ValueError(f"function {function!r} must take (prompt, response, answer, …), it takes {tuple(names)}")
    defaults = [None] * (len(names) - len(arguments.defaults)) + list(arguments.defaults)
    known = dict(zip(names[SAMPLE_ARGS:], defaults[SAMPLE_ARGS:], strict=True))
    known |= {item.arg: default for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)}
    if arguments.kwarg is None and (unknown := [name for name in options if name not in known]):
        raise ValueError(f"function {function!r} takes no option {unknown[0]!r}; {did_you_mean(unknown[0], known)}")
    if missing := [name for name, default in known.items() if default is None and name not in options]:
        raise ValueError(f"function {function!r} needs the option {missing[0]!r}; add it beside `function`")


class CustomRule(RuleOptions):
    """A user's own function; its options are the arguments after `prompt, response, answer`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: ClassVar = "rewards"

    @model_validator(mode="after")
    def _check_exists(self) -> Self:
        check_custom_rule(self.function, self.options, self.kind)
        return self

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class CustomJudge(CustomRule):
    """A user's own function that judges and never trains."""

    function: str = Field(description="A rule's name, or `module:function` of a file in custom/judges.")
    kind: ClassVar = "judges"


RULE_OPTIONS: dict[str, type[RuleOptions]] = {
    "answer": RuleOptions,
    "code": CodeRule,
    "contains_facts": ContainsFactsRule,
    "format": FormatRule,
    "instructions": InstructionsRule,
    "json_schema": JsonSchemaRule,
    "language": LanguageRule,
    "length": LengthRule,
    "math": MathRule,
    "poem": PoemRule,
    "readability": ReadabilityRule,
    "repetition": RepetitionRule,
    "vader": VaderRule,
}
"""Rule → its options; `tasks.rewards.rules.RULES` has the same names."""

GROUND_TRUTH_RULES = ("answer", "code", "math")
"""Rules that check the row's ground-truth answer: they may be both reward and judge."""


def _parse_rule(value: Any, custom: type[CustomRule] = CustomRule) -> RuleOptions:
    """Parse the options of the rule that `function` names."""
    if isinstance(value, RuleOptions):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("function"), str):
        raise ValueError("needs `function: <rule or module:function>` and that function's options")
    name = value["function"]
    if name not in RULE_OPTIONS and ":" not in name:
        raise ValueError(f"function: no rule is called {name!r}; {did_you_mean(name, RULE_OPTIONS)}")
    return RULE_OPTIONS.get(name, custom).model_validate(dict(value))


Rule = Annotated[SerializeAsAny[RuleOptions], PlainValidator(_parse_rule)]
"""A rule with its validated options."""

Judge = Annotated[SerializeAsAny[RuleOptions], PlainValidator(partial(_parse_rule, custom=CustomJudge))]
"""The same for a rule that judges; of the user's own functions it takes those of custom/judges."""
