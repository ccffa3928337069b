import asyncio
import json
import sqlite3
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest

from app.models.registry import ModelRegistry
from tests.api.problems import fields_of, problem_of
from tests.api.test_faults import until
from tests.conftest import picture

LYNX = {
    "name": "lynx",
    "descriptions": ["A lynx has tufted ears.", "A lynx has a short tail."],
    "synonyms": ["bobcat"],
    "features": ["tufted ears", "a wild cat"],
    "prompt": "a photo of a {}, the wild cat.",
    "threshold": 0.25,
    "parent": None,
}


def at(name, *rest):
    return "/".join(["/v1/label-sets", *(quote(each, safe="") for each in (name, *rest))])


def put(client, name, classes, headers=None, **fields):
    return client.put(at(name), json={"classes": classes, **fields}, headers=headers)


def names_of(response):
    assert response.status_code < 300, response.text
    return [each["name"] for each in response.json()["classes"]]


# --- writing and reading -------------------------------------------------------------------------------------------


def test_the_first_put_creates_and_later_ones_replace(client):
    first = put(client, "pets", ["cat", "dog"])
    assert first.status_code == 201
    second = put(client, "pets", ["owl"], templates="a {}.")
    assert second.status_code == 200
    assert [first.json()["version"], second.json()["version"]] == [1, 2]
    assert names_of(client.get(at("pets"))) == ["owl"]


def test_what_is_put_is_what_is_got(client):
    sent = [LYNX, "puma", {"name": "owl", "descriptions": ["eyes in front"]}]
    reply = put(client, "cats", sent, templates="a photo of a {}, a kind of cat.", merge_synonyms="mean")
    assert reply.json() == client.get(at("cats")).json()
    body = reply.json()
    assert set(body) == {
        "name",
        "version",
        "classes",
        "templates",
        "merge_synonyms",
        "multi_label",
        "priors",
        "created_at",
    }
    assert body["classes"] == [
        LYNX,
        {
            "name": "puma",
            "descriptions": [],
            "synonyms": [],
            "features": [],
            "prompt": None,
            "threshold": None,
            "parent": None,
        },
        {
            "name": "owl",
            "descriptions": ["eyes in front"],
            "synonyms": [],
            "features": [],
            "prompt": None,
            "threshold": None,
            "parent": None,
        },
    ]
    assert body["merge_synonyms"] == "mean"
    assert body["templates"] == "a photo of a {}, a kind of cat."
    created_at = datetime.fromisoformat(body["created_at"])
    assert abs(datetime.now(UTC) - created_at) < timedelta(minutes=1)


def test_every_label_set_that_comes_with_the_service_can_be_put_as_it_is_got(client):
    (shipped,) = client.get("/v1/shipped-label-sets").json().values()
    assert [entry["name"] for entry in shipped] == [
        "animals",
        "cifar10",
        "clothing",
        "foods",
        "household",
        "scenes",
        "vehicles",
    ]
    for entry in shipped:
        content = client.get(f"/v1/shipped-label-sets/{entry['name']}").json()
        written = client.put(at(entry["name"]), json=content)
        assert written.status_code == 201
        assert {key: written.json()[key] for key in content} == content
        assert names_of(written) == entry["class_names"]
        assert entry["classes"] == len(content["classes"])
        texts = [text for each in content["classes"] for text in each["descriptions"] + each["features"]]
        assert entry["descriptions"] == len(texts)


def test_an_unknown_shipped_label_set_is_refused_with_the_known_names_and_the_most_similar_one(shared_client):
    problem = problem_of(shared_client.get("/v1/shipped-label-sets/animls"), "unknown-name")
    assert problem["detail"] == (
        "unknown shipped label set 'animls'; known: animals, cifar10, clothing, foods, household, scenes, vehicles;"
        " did you mean 'animals'?"
    )


def test_without_templates_a_label_set_has_those_for_photographs(client):
    assert put(client, "pets", ["cat"]).json()["templates"] == "photo"


def test_what_was_got_can_be_put_again(client):
    body = put(client, "cats", [LYNX, "puma"]).json()
    again = put(client, "cats", body["classes"], templates=body["templates"]).json()
    assert again["classes"] == body["classes"]
    assert again["version"] == 2


def test_a_version_never_changes(client):
    first = put(client, "pets", ["cat"]).json()
    put(client, "pets", ["dog"], templates="{}")
    client.post(at("pets", "classes"), json={"classes": ["owl"]})
    client.delete(at("pets", "classes", "dog"))
    assert client.get(at("pets"), params={"version": 1}).json() == first
    contents = [names_of(client.get(at("pets"), params={"version": version})) for version in (1, 2, 3, 4)]
    assert contents == [["cat"], ["dog"], ["dog", "owl"], ["owl"]]


def test_deleting_and_putting_again_continues_the_numbering(client):
    put(client, "pets", ["cat"])
    put(client, "pets", ["dog"])
    deleted = client.delete(at("pets"))
    assert (deleted.status_code, deleted.content) == (204, b"")
    problem_of(client.get(at("pets")), "unknown-name")
    again = put(client, "pets", ["owl"])
    assert (again.status_code, again.json()["version"]) == (201, 3)
    problem_of(client.get(at("pets"), params={"version": 1}), "unknown-name")


# --- adding and removing classes -----------------------------------------------------------------------------------


def test_classes_are_added_at_the_end_as_a_new_version(client):
    put(client, "cats", ["puma"], templates="{}")
    response = client.post(at("cats", "classes"), json={"classes": [LYNX, "owl"]})
    assert names_of(response) == ["puma", "lynx", "owl"]
    assert (response.json()["version"], response.json()["templates"]) == (2, "{}")
    assert response.json()["classes"][1] == LYNX


def test_an_existing_class_is_a_conflict_in_any_letter_case(client):
    put(client, "cats", ["Lynx", "puma"])
    for name in ("Lynx", "lynx", " LYNX "):
        members = problem_of(client.post(at("cats", "classes"), json={"classes": ["owl", name]}), "conflict")
        assert "'Lynx'" in members["detail"]
    assert client.get(at("cats")).json()["version"] == 1


def test_a_class_is_removed_as_a_new_version(client):
    put(client, "cats", ["lynx", "puma"])
    response = client.delete(at("cats", "classes", "lynx"))
    assert names_of(response) == ["puma"]
    assert response.headers["etag"] == '"2"'


def test_a_class_that_is_not_there_is_unknown(client):
    put(client, "cats", ["lynx", "puma"])
    assert "lynx, puma" in problem_of(client.delete(at("cats", "classes", "owl")), "unknown-name")["detail"]


def test_the_last_class_cannot_be_removed(client):
    put(client, "cats", ["lynx"])
    problem_of(client.delete(at("cats", "classes", "lynx")), "conflict")


@pytest.mark.parametrize(
    "name",
    ["AC/DC", "a/b/c", "/", "//", "what?", "100%", "a#b", "a b", "a+b", "é", "犬", "🐈‍⬛", "a;b", 'a"b', "a\\b"],
)
def test_a_class_of_any_name_can_be_removed_by_its_percent_encoded_name(shared_client, name):
    put(shared_client, "things", ["other", name])
    assert names_of(shared_client.delete(at("things", "classes", name))) == ["other"]


@pytest.mark.parametrize("name", [".", "..", " .. ", "a/..", "../a", "a/./b", "a\\..\\b", "/.."])
def test_a_class_whose_url_would_be_that_of_something_else_is_refused_when_it_is_written(shared_client, name):
    put(shared_client, "dotted", ["other"])
    for response in (
        put(shared_client, "dotted", ["other", name]),
        shared_client.post(at("dotted", "classes"), json={"classes": [name]}),
    ):
        assert list(fields_of(response)) in (["classes.1"], ["classes.0"])
    # A label of a request is not part of a URL.
    answer = shared_client.post("/v1/classify", files={"image": picture()}, data={"labels": json.dumps(["cat", name])})
    assert answer.status_code == 200


def test_a_stored_class_whose_url_is_unsafe_is_removed_by_writing_the_set_without_it(client, settings):
    put(client, "pets", ["cat", "dog", "owl"])
    with sqlite3.connect(settings.data_dir / "deixis.sqlite3") as database:
        database.execute("UPDATE label_set_versions SET classes = replace(classes, '\"owl\"', '\"..\"')")
    assert names_of(client.get(at("pets"))) == ["cat", "dog", ".."]
    assert names_of(put(client, "pets", ["cat", "dog"])) == ["cat", "dog"]


@pytest.mark.parametrize(
    "path", ["/v1/label-sets/pets/", "/v1/label-sets/pets//", "/v1//label-sets/pets", "/v1/label-sets/"]
)
def test_a_path_that_a_program_on_the_way_has_changed_deletes_nothing(client, path):
    put(client, "pets", ["cat"])
    problem_of(client.delete(path), "unknown-route")
    assert names_of(client.get(at("pets"))) == ["cat"]


def test_removing_a_class_is_forgiving_about_spaces_and_composition(client):
    put(client, "things", ["other", "café au lait"])
    assert names_of(client.delete(at("things", "classes", " cafe\u0301  au lait "))) == ["other"]


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["pets", "Pets", "домашние", "動物", "حيوانات", "🐶", "👩🏽‍🚒", "a b", "a+b", "a&b=c", "x" * 64, "1"]
)
def test_a_label_set_may_have_a_name_in_any_script(client, name):
    assert put(client, name, ["cat"]).status_code == 201
    assert client.get(at(name)).json()["name"] == name
    assert [each["name"] for each in client.get("/v1/label-sets").json()["label_sets"]] == [name]
    assert client.delete(at(name)).status_code == 204


def test_a_name_is_found_however_its_letters_are_composed(client):
    put(client, "cafe\u0301", ["cat"])
    assert client.get(at("caf\u00e9")).json()["name"] == "caf\u00e9"


@pytest.mark.parametrize("name", ["x" * 65, "a@b", "a:b", "a,b", "a\\b", ".hidden", " ", "a\tb", "a\u202eb", "100%"])
def test_a_name_that_breaks_a_rule_is_refused_on_every_route(shared_client, name):
    for response in (
        put(shared_client, name, ["cat"]),
        shared_client.get(at(name)),
        shared_client.delete(at(name)),
        shared_client.post(at(name, "classes"), json={"classes": ["cat"]}),
        shared_client.delete(at(name, "classes", "cat")),
    ):
        assert fields_of(response) == {"name"}


def test_a_slash_in_the_name_of_a_label_set_makes_another_path(client):
    problem_of(put(client, "a/b", ["cat"]), "unknown-route")


def test_an_unknown_label_set_is_404_with_the_known_ones_on_every_route(client):
    put(client, "pets", ["cat"])
    for response in (
        client.get(at("pest")),
        client.get(at("pest"), params={"version": 1}),
        client.delete(at("pest")),
        client.post(at("pest", "classes"), json={"classes": ["cat"]}),
        client.delete(at("pest", "classes", "cat")),
    ):
        assert "'pest'; known: pets" in problem_of(response, "unknown-name")["detail"]


def test_an_unknown_version_is_404_with_the_known_ones(client):
    put(client, "pets", ["cat"])
    put(client, "pets", ["dog"])
    response = client.get(at("pets"), params={"version": 3})
    assert "'pets@3'; known: 1 to 2" in problem_of(response, "unknown-name")["detail"]


@pytest.mark.parametrize("version", ["0", "-1", "x", "1.5", "", "2147483648", "9" * 5000])
def test_an_invalid_version_is_reported_with_its_field(shared_client, version):
    put(shared_client, "pets", ["cat"])
    assert fields_of(shared_client.get(at("pets"), params={"version": version})) == {"version"}


# --- classes that are refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "fields"),
    [
        ([], {"classes"}),
        ([""], {"classes.0"}),
        (["cat", " \t"], {"classes.1"}),
        (["cat", "dog", "cat"], {"classes.2"}),
        (["cat", "CAT"], {"classes.1"}),
        (["cat", " cat "], {"classes.1"}),
        (["x" * 201], {"classes.0"}),
        (["a\0b"], {"classes.0"}),
        (["\u200bcat"], {"classes.0"}),
        ([{"name": "cat", "descriptions": [""]}], {"classes.0.descriptions.0"}),
        ([{"name": "cat", "descriptions": ["x" * 1001]}], {"classes.0.descriptions.0"}),
        ([{"name": "cat", "synonyms": ["a", "\0"]}], {"classes.0.synonyms.1"}),
        ([{"name": "cat", "descriptions": ["x"] * 201}], {"classes.0.descriptions"}),
        (["", "x" * 201, "fine", "\0"], {"classes.0", "classes.1", "classes.3"}),
    ],
)
def test_classes_that_break_a_rule_are_refused_with_every_place(client, classes, fields):
    assert fields_of(put(client, "pets", classes)) == fields
    put(client, "others", ["something else"])
    assert fields_of(client.post(at("others", "classes"), json={"classes": classes})) == fields
    problem_of(client.get(at("pets")), "unknown-name")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"classes": None},
        {"classes": "cat"},
        {"classes": {"name": "cat"}},
        {"classes": [1]},
        {"classes": [None]},
        {"classes": [["cat"]]},
        {"classes": [{}]},
        {"classes": [{"nam": "cat"}]},
        {"classes": [{"name": "cat", "descriptions": "long"}]},
        {"classes": [{"name": "cat", "images": []}]},
        {"classes": ["cat"], "template": "photo"},
        {"classes": ["cat"], "templates": None},
        {"classes": ["cat"], "templates": ["photo"]},
        {"classes": ["cat"], "version": 3},
        [],
        ["cat"],
        "cat",
        None,
        1,
    ],
)
def test_a_body_of_another_shape_is_reported_with_its_fields(shared_client, body):
    response = shared_client.put(at("pets"), content=json.dumps(body), headers={"content-type": "application/json"})
    assert problem_of(response, "invalid-field")["errors"]


def test_a_class_of_the_wrong_type_is_reported_once(client):
    """Not once for each type that it might have been, under names of our own code."""
    for wrong in (5, None, ["cat"]):
        members = problem_of(put(client, "pets", ["cat", wrong]), "invalid-field")
        assert [each["field"] for each in members["errors"]] == ["classes.1"]
        assert "ClassBody" not in members["detail"]


def test_more_classes_than_allowed_are_too_large(make_client):
    client = make_client(max_classes=3)
    assert "DEIXIS_MAX_CLASSES" in problem_of(put(client, "pets", list("abcd")), "too-large")["detail"]
    put(client, "pets", list("abc"))
    problem_of(client.post(at("pets", "classes"), json={"classes": ["d"]}), "too-large")


def test_templates_are_a_set_or_one_template(client):
    problem_of(put(client, "pets", ["cat"], templates="phto"), "unknown-name")
    assert fields_of(put(client, "pets", ["cat"], templates="{0}")) == {"templates"}
    assert put(client, "pets", ["cat"], templates="the {}").status_code == 201


# --- conditions ----------------------------------------------------------------------------------------------------


def test_every_answer_with_a_label_set_has_its_version_as_etag(client):
    responses = [
        put(client, "pets", ["cat"]),
        put(client, "pets", ["dog"]),
        client.post(at("pets", "classes"), json={"classes": ["owl"]}),
        client.delete(at("pets", "classes", "dog")),
        client.get(at("pets")),
        client.get(at("pets"), params={"version": 1}),
    ]
    assert [each.headers["etag"] for each in responses] == ['"1"', '"2"', '"3"', '"4"', '"4"', '"1"']


@pytest.mark.parametrize("condition", ['"2"', 'W/"2"', '"1", "2"', '"1","2"', "*"])
def test_a_version_that_the_caller_has_is_not_sent_again(client, condition):
    put(client, "pets", ["cat"])
    put(client, "pets", ["dog"])
    response = client.get(at("pets"), headers={"If-None-Match": condition})
    assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", '"2"')


@pytest.mark.parametrize("condition", ['"1"', '"22"', "2", '"x"', "", '""'])
def test_a_version_that_the_caller_does_not_have_is_sent(client, condition):
    put(client, "pets", ["cat"])
    put(client, "pets", ["dog"])
    assert names_of(client.get(at("pets"), headers={"If-None-Match": condition})) == ["dog"]


WRITES = {
    "put": lambda client, name, headers: put(client, name, ["new"], headers=headers),
    "add": lambda client, name, headers: client.post(at(name, "classes"), json={"classes": ["more"]}, headers=headers),
    "remove": lambda client, name, headers: client.delete(at(name, "classes", "cat"), headers=headers),
    "delete": lambda client, name, headers: client.delete(at(name), headers=headers),
}


@pytest.mark.parametrize("condition", ['"1"', '"3"', '"1", "3"', '"0"'])
def test_no_write_replaces_a_version_other_than_the_one_named(client, condition):
    put(client, "pets", ["bird"])
    before = put(client, "pets", ["cat", "dog"]).json()
    for write in WRITES.values():
        response = write(client, "pets", {"If-Match": condition})
        assert "version 2" in problem_of(response, "precondition-failed")["detail"]
    assert client.get(at("pets")).json() == before


@pytest.mark.parametrize("condition", ['"2"', '"1", "2"', "*", " * "])
def test_every_write_replaces_the_version_named(client, condition):
    for name, write in WRITES.items():
        put(client, name, ["bird"])
        put(client, name, ["cat", "dog"])
        response = write(client, name, {"If-Match": condition})
        assert response.status_code == (204 if name == "delete" else 200), response.text


@pytest.mark.parametrize("condition", ["x", '"x"', 'W/"2"', "", '"-1"', '"1" "2"', '"' + "9" * 5000 + '"', '"٢"'])
def test_an_invalid_etag_in_a_condition_stops_every_write(shared_client, condition):
    put(shared_client, "pets", ["bird"])
    before = put(shared_client, "pets", ["cat", "dog"]).json()
    for write in WRITES.values():
        assert fields_of(write(shared_client, "pets", {"If-Match": condition.encode()})) == {"If-Match"}
    assert shared_client.get(at("pets")).json() == before


def test_if_match_on_a_name_that_is_not_there_fails(client):
    for condition in ("*", '"1"'):
        problem_of(put(client, "pets", ["cat"], headers={"If-Match": condition}), "precondition-failed")
    problem_of(client.get(at("pets")), "unknown-name")


def test_a_put_can_be_made_to_create_only(client):
    only_new = {"If-None-Match": "*"}
    assert put(client, "pets", ["cat"], headers=only_new).status_code == 201
    problem_of(put(client, "pets", ["dog"], headers=only_new), "precondition-failed")
    client.delete(at("pets"))
    assert put(client, "pets", ["owl"], headers=only_new).status_code == 201


def test_another_if_none_match_on_a_put_is_refused(client):
    assert fields_of(put(client, "pets", ["cat"], headers={"If-None-Match": '"1"'})) == {"If-None-Match"}


# --- the list ------------------------------------------------------------------------------------------------------


def pages(client, limit):
    after, reply = None, []
    while True:
        params = {"limit": limit} | ({"after": after} if after else {})
        page = client.get("/v1/label-sets", params=params).json()
        reply.append([each["name"] for each in page["label_sets"]])
        after = page["next_after"]
        if after is None:
            return reply


def test_label_sets_are_listed_by_name_with_their_latest_version(client):
    put(client, "b", ["x"])
    put(client, "a", ["x", "y"])
    put(client, "b", ["x", "y", "z"])
    page = client.get("/v1/label-sets").json()
    reply = [(each["name"], each["version"], each["classes"]) for each in page["label_sets"]]
    assert reply == [("a", 1, 2), ("b", 2, 3)]
    assert page["next_after"] is None


def test_an_empty_list_is_a_page_too(client):
    assert client.get("/v1/label-sets").json() == {"label_sets": [], "next_after": None}


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_the_pages_of_a_list_hold_everything_once_and_the_last_says_so(client, limit):
    names = ["a", "b c", "é", "犬"]
    for name in names:
        put(client, name, ["x"])
    reply = pages(client, limit)
    assert [name for page in reply for name in page] == sorted(names)
    assert len(reply) == -(-len(names) // limit)


def test_a_page_begins_behind_a_name_that_need_not_exist_any_more(client):
    for name in ("a", "b", "c"):
        put(client, name, ["x"])
    client.delete(at("b"))
    assert [each["name"] for each in client.get("/v1/label-sets?after=b").json()["label_sets"]] == ["c"]


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x", ""])
def test_a_page_of_an_impossible_size_is_refused(shared_client, limit):
    assert fields_of(shared_client.get("/v1/label-sets", params={"limit": limit})) == {"limit"}


# --- in use --------------------------------------------------------------------------------------------------------


def test_label_sets_outlive_a_restart(make_client):
    created = put(make_client(), "cats", [LYNX, "puma"]).json()
    assert make_client().get(at("cats")).json() == created


def test_a_new_label_set_is_encoded_once_and_before_it_is_used(client, encoder):
    put(client, "cats", ["lynx", "puma"], templates="{}")
    client.portal.call(client.app.state.service.prewarmer.idle)
    assert encoder.encoded_texts == ["lynx", "puma"]
    for _ in range(2):
        response = client.post("/classify?label_set=cats", content=picture(), headers={"content-type": "image/png"})
        assert response.json()["label_set"] == "cats@1"
    assert encoder.encoded_texts == ["lynx", "puma"]


def test_a_request_does_not_wait_for_texts_that_are_encoded_in_the_background(make_client, monkeypatch):
    held = []

    async def never(_models, _model, texts):
        held.extend(texts)
        await asyncio.Event().wait()

    monkeypatch.setattr(ModelRegistry, "encode_in_background", never)
    client = make_client()
    assert client.put("/v1/label-sets/shades", json={"classes": ["red", "blue"]}).status_code == 201
    until(lambda: held)
    assert all("red" in text or "blue" in text for text in held)
    files = {"image": ("a.png", picture("red"), "image/png")}
    assert client.post("/v1/classify", files=files, data={"label_set": "shades"}).status_code == 200
