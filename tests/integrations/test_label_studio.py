"""The backend for Label Studio with requests of Label Studio, on a service with the fake encoder."""

import base64
import shutil
from contextlib import ExitStack

import httpx
import pytest
import structlog

from app.encoders.fake import FakeEncoder
from app.integrations.label_studio import Preannotation, create_app
from app.integrations.label_studio_images import TaskImages
from app.main import create_app as create_service
from app.settings import Settings
from deixis import AsyncClient, Client
from tests.api.live import live
from tests.conftest import picture
from tests.integrations.label_studio_server import LEGACY_TOKEN, LabelStudio

CONFIG = """
<View>
  <Image name="picture" value="$image"/>
  <Choices name="colour" toName="picture">
    <Choice value="Red"/><Choice value="Green" alias="verde"/><Choice value="Sea" predicted_values="blue, teal"/>
  </Choices>
</View>
"""
SEVERAL = CONFIG.replace('toName="picture"', 'toName="picture" choice="multiple"')
PROJECT = "3.1764000000"


@pytest.fixture
def studio():
    return LabelStudio()


@pytest.fixture(scope="module")
def service_url(tmp_path_factory, empty_database):
    folder = tmp_path_factory.mktemp("service")
    shutil.copy(empty_database, folder)
    settings = Settings(data_dir=folder, models=("embedded",), build_default_database=False, max_images_per_request=8)
    with live(create_service(settings, lambda _: [FakeEncoder()])) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture
def start(service_url, studio):
    """A function that starts a backend; keyword arguments are the options of a classification."""
    with ExitStack() as running:

        def begin(*, login=None, service=None, multiple_above=0.25, **request) -> httpx.Client:
            host, port = running.enter_context(live(studio.app))
            images = TaskImages(
                label_studio=f"http://{host}:{port}", token=LEGACY_TOKEN, max_bytes=1_000_000, timeout_s=5
            )
            client = AsyncClient(service or service_url, retries=0)
            host, port = running.enter_context(
                live(create_app(client, images, Preannotation(request, multiple_above), login=login))
            )
            return running.enter_context(httpx.Client(base_url=f"http://{host}:{port}"))

        yield begin


def tasks_of(*sources):
    return [
        {"id": number, "data": {"image": source}, "annotations": [], "predictions": [], "project": 3}
        for number, source in enumerate(sources, start=1)
    ]


def predict(backend, tasks, config=CONFIG):
    """Send the request of ``MLApi.make_predictions`` of Label Studio."""
    params = {"login": None, "password": None, "context": None}
    body = {"tasks": tasks, "project": PROJECT, "label_config": config, "params": params}
    answer = backend.post("/predict", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def set_up(backend, config=CONFIG):
    body = {
        "project": PROJECT,
        "schema": config,
        "hostname": "http://elsewhere",
        "access_token": "x",
        "extra_params": "",
    }
    return backend.post("/setup", json=body)


def test_both_health_routes_respond(start):
    backend = start(service="http://127.0.0.1:9")  # not looked at: Label Studio waits one second
    for path in ("/", "/health"):
        assert backend.get(path).json()["status"] == "UP"


def test_each_task_gets_the_value_of_its_choice_in_annotations(start):
    backend = start()
    encoded = base64.b64encode(picture("blue")).decode()
    tasks = tasks_of("/data/upload/3/red.png", "/data/local-files/?d=a/green.png", f"data:image/png;base64,{encoded}")
    found = predict(backend, tasks)
    assert [each["result"][0]["value"] for each in found] == [
        {"choices": ["Red"]},
        {"choices": ["verde"]},
        {"choices": ["Sea"]},
    ]
    for each in found:
        (region,) = each["result"]
        assert (region["from_name"], region["to_name"], region["type"]) == ("colour", "picture", "choices")
        assert 0.25 < each["score"] == region["score"] <= 1
        assert each["model_version"] == set_up(backend).json()["model_version"]


def test_several_batches_of_tasks_are_predicted_in_order(start):
    colours = ["red", "green", "blue"] * 9
    found = predict(start(), tasks_of(*(f"/data/upload/3/{colour}.png" for colour in colours)))
    message = {"red": "Red", "green": "verde", "blue": "Sea"}
    assert [each["result"][0]["value"]["choices"] for each in found] == [[message[colour]] for colour in colours]


def test_a_task_that_cannot_be_predicted_gets_no_prediction_and_the_others_do(start):
    sources = ("/data/upload/3/red.png", "/data/upload/3/none.png", "/data/upload/3/text.png", "s3x://a", 7)
    with structlog.testing.capture_logs() as logged:
        found = predict(start(), tasks_of(*sources))
    assert found[0]["result"]
    # Label Studio makes no prediction of an empty list, and asks again later.
    assert found[1:] == [[], [], [], []]
    reasons = {each["task"]: each["reason"] for each in logged if each["event"] == "not predicted"}
    assert "404" in reasons[2]
    assert "looks like text" in reasons[3]
    assert set(reasons) == {2, 3, 4, 5}


def test_several_choices_are_predicted_if_their_scores_are_high_enough(start):
    yellow = tasks_of("/data/upload/3/yellow.png")  # as near to red as to green
    (both,) = predict(start(multiple_above=0.25), yellow, SEVERAL)
    assert set(both["result"][0]["value"]["choices"]) == {"Red", "verde"}
    (none,) = predict(start(multiple_above=0.75), yellow, SEVERAL)
    assert none["result"] == []
    (one,) = predict(start(multiple_above=0.75), tasks_of("/data/upload/3/red.png"), SEVERAL)
    assert one["result"][0]["value"]["choices"] == ["Red"]


def test_a_rejected_image_has_an_empty_prediction(start):
    backend = start(reject_below=0.75)
    unsure, sure = predict(backend, tasks_of("/data/upload/3/yellow.png", "/data/upload/3/red.png"))
    assert unsure["result"] == []
    assert 0.25 < unsure["score"] < 0.75
    assert sure["result"]


def test_choices_of_a_task_are_its_labels(start):
    config = '<View><Image name="i" value="$image"/><Choices name="c" toName="i" value="$options"/></View>'
    tasks = tasks_of("/data/upload/3/red.png", "/data/upload/3/green.png")
    tasks[0]["data"]["options"] = [{"value": "red car"}, {"value": "boat"}]
    tasks[1]["data"]["options"] = [{"value": "boat"}, {"value": "green car", "alias": "g"}]
    found = predict(start(), tasks, config)
    assert [each["result"][0]["value"]["choices"] for each in found] == [["red car"], ["g"]]


def test_choices_are_matched_with_the_classes_of_a_label_set(start, service_url):
    with Client(service_url) as client:
        client.label_sets.put("colours", ["RED", "green", "pink"])
    backend = start(label_set="colours")
    first = set_up(backend).json()["model_version"]
    assert "colours@1" in first
    (found,) = predict(backend, tasks_of("/data/upload/3/red.png"))
    assert found["result"][0]["value"] == {"choices": ["Red"]}
    with Client(service_url) as client:
        client.label_sets.put("colours", ["RED", "green"])
    assert set_up(backend).json()["model_version"] != first
    other = CONFIG.replace("Red", "x").replace("Green", "y").replace("blue, teal", "z")
    assert "no class that is named after a choice" in set_up(backend, other).json()["error"]


def test_the_version_changes_only_with_the_request(start):
    backend, other = start(), start(reject_below=0.5)
    first = set_up(backend).json()["model_version"]
    assert set_up(backend, CONFIG.replace("<View>", "<View >")).json()["model_version"] == first
    assert set_up(backend, CONFIG.replace('"Red"', '"Crimson"')).json()["model_version"] != first
    assert set_up(other).json()["model_version"] != first


def test_webhooks_are_accepted_and_train_nothing(start):
    backend = start()
    trained = backend.post("/webhook", json={"action": "ANNOTATION_CREATED", "project": {"id": 3}, "annotation": {}})
    other = backend.post("/webhook", json={"action": "PROJECT_UPDATED", "project": {"id": 3}})
    assert (trained.status_code, trained.json()["status"]) == (201, "ok")
    assert (other.status_code, other.json()["status"]) == (200, "Unknown event")


def test_clients_must_send_the_login_if_there_is_one(start):
    backend = start(login=("studio", "s3cret"))
    assert backend.get("/health").status_code == 401
    assert backend.get("/health", auth=("studio", "wrong")).status_code == 401
    assert backend.get("/health", headers={"Authorization": "Basic ???"}).status_code == 401
    assert backend.get("/health", auth=("studio", "s3cret")).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/predict", b"[", "not JSON"),
        ("/predict", b"[]", "not a JSON object"),
        ("/predict", b'{"tasks": 3, "label_config": "x"}', "tasks"),
        ("/predict", b'{"tasks": [{"id": 1}], "label_config": "<View/>"}', "tasks.0.data"),
        ("/predict", b'{"tasks": [], "label_config": "<View/>"}', "no <Choices>"),
        ("/setup", b'{"project": "3.1"}', "the labeling configuration is missing"),
        ("/setup", b'{"schema": "<View/>"}', "no <Choices>"),
    ],
)
def test_an_invalid_request_is_refused_with_the_reason(start, path, body, message):
    answer = start().post(path, content=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_more_tasks_than_the_limit_are_refused(start):
    body = {"tasks": tasks_of(*["/data/upload/3/red.png"] * 1001), "label_config": CONFIG}
    answer = start().post("/predict", json=body)
    assert answer.status_code == 400
    assert "at most 1000" in answer.json()["error"]


def test_a_service_that_refuses_or_does_not_respond_is_reported(start):
    away = set_up(start(service="http://127.0.0.1:9"))
    assert (away.status_code, "is the server running" in away.json()["error"]) == (503, True)
    unknown = set_up(start(label_set="nothing"))
    assert (unknown.status_code, "unknown label set" in unknown.json()["error"]) == (400, True)
    backend = start(method="zlp")
    body = {"tasks": tasks_of("/data/upload/3/red.png"), "label_config": CONFIG}
    refused = backend.post("/predict", json=body)
    assert (refused.status_code, "unknown method 'zlp'" in refused.json()["error"]) == (400, True)
