"""Each question is asked once, despite interruptions, and its answers are stored."""

import pytest

from app.describing.chat import ChatRefusedError, ChatUnavailableError
from app.describing.describer import Describer, LanguageModel
from app.describing.questions import QuestionSet
from app.describing.request import DescribeRequest, Questions
from app.errors import ConfigurationError, InvalidFieldError, NotConfiguredError, UnknownNameError
from app.store.database import migrate, open_engine
from app.store.drafts import DraftKind, DraftRepository
from app.store.label_sets import LabelSetRepository
from app.types import ClassEntry
from tests.describing.chat_server import MODEL, ChatServer, answer_to, failing, saying

pytestmark = pytest.mark.anyio

SETS = {
    "general": QuestionSet("general", "Anything.", ("What is {a_name}?", "Which {name}?"), ("Where is {a_name}?",)),
    "birds": QuestionSet("birds", "Birds.", ("Which bird is {a_name}?",), ("Which bill has {a_name}?",)),
}
FEATURES = "Q: what of a lemur?\nA:\n- four limbs\n\nQ: what of {a_name}?\nA:"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
async def engine(tmp_path):
    engine = open_engine(f"sqlite:///{tmp_path / 'deixis.sqlite3'}")
    await migrate(engine)
    yield engine
    await engine.dispose()


@pytest.fixture
def drafts(engine):
    return DraftRepository(engine)


@pytest.fixture
async def pets(engine):
    label_set, _ = await LabelSetRepository(engine).put("pets", [ClassEntry("cat"), ClassEntry("owl")], "{}")
    return label_set


@pytest.fixture
def describer_of(drafts):
    def describer_of(server: ChatServer | None, **changes):
        fields = {"base_url": None if server is None else server.url, "api_key": "sk-1", "model": MODEL}
        return Describer(drafts, SETS, FEATURES, LanguageModel(**{**fields, "concurrency": 1, **changes}))

    return describer_of


async def no_progress(done, total):
    pass


async def test_every_class_is_asked_every_question_and_answers_become_drafts(describer_of, drafts, pets):
    steps = []

    async def advance(done, total):
        steps.append((done, total))

    with ChatServer(key="sk-1") as server:
        outcome = await describer_of(server).run(pets, DescribeRequest(answers=2), advance)

    assert server.prompts == [
        "What is a cat?",
        "Which cat?",
        FEATURES.replace("{a_name}", "a cat"),
        "What is an owl?",
        "Which owl?",
        FEATURES.replace("{a_name}", "an owl"),
    ]
    sentences, _, features = (item.body for item in server.received[:3])
    assert (sentences["n"], sentences["temperature"], sentences["max_tokens"]) == (2, 0.99, 50)
    assert sentences["stop"] == ["."]
    assert (features["n"], features["temperature"], features["max_tokens"]) == (1, 0, 100)
    assert "stop" not in features
    assert steps == [(done, 6) for done in range(7)]
    assert (outcome.questions, outcome.answered_before, outcome.new_drafts) == (6, 0, 2 * (2 * 2 + 3))
    found = await drafts.list("pets", limit=100)
    assert [(item.classname, item.kind) for item in found[:7]] == [("cat", DraftKind.DESCRIPTION)] * 4 + [
        ("cat", DraftKind.FEATURE)
    ] * 3
    assert found[0].text == answer_to("What is a cat?", 0)
    assert (found[0].question, found[0].model) == ("What is a cat?", MODEL)
    assert outcome.prompt_tokens == sum(len(prompt.split()) for prompt in server.prompts)


@pytest.mark.parametrize(
    ("request_", "prompts"),
    [
        (DescribeRequest(features=False, questions=Questions.FULL), ["Where is a cat?", "Where is an owl?"]),
        (DescribeRequest(features=False, classes=("owl",)), ["What is an owl?", "Which owl?"]),
        (
            DescribeRequest("birds", Questions.ALL, features=False, classes=("owl", "owl")),
            ["Which bird is an owl?", "Which bill has an owl?"],
        ),
        (DescribeRequest(sentences=False, classes=("cat",)), [FEATURES.replace("{a_name}", "a cat")]),
    ],
)
async def test_the_request_selects_the_questions(describer_of, pets, request_, prompts):
    with ChatServer() as server:
        await describer_of(server).run(pets, request_, no_progress)
    assert server.prompts == prompts


async def test_answered_questions_are_not_asked_again(describer_of, drafts, pets):
    with ChatServer() as server:
        describer = describer_of(server)
        await describer.run(pets, DescribeRequest(classes=("cat",)), no_progress)
        first = len(server.prompts)
        assert (await describer.estimate(pets, DescribeRequest(classes=("cat",)))).requests == 0
        outcome = await describer.run(pets, DescribeRequest(), no_progress)
        assert len(server.prompts) == len(set(server.prompts)) == 2 * first
        assert (outcome.questions, outcome.answered_before) == (6, 3)
        again = await describer.run(pets, DescribeRequest(), no_progress)
    assert (again.answered_before, again.new_drafts, again.prompt_tokens) == (6, 0, 0)


async def test_another_model_or_another_number_of_answers_is_another_question(describer_of, pets):
    request = DescribeRequest(features=False, classes=("cat",))
    with ChatServer() as server:
        await describer_of(server).run(pets, request, no_progress)
        await describer_of(server, model="another").run(pets, request, no_progress)
        await describer_of(server).run(pets, DescribeRequest(features=False, classes=("cat",), answers=3), no_progress)
    assert [(item.body["model"], item.body["n"]) for item in server.received[::2]] == [
        (MODEL, 10),
        ("another", 10),
        (MODEL, 3),
    ]


async def test_an_estimate_counts_only_unanswered_questions(describer_of, pets):
    with ChatServer() as server:
        result = await describer_of(server).estimate(pets, DescribeRequest(answers=4))
        assert server.prompts == []
    assert result.requests == 2 * (2 * 4 + 1)
    assert result.completion_tokens == 2 * (2 * 4 * 50 + 100)
    assert result.prompt_tokens > 0


async def test_after_a_rejection_answers_are_kept_and_the_next_run_asks_the_remaining_questions(
    describer_of, pets, drafts
):
    request = DescribeRequest(features=False, answers=1)
    with ChatServer([saying(b'{"choices": [{"message": {"content": "It has fur."}}]}'), failing(401)]) as server:
        with pytest.raises(ChatRefusedError, match="DEIXIS_LLM_API_KEY"):
            await describer_of(server).run(pets, request, no_progress)
        assert [item.text for item in await drafts.list("pets", limit=10)] == ["It has fur."]
        outcome = await describer_of(server).run(pets, request, no_progress)
    assert outcome.answered_before == 1
    assert sorted(server.prompts) == sorted(
        ["What is a cat?", "Which cat?", "Which cat?", "What is an owl?", "Which owl?"]
    )


async def test_an_unanswered_question_does_not_stop_the_others(describer_of, pets, drafts, monkeypatch):
    monkeypatch.setattr("app.describing.chat.random.uniform", lambda *_: 0)
    with ChatServer([failing(500)] * 6) as server:
        with pytest.raises(ChatUnavailableError, match=r"1 of 4 questions were not answered.*500.*start again"):
            await describer_of(server).run(pets, DescribeRequest(features=False, answers=1), no_progress)
        assert len(await drafts.list("pets", limit=10)) == 3
        outcome = await describer_of(server).run(pets, DescribeRequest(features=False, answers=1), no_progress)
    assert (outcome.answered_before, outcome.new_drafts) == (3, 1)


async def test_a_run_ends_after_three_consecutive_failures(describer_of, pets, monkeypatch):
    monkeypatch.setattr("app.describing.chat.random.uniform", lambda *_: 0)
    with ChatServer(afterwards=failing(500)) as server, pytest.raises(ChatUnavailableError, match="tried 6 times"):
        await describer_of(server).run(pets, DescribeRequest(questions=Questions.ALL), no_progress)
    assert len(set(server.prompts)) == 3


async def test_many_workers_ask_each_question_once(describer_of, engine, drafts):
    classes = [ClassEntry(f"thing {number}") for number in range(20)]
    label_set, _ = await LabelSetRepository(engine).put("things", classes, "{}")
    with ChatServer() as server:
        outcome = await describer_of(server, concurrency=6).run(label_set, DescribeRequest(answers=1), no_progress)
    assert len(server.prompts) == len(set(server.prompts)) == outcome.questions == 60
    assert len(await drafts.list("things", limit=1000)) == outcome.new_drafts == 20 * (2 + 3)


async def test_deleting_the_label_set_ends_the_run(describer_of, engine, pets):
    async def delete(done, total):
        if done == 1:
            await LabelSetRepository(engine).delete("pets")

    with ChatServer() as server, pytest.raises(UnknownNameError, match="pets"):
        await describer_of(server).run(pets, DescribeRequest(), delete)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"base_url": None}, "set DEIXIS_LLM_BASE_URL, and"),
        ({"model": ""}, "set DEIXIS_LLM_MODEL, and"),
        ({"base_url": "", "model": None}, "set DEIXIS_LLM_BASE_URL and DEIXIS_LLM_MODEL, and"),
    ],
)
async def test_without_a_language_model_the_error_names_the_missing_settings(describer_of, pets, changes, missing):
    with ChatServer() as server:
        describer = describer_of(server, **changes)
        for call in (describer.estimate(pets, DescribeRequest()), describer.run(pets, DescribeRequest(), no_progress)):
            with pytest.raises(NotConfiguredError, match=rf"{missing} DEIXIS_LLM_API_KEY if"):
                await call


async def test_an_invalid_base_url_is_an_error(describer_of, pets):
    with pytest.raises(ConfigurationError, match="DEIXIS_LLM_BASE_URL"):
        await describer_of(None, base_url="localhost").run(pets, DescribeRequest(), no_progress)


async def test_an_impossible_request_is_rejected(describer_of, pets):
    with ChatServer() as server:
        describer = describer_of(server)
        with pytest.raises(UnknownNameError, match="unknown question set 'fish'; known: birds, general"):
            await describer.estimate(pets, DescribeRequest("fish"))
        with pytest.raises(UnknownNameError, match="unknown class 'dog'; known: cat, owl"):
            await describer.estimate(pets, DescribeRequest(classes=("cat", "dog")))
        with pytest.raises(InvalidFieldError, match="neither sentences nor features"):
            await describer.estimate(pets, DescribeRequest(sentences=False, features=False))


def test_a_request_can_be_stored_as_json():
    for request in (DescribeRequest(), DescribeRequest("birds", Questions.ALL, False, True, 3, ("owl",))):
        assert DescribeRequest.from_json(request.to_json()) == request


def test_the_repr_of_the_settings_does_not_contain_the_key():
    assert "sk-secret" not in repr(LanguageModel(api_key="sk-secret"))
