"""Reports about requests and answers: labels, texts, templates, forms and numbers."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from app.encoders.fake import FakeEncoder
from tests.api.problems import fields_of, problem_of
from tests.conftest import picture
from tests.field.asking import LABELS, best_of, classify, classify_json, embed, encoded, results_of
from tests.field.reports import report

ROOT = Path(__file__).parents[2]
HUGGING_FACE = "/v1/zero-shot-image-classification"


def ask_hugging_face(client, image, **parameters):
    return client.post(HUGGING_FACE, json={"inputs": encoded(image), "parameters": parameters})


# --- embeddings ------------------------------------------------------------------------------------------------------


@report("michaelfeil/infinity#295", "OpenAI's client sent token ids, and the answer listed a type error for each id.")
def test_token_ids_are_refused_with_one_sentence_that_says_what_to_send(shared_client):
    refused = problem_of(embed(shared_client, [100, 201, 301]), "invalid-field")
    assert refused["errors"] == [
        {
            "field": "input",
            "problem": "token ids are not supported; send texts"
            " (LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))",
        }
    ]


@report(
    "huggingface/text-embeddings-inference#273", "LangChain splits texts into lists of token ids before it sends them."
)
def test_lists_of_token_ids_are_refused_in_the_same_way(shared_client):
    assert (
        "check_embedding_ctx_length=False"
        in problem_of(embed(shared_client, [[9906, 1917], [3]]), "invalid-field")["detail"]
    )


@report("michaelfeil/infinity#98", "A single text was refused, although OpenAI's form allows it beside a list.")
def test_a_single_text_is_a_list_of_one(shared_client):
    one, listed = embed(shared_client, "a cat").json(), embed(shared_client, ["a cat"]).json()
    assert one == listed
    assert len(one["data"]) == 1


@report("openai/openai-python#1490", "OpenAI's client asks for base64 by default.")
def test_base64_features_are_the_numbers_in_little_endian(shared_client):
    numbers = embed(shared_client, "a cat", encoding_format="float").json()["data"][0]["embedding"]
    text = embed(shared_client, "a cat", encoding_format="base64").json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<f4"), np.float32(numbers))


@report("runpod-workers/worker-infinity-embedding#30", "An unsupported `encoding_format` was ignored without a word.")
def test_an_unknown_encoding_format_is_refused(shared_client):
    assert fields_of(embed(shared_client, "a cat", encoding_format="int8")) == {"encoding_format"}


@report(
    "huggingface/text-embeddings-inference#378", "More texts than the limit were refused, and no client split them."
)
def test_too_many_texts_are_refused_with_both_numbers(shared_client):
    detail = problem_of(embed(shared_client, ["a cat"] * 1001), "too-large")["detail"]
    assert "1001 texts" in detail
    assert "at most 1000" in detail


@report("huggingface/text-embeddings-inference#50", "Status 413 came without the limit that was exceeded.")
def test_too_large_a_body_is_refused_with_the_limit(make_client):
    client = make_client(max_image_bytes=1000)
    detail = problem_of(classify(client, picture("red") + bytes(2000)), "image-too-large")["detail"]
    assert "1000" in detail.replace(",", "")


@report("vllm-project/vllm#19661", "A model that computed NaN gave status 500, because JSON has no NaN.")
def test_an_image_with_features_that_are_no_numbers_is_a_problem_and_not_null_scores(make_client):
    class Overflowing(FakeEncoder):
        def encode_images(self, pixels):
            rows = super().encode_images(pixels)
            rows[[index for index, image in enumerate(pixels) if (image == 255).all()]] = np.nan
            return rows

    client = make_client([Overflowing()])
    assert "NaN" in problem_of(classify(client, picture("white")), "not-an-image")["detail"]
    problem_of(embed(client, encoded(picture("white")), modality="image"), "not-an-image")
    assert best_of(classify(client, picture("red"))) == ["red"]


@report("langgenius/dify#11827", "NaN features were cached, so that every later request failed too.")
def test_text_features_that_are_no_numbers_are_not_cached(make_client):
    class Flawed(FakeEncoder):
        broken = False

        def encode_texts(self, texts):
            rows = super().encode_texts(texts)
            return rows * np.nan if self.broken else rows

    encoder = Flawed()
    client = make_client([encoder])
    encoder.broken = True
    problem_of(classify(client, picture("red"), labels=["red", "a blue sky"]), "internal-error")
    encoder.broken = False
    assert best_of(classify(client, picture("red"), labels=["red", "a blue sky"])) == ["red"]


# --- labels and scores -----------------------------------------------------------------------------------------------


@report("huggingface/transformers#24008", "One candidate label ended in `float is not iterable`.")
def test_one_candidate_label_is_answered(shared_client):
    reply = ask_hugging_face(shared_client, picture("red"), candidate_labels=["astronaut"])
    assert reply.json() == [{"label": "astronaut", "score": 1.0}]


@report("mlfoundations/open_clip#193", "With one label, every image had probability 1, and nothing said why.")
def test_a_single_label_comes_with_a_warning(shared_client):
    (result,) = results_of(classify(shared_client, picture("blue"), labels=["dog"]))
    assert any("only one label" in warning for warning in result["warnings"])


@report("huggingface/huggingface_hub#118", "A widget had to say itself that at least one label is needed.")
@pytest.mark.parametrize("labels", [[], [""], ["red", " "]])
def test_missing_labels_are_refused_with_their_field(shared_client, labels):
    fields = fields_of(classify_json(shared_client, "eA==", labels=labels))
    assert {field.partition(".")[0] for field in fields} == {"labels"}
    fields = fields_of(ask_hugging_face(shared_client, picture("red"), candidate_labels=labels))
    assert {field.rstrip(".0123456789") for field in fields} == {"parameters.candidate_labels"}


@report("huggingface/transformers#12119", "The image task looks like the text task, but has no `multi_label`.")
def test_multi_label_is_refused_and_not_ignored(shared_client):
    refused = ask_hugging_face(shared_client, picture("red"), candidate_labels=LABELS, multi_label=True)
    assert fields_of(refused) == {"parameters.multi_label"}
    assert "known: candidate_labels, hypothesis_template" in refused.json()["detail"]


@report("jina-ai/clip-as-service#798", "Three labels that all fit had a third each, below every threshold.")
def test_a_sigmoid_model_scores_labels_independently(make_client):
    client = make_client([FakeEncoder(logit_bias=-5.0)])
    scores = {
        each["label"]: each["score"]
        for each in results_of(classify(client, picture("red"), labels=["red", "a red thing", "blue"]))[0][
            "predictions"
        ]
    }
    assert scores["red"] > 0.9
    assert scores["a red thing"] > 0.9
    assert scores["blue"] < 0.1


@report("keras-team/keras-cv#2387", "All labels had the same probability for every image, without any notice.")
def test_labels_that_the_model_cannot_tell_apart_are_named(shared_client):
    (result,) = results_of(classify(shared_client, picture("red"), labels=["red one", "red two", "blue"]))
    assert any("'red one', 'red two'" in warning for warning in result["warnings"])


@report("roboflow/inference#465", "The answer was a list of similarities without the texts they belong to.")
def test_predictions_have_their_labels_and_are_sorted(shared_client):
    (result,) = results_of(classify(shared_client, picture("#ff8000"), labels=LABELS))
    assert [each["label"] for each in result["predictions"]] == ["red", "green", "blue"]
    scores = [each["score"] for each in result["predictions"]]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1)


@report("openai/CLIP#44", "Pictures of something else were put into the class that fits least badly.")
def test_an_image_of_something_else_can_be_rejected(shared_client):
    results = results_of(classify(shared_client, picture("red"), picture("gray"), reject_below=0.6))
    assert [each["rejected"] for each in results] == [False, True]


@report("huggingface/transformers#21897", "The same label texts were encoded again for each image.")
def test_label_texts_are_encoded_once(client, encoder):
    for colour in ("red", "green", "blue"):
        results_of(classify(client, picture(colour), labels=["a red cup", "a green cup"]))
    assert len(encoder.encoded_texts) == len(set(encoder.encoded_texts))
    assert sum("a red cup" in text for text in encoder.encoded_texts) == 1


@report("mlfoundations/open_clip#142", "A thousand labels took a minute for each image, however little had changed.")
def test_a_new_label_among_known_ones_is_encoded_alone(client, encoder):
    labels = [f"thing {number}" for number in range(300)]
    results_of(classify(client, picture("red"), labels=labels))
    encoder.encoded_texts.clear()
    results_of(classify(client, picture("red"), labels=[*labels, "a red cup"]))
    assert len(encoder.encoded_texts) == 1


@report("huggingface/transformers#33127", "A user did not see that labels are put into a template.")
def test_the_prompts_of_a_label_can_be_seen(shared_client):
    (result,) = results_of(
        classify(
            shared_client, picture("red"), labels=["red cup", "blue"], template="a drawing of a {}", explain="true"
        )
    )
    assert "a drawing of a red cup" in json.dumps(result["explanation"])


@report("monatis/clip.cpp#25", "A user had no list of candidates, and the advice was to copy one from somewhere.")
def test_without_labels_the_answer_says_how_to_have_them_found(shared_client):
    detail = problem_of(shared_client.post("/v1/classify", files={"image": picture()}), "not-configured")["detail"]
    assert "captions" in detail
    assert "or give labels" in detail


@report("LAION-AI/CLIP_benchmark#22", "Labels in scripts other than Latin had by far the worst results.")
@pytest.mark.parametrize("label", ["قطة red", "rött tåg, red", "赤い red 車", "🟥 red"])
def test_labels_in_any_script_come_back_as_they_were_sent(shared_client, label):
    assert best_of(classify_json(shared_client, encoded(picture("red")), labels=[label, "blue"])) == [label]


# --- forms -----------------------------------------------------------------------------------------------------------


@report(
    "psf/requests#3446", "A file whose name is not ASCII was sent with `filename*` only, and the server saw no file."
)
def test_a_part_with_only_an_extended_file_name_is_an_image(shared_client):
    disposition = "form-data; name=\"image\"; filename*=utf-8''%D0%A1%D0%BD%D0%B8%D0%BC%D0%BE%D0%BA.png"
    body = b"".join(
        [
            f"--b\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + picture("blue"),
            b'\r\n--b\r\nContent-Disposition: form-data; name="labels"\r\n\r\nred,blue\r\n--b--\r\n',
        ]
    )
    form = {"content-type": "multipart/form-data; boundary=b"}
    assert best_of(shared_client.post("/v1/classify", content=body, headers=form)) == ["blue"]


@report("fastapi/fastapi#11104", "After an upgrade, files with Chinese names could not be uploaded.")
def test_a_file_with_a_chinese_name_is_classified(shared_client):
    assert best_of(classify(shared_client, ("照片.png", picture("green"), "image/png"))) == ["green"]


@report("michaelfeil/infinity#258", "Local images could not be sent, because the route took public addresses only.")
def test_files_are_uploaded_and_addresses_are_refused_with_the_setting(shared_client):
    assert best_of(classify(shared_client, picture("red"))) == ["red"]
    refused = shared_client.post("/v1/classify", json={"images": [{"url": "http://a.example/b.png"}], "labels": LABELS})
    assert "DEIXIS_ALLOW_IMAGE_URLS" in problem_of(refused, "invalid-field")["detail"]


@report(
    "openapi-generators/openapi-python-client#453",
    "A route with a form and a JSON body lost one of them in the client.",
)
def test_the_description_has_each_body_of_a_route_with_several():
    bodies = _bodies()
    assert set(bodies["classify"]) >= {"multipart/form-data", "application/json"}


@report(
    "openapi-generators/openapi-python-client#1276",
    "Two content types with one schema gave a client that sends the wrong one.",
)
def test_no_two_content_types_of_a_route_share_a_schema():
    for operation, content in _bodies().items():
        names = [media["schema"]["$ref"] for media in content.values() if "$ref" in media["schema"]]
        titles = [media["schema"]["title"] for media in content.values() if "title" in media["schema"]]
        assert len(set(names)) == len(names), operation
        assert len(set(titles)) == len(titles), operation


def _bodies():
    document = json.loads((ROOT / "docs" / "openapi.json").read_text("utf-8"))
    return {
        operation["operationId"]: operation["requestBody"]["content"]
        for path in document["paths"].values()
        for operation in path.values()
        if "requestBody" in operation
    }
