"""Every route with every kind of key: who is let in, and what each sees."""

import asyncio
import base64
from dataclasses import dataclass, field

import pytest
from fastapi import APIRouter

from app.api.auth.access import ACCESS, NAMESPACE_HEADER, GuardedRoute
from app.api.auth.keys import create_key
from app.main import create_app
from app.names.namespaces import Namespace
from app.settings import Settings
from app.store.database import open_engine
from app.store.keys import Key, KeyRepository, Scope
from tests.captions_made import made
from tests.conftest import picture

# Routes of the application that are none of ours: they show the description of the API, which is public.
PUBLIC = {"/", "/playground/{asset}", "/openapi.json", "/docs", "/docs/{asset}"}

JSON = {"Content-Type": "application/json"}
KETTLES = {"classes": ["red", "green"], "templates": "{}"}


@dataclass(frozen=True)
class Call:
    """A request of a route, what answers its owner, and what another namespace is told that is not there."""

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
    "create_embeddings": Call("POST", "/v1/embeddings", 200, None, {"json": {"input": "red"}}),
    "list_label_sets": Call("GET", "/v1/label-sets", 200, None),
    "get_label_set": Call("GET", "/v1/label-sets/kettles", 200),
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
    """Make keys in the database of the settings."""

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


@pytest.fixture
def closed(settings, make_client):
    """A server with two tenants: acme has a label set with an image, a database and a job; other has nothing."""
    scopes = (Scope.METRICS, Scope.CLASSIFY, Scope.WRITE, Scope.ADMIN)
    keys = {}
    for tenant in ("acme", "other", ""):
        made_keys = keys_of(settings, *(Key("", scope, Namespace(tenant)) for scope in scopes))
        keys[tenant] = dict(zip(scopes, made_keys, strict=True))
    made(settings.effective_captions_dir / "acme#puzzles")
    (revoked,) = keys_of(settings, Key("", Scope.ADMIN, Namespace("acme")))
    revoke(settings, revoked)
    client = make_client(keep_images=True)
    client.revoked = revoked
    client.keys = keys
    own = {"Authorization": f"Bearer {keys['acme'][Scope.WRITE]}"}
    assert client.put("/v1/label-sets/kettles", json=KETTLES, headers=own).status_code == 201
    images = [("image", (f"{colour}.png", picture(colour), "image/png")) for colour in ("red", "green", "#f00", "#0f0")]
    added = client.post(
        "/v1/label-sets/kettles/images", files=images, data={"class": ["red", "green", "red", "green"]}, headers=own
    ).json()
    client.job = added["job"]
    while client.get(f"/v1/jobs/{client.job}", headers=own).json()["finished_at"] is None:
        pass
    return client


def routes_within(routes):
    for route in routes:
        included = getattr(route, "original_router", None)
        yield from [route] if included is None else routes_within(included.routes)


def test_every_route_has_a_decision_and_a_row_here():
    routes = list(routes_within(create_app(Settings(data_dir="/nowhere")).routes))
    assert {route.path for route in routes if not isinstance(route, GuardedRoute)} == PUBLIC
    assert {route.name for route in routes if isinstance(route, GuardedRoute)} == set(ACCESS) == set(CALLS)


def test_a_route_without_a_decision_cannot_be_made():
    router = APIRouter(route_class=GuardedRoute)
    with pytest.raises(KeyError, match="undecided"):

        @router.get("/undecided")
        def undecided():
            pass


@pytest.mark.parametrize("name", CALLS)
def test_a_route_lets_in_whom_the_table_lets_in_and_nobody_else(closed, name):
    needed, call = ACCESS[name], CALLS[name]
    acme, other = closed.keys["acme"], closed.keys["other"]
    if needed is None:
        assert answer(closed, name).status_code == answer(closed, name, "nonsense").status_code == call.status
        return
    for key in (None, "nonsense", f"dx_{'0' * 12}_{'a' * 43}", acme[Scope.ADMIN][:-1], closed.revoked):
        told = answer(closed, name, key)
        assert told.status_code == 401
        assert told.headers["WWW-Authenticate"] == "Bearer"
        assert told.json()["type"] == "urn:deixis:problem:unauthenticated"
    for scope in Scope:
        if not scope.allows(needed):
            told = answer(closed, name, acme[scope])
            assert told.status_code == 403
            assert told.json()["type"] == "urn:deixis:problem:forbidden"
    # Nobody finds, or changes, what belongs to another.
    for stranger in (other[Scope.ADMIN], other[Scope.WRITE]):
        if call.hidden is not None and (stranger == other[Scope.ADMIN] or Scope.WRITE.allows(needed)):
            told = answer(closed, name, stranger)
            assert told.status_code == 404
            assert f"unknown {call.hidden.format(job=closed.job)}" in told.json()["detail"]
            assert not {"acme", "kettles; ", "puzzles; "} & set(told.json()["detail"].split())
        if Scope.WRITE.allows(needed):
            told = answer(closed, name, other[Scope.WRITE], namespace="acme")
            assert told.status_code == 403
    if call.hidden is None:
        strangers = answer(closed, name, other[Scope.ADMIN]).text
        assert not [
            word for word in ("kettles", "puzzles", "acme") if word in strangers and needed is not Scope.METRICS
        ]
    told = answer(closed, name, next(acme[scope] for scope in Scope if scope.allows(needed)))
    assert told.status_code == call.status, told.text
    assert "acme" not in told.text or needed is Scope.METRICS  # those are the operator's


@pytest.mark.parametrize("name", [name for name, needed in ACCESS.items() if needed is not None])
def test_an_administrator_may_do_all_of_it_in_every_namespace(closed, name):
    told = answer(closed, name, closed.keys["other"][Scope.ADMIN], namespace="acme")
    assert told.status_code == CALLS[name].status, told.text
    assert "acme" not in told.text or name == "metrics"


def test_a_key_that_is_used_up_is_told_when_to_come_back(settings, make_client):
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
    for told, what in ((classify(one, 1), "images"), (classify(one, 1), "images"), (classify(one, 1), "requests")):
        assert told.status_code == 429
        assert 1 <= int(told.headers["Retry-After"]) <= 3600
        assert told.json()["type"] == "urn:deixis:problem:rate-limited"
        assert f"({what})" in told.json()["detail"]
    assert classify(other, 3).status_code == 200


def test_nothing_of_a_body_is_read_of_whom_is_not_let_in(closed):
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


def test_folders_and_files_of_the_server_are_an_administrators(closed):
    own = {"Authorization": f"Bearer {closed.keys['acme'][Scope.WRITE]}"}
    for told in (
        closed.post("/v1/label-sets/kettles/images", json={"folder": "there"}, headers=own),
        closed.put("/v1/databases/mine", json={"files": ["captions.txt"]}, headers=own),
    ):
        assert told.status_code == 403
        assert "needs a key of scope admin" in told.json()["detail"]


def test_the_operators_database_is_read_by_all_and_changed_by_none_of_them(closed, settings):
    made(settings.effective_captions_dir / "wordnet")
    own = {"Authorization": f"Bearer {closed.keys['acme'][Scope.ADMIN]}"}
    listed = [each["name"] for each in closed.get("/v1/databases", headers=own).json()["databases"]]
    assert listed == ["puzzles", "wordnet"]
    assert closed.post("/v1/databases/wordnet/search", json={"text": "red"}, headers=own).status_code == 200
    assert closed.delete("/v1/databases/wordnet", headers=own).status_code == 403
    assert closed.put("/v1/databases/wordnet", json={"captions": ["x"]}, headers=own).status_code == 403


def test_two_tenants_may_use_the_same_names(closed):
    acme, other = ({"X-API-Key": closed.keys[tenant][Scope.WRITE]} for tenant in ("acme", "other"))
    assert closed.put("/v1/label-sets/kettles", json={"classes": ["blue"]}, headers=other).status_code == 201
    told = [closed.get("/v1/label-sets/kettles", headers=each).json() for each in (acme, other)]
    assert [[each["name"] for each in label_set["classes"]] for label_set in told] == [["red", "green"], ["blue"]]
    assert {label_set["name"] for label_set in told} == {"kettles"}
    assert closed.delete("/v1/label-sets/kettles", headers=other).status_code == 204
    assert closed.get("/v1/label-sets/kettles", headers=acme).json() == told[0]
    images = {"image": ("a.png", picture("red"), "image/png")}
    answered = closed.post("/v1/classify", files=images, data={"label_set": "kettles"}, headers=acme).json()
    assert answered["label_set"] == f"kettles@{told[0]['version']}"


def test_a_page_of_label_sets_ends_where_the_next_begins(closed):
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


def test_each_namespace_has_room_for_so_many_label_sets(make_client):
    client = make_client(max_label_sets=2)

    def put(name, namespace):
        return client.put(f"/v1/label-sets/{name}", json=KETTLES, headers={NAMESPACE_HEADER: namespace})

    assert [put(name, "acme").status_code for name in ("a", "b", "c", "a")] == [201, 201, 413, 200]
    assert put("c", "other").status_code == 201
    assert client.delete("/v1/label-sets/a", headers={NAMESPACE_HEADER: "acme"}).status_code == 204
    assert put("c", "acme").status_code == 201


def test_where_no_key_is_needed_a_namespace_may_still_be_named(make_client):
    client = make_client()
    assert client.put("/v1/label-sets/a", json=KETTLES, headers={NAMESPACE_HEADER: "acme"}).status_code == 201
    assert client.get("/v1/label-sets/a").status_code == 404
    assert client.get("/v1/label-sets/a", headers={NAMESPACE_HEADER: "acme"}).status_code == 200
    told = client.get("/v1/label-sets", headers={NAMESPACE_HEADER: "A#b"})
    assert told.status_code == 422
    assert told.json()["errors"][0]["field"] == NAMESPACE_HEADER


def test_the_log_tells_which_key_asked_what_and_never_the_key(closed, capsys):
    key = closed.keys["acme"][Scope.CLASSIFY]
    answer(closed, "classify", key)
    line = next(line for line in capsys.readouterr().out.splitlines()[::-1] if "path=/v1/classify" in line)
    told = [
        f"key={key.split('_')[1]}",
        "namespace=acme",
        "images=1",
        "classifier=",
        "label_set=acme#kettles@",
        "model=fake",
    ]
    assert not [each for each in told if each not in line]
    assert key.split("_", 2)[2] not in line
