"""The questions for a language model: question sets, and the question for features.

A question set is a file ``prompts/questions/NAME.toml``. Its ``base`` questions suit any class of the domain, like the
three of CuPL; its ``full`` questions ask for details of the domain (Pratt et al., ICCV 2023). The question for features
is in ``features.toml``: two worked examples, then the question (Menon and Vondrick, ICLR 2023). The wording is not that
of the papers.
"""

import re
import tomllib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from app.errors import ConfigurationError

_FEATURES = "features.toml"
_PLACEHOLDER = re.compile(r"\{(a_name|name)\}")


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of one domain. Each contains ``{name}``, or ``{a_name}`` for the name with its article."""

    name: str
    summary: str
    base: tuple[str, ...]
    full: tuple[str, ...]


def fill_question(question: str, classname: str) -> str:
    """Return the question with its placeholders replaced by the class name; braces in the name stay unchanged.

    The article is "an" before the letters a, e, i, o, u and "a" otherwise, as in CuPL: "an owl", "an unicorn".
    """
    article = "an" if classname.startswith(tuple("AEIOUaeiou")) else "a"
    filled = {"name": classname, "a_name": f"{article} {classname}"}
    return _PLACEHOLDER.sub(lambda found: filled[found[1]], question)


def load_question_sets(folder: Path) -> Mapping[str, QuestionSet]:
    """Return the question sets of a folder by name, sorted, without the question for features.

    Raises:
        ConfigurationError: there is no such folder, it has no question set, or a file breaks a rule.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"there is no folder of questions at '{folder}'; install Deixis again")
    sets = {file.stem: _read_set(file) for file in sorted(folder.glob("*.toml")) if file.name != _FEATURES}
    if not sets:
        raise ConfigurationError(f"there is no question set in '{folder}'; install Deixis again")
    return MappingProxyType(sets)


def load_feature_question(folder: Path) -> str:
    """Return the question for features, for ``fill_question``.

    Raises:
        ConfigurationError: the file is missing or breaks a rule.
    """
    return _read(folder / _FEATURES, _FeaturesFile).question.strip()


def _question(question: str) -> str:
    rest = _PLACEHOLDER.sub("", question)
    if "{" in rest or "}" in rest:
        msg = f"'{question}' has a brace that is not part of {{name}} or {{a_name}}; remove it"
        raise ValueError(msg)
    if rest == question:
        msg = f"'{question}' has no {{name}} or {{a_name}}; write one for the class name"
        raise ValueError(msg)
    return question


def _one_line(text: str) -> str:
    if not text.strip() or any(unicodedata.category(character) in {"Cc", "Zl", "Zp"} for character in text):
        msg = f"{text!r} is empty or has a control character; write one line of text"
        raise ValueError(msg)
    return text


def _distinct_questions(questions: list[str]) -> list[str]:
    for index, question in enumerate(questions):
        if question in questions[:index]:
            msg = f"'{question}' is in the list twice; remove one of them"
            raise ValueError(msg)
    return questions


_Line = Annotated[str, AfterValidator(_one_line)]
_Question = Annotated[_Line, AfterValidator(_question)]
_Questions = Annotated[list[_Question], Field(min_length=1), AfterValidator(_distinct_questions)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    summary: _Line


class _SetFile(_File):
    base: _Questions
    full: _Questions


class _FeaturesFile(_File):
    question: Annotated[str, AfterValidator(_question)]


_AnyFile = TypeVar("_AnyFile", bound=_File)


def _read_set(file: Path) -> QuestionSet:
    read = _read(file, _SetFile)
    return QuestionSet(file.stem, read.summary, tuple(read.base), tuple(read.full))


def _read(file: Path, kind: type[_AnyFile]) -> _AnyFile:
    try:
        fields: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigurationError(f"{file}: cannot be read: {reason}; install Deixis again") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: not a TOML file: {error}") from error
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False)
        )
        raise ConfigurationError(f"{file}: {problems}") from error
