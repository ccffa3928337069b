"""Caption databases over HTTP: built as a job, listed, searched, replaced while they are asked, and deleted."""

import base64
import gzip
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from urllib.parse import quote

import numpy as np
import pytest

from app.captions.generations import CURRENT, prune
from app.captions.manifest import FEATURES, INDEX, MANIFEST
from app.captions.texts import TEXTS
from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.settings import Settings
from tests.api.problems import fields_of, problem_of
from tests.api.test_descriptions import ended
from tests.api.test_examples import at_rest, noise, shade, with_things
from tests.api.test_faults import until
from tests.captions.cased.test_lexicon import LICENCE, SAMPLE
from tests.captions_made import CAPTIONS, MANY, CaptionEncoder, made, place_of, put_in_place
from tests.conftest import picture
from tests.gated import GatedEncoder

ALL = "/v1/databases"
AT = f"{ALL}/things"
OTHERS = ("a silver fox asleep", "two silver foxes", "a lake of silver", "a red tram", "a red tram at night")
NO_NAMES = ("Things", "-things", "_things", "a b", "a@1", "a.b", "x" * 65, "\u00fc", "things.building")


@pytest.fixture
def encoder():
    return CaptionEncoder()


@pytest.fixture
def folder(settings):
    """Where databases are by default."""
    return settings.data_dir / "captions"


@pytest.fixture
def things(folder, make_client):
    """A client of a service that has found a database."""
    made(folder / "things")
    return make_client()


class HeldEncoder(CaptionEncoder):
    """Waits at one caption until it is let go."""

    def __init__(self, caption):
        super().__init__()
        self.caption = caption
        self.reached, self.let_go = threading.Event(), threading.Event()

    def encode_texts(self, texts):
        if self.caption in texts:
            self.reached.set()
            assert self.let_go.wait(20)
        return super().encode_texts(texts)


@pytest.fixture
def held():
    encoder = HeldEncoder("a red bell that waits")
    yield encoder
    encoder.let_go.set()


@contextmanager
def asking(*questions):
    """Ask each question again and again in a thread of its own while the block runs; yield the answers so far."""
    over, answers = threading.Event(), []

    def ask(question):
        while not over.is_set():
            answers.append(question())

    with ThreadPoolExecutor(len(questions)) as threads:
        asked = [threads.submit(ask, question) for question in questions]
        try:
            yield answers
        finally:
            over.set()
    for each in asked:
        each.result()


def encoded(image):
    return {"base64": base64.b64encode(image).decode()}


def ask(client, at=AT, **fields):
    return client.post(f"{at}/search", json=fields)


def ask_by_form(client, image, at=AT, **fields):
    return client.post(f"{at}/search", files=[("image", ("a.png", image, "image/png"))], data=fields)


def ask_by_body(client, image, at=AT, media_type="image/png", **fields):
    return client.post(f"{at}/search", content=image, params=fields, headers={"content-type": media_type})


def found(response):
    assert response.status_code == 200, response.text
    body = response.json()
    assert set(body) == {"database", "model", "results", "next_offset", "searched", "warnings"}
    assert all(set(each) == {"caption", "score"} for each in body["results"])
    scores = [each["score"] for each in body["results"]]
    assert scores == sorted(scores, reverse=True)
    return body


def captions_in(body):
    return [each["caption"] for each in body["results"]]


def paged(client, limit, at=AT, **fields):
    """Return every result that pages of ``limit`` lead to."""
    results, offset = [], 0
    while offset is not None:
        page = found(ask(client, at, limit=limit, offset=offset, **fields))
        assert len(page["results"]) <= limit
        assert page["next_offset"] in {None, offset + limit}
        results += page["results"]
        offset = page["next_offset"]
    return results


def told_of(client, name="things"):
    response = client.get(f"{ALL}/{name}")
    assert response.status_code == 200, response.text
    return response.json()


def listed(client):
    response = client.get(ALL)
    assert response.status_code == 200, response.text
    assert set(response.json()) == {"databases"}
    return response.json()["databases"]


def begun(client, name="things", **body):
    response = client.put(f"{ALL}/{name}", json=body)
    assert response.status_code == 202, response.text
    return response


def built(client, name="things", **body):
    job = ended(client, begun(client, name, **body))
    assert job["status"] == "succeeded", job
    return job


def failed(client, name="things", **body):
    job = ended(client, begun(client, name, **body))
    assert job["status"] == "failed", job
    assert job["result"] is None
    assert job["error"]
    return job["error"]


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


# --- what there is -------------------------------------------------------------------------------------------------


def test_a_database_is_returned_with_its_contents_and_its_index(things, folder):
    reply = told_of(things)
    assert set(reply) == {
        "name",
        "default",
        "model",
        "captions",
        "dims",
        "index",
        "recall",
        "recall_at",
        "recall_target",
        "counts",
        "source_notes",
        "licence",
        "bytes",
        "generation",
        "created_at",
        "models",
        "problem",
    }
    assert reply["index"] == {"kind": "flat", "lists": 0, "probes": 0, "code_bytes": 0}
    place = place_of(folder / "things")
    manifest = json.loads((place / MANIFEST).read_text())
    for member in ("name", "model", "captions", "dims", "recall", "recall_at", "recall_target", "counts"):
        assert reply[member] == manifest[member], member
    assert (reply["source_notes"], reply["licence"]) == ("made up", "CC0-1.0")
    assert (reply["captions"], reply["dims"], reply["generation"]) == (len(CAPTIONS), 16, place.name)
    assert reply["bytes"] >= sum(each["bytes"] for each in manifest["files"].values())
    assert abs(datetime.now(UTC) - datetime.fromisoformat(reply["created_at"])) < timedelta(minutes=1)
    assert (reply["models"], reply["problem"], reply["default"]) == (["fake"], None, False)


def test_databases_are_listed_by_name_with_the_fields_of_each(make_client, folder):
    for name in ("everyday", "b", "a-1", "a_1"):
        made(folder / name, OTHERS)
    client = make_client()
    reply = listed(client)
    assert [each["name"] for each in reply] == sorted(["everyday", "b", "a-1", "a_1"])
    assert reply == [told_of(client, each["name"]) for each in reply]
    assert [each["name"] for each in reply if each["default"]] == ["everyday"]
    assert [each["name"] for each in listed(make_client(default_database="b")) if each["default"]] == ["b"]


def test_without_a_database_the_list_is_empty_and_files_that_are_none_are_left_out(client, folder):
    assert listed(client) == []
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("nothing")
    (folder / "notes").write_text("nothing")
    made(folder / "no name", OTHERS)
    made(folder / "things", OTHERS)
    (folder / "things.building").mkdir(exist_ok=True)
    until(lambda: listed(client))
    assert [each["name"] for each in listed(client)] == ["things"]


def test_databases_are_where_the_setting_says(make_client, folder, tmp_path):
    made(tmp_path / "elsewhere" / "others", OTHERS)
    made(folder / "things")
    client = make_client(captions_dir=tmp_path / "elsewhere")
    assert [each["name"] for each in listed(client)] == ["others"]
    built(client, "made", captions=list(OTHERS))
    assert (tmp_path / "elsewhere" / "made" / CURRENT).exists()


def test_a_database_that_is_not_there_is_unknown_on_every_route_and_the_others_are_named(things):
    for response in (
        things.get(f"{ALL}/others"),
        things.delete(f"{ALL}/others"),
        ask(things, f"{ALL}/others", text="a ball"),
        ask_by_form(things, picture(), f"{ALL}/others"),
        ask_by_body(things, picture(), f"{ALL}/others"),
    ):
        detail = problem_of(response, "unknown-name")["detail"]
        assert detail == "unknown caption database 'others'; known: things"


def test_a_name_that_breaks_a_rule_is_refused_on_every_route(things, folder):
    for name in NO_NAMES:
        at = f"{ALL}/{quote(name)}"
        for response in (
            things.get(at),
            things.put(at, json={"captions": list(OTHERS)}),
            things.delete(at),
            ask(things, at, text="a ball"),
            ask_by_form(things, picture(), at),
            ask_by_body(things, picture(), at),
        ):
            assert fields_of(response) == {"name"}, name
    assert things.get("/v1/jobs").json()["jobs"] == []
    assert [each.name for each in folder.iterdir()] == ["things"]


def test_a_name_may_be_of_small_letters_digits_and_two_signs(client):
    for name in ("0", "a", "a-b_c", "x" * 64):
        built(client, name, captions=list(OTHERS))
        assert told_of(client, name)["captions"] == len(OTHERS)
        assert found(ask(client, f"{ALL}/{name}", text="silver"))["database"].startswith(f"{name}@")


# --- searching -----------------------------------------------------------------------------------------------------


def test_the_nearest_captions_come_first_with_their_cosines(things, encoder, folder):
    features = encoder.encode_texts(CAPTIONS)
    text = "a red kite"
    image = np.array([[1.01, 0.01, 0.01] + [0] * 13], np.float32)
    for fields, query in (
        ({"text": text}, encoder.encode_texts([text])[0]),
        ({"image": encoded(picture("red"))}, image[0] / np.linalg.norm(image)),
    ):
        body = found(ask(things, limit=len(CAPTIONS), **fields))
        cosines = dict(zip(CAPTIONS, features @ query, strict=True))
        assert sorted(captions_in(body)) == sorted(CAPTIONS)
        for each in body["results"]:
            assert each["score"] == pytest.approx(cosines[each["caption"]], abs=2e-3)  # of half precision
        assert body["database"] == f"things@{place_of(folder / 'things').name}"
        assert (body["model"], body["next_offset"]) == ("fake", None)


def test_the_default_page_has_ten_results(things):
    body = found(ask(things, text="a red kite"))
    assert (len(body["results"]), body["next_offset"]) == (10, 10)
    assert found(ask(things, text="a red kite", limit=10, offset=0)) == body


def test_the_three_forms_give_the_same_answer(things):
    image = picture("teal")
    for fields in (
        {},
        {"limit": 3, "offset": 2},
        {"contains": "BALL", "min_score": 0.1, "limit": 2, "offset": 1, "model": "fake"},
    ):
        by_json = found(ask(things, image=encoded(image), **fields))
        assert found(ask_by_form(things, image, **fields)) == by_json
        assert found(ask_by_body(things, image, **fields)) == by_json
        assert by_json["results"]


def test_a_search_by_text_finds_what_the_text_is_about_although_no_caption_is_like_it(things):
    for colour in ("red", "green", "blue"):
        best = captions_in(found(ask(things, text=f"something {colour}", limit=5)))
        assert all(colour in caption for caption in best)
        assert set(captions_in(found(ask(things, image=encoded(picture(colour)), limit=8)))) <= {
            caption for caption in CAPTIONS if colour in caption
        }


def test_any_text_is_searched_for(things):
    for text in ("x", "x" * 1000, "  a red kite\n", "\u72ac", "{}", "%s", "<script>"):
        assert len(found(ask(things, text=text))["results"]) == 10, text


def test_a_text_that_is_blank_or_too_long_or_cannot_be_seen_is_refused(things):
    for text in ("", " ", " \n\t", "x" * 1001, "\u202e red", "a\0b"):
        assert fields_of(ask(things, text=text)) == {"text"}, text


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("limit", [0, -1, 101, "many", 1.5, ""]),
        ("offset", [-1, 901, "many", 1.5, ""]),
        ("min_score", [-1.01, 1.01, "nan", "inf", "much", ""]),
    ],
)
def test_an_invalid_field_is_reported_in_every_form(things, field, values):
    for value in values:
        for response in (
            ask(things, text="a ball", **{field: value}),
            ask_by_form(things, picture(), **{field: value}),
            ask_by_body(things, picture(), **{field: value}),
        ):
            assert fields_of(response) == {field}, value


def test_unknown_and_repeated_fields_are_refused_in_every_form(things):
    for response in (
        ask(things, text="a ball", k=3),
        ask_by_form(things, picture(), k=3),
        ask_by_body(things, picture(), k=3),
    ):
        assert fields_of(response) == {"k"}
    assert fields_of(ask_by_form(things, picture(), limit=[1, 2])) == {"limit"}
    assert fields_of(ask_by_body(things, picture(), limit=[1, 2])) == {"limit"}


def test_a_search_is_for_a_text_or_for_an_image_and_never_for_both_or_none(things):
    for response in (
        ask(things),
        ask(things, text="a ball", image=encoded(picture())),
        ask(things, text=None, image=None),
        ask_by_form(things, picture(), text="a ball"),
        ask_by_body(things, picture(), text="a ball"),
        things.post(f"{AT}/search", files=[("limit", (None, "3"))]),
    ):
        assert fields_of(response) <= {"text", "image"}


def test_a_search_takes_one_image_independent_of_the_settings(things):
    """So that it is of no use to raise one."""
    images = [("image", ("a.png", picture(), "image/png")), ("image", ("b.png", picture(), "image/png"))]
    response = things.post(f"{AT}/search", files=images)
    assert response.status_code in {413, 422}
    assert "DEIXIS_" not in problem_of(response)["detail"]


def test_an_invalid_search_body_gives_a_problem(things):
    def send(content, media_type):
        return things.post(f"{AT}/search", content=content, headers={"content-type": media_type})

    problem_of(send(b"{", "application/json"), "malformed-request")
    problem_of(send(b"nothing", "multipart/form-data; boundary=b"), "malformed-request")
    for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        problem_of(send(b"text=a", media_type), "unsupported-media-type")
    assert fields_of(send(b"[]", "application/json")) is not None
    response = ask(things, image={"url": "http://127.0.0.1:1/a.png"})
    assert fields_of(response) == {"url"}


def test_an_unreadable_image_gives_the_same_problem_as_in_a_classification(make_client, folder):
    made(folder / "things")
    client = make_client(max_image_bytes=1500, max_image_pixels=32 * 24)
    for image, slug in (
        (b"", "not-an-image"),
        (b"no image", "not-an-image"),
        (picture()[:40], "not-an-image"),
        (picture() + bytes(1500), "image-too-large"),
        (picture(size=(33, 24)), "image-too-large"),
    ):
        problem_of(ask(client, image=encoded(image)), slug)
        problem_of(ask_by_form(client, image), slug)
        problem_of(ask_by_body(client, image), slug)
    problem_of(ask(client, image={"base64": "&&&&"}), "not-an-image")
    assert found(ask(client, image={"base64": "data:image/png;base64," + encoded(picture())["base64"]}))


def test_a_search_with_an_image_may_be_as_large_as_a_request_with_images(make_client, folder):
    made(folder / "things")
    client = make_client(max_json_bytes=1000, max_request_bytes=20_000)
    image = noise(1)
    assert 2000 < len(image) < 10_000
    by_json = found(ask(client, image=encoded(image)))
    assert found(ask_by_form(client, image)) == found(ask_by_body(client, image)) == by_json
    for response in (
        ask(client, image=encoded(image + bytes(20_000))),
        ask_by_form(client, image + bytes(20_000)),
        ask_by_body(client, image + bytes(20_000)),
    ):
        problem_of(response, "body-too-large")


# --- pages and filters ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["flat", "ivf-pq", "ties"])
def many(request, make_client, folder):
    """A client of a database of 1,200 captions: compared one by one, found by codes, or hard to tell apart."""
    encoder = FakeEncoder() if request.param == "ties" else CaptionEncoder()
    made(folder / "things", MANY, encoder=encoder, exact_up_to=100 if request.param == "ivf-pq" else 50_000)
    client = make_client(encoders=[encoder])
    assert told_of(client)["index"]["kind"] == ("ivf-pq" if request.param == "ivf-pq" else "flat")
    return client


@pytest.mark.parametrize("fields", [{"text": "a red and blue kite"}, {"image": encoded(picture("#c06030"))}])
def test_pages_of_any_size_contain_every_caption_once(many, fields):
    """Also of captions that are equally near, and of an index that finds more the more it is asked for."""
    whole = paged(many, 100, **fields)
    captions = [each["caption"] for each in whole]
    assert len(captions) == len(set(captions)) == 1000
    assert set(captions) <= set(MANY)
    scores = [each["score"] for each in whole]
    assert scores == sorted(scores, reverse=True)
    for limit in (37, 90):
        pages = paged(many, limit, **fields)
        assert pages == whole[: len(pages)]
        assert len(pages) > 900


def test_a_page_is_the_same_piece_of_the_list_wherever_it_begins(many):
    whole = captions_in(found(ask(many, text="a red kite", limit=100)))
    for limit, offset in ((1, 0), (10, 0), (1, 99), (10, 45), (33, 60)):
        page = found(ask(many, text="a red kite", limit=limit, offset=offset))
        assert captions_in(page) == whole[offset : offset + limit]
        assert page["next_offset"] == offset + limit


FILTERS = (
    {"contains": "BALL"},
    {"contains": "ball"},
    {"contains": " red "},
    {"min_score": 0.3},
    {"min_score": -1},
    {"contains": "green", "min_score": 0.05},
    {"contains": "no caption has this"},
    {"min_score": 1},
)


def test_filters_leave_out_and_change_nothing_else(many):
    """They look through the thousand nearest captions, in order."""
    question = {"text": "a red and green kite"}
    whole = paged(many, 100, **question)
    for filters in FILTERS:
        word, least = filters.get("contains", "").lower(), filters.get("min_score", -1)
        wanted = [each for each in whole if word in each["caption"].lower() and each["score"] >= least]
        for limit in (37, 100):
            assert paged(many, limit, **question, **filters) == wanted[: 900 // limit * limit + limit], filters
        page = found(ask(many, limit=5, offset=3, **question, **filters))
        assert page["results"] == wanted[3:8]
        assert page["next_offset"] == (8 if len(wanted) > 8 else None)
        assert page["searched"] == 1000


def test_filters_look_through_all_captions_where_there_are_fewer_than_a_thousand(things):
    body = found(ask(things, text="a red kite", contains="balls", limit=100))
    assert body["searched"] == len(CAPTIONS)
    assert sorted(captions_in(body)) == sorted(caption for caption in CAPTIONS if "balls" in caption)
    assert body["next_offset"] is None


def test_a_filter_takes_small_and_capital_letters_for_the_same_in_every_script(client):
    captions = ["\u00c4pfel im Korb", "ein Apfel im Korb", "\u041a\u041e\u0422 \u043d\u0430 \u043e\u043a\u043d\u0435"]
    built(client, captions=captions)
    for contains, expected in (
        ("\u00e4PFEL", captions[:1]),
        ("\u043a\u043e\u0442", captions[2:]),
        ("KORB", captions[:2]),
    ):
        assert sorted(captions_in(found(ask(client, text="x", contains=contains)))) == sorted(expected)


def test_signs_that_mean_something_in_patterns_are_looked_for_as_they_are(client):
    captions = ["100 % red", "a_b red", "a.b red", "(red", "red*"]
    built(client, captions=captions)
    for contains, expected in (("%", captions[:1]), ("_", captions[1:2]), (".", captions[2:3]), ("(", captions[3:4])):
        assert captions_in(found(ask(client, text="red", contains=contains))) == expected


def test_the_last_allowed_page_has_no_next_one(many):
    last = found(ask(many, text="red", offset=900, limit=100))
    assert (len(last["results"]), last["next_offset"]) == (100, None)
    assert found(ask(many, text="red", offset=899, limit=1))["next_offset"] == 900
    assert found(ask(many, text="red", offset=890, limit=11))["next_offset"] is None
    beyond = found(ask(many, text="red", offset=900, contains="no caption has this"))
    assert (beyond["results"], beyond["next_offset"]) == ([], None)


def test_pages_end_with_the_captions(things):
    count = len(CAPTIONS)
    for offset, limit, length, next_offset in (
        (0, count, count, None),
        (0, count - 1, count - 1, count - 1),
        (count - 1, 1, 1, None),
        (count - 1, 100, 1, None),
        (count, 10, 0, None),
        (900, 100, 0, None),
    ):
        page = found(ask(things, text="red", offset=offset, limit=limit))
        assert (len(page["results"]), page["next_offset"]) == (length, next_offset), (offset, limit)


def test_many_searches_at_once_find_what_each_finds_alone(many):
    questions = [
        {"limit": limit, "offset": offset, **what, **filters}
        for limit, offset in ((1, 0), (10, 5), (100, 0), (100, 900))
        for what in ({"text": "a red kite"}, {"image": encoded(picture("teal"))})
        for filters in ({}, {"contains": "ball"})
    ]
    alone = [found(ask(many, **question)) for question in questions]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda question: found(ask(many, **question)), questions * 3))
    assert together == alone * 3


# --- models --------------------------------------------------------------------------------------------------------


def test_a_database_is_searched_with_its_first_suitable_model_only(make_client, folder):
    made(folder / "of-second", OTHERS, encoder=FakeEncoder("second"))
    made(folder / "of-first", OTHERS, encoder=FakeEncoder("first"))
    client = make_client(encoders=[FakeEncoder("first"), FakeEncoder("second")])
    assert {each["name"]: each["models"] for each in listed(client)} == {"of-first": ["first"], "of-second": ["second"]}
    for name, model, other in (("of-second", "second", "first"), ("of-first", "first", "second")):
        at = f"{ALL}/{name}"
        without = found(ask(client, at, text="silver"))
        assert without["model"] == model
        assert found(ask(client, at, text="silver", model=model)) == without
        for response in (
            ask(client, at, text="silver", model=other),
            ask_by_form(client, picture(), at, model=other),
            ask_by_body(client, picture(), at, model=other),
        ):
            assert fields_of(response) == {"model"}
            assert model in response.json()["detail"]
    detail = problem_of(ask(client, f"{ALL}/of-first", text="silver", model="third"), "unknown-name")["detail"]
    assert "known: first, second" in detail


def test_a_database_of_a_model_that_is_not_served_is_listed_with_what_is_wrong_and_not_searched(make_client, folder):
    made(folder / "of-gone", OTHERS, encoder=FakeEncoder("gone"))
    client = make_client()
    reply = told_of(client, "of-gone")
    assert (reply["model"], reply["models"], reply["captions"]) == ("gone", [], len(OTHERS))
    assert "gone" in reply["problem"]
    for fields in ({}, {"model": "fake"}):
        assert fields_of(ask(client, f"{ALL}/of-gone", text="silver", **fields)) == {"model"}
    assert client.delete(f"{ALL}/of-gone").status_code == 204


def test_a_database_is_built_with_the_model_that_is_named_or_with_the_first(make_client):
    client = make_client(encoders=[FakeEncoder("first"), FakeEncoder("second")])
    built(client, captions=list(OTHERS))
    built(client, "others", captions=list(OTHERS), model="second")
    assert {each["name"]: each["models"] for each in listed(client)} == {"things": ["first"], "others": ["second"]}
    built(client, captions=list(OTHERS), model="second")
    assert told_of(client)["models"] == ["second"]
    assert found(ask(client, text="silver"))["model"] == "second"
    detail = problem_of(client.put(AT, json={"captions": list(OTHERS), "model": "third"}), "unknown-name")["detail"]
    assert "known: first, second" in detail


# --- building ------------------------------------------------------------------------------------------------------


def test_captions_that_are_sent_are_built_as_a_job_and_can_be_searched_at_once(client):
    response = begun(client, captions=list(OTHERS), source_notes="by hand", licence="CC-BY-4.0", recall=0.9)
    job = response.json()
    assert {key: job[key] for key in ("kind", "label_set", "database", "result", "error")} == {
        "kind": "build-captions",
        "label_set": None,
        "database": "things",
        "result": None,
        "error": None,
    }
    job = ended(client, response)
    assert job["status"] == "succeeded", job
    assert (job["kind"], job["label_set"], job["database"]) == ("build-captions", None, "things")
    assert 0 < job["done"] == job["total"]
    reply = told_of(client)
    assert (reply["source_notes"], reply["licence"], reply["recall_target"]) == ("by hand", "CC-BY-4.0", 0.9)
    assert reply["captions"] == len(OTHERS)
    assert job["result"]["database"].partition("@")[0] == "things"
    for member in ("generation", "captions", "counts", "recall"):
        assert job["result"][member] == reply[member], member
    body = found(ask(client, text="silver", limit=100))
    assert body["database"] == f"things@{reply['generation']}"
    assert sorted(captions_in(body)) == sorted(OTHERS)
    (listed,) = client.get("/v1/jobs").json()["jobs"]
    assert listed == {field: value for field, value in job.items() if field != "result"}


def test_jobs_about_label_sets_have_no_database(client):
    with_things(client)
    evaluated = client.post(
        "/v1/label-sets/things:evaluate",
        files=[("image", ("a.png", shade(kind, 0), "image/png")) for kind in range(3)],
        data={"class": ["tomato", "leaf", "sky"]},
    )
    job = ended(client, evaluated)
    assert (job["label_set"], job["database"]) == ("things", None)


def test_captions_are_cleaned_by_the_rules_that_are_given(client):
    captions = [
        "  a red   fox ",
        "a red fox",
        "ab",
        "x" * 30,
        "\u0440\u044b\u0436\u0430\u044f \u043b\u0438\u0441\u0430",
        "a cafe\u0301",
    ]
    counts = built(client, captions=captions)["result"]["counts"]
    assert (counts["read"], counts["kept"], counts["duplicates"], counts["too_short"]) == (6, 4, 1, 1)
    assert sorted(captions_in(found(ask(client, text="fox")))) == sorted(
        ["a red fox", "x" * 30, captions[4], "a caf\u00e9"]
    )
    counts = built(client, captions=captions, min_chars=2, max_chars=9, latin_only=True)["result"]["counts"]
    assert (counts["kept"], counts["other_script"], counts["cut"]) == (4, 1, 1)
    assert sorted(captions_in(found(ask(client, text="fox")))) == sorted(["a red fox", "x" * 9, "ab", "a caf\u00e9"])


def test_near_duplicates_are_left_out_only_on_request(make_client):
    client = make_client(encoders=[FakeEncoder()])
    captions = ["a red ball", "red balls", "the red ball", "a green ball", "a chair"]
    assert built(client, captions=captions)["result"]["captions"] == 5
    result = built(client, captions=captions, near_duplicates=0.97)["result"]
    assert (result["captions"], result["counts"]["near_duplicates"]) == (3, 2)
    assert found(ask(client, text="red", limit=100))["results"][0]["caption"] == "a red ball"


def test_an_invalid_build_starts_no_job_and_is_reported_with_its_field(things):
    for body, fields in (
        ({}, {"source", "files", "captions"}),
        ({"source": None, "files": None, "captions": None}, {"source", "files", "captions"}),
        ({"source": "wordnet", "captions": ["a ball"]}, {"source", "files", "captions"}),
        ({"files": ["a.csv"], "captions": ["a ball"]}, {"source", "files", "captions"}),
        ({"source": "internet"}, {"source"}),
        ({"captions": []}, {"captions"}),
        ({"captions": "a ball"}, {"captions"}),
        ({"captions": [3]}, {"captions.0"}),
        ({"files": []}, {"files"}),
        ({"captions": ["a ball"], "min_chars": 0}, {"min_chars"}),
        ({"captions": ["a ball"], "min_chars": 10, "max_chars": 9}, {"min_chars", "max_chars"}),
        ({"captions": ["a ball"], "max_chars": 0}, {"max_chars", "min_chars"}),
        ({"captions": ["a ball"], "near_duplicates": 0.49}, {"near_duplicates"}),
        ({"captions": ["a ball"], "near_duplicates": 1.01}, {"near_duplicates"}),
        ({"captions": ["a ball"], "recall": 0}, {"recall"}),
        ({"captions": ["a ball"], "recall": 1.01}, {"recall"}),
        ({"captions": ["a ball"], "latin_only": "perhaps"}, {"latin_only"}),
        ({"captions": ["a ball"], "nonsense": 1}, {"nonsense"}),
    ):
        response = things.put(AT, json=body)
        assert fields_of(response) != set(), body
        assert fields_of(response) <= fields, body
    assert things.get("/v1/jobs").json()["jobs"] == []
    assert found(ask(things, text="a ball"))


def test_more_captions_than_a_request_may_bring_are_refused(client):
    response = client.put(AT, json={"captions": ["a ball"] * 100_001})
    assert response.status_code in {413, 422}
    problem_of(response)
    assert client.get("/v1/jobs").json()["jobs"] == []


def test_a_body_that_is_not_a_json_object_is_rejected(client):
    for content in (b"", b"{", b"nonsense"):
        response = client.put(AT, content=content, headers={"content-type": "application/json"})
        assert response.status_code in {400, 422}
        problem_of(response)
    problem_of(client.put(AT, json=["a ball"]), "invalid-field")
    assert client.get("/v1/jobs").json()["jobs"] == []


# --- files of the server -------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Files of captions in several forms, and one beside the folder that may be imported from."""
    root = tmp_path / "import"
    (root / "sets").mkdir(parents=True)
    (root / "sets" / "a.csv").write_text(
        "address,caption,words\nhttp://a/1,a silver fox,einer\nhttp://a/2,a lake,zwei\n"
    )
    (root / "b.jsonl").write_text('{"caption": "a red tram"}\n{"caption": "a lake"}\nnonsense\n')
    with gzip.open(root / "c.txt.gz", "wt") as content:
        content.write("two silver foxes\n\na red tram\n")
    (root / "broken.json").write_text("nonsense")
    (root / "empty.txt").write_text("\n\n")
    (tmp_path / "secret.txt").write_text("a secret caption\n")
    return root


@pytest.fixture
def importing(make_client, files, folder):
    made(folder / "things")
    return make_client(import_dir=files)


def test_files_of_the_server_are_built_each_caption_once(importing):
    result = built(importing, files=["sets/a.csv", "b.jsonl", "c.txt.gz"])["result"]
    counts = result["counts"]
    assert (counts["kept"], counts["duplicates"], counts["bad"]) == (4, 2, 1)
    assert sorted(captions_in(found(ask(importing, text="fox")))) == sorted(
        ["a silver fox", "a lake", "a red tram", "two silver foxes"]
    )


def test_the_column_of_a_file_may_be_named(importing):
    built(importing, files=["sets/a.csv"], column="words")
    assert sorted(captions_in(found(ask(importing, text="fox")))) == ["einer", "zwei"]
    assert "nothing" in failed(importing, files=["sets/a.csv"], column="nothing")
    assert sorted(captions_in(found(ask(importing, text="fox")))) == ["einer", "zwei"]


def test_no_name_leads_out_of_the_folder_to_import_from(importing, files):
    (files / "way-out").symlink_to(files.parent / "secret.txt")
    (files / "way-out.d").symlink_to(files.parent)
    os.mkfifo(files / "pipe")
    for name in (
        "../secret.txt",
        "sets/../../secret.txt",
        "sets/../../import/../secret.txt",
        "/etc/passwd",
        "way-out",
        "way-out.d/secret.txt",
        "nowhere.txt",
        "sets",
        ".",
        "",
        "/",
        "~",
        "-",
        "pipe",
        "a\0b",
        "x" * 5000,
        "%2e%2e/secret.txt",
    ):
        for given in ([name], ["b.jsonl", name]):
            response = importing.put(AT, json={"files": given})
            assert all(field.startswith("files") for field in fields_of(response)), name
            assert len(response.content) < 2000
            assert str(files) not in response.text
    assert importing.get("/v1/jobs").json()["jobs"] == []
    assert sorted(captions_in(found(ask(importing, text="red", limit=100)))) == sorted(CAPTIONS)


def test_without_a_folder_to_import_from_no_file_is_read(things):
    response = things.put(AT, json={"files": ["a.csv"]})
    assert all(field.startswith("files") for field in fields_of(response))
    assert "DEIXIS_IMPORT_DIR" in response.json()["detail"]


@pytest.mark.parametrize("change", ["removed", "led out"])
def test_a_file_that_changes_before_its_turn_is_not_read_from_elsewhere(make_client, folder, files, held, change):
    made(folder / "things")
    client = make_client(encoders=[held], import_dir=files)
    first = begun(client, "first", captions=[held.caption])
    assert held.reached.wait(10)
    second = begun(client, files=["b.jsonl"])
    (files / "b.jsonl").unlink()
    if change == "led out":
        (files / "b.jsonl").symlink_to(files.parent / "secret.txt")
    held.let_go.set()
    assert ended(client, first)["status"] == "succeeded"
    job = ended(client, second)
    assert job["status"] == "failed"
    assert "secret caption" not in json.dumps(job)
    assert sorted(captions_in(found(ask(client, text="red", limit=100)))) == sorted(CAPTIONS)


# --- replacing -----------------------------------------------------------------------------------------------------


def test_until_the_new_database_is_there_the_old_one_answers(make_client, folder, held):
    before = made(folder / "things")
    client = make_client(encoders=[held])
    image = encoded(picture("red"))
    old = found(ask(client, image=image))
    response = begun(client, captions=[*OTHERS, held.caption])
    assert held.reached.wait(10)
    assert found(ask(client, image=image)) == old
    assert told_of(client)["generation"] == before.generation
    running = client.get(response.headers["location"]).json()
    assert (running["status"], running["finished_at"]) == ("running", None)
    held.let_go.set()
    assert ended(client, response)["status"] == "succeeded"
    new = found(ask(client, image=image, limit=100))
    assert new["database"] != old["database"]
    assert sorted(captions_in(new)) == sorted([*OTHERS, held.caption])


def test_no_search_fails_or_mixes_two_databases_while_one_takes_the_others_place(things):
    kinds = ([f"a red {word} old" for word in ("fox", "hen", "owl")], [f"{word} new, red" for word in ("fox", "owl")])
    at_hand = {told_of(things)["generation"]: set(CAPTIONS)}
    questions = (
        lambda: ask(things, text="a red fox", limit=100),
        lambda: ask(things, image=encoded(picture("red")), limit=2),
        lambda: ask(things, image=encoded(picture("red")), contains="fox"),
    )
    with asking(*questions) as answers:
        for turn in range(6):
            at_hand[built(things, captions=kinds[turn % 2])["result"]["generation"]] = set(kinds[turn % 2])
            seen = len(answers)
            until(lambda seen=seen: len(answers) > seen + 3)
    assert len(at_hand) == 3
    used = set()
    for each in map(found, answers):
        name, _, generation = each["database"].partition("@")
        used.add(generation)
        assert name == "things"
        assert set(captions_in(each)) <= at_hand[generation]
    assert used == set(at_hand)


def test_the_same_captions_again_are_the_same_generation(things):
    before = told_of(things)["generation"]
    made_again = {built(things, captions=list(OTHERS))["result"]["generation"] for _ in range(2)}
    assert len(made_again) == 1
    assert before not in made_again
    assert told_of(things)["generation"] in made_again


def test_of_two_builds_of_one_database_the_later_one_stays(things):
    first = begun(things, captions=["a red fox", "a red hen"])
    second = begun(things, captions=["a red owl"])
    assert {ended(things, each)["status"] for each in (first, second)} == {"succeeded"}
    assert captions_in(found(ask(things, text="red"))) == ["a red owl"]


def test_what_another_process_builds_replaces_and_removes_is_seen(things, folder, make_client):
    before = found(ask(things, text="silver"))
    made(folder / "others", OTHERS)
    until(lambda: len(listed(things)) == 2)
    assert captions_in(found(ask(things, f"{ALL}/others", text="silver", limit=2))) != []

    after = made(folder / "things", OTHERS)
    until(lambda: found(ask(things, text="silver"))["database"] != before["database"])
    assert told_of(things)["generation"] == after.generation
    assert sorted(captions_in(found(ask(things, text="silver")))) == sorted(OTHERS)

    shutil.rmtree(folder / "things")
    until(lambda: ask(things, text="silver").status_code == 404)
    problem_of(things.get(AT), "unknown-name")
    assert [each["name"] for each in listed(things)] == ["others"]

    other = make_client()
    built(other, captions=["a red owl"])
    until(lambda: ask(things, text="red").status_code == 200)
    until(lambda: captions_in(found(ask(things, text="red"))) == ["a red owl"])


def test_removing_old_generations_does_not_disturb_searches(things, folder):
    with asking(lambda: ask(things, text="red", limit=100), lambda: ask(things, image=encoded(picture()))) as answers:
        for captions in (OTHERS, CAPTIONS, OTHERS):
            made(folder / "things", captions)
            prune(folder / "things")
            seen = len(answers)
            until(lambda seen=seen: len(answers) > seen + 4)
    assert {answer.status_code for answer in answers} == {200}


def test_a_build_leaves_nothing_behind_but_the_database(things, folder):
    for captions in (OTHERS, CAPTIONS, ["a red owl"]):
        built(things, captions=list(captions))
    assert [each.name for each in folder.iterdir()] == ["things"]
    until(lambda: len([each for each in (folder / "things").iterdir() if each.is_dir()]) <= 2)


# --- what is damaged -----------------------------------------------------------------------------------------------


def _without_texts(database):
    (place_of(database) / TEXTS).unlink()


def _with_half_an_index(database):
    cut(place_of(database) / INDEX)


def _with_half_the_features(database):
    cut(place_of(database) / FEATURES)


def _without_a_manifest(database):
    (place_of(database) / MANIFEST).unlink()


def _with_half_a_manifest(database):
    cut(place_of(database) / MANIFEST)


def _with_a_manifest_of_a_newer_release(database):
    file = place_of(database) / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))


def _naming_nonsense(database):
    (database / CURRENT).write_text("nonsense\n")


def _naming_a_generation_that_is_not_there(database):
    (database / CURRENT).write_text("0123456789abcdef\n")


DAMAGES = [
    _without_texts,
    _with_half_an_index,
    _with_half_the_features,
    _without_a_manifest,
    _with_half_a_manifest,
    _with_a_manifest_of_a_newer_release,
    _naming_nonsense,
    _naming_a_generation_that_is_not_there,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_database_is_listed_with_what_is_wrong_and_can_be_built_again(make_client, folder, damage):
    made(folder / "things")
    made(folder / "others", OTHERS)
    damage(folder / "things")
    client = make_client()
    others, reply = listed(client)
    assert (others["name"], others["problem"], reply["name"]) == ("others", None, "things")
    assert reply["problem"]
    assert set(reply) == set(others)
    assert told_of(client) == reply
    for response in (ask(client, text="red"), ask_by_form(client, picture()), ask_by_body(client, picture())):
        problem_of(response, "store-unavailable")
    assert found(ask(client, f"{ALL}/others", text="silver"))
    assert client.get("/readyz").status_code == client.get("/healthz").status_code == 200

    built(client, captions=list(CAPTIONS))
    assert told_of(client)["problem"] is None
    assert found(ask(client, text="red", limit=100))["results"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_database_can_be_deleted(make_client, folder, damage):
    made(folder / "things")
    damage(folder / "things")
    client = make_client()
    assert client.delete(AT).status_code == 204
    problem_of(client.get(AT), "unknown-name")
    assert listed(client) == []


@pytest.mark.parametrize("damage", [_without_texts, _with_half_an_index, _without_a_manifest, _naming_nonsense])
def test_where_the_new_generation_is_damaged_the_old_one_goes_on_answering(things, folder, tmp_path, damage):
    """And where it is mended, the new one answers."""
    old = found(ask(things, text="red"))
    made(tmp_path / "prepared" / "things", OTHERS)
    generation = place_of(tmp_path / "prepared" / "things").name
    damage(tmp_path / "prepared" / "things")
    if damage is _naming_nonsense:
        _naming_nonsense(folder / "things")
    else:
        put_in_place(tmp_path / "prepared" / "things", folder / "things")
    # Longer than a running service takes to look.
    ends = time.monotonic() + 2.5
    while time.monotonic() < ends:
        assert found(ask(things, text="red")) == old
    assert [each["name"] for each in listed(things)] == ["things"]

    made(folder / "things", OTHERS)
    until(lambda: found(ask(things, text="red"))["database"] == f"things@{generation}")
    assert told_of(things)["problem"] is None


# --- builds that do not end well -----------------------------------------------------------------------------------


class BreakingEncoder(CaptionEncoder):
    """Breaks on one caption."""

    def encode_texts(self, texts):
        if any("break" in text for text in texts):
            raise ZeroDivisionError("secret")
        return super().encode_texts(texts)


def unchanged(client, old):
    assert found(ask(client, text="red", limit=100)) == old
    assert told_of(client)["problem"] is None


def test_a_build_that_fails_leaves_the_old_database_as_it_was(make_client, folder, files):
    made(folder / "things")
    client = make_client(encoders=[BreakingEncoder()], import_dir=files)
    old = found(ask(client, text="red", limit=100))
    assert "secret" not in failed(client, captions=["a red fox", "break"])
    unchanged(client, old)
    assert "no captions" in failed(client, captions=["ab", " "])
    unchanged(client, old)
    assert "no captions" in failed(client, files=["empty.txt"])
    unchanged(client, old)
    assert "JSON" in failed(client, files=["broken.json"])
    unchanged(client, old)
    assert place_of(folder / "things").name == old["database"].partition("@")[2]
    built(client, captions=list(OTHERS))
    assert sorted(captions_in(found(ask(client, text="red", limit=100)))) == sorted(OTHERS)


def test_a_build_that_fails_makes_no_database_where_there_was_none(make_client):
    client = make_client(encoders=[BreakingEncoder()])
    failed(client, captions=["break"])
    assert listed(client) == []
    problem_of(client.get(AT), "unknown-name")


def test_a_build_that_is_cancelled_leaves_the_old_database_and_another_one_can_begin(make_client, folder, held):
    made(folder / "things")
    client = make_client(encoders=[held])
    image = encoded(picture("red"))
    old = found(ask(client, image=image, limit=100))
    response = begun(client, captions=["a red fox", held.caption])
    assert held.reached.wait(10)
    assert client.delete(response.headers["location"]).json()["status"] == "cancelled"
    next_one = begun(client, captions=["a red owl"])
    assert found(ask(client, image=image, limit=100)) == old
    held.let_go.set()
    assert ended(client, next_one)["status"] == "succeeded"
    assert captions_in(found(ask(client, image=image))) == ["a red owl"]
    assert client.get(response.headers["location"]).json()["status"] == "cancelled"


def test_an_interrupted_build_is_resumed_at_the_next_start(make_client, folder, held):
    """What had been encoded is not encoded again: there are 8,192 captions in a shard."""
    captions = [*(f"a red ball, number {number}" for number in range(8192)), held.caption]
    made(folder / "things")
    client = make_client(encoders=[held])
    response = begun(client, captions=captions)
    assert held.reached.wait(20)
    stopping = threading.Thread(target=client.__exit__, args=(None, None, None))
    stopping.start()
    until(lambda: client.app.state.service.jobs.queue._closing)
    held.let_go.set()
    stopping.join(30)
    assert not stopping.is_alive()
    assert place_of(folder / "things").name == made(folder.parent / "same" / "things").generation

    encoder = CaptionEncoder()
    client = make_client(encoders=[encoder])
    job = ended(client, response)
    assert job["status"] == "succeeded", job
    assert told_of(client)["captions"] == len(captions)
    assert captions[7] not in encoder.encoded_texts
    assert [each.name for each in folder.iterdir()] == ["things"]


# --- deleting ------------------------------------------------------------------------------------------------------


def test_a_database_that_is_deleted_is_gone_and_can_be_built_anew(things, folder):
    response = things.delete(AT)
    assert (response.status_code, response.content) == (204, b"")
    for gone in (things.get(AT), things.delete(AT), ask(things, text="red")):
        problem_of(gone, "unknown-name")
    assert listed(things) == []
    assert list(folder.iterdir()) == []
    built(things, captions=["a red owl"])
    assert captions_in(found(ask(things, text="red"))) == ["a red owl"]


def test_searches_that_are_under_way_when_a_database_is_deleted_end_well(things):
    questions = (
        lambda: ask(things, text="a red fox", limit=100),
        lambda: ask(things, image=encoded(picture("red"))),
        lambda: ask(things, image=encoded(picture("red")), contains="ball"),
    )
    with asking(*questions) as answers:
        for _ in range(4):
            until(lambda: ask(things, text="red").status_code == 200)
            assert things.delete(AT).status_code == 204
            problem_of(ask(things, text="red"), "unknown-name")
            built(things, captions=list(CAPTIONS))
    assert {answer.status_code for answer in answers} <= {200, 404}
    for answer in answers:
        if answer.status_code == 200:
            assert set(captions_in(found(answer))) <= set(CAPTIONS)


def test_an_image_that_is_being_encoded_is_answered_although_the_database_is_deleted(make_client, folder):
    gated = GatedEncoder()
    made(folder / "things", encoder=FakeEncoder())
    client = make_client(encoders=[gated])
    gated.images_open.clear()
    try:
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(ask_by_body, client, picture("red"))
            assert gated.images_entered.acquire(timeout=10)
            assert client.delete(AT).status_code == 204
            gated.open()
            assert len(found(waiting.result())["results"]) == 10
    finally:
        gated.open()


def test_a_database_that_is_being_built_is_not_deleted(make_client, folder, held):
    made(folder / "things")
    made(folder / "others", OTHERS)
    client = make_client(encoders=[held])
    response = begun(client, captions=[held.caption])
    assert held.reached.wait(10)
    problem_of(client.delete(AT), "conflict")
    assert client.delete(f"{ALL}/others").status_code == 204
    held.let_go.set()
    assert ended(client, response)["status"] == "succeeded"
    assert client.delete(AT).status_code == 204
    problem_of(client.get(AT), "unknown-name")


# --- the words of WordNet ------------------------------------------------------------------------------------------


@pytest.fixture
def small_lexicon(tmp_path):
    """A folder of WordNet's files with a few words each."""
    place = tmp_path / "lexicon"
    place.mkdir()
    for name, text in SAMPLE.items():
        (place / name).write_text(text if name.endswith(".exc") else LICENCE + text)
    return place


def test_the_nouns_of_the_lexicon_are_built_on_request(make_client, small_lexicon):
    client = make_client(wordnet_dir=small_lexicon)
    assert listed(client) == []
    built(client, "nouns", source="wordnet")
    reply = told_of(client, "nouns")
    assert reply["captions"] > 0
    assert reply["source_notes"]
    assert reply["licence"]
    captions = captions_in(found(ask(client, f"{ALL}/nouns", text="a dog", limit=100)))
    assert any("golden retriever" in caption for caption in captions)


def test_the_lexicon_is_built_at_the_first_start_and_not_again(make_client, small_lexicon):
    client = make_client(wordnet_dir=small_lexicon, default_database="wordnet", build_default_database=True)
    until(lambda: listed(client))
    at_rest(client)
    (reply,) = listed(client)
    assert (reply["name"], reply["default"], reply["models"], reply["problem"]) == ("wordnet", True, ["fake"], None)
    client.__exit__(None, None, None)

    encoder = CaptionEncoder()
    client = make_client(
        encoders=[encoder], wordnet_dir=small_lexicon, default_database="wordnet", build_default_database=True
    )
    assert listed(client) == [reply]
    built(client, "others", captions=["a red owl"])
    assert told_of(client, "wordnet") == reply
    assert not [text for text in encoder.encoded_texts if "golden retriever" in text]


def test_a_lexicon_that_is_not_there_keeps_no_service_from_starting(make_client, tmp_path):
    client = make_client(wordnet_dir=tmp_path / "nowhere", build_default_database=True)
    assert client.get("/readyz").status_code == 200
    built(client, captions=["a red owl"])
    assert {each["name"] for each in listed(client)} >= {"things"}


# --- the contract --------------------------------------------------------------------------------------------------


def test_the_routes_are_described_with_every_form_and_every_answer():
    api = create_app(Settings(data_dir="/nowhere")).openapi()
    paths = {path: item for path, item in api["paths"].items() if path.startswith(ALL)}
    described = {(path.removeprefix(ALL), method) for path, item in paths.items() for method in item}
    assert described == {
        ("", "get"),
        ("/{name}", "get"),
        ("/{name}", "put"),
        ("/{name}", "delete"),
        ("/{name}/search", "post"),
    }
    assert "202" in paths[f"{ALL}/{{name}}"]["put"]["responses"]
    assert "204" in paths[f"{ALL}/{{name}}"]["delete"]["responses"]
    bodies = paths[f"{ALL}/{{name}}/search"]["post"]["requestBody"]["content"]
    assert {"application/json", "multipart/form-data"} <= set(bodies)
    assert any(media_type.startswith("image/") for media_type in bodies)


def test_scores_fall_as_captions_come_later_on_every_page(things):
    pages = paged(things, 7, image=encoded(picture("red")))
    assert all(before["score"] >= after["score"] for before, after in pairwise(pages))
