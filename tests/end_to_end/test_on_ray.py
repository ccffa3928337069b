"""The service on a real Ray: the responses of a single process, and killed replicas."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.captions.cased.test_lexicon import installed
from tests.encoders.test_open_clip import write_model
from tests.end_to_end.commands import deixis
from tests.end_to_end.server import serving
from tests.end_to_end.test_captions import CAPTIONS, NAMES
from tests.end_to_end.test_traces import collecting_spans, spans_in

pytestmark = installed

# A restart may take this long on a busy machine.
WAIT_S = 120
COUNT_OF_EDGES = 2


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    # The build starts its own Ray.
    built = deixis("captions", "build", "-", "--name", "things", "--engine", "ray", data_dir=folder, stdin=CAPTIONS)
    assert built.returncode == 0, built.stderr
    assert "16" in built.stdout
    return folder


@pytest.fixture(scope="module")
def spans():
    """A collector of traces: its address and its spans."""
    with collecting_spans() as collected:
        yield collected


@pytest.fixture(scope="module")
def on_ray(data_dir, spans):
    replicas = ("--ray-layout", f"edges={COUNT_OF_EDGES},encoders=2,shards=2")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", spans[0])
        patched.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        patched.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with serving("--engine", "ray", *replicas, "--traces", "true", data_dir=data_dir, forked=False) as running:
            yield running


@pytest.fixture
def client(on_ray):
    with httpx.Client(base_url=on_ray.url, timeout=60) as opened:
        yield opened


QUERIES = [
    {"labels": "cat, dog, coffee cup, rocket, flower"},
    {"labels": "cat, dog, coffee cup, rocket, flower", "method": "autoclip", "template": "ensemble"},
    {"label_set": "things", "method": "dclip", "explain": "true"},
    {"database": "things", "explain": "true"},
    {"database": "things", "group": "true"},
]
CLASSES = [{"name": "cat", "features": ["whiskers", "pointed ears"]}, {"name": "coffee cup"}, {"name": "rocket"}]


@pytest.fixture(scope="module")
def single_process(data_dir):
    with serving(data_dir=data_dir) as alone, alone.client() as opened:
        opened.put("/v1/label-sets/things", json={"classes": CLASSES}).raise_for_status()
        yield opened


@pytest.mark.parametrize("query", QUERIES)
def test_responses_are_those_of_a_single_process(client, single_process, photographs, query):
    images = [("image", (name, content)) for name, content in photographs.items()]
    actual, expected = (each.post("/v1/classify", files=images, data=query).json() for each in (client, single_process))
    assert actual["method"] == expected["method"]
    for mine, theirs in zip(actual["results"], expected["results"], strict=True):
        # Each process encodes the words that compete with labels in the background.
        ours, others = (
            [text for text in result["warnings"] if "none of the labels" not in text] for result in (mine, theirs)
        )
        assert ours == others
        assert [each["label"] for each in mine["predictions"]] == [each["label"] for each in theirs["predictions"]]
        for own, other in zip(mine["predictions"], theirs["predictions"], strict=True):
            assert own["score"] == pytest.approx(other["score"], abs=1e-4)
    if query.get("group"):
        assert actual["vocabulary"] == expected["vocabulary"]


def test_a_write_that_one_edge_acknowledged_is_visible_to_every_edge(client, photographs):
    for version, word in enumerate(("kitten", "tabby cat", "cat"), 1):
        assert client.put("/v1/label-sets/pets", json={"classes": [word, "rocket"]}).json()["version"] == version
        # Another edge may handle each of these requests.
        for _ in range(4 * COUNT_OF_EDGES):
            answer = client.post("/classify", files={"image": photographs["chelsea"]}, data={"label_set": "pets"})
            assert answer.json()["label_set"] == f"pets@{version}"
            assert answer.json()["results"][0]["predictions"][0]["label"] == word


def test_errors_are_those_of_a_single_process(client, photographs):
    bad = client.post(
        "/classify", files=[("image", photographs["chelsea"]), ("image", b"not an image")], data={"labels": "a"}
    )
    assert bad.status_code == 200
    assert bad.json()["results"][1]["error"]["type"] == "urn:deixis:problem:not-an-image"
    unknown = client.post("/classify", files={"image": photographs["chelsea"]}, data={"label_set": "nothing"})
    assert unknown.status_code == 404
    assert unknown.headers["content-type"] == "application/problem+json"
    assert client.get("/nonsense").json()["type"] == "urn:deixis:problem:unknown-route"
    many = client.post("/classify", files=[("image", b"x")] * 65, data={"labels": "a"})
    assert many.status_code == 413


def test_the_page_and_the_probes_respond(client):
    assert "<title>Deixis" in client.get("/").text
    assert client.get("/readyz").json()["status"] == "ready"
    assert [each["name"] for each in client.get("/v1/models").json()["models"]] == ["embedded"]


def test_one_exposition_has_the_metrics_of_every_replica(client, photographs):
    client.post("/classify", files={"image": photographs["chelsea"]}, data={"labels": "a, b"}).raise_for_status()
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    replicas = Counter(each.labels["replica"].partition("/")[0] for each in families["deixis_build_info"].samples)
    assert replicas == {"edge": COUNT_OF_EDGES, "encoder-embedded": 2, "captions-0": 1, "captions-1": 1}
    images = [each for each in families["deixis_batch_size"].samples if each.labels["tower"] == "images"]
    assert {each.labels["replica"].partition("/")[0] for each in images} == {"encoder-embedded"}
    assert sum(each.value for each in images if each.name.endswith("_count")) >= 1


def test_a_trace_continues_in_the_encoder_replicas(client, spans, photographs):
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    request = {"files": {"image": photographs["rocket"]}, "data": {"labels": "a word of this trace, another one"}}
    client.post("/classify", **request, headers={"traceparent": f"00-{trace}-{parent}-01"}).raise_for_status()

    def of_trace():
        found = spans_in(list(spans[1]))
        return {name: [one for one in each if one.trace_id.hex() == trace] for name, each in found.items()}

    until(lambda: len(of_trace().get("encode-remote", [])) >= 2 and of_trace().get("POST /classify"))
    (root,) = of_trace()["POST /classify"]
    remote = of_trace()["encode-remote"]
    assert root.parent_span_id.hex() == parent
    assert {tuple(sorted(each.key for each in span.attributes)) for span in remote} == {
        ("images", "model"),
        ("model", "texts"),
    }


def replicas_of(process, deployment):
    """Return the processes of a deployment's replicas below a server."""
    children: dict[int, list[int]] = {}
    titles: dict[int, str] = {}
    for place in Path("/proc").iterdir():
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(place.name)] = (place / "cmdline").read_text()
            children.setdefault(parent, []).append(int(place.name))
        except (OSError, ValueError):
            continue
    found, below = [], [process.pid]
    while below:
        number = below.pop()
        below += children.get(number, [])
        if f"ServeReplica:deixis:{deployment}" in titles.get(number, ""):
            found.append(number)
    return found


async def responses_during(url, image, data, during, *, at_once=4):
    """Return the responses to continuous requests while ``during`` runs in a thread, with the responses so far."""
    answers, ending = [], asyncio.Event()

    async def send(client):
        while not ending.is_set():
            try:
                answer = await client.post("/classify", files={"image": image}, data=data)
                answers.append((answer.status_code, answer.text))
            except httpx.TransportError as error:
                answers.append((type(error).__name__, ""))

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        senders = [asyncio.create_task(send(client)) for _ in range(at_once)]
        try:
            await asyncio.to_thread(during, answers)
        finally:
            ending.set()
            await asyncio.gather(*senders)
    return answers


def until(condition):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def until_answered(answers, count):
    """Wait for that many further responses."""
    total = len(answers) + count
    until(lambda: len(answers) >= total)


def test_a_killed_encoder_is_replaced_without_failed_requests(on_ray, photographs):
    before = replicas_of(on_ray.process, "encoder-embedded")
    assert len(before) == 2

    def kill(answers):
        until_answered(answers, 4)
        os.kill(before[0], signal.SIGKILL)
        until(lambda: len(set(replicas_of(on_ray.process, "encoder-embedded")) - {before[0]}) == 2)
        until_answered(answers, 8)

    answers = asyncio.run(responses_during(on_ray.url, photographs["chelsea"], {"labels": "cat, dog"}, kill))
    statuses = Counter(status for status, _ in answers)
    # Its calls are repeated on the other encoder.
    assert set(statuses) == {200}, statuses
    assert statuses[200] > 10


MISSING_SHARD = "1 of 2 shards of the caption database 'things'"


def test_responses_have_a_warning_while_a_caption_shard_is_missing(on_ray, photographs):
    (victim,) = replicas_of(on_ray.process, "captions-1")

    def is_complete():
        files = {"image": photographs["chelsea"]}
        answer = httpx.post(f"{on_ray.url}/classify", files=files, data={"database": "things"}, timeout=60)
        return answer.json()["results"][0]["warnings"] == []

    # On a busy machine, a slow shard causes a warning too.
    until(is_complete)

    def kill(answers):
        until_answered(answers, 4)
        os.kill(victim, signal.SIGKILL)
        until(lambda: set(replicas_of(on_ray.process, "captions-1")) - {victim})
        until(lambda: any(MISSING_SHARD in text for _, text in answers))

    answers = asyncio.run(responses_during(on_ray.url, photographs["chelsea"], {"database": "things"}, kill, at_once=2))
    assert {status for status, _ in answers} == {200}, Counter(status for status, _ in answers)
    until(is_complete)


def test_labels_are_found_in_all_caption_shards(client, photographs):
    for name, word in NAMES.items():
        answer = client.post("/classify", files={"image": photographs[name]}, data={"database": "things"})
        assert answer.json()["results"][0]["predictions"][0]["label"] == word


def test_a_killed_edge_loses_only_its_own_requests(on_ray, photographs):
    before = replicas_of(on_ray.process, "edge")
    assert len(before) == COUNT_OF_EDGES

    def kill(answers):
        until_answered(answers, 4)
        os.kill(before[0], signal.SIGKILL)
        until(lambda: len(set(replicas_of(on_ray.process, "edge")) - {before[0]}) == COUNT_OF_EDGES)
        until_answered(answers, 8)

    answers = asyncio.run(responses_during(on_ray.url, photographs["chelsea"], {"labels": "cat, dog"}, kill))
    statuses = Counter(status for status, _ in answers)
    assert statuses[200] > 10
    lost = [(status, text) for status, text in answers if status != 200]
    assert len(lost) <= 4, statuses  # the number of concurrent requests
    for status, text in lost:
        assert status == 503, statuses
        assert json.loads(text)["type"] == "urn:deixis:problem:not-ready"


def test_shared_encoders_load_models_on_demand(tmp_path, photographs):
    second = write_model(tmp_path / "second")
    flags = ("--engine", "ray", "--models", f"embedded,{second}", "--ray-layout", "models_per_encoder=1")
    with serving(*flags, data_dir=tmp_path / "data", forked=False) as running, running.client() as client:
        for model in ("embedded", second, "embedded"):
            query = {"labels": "cat, dog", "model": model}
            answer = client.post("/classify", files={"image": photographs["chelsea"]}, data=query)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == model
        assert len(replicas_of(running.process, "encoder")) == 1


def test_the_rules_for_hosts_and_other_sites_hold(client):
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 421
    page = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert client.delete("/v1/label-sets/none", headers=page).status_code == 403
    assert client.delete("/v1/label-sets/none").status_code == 404


def test_a_request_whose_body_the_proxy_dropped_is_refused(client):
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAB"}
    response = client.post("/v1/classify?labels=a", content=b"any", headers={"Content-Type": "image/png", **offer})
    assert response.status_code == 400
    # The proxy takes the body for a further request, and its response to that may be the first one.
    assert "Content-Length" in response.text or response.text == "Invalid HTTP request received."
