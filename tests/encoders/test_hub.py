"""Loading models from a hub that fails in each way, and from a cache that is damaged."""

import errno
import io
import json
import logging
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import structlog
from typer.testing import CliRunner

from app.cli import cli
from app.encoders import hub as hub_module
from app.encoders._base import LoadOptions
from app.encoders.loading import load_encoder
from app.errors import ModelUnavailableError
from app.main import load_encoders
from app.observability.logs import configure_logs
from app.settings import load_settings
from tests.cli.output import assert_refused
from tests.encoders.hub_server import running_hub
from tests.encoders.test_open_clip import weights_of, write_model

SPEC = "hf-hub:some/model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "tiny"
    write_model(place)
    return place


def use_hub(monkeypatch, url):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch, folder):
    with running_hub() as running:
        use_hub(monkeypatch, running.url)
        running.add("some/model", folder)
        # The hub library waits a second before each attempt to resume a download.
        monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
        yield running


@pytest.fixture
def load(tmp_path):
    """A function that loads a model from the hub with a cache of its own."""

    def from_hub(spec=SPEC, **options):
        places = {"weights_dir": tmp_path / "cache", "data_dir": tmp_path / "data"} | options
        return load_encoder(spec, LoadOptions(device="cpu", precision="fp32", backend="torch", **places))

    return from_hub


@pytest.fixture
def download(monkeypatch, tmp_path):
    """A function that runs ``deixis models download``."""
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("DEIXIS_MODEL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("app.cli.model_loading.configure_logs", lambda *_: None)
    # Other tests configure logs, which would be on standard error beside the message.
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])

    def run(spec=SPEC):
        with structlog.testing.capture_logs():
            return CliRunner().invoke(cli, ["models", "download", spec])

    return run


def blob_of(tmp_path):
    (weights,) = (tmp_path / "cache").glob("models--some--model/snapshots/*/open_clip_model.safetensors")
    return weights.resolve()


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_model_of_the_hub_equals_the_same_model_in_a_folder(hub, load, folder):
    local, remote = load(f"local-dir:{folder}"), load()
    texts = ["a cat", "a dog"]
    np.testing.assert_array_equal(remote.encode_texts(texts), local.encode_texts(texts))
    assert remote.text_fingerprint() == local.text_fingerprint()
    assert remote.image_fingerprint() == local.image_fingerprint()


def test_a_cached_model_loads_without_a_network(hub, load, monkeypatch):
    load()
    use_hub(monkeypatch, "http://127.0.0.1:1")
    with structlog.testing.capture_logs() as logs:
        load()
    assert [entry["event"] for entry in logs].count("cached_model_used") == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load()


FAULTS = {
    "no such repository": ({"status": 404, "error_code": "RepoNotFound"}, "has no repository some/model, or it is pri"),
    "not logged in": ({"status": 401, "error_code": None}, "HF_TOKEN"),
    "gated": ({"status": 403, "error_code": "GatedRepo"}, "is gated: request access at {hub}/some/model, and set HF_"),
    "forbidden": ({"status": 403, "error_code": None}, "refused access to some/model (403): set HF_TOKEN"),
    "broken": ({"status": 500, "error_code": None}, "answered 500 for open_clip_config.json of some/model"),
    "cut": ({"sent": 1000}, "the download of open_clip_model.safetensors of some/model from {hub} was cut off"),
    "wrong bytes": ({"corrupt": True}, "is damaged: its SHA-256 is"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_the_hub_has_an_error_in_one_line_with_its_way_out(hub, download, fault):
    attributes, message = FAULTS[fault]
    for name, value in attributes.items():
        setattr(hub, name, value)

    done = download()

    assert_refused(done, message.format(hub=hub.url))
    assert "models download" not in done.stderr  # the command that was run
    assert SPEC in done.stderr
    assert hub.requests.total() <= 12


@pytest.mark.parametrize("status", [401, 404, 403, 500])
def test_a_model_of_the_settings_reports_the_same_fault(hub, monkeypatch, tmp_path, status):
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("DEIXIS_MODEL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DEIXIS_MODELS", SPEC)
    hub.status = status
    with pytest.raises(ModelUnavailableError, match=str(status)):
        load_encoders(load_settings())


REPOSITORIES = {
    "without weights": (("open_clip_model.safetensors",), {}, "has no weights (open_clip_model.safetensors or"),
    "of transformers": (("open_clip_config.json",), {"config.json": {"model_type": "clip"}}, "layout of transformers"),
    "of something else": (("open_clip_config.json",), {}, "has no open_clip_config.json"),
}


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_a_repository_without_a_model_of_open_clip_is_named_as_such(hub, download, folder, kind):
    without, others, message = REPOSITORIES[kind]
    hub.add("some/model", folder, without=without)
    hub.repositories["some/model"] |= {name: json.dumps(content).encode() for name, content in others.items()}
    assert_refused(download(), message)


def test_a_folder_with_the_layout_of_transformers_is_named_as_such(load, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}', "utf-8")
    with pytest.raises(ModelUnavailableError, match=r"layout of transformers .* that of OpenCLIP"):
        load(f"local-dir:{tmp_path}")


def test_a_name_that_is_no_repository_is_rejected_without_a_request(hub, download):
    assert_refused(download("hf-hub:some/model/file"), "is not the name of a repository; write org/repo")
    assert not hub.requests


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid"])
def test_without_a_network_the_error_comes_at_once_in_one_line(download, monkeypatch, host):
    use_hub(monkeypatch, f"http://{host}")
    began = time.monotonic()
    assert_refused(download(), f"http://{host} cannot be reached (")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("sends", ["nothing", "a byte now and then"])
def test_a_server_that_never_answers_is_reported_after_the_timeout(download, monkeypatch, sends):
    monkeypatch.setattr(hub_module, "_ANSWER_TIMEOUT_S", 0.2)
    ended = threading.Event()

    def send_bytes():
        connection, _ = server.accept()
        with connection, suppress(OSError):
            while not ended.wait(0.05):
                connection.sendall(b"H")

    with socket.create_server(("127.0.0.1", 0)) as server:
        use_hub(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}")
        sending = threading.Thread(target=send_bytes, daemon=True)
        if sends != "nothing":
            sending.start()
        assert_refused(download(), "cannot be reached (no answer within 0.2 s): check the network")
        ended.set()
        if sends != "nothing":
            sending.join()


@pytest.mark.parametrize("spec", [SPEC, "ViT-B-32/laion2b_s34b_b79k", "openai/clip-vit-base-patch32"])
def test_with_an_empty_cache_and_no_network_pytorch_is_not_imported(download, monkeypatch, spec):
    monkeypatch.setitem(sys.modules, "app.encoders.open_clip", None)  # its import would raise an ImportError
    use_hub(monkeypatch, "http://127.0.0.1:1")
    assert_refused(download(spec), "is empty, and http://127.0.0.1:1 cannot be reached (")
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True)
    assert_refused(download(spec), "is empty, and HF_HUB_OFFLINE is set; unset it to download the file")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "is full: free space, or set DEIXIS_MODEL_CACHE_DIR"),
        (errno.EACCES, "cannot be written"),
        (errno.EROFS, "cannot be written"),
    ],
)
def test_a_disk_that_cannot_be_written_is_named(hub, download, monkeypatch, number, message):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    assert_refused(download(), message)


def test_a_cut_download_is_resumed(hub, load):
    hub.sent = 1000
    interrupted = []

    def later(_):
        interrupted.append(hub.sent)
        hub.sent = None

    huggingface_hub.file_download.time.sleep = later
    load()
    assert interrupted == [0]


def test_a_server_that_cuts_every_download_and_cannot_resume_ends_with_an_error(hub, download, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download._adjust_range_header", lambda *_: "bytes=0-")
    hub.sent = 300_000

    def send_again(_):
        hub.sent = 300_000

    huggingface_hub.file_download.time.sleep = send_again
    assert_refused(download(), "the server cannot resume it, and it was cut 6 times")


def test_the_progress_of_a_slow_download_is_logged(hub, load, monkeypatch):
    monkeypatch.setattr(hub_module, "_PROGRESS_EVERY_S", 0.01)
    with structlog.testing.capture_logs() as logs:

        def wait_for_report():
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                if any(entry["event"] == "model_downloading" and entry["mb"] > 0 for entry in list(logs)):
                    return
                time.sleep(0.01)

        hub.pause = wait_for_report
        load()
    assert logs[0]["event"] == "loading_model"
    slow = next(entry for entry in logs if entry["event"] == "model_downloading" and entry["mb"] > 0)
    assert slow["file"] == "open_clip_model.safetensors"
    assert 0 < slow["mb"] < slow["of_mb"]
    assert slow["mb_per_s"] > 0


def test_the_warnings_of_the_hub_library_have_one_handler(monkeypatch):
    library = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(library, "handlers", list(library.handlers))
    configure_logs("json", "warning")
    assert library.handlers == []
    assert library.propagate


# --- damaged caches ------------------------------------------------------------------------------------------------


def test_a_damaged_cached_file_of_the_right_length_is_refused_with_what_to_delete(hub, load, tmp_path):
    load()
    blob = blob_of(tmp_path)
    flip_a_byte(blob)
    with pytest.raises(ModelUnavailableError, match=rf"{blob} is damaged: .*; delete this file"):
        load()
    blob.unlink()
    load()


def test_a_checked_file_is_hashed_again_only_after_a_change(hub, load, tmp_path, monkeypatch):
    load()
    hashed = []

    def hash_file(file):
        hashed.append(file)
        return file.name

    monkeypatch.setattr(hub_module, "sha256", hash_file)
    load()
    assert hashed == []
    os.utime(blob_of(tmp_path))
    load()
    assert hashed == [blob_of(tmp_path)]
    (remembered,) = (tmp_path / "data" / "checked-weights").glob(f"{blob_of(tmp_path).name}")
    remembered.write_bytes(b"\xff")
    load()
    assert len(hashed) == 2


# --- models that are more than data --------------------------------------------------------------------------------

CODE = """
open({marker!r}, "w").close()
from transformers import BertConfig, BertModel, BertTokenizer
class T(BertTokenizer): pass
class C(BertConfig): model_type = "evil"
class M(BertModel): config_class = C
"""


def write_hostile(folder, marker, *, text, config=None, tokenizer_config=None):
    """Write a model whose Python code would create ``marker``."""
    write_model(folder)
    described = json.loads((folder / "open_clip_config.json").read_text("utf-8"))
    described["model_cfg"]["text_cfg"] |= text
    (folder / "open_clip_config.json").write_text(json.dumps(described), "utf-8")
    (folder / "code.py").write_text(CODE.format(marker=str(marker)), "utf-8")
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        if content is not None:
            (folder / name).write_text(json.dumps(content), "utf-8")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat\n", "utf-8")


AUTO_MAP = {
    "model_type": "evil",
    "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M", "AutoTokenizer": ["code.T", None]},
    "tokenizer_class": "T",
}
HOSTILE = {
    "trusted tokenizer": {
        "text": {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}},
        "tokenizer_config": AUTO_MAP,
    },
    "tokenizer that asks": {"text": {"hf_tokenizer_name": "x"}, "tokenizer_config": AUTO_MAP},
    "other tokenizer arguments": {
        "text": {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"tokenizer_file": "/etc/passwd"}}
    },
    "arguments that are no object": {
        "text": {"hf_tokenizer_name": "x", "tokenizer_kwargs": [["trust_remote_code", 1]]}
    },
    "text tower elsewhere": {"text": {"hf_model_name": "../other"}, "config": AUTO_MAP},
    "absolute text tower": {"text": {"hf_model_name": "/tmp/other"}, "config": AUTO_MAP},
    "absolute tokenizer": {"text": {"hf_tokenizer_name": "/tmp/other"}},
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("answer", ["y\n" * 5, ""])
def test_a_folder_cannot_run_its_code(load, tmp_path, monkeypatch, kind, answer):
    """Also if somebody answers the question of transformers with yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    write_hostile(tmp_path / "model", tmp_path / "marker", **HOSTILE[kind])
    with pytest.raises(ModelUnavailableError, match=rf"local-dir:{tmp_path}/model' is refused: "):
        load(f"local-dir:{tmp_path}/model")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", ["trusted tokenizer", "tokenizer that asks"])
def test_a_repository_cannot_run_its_code(hub, load, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    text = HOSTILE[kind]["text"] | {"hf_tokenizer_name": "some/model"}
    write_hostile(tmp_path / "model", tmp_path / "marker", **(HOSTILE[kind] | {"text": text}))
    hub.add("some/model", tmp_path / "model")
    with pytest.raises(ModelUnavailableError, match="is refused: "):
        load()
    assert not (tmp_path / "marker").exists()


def test_a_text_tower_of_transformers_with_code_of_its_own_is_refused(hub, load, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    write_hostile(tmp_path / "model", tmp_path / "marker", text={"hf_model_name": "some/model"}, config=AUTO_MAP)
    hub.add("some/model", tmp_path / "model")
    with pytest.raises(ModelUnavailableError, match="is refused: it needs Python code"):
        load()
    assert not (tmp_path / "marker").exists()


def test_an_image_tower_of_timm_is_an_architecture_and_no_repository(load, tmp_path):
    write_model(tmp_path)
    config = tmp_path / "open_clip_config.json"
    described = json.loads(config.read_text("utf-8"))
    described["model_cfg"]["vision_cfg"]["timm_model_name"] = "hf-hub:some/model"
    config.write_text(json.dumps(described), "utf-8")
    with pytest.raises(ModelUnavailableError, match="sets timm_model_name to 'hf-hub:some/model'"):
        load(f"local-dir:{tmp_path}")
    assert weights_of(tmp_path).exists()
