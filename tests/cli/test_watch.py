"""`deixis watch`: which files are classified and when, messages, and restarts."""

import asyncio
import json
from dataclasses import replace

import pytest

from app.classification.request import ClassifyRequest
from app.cli.watch import Watcher
from app.errors import InvalidFieldError, NotReadyError
from app.images.sidecars import JsonSidecar, XmpSidecar, sha256_of
from deixis import ImageResult, Prediction, ProblemError, UnreachableError
from deixis.answers import Problem
from tests.cli.output import assert_refused
from tests.conftest import picture
from tests.images.test_xmp import lists_of

anyio_test = pytest.mark.anyio


class Backend:
    """Labels every image as a cat, records the images, and first raises the given errors."""

    max_image_bytes = 10**6

    def __init__(self, *errors):
        self.images = []
        self.errors = list(errors)
        self.version = 1

    async def pin(self, request):
        label_set = request.label_set and f"{request.label_set}@{self.version}"
        return replace(request, model="m", label_set=label_set)

    async def classify(self, images, request):
        if self.errors:
            raise self.errors.pop(0)
        self.images += images
        bad = Problem(type="urn:deixis:problem:not-an-image", title="No", status=415, detail="this is no image")
        return [
            ImageResult(predictions=[], error=bad)
            if image.startswith(b"bad")
            else ImageResult(predictions=[Prediction(label="cat", score=0.9, similarity=0.3)])
            for image in images
        ]


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "in"
    place.mkdir()
    return place


async def watched(backend, folder, during=None, sidecar=None, request=None, *, leave=False, once=False, timeout_s=20):
    """Run a watcher until the coroutine function ``during`` returns."""
    watcher = Watcher(backend, request or ClassifyRequest(labels=["cat", "dog"]), sidecar or JsonSidecar(), 0.5)
    if leave:
        watcher.skip_existing(folder)
    async with asyncio.timeout(timeout_s):
        stopped = asyncio.Event()
        running = asyncio.create_task(watcher.run(folder, stopped, settle_s=0.2, poll=False, once=once))
        if during is not None:
            await asyncio.sleep(0.1)
            doing = asyncio.create_task(during())
            await asyncio.wait({doing, running}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                doing.cancel()
                await running
                pytest.fail("it ended by itself")
            await doing
            stopped.set()
        await running


async def until(done):
    while not done():  # noqa: ASYNC110 - files tell nothing
        await asyncio.sleep(0.02)


@anyio_test
async def test_new_images_are_labelled_and_existing_ones_are_skipped(folder):
    (folder / "old.png").write_bytes(b"old")
    backend = Backend()

    async def during():
        (folder / "sub").mkdir()
        (folder / "sub" / "new.png").write_bytes(b"new")
        (folder / "note.txt").write_text("no image")
        await until((folder / "sub" / "new.png.json").exists)

    await watched(backend, folder, during, leave=True)
    assert backend.images == [b"new"]
    sidecar = json.loads((folder / "sub" / "new.png.json").read_text())
    assert sidecar["predictions"][0]["label"] == "cat"
    assert sidecar["question"]["labels"] == ["cat", "dog"]
    assert not (folder / "old.png.json").exists()


@anyio_test
async def test_a_file_is_read_only_when_it_is_complete(folder):
    backend, file = Backend(), folder / "slow.png"

    async def during():
        with file.open("wb") as opened:
            for _ in range(8):
                opened.write(b"part")
                opened.flush()
                await asyncio.sleep(0.08)
        await until((folder / "slow.png.json").exists)

    await watched(backend, folder, during)
    assert backend.images == [b"part" * 8]


@anyio_test
async def test_a_file_that_changes_is_labelled_again(folder):
    backend, file = Backend(), folder / "a.png"
    file.write_bytes(b"one")

    async def during():
        await until(lambda: backend.images == [b"one"])
        await until((folder / "a.png.json").exists)
        file.write_bytes(b"another")
        await until(lambda: len(backend.images) == 2)
        await until(lambda: json.loads((folder / "a.png.json").read_text())["sha256"] == sha256_of(b"another"))

    await watched(backend, folder, during)
    assert backend.images == [b"one", b"another"]


@anyio_test
@pytest.mark.parametrize("sidecar", [JsonSidecar(), XmpSidecar()])
async def test_a_restart_resumes_and_another_request_labels_all_images_again(folder, sidecar):
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(name.encode())
    first, second, other = Backend(), Backend(), Backend()
    await watched(first, folder, sidecar=sidecar, once=True)
    (folder / "c.png").write_bytes(b"c.png")
    (folder / "a.png").touch()  # another time, and the same content
    await watched(second, folder, sidecar=sidecar, once=True)
    await watched(other, folder, sidecar=sidecar, once=True, request=ClassifyRequest(label_set="pets"))
    assert sorted(first.images) == [b"a.png", b"b.png"]
    assert second.images == [b"c.png"]
    assert len(other.images) == 3


@anyio_test
async def test_keywords_are_placed_below_the_prefix_and_another_prefix_replaces_them(folder):
    (folder / "a.png").write_bytes(b"a")
    for prefix, hierarchy in (("Auto|Deixis", ["Auto|Deixis|cat"]), ("Robot", ["Robot|cat"]), (None, [])):
        await watched(Backend(), folder, sidecar=XmpSidecar(prefix), once=True)
        assert lists_of((folder / "a.png.xmp").read_bytes()) == (["cat"], hierarchy, [])


def test_a_prefix_without_xmp_is_an_error(run, folder):
    assert_refused(run("watch", folder, "-l", "a", "--subject-prefix", "x"), "--subject-prefix: needs --write xmp")


@anyio_test
async def test_a_sidecar_names_the_version_that_answered_and_a_restart_with_a_newer_one_labels_again(folder):
    (folder / "a.png").write_bytes(b"a")
    backend = Backend()
    for version, asked in ((1, 1), (1, 1), (2, 2)):
        backend.version = version
        await watched(backend, folder, once=True, request=ClassifyRequest(label_set="pets"))
        assert len(backend.images) == asked
        fields = json.loads((folder / "a.png.json").read_text())["question"]
        assert (fields["label_set"], fields["model"]) == (f"pets@{version}", "m")


@anyio_test
async def test_bad_files_are_reported_once_and_do_not_stop_the_watcher(folder, capsys):
    (folder / "bad.png").write_bytes(b"bad")
    (folder / "taken.png").write_bytes(b"taken")
    (folder / "taken.png.json").write_text("somebody else's")
    backend = Backend()

    async def during():
        await until(lambda: backend.images)
        (folder / "good.png").write_bytes(b"good")
        await until((folder / "good.png.json").exists)
        await asyncio.sleep(0.5)

    await watched(backend, folder, during)
    assert backend.images == [b"bad", b"good"]
    assert (folder / "taken.png.json").read_text() == "somebody else's"
    stderr = capsys.readouterr().err
    assert stderr.count("this is no image") == 1
    assert stderr.count("move it to another folder") == 1


@anyio_test
async def test_an_image_without_a_discovered_label_is_done(folder, capsys, monkeypatch):
    (folder / "a.png").write_bytes(b"a")
    backend = Backend()

    async def nothing(images, _):
        return [ImageResult(predictions=[]) for _ in images]

    monkeypatch.setattr(backend, "classify", nothing)
    await watched(backend, folder, once=True)
    assert json.loads((folder / "a.png.json").read_text())["predictions"] == []
    assert "a.png: none of these" in capsys.readouterr().out.replace("\n", "")


@anyio_test
async def test_an_unavailable_server_is_retried_and_an_invalid_request_is_an_error(folder, capsys, monkeypatch):
    monkeypatch.setattr("app.cli.watch._FIRST_WAIT_S", 0.01)
    (folder / "a.png").write_bytes(b"a")
    busy = Problem(type="urn:deixis:problem:overloaded", title="Busy", status=503, detail="the queue is full")
    backend = Backend(UnreachableError("no response"), ProblemError(busy), NotReadyError("not ready"))
    await watched(backend, folder, once=True)
    assert backend.images == [b"a"]
    assert capsys.readouterr().err.count("waiting:") == 1
    unknown = Problem(type="urn:deixis:problem:unknown-name", title="No", status=404, detail="unknown label set 'x'")
    (folder / "a.png.json").unlink()
    with pytest.raises(ProblemError, match="unknown label set"):
        await watched(Backend(ProblemError(unknown)), folder, once=True)


@anyio_test
async def test_the_watcher_can_be_stopped_while_the_server_is_unavailable(folder):
    (folder / "a.png").write_bytes(b"a")
    backend = Backend(*[UnreachableError("no response")] * 1000)

    async def during():
        await until(lambda: len(backend.errors) < 1000)

    await watched(backend, folder, during)
    assert backend.images == []


@anyio_test
async def test_a_full_disk_is_an_error_and_the_next_run_labels_the_file(folder, monkeypatch):
    (folder / "a.png").write_bytes(b"a")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("app.images.sidecars.replace_content", full)
    with pytest.raises(InvalidFieldError, match=r"a\.png\.json.*No space left"):
        await watched(Backend(), folder, once=True)
    monkeypatch.undo()
    backend = Backend()
    await watched(backend, folder, once=True)
    assert backend.images == [b"a"]


@anyio_test
async def test_the_loss_of_the_folder_is_an_error(folder):
    async def during():
        folder.rmdir()
        await asyncio.Event().wait()

    with pytest.raises(InvalidFieldError, match="has disappeared; restore it"):
        await watched(Backend(), folder, during)


def test_the_command_labels_what_is_there_once(run, folder):
    for colour in ("red", "blue"):
        (folder / f"{colour}.png").write_bytes(picture(colour))
    (folder / "broken.png").write_bytes(b"no picture")
    done = run("watch", folder, "-l", "red,green,blue", "--once", "--settle", "0.1", "--write", "xmp")
    assert done.exit_code == 0, done.output
    assert f"{folder / 'red.png'}: red" in done.stdout
    assert "broken.png" in done.stderr
    assert "<rdf:li>blue</rdf:li>" in (folder / "blue.png.xmp").read_text()
    again = run("watch", folder, "-l", "red,green,blue", "--once", "--settle", "0.1", "--write", "xmp")
    assert "red.png" not in again.stdout


def test_a_missing_folder_and_an_invalid_request_are_refused(run, folder):
    assert "is not a folder" in run("watch", folder / "nope", "-l", "a,b").stderr
    (folder / "a.png").write_bytes(picture())
    done = run("watch", folder, "-s", "nothing", "--once", "--settle", "0.1")
    assert done.exit_code == 2
    assert "unknown label set 'nothing'" in done.stderr
