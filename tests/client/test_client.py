"""Both clients against the whole application."""

import base64
import io
import math
import threading

import numpy as np
import pytest
from PIL import Image

import deixis
from app.encoders.fake import FakeEncoder
from app.main import create_app
from deixis.answers import LabelClass
from tests.api.live import live
from tests.conftest import picture

COLOURS = ["red", "green", "blue"]


def labels_of(classification):
    return [result.label for result in classification.results]


# --- classify ---------------------------------------------------------


def images_of(colour, tmp_path):
    """Return a picture in each form that the client accepts."""
    path = tmp_path / f"{colour}.png"
    path.write_bytes(picture(colour))
    pillow = Image.open(path)
    pillow.load()
    return {
        "path": path,
        "text": str(path),
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "memoryview": memoryview(path.read_bytes()),
        "open file": io.BytesIO(path.read_bytes()),
        "data URL": f" DATA:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
        "pillow": pillow,
        "cmyk": pillow.convert("CMYK"),
        "palette": pillow.convert("P"),
        "array": np.asarray(pillow),
        "with alpha": np.asarray(pillow.convert("RGBA")),
    }


def test_every_form_of_an_image_has_the_same_result(client, tmp_path):
    for colour in COLOURS:
        for kind, image in images_of(colour, tmp_path).items():
            assert labels_of(client.classify(image, labels=COLOURS)) == [colour], kind


def test_pictures_of_pillow_are_turned_upright(client, encoder):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=exif, quality=100)
    opened = Image.open(io.BytesIO(file.getvalue()))
    as_bytes, as_pillow = client.classify(file.getvalue(), opened, labels=COLOURS).results
    assert as_pillow.predictions[0].similarity == pytest.approx(as_bytes.predictions[0].similarity, abs=1e-3)


def test_a_classification_is_typed_and_has_the_requested_parts(client):
    answer = client.classify(picture("red"), picture("blue"), labels=COLOURS, top_k=2, explain=True, template="a {}")
    assert isinstance(answer, deixis.Classification)
    assert answer.method == "zero-shot"
    assert answer.timing_ms["encode"] >= 0
    red, blue = answer.results
    assert [len(red.predictions), len(blue.predictions)] == [2, 2]
    assert red.predictions[0].label == "red"
    assert red.predictions[0].score > red.predictions[1].score
    assert red.explanation is not None
    assert red.explanation.labels[0].supporting[0].prompt == "a red"


def test_options_and_thresholds_are_sent(client):
    answer = client.classify(
        picture("red"), labels=COLOURS, method="autoclip", template="ensemble", options={"beta": 0.5}, reject_below=1.0
    )
    assert answer.method == "autoclip"
    assert answer.results[0].rejected is True
    assert answer.results[0].label is None


def test_labels_may_contain_commas_and_any_letters(client):
    labels = ["red, like wine", "grün", "青い", "it's", "a=b;c"]
    predictions = client.classify(picture(), labels=labels, top_k=9).results[0].predictions
    assert {prediction.label for prediction in predictions} == set(labels)


def test_a_bad_image_among_others_has_its_error_in_its_result(client):
    answer = client.classify(picture("red"), b"no image", labels=COLOURS)
    good, bad = answer.results
    assert good.label == "red"
    assert bad.label is None
    assert bad.error is not None
    assert bad.error.kind == "not-an-image"


def test_a_refusal_is_an_error_with_the_problem_of_the_service(client):
    with pytest.raises(deixis.ProblemError, match="labels") as caught:
        client.classify(picture(), labels=["red", "Red"])
    assert (caught.value.status, caught.value.kind) == (422, "invalid-field")
    assert caught.value.problem.errors[0]["field"] == "labels.1"
    assert caught.value.problem.request_id


@pytest.mark.parametrize(
    ("images", "options", "kind", "message"),
    [
        ([], {"labels": COLOURS}, ValueError, "one or more"),
        ([3], {"labels": COLOURS}, TypeError, "int is not an image"),
        ([np.zeros((4, 4, 3))], {"labels": COLOURS}, ValueError, "float64"),
        ([np.zeros((4, 4, 2), np.uint8)], {"labels": COLOURS}, ValueError, r"\(4, 4, 2\)"),
        ([np.zeros((0, 4, 3), np.uint8)], {"labels": COLOURS}, ValueError, r"\(0, 4, 3\)"),
        ([io.StringIO("x")], {"labels": COLOURS}, TypeError, "rb"),
        (["missing.png"], {"labels": COLOURS}, OSError, "missing.png"),
        (
            ["missing.png"],  # the arguments are checked first
            {"label": COLOURS, "topk": 3, "colour": 1},
            TypeError,
            r"^unknown argument label \(did you mean labels\?\), topk \(did you mean top_k\?\), colour; known: labels,",
        ),
    ],
)
def test_invalid_arguments_are_errors_before_a_request_is_sent(connect, images, options, kind, message):
    client = connect("http://127.0.0.1:9", retries=0)
    with pytest.raises(kind, match=message):
        client.classify(*images, **options)


def test_images_of_an_earlier_request_are_classified_by_id(client):
    kept = client.classify(picture("red"), picture("blue"), labels=["cat"], keep_features=True).results
    ids = [deixis.ImageId(result.image_id) for result in kept]
    assert labels_of(client.classify(ids, COLOURS)) == ["red", "blue"]
    assert labels_of(client.classify([ids[1], picture("green")], COLOURS)) == ["blue", "green"]
    for refused in (lambda: client.embed_images(ids), lambda: client.examples.add("x", ids)):
        with pytest.raises(TypeError, match="an ImageId can only be classified"):
            refused()


def test_a_url_is_sent_as_a_url(client):
    with pytest.raises(deixis.ProblemError, match="DEIXIS_ALLOW_IMAGE_URLS"):
        client.classify("https://example.org/cat.jpg", labels=COLOURS)
    mixed = client.classify("https://example.org/cat.jpg", picture("red"), labels=COLOURS, options={}, top_k=1)
    assert mixed.results[0].error is not None
    assert mixed.results[1].label == "red"


# --- streams ---------------------------------------------------------


def test_a_stream_has_a_result_for_each_image_in_order(client, tmp_path):
    missing = tmp_path / "missing.png"
    images = [picture(COLOURS[number % 3]) for number in range(50)]
    images[7], images[23] = b"no image", missing
    found = list(client.stream(images, labels=COLOURS, batch_size=4, concurrency=3))
    assert [each.index for each in found] == list(range(50))
    assert [each.image for each in found] == images
    for number, each in enumerate(found):
        if number in {7, 23}:
            assert each.result.error is not None
        else:
            assert each.result.label == COLOURS[number % 3]
    assert found[7].result.error.kind == "not-an-image"
    assert found[23].result.error.kind == "unreadable-image"
    assert "missing.png" in found[23].result.error.detail


def test_batches_of_nothing_but_bad_images_do_not_end_a_stream(client):
    images = [b"bad"] * 4 + [picture("red")] + [b"", b"bad", picture("blue")]
    found = [each.result for each in client.stream(images, labels=COLOURS, batch_size=2)]
    assert [each.label for each in found] == [None] * 4 + ["red", None, None, "blue"]
    assert all(each.error for each in found if each.label is None)


@pytest.mark.parametrize("count", [1, 3])
def test_too_many_labels_end_a_stream(client, count):
    labels = [f"label {number}" for number in range(1001)]
    with pytest.raises(deixis.ProblemError, match="DEIXIS_MAX_LABELS"):
        list(client.stream([picture()] * count, labels=labels))


def test_an_invalid_request_ends_a_stream(client):
    with pytest.raises(deixis.ProblemError, match="unknown label set"):
        list(client.stream([picture()] * 20, label_set="nothing"))
    with pytest.raises(TypeError, match="lables"):
        client.stream([picture()], lables=["a"])
    with pytest.raises(ValueError, match="1 or more"):
        client.stream([picture()], labels=COLOURS, batch_size=0)


def test_a_stream_takes_no_more_images_than_it_needs(client):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield picture("red")

    stream = client.stream(endless(), labels=COLOURS, batch_size=2, concurrency=3)
    for _, each in zip(range(10), stream, strict=False):
        assert each.result.label == "red"
    assert taken <= 10 + 2 * (3 + 1)
    stream.close()
    before = taken
    assert labels_of(client.classify(picture("blue"), labels=COLOURS)) == ["blue"]
    assert taken == before


def test_a_stream_has_no_more_simultaneous_requests_than_its_concurrency(connect, settings):
    most = now = 0
    lock = threading.Lock()
    app = create_app(settings, lambda _: [FakeEncoder()])

    async def counted(scope, receive, send):
        nonlocal most, now
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        with lock:
            now += 1
            most = max(most, now)
        try:
            await app(scope, receive, send)
        finally:
            with lock:
                now -= 1

    with live(counted) as (host, port):
        client = connect(f"http://{host}:{port}")
        found = list(client.stream([picture("red")] * 60, labels=COLOURS, batch_size=1, concurrency=3))
    assert len(found) == 60
    assert 1 <= most <= 4  # the next may begin before the server has ended one that is answered


# --- features, models and methods ---------------------------------------------------------


def test_embeddings_have_length_one(client):
    (text,) = client.embed_texts(["red"])
    image, other = client.embed_images([picture("red"), picture("blue")])
    for each in (text, image, other):
        assert math.fsum(x * x for x in each) == pytest.approx(1, abs=1e-5)
    assert len(text) == len(image) == client.models()[0].embed_dim
    with pytest.raises(TypeError, match="list"):
        client.embed_texts("red")


def test_models_and_methods_are_listed(client):
    assert client.models()[0].default is True
    methods = {each.name: each for each in client.methods()}
    assert methods["autoclip"].options["beta"].minimum <= methods["autoclip"].options["beta"].default
    assert client.is_ready() is True


# --- label sets ---------------------------------------------------------


def test_a_label_set_has_versions_that_guard_against_lost_updates(client):
    name = type(client).__name__  # the versions of a deleted label set are not used again
    made = client.label_sets.put(
        name, ["red", {"name": "green", "synonyms": ["lime"]}, LabelClass(name="blue")], version=0
    )
    assert (made.version, [each.name for each in made.classes]) == (1, COLOURS)
    assert made.classes[1].synonyms == ["lime"]
    more = client.label_sets.add_classes(name, ["white"], version=1)
    assert more.version == 2
    with pytest.raises(deixis.ProblemError) as caught:
        client.label_sets.add_classes(name, ["black"], version=1)
    assert caught.value.status == 412
    with pytest.raises(deixis.ProblemError) as caught:
        client.label_sets.put(name, ["a", "b"], version=0)
    assert caught.value.status == 412
    assert client.label_sets.remove_class(name, "white").version == 3
    assert len(client.label_sets.get(name).classes) == 3
    assert len(client.label_sets.get(f"{name}@2").classes) == 4
    answer = client.classify(picture("blue"), label_set=name)
    assert (answer.label_set, answer.results[0].label) == (f"{name}@3", "blue")
    changed = client.label_sets.put(name, made.classes, templates="a {}", merge_synonyms="max")
    assert (changed.templates, changed.merge_synonyms) == ("a {}", "max")
    counts = {"red": 2, "green": 1, "blue": 1}
    assert client.label_sets.put(name, made.classes, priors=counts).priors == counts
    assert client.label_sets.add_classes(name, ["white"], priors={"white": 4}).priors == {**counts, "white": 4}
    assert client.classify(picture("blue"), label_set=name).priors["white"] == 0.5
    given = client.classify(picture("blue"), labels=["a", "b"], priors={"a": 3, "b": 1})
    assert given.priors == {"a": 0.75, "b": 0.25}
    client.label_sets.delete(name)
    with pytest.raises(deixis.ProblemError, match=name) as caught:
        client.label_sets.get(name)
    assert caught.value.kind == "unknown-name"


def test_a_label_set_that_comes_with_the_service_is_imported(client):
    (clothing,) = [shipped for shipped in client.label_sets.shipped() if shipped.name == "clothing"]
    imported = client.label_sets.import_shipped("clothing")
    assert [entry.name for entry in imported.classes] == clothing.class_names
    assert all(entry.descriptions and entry.features for entry in imported.classes)
    client.label_sets.delete("clothing")


def test_names_are_quoted_and_lists_are_read_page_by_page(client, monkeypatch):
    monkeypatch.setattr("deixis._calls.PAGE_SIZE", 2)
    names = {"a b", "c+d", "é", "a&b=c", "plain"}
    for name in names:
        client.label_sets.put(name, ["red", "green/blue"])
    assert {each.name for each in client.label_sets.list()} == names
    assert [each.name for each in client.label_sets.remove_class("a b", "green/blue").classes] == ["red"]
    with pytest.raises(deixis.ProblemError, match="c%2Fd"):
        client.label_sets.get("c%2Fd")


def test_example_images_are_added_counted_listed_and_deleted(client, server, monkeypatch):
    monkeypatch.setattr("deixis._calls.PAGE_SIZE", 2)
    client.label_sets.put("colours", COLOURS)
    shades = {colour: [picture(colour, (20 + number, 20)) for number in range(3)] for colour in COLOURS}
    for colour, images in shades.items():
        assert client.examples.add("colours", images, label=colour).added == 3
    again = client.examples.add("colours", [shades["red"][0], b"bad", picture("white")], label=None)
    assert (again.added, again.duplicates, [each.image for each in again.skipped]) == (1, 1, [1])
    counts = client.examples.counts("colours")
    assert (counts.labelled, counts.unlabelled) == (dict.fromkeys(COLOURS, 3), 1)
    classes = [None, *COLOURS[:2]]
    mixed = [picture(colour, (30, 20)) for colour in ("white", "red", "green")]
    assert client.examples.add("colours", mixed, label=classes).added == 3
    assert [example.label for example in client.examples.list("colours")][-3:] == classes
    relabelled = client.examples.add("colours", mixed[:1], label=["blue"])
    assert (relabelled.relabelled, relabelled.counts.labelled["blue"]) == (1, 4)
    for example in list(client.examples.list("colours"))[-3:]:
        client.examples.delete("colours", example.id)
    listed = list(client.examples.list("colours", label="red"))
    assert [each.label for each in listed] == ["red"] * 3
    assert len(list(client.examples.list("colours"))) == 10
    assert client.examples.delete("colours", listed[0].id).deleted == 1
    assert client.examples.delete("colours", label="red").deleted == 2
    assert client.examples.delete("colours", unlabelled=True).deleted == 1
    assert client.examples.delete("colours", everything=True).deleted == 6
    with pytest.raises(ValueError, match="is a URL"):
        client.examples.add("colours", ["https://example.org/a.png"], label="red")

    folder = server[1] / "shots" / "red"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.png").write_bytes(picture("red", (9, 9)))
    done = client.examples.import_folder("colours", "shots", by_subfolder=True).wait(timeout_s=60)
    assert done.status == "succeeded"
    assert client.examples.counts("colours").labelled["red"] == 1


# --- jobs, evaluations and databases ---------------------------------------------------------


def test_a_job_is_waited_for_and_has_its_result(client):
    steps = []

    def note(done, total):
        steps.append((done, total))

    async def note_async(done, total):
        note(done, total)

    on_progress = note if isinstance(client, deixis.Client) else note_async
    client.label_sets.put("colours", COLOURS)
    images = {colour: [picture(colour, (20 + number, 20)) for number in range(2)] for colour in COLOURS}
    job = client.label_sets.evaluate("colours", images)
    done = job.wait(timeout_s=60, progress=True, on_progress=on_progress)
    assert done.status == "succeeded"
    assert steps[-1:] == ([] if job.is_over else [(done.done, done.total)])
    assert done.id == job.id
    assert done.result
    assert client.jobs.get(job.id).status == "succeeded"
    assert job.id in {each.id for each in client.jobs.list()}
    assert job.refresh().is_over


def test_a_failed_job_and_a_timeout_are_errors(client, monkeypatch):
    job = client.databases.build("words", captions=["too short"], min_chars=1000, max_chars=1000)
    with pytest.raises(deixis.JobFailedError, match=f"{job.id} failed: "):
        job.wait(timeout_s=60)
    client.label_sets.put("colours", COLOURS)
    again = client.label_sets.evaluate("colours", {"red": [picture("red")], "blue": [picture("blue")]})
    if not again.refresh().is_over:
        with pytest.raises(TimeoutError, match="continues"):
            again.wait(timeout_s=0)
    again.cancel()
    assert again.refresh().status in {"cancelled", "succeeded"}


def test_a_caption_database_is_built_searched_and_deleted(client):
    captions = [f"a {colour} thing number {number}" for colour in COLOURS for number in range(5)]
    client.databases.build("things", captions=captions, min_chars=3).wait(timeout_s=60)
    assert client.databases.get("things").captions == 15
    assert "things" in {each.name for each in client.databases.list()}
    found = client.databases.search("things", "red", limit=3)
    assert len(found.results) == 3
    assert found.results[0].score >= found.results[1].score
    by_image = client.databases.search("things", image=picture("blue"), limit=2, contains="blue")
    assert all("blue" in each.caption for each in by_image.results)
    client.databases.delete("things")
    with pytest.raises(deixis.ProblemError):
        client.databases.get("things")


def test_there_are_no_drafts_and_describing_is_not_configured(client):
    client.label_sets.put("colours", COLOURS)
    assert list(client.label_sets.drafts("colours", status="draft")) == []
    for ask in (client.label_sets.describe, client.label_sets.estimate):
        with pytest.raises(deixis.ProblemError) as caught:
            ask("colours", answers=1, classes=["red"])
        assert caught.value.kind == "not-configured"
    assert client.label_sets.reject_drafts("colours") == 0


# --- names in URLs ---------------------------------------------------------------------------------------------------

REMOVED_FROM_URLS = ["", ".", "..", "../x", "a/..", "a/./b", "..\\a"]


@pytest.mark.parametrize("name", REMOVED_FROM_URLS)
def test_no_name_that_would_change_the_path_is_sent(client, name):
    written = client.label_sets.put("pets", COLOURS)
    jobs, examples, databases, label_sets = client.jobs, client.examples, client.databases, client.label_sets
    calls = {
        "class": lambda: label_sets.remove_class("pets", name),
        "label set": lambda: label_sets.get(name),
        "deleted label set": lambda: label_sets.delete(name),
        "written label set": lambda: label_sets.put(name, COLOURS),
        "class of a label set": lambda: label_sets.remove_class(name, "red"),
        "evaluated label set": lambda: label_sets.evaluate(name),
        "selection": lambda: label_sets.selection(name),
        "thresholds": lambda: label_sets.thresholds(name),
        "written thresholds": lambda: label_sets.set_thresholds(name, {"red": 0.5}),
        "shipped label set": lambda: label_sets.import_shipped(name),
        "drafts": lambda: list(label_sets.drafts(name)),
        "described label set": lambda: label_sets.describe(name),
        "accepted drafts": lambda: label_sets.accept_drafts(name),
        "example image": lambda: examples.delete("pets", name),
        "examples": lambda: list(examples.list(name)),
        "database": lambda: databases.get(name),
        "deleted database": lambda: databases.delete(name),
        "searched database": lambda: databases.search(name, "a cat"),
        "job": lambda: jobs.get(name),
    }
    for what, call in calls.items():
        with pytest.raises(deixis.InvalidNameError, match="name"):
            call()
        assert client.label_sets.get("pets") == written, what


@pytest.mark.parametrize(
    "name",
    [
        "/",
        "//",
        "a;b=c",
        "a?b",
        "a#b",
        "a%b",
        "%2e%2e",
        "%2F",
        "a\\b",
        "...",
        ".a",
        "a ..",
        "~",
        "+",
        "&",
        "=",
        '"',
        "'",
        "犬",
        "a:b@c",
    ],
)
def test_a_class_of_any_other_name_is_removed_and_nothing_else(client, name):
    client.label_sets.put("pets", ["cat", name, "dog"])
    assert [entry.name for entry in client.label_sets.remove_class("pets", name).classes] == ["cat", "dog"]


def test_examples_and_images_to_evaluate_may_have_several_classes(client):
    client.label_sets.put("colours", ["red", "blue", "green"])
    red, blue, green = (picture(colour) for colour in ("red", "blue", "green"))
    both = client.examples.add("colours", [red, blue], classes=["red", "blue"])
    assert (both.counts.labelled_images, both.counts.several_classes) == (2, 2)
    mixed = client.examples.add("colours", [red, green, picture("black")], label=[["red"], ["green", "blue"], None])
    assert (mixed.added, mixed.relabelled) == (2, 1)
    found = [(example.label, example.classes) for example in client.examples.list("colours")]
    assert found == [("red", ["red"]), (None, ["red", "blue"]), (None, ["green", "blue"]), (None, [])]
    with pytest.raises(ValueError, match="either label, or classes"):
        client.examples.add("colours", [red], label="red", classes=["red"])
    result = client.label_sets.evaluate("colours", [(red, ["red"]), (blue, ["blue", "green"])]).wait().result
    assert result["at_default"]["labels_per_image"] == 1.5
    assert client.label_sets.evaluate("colours", multi_label=True).wait().result["images"] == 3
