"""Requests of the users in these tests, and what they look at in the answers."""

import base64
import json
from io import BytesIO

from PIL import Image

LABELS = ["red", "green", "blue"]


def saved(image: Image.Image, file_format="PNG", **options) -> bytes:
    """Return an image as the bytes of a file."""
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def encoded(image: bytes) -> str:
    """Return the bytes of a file in base64."""
    return base64.b64encode(image).decode()


def classify(client, *images, labels=LABELS, **fields):
    """Upload files."""
    return client.post(
        "/v1/classify", files=[("image", image) for image in images], data={"labels": json.dumps(labels), **fields}
    )


def classify_json(client, *images, labels=LABELS, **fields):
    """Send images in base64."""
    return client.post(
        "/v1/classify", json={"images": [{"base64": image} for image in images], "labels": labels, **fields}
    )


def embed(client, given, **fields):
    """Ask for features in OpenAI's form."""
    return client.post("/v1/embeddings", json={"input": given, **fields})


def results_of(response):
    """Return the results of a successful classification."""
    assert response.status_code == 200, response.text
    return response.json()["results"]


def best_of(response):
    """Return the best label of each image, or None for an image with an error."""
    return [each["predictions"][0]["label"] if each["error"] is None else None for each in results_of(response)]
