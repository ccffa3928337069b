"""What `create_app` leaves behind."""

import gc
import subprocess
import sys
import weakref

from fastapi.testclient import TestClient

from app.main import create_app


def test_a_start_imports_only_what_every_service_needs():
    unneeded = {
        "alembic",
        "scipy",
        "torch",
        "faiss",
        "inflect",
        "huggingface_hub",
        "pyarrow",
        "sklearn",
        "transformers",
    }
    program = f"import sys, app.cli.serving; print(*{unneeded | {'sqlalchemy.dialects.postgresql'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_an_application_that_is_closed_and_unused_is_freed(settings, encoder):
    app = create_app(settings, lambda _: [encoder])
    with TestClient(app, "http://localhost") as client:
        assert client.get("/openapi.json").status_code == 200
    freed = weakref.ref(app)
    del app, client
    gc.collect()
    assert freed() is None
