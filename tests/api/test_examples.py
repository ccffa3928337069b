"""Example images over HTTP: added, listed, deleted for good, imported, and what they are evidence for."""

import base64
import hashlib
import json
import os
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import numpy as np
import pytest
import structlog

from app.classification.methods import METHODS
from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.settings import Settings
from tests.api.problems import fields_of, problem_of
from tests.api.test_descriptions import ended
from tests.conftest import photograph, picture
from tests.gated import GatedEncoder
from tests.hostile_trees import plant

CLASSES = ("tomato", "leaf", "sky")
AT = "/v1/label-sets/things"
IMAGES = f"{AT}/images"
SELECTION = f"{AT}/selection"
NONE = "/v1/label-sets/none"
NO_LABELS = {"labelled_images": 0, "several_classes": 0}


@pytest.fixture
def things(client):
    return with_things(client)


def with_things(client, classes=CLASSES):
    """Return the client, its label set made; the fake encoder cannot tell these words apart by the pictures."""
    client.put(AT, json={"classes": list(classes)}).raise_for_status()
    return client


def shade(kind, number, file_format="PNG"):
    """Return a picture of class ``kind``, 0 to 2, mostly red, green or blue; each number has another file."""
    rng = np.random.default_rng((kind, number))
    colour = rng.integers(0, 60, 3)
    colour[kind] = rng.integers(170, 230)
    return picture(tuple(colour.tolist()), size=(16 + number, 16), file_format=file_format)


def noise(seed):
    """Return a picture whose file has no run of bytes that another file would have."""
    return photograph(np.random.default_rng(seed).integers(0, 255, (40, 40, 3)).astype(np.uint8), "PNG")


def add(client, images, classes=None, at=IMAGES):
    files = [("image", (f"{number}.png", image, "image/png")) for number, image in enumerate(images)]
    return client.post(at, files=files, data={} if classes is None else {"class": classes})


def added(response):
    assert response.status_code == 201, response.text
    return response.json()


def teach(client, each=4, unlabelled=0):
    """Add ``each`` labelled examples of every class and some unlabelled ones, and return the job's result."""
    if unlabelled:
        added(add(client, [shade(number % 3, 100 + number) for number in range(unlabelled)]))
    labelled = [(kind, number) for number in range(each) for kind in range(3)]
    reply = added(add(client, [shade(*which) for which in labelled], [CLASSES[kind] for kind, _ in labelled]))
    return finished(client, reply["job"])


def finished(client, job):
    """Return the job when it has ended well."""
    give_up_at = time.monotonic() + 20
    while time.monotonic() < give_up_at:
        reply = client.get(f"/v1/jobs/{job}").json()
        if reply["finished_at"]:
            assert reply["status"] == "succeeded", reply
            return reply
        time.sleep(0.01)
    raise AssertionError(reply)


def at_rest(client):
    """Wait until every job has ended, also those that others begin."""
    while open_jobs := [job["id"] for job in client.get("/v1/jobs").json()["jobs"] if not job["finished_at"]]:
        for job in open_jobs:
            finished(client, job)


def listed(client, **query):
    response = client.get(IMAGES, params=query)
    assert response.status_code == 200, response.text
    return response.json()


def counts(client):
    return listed(client)["counts"]


def classes_of(client):
    return [each["class"] for each in listed(client)["images"]]


def try_jobs(client):
    return [job for job in client.get("/v1/jobs").json()["jobs"] if job["kind"] == "select-method"]


# --- adding and listing --------------------------------------------------------------------------------------------


def test_what_is_kept_of_an_image_is_its_hash_its_class_its_time_and_its_features(things):
    images = [shade(0, 0), shade(1, 0, "JPEG"), shade(2, 0)]
    reply = added(add(things, images, ["tomato", "leaf", ""]))
    assert {key: reply[key] for key in ("added", "relabelled", "duplicates", "skipped")} == {
        "added": 3,
        "relabelled": 0,
        "duplicates": 0,
        "skipped": [],
    }
    assert reply["counts"] == {
        "revision": 1,
        "labelled": {"leaf": 1, "tomato": 1},
        "labelled_images": 2,
        "several_classes": 0,
        "unlabelled": 1,
        "without_features": 0,
    }
    page = listed(things)
    assert page["counts"] == reply["counts"]
    assert page["next_after"] is None
    assert [each["sha256"] for each in page["images"]] == [hashlib.sha256(image).hexdigest() for image in images]
    assert [each["class"] for each in page["images"]] == ["tomato", "leaf", None]
    for each in page["images"]:
        assert set(each) == {"id", "sha256", "class", "classes", "created_at", "kept", "models"}
        assert (each["kept"], each["models"]) == (False, 1)
        assert abs(datetime.now(UTC) - datetime.fromisoformat(each["created_at"])) < timedelta(minutes=1)
        assert things.get(f"{IMAGES}/{each['id']}").json() == each


@pytest.mark.parametrize(
    ("given", "reply"),
    [
        (None, [None, None, None]),
        (["sky"], ["sky", "sky", "sky"]),
        (["tomato", "leaf", "sky"], ["tomato", "leaf", "sky"]),
        (["", "leaf", " "], [None, "leaf", None]),
        (["", "", ""], [None, None, None]),
        ([" coffee  cup", "cafe\u0301", "sky"], ["coffee cup", "caf\u00e9", "sky"]),
    ],
)
def test_classes_are_given_for_none_for_all_or_for_each(client, given, reply):
    with_things(client, [*CLASSES, "coffee cup", "caf\u00e9"])
    added(add(client, [shade(kind, 0) for kind in range(3)], given))
    assert classes_of(client) == reply


@pytest.mark.parametrize(
    ("images", "given", "reply"),
    [
        (2, ['["tomato", "leaf"]'], [["tomato", "leaf"]] * 2),
        (3, ['["sky", "leaf"]', "sky", ""], [["sky", "leaf"], ["sky"], []]),
        (2, ['["sky", " sky "]', "[]"], [["sky"], []]),
        (1, ["tomato", "sky"], [["tomato", "sky"]]),
        (1, ['["tomato"]', "leaf", "", "leaf"], [["tomato", "leaf"]]),
        (1, ["[x]"], [["[x]"]]),
    ],
)
def test_an_image_may_have_several_classes(client, images, given, reply):
    with_things(client, [*CLASSES, "[x]"])
    added(add(client, [shade(0, number) for number in range(images)], given))
    page = listed(client)
    assert [each["classes"] for each in page["images"]] == reply
    assert [each["class"] for each in page["images"]] == [names[0] if len(names) == 1 else None for names in reply]
    assert page["counts"]["several_classes"] == sum(len(names) > 1 for names in reply)


@pytest.mark.parametrize(
    "given", ["[tomato]", '["tomato", 1]', '[["tomato"]]', '["tomato", ""]', '["a", "b", "c", "d"]', "[" * 5000]
)
def test_a_list_of_classes_that_is_not_a_json_array_of_names_is_refused(things, given):
    assert fields_of(add(things, [shade(0, 0)], [given])) == {"class"}
    assert "puma" in problem_of(add(things, [shade(0, 0)], ['["tomato", "puma"]']), "unknown-name")["detail"]
    assert counts(things)["revision"] == 0


def test_classes_that_do_not_fit_the_images_are_refused_and_nothing_is_added(things):
    images = [shade(kind, 0) for kind in range(3)]
    assert fields_of(add(things, images, ["tomato", "leaf"])) == {"class"}
    assert fields_of(add(things, images, ["tomato"] * 4)) == {"class"}
    assert fields_of(add(things, images, [""])) == {"class"}
    detail = problem_of(add(things, images, ["tomato", "", "puma"]), "unknown-name")["detail"]
    assert "unknown class 'puma'; known: leaf, sky, tomato" in detail
    problem_of(add(things, images, ["Tomato"]), "unknown-name")
    assert counts(things) == {"revision": 0, "labelled": {}, **NO_LABELS, "unlabelled": 0, "without_features": 0}
    assert things.get("/v1/jobs").json()["jobs"] == []


def test_an_image_that_is_there_is_not_added_again_and_takes_on_the_class_it_is_given(things, encoder):
    first, second = shade(0, 0), shade(1, 0)
    added(add(things, [first, second, first], ["tomato", "", "leaf"]))
    at_rest(things)
    encoder.image_batches.clear()

    same = added(add(things, [first, second], ["tomato", ""]))
    assert (same["added"], same["relabelled"], same["duplicates"], same["job"]) == (0, 0, 2, None)
    assert same["counts"]["revision"] == 1

    without = added(add(things, [first]))
    assert (without["duplicates"], without["job"]) == (1, None)

    other = added(add(things, [first, second, shade(2, 0)], ["sky", "leaf", "sky"]))
    assert (other["added"], other["relabelled"], other["duplicates"]) == (1, 2, 0)
    assert other["counts"]["revision"] == 2
    assert other["job"] is not None
    assert classes_of(things) == ["sky", "leaf", "sky"]
    assert sum(encoder.image_batches) == 1


def test_an_image_that_is_given_twice_is_added_once(things):
    reply = added(add(things, [shade(0, 0), shade(0, 0)], ["tomato", "tomato"]))
    assert (reply["added"], reply["duplicates"]) == (1, 1)
    assert classes_of(things) == ["tomato"]


def test_images_that_cannot_be_read_are_skipped_with_their_place_and_the_others_added(make_client):
    client = with_things(make_client(max_image_bytes=2000))
    images = [b"nonsense", shade(0, 0), shade(1, 0) + bytes(2000), shade(2, 0), shade(0, 1)[:40]]
    reply = added(add(client, images, ["tomato", "tomato", "leaf", "sky", "tomato"]))
    assert reply["added"] == 2
    assert [each["image"] for each in reply["skipped"]] == [0, 2, 4]
    assert all(each["problem"] for each in reply["skipped"])
    assert "DEIXIS_MAX_IMAGE_BYTES" in reply["skipped"][1]["problem"]
    assert classes_of(client) == ["tomato", "sky"]


def test_when_no_image_can_be_read_the_answer_is_the_error_of_the_first(make_client):
    client = with_things(make_client(max_image_bytes=2000))
    problem_of(add(client, [b"nonsense", b""], ["tomato"]), "not-an-image")
    problem_of(add(client, [shade(0, 0) + bytes(2000), b""], ["tomato"]), "image-too-large")
    assert counts(client)["revision"] == 0
    assert client.get("/v1/jobs").json()["jobs"] == []


def test_more_images_than_are_encoded_at_once_keep_their_order(things):
    images = [shade(number % 3, number) for number in range(40)]
    images[20] = b"nonsense"
    classes = [CLASSES[number % 3] for number in range(40)]
    reply = added(add(things, images, classes))
    assert (reply["added"], [each["image"] for each in reply["skipped"]]) == (39, [20])
    assert [(each["sha256"], each["class"]) for each in listed(things)["images"]] == [
        (hashlib.sha256(image).hexdigest(), classname)
        for image, classname in zip(images, classes, strict=True)
        if image != b"nonsense"
    ]


@pytest.mark.parametrize("method", ["get", "delete"])
def test_a_class_that_is_none_is_not_taken_for_one_without_images(things, method):
    """A client that misspells a field of a deletion must not get a success response."""
    added(add(things, [shade(0, 0)], ["tomato"]))
    problem = getattr(things, method)(IMAGES, params={"class": "tomatoo"})
    assert problem.status_code == 404
    assert "leaf, sky, tomato" in problem.json()["detail"]
    assert counts(things)["labelled"] == {"tomato": 1}
    assert getattr(things, method)(IMAGES, params={"class": " tomato "}).status_code == 200


def test_images_are_listed_a_page_at_a_time_and_by_class(things):
    added(add(things, [shade(number % 3, number) for number in range(10)], [*CLASSES * 3, ""]))
    everything = listed(things)["images"]
    found, after = [], 0
    while after is not None:
        page = listed(things, limit=4, after=after)
        assert page["counts"] == {
            "revision": 1,
            "labelled": {"leaf": 3, "sky": 3, "tomato": 3},
            "labelled_images": 9,
            "several_classes": 0,
            "unlabelled": 1,
            "without_features": 0,
        }
        found += page["images"]
        after = page["next_after"]
    assert found == everything
    assert listed(things, limit=10)["next_after"] is None
    for query, classname in [({"class": "leaf"}, "leaf"), ({"unlabelled": True}, None)]:
        expected = [each for each in everything if each["class"] == classname]
        assert listed(things, **query)["images"] == expected
    first, *rest = [each for each in everything if each["class"] == "leaf"]
    page = listed(things, **{"class": "leaf", "limit": 1})
    assert (page["images"], page["next_after"]) == ([first], first["id"])
    assert listed(things, **{"class": "leaf", "after": first["id"]})["images"] == rest


def test_an_invalid_page_is_reported_with_its_field(things):
    for name, value in [
        ("limit", 0),
        ("limit", 1001),
        ("limit", "x"),
        ("after", -1),
        ("after", 2**63),
        ("unlabelled", "perhaps"),
    ]:
        assert fields_of(things.get(IMAGES, params={name: value})) == {name}


def test_a_model_that_has_not_seen_an_image_has_no_use_for_it(make_client):
    first = with_things(make_client())
    added(add(first, [shade(kind, 0) for kind in range(3)], CLASSES))
    second = make_client(encoders=[FakeEncoder("another"), FakeEncoder()])
    assert counts(second)["without_features"] == 3
    added(add(second, [shade(0, 0)]))
    assert counts(second)["without_features"] == 2
    assert [each["models"] for each in listed(second)["images"]] == [2, 1, 1]


# --- requests that are refused -------------------------------------------------------------------------------------


def test_an_invalid_request_is_reported_with_its_field_and_adds_nothing(things):
    red = ("image", ("a.png", shade(0, 0)))
    assert fields_of(things.post(IMAGES, files=[("class", (None, "tomato"))])) == {"image"}
    assert fields_of(things.post(IMAGES, files=[red], data={"label": "tomato"})) == {"label"}
    assert fields_of(things.post(IMAGES, files=[red, ("class", ("a.txt", b"tomato"))])) == {"class"}
    assert fields_of(things.post(IMAGES, files=[red, ("picture", ("a.png", shade(0, 1)))])) == {"picture"}
    assert fields_of(things.post(IMAGES, files=[("image", (None, "text"))])) == {"image"}
    for media_type in ("image/png", "text/plain", "application/x-www-form-urlencoded", ""):
        response = things.post(IMAGES, content=shade(0, 0), headers={"content-type": media_type})
        assert "multipart/form-data" in problem_of(response, "unsupported-media-type")["detail"]
    form = {"content-type": "multipart/form-data; boundary=b"}
    problem_of(things.post(IMAGES, content=b"nothing", headers=form), "malformed-request")
    assert counts(things)["revision"] == 0


def test_an_invalid_import_is_reported_with_its_field(things):
    def post(body):
        return things.post(IMAGES, content=body, headers={"content-type": "application/json"})

    for body in ("", "{", "nonsense"):
        problem_of(post(body), "malformed-request")
    for body, fields in [
        ({}, {"folder"}),
        ({"folder": ""}, {"folder"}),
        ({"folder": 3}, {"folder"}),
        ({"folder": "x" * 4097}, {"folder"}),
        ({"folder": "a", "by_subfolder": "perhaps"}, {"by_subfolder"}),
        ({"folder": "a", "images": []}, {"images"}),
        ({"folder": "a", "class": ["sky"]}, {"class"}),
    ]:
        assert fields_of(post(json.dumps(body))) == fields, body


def test_a_label_set_that_is_not_there_is_unknown_on_every_route(things):
    added(add(things, [shade(0, 0)]))
    for response in (
        add(things, [shade(0, 0)], at=f"{NONE}/images"),
        things.post(f"{NONE}/images", json={"folder": "a"}),
        things.get(f"{NONE}/images"),
        things.get(f"{NONE}/images/1"),
        things.get(f"{NONE}/images/1/content"),
        things.delete(f"{NONE}/images", params={"all": True}),
        things.delete(f"{NONE}/images/1"),
        things.get(f"{NONE}/selection"),
    ):
        assert "'none'; known: things" in problem_of(response, "unknown-name")["detail"]
    assert counts(things)["unlabelled"] == 1


def test_a_name_that_breaks_a_rule_is_refused_on_every_route(client):
    at = f"/v1/label-sets/{quote('a@1')}"
    for response in (
        add(client, [shade(0, 0)], at=f"{at}/images"),
        client.get(f"{at}/images"),
        client.get(f"{at}/images/1"),
        client.get(f"{at}/images/1/content"),
        client.delete(f"{at}/images", params={"all": True}),
        client.delete(f"{at}/images/1"),
        client.get(f"{at}/selection"),
    ):
        assert fields_of(response) == {"name"}


def test_any_id_without_an_image_is_unknown(things):
    for image_id in (0, -1, 7, 2**63, 10**30):
        for response in (
            things.get(f"{IMAGES}/{image_id}"),
            things.get(f"{IMAGES}/{image_id}/content"),
            things.delete(f"{IMAGES}/{image_id}"),
        ):
            assert str(image_id) in problem_of(response, "unknown-name")["detail"]
    for image_id in ("first", "1.5", "9" * 5000):
        assert fields_of(things.get(f"{IMAGES}/{image_id}")) == {"image_id"}


def test_an_image_of_another_label_set_is_not_found(things):
    things.put("/v1/label-sets/others", json={"classes": ["sky"]})
    added(add(things, [shade(0, 0)]))
    (mine,) = listed(things)["images"]
    for response in (
        things.get(f"/v1/label-sets/others/images/{mine['id']}"),
        things.get(f"/v1/label-sets/others/images/{mine['id']}/content"),
        things.delete(f"/v1/label-sets/others/images/{mine['id']}"),
    ):
        problem_of(response, "unknown-name")
    assert listed(things)["images"] == [mine]


def test_too_many_images_or_bytes_in_a_request_are_refused_with_the_limit(make_client):
    client = with_things(make_client(max_evaluation_images=3, max_request_bytes=5000))
    added(add(client, [shade(0, number) for number in range(3)]))
    for many in (4, 5, 8):
        detail = problem_of(add(client, [shade(1, number) for number in range(many)]), "too-large")["detail"]
        assert "more than 3 images" in detail
    problem_of(add(client, [shade(0, 9)], ["sky"] * 9), "too-large")
    detail = problem_of(add(client, [shade(1, 0) + bytes(5000)]), "body-too-large")["detail"]
    assert "DEIXIS_MAX_REQUEST_BYTES" in detail
    assert counts(client) == {"revision": 1, "labelled": {}, **NO_LABELS, "unlabelled": 3, "without_features": 0}


def test_a_label_set_holds_as_many_examples_as_allowed_and_not_one_more(make_client):
    client = with_things(make_client(max_examples=3))
    added(add(client, [shade(0, number) for number in range(3)], ["tomato"]))
    response = add(client, [shade(0, 2), shade(0, 3)], ["tomato"])
    detail = problem_of(response, "too-large")["detail"]
    assert "DEIXIS_MAX_EXAMPLES" in detail
    assert "4" in detail
    assert added(add(client, [shade(0, 0)], ["leaf"]))["relabelled"] == 1
    client.delete(IMAGES, params={"class": "leaf"}).raise_for_status()
    assert added(add(client, [shade(0, 3)]))["added"] == 1


# --- deleting ------------------------------------------------------------------------------------------------------


def test_what_is_deleted_is_gone_and_the_rest_stays(things):
    added(add(things, [shade(number % 3, number) for number in range(12)], [*CLASSES * 3, "", "", ""]))
    before = listed(things)["images"]

    def left(response, deleted):
        assert response.status_code == 200, response.text
        reply = response.json()
        assert (reply["deleted"], reply["job"] is not None) == (deleted, deleted > 0)
        assert reply["counts"] == counts(things)
        return [each["class"] for each in listed(things)["images"]]

    assert left(things.delete(IMAGES, params={"class": "leaf"}), 3) == ["tomato", "sky"] * 3 + [None] * 3
    assert left(things.delete(IMAGES, params={"class": "leaf"}), 0) == ["tomato", "sky"] * 3 + [None] * 3
    assert left(things.delete(IMAGES, params={"unlabelled": True}), 3) == ["tomato", "sky"] * 3
    assert left(things.delete(f"{IMAGES}/{before[0]['id']}"), 1) == ["sky", "tomato", "sky", "tomato", "sky"]
    problem_of(things.get(f"{IMAGES}/{before[0]['id']}"), "unknown-name")
    problem_of(things.delete(f"{IMAGES}/{before[0]['id']}"), "unknown-name")
    assert left(things.delete(IMAGES, params={"all": True}), 5) == []
    assert counts(things) == {"revision": 5, "labelled": {}, **NO_LABELS, "unlabelled": 0, "without_features": 0}


def test_a_deletion_says_what_in_one_way_or_nothing_is_deleted(things):
    added(add(things, [shade(0, 0), shade(2, 0)], ["", "sky"]))
    for query in (
        {},
        {"all": False},
        {"unlabelled": False},
        {"class": "sky", "all": True},
        {"class": "sky", "unlabelled": True},
        {"all": True, "unlabelled": True},
        {"class": "sky", "unlabelled": True, "all": True},
    ):
        assert "all=true" in problem_of(things.delete(IMAGES, params=query), "invalid-field")["detail"]
    assert counts(things) == {
        "revision": 1,
        "labelled": {"sky": 1},
        "labelled_images": 1,
        "several_classes": 0,
        "unlabelled": 1,
        "without_features": 0,
    }


def test_examples_of_a_class_that_is_gone_are_counted_and_can_be_deleted(things):
    added(add(things, [shade(0, 0), shade(1, 0)], ["tomato", "leaf"]))
    things.delete(f"{AT}/classes/leaf").raise_for_status()
    assert counts(things)["labelled"] == {"leaf": 1, "tomato": 1}
    problem_of(add(things, [shade(1, 1)], ["leaf"]), "unknown-name")
    assert things.delete(IMAGES, params={"class": "leaf"}).json()["deleted"] == 1
    assert counts(things)["labelled"] == {"tomato": 1}


def test_a_label_set_that_is_deleted_and_made_again_has_no_old_examples_and_no_old_choice(make_client):
    client = with_things(make_client(keep_images=True))
    teach(client)
    assert client.get(SELECTION).json()["method"] != "zero-shot"
    ids = [each["id"] for each in listed(client)["images"]]
    client.delete(AT).raise_for_status()
    problem_of(client.get(IMAGES), "unknown-name")
    with_things(client)
    assert listed(client)["images"] == []
    assert counts(client)["labelled"] == {}
    problem_of(client.get(SELECTION), "unknown-name")
    for image_id in ids:
        problem_of(client.get(f"{IMAGES}/{image_id}/content"), "unknown-name")
    answer = client.post("/classify", files={"image": shade(0, 50)}, data={"label_set": "things"}).json()
    assert (answer["method"], answer["examples"], answer["calibration"]) == ("zero-shot", None, None)
    assert added(add(client, [shade(0, 0)], ["tomato"]))["added"] == 1


def files_with(folder, piece):
    return [file.name for file in folder.rglob("*") if file.is_file() and piece in file.read_bytes()]


@pytest.mark.parametrize("how", ["by id", "by class", "unlabelled", "all", "with the label set"])
def test_a_kept_file_that_is_deleted_leaves_no_bytes_in_the_data_folder(make_client, settings, how):
    """Not in the database, and not in its write-ahead log either."""
    client = with_things(make_client(keep_images=True))
    image, other = noise(1), noise(2)
    added(add(client, [image, shade(1, 0)], ["" if how == "unlabelled" else "tomato", "leaf"]))
    added(add(client, [other], ["sky"]))
    pieces = [image[at : at + 24] for at in range(60, len(image) - 24, 24)]
    assert files_with(settings.data_dir, pieces[0])
    at_rest(client)
    (first, *_) = listed(client)["images"]
    match how:
        case "by id":
            client.delete(f"{IMAGES}/{first['id']}").raise_for_status()
        case "by class":
            client.delete(IMAGES, params={"class": "tomato"}).raise_for_status()
        case "unlabelled":
            client.delete(IMAGES, params={"unlabelled": True}).raise_for_status()
        case "all":
            client.delete(IMAGES, params={"all": True}).raise_for_status()
        case "with the label set":
            client.delete(AT).raise_for_status()
    assert [found for piece in pieces if (found := files_with(settings.data_dir, piece))] == []
    assert bool(files_with(settings.data_dir, other[60:84])) == (how not in {"all", "with the label set"})


# --- files ---------------------------------------------------------------------------------------------------------


def test_files_are_not_stored_by_default(things, settings):
    image = noise(3)
    added(add(things, [image]))
    (reply,) = listed(things)["images"]
    assert reply["kept"] is False
    problem = problem_of(things.get(f"{IMAGES}/{reply['id']}/content"), "unknown-name")
    assert "DEIXIS_KEEP_IMAGES" in problem["detail"]
    for at in range(60, len(image) - 24, 24):
        assert files_with(settings.data_dir, image[at : at + 24]) == []


def test_a_file_that_is_kept_comes_back_as_it_was_and_is_never_shown_by_a_browser(make_client):
    client = with_things(make_client(keep_images=True))
    images = [shade(0, 0), shade(1, 0, "JPEG"), noise(4)]
    added(add(client, images))
    for image, reply in zip(images, listed(client)["images"], strict=True):
        assert reply["kept"] is True
        response = client.get(f"{IMAGES}/{reply['id']}/content")
        assert (response.status_code, response.content) == (200, image)
        assert response.headers["content-type"] == "application/octet-stream"
        assert response.headers["content-disposition"].startswith("attachment")
        assert response.headers["x-content-type-options"] == "nosniff"


def test_a_file_is_kept_from_the_time_that_it_is_given_again(make_client):
    image = shade(0, 0)
    added(add(with_things(make_client()), [image], ["tomato"]))
    keeping = make_client(keep_images=True)
    reply = added(add(keeping, [image]))
    assert (reply["added"], reply["relabelled"], reply["duplicates"]) == (0, 0, 1)
    (known,) = listed(keeping)["images"]
    assert known["kept"] is True
    assert keeping.get(f"{IMAGES}/{known['id']}/content").content == image


def test_another_model_encodes_the_files_that_were_kept(make_client):
    first = with_things(make_client(keep_images=True))
    teach(first)
    other = make_client(encoders=[FakeEncoder("another")], keep_images=True)
    assert counts(other)["without_features"] == 12
    problem_of(other.get(SELECTION), "unknown-name")
    added(add(other, [shade(0, 90)], ["tomato"]))
    at_rest(other)
    assert counts(other)["without_features"] == 0
    assert other.get(SELECTION).json()["labelled"] == 13


# --- folders of the server -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Pictures in subfolders with the names of classes, one file that is none, and one more folder beside."""
    root = tmp_path / "import"
    for kind, name in enumerate(("tomato", "leaf", "blue_sky")):
        (root / "garden" / name).mkdir(parents=True)
        for number in range(4):
            (root / "garden" / name / f"{number}.png").write_bytes(shade(kind, number))
    (root / "garden" / "leaf" / "bad.jpg").write_bytes(b"nonsense")
    (root / "garden" / "leaf" / "notes.txt").write_bytes(b"no picture")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "0.png").write_bytes(shade(0, 70))
    return root


@pytest.fixture
def importing(make_client, folder):
    return with_things(make_client(import_dir=folder), ["tomato", "leaf", "blue sky"])


def imported(client, **body):
    response = client.post(IMAGES, json={"folder": "garden", **body})
    job = ended(client, response)
    assert (job["kind"], job["status"]) == ("import-images", "succeeded"), job
    return job


def test_a_folder_is_imported_as_a_job_each_subfolder_a_class(importing):
    job = imported(importing, by_subfolder=True)
    assert (job["done"], job["total"], job["label_set"]) == (13, 13, "things")
    result = job["result"]
    assert {key: result[key] for key in ("added", "relabelled", "duplicates", "skipped_count")} == {
        "added": 12,
        "relabelled": 0,
        "duplicates": 0,
        "skipped_count": 1,
    }
    (skipped,) = result["skipped"]
    assert skipped["file"].endswith("leaf/bad.jpg")
    assert skipped["problem"]
    assert counts(importing)["labelled"] == {"tomato": 4, "leaf": 4, "blue sky": 4}
    finished(importing, result["job"])
    assert importing.get(SELECTION).json()["labelled"] == 12


@pytest.mark.skipif(os.name == "nt", reason="it has no pipes, and other names")
def test_a_folder_with_every_kind_of_file_is_imported(make_client, tmp_path):
    tree = plant(tmp_path / "in" / "garden" / "leaf")
    client = with_things(make_client(import_dir=tmp_path / "in"), ["tomato", "leaf"])
    result = imported(client, by_subfolder=True)["result"]
    assert result["added"] == len(tree.good)
    skipped = [each["file"].rpartition("/")[2] for each in result["skipped"]]
    assert sorted(skipped) == sorted(path.name for path in tree.bad if path.suffix)
    assert {each["file"]: each["problem"] for each in result["skipped"]}["leaf/pipe.png"].endswith("a named pipe")


def test_a_folder_is_imported_as_one_class_or_unlabelled_and_again_without_harm(importing, encoder):
    assert imported(importing)["result"]["added"] == 12
    assert counts(importing) == {"revision": 1, "labelled": {}, **NO_LABELS, "unlabelled": 12, "without_features": 0}
    encoder.image_batches.clear()
    again = imported(importing, **{"class": "leaf"})["result"]
    assert (again["added"], again["relabelled"], again["duplicates"]) == (0, 12, 0)
    assert counts(importing)["labelled"] == {"leaf": 12}
    assert imported(importing)["result"]["duplicates"] == 12
    assert encoder.image_batches == []


def test_a_folder_is_imported_with_several_classes(importing):
    job = imported(importing, classes=["leaf", "tomato"])
    found = listed(importing)
    assert job["result"]["added"] == len(found["images"]) == found["counts"]["several_classes"]
    assert all(each["classes"] == ["leaf", "tomato"] for each in found["images"])


def test_without_a_folder_to_import_from_nothing_is_imported(things):
    response = things.post(IMAGES, json={"folder": "garden"})
    assert fields_of(response) == {"folder"}
    assert "DEIXIS_IMPORT_DIR" in response.json()["detail"]


def test_no_name_leads_out_of_the_folder_to_import_from(importing, folder):
    (folder / "way-out").symlink_to(folder.parent / "secret")
    for name in (
        "..",
        "../secret",
        "garden/../../secret",
        "garden/../../import/../secret",
        "/",
        "/etc",
        "nowhere",
        "garden/leaf/0.png",
        "way-out",
        "a\0b",
        "garden\0",
        "x" * 4096,
        "~",
        "%2e%2e/secret",
    ):
        response = importing.post(IMAGES, json={"folder": name})
        assert fields_of(response) == {"folder"}, name
        assert len(response.content) < 2000
        assert str(folder) not in response.text
    assert importing.get("/v1/jobs").json()["jobs"] == []


def test_an_absolute_path_does_not_name_a_folder_outside(importing, folder):
    assert fields_of(importing.post(IMAGES, json={"folder": str(folder.parent / "secret")})) == {"folder"}
    assert importing.post(IMAGES, json={"folder": "garden/leaf/.."}).status_code == 202


def test_a_loop_of_links_is_not_a_folder(importing, folder):
    (folder / "loop").symlink_to(folder / "loop")
    assert fields_of(importing.post(IMAGES, json={"folder": "loop"})) == {"folder"}


def test_links_out_of_the_folder_are_left_out_of_an_import(importing, folder):
    secret = folder.parent / "secret"
    (folder / "garden" / "leaf" / "linked.png").symlink_to(secret / "0.png")
    (folder / "garden" / "tomato" / "all").symlink_to(secret)
    assert imported(importing, by_subfolder=True)["result"]["added"] == 12
    hashes = {each["sha256"] for each in listed(importing)["images"]}
    assert hashlib.sha256((secret / "0.png").read_bytes()).hexdigest() not in hashes


def test_an_import_that_fails_is_reported_at_once_or_by_the_job(importing, folder):
    both = importing.post(IMAGES, json={"folder": "garden", "by_subfolder": True, "class": "leaf"})
    assert fields_of(both) == {"class"}
    assert fields_of(importing.post(IMAGES, json={"folder": "garden", "class": ""})) == {"class"}
    assert fields_of(importing.post(IMAGES, json={"folder": "garden", "class": "leaf", "classes": ["sky"]})) == {
        "class"
    }
    assert fields_of(importing.post(IMAGES, json={"folder": "garden", "classes": []})) == {"classes"}
    problem_of(importing.post(IMAGES, json={"folder": "garden", "class": "puma"}), "unknown-name")
    assert importing.get("/v1/jobs").json()["jobs"] == []
    (folder / "empty").mkdir()
    failed = ended(importing, importing.post(IMAGES, json={"folder": "empty"}))
    assert (failed["status"], "no image" in failed["error"]) == ("failed", True)
    (folder / "garden" / "puma").mkdir()
    (folder / "garden" / "puma" / "0.png").write_bytes(shade(0, 60))
    failed = ended(importing, importing.post(IMAGES, json={"folder": "garden", "by_subfolder": True}))
    assert failed["status"] == "failed"
    assert "unknown class 'puma'; known: blue sky, leaf, tomato" in failed["error"]
    assert counts(importing)["revision"] == 0


def test_a_folder_is_imported_through_a_queue_that_is_shorter_than_it(make_client, folder):
    client = with_things(make_client(import_dir=folder, max_queued_images=8), ["tomato", "leaf", "blue sky"])
    assert imported(client)["result"]["added"] == 12


def test_images_are_added_through_a_queue_that_is_shorter_than_they_are_many(make_client):
    client = with_things(make_client(max_queued_images=8))
    assert added(add(client, [shade(0, number) for number in range(12)]))["added"] == 12


# --- what they are evidence for ------------------------------------------------------------------------------------


def test_the_selection_exists_after_the_comparison_and_has_every_field(things):
    problem_of(things.get(SELECTION), "unknown-name")
    job = teach(things, each=8)
    reply = things.get(SELECTION).json()
    assert (reply["version"], reply["examples_revision"], reply["current"]) == (1, 1, True)
    assert (reply["labelled"], reply["unlabelled"], reply["folds"]) == (24, 0, 5)
    rows = {row["method"]: row for row in reply["leaderboard"]}
    assert set(rows) == {
        name
        for name, method in METHODS.items()
        if not (method.is_control or method.stateful or "unlabelled images" in method.learns)
    }
    accuracies = [row["accuracy"] for row in reply["leaderboard"]]
    assert accuracies == sorted(accuracies, reverse=True)
    for row in reply["leaderboard"]:
        low, high = row["interval"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
        assert 0 <= row["macro_f1"] <= 1
        assert 0 <= row["ece"] <= 1
        assert row["nll"] > 0
        assert row["temperature"] > 0
        assert row["ms_per_image"] >= 0
        if row["method"] == "zero-shot":
            assert row["to_zero_shot"] is None
        else:
            difference = row["to_zero_shot"]
            assert difference["mean"] == pytest.approx(row["accuracy"] - rows["zero-shot"]["accuracy"])
            assert difference["low"] <= difference["mean"] <= difference["high"]
            assert 0 <= difference["p"] <= 1
    assert reply["method"] == reply["leaderboard"][0]["method"]
    assert "labelled images" in METHODS[reply["method"]].learns
    assert rows[reply["method"]]["to_zero_shot"]["p"] < 0.05
    assert reply["method"] in reply["reason"]
    assert any("there are no unlabelled images" in each for each in reply["not_run"])
    in_job = job["result"]["models"]["fake"]
    assert {key: reply[key] for key in in_job} == in_job
    assert not {"calibrations", "rejection"} & set(reply)


def test_a_selection_is_of_one_model_and_of_one_that_is_served(make_client):
    client = with_things(make_client(encoders=[FakeEncoder("first"), FakeEncoder("second", logit_bias=-8.0)]))
    teach(client)
    of_default, first, second = (
        client.get(SELECTION, params=query).json() for query in ({}, {"model": "first"}, {"model": "second"})
    )
    assert of_default == first
    assert second["leaderboard"] != first["leaderboard"]
    problem = problem_of(client.get(SELECTION, params={"model": "third"}), "unknown-name")
    assert "known: first, second" in problem["detail"]


def test_a_selection_is_out_of_date_until_the_methods_have_been_tried_again(make_client):
    gated = GatedEncoder()
    client = with_things(make_client(encoders=[gated]))
    teach(client)
    gated.texts_open.clear()
    client.post(f"{AT}/classes", json={"classes": ["stone"]}).raise_for_status()
    try:
        before = client.get(SELECTION).json()
        assert (before["version"], before["current"]) == (1, False)
        client.delete(IMAGES, params={"class": "leaf"}).raise_for_status()
        assert client.get(SELECTION).json()["current"] is False
    finally:
        gated.open()
    at_rest(client)
    after = client.get(SELECTION).json()
    assert (after["version"], after["current"], after["labelled"]) == (2, True, 8)


def test_labelled_images_that_cannot_be_held_out_are_used_without_evidence(things):
    added(add(things, [shade(kind, 0) for kind in range(3)], CLASSES))
    at_rest(things)
    reply = things.get(SELECTION).json()
    assert (reply["method"], reply["folds"], reply["leaderboard"]) == ("gda", 0, [])
    assert "held out" in reply["reason"]


def test_when_all_examples_are_deleted_nothing_that_was_learned_is_used_any_more(things):
    teach(things)
    deleted = things.delete(IMAGES, params={"all": True}).json()
    finished(things, deleted["job"])
    reply = things.get(SELECTION).json()
    assert (reply["method"], reply["labelled"], reply["leaderboard"]) == ("zero-shot", 0, [])
    answer = things.post("/classify", files={"image": shade(0, 50)}, data={"label_set": "things"}).json()
    assert (answer["method"], answer["examples"], answer["calibration"]) == ("zero-shot", None, None)


def test_many_requests_begin_one_job_and_not_one_each(make_client):
    """While the first trial is under way, all that are added meanwhile wait for one more."""
    gated = GatedEncoder()
    client = make_client(encoders=[gated])
    gated.texts_open.clear()
    try:
        with_things(client)
        first = added(add(client, [shade(0, 0)], ["tomato"]))["job"]
        assert gated.texts_entered.acquire(timeout=10)
        while client.get(f"/v1/jobs/{first}").json()["status"] != "running":
            time.sleep(0.01)
        second = added(add(client, [shade(1, 0)], ["leaf"]))["job"]
        with ThreadPoolExecutor(6) as callers:
            sent = [callers.submit(add, client, [shade(2, number)], ["sky"]) for number in range(12)]
            jobs = Counter(added(each.result())["job"] for each in sent)
        assert jobs == {second: 12}
        assert second != first
    finally:
        gated.open()
    at_rest(client)
    assert client.get(SELECTION).json()["examples_revision"] == 14
    assert counts(client)["labelled"] == {"tomato": 1, "leaf": 1, "sky": 12}


def test_one_request_with_many_images_is_one_change_and_one_job(things):
    added(
        add(things, [shade(number % 3, number) for number in range(30)], [CLASSES[number % 3] for number in range(30)])
    )
    assert counts(things)["revision"] == 1
    at_rest(things)
    assert len(try_jobs(things)) == 1


# --- no pixels where they do not belong ----------------------------------------------------------------------------


class Faulty(FakeEncoder):
    """Breaks on blue pictures."""

    def encode_images(self, pixels):
        if any(each[..., 2].mean() > 200 for each in pixels):
            raise ZeroDivisionError("broken")
        return super().encode_images(pixels)


def test_no_answer_and_no_line_of_the_log_holds_a_piece_of_an_image(make_client):
    """Sent in every form, kept or not, readable or not; only ``content`` gives a file back."""
    images = [noise(5), noise(6), noise(7)[:2000]]
    shown = []
    with structlog.testing.capture_logs() as events:
        for keep in (False, True):
            client = with_things(make_client(encoders=[Faulty()], keep_images=keep))
            shown.append(add(client, images, ["tomato", "leaf", "sky"]))
            shown.append(add(client, images[2:]))
            shown.append(add(client, [*images, picture("blue")]))
            shown.append(client.post(IMAGES, content=images[0], headers={"content-type": "image/png"}))
            shown.append(client.post(IMAGES, content=images[0], headers={"content-type": "application/json"}))
            shown.append(client.post(IMAGES, json={"folder": base64.b64encode(images[0]).decode()}))
            shown.append(client.post(IMAGES, files={"class": images[0]}))
            shown.append(client.post(IMAGES, files=[("image", (None, images[0]))]))
            shown.append(client.post(f"{AT}:evaluate", files=[("image", images[0])], data={"class": ["tomato"]}))
            shown.append(client.post("/classify", files={"image": images[0]}, data={"label_set": "things"}))
            at_rest(client)
            shown += [client.get(IMAGES), client.get(f"{IMAGES}/1"), client.get(SELECTION), client.get("/v1/jobs")]
            shown.append(client.delete(IMAGES, params={"class": "tomato"}))
            at_rest(client)
    assert {response.status_code for response in shown} == {200, 201, 202, 400, 404, 415, 422, 500}
    assert len(events) > len(shown)
    assert any(_is_error(event) for event in events)
    logged = "".join(
        repr(event) + "".join(traceback.format_exception(event["exc_info"]) if _is_error(event) else "")
        for event in events
    )
    reply = b"".join(response.content + repr(response.headers).encode() for response in shown)
    for image in images:
        for at in range(60, 1500, 30):
            piece = image[at : at + 12]
            written = [repr(piece)[2:-1], piece.hex(), base64.b64encode(piece).decode(), str(list(piece))[1:-1]]
            assert piece not in reply
            for text in written:
                assert text not in logged
                assert text.encode() not in reply


def _is_error(event):
    return isinstance(event.get("exc_info"), BaseException)


# --- the contract --------------------------------------------------------------------------------------------------


def test_the_routes_are_described_with_both_bodies_and_every_answer():
    api = create_app(Settings(data_dir="/nowhere")).openapi()
    described = {
        (path.removeprefix("/v1/label-sets/{name}"), method)
        for path, item in api["paths"].items()
        for method in item
        if "example images" in item[method].get("tags", ())
    }
    assert described == {
        ("/images", "post"),
        ("/images", "get"),
        ("/images", "delete"),
        ("/images/{image_id}", "get"),
        ("/images/{image_id}", "delete"),
        ("/images/{image_id}/content", "get"),
        ("/selection", "get"),
    }
    adding = api["paths"]["/v1/label-sets/{name}/images"]["post"]
    bodies = adding["requestBody"]["content"]
    assert set(bodies["multipart/form-data"]["schema"]["properties"]) == {"image", "class"}
    assert set(bodies["application/json"]["schema"]["properties"]) == {"folder", "by_subfolder", "class", "classes"}
    assert all(each["schema"]["additionalProperties"] is False for each in bodies.values())
    assert {"201", "202"} <= set(adding["responses"])
    content = api["paths"]["/v1/label-sets/{name}/images/{image_id}/content"]["get"]["responses"]["200"]["content"]
    assert set(content) == {"application/octet-stream"}
    query = {
        each["name"]
        for each in api["paths"]["/v1/label-sets/{name}/images"]["delete"]["parameters"]
        if each["in"] == "query"
    }
    assert query == {"class", "unlabelled", "all"}
    evaluating = api["paths"]["/v1/label-sets/{name}:evaluate"]["post"]["requestBody"]["content"]
    assert set(evaluating["application/json"]["schema"]["properties"]) == {"model", "template", "multi_label"}


def test_a_deletion_with_a_field_that_is_mistyped_or_repeated_deletes_nothing(things):
    added(add(things, [shade(0, 0), shade(1, 1)], ["tomato", "leaf"]))
    for query in ("all=true&clas=leaf", "class=leaf&class=tomato", "unlabelled=true&all=false"):
        assert things.delete(f"{IMAGES}?{query}").status_code == 422
    assert counts(things)["labelled"] == {"tomato": 1, "leaf": 1}


def test_a_lone_image_may_come_with_an_empty_class_as_one_of_many_may(things):
    assert added(add(things, [shade(0, 0)], [""]))["counts"]["unlabelled"] == 1


def test_json_that_is_larger_than_it_need_be_is_refused_before_it_is_parsed(things):
    body = {"folder": "x" * 70_000}
    for path in (IMAGES, "/v1/label-sets/things:evaluate"):
        assert things.post(path, json=body).status_code == 413
