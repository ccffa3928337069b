"""Descriptions by a language model: questions are planned, asked, and their answers kept with the drafts made of them.

Every answer is written as soon as it comes, and a question that was answered is not asked again. So a run that was
interrupted, however it was, is gone on with by beginning it again.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import structlog

from app.describing.chat import ChatClient, ChatUnavailableError, Estimate, estimate
from app.describing.cleaning import clean_features, clean_sentences, sameness
from app.describing.questions import QuestionSet, ask
from app.errors import InvalidFieldError, NotConfiguredError, UnknownNameError
from app.store.drafts import Answer, DraftKind, DraftRepository
from app.types import LabelSet

log = structlog.get_logger()

# As CuPL asks (Pratt et al., ICCV 2023), and as classification by description does (Menon and Vondrick, ICLR 2023).
_SENTENCE_TEMPERATURE, _SENTENCE_MAX_TOKENS, _SENTENCE_STOP = 0.99, 50, (".",)
_FEATURE_TEMPERATURE, _FEATURE_MAX_TOKENS = 0.0, 100

# One question may be one that a model will never answer; several in a row mean that the endpoint is away.
_MAX_FAILURES_IN_A_ROW = 3


class Questions(StrEnum):
    """Which questions of a set."""

    BASE = "base"
    FULL = "full"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class DescribeRequest:
    """What to ask of a label set's classes.

    ``question_set`` names one of ``prompts/questions``; ``answers`` are wanted to each question for sentences;
    ``features`` asks for a list of features as well, or alone where ``sentences`` is False; ``classes`` are names, None
    for all.
    """

    question_set: str = "general"
    questions: Questions = Questions.BASE
    sentences: bool = True
    features: bool = True
    answers: int = 10
    classes: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "DescribeRequest":
        """Return the request as it was before it was stored."""
        classes = stored["classes"]
        return cls(
            **{
                **stored,
                "questions": Questions(stored["questions"]),
                "classes": None if classes is None else tuple(classes),
            }
        )


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """The chat endpoint of the settings; None where nothing is set."""

    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    concurrency: int = 8
    timeout_s: float = 60


@dataclass(frozen=True, slots=True)
class _Question:
    """One prompt about one class; its digest stands for all that its answer depends on."""

    classname: str
    kind: DraftKind
    prompt: str
    answers: int
    temperature: float
    max_tokens: int
    stop: tuple[str, ...] | None
    digest: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run asked and got; ``answered_before`` were not asked again.

    ``accepted`` drafts went into the version ``label_set``, where that was wanted and there were any.
    """

    questions: int
    answered_before: int
    new_drafts: int
    prompt_tokens: int
    completion_tokens: int
    accepted: int = 0
    label_set: str | None = None


Advance = Callable[[int, int], Awaitable[object]]
"""Called with the questions that are answered and the number of all."""


class Describer:
    """Asks a language model about label sets.

    Args:
        drafts: keeps answers and drafts.
        question_sets: by name.
        feature_question: asks for a list of features.
        language_model: whom to ask.
    """

    def __init__(
        self,
        drafts: DraftRepository,
        question_sets: Mapping[str, QuestionSet],
        feature_question: str,
        language_model: LanguageModel,
    ) -> None:
        self.question_sets = question_sets
        self._drafts = drafts
        self._feature_question = feature_question
        self._language_model = language_model

    async def estimate(self, label_set: LabelSet, request: DescribeRequest) -> Estimate:
        """Return the most that a run would take, without what is answered already.

        Raises:
            NotConfiguredError: no language model is set.
            UnknownNameError: no such question set or class.
            InvalidFieldError: nothing is asked for.
        """
        _, questions = await self._questions(label_set, request)
        parts = [estimate(1, question.answers, len(question.prompt), question.max_tokens) for question in questions]
        return Estimate(
            sum(part.requests for part in parts),
            sum(part.prompt_tokens for part in parts),
            sum(part.completion_tokens for part in parts),
        )

    async def run(self, label_set: LabelSet, request: DescribeRequest, advance: Advance) -> Outcome:
        """Ask every question that is not answered yet, and keep what comes.

        Raises:
            NotConfiguredError: no language model is set.
            UnknownNameError: no such question set or class, or the label set was deleted meanwhile.
            InvalidFieldError: nothing is asked for.
            ConfigurationError: the settings of the language model cannot work.
            ChatRefusedError: the endpoint wants something else; what was answered before is kept.
            ChatUnavailableError: some questions were not answered; what was answered is kept.
        """
        total, waiting = await self._questions(label_set, request)
        run = _Run(label_set.name, total, total - len(waiting), advance)
        await run.tell()
        settings = self._language_model
        async with ChatClient(
            settings.base_url or "",
            settings.api_key,
            settings.model or "",
            timeout_s=settings.timeout_s,
            concurrency=settings.concurrency,
        ) as client:
            remaining = iter(waiting)
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(settings.concurrency, len(waiting))):
                        workers.create_task(self._work(run, remaining, client))
            except ExceptionGroup as group:
                # The others were stopped by the first one that failed.
                raise group.exceptions[0] from None
        if run.failures:
            raise ChatUnavailableError(
                f"{len(run.failures)} of {run.total} questions were not answered, the others are kept;"
                f" the last because {run.failures[-1].message}; begin again to ask only those"
            )
        return Outcome(run.total, run.total - len(waiting), run.new_drafts, run.prompt_tokens, run.completion_tokens)

    async def _work(self, run: "_Run", remaining: Iterator[_Question], client: ChatClient) -> None:
        for question in remaining:
            try:
                completion = await client.complete(
                    question.prompt,
                    n=question.answers,
                    temperature=question.temperature,
                    max_tokens=question.max_tokens,
                    stop=question.stop,
                )
            except ChatUnavailableError as error:
                run.failures.append(error)
                run.failures_in_a_row += 1
                log.warning("question_not_answered", label_set=run.name, reason=error.message)
                if run.failures_in_a_row == _MAX_FAILURES_IN_A_ROW:
                    raise
                continue
            run.failures_in_a_row = 0
            answer = Answer(
                question.digest,
                question.prompt,
                completion.model,
                completion.texts,
                completion.prompt_tokens,
                completion.completion_tokens,
            )
            new_drafts = await self._drafts.add(
                run.name, answer, question.classname, question.kind, _cleaned(question, completion.texts), sameness
            )
            run.new_drafts += new_drafts
            run.prompt_tokens += completion.prompt_tokens
            run.completion_tokens += completion.completion_tokens
            run.answered += 1
            await run.tell()

    async def _questions(self, label_set: LabelSet, request: DescribeRequest) -> tuple[int, list[_Question]]:
        """Return how many questions there are, and those without answers, which are about the first class first."""
        # In a thread, because the largest label sets take a second.
        planned = await asyncio.to_thread(self._plan, label_set, request)
        answered = await self._drafts.answered(label_set.name)
        return len(planned), [question for question in planned if question.digest not in answered]

    def _plan(self, label_set: LabelSet, request: DescribeRequest) -> list[_Question]:
        model = self._model()
        if request.question_set not in self.question_sets:
            raise UnknownNameError("question set", request.question_set, self.question_sets)
        if not (request.sentences or request.features):
            raise InvalidFieldError.of("sentences", "neither sentences nor features are asked for; ask for one of them")
        chosen = self.question_sets[request.question_set]
        asked = {
            Questions.BASE: chosen.base,
            Questions.FULL: chosen.full,
            Questions.ALL: (*chosen.base, *chosen.full),
        }[request.questions]
        classnames = label_set.classnames if request.classes is None else request.classes
        for name in sorted(set(classnames) - set(label_set.classnames)):
            raise UnknownNameError("class", name, label_set.classnames)
        planned = []
        for name in dict.fromkeys(classnames):
            if request.sentences:
                planned += [_question(model, name, ask(each, name), request.answers) for each in asked]
            if request.features:
                planned.append(_question(model, name, ask(self._feature_question, name), None))
        return planned

    def _model(self) -> str:
        missing = [
            name
            for name, value in (
                ("DEIXIS_LLM_BASE_URL", self._language_model.base_url),
                ("DEIXIS_LLM_MODEL", self._language_model.model),
            )
            if not value
        ]
        if missing:
            raise NotConfiguredError(
                f"no language model is set; set {' and '.join(missing)}, and DEIXIS_LLM_API_KEY where the endpoint"
                " wants a key, as in DEIXIS_LLM_BASE_URL=https://api.openai.com/v1; any endpoint that speaks OpenAI's"
                " chat protocol will do"
            )
        assert self._language_model.model is not None
        return self._language_model.model


@dataclass(slots=True)
class _Run:
    """What the workers of one run share."""

    name: str
    total: int
    answered: int
    advance: Advance
    new_drafts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: list[ChatUnavailableError] = field(default_factory=list)
    failures_in_a_row: int = 0
    telling: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def tell(self) -> None:
        async with self.telling:  # or an older number could be the last that is heard
            await self.advance(self.answered, self.total)


def _question(model: str, classname: str, prompt: str, answers: int | None) -> _Question:
    """Return a question for so many sentences, or for one list of features where ``answers`` is None."""
    if answers is None:
        kind, count, temperature, max_tokens, stop = (
            DraftKind.FEATURE,
            1,
            _FEATURE_TEMPERATURE,
            _FEATURE_MAX_TOKENS,
            None,
        )
    else:
        kind, count, temperature, max_tokens, stop = (
            DraftKind.DESCRIPTION,
            answers,
            _SENTENCE_TEMPERATURE,
            _SENTENCE_MAX_TOKENS,
            _SENTENCE_STOP,
        )
    told = json.dumps([model, classname, kind, prompt, count, temperature, max_tokens, stop])
    digest = hashlib.sha256(told.encode()).hexdigest()
    return _Question(classname, kind, prompt, count, temperature, max_tokens, stop, digest)


def _cleaned(question: _Question, texts: Sequence[str]) -> list[str]:
    if question.kind is DraftKind.DESCRIPTION:
        return clean_sentences(texts, question.classname)
    return [feature for text in texts for feature in clean_features(text, question.classname)]
