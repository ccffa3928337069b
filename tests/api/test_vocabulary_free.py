"""Classification without labels: names found in captions, for each image by itself or for all of a request."""

import asyncio
import base64
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, pairwise

import numpy as np
import pytest

import app.captions.served_database
from app.captions.database import CaptionDatabase
from app.captions.generations import CURRENT
from app.captions.manifest import INDEX, MANIFEST
from app.captions.texts import TEXTS
from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.models.registry import ModelRegistry
from app.settings import Settings
from tests.api.problems import fields_of, problem_of
from tests.api.test_classify import LABELS, answer, as_body, as_form, as_json, in_every_form
from tests.api.test_databases import HeldEncoder, ask, asking, begun, built, captions_in, cut, encoded, ended, found
from tests.api.test_examples import AT as LABEL_SET
from tests.api.test_examples import shade, teach, with_things
from tests.api.test_faults import until
from tests.captions.cased.test_lexicon import LICENCE, SAMPLE, installed
from tests.captions_made import CAPTIONS, MANY, CaptionEncoder, made, place_of, put_in_place
from tests.conftest import picture
from tests.gated import GatedEncoder

pytestmark = installed

DATABASE = "/v1/databases/things"
EVERY = 1000
"""A top_k that leaves no candidate out."""

RED, GREEN, BLUE = ([caption for caption in CAPTIONS if colour in caption] for colour in ("red", "green", "blue"))
MIXED = ("red", "#c04020", "#20b030", "blue", "#b0a010", "#1080a0", "#a02080", "#808080")


@pytest.fixture
def encoder():
    return CaptionEncoder()


@pytest.fixture
def folder(settings):
    """Where databases are by default."""
    return settings.data_dir / "captions"


@pytest.fixture
def named(folder, make_client):
    """A client of a service that has one database."""
    made(folder / "things")
    return make_client()


def naming(client, colours, **fields):
    """Return the answer about one-coloured pictures."""
    return answer(as_json(client, [picture(colour) for colour in colours], **fields))


def test_images_named_by_id_are_named_as_if_they_were_sent_again(named):
    sent = naming(named, MIXED, database="things", keep_features=True)["results"]
    ids = [{"id": result.pop("image_id")} for result in sent]
    again = answer(named.post("/v1/classify", json={"images": ids, "database": "things"}))["results"]
    assert [{**result, "image_id": None} for result in sent] == again


def labels_of(result):
    return [each["label"] for each in result["predictions"]]


def scores_of(result):
    return {each["label"]: each["score"] for each in result["predictions"]}


def similarities_of(result):
    return {each["label"]: each["similarity"] for each in result["predictions"]}


# --- three forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/classify", "/classify"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"method": "cased"},
        {"database": "things", "top_k": 2, "explain": True, "model": "fake", "template": "a {}"},
        {"group": True, "explain": True},
    ],
)
def test_the_three_forms_and_both_paths_give_the_same_answer(named, folder, path, fields):
    image = picture("#c04020")
    reply = answer(as_json(named, [image], path, **fields))
    assert answer(as_form(named, [image], path, **fields)) == reply
    assert answer(as_body(named, image, path, **fields)) == reply
    assert reply["model"] == "fake"
    assert reply["database"] == f"things@{place_of(folder / 'things').name}"
    members = ("method", "label_set", "reason", "examples", "calibration", "transductive")
    assert [reply[member] for member in members] == ["cased", None, None, None, None, False]
    (result,) = reply["results"]
    assert set(result) == {
        "predictions",
        "out_of_vocabulary",
        "rejected",
        "rejection_score",
        "prediction_set",
        "path",
        "labels",
        "explanation",
        "image_id",
        "weak_match",
        "warnings",
        "error",
    }
    assert [set(each) for each in result["predictions"]] == [{"label", "score", "similarity"}] * len(
        result["predictions"]
    )
    members = ("out_of_vocabulary", "rejected", "prediction_set", "error")
    assert [result[member] for member in members] == [None, None, None, None]
    assert (result["explanation"] is None) == ("explain" not in fields)
    assert (reply["vocabulary"] is None) == ("group" not in fields)


def test_options_may_be_sent_in_every_form(named):
    image, options = picture("red"), {"alpha": 0.5, "captions": 4, "phrases": 1}
    reply = answer(as_json(named, [image], options=options))
    assert answer(as_form(named, [image], options=json.dumps(options))) == reply
    assert answer(as_body(named, image, options=json.dumps(options))) == reply
    assert reply != answer(as_json(named, [image]))


def test_each_stage_is_timed(named):
    timed = as_json(named, [picture("red"), picture("blue")]).json()["timing_ms"]
    assert {"decode", "queue", "encode", "search", "text", "adapt"} <= set(timed)
    assert all(each >= 0 for each in timed.values())


def test_labels_that_are_null_are_none_and_an_empty_list_of_them_is_refused(named):
    assert naming(named, ["red"], labels=None, label_set=None)["method"] == "cased"
    assert all(field.startswith("labels") for field in fields_of(as_json(named, [picture()], labels=[])))
    assert all(field.startswith("labels") for field in fields_of(as_form(named, [picture()], labels="")))


# --- names and scores ----------------------------------------------------------------------------------------------


def test_an_image_is_named_by_a_word_of_the_captions_near_it(named):
    for colour, result in zip(
        ("red", "green", "blue"), naming(named, ["red", "green", "blue"])["results"], strict=True
    ):
        assert labels_of(result)[0] == colour
        assert not {"red", "green", "blue"} - {colour} & set(labels_of(result))


@pytest.mark.parametrize("bias", [None, -8.0])
def test_the_scores_of_an_image_are_shares_of_one_the_best_first(make_client, folder, bias):
    made(folder / "things")
    encoder = CaptionEncoder("fake", logit_bias=bias)
    client = make_client(encoders=[encoder])
    for result in naming(client, MIXED, top_k=EVERY)["results"]:
        scores = [each["score"] for each in result["predictions"]]
        assert len(scores) > 1
        assert sum(scores) == pytest.approx(1, abs=1e-5)
        assert scores == sorted(scores, reverse=True)
        assert len(set(labels_of(result))) == len(scores)
        assert all(-1 <= each["similarity"] <= 1 for each in result["predictions"])


def test_the_default_number_of_predictions_is_five(named):
    options = {"captions": len(CAPTIONS)}
    (whole,) = naming(named, ["red"], top_k=EVERY, options=options)["results"]
    assert len(whole["predictions"]) > 6
    for fields, count in (({}, 5), ({"top_k": 1}, 1), ({"top_k": 6}, 6)):
        (result,) = naming(named, ["red"], options=options, **fields)["results"]
        assert result["predictions"] == whole["predictions"][:count]


def test_a_similarity_is_the_cosine_of_the_image_and_the_word(named, encoder):
    (result,) = naming(named, ["red"], top_k=EVERY)["results"]
    image = np.array([1.01, 0.01, 0.01] + [0] * 13)
    cosines = encoder.encode_texts(labels_of(result)) @ (image / np.linalg.norm(image))
    np.testing.assert_allclose(list(similarities_of(result).values()), cosines, atol=1e-4)


def test_words_are_encoded_as_they_are_unless_a_template_is_given(named, encoder):
    (result,) = naming(named, ["red"], top_k=EVERY)["results"]
    assert set(labels_of(result)) <= set(encoder.encoded_texts)
    for template, expected in (("a drawing of a {}", "a drawing of a {}"), ("photo", "a photo of a {}.")):
        encoder.encoded_texts.clear()
        (result,) = naming(named, ["red"], top_k=EVERY, template=template)["results"]
        assert {expected.format(label) for label in labels_of(result)} <= set(encoder.encoded_texts)
    assert fields_of(as_json(named, [picture()], template="{0}")) == {"template"}


def test_a_template_of_several_wordings_is_used_whole(named, encoder):
    (result,) = naming(named, ["red"], top_k=EVERY, template="ensemble")["results"]
    assert all(sum(label in text for text in encoder.encoded_texts) > 1 for label in labels_of(result))
    assert sum(scores_of(result).values()) == pytest.approx(1, abs=1e-5)


def test_the_share_of_the_image_mixes_its_scores_with_those_of_its_captions(named):
    """With 1 they follow from the similarities alone, and between 0 and 1 they lie on a line."""
    asked = {
        alpha: naming(named, ["#c04020"], top_k=EVERY, options={"alpha": alpha})["results"][0] for alpha in (0, 0.3, 1)
    }
    scores = {alpha: scores_of(result) for alpha, result in asked.items()}
    by_image = {label: np.exp(10 * similarity) for label, similarity in similarities_of(asked[1]).items()}
    for label, exponential in by_image.items():
        assert scores[1][label] == pytest.approx(exponential / sum(by_image.values()), abs=1e-4)
        assert scores[0.3][label] == pytest.approx(0.3 * scores[1][label] + 0.7 * scores[0][label], abs=1e-5)
        assert similarities_of(asked[0])[label] == pytest.approx(similarities_of(asked[1])[label], abs=1e-5)
    assert scores[0] != scores[1]
    default = naming(named, ["#c04020"], top_k=EVERY)
    assert default == naming(named, ["#c04020"], top_k=EVERY, options={"alpha": 0.7, "captions": 10, "phrases": 0})


def test_noun_phrases_are_candidates_only_on_request(named):
    (without,) = naming(named, ["red"], top_k=EVERY)["results"]
    (with_phrases,) = naming(named, ["red"], top_k=EVERY, options={"phrases": 1})["results"]
    assert all(" " not in label for label in labels_of(without))
    assert set(labels_of(without)) < set(labels_of(with_phrases))
    phrases = set(labels_of(with_phrases)) - set(labels_of(without))
    assert "red ball" in phrases
    assert all(" " in phrase for phrase in phrases)
    assert sum(scores_of(with_phrases).values()) == pytest.approx(1, abs=1e-5)


def test_where_no_word_can_be_found_the_name_is_object(client):
    built(client, captions=["\u0440\u044b\u0436\u0430\u044f \u043b\u0438\u0441\u0430", "\u72d0\u72f8 \u72d0\u72f8"])
    (result,) = naming(client, ["red"])["results"]
    assert [(each["label"], each["score"]) for each in result["predictions"]] == [("object", pytest.approx(1))]


def test_one_caption_is_enough_for_a_name(client):
    built(client, captions=["a red fox in the snow"])
    (result,) = naming(client, ["red"], top_k=EVERY)["results"]
    assert set(labels_of(result)) == {"red", "fox", "snow"}


@pytest.mark.parametrize("alpha", [0, 0.7, 1])
def test_an_image_that_no_caption_is_near_has_a_name_all_the_same(client, alpha):
    built(client, captions=["an old wooden chair", "two wooden chairs", "a map of the world"])
    (result,) = naming(client, ["black"], top_k=EVERY, options={"alpha": alpha})["results"]
    assert sum(scores_of(result).values()) == pytest.approx(1, abs=1e-5)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"alpha": -0.01}, "alpha"),
        ({"alpha": 1.01}, "alpha"),
        ({"captions": 0}, "captions"),
        ({"captions": 101}, "captions"),
        ({"captions": 1.5}, "captions"),
        ({"phrases": 2}, "phrases"),
        ({"phrases": 0.5}, "phrases"),
        ({"min_images": -1}, "min_images"),
        ({"min_images": 1001}, "min_images"),
        ({"beta": 1}, "beta"),
    ],
)
def test_an_option_that_the_method_does_not_take_is_refused(named, options, field):
    for method in ({}, {"method": "cased"}):
        assert fields_of(as_json(named, [picture()], options=options, **method)) == {f"options.{field}"}


def test_a_database_and_labels_together_are_refused_in_every_form(named):
    named.put("/v1/label-sets/colours", json={"classes": LABELS}).raise_for_status()
    for what in ({"labels": json.dumps(LABELS)}, {"label_set": "colours"}):
        for fields in (
            {"database": "things"},
            {"group": True},
            {"method": "cased"},
            {"database": "things", "method": "cased"},
            {"database": "things", "method": "zero-shot"},
        ):
            for response in in_every_form(named, picture(), **what, **fields)[::2]:
                assert fields_of(response) <= {"database", "group", "method", "labels", "label_set"}


@pytest.mark.parametrize("method", ["auto", "zero-shot", "autoclip", "gda"])
def test_every_other_method_needs_labels(named, method):
    for fields in ({}, {"database": "things"}, {"group": True}):
        response = as_json(named, [picture()], method=method, **fields)
        assert fields_of(response) <= {"labels", "database", "group", "method"}
    assert fields_of(as_json(named, [picture()], method=method)) == {"labels"}


@pytest.mark.parametrize("name", ["coverage", "false_rejection_rate"])
def test_what_only_labelled_examples_can_tell_is_refused(named, name):
    for response in in_every_form(named, picture(), **{name: 0.5}):
        assert fields_of(response) == {name}


def test_an_image_whose_best_score_is_below_the_threshold_is_rejected(named):
    reply = naming(named, MIXED)
    assert [each["rejected"] for each in reply["results"]] == [None] * len(MIXED)
    best = [each["predictions"][0]["score"] for each in reply["results"]]
    for threshold in (0, float(np.median(best)), 1):
        for group in ({}, {"group": True}):
            for each in naming(named, MIXED, reject_below=threshold, **group)["results"]:
                assert each["rejection_score"] == each["predictions"][0]["score"]
                assert each["rejected"] == (each["rejection_score"] < threshold)
    rejected = [each["rejected"] for each in naming(named, MIXED, reject_below=float(np.median(best)))["results"]]
    assert set(rejected) == {False, True}


def test_names_that_do_not_exist_are_unknown(named):
    detail = problem_of(as_json(named, [picture()], database="others"), "unknown-name")["detail"]
    assert detail == "unknown caption database 'others'; known: things"
    problem_of(as_json(named, [picture()], model="clap"), "unknown-name")
    problem_of(as_json(named, [picture()], template="phto"), "unknown-name")
    problem_of(as_json(named, [picture()], method="csed"), "unknown-name")


@pytest.mark.parametrize("name", ["Things", "things@0123456789abcdef", "", "x" * 65, "../things"])
def test_a_name_that_no_database_can_have_is_refused(named, name):
    for response in in_every_form(named, picture(), database=name):
        assert fields_of(response) == {"database"}


@pytest.mark.parametrize("group", ["perhaps", "", 7])
def test_a_group_that_is_neither_yes_nor_no_is_refused(named, group):
    for response in in_every_form(named, picture(), group=group):
        assert fields_of(response) == {"group"}


# --- which database ------------------------------------------------------------------------------------------------


def test_the_default_database_is_used_or_the_only_one_of_the_model(make_client, folder):
    made(folder / "of-first", encoder=FakeEncoder("first"))
    made(folder / "of-second", RED, encoder=FakeEncoder("second"))
    made(folder / "also-of-second", GREEN, encoder=FakeEncoder("second"))

    def asked(client, **fields):
        return naming(client, ["red"], **fields)["database"].partition("@")[0]

    encoders = [FakeEncoder("first"), FakeEncoder("second"), FakeEncoder("third")]
    client = make_client(encoders=encoders)
    assert asked(client) == asked(client, model="first") == "of-first"
    assert asked(client, model="second", database="of-second") == "of-second"
    several = as_json(client, [picture()], model="second")
    assert fields_of(several) == {"database"}
    assert {"also-of-second", "of-second"} <= set(several.json()["detail"].replace(",", " ").split())
    problem_of(as_json(client, [picture()], model="third"), "not-configured")

    client = make_client(encoders=encoders, default_database="of-second")
    assert asked(client, model="second") == "of-second"
    assert asked(client) == "of-first"


def test_without_a_database_the_answer_tells_what_is_missing(client):
    for response in in_every_form(client, picture()):
        assert problem_of(response, "not-configured")["status"] == 501
    assert answer(as_json(client, [picture("red")], labels=["red"]))["method"] == "zero-shot"


def test_a_database_of_another_model_is_refused(make_client, folder):
    made(folder / "of-second", encoder=FakeEncoder("second"))
    made(folder / "of-gone", encoder=FakeEncoder("gone"))
    client = make_client(encoders=[FakeEncoder("first"), FakeEncoder("second")])
    for name, fields in (("of-second", {}), ("of-gone", {}), ("of-gone", {"model": "second"})):
        assert fields_of(as_json(client, [picture()], database=name, **fields)) == {"database"}
    reply = answer(as_json(client, [picture("red")], database="of-second", model="second"))
    assert (reply["model"], reply["method"]) == ("second", "cased")


@pytest.mark.parametrize("damaged", [TEXTS, INDEX])
def test_a_damaged_database_is_reported_and_other_requests_succeed(make_client, folder, damaged):
    made(folder / "things")
    cut(place_of(folder / "things") / damaged)
    client = make_client()
    problem_of(as_json(client, [picture()], database="things"), "store-unavailable")
    problem_of(as_json(client, [picture()]), "store-unavailable")
    assert answer(as_json(client, [picture("red")], labels=["red"]))["database"] is None
    built(client, captions=list(CAPTIONS))
    assert naming(client, ["red"])["method"] == "cased"


def test_requests_get_retry_after_while_the_first_database_is_built(make_client, tmp_path):
    place = tmp_path / "lexicon"
    place.mkdir()
    for name, text in SAMPLE.items():
        (place / name).write_text(text if name.endswith(".exc") else LICENCE + text)
    gated = GatedEncoder()
    gated.texts_open.clear()
    client = make_client(encoders=[gated], wordnet_dir=place, default_database="wordnet", build_default_database=True)
    try:
        assert gated.texts_entered.acquire(timeout=10)
        response = as_json(client, [picture()])
        problem = problem_of(response, "not-ready")
        assert int(response.headers["retry-after"]) >= 1
        assert "wordnet" in problem["detail"]
        assert client.get("/readyz").status_code == 200
    finally:
        gated.open()
    until(lambda: as_json(client, [picture()]).status_code == 200)
    assert naming(client, ["red"])["database"].startswith("wordnet@")


def test_a_machine_without_wordnet_finds_labels_after_the_first_start(make_client, tmp_path):
    client = make_client(wordnet_dir=tmp_path / "nowhere", build_default_database=True)
    until(lambda: as_json(client, [picture()]).status_code == 200)
    assert naming(client, ["red"])["database"].startswith("everyday@")


def test_the_most_common_names_are_found_while_the_others_are_encoded(make_client, monkeypatch):
    encode, go_on, encoded = ModelRegistry.encode_in_background, threading.Event(), []

    async def encode_slowly(models, model, texts):
        if len(encoded) >= 256:
            assert await asyncio.to_thread(go_on.wait, 10)
        encoded.extend(texts)
        return await encode(models, model, texts)

    monkeypatch.setattr(ModelRegistry, "encode_in_background", encode_slowly)
    client = make_client(build_default_database=True)
    try:
        until(lambda: as_json(client, [picture()]).status_code == 200)
        reply = answer(as_json(client, [picture("red")]))
        warning = "'everyday' is still being built: 256 of its 2,316 captions can be found so far"
        assert [warning in text for result in reply["results"] for text in result["warnings"]] == [True]
        search = client.post("/v1/databases/everyday/search", json={"text": "red"}).json()
        assert warning in search["warnings"][0]
        assert client.get("/v1/databases/everyday").json()["counts"]["to_come"] == 2060
    finally:
        go_on.set()
    until(lambda: not answer(as_json(client, [picture("red")]))["results"][0]["warnings"])
    assert client.get("/v1/databases/everyday").json()["captions"] == 2316
    assert len(encoded) == len(set(encoded)) == 2316


# --- explanations --------------------------------------------------------------------------------------------------


def explained(client, colours, **fields):
    results = naming(client, colours, explain=True, **fields)["results"]
    for each in results:
        assert set(each["explanation"]) == {"labels", "captions"}
        assert each["explanation"]["labels"] == []
        assert all(
            set(caption) == {"caption", "similarity", "suggested"} for caption in each["explanation"]["captions"]
        )
    return results


def test_an_explanation_shows_the_captions_near_the_image_and_what_each_suggested(named):
    for colour in MIXED:
        (result,) = explained(named, [colour], top_k=EVERY)
        captions = result["explanation"]["captions"]
        similarities = [each["similarity"] for each in captions]
        assert similarities == sorted(similarities, reverse=True)
        near = found(ask(named, DATABASE, image=encoded(picture(colour)), limit=10))["results"]
        assert [each["caption"] for each in captions] == [each["caption"] for each in near]
        for reply, each in zip(captions, near, strict=True):
            assert reply["similarity"] == pytest.approx(each["score"], abs=1e-4)
        suggested = [label for each in captions for label in each["suggested"]]
        assert set(suggested) == set(labels_of(result))
        assert min(Counter(suggested).values()) >= 2
        for each in captions:
            assert all(label in each["caption"] for label in each["suggested"])


def test_suggested_labels_are_among_the_returned_predictions(named):
    (result,) = explained(named, ["red"], top_k=1)
    assert {label for each in result["explanation"]["captions"] for label in each["suggested"]} == {"red"}
    (result,) = explained(named, ["red"], top_k=EVERY, options={"phrases": 1})
    suggested = {label for each in result["explanation"]["captions"] for label in each["suggested"]}
    assert suggested == set(labels_of(result))


@pytest.mark.parametrize("captions", [1, 2, 7, 100])
def test_the_requested_number_of_captions_is_used(named, captions):
    for result in explained(named, ["red", "#1080a0"], options={"captions": captions}):
        assert len(result["explanation"]["captions"]) == min(captions, len(CAPTIONS))


def test_of_captions_that_are_nearly_the_same_the_first_is_kept(make_client, folder):
    """To this encoder all captions of one colour are one."""
    made(folder / "things", encoder=FakeEncoder())
    client = make_client(encoders=[FakeEncoder()])
    (result,) = explained(client, ["red"], top_k=EVERY)
    (caption,) = result["explanation"]["captions"]
    assert caption["caption"] in RED
    assert sorted(caption["suggested"]) == sorted(labels_of(result))


def test_there_is_no_explanation_by_default(named):
    assert [each["explanation"] for each in naming(named, MIXED)["results"]] == [None] * len(MIXED)


# --- many images ---------------------------------------------------------------------------------------------------


def alike(one, other):
    """Tell whether two results are the same but for rounding."""
    assert scores_of(one) == pytest.approx(scores_of(other), abs=1e-6)
    assert similarities_of(one) == pytest.approx(similarities_of(other), abs=1e-6)
    assert scores_of(one)[labels_of(other)[0]] == pytest.approx(max(scores_of(one).values()), abs=1e-6)
    captions = [[each["caption"] for each in result["explanation"]["captions"]] for result in (one, other)]
    assert captions[0] == captions[1]


@pytest.fixture(params=["flat", "ivf-pq"])
def many(request, folder, make_client):
    """A client of a service whose database is compared one by one, or searched by codes."""
    made(folder / "things", MANY, exact_up_to=100 if request.param == "ivf-pq" else 50_000)
    return make_client()


def test_an_image_is_named_the_same_alone_as_in_a_batch(many):
    together = explained(many, MIXED, top_k=EVERY)
    for colour, each in zip(MIXED, together, strict=True):
        (alone,) = explained(many, [colour], top_k=EVERY)
        alike(alone, each)
    for each, other in zip(together, reversed(explained(many, MIXED[::-1], top_k=EVERY)), strict=True):
        alike(each, other)


def test_requests_of_others_at_the_same_time_change_nothing(many):
    """Whatever they search for."""
    requests = [
        {"colours": [colour], "options": {"captions": captions}} for colour in MIXED for captions in (1, 5, 10, 100)
    ]

    def asked(request):
        return explained(many, top_k=EVERY, **request)[0]

    alone = [asked(request) for request in requests]
    with (
        asking(lambda: ask(many, DATABASE, image=encoded(picture("teal")), contains="ball", limit=100)),
        ThreadPoolExecutor(8) as threads,
    ):
        together = list(threads.map(asked, requests))
    for one, other in zip(alone, together, strict=True):
        alike(one, other)


@pytest.mark.parametrize("send", [as_form, as_json])
@pytest.mark.parametrize("group", [False, True])
def test_an_unreadable_image_has_an_error_in_its_own_result(named, send, group):
    images = [picture("red"), b"no image", picture("blue"), picture("red"), picture()[:40]]
    options = {"min_images": 1}
    sent = json.dumps(options) if send is as_form else options
    reply = answer(send(named, images, explain=True, group=group, options=sent))
    assert [each["error"] and each["error"]["status"] for each in reply["results"]] == [None, 415, None, None, 415]
    assert [labels_of(each)[:1] for each in reply["results"]] == [["red"], [], ["blue"], ["red"], []]
    assert [each["explanation"] is None for each in reply["results"]] == [False, True, False, False, True]
    assert reply["transductive"] == group
    if group:
        assert reply["vocabulary"] == [{"label": "red", "images": 2}, {"label": "blue", "images": 1}]


@pytest.mark.parametrize("group", [False, True])
def test_when_every_image_is_bad_the_answer_is_that_error(named, group):
    problem_of(as_form(named, [b"no", b"image"], group=group), "not-an-image")
    problem_of(as_json(named, [b"no"], group=group), "not-an-image")


def test_the_limits_of_requests_are_the_same_as_with_labels(named):
    for group in (False, True):
        response = as_form(named, [picture()] * 9, group=group)
        assert "DEIXIS_MAX_IMAGES_PER_REQUEST" in problem_of(response, "too-large")["detail"]


# --- names that images share ---------------------------------------------------------------------------------------


def grouped(client, images, **fields):
    """Return the answer about a group, having checked what all answers have in common."""
    least = fields.get("options", {}).get("min_images", 1)
    reply = answer(as_json(client, images, group=True, **fields))
    vocabulary = {each["label"]: each["images"] for each in reply["vocabulary"]}
    assert all(set(each) == {"label", "images"} for each in reply["vocabulary"])
    assert len(vocabulary) == len(reply["vocabulary"])
    counts = [each["images"] for each in reply["vocabulary"]]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == len(images)
    assert min(counts) >= min(least, len(images))
    assert Counter(labels_of(each)[0] for each in reply["results"]) == vocabulary
    for each in reply["results"]:
        assert set(labels_of(each)) <= set(vocabulary)
        scores = [prediction["score"] for prediction in each["predictions"]]
        assert scores == sorted(scores, reverse=True)
        assert 0 <= sum(scores) <= 1 + 1e-5
        if fields.get("top_k") == EVERY:
            assert set(labels_of(each)) == set(vocabulary)
    assert reply["transductive"] == (len(images) > 1)
    return reply


@pytest.mark.parametrize("min_images", [1, 2, 3, 8, 1000])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_each_shared_label_has_at_least_the_minimum_number_of_images(named, min_images, count):
    rng = np.random.default_rng((min_images, count))
    images = [picture(tuple(rng.integers(0, 255, 3).tolist())) for _ in range(count)]
    for fields in ({}, {"top_k": EVERY}, {"top_k": 1}):
        reply = grouped(named, images, options={"min_images": min_images}, **fields)
        if min_images >= count:
            assert len(reply["vocabulary"]) == 1


def test_a_small_group_leaves_each_image_its_best_label_by_default(named):
    images = [shade(kind, number) for number in range(2) for kind in range(3)]
    reply = grouped(named, images, top_k=EVERY)
    assert reply == grouped(named, images, top_k=EVERY, options={"min_images": 1})
    assert reply == grouped(named, images, top_k=EVERY, options={"min_images": 0})
    assert [labels_of(each)[0] for each in reply["results"]] == ["red", "green", "blue"] * 2
    assert {each["label"]: each["images"] for each in reply["vocabulary"]} == {"red": 2, "green": 2, "blue": 2}


def test_an_image_that_is_alone_of_its_kind_takes_a_name_of_the_others(named):
    images = [shade(0, 0), shade(0, 1), shade(0, 2), shade(2, 0)]
    reply = grouped(named, images, options={"min_images": 2})
    assert reply["vocabulary"] == [{"label": "red", "images": 4}]
    reply = grouped(named, images)
    assert reply["vocabulary"] == [{"label": "red", "images": 3}, {"label": "blue", "images": 1}]


def test_the_label_of_an_image_in_a_group_does_not_depend_on_the_order(named):
    rng = np.random.default_rng(7)
    images = [picture(tuple(rng.integers(0, 255, 3).tolist())) for _ in range(8)]
    names = [labels_of(each)[0] for each in grouped(named, images)["results"]]
    order = rng.permutation(8)
    mixed = grouped(named, [images[at] for at in order])
    assert [labels_of(each)[0] for each in mixed["results"]] == [names[at] for at in order]


def test_a_group_of_one_is_named_as_the_image_is_by_itself(named):
    for colour in MIXED:
        alone = naming(named, [colour])
        reply = grouped(named, [picture(colour)])
        assert labels_of(reply["results"][0]) == labels_of(alone["results"][0])[:1]
        assert reply["vocabulary"] == [{"label": labels_of(alone["results"][0])[0], "images": 1}]
        assert alone["vocabulary"] is None


def test_each_image_of_a_group_is_explained_by_its_own_captions(named):
    reply = grouped(named, [picture("red"), picture("blue")] * 2, explain=True, top_k=EVERY)
    alone = explained(named, ["red", "blue"], top_k=EVERY)
    for each, other in zip(reply["results"], alone * 2, strict=True):
        captions = each["explanation"]["captions"]
        assert [caption["caption"] for caption in captions] == [
            caption["caption"] for caption in other["explanation"]["captions"]
        ]
        assert {label for caption in captions for label in caption["suggested"]} <= set(labels_of(each))


def test_images_of_a_group_are_said_to_have_been_looked_at_together(named):
    for images, group, together in ((2, True, True), (1, True, False), (2, False, False)):
        reply = answer(as_json(named, [picture("red")] * images, group=group))
        assert reply["transductive"] == together
        for each in reply["results"]:
            assert any("classified together" in warning for warning in each["warnings"]) == together


# --- replacing and deleting ----------------------------------------------------------------------------------------


def test_no_request_fails_or_mixes_two_databases_while_one_takes_the_others_place(named):
    kinds = (
        [f"a red {word} in the wood" for word in ("fox", "hen", "owl")],
        [f"{word} on red snow" for word in ("fox", "hen")],
    )
    at_hand = {found(ask(named, DATABASE, text="x"))["database"]: set(CAPTIONS)}
    questions = (
        lambda: as_json(named, [picture("red")], explain=True, top_k=EVERY),
        lambda: as_form(named, [picture("red"), picture("blue")], explain=True, database="things", group=True),
    )
    with asking(*questions) as answers:
        for turn in range(5):
            generation = built(named, captions=kinds[turn % 2])["result"]["generation"]
            at_hand[f"things@{generation}"] = set(kinds[turn % 2])
            seen = len(answers)
            until(lambda seen=seen: len(answers) > seen + 3)
    assert len(at_hand) == 3
    used = Counter()
    for reply in map(answer, answers):
        used[reply["database"]] += 1
        for each in reply["results"]:
            assert {caption["caption"] for caption in each["explanation"]["captions"]} <= at_hand[reply["database"]]
    assert set(used) == set(at_hand)


def test_one_request_is_answered_out_of_one_database(make_client, folder, monkeypatch):
    """Of more images than are searched for together, while the database is replaced after every search."""
    monkeypatch.setattr(app.captions.served_database, "_REFRESH_INTERVAL_S", 0.0)
    made(folder / "things", RED)
    first = place_of(folder / "things").name
    made(folder / "things", BLUE)
    captions_of = {first: set(RED), place_of(folder / "things").name: set(BLUE)}
    search, turns = CaptionDatabase.search, cycle(captions_of)

    def search_and_replace(*args):
        found = search(*args)
        current = folder / "things" / CURRENT
        aside = current.with_name(f"{CURRENT}.aside")
        aside.write_text(next(turns))
        aside.replace(current)
        return found

    monkeypatch.setattr(CaptionDatabase, "search", search_and_replace)
    client = make_client(max_images_per_request=200, max_queued_images=256)
    for _ in range(3):
        reply = naming(client, ["red", "blue"] * 70, explain=True)
        generation = reply["database"].partition("@")[2]
        for each in reply["results"]:
            assert {near["caption"] for near in each["explanation"]["captions"]} <= captions_of[generation]


@pytest.mark.parametrize("file", [TEXTS, MANIFEST])
def test_where_the_new_generation_is_damaged_the_old_one_goes_on_naming_images(named, folder, tmp_path, file):
    old = naming(named, MIXED)
    made(tmp_path / "prepared" / "things", RED)
    (place_of(tmp_path / "prepared" / "things") / file).unlink()
    put_in_place(tmp_path / "prepared" / "things", folder / "things")
    # Longer than a running service takes to look.
    ends = time.monotonic() + 2.5
    while time.monotonic() < ends:
        assert naming(named, MIXED) == naming(named, MIXED, database="things") == old


def test_until_the_new_database_is_there_the_old_one_names_images(make_client, folder):
    made(folder / "things")
    held = HeldEncoder("a red bell that waits")
    client = make_client(encoders=[held])
    old = naming(client, ["red"])
    response = begun(client, captions=["a red bell", held.caption])
    try:
        assert held.reached.wait(10)
        assert naming(client, ["red"]) == old
    finally:
        held.let_go.set()
    assert ended(client, response)["status"] == "succeeded"
    (result,) = naming(client, ["red"], top_k=EVERY)["results"]
    assert {"red", "bell"} <= set(labels_of(result))


def test_requests_that_are_under_way_when_the_database_is_deleted_end_well(named):
    with asking(
        lambda: as_json(named, [picture("red")], database="things"),
        lambda: as_json(named, [picture("blue")], group=True),
    ) as answers:
        for _ in range(3):
            until(lambda: as_json(named, [picture("red")]).status_code == 200)
            assert named.delete(DATABASE).status_code == 204
            problem_of(as_json(named, [picture()], database="things"), "unknown-name")
            built(named, captions=list(CAPTIONS))
    assert {each.status_code for each in answers} <= {200, 404, 501}
    assert 200 in {each.status_code for each in answers}


# --- beside the other methods --------------------------------------------------------------------------------------


def test_the_method_is_listed_as_the_one_that_needs_no_labels(client):
    reply = {each["name"]: each for each in client.get("/v1/methods").json()["methods"]}
    assert [name for name, each in reply.items() if each["vocabulary_free"]] == ["cased"]
    cased = reply["cased"]
    assert cased["default"] is False
    options = {name: (each["default"], each["minimum"], each["maximum"]) for name, each in cased["options"].items()}
    assert options == {
        "alpha": (0.7, 0, 1),
        "captions": (10, 1, 100),
        "phrases": (0, 0, 1),
        "min_images": (0, 0, 1000),
    }


def test_with_labels_all_is_as_before(named):
    named.put("/v1/label-sets/colours", json={"classes": LABELS}).raise_for_status()
    for fields in ({"labels": json.dumps(LABELS)}, {"label_set": "colours"}):
        for response in in_every_form(named, picture("red"), explain=True, **fields)[::2]:
            reply = answer(response)
            assert (reply["method"], reply["database"], reply["vocabulary"]) == ("zero-shot", None, None)
            assert (
                "captions" not in reply["results"][0]["explanation"]
                or not reply["results"][0]["explanation"]["captions"]
            )
            assert reply["results"][0]["explanation"]["labels"]


def test_it_is_not_among_the_methods_that_are_tried_on_examples(named):
    with_things(named)
    teach(named, each=4)
    selection = named.get(f"{LABEL_SET}/selection").json()
    assert "cased" not in {each["method"] for each in selection["leaderboard"]}
    assert "cased" not in json.dumps(selection["not_run"])
    for fields in ({"method": "cased"}, {"database": "things"}):
        refused = as_json(named, [picture()], label_set="things", **fields)
        assert fields_of(refused) <= {"method", "database", "labels", "label_set"}


def test_an_image_by_base64_with_a_data_url_is_named(named):
    body = {"base64": "data:image/png;base64," + base64.b64encode(picture("blue")).decode()}
    (result,) = answer(named.post("/v1/classify", json={"images": [body]}))["results"]
    assert labels_of(result)[0] == "blue"


def test_the_fields_are_described_in_every_form():
    api = create_app(Settings(data_dir="/nowhere")).openapi()
    content = api["paths"]["/v1/classify"]["post"]["requestBody"]["content"]

    def properties(schema):
        while "$ref" in schema:
            schema = api["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return set(schema["properties"])

    for media_type in ("application/json", "multipart/form-data"):
        assert {"database", "group"} <= properties(content[media_type]["schema"])


def test_what_captions_an_image_has_is_what_a_search_of_the_same_image_finds(named):
    for one, other in pairwise(explained(named, ["red", "red"])):
        assert one == other
    near = captions_in(found(ask(named, DATABASE, image=encoded(picture("red")), limit=10)))
    (result,) = explained(named, ["red"])
    assert [each["caption"] for each in result["explanation"]["captions"]] == near
