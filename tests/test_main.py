"""What `create_app` leaves behind."""

import gc
import weakref

from fastapi.testclient import TestClient

from app.main import create_app


def test_an_application_that_is_closed_and_unused_is_freed(settings, encoder):
    app = create_app(settings, lambda _: [encoder])
    with TestClient(app, "http://localhost") as client:
        assert client.get("/openapi.json").status_code == 200
    freed = weakref.ref(app)
    del app, client
    gc.collect()
    assert freed() is None
