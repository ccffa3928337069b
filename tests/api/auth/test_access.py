"""Every route with every kind of key: which requests are admitted, and which names each key can see."""

import asyncio
import base64
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fastapi import APIRouter
from fastapi.testclient import TestClient

from app.api.auth.access import ACCESS, NAMESPACE_HEADER, GuardedRoute
from app.api.auth.keys import create_key
from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.names.namespaces import Namespace
from app.settings import Settings
from app.store.database import open_engine
from app.store.keys import Key, KeyRepository
from app.types import Scope
from tests.captions_made import made
from tests.conftest import picture

# Pages and the description of the API, which are public.
PUBLIC = {"/", "/playground/{asset:path}", "/openapi.json", "/docs", "/docs/{asset}"}

JSON = {"Content-Type": "application/json"}
KETTLES = {"classes": ["red", "green"], "templates": "{}"}


@dataclass(frozen=True)
class Call:
    """A request to a route, the status for its owner, and the name that is unknown in another namespace."""

    method: str
    path: str
    status: int
    hidden: str | None = "label set 'kettles'"
    sent: dict = field(default_factory=dict)


def form(**fields):
    return {"files": [("image", ("a.png", picture("red"), "image/png"))], "data": fields}


CALLS = {
    "healthz": Call("GET", "/healthz", 200, None),
    "readyz": Call("GET", "/readyz", 200, None),
    "metrics": Call("GET", "/metrics", 200, None),
    "models": Call("GET", "/v1/models", 200, None),
    "methods": Call("GET", "/v1/methods", 200, None),
    "classify": Call("POST", "/v1/classify", 200, sent=form(label_set="kettles")),
    "zero_shot_image_classification": Call(
        "POST",
        "/v1/zero-shot-image-classification",
        200,
        None,
        {
            "json": {
                "inputs": base64.b64encode(picture("red")).decode(),
                "parameters": {"candidate_labels": ["red", "blue"]},
            }
        },
    ),
    "hugging_face_task": Call("POST", "/", 200, None, {"json": {"inputs": "red"}}),
    "hugging_face_model_task": Call("POST", "/models/fake", 200, None, {"json": {"inputs": ["red"]}}),
    "create_embeddings": Call("POST", "/v1/embeddings", 200, None, {"json": {"input": "red"}}),
    "list_label_sets": Call("GET", "/v1/label-sets", 200, None),
    "get_label_set": Call("GET", "/v1/label-sets/kettles", 200),
    "list_shipped_label_sets": Call("GET", "/v1/shipped-label-sets", 200, None),
    "get_shipped_label_set": Call("GET", "/v1/shipped-label-sets/animals", 200, None),
    "put_label_set": Call("PUT", "/v1/label-sets/new", 201, None, {"json": KETTLES}),
    "delete_label_set": Call("DELETE", "/v1/label-sets/kettles", 204),
    "add_classes": Call("POST", "/v1/label-sets/kettles/classes", 200, sent={"json": {"classes": ["blue"]}}),
    "remove_class": Call("DELETE", "/v1/label-sets/kettles/classes/green", 200),
    "list_images": Call("GET", "/v1/label-sets/kettles/images", 200),
    "get_image": Call("GET", "/v1/label-sets/kettles/images/1", 200),
    "get_image_content": Call("GET", "/v1/label-sets/kettles/images/1/content", 200),
    "add_images": Call("POST", "/v1/label-sets/kettles/images", 201, sent=form(**{"class": "red"})),
    "delete_images": Call("DELETE", "/v1/label-sets/kettles/images?all=true", 200),
    "delete_image": Call("DELETE", "/v1/label-sets/kettles/images/1", 200),
    "get_selection": Call("GET", "/v1/label-sets/kettles/selection", 200),
    "get_thresholds": Call("GET", "/v1/label-sets/kettles/thresholds", 200),
    "set_thresholds": Call(
        "PATCH", "/v1/label-sets/kettles/thresholds", 200, sent={"json": {"thresholds": {"red": 0.5}}}
    ),
    "list_question_sets": Call("GET", "/v1/question-sets", 200, None),
    "estimate_descriptions": Call("POST", "/v1/label-sets/kettles/descriptions:estimate", 501, sent={"json": {}}),
    "generate_descriptions": Call("POST", "/v1/label-sets/kettles/descriptions:generate", 501, sent={"json": {}}),
    "list_drafts": Call("GET", "/v1/label-sets/kettles/descriptions", 200),
    "accept_drafts": Call("POST", "/v1/label-sets/kettles/descriptions:accept", 409, sent={"json": {}}),
    "reject_drafts": Call("POST", "/v1/label-sets/kettles/descriptions:reject", 200, sent={"json": {}}),
    "evaluate_label_set": Call("POST", "/v1/label-sets/kettles:evaluate", 202, sent=form(**{"class": "red"})),
    "list_databases": Call("GET", "/v1/databases", 200, None),
    "get_database": Call("GET", "/v1/databases/puzzles", 200, "caption database 'puzzles'"),
    "build_database": Call("PUT", "/v1/databases/new", 202, None, {"json": {"captions": ["a red ball"]}}),
    "delete_database": Call("DELETE", "/v1/databases/puzzles", 204, "caption database 'puzzles'"),
    "search_database": Call(
        "POST", "/v1/databases/puzzles/search", 200, "caption database 'puzzles'", {"json": {"text": "red"}}
    ),
    "list_jobs": Call("GET", "/v1/jobs", 200, None),
    "get_job": Call("GET", "/v1/jobs/{job}", 200, "job '{job}'"),
    "cancel_job": Call("DELETE", "/v1/jobs/{job}", 409, "job '{job}'"),
}


def answer(client, name, key=None, namespace=None, **more):
    call = CALLS[name]
    headers = ({} if key is None else {"Authorization": f"Bearer {key}"}) | (
        {} if namespace is None else {NAMESPACE_HEADER: namespace}
    )
    return client.request(call.method, call.path.format(job=client.job), headers=headers, **call.sent, **more)


def keys_of(settings, *wanted):
    """Create keys in the database of the settings; return their texts."""

    async def make():
        engine = open_engine(settings.effective_database_url)
        try:
            return [(await create_key(KeyRepository(engine), key))[0] for key in wanted]
        finally:
            await engine.dispose()

    return asyncio.run(make())


def revoke(settings, shown):
    async def work():
        engine = open_engine(settings.effective_database_url)
        try:
            await KeyRepository(engine).revoke(shown.split("_")[1])
        finally:
            await engine.dispose()

    asyncio.run(work())


@dataclass(frozen=True)
class Tenants:
    """A data folder in which acme has a label set with images, a database and a job, and other has nothing."""

    data_dir: Path
    keys: dict
    revoked: str
    job: str


@pytest.fixture(scope="module")
def tenants(tmp_path_factory, empty_database):
    data_dir = tmp_path_factory.mktemp("tenants")
    shutil.copy(empty_database, data_dir)
    settings = Settings(data_dir=data_dir, models=("embedded",), build_default_database=False, keep_images=True)
    scopes = (Scope.METRICS, Scope.CLASSIFY, Scope.WRITE, Scope.ADMIN)
    names = ("acme", "other", "")
    texts = iter(
        keys_of(
            settings,
            *(Key("", scope, Namespace(tenant)) for tenant in names for scope in scopes),
            Key("", Scope.ADMIN, Namespace("acme")),
        )
    )
    keys = {tenant: {scope: next(texts) for scope in scopes} for tenant in names}
    revoked = next(texts)
    revoke(settings, revoked)
    made(settings.effective_captions_dir / "acme#puzzles")
    own = {"Authorization": f"Bearer {keys['acme'][Scope.WRITE]}"}
    with TestClient(create_app(settings, lambda _: [FakeEncoder()]), "http://localhost") as client:
        assert client.put("/v1/label-sets/kettles", json=KETTLES, headers=own).status_code == 201
        images = [
            ("image", (f"{colour}.png", picture(colour), "image/png")) for colour in ("red", "green", "#f00", "#0f0")
        ]
        classes = {"class": ["red", "green", "red", "green"]}
        job = client.post("/v1/label-sets/kettles/images", files=images, data=classes, headers=own).json()["job"]
        deadline = time.monotonic() + 60
        while client.get(f"/v1/jobs/{job}", headers=own).json()["finished_at"] is None:
            assert time.monotonic() < deadline
    return Tenants(data_dir, keys, revoked, job)


@pytest.fixture
def closed(tenants, settings, make_client):
    """A server that requires keys, with its own copy of the tenants' data."""
    shutil.copytree(tenants.data_dir, settings.data_dir, dirs_exist_ok=True)
    client = make_client(keep_images=True)
    client.keys, client.revoked, client.job = tenants.keys, tenants.revoked, tenants.job
    return client


def routes_within(routes):
    for route in routes:
        included = getattr(route, "original_router", None)
        yield from [route] if included is None else routes_within(included.routes)


def test_every_route_has_an_entry_in_the_access_table_and_a_test():
    routes = list(routes_within(create_app(Settings(data_dir="/nowhere")).routes))
    assert {route.path for route in routes if not isinstance(route, GuardedRoute)} == PUBLIC
    assert {route.name for route in routes if isinstance(route, GuardedRoute)} == set(ACCESS) == set(CALLS)


def test_a_route_without_an_entry_cannot_be_created():
    router = APIRouter(route_class=GuardedRoute)
    with pytest.raises(KeyError, match="undecided"):

        @router.get("/undecided")
        def undecided():
            pass


@pytest.mark.parametrize("name", CALLS)
def test_a_route_admits_exactly_the_keys_of_the_access_table(closed, name):
    needed, call = ACCESS[name], CALLS[name]
    acme, other = closed.keys["acme"], closed.keys["other"]
    if needed is None:
        assert answer(closed, name).status_code == answer(closed, name, "nonsense").status_code == call.status
        return
    for key in (None, "nonsense", f"dx_{'0' * 12}_{'a' * 43}", acme[Scope.ADMIN][:-1], closed.revoked):
        reply = answer(closed, name, key)
        assert reply.status_code == 401
        assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert reply.json()["type"] == "urn:deixis:problem:unauthenticated"
    for scope in Scope:
        if not scope.allows(needed):
            reply = answer(closed, name, acme[scope])
            assert reply.status_code == 403
            assert reply.json()["type"] == "urn:deixis:problem:forbidden"
    # Keys of another namespace can neither read nor change it.
    for stranger in (other[Scope.ADMIN], other[Scope.WRITE]):
        if call.hidden is not None and (stranger == other[Scope.ADMIN] or Scope.WRITE.allows(needed)):
            reply = answer(closed, name, stranger)
            assert reply.status_code == 404
            assert f"unknown {call.hidden.format(job=closed.job)}" in reply.json()["detail"]
            assert not {"acme", "kettles; ", "puzzles; "} & set(reply.json()["detail"].split())
        if Scope.WRITE.allows(needed):
            reply = answer(closed, name, other[Scope.WRITE], namespace="acme")
            assert reply.status_code == 403
    if call.hidden is None:
        strangers = answer(closed, name, other[Scope.ADMIN]).text
        assert not [
            word for word in ("kettles", "puzzles", "acme") if word in strangers and needed is not Scope.METRICS
        ]
    reply = answer(closed, name, next(acme[scope] for scope in Scope if scope.allows(needed)))
    assert reply.status_code == call.status, reply.text
    assert "acme" not in reply.text or needed is Scope.METRICS  # those are the operator's


@pytest.mark.parametrize("name", [name for name, needed in ACCESS.items() if needed is not None])
def test_an_admin_key_can_use_every_route_in_every_namespace(closed, name):
    reply = answer(closed, name, closed.keys["other"][Scope.ADMIN], namespace="acme")
    assert reply.status_code == CALLS[name].status, reply.text
    assert "acme" not in reply.text or name == "metrics"


def test_a_key_that_has_used_its_rate_gets_retry_after(settings, make_client):
    one, other = keys_of(
        settings,
        Key("", Scope.CLASSIFY, Namespace(), rate="3/hour", image_rate="2/hour"),
        Key("", Scope.CLASSIFY, Namespace()),
    )
    client = make_client()
    client.job = None

    def classify(key, images):
        files = [("image", ("a.png", picture("red"), "image/png"))] * images
        return client.post("/v1/classify", files=files, data={"labels": "red, green"}, headers={"X-API-Key": key})

    assert classify(one, 2).status_code == 200
    for reply, what in ((classify(one, 1), "images"), (classify(one, 1), "images"), (classify(one, 1), "requests")):
        assert reply.status_code == 429
        assert 1 <= int(reply.headers["Retry-After"]) <= 3600
        assert reply.json()["type"] == "urn:deixis:problem:rate-limited"
        assert f"({what})" in reply.json()["detail"]
    assert classify(other, 3).status_code == 200


def test_the_body_of_an_unauthorized_request_is_not_read(closed):
    sent = []
    app = closed.app

    async def call():
        async def receive():
            raise AssertionError("the body was read")

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "PUT",
            "path": "/v1/label-sets/new",
            "raw_path": b"/v1/label-sets/new",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"9999")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": {},
        }
        await app(scope, receive, send)

    asyncio.run(call())
    assert sent[0]["status"] == 401


def test_folders_and_files_on_the_server_need_an_admin_key(closed):
    own = {"Authorization": f"Bearer {closed.keys['acme'][Scope.WRITE]}"}
    for reply in (
        closed.post("/v1/label-sets/kettles/images", json={"folder": "there"}, headers=own),
        closed.put("/v1/databases/mine", json={"files": ["captions.txt"]}, headers=own),
    ):
        assert reply.status_code == 403
        assert "needs a key of scope admin" in reply.json()["detail"]


def test_the_default_database_is_readable_in_every_namespace_and_not_writable(closed, settings):
    made(settings.effective_captions_dir / "everyday")
    own = {"Authorization": f"Bearer {closed.keys['acme'][Scope.ADMIN]}"}
    listed = [each["name"] for each in closed.get("/v1/databases", headers=own).json()["databases"]]
    assert sorted(listed) == ["everyday", "puzzles"]
    assert closed.post("/v1/databases/everyday/search", json={"text": "red"}, headers=own).status_code == 200
    assert closed.delete("/v1/databases/everyday", headers=own).status_code == 403
    assert closed.put("/v1/databases/everyday", json={"captions": ["x"]}, headers=own).status_code == 403


def test_two_tenants_may_use_the_same_names(closed):
    acme, other = ({"X-API-Key": closed.keys[tenant][Scope.WRITE]} for tenant in ("acme", "other"))
    assert closed.put("/v1/label-sets/kettles", json={"classes": ["blue"]}, headers=other).status_code == 201
    reply = [closed.get("/v1/label-sets/kettles", headers=each).json() for each in (acme, other)]
    assert [[each["name"] for each in label_set["classes"]] for label_set in reply] == [["red", "green"], ["blue"]]
    assert {label_set["name"] for label_set in reply} == {"kettles"}
    assert closed.delete("/v1/label-sets/kettles", headers=other).status_code == 204
    assert closed.get("/v1/label-sets/kettles", headers=acme).json() == reply[0]
    images = {"image": ("a.png", picture("red"), "image/png")}
    answered = closed.post("/v1/classify", files=images, data={"label_set": "kettles"}, headers=acme).json()
    assert answered["label_set"] == f"kettles@{reply[0]['version']}"


def test_pages_of_label_sets_are_contiguous(closed):
    own = {"X-API-Key": closed.keys["acme"][Scope.WRITE]}
    for name in ("a", "b", "z"):
        assert closed.put(f"/v1/label-sets/{name}", json=KETTLES, headers=own).status_code == 201
    seen, after = [], None
    while True:
        page = closed.get(
            "/v1/label-sets", params={"limit": 1} | ({} if after is None else {"after": after}), headers=own
        ).json()
        seen += [each["name"] for each in page["label_sets"]]
        after = page["next_after"]
        if after is None:
            break
    assert seen == ["a", "b", "kettles", "z"]


def test_the_number_of_label_sets_is_limited_per_namespace(make_client):
    client = make_client(max_label_sets=2)

    def put(name, namespace):
        return client.put(f"/v1/label-sets/{name}", json=KETTLES, headers={NAMESPACE_HEADER: namespace})

    assert [put(name, "acme").status_code for name in ("a", "b", "c", "a")] == [201, 201, 413, 200]
    assert put("c", "other").status_code == 201
    assert client.delete("/v1/label-sets/a", headers={NAMESPACE_HEADER: "acme"}).status_code == 204
    assert put("c", "acme").status_code == 201


def test_a_namespace_can_be_named_without_keys(make_client):
    client = make_client()
    assert client.put("/v1/label-sets/a", json=KETTLES, headers={NAMESPACE_HEADER: "acme"}).status_code == 201
    assert client.get("/v1/label-sets/a").status_code == 404
    assert client.get("/v1/label-sets/a", headers={NAMESPACE_HEADER: "acme"}).status_code == 200
    reply = client.get("/v1/label-sets", headers={NAMESPACE_HEADER: "A#b"})
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["field"] == NAMESPACE_HEADER


def test_the_log_has_the_id_of_the_key_and_never_the_key(closed, capsys):
    key = closed.keys["acme"][Scope.CLASSIFY]
    answer(closed, "classify", key)
    line = next(line for line in capsys.readouterr().out.splitlines()[::-1] if "path=/v1/classify" in line)
    reply = [
        f"key={key.split('_')[1]}",
        "namespace=acme",
        "images=1",
        "classifier=",
        "label_set=acme#kettles@",
        "model=fake",
    ]
    assert not [each for each in reply if each not in line]
    assert key.split("_", 2)[2] not in line
