"""Towers of OpenVINO equal those of torch, and their conversion sends no telemetry."""

import os
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import structlog
import torch
from PIL import Image

from app.encoders import conversion
from app.encoders._base import LoadOptions
from app.encoders.embedded_torch import load_embedded_with_torch
from app.encoders.loading import load_encoder
from app.encoders.tuning import probe_images
from tests.encoders.test_open_clip import images, write_model

OPENVINO = {"device": "cpu", "backend": "openvino", "precision": "fp32"}


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def encoder(spec):
    return load_encoder(spec, LoadOptions(**OPENVINO))


def test_features_equal_those_of_torch(spec, encoder):
    reference = load_encoder(spec, LoadOptions(device="cpu", backend="torch", precision="fp32"))
    pixels = [encoder.transform(image) for image in images()]
    rows, wanted = encoder.encode_images(pixels), reference.encode_images(pixels)
    assert (rows.dtype, rows.shape) == (np.float32, wanted.shape)
    assert (rows * wanted).sum(axis=1).min() > 0.99999
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_texts(["a cat"]), reference.encode_texts(["a cat"]), atol=1e-6)
    assert (encoder.image_path.backend, encoder.embed_dim) == ("openvino", reference.embed_dim)


def test_the_converted_embedded_model_equals_that_of_torch():
    ours = load_embedded_with_torch(LoadOptions(**OPENVINO))
    reference = load_embedded_with_torch(LoadOptions(device="cpu", backend="torch"))
    pixels = [*probe_images(224), ours.transform(Image.new("RGB", (300, 200), "teal"))]
    assert (ours.encode_images(pixels) * reference.encode_images(pixels)).sum(axis=1).min() > 0.99999


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_batch_of_any_size_returns_the_rows_of_its_images(encoder, size):
    pixels = [encoder.transform(image) for image in images()] * 2
    alone = np.concatenate([encoder.encode_images([one]) for one in pixels[:size]])
    np.testing.assert_allclose(encoder.encode_images(pixels[:size]), alone, atol=1e-5)


def test_a_second_batch_may_start_before_the_first_has_finished(encoder):
    pixels = [encoder.transform(image) for image in images()]
    wanted = encoder.encode_images(pixels)
    for _ in range(5):
        first, second = encoder.begin_images(pixels[:4]), encoder.begin_images(pixels[4:])
        np.testing.assert_allclose(np.concatenate([first(), second()]), wanted, atol=1e-5)


def test_many_batches_may_run_and_finish_in_any_order(encoder):
    """After a batch failed, its halves run while another batch has begun, and a batch may never be waited for."""
    pixels = [encoder.transform(image) for image in images()]
    wanted = encoder.encode_images(pixels)
    encoder.begin_images(pixels[:2])
    waiting = [encoder.begin_images([one]) for one in pixels]
    for number in (3, 0, 5, 1, 4, 2):
        np.testing.assert_allclose(waiting[number](), wanted[[number]], atol=1e-5)


def test_the_next_batch_does_not_change_earlier_rows(encoder):
    pixels = [encoder.transform(image) for image in images()]
    first = encoder.encode_images(pixels[:1])
    kept = first.copy()
    for _ in range(3):
        encoder.encode_images(pixels[1:2])
    np.testing.assert_array_equal(first, kept)


def test_the_unused_torch_weights_are_released(encoder):
    assert not list(encoder._model.visual.parameters())
    assert encoder.image_size_px == 32


def test_the_fingerprint_of_an_image_tower_depends_on_its_weights(encoder, spec, tmp_path):
    other = load_encoder(write_model(tmp_path / "other", seed=1), LoadOptions(**OPENVINO))
    assert encoder.image_fingerprint() != other.image_fingerprint()
    by_torch = load_encoder(spec, LoadOptions(device="cpu", backend="torch"))
    assert encoder.image_fingerprint() == by_torch.image_fingerprint()


def test_a_model_of_another_class_is_run_by_torch(spec, monkeypatch):
    class Another(open_clip.CLIP):
        """Like CoCa, whose tower returns more than features."""

    create = open_clip.create_model

    def created(*arguments, **options):
        model = create(*arguments, **options)
        model.__class__ = Another
        return model

    monkeypatch.setattr(open_clip, "create_model", created)
    assert load_encoder(spec, LoadOptions(device="cpu", precision="fp32")).image_path.backend == "torch"


# --- conversion ------------------------------------------------------------------------------------------------------


def test_a_tower_that_cannot_be_converted_is_run_by_torch(spec, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(conversion, "_convert", fails)
    encoder = load_encoder(spec, LoadOptions(device="cpu", precision="fp32"))
    assert encoder.image_path.backend == "torch"
    assert np.isfinite(encoder.encode_images([encoder.transform(images()[0])])).all()


# --- telemetry -----------------------------------------------------------------------------------------------------


def test_the_conversion_sends_no_telemetry(tmp_path):
    """In a new interpreter, in which every use of the network fails the test."""
    program = """
import socket, sys
def tripped(*_): raise SystemExit("a connection was tried")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = tripped
from app.encoders._base import LoadOptions
from app.encoders.embedded_torch import load_embedded_with_torch
encoder = load_embedded_with_torch(LoadOptions(device="cpu", backend="openvino", precision="fp32"))
assert encoder.image_path.backend == "openvino"
from openvino.tools.ovc import telemetry_utils
assert telemetry_utils.tm.__name__.endswith("telemetry_stub"), telemetry_utils.tm
assert sys.modules["openvino_telemetry"] is None
"""
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr
    assert not list(home.rglob("*openvino*")), "it left an identifier"


def test_torch_compiles_the_image_tower_for_any_number_of_images_before_the_first_request(spec, monkeypatch):
    varying = []

    def compile_(function, **options):
        def run(images):
            varying.append((len(images), getattr(images, "_dynamo_weak_dynamic_indices", set())))
            return function(images)

        assert not options
        return run

    monkeypatch.setattr(torch, "compile", compile_)
    with structlog.testing.capture_logs() as logs:
        load_encoder(spec, LoadOptions(device="cpu", backend="torch", precision="fp32", torch_compile=True))
    assert varying[:3] == [(1, set()), (2, {0}), (4, {0})]
    assert [event["event"] for event in logs].count("compiling") == 1
