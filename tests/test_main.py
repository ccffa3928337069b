"""What `create_app` starts and leaves behind."""

import gc
import subprocess
import sys
import weakref

from fastapi.testclient import TestClient

from app import main
from app.main import RemoteSteps, create_app


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


def test_models_are_tuned_in_the_background_only_if_this_process_encodes_and_measures(settings, encoder, monkeypatch):
    tuned = []

    async def tune_when_idle(models, measure):
        tuned.append((models.names, measure.keywords["options"].tuning_seconds))

    monkeypatch.setattr(main, "tune_when_idle", tune_when_idle)
    for seconds, steps in ((0, None), (7, RemoteSteps()), (7, None)):
        app = create_app(settings.model_copy(update={"tuning_seconds": seconds}), lambda _: [encoder], steps)
        with TestClient(app, "http://localhost") as client:
            assert client.get("/healthz").status_code == 200
    assert tuned == [((encoder.name,), 7)]
