import numpy as np
import pytest

from app.comparison import compare
from app.encoders.fake import FakeEncoder
from app.errors import InvalidFieldError
from app.main import open_service
from app.methods import METHODS
from app.service import Question
from app.task import ClassEntry

pytestmark = pytest.mark.anyio

COLOURS = ("red", "green", "blue")


@pytest.fixture
async def service(settings):
    async with open_service(settings, [FakeEncoder()]) as opened:
        yield opened


def features_of(colours, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.zeros((len(colours), 16), np.float32)
    for row, colour in zip(rows, colours, strict=True):
        row[COLOURS.index(colour)] = 1
    rows[:, :3] += noise * rng.standard_normal((len(rows), 3)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def things(*, described):
    """Names that say nothing to the encoder, and descriptions that name the colour."""
    return [
        ClassEntry(name, (f"It is {colour}.", f"All {colour}."), features=(f"{colour} skin",))
        if described
        else ClassEntry(name)
        for name, colour in zip(("tomato", "leaf", "sky"), COLOURS, strict=True)
    ]


async def compared(service, classes, *, images=60, noise=0.1):
    await service.put_label_set("things", classes, "photo")
    truth = [number % 3 for number in range(images)]
    features = features_of([COLOURS[each] for each in truth], noise)
    return await compare(service, Question(label_set="things"), features, truth)


def report_of(comparison, method):
    return next(each for each in comparison.methods if each.method == method)


async def test_descriptions_that_tell_the_classes_apart_are_found_to_help(service):
    comparison = await compared(service, things(described=True))
    cupl = report_of(comparison, "cupl")
    assert cupl.evaluation.top1 == 1
    assert cupl.to_baseline.mean > 0.2
    assert cupl.to_control.mean > 0.2
    assert cupl.to_baseline.p < 0.05
    assert "The descriptions help, by what they say: use " in comparison.verdict[1]


async def test_the_control_has_as_many_prompts_as_each_method_with_descriptions(service):
    comparison = await compared(service, things(described=True))
    sizes = {
        round(each.prompts_per_class)
        for each in comparison.methods
        if METHODS.get(each.method, METHODS["waffle"]).uses_descriptions
    }
    assert {each.prompts_per_class for each in comparison.methods if "waffle" in each.method} == {
        max(2, size) for size in sizes
    }


async def test_every_method_but_the_control_is_in_the_table_with_its_interval(service):
    comparison = await compared(service, things(described=True))
    assert [each.method for each in comparison.methods if "waffle" not in each.method] == [
        name for name, method in METHODS.items() if not method.is_control
    ]
    for each in comparison.methods:
        low, high = each.interval
        assert low <= each.evaluation.top1 <= high
    assert report_of(comparison, "zero-shot").to_baseline is None


async def test_without_descriptions_that_is_said_and_no_control_is_run(service):
    comparison = await compared(service, things(described=False))
    assert all("waffle" not in each.method for each in comparison.methods)
    assert "No class of this label set has descriptions" in comparison.verdict[0]


async def test_descriptions_that_say_what_the_names_say_are_not_found_to_help(service):
    classes = [ClassEntry(colour, (f"It is {colour}.",)) for colour in COLOURS]
    comparison = await compared(service, classes, noise=0.8)
    assert "no difference beyond chance" in comparison.verdict[1]


async def test_descriptions_that_mislead_are_found_to_hurt(service):
    wrong = {"red": "green", "green": "blue", "blue": "red"}
    classes = [ClassEntry(name, (f"{other}. " * 3,), features=(f"{other} {other}",)) for name, other in wrong.items()]
    comparison = await compared(service, classes)
    assert report_of(comparison, "cupl").to_baseline.mean < 0
    told = comparison.verdict[1]
    assert "Descriptions hurt here" in told or "no difference beyond chance" in told


async def test_no_image_is_refused(service):
    await service.put_label_set("things", things(described=True), "photo")
    with pytest.raises((InvalidFieldError, ValueError)):
        await compare(service, Question(label_set="things"), np.zeros((0, 16), np.float32), [])


async def test_a_method_that_would_take_too_much_memory_is_named_and_the_others_are_run(settings):
    small = settings.model_copy(update={"class_embedding_cache_mib": 1})
    async with open_service(small, [FakeEncoder()]) as service:
        classes = [ClassEntry(f"thing {number}") for number in range(200)]
        await service.put_label_set("many", classes, "imagenet")
        features = features_of(["red", "green"])
        comparison = await compare(service, Question(label_set="many"), features, [0, 1])
    assert [each.split(":")[0] for each in comparison.not_run] == ["autoclip"]
    assert "zero-shot" in [each.method for each in comparison.methods]
