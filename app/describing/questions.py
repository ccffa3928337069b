"""What a language model is asked about a class: sets of questions, and the one that asks for features.

A set is a file ``prompts/questions/NAME.toml``. Its ``base`` questions suit any class of the domain, as CuPL's three
do; ``full`` ones go into what matters there (Pratt et al., ICCV 2023). The question for features is in
``features.toml``: two worked examples and the same question once more (Menon and Vondrick, ICLR 2023). The wording is
our own throughout.
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
    """The questions of one domain, each with ``{name}``, or with ``{a_name}`` for the name behind its article."""

    name: str
    summary: str
    base: tuple[str, ...]
    full: tuple[str, ...]


def ask(question: str, classname: str) -> str:
    """Return the question with the class name in every place; braces of the name itself stay as they are.

    The article is "an" before a written vowel and "a" before anything else, as in CuPL: "an owl", "an unicorn".
    """
    article = "an" if classname.startswith(tuple("AEIOUaeiou")) else "a"
    filled = {"name": classname, "a_name": f"{article} {classname}"}
    return _PLACEHOLDER.sub(lambda found: filled[found[1]], question)


def load_question_sets(folder: Path) -> Mapping[str, QuestionSet]:
    """Return the sets of a folder by name, sorted; the question for features is none of them.

    Raises:
        ConfigurationError: no such folder, no set in it, or a file that breaks a rule, which the message tells.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"no folder of questions at '{folder}'; it belongs to the installation")
    sets = {file.stem: _read_set(file) for file in sorted(folder.glob("*.toml")) if file.name != _FEATURES}
    if not sets:
        raise ConfigurationError(f"no set of questions in '{folder}'; the NAME.toml files belong to the installation")
    return MappingProxyType(sets)


def load_feature_question(folder: Path) -> str:
    """Return the prompt that asks for features, as ``ask`` takes it.

    Raises:
        ConfigurationError: the file is missing or breaks a rule, which the message tells.
    """
    return _read(folder / _FEATURES, _FeaturesFile).question.strip()


def _checked_question(question: str) -> str:
    rest = _PLACEHOLDER.sub("", question)
    if "{" in rest or "}" in rest:
        msg = f"'{question}' has a brace that is not part of {{name}} or {{a_name}}; take it out"
        raise ValueError(msg)
    if rest == question:
        msg = f"'{question}' has no {{name}} or {{a_name}}; write one where the class name goes"
        raise ValueError(msg)
    return question


def _on_one_line(text: str) -> str:
    if not text.strip() or any(unicodedata.category(character) in {"Cc", "Zl", "Zp"} for character in text):
        msg = f"{text!r} is empty or has a control character; write one line of text"
        raise ValueError(msg)
    return text


def _each_once(questions: list[str]) -> list[str]:
    for index, question in enumerate(questions):
        if question in questions[:index]:
            msg = f"'{question}' is asked twice; take one of them out"
            raise ValueError(msg)
    return questions


_Line = Annotated[str, AfterValidator(_on_one_line)]
_Question = Annotated[_Line, AfterValidator(_checked_question)]
_Questions = Annotated[list[_Question], Field(min_length=1), AfterValidator(_each_once)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    summary: _Line


class _SetFile(_File):
    base: _Questions
    full: _Questions


class _FeaturesFile(_File):
    question: Annotated[str, AfterValidator(_checked_question)]


_AnyFile = TypeVar("_AnyFile", bound=_File)


def _read_set(file: Path) -> QuestionSet:
    read = _read(file, _SetFile)
    return QuestionSet(file.stem, read.summary, tuple(read.base), tuple(read.full))


def _read(file: Path, kind: type[_AnyFile]) -> _AnyFile:
    try:
        fields: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigurationError(f"{file}: cannot be read: {reason}; it belongs to the installation") from error
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
