import base64
import json
from itertools import pairwise
from urllib.parse import quote

import pytest
from pydantic import TypeAdapter

from app.api.schemas.classification import ClassifyResponse, OutOfVocabularyBody, ResultBody
from app.classification.methods import CASED, METHODS
from app.encoders.fake import FakeEncoder
from tests.api.problems import fields_of, problem_of
from tests.api.test_examples import AT, IMAGES, SELECTION, add, added, at_rest, shade, teach, with_things
from tests.conftest import picture

LABELS = ["red", "green", "blue"]


def as_form(client, images, path="/v1/classify", **fields):
    files = [("image", (f"{number}.png", image, "image/png")) for number, image in enumerate(images)]
    return client.post(path, files=files, data=fields)


def as_json(client, images, path="/v1/classify", **fields):
    bodies = [{"base64": base64.b64encode(image).decode()} for image in images]
    return client.post(path, json={"images": bodies, **fields})


def as_body(client, image, path="/v1/classify", media_type="image/png", **fields):
    return client.post(path, content=image, params=fields, headers={"content-type": media_type})


def answer(response):
    """Return a successful response without the times, which differ."""
    assert response.status_code == 200, response.text
    body = response.json()
    del body["timing_ms"]
    return body


def first_labels(response):
    return [each["predictions"][0]["label"] if each["predictions"] else None for each in answer(response)["results"]]


# --- three forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/classify", "/classify"])
@pytest.mark.parametrize("fields", [{}, {"top_k": 2, "template": "the colour {}", "explain": True, "model": "fake"}])
def test_the_three_forms_and_both_paths_give_the_same_answer(shared_client, path, fields):
    image = picture("teal")
    answers = [
        answer(as_form(shared_client, [image], path, labels=json.dumps(LABELS), **fields)),
        answer(as_json(shared_client, [image], path, labels=LABELS, **fields)),
        answer(as_body(shared_client, image, path, labels=",".join(LABELS), **fields)),
    ]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["model"] == "fake"
    assert answers[0]["method"] == "zero-shot"
    assert answers[0]["label_set"] is None
    members = ("reason", "examples", "calibration", "priors", "transductive")
    assert [answers[0][member] for member in members] == [None, None, None, None, False]
    (result,) = answers[0]["results"]
    assert set(result) == {
        "predictions",
        "out_of_vocabulary",
        "rejected",
        "rejection_score",
        "prediction_set",
        "image_id",
        "weak_match",
        "labels",
        "explanation",
        "path",
        "warnings",
        "error",
    }
    assert (result["rejected"], result["prediction_set"], result["error"]) == (None, None, None)
    assert [set(each) for each in result["predictions"]] == [{"label", "score", "similarity"}] * fields.get("top_k", 3)


@pytest.mark.parametrize("send", [as_form, as_json])
def test_several_images_are_answered_in_their_order(shared_client, send):
    colours = ["blue", "red", "green", "blue", "green"]
    response = send(shared_client, [picture(colour) for colour in colours], label_set=_stored(shared_client))
    assert first_labels(response) == colours


def _stored(client, name="colours", classes=LABELS, **fields):
    response = client.put(f"/v1/label-sets/{name}", json={"classes": classes, **fields})
    assert response.status_code in {200, 201}, response.text
    return name


@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "IMAGE/PNG; name=x", "image/x-whatever"])
def test_the_bytes_and_not_the_media_type_say_what_the_image_is(shared_client, media_type):
    assert first_labels(as_body(shared_client, picture("green"), media_type=media_type, labels="red,green")) == [
        "green"
    ]


def test_a_data_url_is_taken_for_the_image_it_holds(client):
    body = {"base64": "data:image/png;base64," + base64.b64encode(picture("blue")).decode()}
    assert first_labels(client.post("/v1/classify", json={"images": [body], "labels": LABELS})) == ["blue"]


def test_base64_with_line_breaks_is_read(client):
    """The base64 command breaks its lines after 76 characters."""
    body = {"base64": base64.encodebytes(picture("blue")).decode()}
    assert first_labels(client.post("/v1/classify", json={"images": [body], "labels": LABELS})) == ["blue"]


def test_an_image_larger_than_a_form_keeps_in_memory_is_read_whole(client):
    image = picture("green", size=(1500, 1500), file_format="BMP")
    assert len(image) > 4 * 1024 * 1024
    assert first_labels(as_form(client, [image, picture("red")], labels="red,green")) == ["green", "red"]


# --- requests of other programs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        "image/jpg",
        "image/pjpeg",
        "IMAGE/PNG",
        "image/x-png; charset=binary",
        "image/*",
        "application/octet-stream",
        "Application/Octet-Stream; charset=utf-8",
        "binary/octet-stream",
        "application/x-www-form-urlencoded",
        "",
        None,
    ],
)
def test_an_image_as_the_body_is_accepted_if_its_bytes_say_that_it_is_one(shared_client, content_type):
    headers = {} if content_type is None else {"content-type": content_type}
    url = "/v1/classify?labels=red,green,blue"
    assert first_labels(shared_client.post(url, content=picture("blue"), headers=headers)) == ["blue"]
    if content_type and not content_type.lower().startswith("image/"):
        problem_of(shared_client.post(url, content=b"no image", headers=headers), "unsupported-media-type")


DISPOSITION = b'Content-Disposition: form-data; name="image"'


@pytest.mark.parametrize(
    "headers",
    [
        DISPOSITION + b'; filename="a.png"',
        DISPOSITION + b"; filename=a.png",
        DISPOSITION + b"; filename*=UTF-8''%e7%8a%ac.png",
        DISPOSITION + b"; FILENAME*=iso-8859-1'de'a.png",
        DISPOSITION + b"; filename*0=a; filename*1=.png",
        DISPOSITION + b'; filename=""',
        DISPOSITION + b"\r\nContent-Type: image/png",
        DISPOSITION + b"\r\ncontent-type: Application/Octet-Stream",
        DISPOSITION.replace(b'"', b"") + b"; filename=a.png",
        DISPOSITION.upper().replace(b"IMAGE", b"image") + b'; filename="a.png"',
        b"Content-Type: image/pjpeg\r\nContent-Transfer-Encoding: binary\r\n" + DISPOSITION + b'; filename="C:\\a.png"',
    ],
)
def test_a_part_of_a_form_is_an_image_however_its_headers_are_written(shared_client, headers):
    body = b"--b c\r\n" + headers + b"\r\n\r\n" + picture("blue") + b"\r\n--b c\r\n"
    body += b"Content-Disposition: form-data; name=labels\r\n\r\nred,green,blue\r\n--b c--"
    for end in (b"\r\n", b"", b"\r\nepilogue"):
        for content_type in (
            'multipart/form-data; boundary="b c"',
            'Multipart/Form-Data; charset=utf-8;\tBoundary="b c"',
            "multipart/form-data; boundary=b c ;charset=utf-8",
        ):
            answer = shared_client.post("/v1/classify", content=body + end, headers={"content-type": content_type})
            assert first_labels(answer) == ["blue"], (end, content_type, answer.text)


@pytest.mark.parametrize("boundary", ["----=_Part_1_2.3", "a/b:c?d(e)", "'a,b'"])
def test_a_boundary_needs_no_quotes(shared_client, boundary):
    body = f"--{boundary}\r\n".encode() + DISPOSITION + b'; filename="a"\r\n\r\n' + picture("blue")
    body += f"\r\n--{boundary}\r\nContent-Disposition: form-data; name=labels\r\n\r\nred,blue\r\n".encode()
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    answer = shared_client.post("/v1/classify", content=body + f"--{boundary}--".encode(), headers=headers)
    assert first_labels(answer) == ["blue"], answer.text


# --- bad images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("send", [as_form, as_json])
def test_an_unreadable_image_has_an_error_in_its_own_result(shared_client, send):
    response = send(shared_client, [picture("red"), b"not an image", picture("blue")], label_set=_stored(shared_client))
    assert first_labels(response) == ["red", None, "blue"]
    results = response.json()["results"]
    assert [each["error"] is None for each in results] == [True, False, True]
    error = results[1]["error"]
    assert (error["type"], error["status"]) == ("urn:deixis:problem:not-an-image", 415)
    assert error["request_id"] == response.headers["x-request-id"]


def test_a_data_url_is_read_alike_wherever_an_image_is_given_as_text(shared_client):
    """As the browser writes it, and as other programs do; tests/images/test_data_urls.py has every spelling."""
    encoded = base64.b64encode(picture("blue")).decode()
    for text in (f" DATA:image/png;name=a;BASE64,{quote(encoded, safe='')}\n", encoded.rstrip("=")):
        for image in ({"base64": text}, {"url": text}) if "," in text else ({"base64": text},):
            answer = shared_client.post("/v1/classify", json={"images": [image], "labels": LABELS})
            assert first_labels(answer) == ["blue"]
        parameters = {"candidate_labels": LABELS}
        answer = shared_client.post(
            "/v1/zero-shot-image-classification", json={"inputs": text, "parameters": parameters}
        )
        assert answer.json()[0]["label"] == "blue"
        assert shared_client.post("/v1/embeddings", json={"input": text, "modality": "image"}).status_code == 200
    url_safe = {"base64": base64.urlsafe_b64encode(b"\xff\xef" * 9).decode()}
    answer = shared_client.post("/v1/classify", json={"images": [url_safe], "labels": LABELS})
    assert "replace - by + and _ by /" in problem_of(answer, "not-an-image")["detail"]


def test_invalid_base64_gives_an_error_in_the_result_of_its_image(client):
    good = {"base64": base64.b64encode(picture("red")).decode()}
    images = [{"base64": "&&&&"}, good, {"base64": "YQ"}, {"base64": "data:image/png;base64"}, {"base64": "é"}]
    response = client.post("/v1/classify", json={"images": images, "labels": LABELS})
    assert first_labels(response) == [None, "red", None, None, None]
    assert {each["error"]["status"] for each in response.json()["results"] if each["error"]} == {415}


@pytest.mark.parametrize("images", [[b""], [b"no image"], [b"no", b"image"], [picture("red")[:40]]])
def test_when_every_image_is_bad_in_one_way_the_answer_is_that_error(shared_client, images):
    problem_of(as_form(shared_client, images, labels="a"), "not-an-image")
    problem_of(as_json(shared_client, images, labels=["a"]), "not-an-image")


def test_when_images_are_bad_in_different_ways_the_error_lists_them(make_client):
    client = make_client(max_image_bytes=1000)
    response = as_json(client, [b"no image", picture("red") + bytes(2000)], labels=["a"])
    assert fields_of(response) == {"image.0", "image.1"}


def test_an_image_over_the_limits_has_an_error_in_its_own_result(make_client):
    client = make_client(max_image_bytes=1000, max_image_pixels=32 * 24)
    images = [picture("red"), picture("red") + bytes(1000), picture("red", size=(33, 24))]
    response = as_json(client, images, labels=LABELS)
    assert [each["error"] and each["error"]["status"] for each in response.json()["results"]] == [None, 413, 413]


# --- images of earlier requests ------------------------------------------------------------------------------------


def _ids(client, colours, **fields):
    response = as_json(client, [picture(colour) for colour in colours], keep_features=True, **fields)
    return [result["image_id"] for result in response.json()["results"]]


def _by_id(client, ids, **fields):
    return client.post("/v1/classify", json={"images": [{"id": image_id} for image_id in ids], **fields})


def test_an_image_named_by_id_is_classified_as_if_it_were_sent_again(shared_client):
    red, blue = _ids(shared_client, ["red", "blue"], labels=["green", "red"])
    answers = _by_id(shared_client, [blue, red], labels=LABELS)
    assert answer(answers) == answer(as_json(shared_client, [picture("blue"), picture("red")], labels=LABELS))
    assert [result["image_id"] for result in answers.json()["results"]] == [None, None]
    assert answers.json()["timing_ms"]["encode"] == 0
    encoded = base64.b64encode(picture("green")).decode()
    mixed = {"images": [{"id": red}, {"base64": encoded}, {"id": blue}], "labels": LABELS}
    assert first_labels(shared_client.post("/v1/classify", json=mixed)) == ["red", "green", "blue"]


def test_an_image_named_by_id_keeps_its_id(shared_client):
    (red,) = _ids(shared_client, ["red"], labels=LABELS)
    again = _by_id(shared_client, [red, "img_unknown"], labels=["red", "blue"], keep_features=True).json()["results"]
    assert [result["image_id"] for result in again] == [red, None]


def test_features_are_kept_only_if_the_request_asks_for_it(shared_client):
    for send in (as_form, as_json):
        assert send(shared_client, [picture("red")], labels=LABELS).json()["results"][0]["image_id"] is None
        kept = send(shared_client, [picture("red"), b"no image"], labels=LABELS, keep_features=True).json()["results"]
        assert kept[0]["image_id"].startswith("img_")
        assert kept[1]["image_id"] is None


def test_an_unknown_image_id_is_an_error_in_the_result_of_its_image(shared_client):
    (red,) = _ids(shared_client, ["red"], labels=LABELS)
    response = _by_id(shared_client, [red, "img_unknown"], labels=LABELS)
    assert first_labels(response) == ["red", None]
    assert response.json()["results"][1]["error"]["type"] == "urn:deixis:problem:unknown-image"
    problem_of(_by_id(shared_client, ["img_unknown"], labels=LABELS), "unknown-image")
    for image in ({"id": red, "base64": "YQ=="}, {}, {"id": None}):
        response = shared_client.post("/v1/classify", json={"images": [image], "labels": LABELS})
        assert "give either base64, url or id" in problem_of(response, "invalid-field")["errors"][0]["problem"]


def test_ids_are_of_one_model(make_client):
    client = make_client(encoders=[FakeEncoder("fake"), FakeEncoder("other")])
    (red,) = _ids(client, ["red"], labels=LABELS)
    assert "send the image again" in problem_of(_by_id(client, [red], labels=LABELS, model="other"))["detail"]


# --- what to choose from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        "red,green,blue",
        " red , green ,blue",
        '["red", "green", "blue"]',
        ' ["red","green","blue"]',
        ["red", "green", "blue"],
        ["red,green", "blue"],
        ['["red"]', "green, blue"],
    ],
)
def test_labels_in_text_are_comma_separated_or_a_json_array_or_repeated(shared_client, labels):
    expected = answer(as_json(shared_client, [picture("red")], labels=LABELS))
    assert answer(as_form(shared_client, [picture("red")], labels=labels)) == expected
    assert answer(as_body(shared_client, picture("red"), labels=labels)) == expected


def test_a_comma_inside_a_label_is_kept_in_a_json_array(client):
    response = as_form(client, [picture("red")], labels='["red, bright", "blue"]')
    assert first_labels(response) == ["red, bright"]


@pytest.mark.parametrize(
    "label", ["дом", "犬", "🐕‍🦺", 'a "quoted" label', "<script>", "{}", "{0.__class__}", "%s", "\\n"]
)
def test_labels_in_any_script_come_back_as_they_were_sent(shared_client, label):
    for response in (
        as_json(shared_client, [picture("red")], labels=[label]),
        as_form(shared_client, [picture("red")], labels=json.dumps([label])),
        as_body(shared_client, picture("red"), labels=json.dumps([label], ensure_ascii=False)),
    ):
        assert first_labels(response) == [label]


@pytest.mark.parametrize("labels", [[], [""], ["a", " "], ["a", "a"], ["a", "A"], ["a\0b"], ["x" * 201], ["\u202egnp"]])
def test_labels_that_are_none_are_refused_in_every_form(shared_client, labels):
    for response in (
        as_json(shared_client, [picture("red")], labels=labels),
        as_form(shared_client, [picture("red")], labels=json.dumps(labels)),
        as_body(shared_client, picture("red"), labels=json.dumps(labels)),
    ):
        assert all(field.startswith("labels") for field in fields_of(response))


@pytest.mark.parametrize("labels", ["", ",", "a,", "a,,b"])
def test_an_empty_place_between_commas_is_refused(shared_client, labels):
    assert all(
        field.startswith("labels") for field in fields_of(as_form(shared_client, [picture("red")], labels=labels))
    )


def test_a_label_set_is_named_with_or_without_its_version(client):
    _stored(client, "colours", ["red", "green"])
    _stored(client, "colours", ["green", "blue"])
    for reference, reply, best in [("colours", 2, "green"), ("colours@1", 1, "red"), ("colours@2", 2, "green")]:
        body = answer(as_body(client, picture("#ff4000"), label_set=reference, top_k=1))
        assert body["label_set"] == f"colours@{reply}"
        assert body["results"][0]["predictions"][0]["label"] == best


def test_labels_and_a_label_set_together_are_refused_and_neither_where_the_method_needs_some(client):
    both = {"labels": ["a"], "label_set": _stored(client)}
    assert fields_of(as_json(client, [picture()], **both)) == {"labels"}
    for method in ("zero-shot", "auto"):
        assert fields_of(as_json(client, [picture()], method=method)) == {"labels"}
        assert fields_of(as_body(client, picture(), method=method)) == {"labels"}


# --- templates -----------------------------------------------------------------------------------------------------


def test_a_template_is_a_sets_name_or_one_template(client, encoder):
    for template, prompts in [
        ("photo", ["a photo of a cat."]),
        ("{}", ["cat"]),
        ("a {}, a kind of {}", ["a cat, a kind of cat"]),
    ]:
        encoder.encoded_texts.clear()
        answer(as_json(client, [picture()], labels=["cat"], template=template))
        assert encoder.encoded_texts == prompts


def test_a_template_set_of_several_templates_is_used_whole(client, encoder):
    answer(as_json(client, [picture()], labels=["cat"], template="ensemble"))
    assert len(encoder.encoded_texts) > 1
    assert all("cat" in text for text in encoder.encoded_texts)


@pytest.mark.parametrize("template", ["{0}", "{name}", "{} {", "{}}", "a {} \n b", "{}" + "x" * 300, "x" * 301, "\0{}"])
def test_an_invalid_template_is_reported_with_its_field(shared_client, template):
    assert fields_of(as_json(shared_client, [picture()], labels=["a"], template=template)) == {"template"}


# --- top_k and explain ---------------------------------------------------------------------------------------------


def test_the_default_number_of_predictions_is_five(client):
    labels = [f"label {number}" for number in range(9)]
    for top_k, count in [({}, 5), ({"top_k": 1}, 1), ({"top_k": 9}, 9), ({"top_k": 100_000}, 9)]:
        (result,) = answer(as_json(client, [picture()], labels=labels, **top_k))["results"]
        assert len(result["predictions"]) == count
        scores = [each["score"] for each in result["predictions"]]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("top_k", ["0", "-1", "1.5", "many", "", "100001", "1" * 5000, "NaN"])
def test_an_invalid_top_k_is_rejected(shared_client, top_k):
    assert fields_of(as_body(shared_client, picture(), labels="a", top_k=top_k)) == {"top_k"}
    assert fields_of(as_form(shared_client, [picture()], labels="a", top_k=top_k)) == {"top_k"}


# --- explanations --------------------------------------------------------------------------------------------------


def test_there_is_no_explanation_by_default(client):
    (result,) = answer(as_json(client, [picture()], labels=["a"]))["results"]
    assert result["explanation"] is None


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("merge_synonyms", ["max", "mean"])
def test_the_prompts_of_an_explanation_add_up_to_the_similarity(shared_client, method, merge_synonyms):
    """Weights times cosines, whatever the method makes of the prompts."""
    classes = [
        {"name": "ruby", "features": ["red facets", "a red gem"], "descriptions": ["A ruby is red."]},
        {
            "name": "leaf",
            "synonyms": ["foliage"],
            "features": ["green veins"],
            "descriptions": ["It is green.", "Flat."],
        },
        {"name": "sky", "prompt": "the blue {}", "descriptions": ["Blue all over."]},
    ]
    body = {"classes": classes, "templates": "ensemble", "merge_synonyms": merge_synonyms}
    shared_client.put("/v1/label-sets/things", json=body).raise_for_status()
    options = {"options": {"descriptors": 6}} if method == "waffle" else {}
    asked = as_json(shared_client, [picture("orange")], label_set="things", method=method, explain=True, **options)
    (result,) = answer(asked)["results"]
    reply = result["explanation"]["labels"]
    assert [each["label"] for each in reply] == [each["label"] for each in result["predictions"]]
    assert [each["rival"] for each in reply] == [reply[1]["label"], reply[0]["label"], reply[0]["label"]]
    for each, prediction in zip(reply, result["predictions"], strict=True):
        prompts = each["supporting"] + each["opposing"]
        assert each["similarity"] == pytest.approx(prediction["similarity"], abs=1e-6)
        assert sum(prompt["weight"] * prompt["cosine"] for prompt in prompts) == pytest.approx(
            each["similarity"], abs=1e-5
        )
        assert all(prompt["cosine"] > each["rival_similarity"] for prompt in each["supporting"])
        assert all(prompt["cosine"] <= each["rival_similarity"] for prompt in each["opposing"])


def test_the_second_best_label_is_explained_even_with_one_prediction(client):
    asked = as_json(client, [picture("red")], labels=["red", "blue"], top_k=1, explain=True)
    (result,) = answer(asked)["results"]
    assert len(result["predictions"]) == 1
    best, second = result["explanation"]["labels"]
    assert (best["label"], best["rival"], second["label"]) == ("red", "blue", "blue")
    assert [each["prompt"] for each in best["supporting"]] == ["a photo of a red."]
    assert [each["prompt"] for each in second["opposing"]] == ["a photo of a blue."]


def test_a_single_label_is_explained_without_a_rival(client):
    (result,) = answer(as_json(client, [picture("red")], labels=["red"], explain=True))["results"]
    (reply,) = result["explanation"]["labels"]
    assert (reply["rival"], reply["rival_similarity"]) == (None, None)
    assert len(reply["supporting"] + reply["opposing"]) == 1


def test_each_form_takes_explain_and_options(client):
    fields = {"labels": "red, blue", "method": "autoclip", "template": "ensemble"}
    for answered in (
        as_form(client, [picture("red")], explain="true", options='{"beta": 0.5}', **fields),
        as_body(client, picture("red"), explain="true", options='{"beta": 0.5}', **fields),
    ):
        (result,) = answer(answered)["results"]
        weights = [each["weight"] for each in result["explanation"]["labels"][0]["supporting"]]
        assert max(weights) > 1 / 7
    equal = answer(as_form(client, [picture("red")], explain="true", options='{"beta": 1}', **fields))["results"][0]
    assert {round(each["weight"], 5) for each in equal["explanation"]["labels"][0]["supporting"]} == {round(1 / 7, 5)}


def test_a_bad_image_among_good_ones_has_no_explanation_and_the_others_have(client):
    results = answer(as_json(client, [picture("red"), b"no image"], labels=["red"], explain=True))["results"]
    assert results[0]["explanation"]["labels"][0]["label"] == "red"
    assert results[1]["explanation"] is None


# --- methods and their options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reply"),
    [
        ({"beta": 0}, "0 is not a number from 0.01 to 1"),
        ({"beta": 1.5}, "1.5 is not a number from 0.01 to 1"),
        ({"gamma": 1}, "method 'autoclip' has no such option; known: beta"),
    ],
)
def test_an_option_that_a_method_does_not_take_is_refused(shared_client, options, reply):
    answered = as_json(shared_client, [picture()], labels=["a"], method="autoclip", options=options)
    assert answered.status_code == 422
    (problem,) = answered.json()["errors"]
    assert problem["problem"] == reply
    assert problem["field"] == f"options.{next(iter(options))}"


@pytest.mark.parametrize(
    "options", ["beta", "[1]", '{"beta": "much"}', "{" * 5000, '{"beta": NaN}', '{"beta": Infinity}']
)
def test_options_that_are_no_object_of_numbers_are_refused(shared_client, options):
    answered = as_form(shared_client, [picture()], labels="a", method="autoclip", options=options)
    assert answered.status_code == 422
    assert all(each["field"].startswith("options") for each in answered.json()["errors"])


def test_a_method_that_lacks_descriptions_says_so_in_the_answer(client):
    (result,) = answer(as_json(client, [picture()], labels=["a", "b"], method="cupl"))["results"]
    assert result["warnings"] == ["no class has descriptions; the templates are used"]


def test_a_single_label_is_answered_with_a_warning(client):
    for labels in (["cat"], ["cat and dog"]):
        (result,) = answer(as_json(client, [picture()], labels=labels))["results"]
        assert [prediction["score"] for prediction in result["predictions"]] == [1.0]
        assert any("only one label" in warning for warning in result["warnings"])
    (result,) = answer(as_json(client, [picture()], labels=["cat", "dog"]))["results"]
    assert result["warnings"] == []


@pytest.mark.parametrize("labels", ["cat\ndog", "cat;dog", "cat\uff0cdog", "cat\u3001dog"])
def test_labels_are_separated_in_a_form_and_in_a_query_by_what_people_write(shared_client, labels):
    form = as_form(shared_client, [picture()], labels=labels)
    query = shared_client.post(
        "/v1/classify", params={"labels": labels}, content=picture(), headers={"content-type": "image/png"}
    )
    for response in (form, query):
        (result,) = answer(response)["results"]
        assert {prediction["label"] for prediction in result["predictions"]} == {"cat", "dog"}


def test_labels_in_json_may_be_one_string_as_in_a_form(shared_client):
    for labels in ("red, green\nblue", "red; green; blue", '["red", "green", "blue"]'):
        as_text = as_json(shared_client, [picture("blue")], labels=labels)
        assert answer(as_text) == answer(as_json(shared_client, [picture("blue")], labels=LABELS))
    assert fields_of(as_json(shared_client, [picture()], labels="")) == {"labels"}
    problem_of(as_json(shared_client, [picture()], labels='["red"'), "malformed-request")
    image = base64.b64encode(picture("blue")).decode()
    body = {"inputs": image, "parameters": {"candidate_labels": "red, blue"}}
    assert shared_client.post("/v1/zero-shot-image-classification", json=body).json()[0]["label"] == "blue"


def test_labels_with_the_same_features_are_reported(client, encoder):
    """To this encoder, every text with a colour is this colour."""
    labels = ["cat", "red", *(f"label {number}" for number in range(500)), "a red thing", "dog"]
    for _ in range(2):
        (result,) = answer(as_json(client, [picture()], labels=labels))["results"]
        (warning,) = result["warnings"]
        assert "hardly tells these labels apart" in warning
        assert "'red', 'a red thing';" in warning
    (result,) = answer(as_json(client, [picture()], labels=["cat", "dog", "red", "blue"]))["results"]
    assert result["warnings"] == []
    synonyms = [{"name": "red", "synonyms": ["bright red"]}, "dog"]
    client.put("/v1/label-sets/colours", json={"classes": synonyms}).raise_for_status()
    (result,) = answer(as_json(client, [picture()], label_set="colours"))["results"]
    assert result["warnings"] == []


def test_a_classifier_that_would_take_too_much_memory_is_refused_with_the_way_out(make_client):
    """The features of 16,000 prompts of 16 dimensions are one MiB, and half of one is set aside."""
    client = make_client(cache_mib=2)
    labels = [f"label {number}" for number in range(200)]
    answered = as_json(client, [picture()], labels=labels, method="autoclip", template="imagenet")
    assert answered.status_code == 413
    assert "raise DEIXIS_CACHE_MIB" in answered.json()["detail"]


def test_every_method_is_listed_with_what_it_learns_from_and_its_options(client):
    reply = client.get("/v1/methods").json()["methods"]
    assert [each["name"] for each in reply] == [*METHODS, CASED.name]
    assert [each["name"] for each in reply if each["vocabulary_free"]] == [CASED.name]
    assert [each["name"] for each in reply if each["default"]] == ["zero-shot"]
    for each in reply[:-1]:
        method = METHODS[each["name"]]
        assert set(each["learns_from"]) == method.learns <= {"labelled images", "unlabelled images"}
        assert (each["transductive"], each["stateful"]) == (method.transductive, method.stateful)
        assert ("transductive" in each["options"]) == ("unlabelled images" in each["learns_from"])
        for option in each["options"].values():
            assert option["minimum"] <= option["default"] <= option["maximum"]


def test_without_a_label_set_a_method_learns_from_the_images_of_the_request_or_is_refused(client):
    images = [shade(number % 3, number) for number in range(6)]
    for name, method in METHODS.items():
        response = as_json(client, images, labels=["red", "green", "blue"], method=name, top_k=1)
        if "labelled images" in method.learns or method.stateful:
            assert fields_of(response) == {"method"}
            assert "give label_set" in response.json()["detail"]
            continue
        body = answer(response)
        assert (body["method"], body["examples"]) == (name, None)
        assert body["transductive"] == ("unlabelled images" in method.learns)
        told_together = ["classified together" in warning for warning in body["results"][0]["warnings"]]
        assert any(told_together) == body["transductive"]
        if method.learns:
            assert first_labels(response) == ["red", "green", "blue"] * 2


# --- names that do not exist ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({"model": "clap"}, "fake"),
        ({"method": "zlp"}, ", ".join(sorted([*METHODS, "auto", "cased"]))),
        ({"template": "phto"}, "photo"),
        ({"labels": None, "label_set": "colurs"}, "colours"),
        ({"labels": None, "label_set": "colours@7"}, "1"),
    ],
)
def test_an_unknown_name_is_404_with_the_known_ones(client, fields, known):
    _stored(client)
    members = problem_of(as_json(client, [picture()], **{"labels": ["a"]} | fields), "unknown-name")
    assert known in members["detail"]
    assert next(value for value in fields.values() if value) in members["detail"]


def test_unknown_fields_are_refused_in_every_form_with_the_known_ones(client):
    for response in (
        as_json(client, [picture()], labels=["a"], topk=1),
        as_form(client, [picture()], labels="a", topk=1),
        as_body(client, picture(), labels="a", topk=1),
    ):
        assert fields_of(response) == {"topk"}
        assert "top_k" in response.json()["detail"]


def test_a_field_given_twice_is_refused(client):
    assert fields_of(as_form(client, [picture()], labels="a", model=["fake", "fake"])) == {"model"}
    assert fields_of(as_body(client, picture(), labels="a", top_k=[1, 2])) == {"top_k"}


def test_fields_in_the_address_of_a_form_or_of_json_are_refused(client):
    """They would be ignored otherwise."""
    for response in (
        client.post("/v1/classify?labels=a", files={"image": picture()}, data={"labels": "b"}),
        client.post("/v1/classify?top_k=1", json={"images": [{"base64": ""}], "labels": ["a"]}),
    ):
        assert fields_of(response) <= {"labels", "top_k"}


def test_an_image_by_its_url_is_refused_and_not_fetched(client):
    response = client.post("/v1/classify", json={"images": [{"url": "http://127.0.0.1:1/a.png"}], "labels": ["a"]})
    assert fields_of(response) == {"url"}
    assert "send the image itself" in response.json()["detail"]


# --- models --------------------------------------------------------------------------------------------------------


def test_a_sigmoid_models_scores_need_not_sum_to_one(make_client):
    client = make_client(encoders=[FakeEncoder("siglip", logit_bias=-8.0)])
    (result,) = answer(as_json(client, [picture("red")], labels=["red", "the red", "green"]))["results"]
    first, second, third = (each["score"] for each in result["predictions"])
    assert first == pytest.approx(second, abs=1e-6)
    assert 0.8 < first < 1
    assert third < 0.001


def test_the_first_model_is_the_default_and_every_one_can_be_named(make_client):
    client = make_client(encoders=[FakeEncoder("first"), FakeEncoder("second", logit_bias=-8.0)])
    reply = {
        name: answer(as_json(client, [picture("red")], labels=["red"], **({"model": name} if name else {})))
        for name in ("", "first", "second")
    }
    assert reply[""] == reply["first"]
    assert reply["second"]["model"] == "second"
    assert reply["second"]["results"] != reply["first"]["results"]


# --- what examples teach -------------------------------------------------------------------------------------------


@pytest.fixture
def taught(client):
    """A label set whose words say nothing of the pictures, with twelve examples of each class, tried."""
    with_things(client)
    teach(client, each=12)
    return client


def in_every_form(client, image, **fields):
    return [
        as_form(client, [image], **fields),
        as_json(client, [image], **fields),
        as_body(client, image, **fields),
    ]


def test_where_there_are_examples_the_method_is_left_to_the_evidence(taught):
    selection = taught.get(SELECTION).json()
    for fields in ({}, {"method": "auto"}):
        answers = [answer(each) for each in in_every_form(taught, shade(1, 70), label_set="things", **fields)]
        assert answers[0] == answers[1] == answers[2]
        body = answers[0]
        assert (body["method"], body["reason"]) == (selection["method"], selection["reason"])
        assert body["examples"] == {"revision": 1, "labelled": 36, "unlabelled": 0}
        assert (body["calibration"]["images"], body["calibration"]["reject_below"]) == (36, None)
        assert body["calibration"]["temperature"] > 0
        assert body["results"][0]["predictions"][0]["label"] == "leaf"
        assert body["results"][0]["warnings"] == []
    plain = answer(as_form(taught, [shade(1, 70)], label_set="things", method="zero-shot"))
    assert (plain["method"], plain["reason"], plain["examples"]) == ("zero-shot", None, None)


def test_without_examples_auto_is_zero_shot_and_says_why(client):
    with_things(client)
    for fields in ({"labels": json.dumps(LABELS)}, {"label_set": "things"}):
        body = answer(as_form(client, [picture("red")], method="auto", **fields))
        assert body["method"] == "zero-shot"
        assert "there are none" in body["reason"]


def test_auto_takes_no_options_which_are_those_of_a_method(taught):
    fields = {"label_set": "things", "options": {"alpha": 1}}
    for method in ({}, {"method": "auto"}):
        assert fields_of(as_json(taught, [shade(0, 70)], **fields, **method)) == {"options"}
    assert answer(as_json(taught, [shade(0, 70)], **fields, method="gda"))["method"] == "gda"


def test_the_answer_follows_the_examples_as_they_are_added_and_deleted(taught):
    def best(image):
        return first_labels(as_body(taught, image, label_set="things"))[0]

    assert best(shade(2, 70)) == "sky"
    images = [each["id"] for each in taught.get(IMAGES, params={"class": "sky"}).json()["images"]]
    assert len(images) == 12
    # The pictures of skies are called tomatoes from now on, and those of tomatoes skies.
    added(add(taught, [shade(2, number) for number in range(12)], ["tomato"]))
    added(add(taught, [shade(0, number) for number in range(12)], ["sky"]))
    at_rest(taught)
    best(shade(2, 70))  # what was learned before answers until the new is ready
    at_rest(taught)
    assert [best(shade(kind, 70)) for kind in range(3)] == ["sky", "leaf", "tomato"]


def test_a_threshold_on_scores_with_priors_has_no_known_rate_of_false_rejections(taught):
    names = [each["name"] for each in taught.get("/v1/label-sets/things").json()["classes"]]
    fields = {"label_set": "things", "reject_below": 0.5}
    plain = answer(as_json(taught, [picture()], **fields))["calibration"]
    weighted = answer(as_json(taught, [picture()], **fields, priors=dict.fromkeys(names, 2)))["calibration"]
    assert plain["false_rejection_rate"] is not None
    assert weighted == {**plain, "false_rejection_rate": None}


def test_a_set_of_labels_and_a_rejection_follow_from_the_examples_in_every_form(taught):
    fields = {"label_set": "things", "coverage": 0.9, "false_rejection_rate": 0.2}
    answers = [answer(each) for each in in_every_form(taught, shade(0, 70), **fields)]
    assert answers[0] == answers[1] == answers[2]
    calibration, (result,) = answers[0]["calibration"], answers[0]["results"]
    assert calibration["images"] == 36
    assert calibration["coverage"] == 0.9
    assert 0 <= calibration["false_rejection_rate"] <= 0.2
    assert 0 < calibration["reject_below"] < 1
    best = result["predictions"][0]
    assert result["prediction_set"][0] == best["label"] == "tomato"
    assert calibration["reject_by"] == "class-mean"
    assert result["rejected"] == (result["rejection_score"] < calibration["reject_below"])


def test_a_higher_coverage_gives_no_smaller_sets_and_a_higher_rate_no_lower_threshold(taught):
    images = [shade(number % 3, 60 + number) for number in range(8)]

    def asked(**fields):
        return answer(as_json(taught, images, label_set="things", **fields))

    sizes, thresholds = [], []
    for share in (0.05, 0.5, 0.9, 0.999):
        reply = asked(coverage=share)
        assert all(each["rejected"] is None for each in reply["results"])
        for each in reply["results"]:
            ranked = [prediction["label"] for prediction in each["predictions"]]
            assert each["prediction_set"] == ranked[: len(each["prediction_set"])] != []
        sizes.append([len(each["prediction_set"]) for each in reply["results"]])
        rated = asked(false_rejection_rate=share)
        assert all(each["prediction_set"] is None for each in rated["results"])
        assert rated["calibration"]["false_rejection_rate"] <= share
        thresholds.append(rated["calibration"]["reject_below"])
    assert all(smaller <= larger for few, many in pairwise(sizes) for smaller, larger in zip(few, many, strict=True))
    # As many as 36 images cannot promise 99.9 %, but for every label.
    assert sizes[-1] == [3] * 8
    assert thresholds == sorted(thresholds)
    assert thresholds[0] < thresholds[-1]


def test_a_threshold_of_the_callers_own_needs_no_examples_and_is_held_to(client, taught):
    for fields in ({"labels": json.dumps(LABELS)}, {"label_set": "things"}, {"label_set": "things", "method": "cupl"}):
        for threshold, rejected in [(0, False), (1, True)]:
            for response in in_every_form(client, picture("#a06050"), reject_below=threshold, **fields)[::2]:
                body = answer(response)
                assert [each["rejected"] for each in body["results"]] == [rejected]
                best_score = body["results"][0]["predictions"][0]["score"]
                assert body["results"][0]["rejection_score"] == pytest.approx(best_score, abs=1e-6)
                if body["calibration"] is not None:
                    assert body["calibration"]["reject_below"] == threshold
                    assert body["calibration"]["reject_by"] == "score"


@pytest.mark.parametrize("name", ["coverage", "false_rejection_rate"])
def test_what_only_labelled_examples_can_tell_is_refused_without_them(client, name):
    with_things(client)
    added(add(client, [shade(kind, 0) for kind in range(3)]))
    at_rest(client)
    for fields in ({"labels": "red, blue"}, {"label_set": "things"}, {"label_set": "things", "method": "zlap"}):
        for response in (
            as_form(client, [picture()], **fields, **{name: 0.5}),
            as_body(client, picture(), **fields, **{name: 0.5}),
        ):
            assert fields_of(response) == {name}
            assert "labelled example images" in response.json()["detail"]


def test_a_method_that_was_not_tried_with_these_options_has_no_calibration(taught):
    fields = {"label_set": "things", "method": "gda", "options": {"alpha": 3}}
    assert answer(as_json(taught, [shade(0, 70)], **fields))["calibration"] is None
    assert fields_of(as_json(taught, [shade(0, 70)], **fields, coverage=0.9)) == {"coverage"}
    assert answer(as_json(taught, [shade(0, 70)], label_set="things", method="gda", coverage=0.9))["calibration"]
    taught.post(f"{AT}/classes", json={"classes": ["stone"]}).raise_for_status()
    assert answer(as_json(taught, [shade(0, 70)], label_set="things@1", method="gda", coverage=0.9))["calibration"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("coverage", ["0", "1", "-0.1", "1.5", "nan", "inf", "much", ""]),
        ("false_rejection_rate", ["0", "1", "-0.1", "1.5", "nan", "inf", "much", ""]),
        ("reject_below", ["-0.001", "1.001", "nan", "-inf", "much", ""]),
    ],
)
def test_an_invalid_share_is_reported_with_its_field_in_every_form(taught, name, values):
    for value in values:
        fields = {"label_set": "things", name: value}
        assert fields_of(as_form(taught, [picture()], **fields)) == {name}, value
        assert fields_of(as_body(taught, picture(), **fields)) == {name}, value
        assert fields_of(as_json(taught, [picture()], **fields)) == {name}, value


def test_a_threshold_and_a_rate_together_are_refused(taught):
    for response in in_every_form(taught, picture(), label_set="things", reject_below=0.5, false_rejection_rate=0.1):
        assert fields_of(response) == {"reject_below"}


def test_a_bad_image_among_good_ones_is_neither_rejected_nor_in_a_set(taught):
    fields = {"label_set": "things", "coverage": 0.9, "reject_below": 0.1}
    good, bad = answer(as_json(taught, [shade(0, 70), b"no image"], **fields))["results"]
    assert good["out_of_vocabulary"] is not None
    assert (bad["out_of_vocabulary"], bad["rejected"], bad["prediction_set"]) == (None, None, None)


def test_the_unknown_class_scores_are_returned(client):
    near, far = (
        answer(as_json(client, [picture(colour)], labels=["red", "blue"]))["results"][0]["out_of_vocabulary"]
        for colour in ("red", "green")
    )
    for each in (near, far):
        assert set(each) == {"score", "nearest", "mcm", "energy"}
        assert 0 <= each["mcm"] < 1
    assert near["mcm"] < far["mcm"]
    assert near["energy"] < far["energy"]


def test_unlabelled_examples_alone_are_used_where_they_are_spread_over_the_classes(client):
    with_things(client, ["red", "green", "blue"])
    added(add(client, [shade(number % 3, number) for number in range(30)]))
    at_rest(client)
    body = answer(as_body(client, shade(1, 70), label_set="things"))
    assert (body["method"], body["transductive"]) == ("tfup", False)
    assert body["examples"] == {"revision": 1, "labelled": 0, "unlabelled": 30}
    assert body["results"][0]["predictions"][0]["label"] == "green"


# --- what else an answer holds -------------------------------------------------------------------------------------


def test_the_time_of_every_stage_is_returned_in_milliseconds(client):
    timing = as_json(client, [picture()], labels=["a"]).json()["timing_ms"]
    assert set(timing) == {"text", "decode", "queue", "encode", "adapt"}
    assert all(0 <= value < 60_000 for value in timing.values())


def test_many_requests_in_a_row_leave_no_image_in_the_queue(client):
    for _ in range(20):
        as_json(client, [picture(), b"no image"], labels=["a"])
    (model,) = client.get("/v1/models").json()["models"]
    assert model["queued_images"] == 0


@pytest.mark.parametrize(
    ("of_form", "of_part"),
    [("; charset=iso-8859-1", ""), ("", "\r\nContent-Type: text/plain; charset=ISO-8859-1"), ("; charset=x", "latin1")],
)
def test_a_label_is_read_in_the_charset_of_its_part_or_of_the_form(shared_client, of_form, of_part):
    of_part = "\r\nContent-Type: text/plain; charset=latin1" if of_part == "latin1" else of_part
    body = b"--b\r\n" + DISPOSITION + b'; filename="a.png"\r\n\r\n' + picture("blue") + b"\r\n--b\r\n"
    body += f'Content-Disposition: form-data; name="labels"{of_part}\r\n\r\nblue é,red\r\n--b--'.encode("latin-1")
    headers = {"content-type": f"multipart/form-data; boundary=b{of_form}"}
    assert first_labels(shared_client.post("/v1/classify", content=body, headers=headers)) == ["blue é"]


@pytest.mark.parametrize("charset", ["x", "hex", "utf-7", "idna", "a" * 1000, "utf-8\x00.utf-8"])
def test_a_form_in_an_unknown_charset_is_malformed(shared_client, charset):
    body = b"--b\r\n" + DISPOSITION + b'; filename="a.png"\r\n\r\n' + picture("blue") + b"\r\n--b\r\n"
    body += f'Content-Disposition: form-data; name="labels"\r\nContent-Type: text/plain; charset="{charset}"'.encode()
    body += b"\r\n\r\nred\r\n--b--"
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = problem_of(shared_client.post("/v1/classify", content=body, headers=headers), "malformed-request")
    assert "charset" in answer["detail"]


def test_a_part_with_odd_bytes_in_its_file_name_is_an_image(shared_client):
    body = b"--b\r\n" + DISPOSITION + b'; filename="\xff\xfe.png"\r\n\r\n' + picture("blue") + b"\r\n--b\r\n"
    body += b'Content-Disposition: form-data; name="labels"\r\n\r\nred,blue\r\n--b--'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert first_labels(shared_client.post("/v1/classify", content=body, headers=headers)) == ["blue"]


@pytest.mark.parametrize(("size", "status"), [(4 * 1024**2, 422), (4 * 1024**2 + 1, 413)])
def test_a_field_of_a_form_has_a_maximum_size(shared_client, size, status):
    body = b"--b\r\n" + DISPOSITION + b'; filename="a.png"\r\n\r\n' + picture("blue") + b"\r\n--b\r\n"
    body += b'Content-Disposition: form-data; name="template"\r\n\r\n' + b"a" * size + b"\r\n--b--"
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert shared_client.post("/v1/classify", content=body, headers=headers).status_code == status


# --- responses as they are described ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": "red,green"},
        {"labels": "red,green", "multi_label": "true", "explain": "true"},
        {"labels": "red,green", "priors": '{"red": 3, "green": 1}', "reject_below": "0.9", "keep_features": "true"},
    ],
)
def test_a_response_has_the_fields_of_its_description_and_no_others(shared_client, fields):
    response = as_form(shared_client, [picture("red"), b"not an image"], **fields)
    body = TypeAdapter(ClassifyResponse).validate_json(response.content, strict=True)
    assert response.json().keys() == ClassifyResponse.__annotations__.keys()
    for result in body["results"]:
        assert result.keys() == ResultBody.__annotations__.keys()
    assert body["results"][0]["out_of_vocabulary"].keys() == OutOfVocabularyBody.__annotations__.keys()


@pytest.mark.parametrize(("size", "status"), [(1000, 200), (3000, 413)])
def test_a_header_of_a_part_has_a_maximum_size(shared_client, size, status):
    body = b"--b\r\n" + DISPOSITION + b'; filename="' + b"a" * size + b'.png"\r\n\r\n' + picture("blue")
    body += b'\r\n--b\r\nContent-Disposition: form-data; name="labels"\r\n\r\nred,blue\r\n--b--'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert shared_client.post("/v1/classify", content=body, headers=headers).status_code == status
