"""Images of a request that are given by their URLs."""

import base64

import pytest

from app.errors import UnreachableImageError
from tests.api.problems import fields_of, problem_of
from tests.captions_made import made
from tests.conftest import picture

URL = "https://images.example.com/red.png"


class Fetcher:
    """Has pictures by their URLs, in the place of a network."""

    def __init__(self, **pictures):
        self.pictures = pictures
        self.asked = []

    def close(self):
        pass

    async def fetch(self, image, allowance):
        self.asked.append(image.url)
        name = image.url.rsplit("/", 1)[-1].removesuffix(".png")
        return self.pictures.get(name) or UnreachableImageError(f"no {name} there; send the file itself")


@pytest.fixture
def fetching(make_client):
    client = make_client(allow_image_urls=True)
    client.fetcher = client.app.state.service.pipeline._remote_images._fetcher = Fetcher(
        red=picture("red"), blue=picture("blue")
    )
    return client


def answer(response):
    assert response.status_code == 200, response.text
    return response.json()


def classify(client, *images, labels=("red", "blue")):
    return client.post("/v1/classify", json={"images": list(images), "labels": list(labels), "top_k": 1})


def by_base64(colour):
    return {"base64": base64.b64encode(picture(colour)).decode()}


def test_the_list_of_models_says_whether_urls_are_accepted_and_how_large_requests_may_be(client, fetching):
    closed, accepting = (each.get("/v1/models").json()["images"] for each in (client, fetching))
    assert (closed["urls"], accepting["urls"]) == (False, True)
    limits = {"image": ("a.png", b"x" * (closed["max_bytes"] + 1))}
    assert client.post("/v1/classify", files=limits, data={"labels": "a,b"}).status_code == 413
    many = [("image", ("a.png", picture()))] * (closed["max_per_request"] + 1)
    assert client.post("/v1/classify", files=many, data={"labels": "a,b"}).status_code == 413


def test_nothing_is_fetched_unless_the_operator_lets_it(client):
    refused = classify(client, {"url": URL})
    assert fields_of(refused) == {"url"}
    assert "set DEIXIS_ALLOW_IMAGE_URLS" in refused.json()["detail"]
    good, bad = answer(classify(client, by_base64("red"), {"url": URL}))["results"]
    assert good["predictions"][0]["label"] == "red"
    assert bad["error"]["type"] == "urn:deixis:problem:invalid-field"


def test_images_of_urls_stand_in_their_places_among_others(fetching):
    images = [
        {"url": URL},
        by_base64("blue"),
        {"url": URL.replace("red", "green")},
        {"url": URL.replace("red", "blue")},
    ]
    results = answer(classify(fetching, *images))["results"]
    labels = [each["predictions"][0]["label"] if each["predictions"] else None for each in results]
    assert labels == ["red", "blue", None, "blue"]
    assert results[2]["error"]["type"] == "urn:deixis:problem:image-not-fetched"
    assert len(fetching.fetcher.asked) == 3


def test_what_cannot_be_fetched_alone_is_an_answer_of_its_own(fetching):
    members = problem_of(classify(fetching, {"url": URL.replace("red", "green")}), "image-not-fetched")
    assert members["status"] == 422


def test_local_addresses_are_not_requested(make_client):
    client = make_client(allow_image_urls=True)
    for host in ("127.0.0.1", "localhost", "[::1]", "169.254.169.254", "2130706433"):
        assert fields_of(classify(client, {"url": f"http://{host}/"})) == {"url"}


@pytest.mark.parametrize("image", [{}, {"url": URL, "base64": "YQ=="}, {"url": 3}, {"url": "https://a/" + "b" * 3000}])
def test_an_image_is_given_in_one_way(fetching, image):
    assert all(field.startswith("images.0") for field in fields_of(classify(fetching, image)))
    assert fetching.fetcher.asked == []


def test_captions_are_searched_by_an_image_of_a_url(fetching, settings):
    made(settings.effective_captions_dir / "things")
    asked = {"image": {"url": URL}, "limit": 1}
    (found,) = answer(fetching.post("/v1/databases/things/search", json=asked))["results"]
    assert "red" in found["caption"]
    asked["image"]["url"] = URL.replace("red", "green")
    problem_of(fetching.post("/v1/databases/things/search", json=asked), "image-not-fetched")
