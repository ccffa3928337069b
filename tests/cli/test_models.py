"""`deixis models` with names that OpenCLIP does not know."""

import pytest

from tests.cli.output import assert_refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("download", "ViT-B-32/nothing"), "open_clip has no weights 'nothing'"),
        (("tune", "no-such/model"), "open_clip has no architecture"),
    ],
)
def test_an_unknown_model_is_refused(run, monkeypatch, arguments, message):
    monkeypatch.setattr("app.cli.model_loading.configure_logs", lambda *_: None)
    assert_refused(run("models", *arguments), message)
