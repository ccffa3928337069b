"""What survives the way from process to process."""

import pickle

import numpy as np
import pytest
from PIL import Image

from app.cluster.messages import RemoteEncoderError, RemoteModelInfo, SerializedError
from app.encoders.fake import FakeEncoder
from app.errors import DeadlineExceededError, NotReadyError, OverloadedError


def test_a_card_tells_what_the_encoder_is_and_transforms_as_it_does():
    encoder = FakeEncoder("colours", logit_bias=-3.0)
    card = pickle.loads(pickle.dumps(RemoteModelInfo.of(encoder)))
    for name in ("name", "embed_dim", "image_size_px", "logit_scale", "logit_bias", "image_path", "tuning"):
        assert getattr(card, name) == getattr(encoder, name), name
    assert card.image_fingerprint == encoder.image_fingerprint()
    picture = Image.new("RGB", (20, 30), "teal")
    np.testing.assert_array_equal(card.transform(picture), encoder.transform(picture))


@pytest.mark.parametrize(
    "error",
    [OverloadedError("the queue is full", 9), DeadlineExceededError("too late"), NotReadyError("it hangs")],
)
def test_errors_of_ours_arrive_as_they_left(error):
    told = pickle.loads(pickle.dumps(SerializedError.from_exception(error))).to_exception()
    assert type(told) is type(error)
    assert told.message == error.message
    assert getattr(told, "retry_after_s", None) == getattr(error, "retry_after_s", None)


def test_other_errors_arrive_as_the_encoders_with_their_words():
    told = SerializedError.from_exception(ZeroDivisionError("by zero")).to_exception()
    assert isinstance(told, RemoteEncoderError)
    assert str(told) == "ZeroDivisionError: by zero"
