"""The clients of OpenAI's and Hugging Face's APIs, against the service behind a real socket."""

import asyncio
import base64
from io import BytesIO

import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from app.api.auth.keys import create_key
from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.names.namespaces import Namespace
from app.store.database import open_engine
from app.store.keys import Key, KeyRepository
from app.types import Scope
from tests.api.live import live
from tests.api.problems import problem_of
from tests.conftest import picture

SERVED = "ViT-B-32-quickgelu/openai"  # openai/clip-vit-base-patch32 on the hub


@pytest.fixture
def root(settings):
    """The address of a service with two models."""
    encoders = [FakeEncoder(), FakeEncoder(SERVED)]
    with live(create_app(settings, lambda _: encoders)) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture
def openai():
    return pytest.importorskip("openai")


@pytest.fixture
def openai_client(openai, root):
    with openai.OpenAI(base_url=f"{root}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def key(settings):
    async def make():
        engine = open_engine(settings.effective_database_url)
        try:
            return (await create_key(KeyRepository(engine), Key("one", Scope.CLASSIFY, Namespace(""))))[0]
        finally:
            await engine.dispose()

    return asyncio.run(make())


def test_openai_lists_the_models(openai_client):
    assert [(model.id, model.object) for model in openai_client.models.list()] == [
        ("fake", "model"),
        (SERVED, "model"),
    ]


def test_openai_embeds_texts_and_images(openai_client):
    texts = openai_client.embeddings.create(model="fake", input=["red", "blue"])
    data_url = f"data:image/png;base64,{base64.b64encode(picture('red')).decode()}"
    image = openai_client.embeddings.create(
        model="openai/clip-vit-base-patch32", input=data_url, extra_body={"modality": "image"}
    )
    cosines = [np.dot(image.data[0].embedding, text.embedding) for text in texts.data]
    assert cosines[0] > cosines[1]
    assert image.model == SERVED


def test_openai_shows_the_message_of_an_error(openai, openai_client, root):
    with pytest.raises(openai.UnprocessableEntityError, match=r"check_embedding_ctx_length=False") as refused:
        openai_client.embeddings.create(model="fake", input=[[57668, 53901]])
    assert (refused.value.type, refused.value.code, refused.value.param) == (
        "invalid_request_error",
        "invalid-field",
        "input",
    )
    with pytest.raises(openai.NotFoundError, match="unknown model 'ada'; known: ViT-B-32"):
        openai_client.embeddings.create(model="ada", input="red")
    with (
        openai.OpenAI(base_url=root, api_key="none", max_retries=0) as misled,
        pytest.raises(openai.NotFoundError, match="unknown route /embeddings"),
    ):
        misled.embeddings.create(model="fake", input="red")


def test_openai_shows_that_a_key_is_missing(openai, root, key):
    with (
        openai.OpenAI(base_url=f"{root}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="key"),
    ):
        client.models.list()
    with openai.OpenAI(base_url=f"{root}/v1", api_key=key) as client:
        assert client.models.list().data[0].id == "fake"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/models/fake",
        "/models/openai/clip-vit-base-patch32",
        "/models/fake/pipeline/zero-shot-image-classification",
        "/v1/zero-shot-image-classification",
    ],
)
def test_hugging_face_classifies_an_image(root, path):
    client = InferenceClient(base_url=f"{root}{path}", token="none")
    answer = client.zero_shot_image_classification(picture("red"), ["blue", "red"])
    assert [each.label for each in answer] == ["red", "blue"]
    assert sum(each.score for each in answer) == pytest.approx(1)


@pytest.mark.parametrize(
    "path", ["", "/models/openai/clip-vit-base-patch32", "/models/fake/pipeline/feature-extraction"]
)
def test_hugging_face_embeds_texts(root, path):
    client = InferenceClient(base_url=f"{root}{path}", token="none")
    rows = client.feature_extraction(["red", "blue"], normalize=True, truncate=True, truncation_direction="right")
    np.testing.assert_allclose(rows, FakeEncoder().encode_texts(["red", "blue"]), atol=1e-6)
    assert client.feature_extraction("red").shape == (1, rows.shape[1])


def test_hugging_face_shows_the_message_of_an_error(root):
    with pytest.raises(HfHubHTTPError, match="unknown model 'nope/nope'; known: ViT-B-32"):
        InferenceClient(base_url=f"{root}/models/nope/nope").zero_shot_image_classification(picture("red"), ["a", "b"])
    with pytest.raises(HfHubHTTPError, match="unknown task 'fill-mask'; known: zero-shot-image-classification"):
        InferenceClient(base_url=f"{root}/models/fake/pipeline/fill-mask").feature_extraction("red")
    with pytest.raises(HfHubHTTPError, match="task 'feature-extraction' of the path has no labels"):
        InferenceClient(base_url=f"{root}/models/fake/pipeline/feature-extraction").zero_shot_image_classification(
            picture("red"), ["a", "b"]
        )
    with pytest.raises(HfHubHTTPError, match="task 'zero-shot-image-classification' of the path needs candidate_label"):
        InferenceClient(base_url=f"{root}/models/fake/pipeline/zero-shot-image-classification").feature_extraction("a")
    client = InferenceClient(base_url=root)
    with pytest.raises(HfHubHTTPError, match="the data looks like text; accepted formats: JPEG"):
        client.zero_shot_image_classification(b"no picture", ["a", "b"])
    with pytest.raises(HfHubHTTPError, match=r"normalize: .*True"):
        client.feature_extraction("red", normalize=False)
    with pytest.raises(HfHubHTTPError, match=r"dimensions: 'fake' has 16 dimensions, not 3"):
        client.feature_extraction("red", dimensions=3)
    with pytest.raises(HfHubHTTPError, match=r"inputs\.1: "):
        client.feature_extraction(["red", "x" * 10_001])


@pytest.mark.parametrize("path", ["/v1/label-sets/embeddings", "/v1/databases/embeddings", "/v1/jobs/v1/models"])
def test_an_error_of_the_own_api_has_no_member_of_others(shared_client, path):
    assert "error" not in problem_of(shared_client.get(path))


@pytest.mark.parametrize("path", ["/embeddings", "/v1/models/none"])
def test_an_error_on_a_path_of_openai_has_its_member(shared_client, path):
    problem = problem_of(shared_client.get(path), "unknown-route")
    assert problem["error"]["message"] == problem["detail"]


@pytest.mark.parametrize(
    ("method", "path", "sent"),
    [
        ("POST", "/v1/classify", {"json": {"images": [], "labels": ["a"]}}),
        ("POST", "/v1/embeddings", {"json": {"input": "red"}}),
        ("POST", "/v1/label-sets/pets:evaluate", {"json": {}}),
        ("POST", "/v1/label-sets/pets:evaluate", {"data": {"class": "cat"}}),
        ("GET", "/v1/label-sets/pets/selection", {"params": {}}),
        ("PUT", "/v1/databases/things", {"json": {"captions": ["a cat"]}}),
    ],
)
def test_a_hub_id_is_understood_wherever_a_request_names_a_model(shared_client, method, path, sent):
    shared_client.put("/v1/label-sets/pets", json={"classes": ["cat", "dog"]})
    ((kind, fields),) = sent.items()
    fields = fields | {"model": "openai/clip-vit-base-patch32"}
    if "images" in fields:
        fields["images"] = [{"base64": base64.b64encode(picture("red")).decode()}]
    files = {"image": picture("red")} if kind == "data" else None
    answer = shared_client.request(method, path, files=files, **{kind: fields})
    assert f"unknown model '{SERVED}'" in problem_of(answer, "unknown-name")["detail"]


@pytest.mark.parametrize("path", ["", "/models/fake"])
def test_a_large_image_of_hugging_face_is_read(root, path):
    noise = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, "png", compress_level=0)
    assert len(file.getvalue()) > 16 * 1024**2
    answer = InferenceClient(base_url=root + path).zero_shot_image_classification(file.getvalue(), ["blue", "red"])
    assert len(answer) == 2
