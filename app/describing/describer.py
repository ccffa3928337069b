"""Generates descriptions of classes with a language model.

Each answer and the drafts from it are stored as soon as it arrives, and a prompt that has an answer is not sent again.
To resume an interrupted run, start it again.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from app.describing.chat import ChatClient, ChatUnavailableError, Estimate, estimate
from app.describing.cleaning import clean_features, clean_sentences, comparison_key
from app.describing.questions import QuestionSet, fill_question
from app.describing.request import DescribeRequest, Questions
from app.errors import InvalidFieldError, NotConfiguredError, UnknownNameError
from app.store.drafts import Answer, DraftKind, DraftRepository
from app.types import LabelSet

log = structlog.get_logger()

# The values of CuPL (Pratt et al., ICCV 2023) and of classification by description (Menon and Vondrick, ICLR 2023).
_SENTENCE_TEMPERATURE, _SENTENCE_MAX_TOKENS, _SENTENCE_STOP = 0.99, 50, (".",)
_FEATURE_TEMPERATURE, _FEATURE_MAX_TOKENS = 0.0, 100

# A single prompt may be one that the model never answers. Several failures in a row mean that the endpoint is down.
_MAX_CONSECUTIVE_FAILURES = 3


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """The settings of the chat endpoint; None where a setting has no value."""

    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    concurrency: int = 8
    timeout_s: float = 60


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One prompt about one class; the digest covers everything that its answer depends on."""

    classname: str
    kind: DraftKind
    text: str
    answers: int
    temperature: float
    max_tokens: int
    stop: tuple[str, ...] | None
    digest: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run. ``answered_before`` questions had an answer from an earlier run.

    ``accepted`` drafts were added to the version ``label_set``, if the request said so and there were any.
    """

    questions: int
    answered_before: int
    new_drafts: int
    prompt_tokens: int
    completion_tokens: int
    accepted: int = 0
    label_set: str | None = None


Advance = Callable[[int, int], Awaitable[object]]
"""Called with the number of answered questions and the number of all."""


class Describer:
    """Generates descriptions for label sets.

    Args:
        drafts: stores answers and drafts.
        question_sets: the question sets by name.
        feature_question: asks for a list of features.
        language_model: the chat endpoint.
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
        """Return an upper bound on the requests and tokens of a run, without the questions that have an answer.

        Raises:
            NotConfiguredError: no language model is set.
            UnknownNameError: there is no such question set or class.
            InvalidFieldError: the request has neither sentences nor features.
        """
        _, prompts = await self._unanswered(label_set, request)
        parts = [estimate(1, prompt.answers, len(prompt.text), prompt.max_tokens) for prompt in prompts]
        return Estimate(
            sum(part.requests for part in parts),
            sum(part.prompt_tokens for part in parts),
            sum(part.completion_tokens for part in parts),
        )

    async def run(self, label_set: LabelSet, request: DescribeRequest, advance: Advance) -> Outcome:
        """Ask every question that has no answer yet, and store the answers and their drafts.

        Raises:
            NotConfiguredError: no language model is set.
            UnknownNameError: there is no such question set or class, or the label set was deleted meanwhile.
            InvalidFieldError: the request has neither sentences nor features.
            ConfigurationError: a setting of the language model is invalid.
            ChatRefusedError: the endpoint refuses the requests; earlier answers are stored.
            ChatUnavailableError: some questions were not answered; the other answers are stored.
        """
        total, unanswered = await self._unanswered(label_set, request)
        run = _Run(label_set.name, total, total - len(unanswered), advance)
        await run.report()
        settings = self._language_model
        async with ChatClient(
            settings.base_url or "",
            settings.api_key,
            settings.model or "",
            timeout_s=settings.timeout_s,
            concurrency=settings.concurrency,
        ) as client:
            remaining = iter(unanswered)
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(settings.concurrency, len(unanswered))):
                        workers.create_task(self._work(run, remaining, client))
            except ExceptionGroup as group:
                # The first worker that failed stopped the others.
                raise group.exceptions[0] from None
        if run.failures:
            raise ChatUnavailableError(
                f"{len(run.failures)} of {run.total} questions were not answered, the other answers are stored;"
                f" the last error: {run.failures[-1].message}; start again to ask only the unanswered ones"
            )
        return Outcome(run.total, run.total - len(unanswered), run.new_drafts, run.prompt_tokens, run.completion_tokens)

    async def _work(self, run: "_Run", remaining: Iterator[_Prompt], client: ChatClient) -> None:
        for prompt in remaining:
            try:
                completion = await client.complete(
                    prompt.text,
                    n=prompt.answers,
                    temperature=prompt.temperature,
                    max_tokens=prompt.max_tokens,
                    stop=prompt.stop,
                )
            except ChatUnavailableError as error:
                run.failures.append(error)
                run.consecutive_failures += 1
                log.warning("question_not_answered", label_set=run.name, reason=error.message)
                if run.consecutive_failures == _MAX_CONSECUTIVE_FAILURES:
                    raise
                continue
            run.consecutive_failures = 0
            answer = Answer(
                prompt.digest,
                prompt.text,
                completion.model,
                completion.texts,
                completion.prompt_tokens,
                completion.completion_tokens,
            )
            new_drafts = await self._drafts.add(
                run.name, answer, prompt.classname, prompt.kind, _cleaned(prompt, completion.texts), comparison_key
            )
            run.new_drafts += new_drafts
            run.prompt_tokens += completion.prompt_tokens
            run.completion_tokens += completion.completion_tokens
            run.answered += 1
            await run.report()

    async def _unanswered(self, label_set: LabelSet, request: DescribeRequest) -> tuple[int, list[_Prompt]]:
        """Return the number of all prompts, and the prompts without an answer in the order of the classes."""
        # In a thread, because the largest label sets take a second.
        prompts = await asyncio.to_thread(self._prompts, label_set, request)
        answered = await self._drafts.answered(label_set.name)
        return len(prompts), [prompt for prompt in prompts if prompt.digest not in answered]

    def _prompts(self, label_set: LabelSet, request: DescribeRequest) -> list[_Prompt]:
        model = self._model()
        if request.question_set not in self.question_sets:
            raise UnknownNameError("question set", request.question_set, self.question_sets)
        if not (request.sentences or request.features):
            raise InvalidFieldError.of(
                "sentences", "neither sentences nor features are requested; request at least one of them"
            )
        chosen = self.question_sets[request.question_set]
        questions = {
            Questions.BASE: chosen.base,
            Questions.FULL: chosen.full,
            Questions.ALL: (*chosen.base, *chosen.full),
        }[request.questions]
        classnames = label_set.classnames if request.classes is None else request.classes
        for name in sorted(set(classnames) - set(label_set.classnames)):
            raise UnknownNameError("class", name, label_set.classnames)
        prompts = []
        for name in dict.fromkeys(classnames):
            if request.sentences:
                prompts += [
                    _sentence_prompt(model, name, fill_question(question, name), request.answers)
                    for question in questions
                ]
            if request.features:
                prompts.append(_feature_prompt(model, name, fill_question(self._feature_question, name)))
        return prompts

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
                f"no language model is set; set {' and '.join(missing)}, and DEIXIS_LLM_API_KEY if the endpoint"
                " needs a key, as in DEIXIS_LLM_BASE_URL=https://api.openai.com/v1; any endpoint with OpenAI's"
                " chat protocol works"
            )
        assert self._language_model.model is not None
        return self._language_model.model


@dataclass(slots=True)
class _Run:
    """The state that the workers of one run share."""

    name: str
    total: int
    answered: int
    advance: Advance
    new_drafts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: list[ChatUnavailableError] = field(default_factory=list)
    consecutive_failures: int = 0
    report_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def report(self) -> None:
        async with self.report_lock:  # without it, an older number could be reported last
            await self.advance(self.answered, self.total)


def _sentence_prompt(model: str, classname: str, text: str, answers: int) -> _Prompt:
    return _prompt(
        model,
        classname,
        DraftKind.DESCRIPTION,
        text,
        answers,
        _SENTENCE_TEMPERATURE,
        _SENTENCE_MAX_TOKENS,
        _SENTENCE_STOP,
    )


def _feature_prompt(model: str, classname: str, text: str) -> _Prompt:
    return _prompt(model, classname, DraftKind.FEATURE, text, 1, _FEATURE_TEMPERATURE, _FEATURE_MAX_TOKENS, None)


def _prompt(
    model: str,
    classname: str,
    kind: DraftKind,
    text: str,
    answers: int,
    temperature: float,
    max_tokens: int,
    stop: tuple[str, ...] | None,
) -> _Prompt:
    content = json.dumps([model, classname, kind, text, answers, temperature, max_tokens, stop])
    digest = hashlib.sha256(content.encode()).hexdigest()
    return _Prompt(classname, kind, text, answers, temperature, max_tokens, stop, digest)


def _cleaned(prompt: _Prompt, texts: Sequence[str]) -> list[str]:
    if prompt.kind is DraftKind.DESCRIPTION:
        return clean_sentences(texts, prompt.classname)
    return [feature for text in texts for feature in clean_features(text, prompt.classname)]
