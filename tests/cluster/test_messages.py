"""Messages survive serialization."""

import pickle

import numpy as np
import pytest
from PIL import Image

from app.cluster.messages import RemoteEncoderError, RemoteModelInfo, SerializedError
from app.encoders.fake import FakeEncoder
from app.errors import DeadlineExceededError, NotReadyError, OverloadedError


def test_model_info_has_the_properties_and_the_transform_of_the_encoder():
    encoder = FakeEncoder("colours", logit_bias=-3.0)
    info = pickle.loads(pickle.dumps(RemoteModelInfo.of(encoder)))
    for name in ("name", "embed_dim", "image_size_px", "logit_scale", "logit_bias", "image_path", "tuning"):
        assert getattr(info, name) == getattr(encoder, name), name
    assert info.image_fingerprint == encoder.image_fingerprint()
    picture = Image.new("RGB", (20, 30), "teal")
    np.testing.assert_array_equal(info.transform(picture), encoder.transform(picture))


@pytest.mark.parametrize(
    "error",
    [OverloadedError("the queue is full", 9), DeadlineExceededError("too late"), NotReadyError("it hangs")],
)
def test_errors_of_the_service_keep_their_type_and_message(error):
    received = pickle.loads(pickle.dumps(SerializedError.from_exception(error))).to_exception()
    assert type(received) is type(error)
    assert received.message == error.message
    assert getattr(received, "retry_after_s", None) == getattr(error, "retry_after_s", None)


def test_other_errors_become_encoder_errors_with_their_message():
    received = SerializedError.from_exception(ZeroDivisionError("by zero")).to_exception()
    assert isinstance(received, RemoteEncoderError)
    assert str(received) == "ZeroDivisionError: by zero"
