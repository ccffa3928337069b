"""Fixtures of other folders that the users of these tests need: commands, a hub of models, and Label Studio."""

from tests.cli.conftest import new_encoder, run  # noqa: F401
from tests.encoders.test_hub import download, folder, hub, load  # noqa: F401
from tests.integrations.test_label_studio import service_url, start, studio  # noqa: F401
