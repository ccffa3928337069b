"""Descriptions over HTTP: asked for, followed, reviewed, accepted."""

import time

import pytest

from tests.api.problems import fields_of, problem_of
from tests.describing.chat_server import MODEL, ChatServer, answer_to, failing, slow


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def described(make_client):
    """A function that starts the application beside a chat server, with a label set of two classes."""

    def start(server):
        client = make_client(llm_base_url=server.url, llm_model=MODEL)
        client.put("/v1/label-sets/pets", json={"classes": ["cat", "owl"]}).raise_for_status()
        return client

    return start


AT = "/v1/label-sets/pets/descriptions"


def expect_problem(answer, status, slug):
    problem = problem_of(answer, slug)
    assert problem["status"] == status
    return problem


def ended(client, answer):
    """Return the job of an answer when it has finished."""
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    give_up_at = time.monotonic() + 20
    while time.monotonic() < give_up_at:
        job = client.get(answer.headers["location"]).json()
        if job["finished_at"]:
            return job
        time.sleep(0.01)
    raise AssertionError(job)


def test_from_the_question_to_the_answer(described):
    with ChatServer() as server:
        client = described(server)
        begun = client.post(f"{AT}:generate", json={"answers": 2, "features": False})
        assert {key: begun.json()[key] for key in ("kind", "label_set", "result", "error")} == {
            "kind": "describe",
            "label_set": "pets",
            "result": None,
            "error": None,
        }
        job = ended(client, begun)
    assert (job["status"], job["done"], job["total"]) == ("succeeded", 6, 6)
    assert job["result"]["new_drafts"] == 12

    page = client.get(AT, params={"class": "cat", "limit": 4}).json()
    assert len(page["drafts"]) == 4
    rest = client.get(AT, params={"class": "cat", "after": page["next_after"]}).json()
    assert (len(rest["drafts"]), rest["next_after"]) == (2, None)
    first = page["drafts"][0]
    assert {"class": "cat", "kind": "description", "status": "draft", "model": MODEL}.items() <= first.items()
    assert first["text"] == answer_to(first["question"], 0)
    assert "a cat" in first["question"]

    assert client.post(f"{AT}:reject", json={"ids": [first["id"]]}).json() == {"rejected": 1}
    accepted = client.post(f"{AT}:accept", json={})
    assert accepted.json()["accepted"] == 11
    assert accepted.headers["etag"] == '"2"'
    assert accepted.json()["label_set"] == client.get("/v1/label-sets/pets").json()
    cat, owl = accepted.json()["label_set"]["classes"]
    assert (len(cat["descriptions"]), len(owl["descriptions"])) == (5, 6)
    assert first["text"] not in cat["descriptions"]
    statuses = [each["status"] for each in client.get(AT).json()["drafts"]]
    assert (statuses.count("accepted"), statuses.count("rejected")) == (11, 1)
    assert len(client.get(AT, params={"status": "rejected"}).json()["drafts"]) == 1


def test_an_estimate_asks_nothing(described):
    with ChatServer() as server:
        estimated = described(server).post(f"{AT}:estimate", json={"answers": 5, "questions": "base"})
        assert server.prompts == []
    assert estimated.json()["requests"] == 2 * (3 * 5 + 1)
    assert set(estimated.json()) == {"requests", "prompt_tokens", "completion_tokens"}


def test_without_a_language_model_the_answer_tells_how_to_set_one(client):
    client.put("/v1/label-sets/pets", json={"classes": ["cat"]})
    for action in ("generate", "estimate"):
        problem = expect_problem(client.post(f"{AT}:{action}", json={}), 501, "not-configured")
        assert "DEIXIS_LLM_BASE_URL" in problem["detail"]
    assert client.get("/v1/jobs").json() == {"jobs": [], "next_after": None}


@pytest.mark.parametrize(
    ("body", "status", "slug"),
    [
        ({"question_set": "fish"}, 404, "unknown-name"),
        ({"classes": ["dog"]}, 404, "unknown-name"),
        ({"sentences": False, "features": False}, 422, "invalid-field"),
        ({"answers": 0}, 422, "invalid-field"),
        ({"answers": 51}, 422, "invalid-field"),
        ({"questions": "some"}, 422, "invalid-field"),
        ({"classes": []}, 422, "invalid-field"),
        ({"nonsense": 1}, 422, "invalid-field"),
    ],
)
def test_an_invalid_request_starts_no_job(described, body, status, slug):
    with ChatServer() as server:
        client = described(server)
        for action in ("generate", "estimate"):
            expect_problem(client.post(f"{AT}:{action}", json=body), status, slug)
        assert client.get("/v1/jobs").json()["jobs"] == []


def test_label_sets_drafts_and_jobs_that_there_are_not_are_unknown(described):
    with ChatServer() as server:
        client = described(server)
        for answer in (
            client.post("/v1/label-sets/cars/descriptions:generate", json={}),
            client.get("/v1/label-sets/cars/descriptions"),
            client.post(f"{AT}:accept", json={"ids": [7]}),
            client.post(f"{AT}:reject", json={"ids": [7]}),
            client.get("/v1/jobs/7"),
            client.delete("/v1/jobs/7"),
            client.get("/v1/jobs", params={"after": "7"}),
        ):
            expect_problem(answer, 404, "unknown-name")
        expect_problem(client.post(f"{AT}:accept", json={}), 409, "conflict")
        assert fields_of(client.get(AT, params={"status": "good"})) == {"status"}


def test_drafts_are_accepted_into_the_version_that_was_seen(described):
    with ChatServer() as server:
        client = described(server)
        ended(client, client.post(f"{AT}:generate", json={"answers": 1, "features": False}))
    expect_problem(client.post(f"{AT}:accept", json={}, headers={"If-Match": '"7"'}), 412, "precondition-failed")
    assert client.post(f"{AT}:accept", json={}, headers={"If-Match": '"1"'}).status_code == 200


def test_a_failed_job_tells_what_to_mend_and_can_be_begun_again(described):
    with ChatServer([failing(404, "no such model")]) as server:
        client = described(server)
        failed = ended(client, client.post(f"{AT}:generate", json={"answers": 1}))
        assert failed["status"] == "failed"
        assert "DEIXIS_LLM_MODEL" in failed["error"]
        again = ended(client, client.post(f"{AT}:generate", json={"answers": 1, "accept": True}))
    assert again["status"] == "succeeded"
    assert again["result"]["label_set"] == "pets@2"
    assert [job["id"] for job in client.get("/v1/jobs").json()["jobs"]] == [again["id"], failed["id"]]
    page = client.get("/v1/jobs", params={"limit": 1}).json()
    assert [job["id"] for job in page["jobs"]] == [again["id"]]
    rest = client.get("/v1/jobs", params={"after": page["next_after"]}).json()
    assert ([job["id"] for job in rest["jobs"]], rest["next_after"]) == ([failed["id"]], None)


def test_a_job_can_be_cancelled_once(described):
    with ChatServer(afterwards=slow()) as server:
        client = described(server)
        begun = client.post(f"{AT}:generate", json={})
        assert server.received_one.wait(10)
        cancelled = client.delete(begun.headers["location"])
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
        expect_problem(client.delete(begun.headers["location"]), 409, "conflict")
        server.release.set()
    assert ended(client, begun)["status"] == "cancelled"


def test_the_sets_of_questions_are_listed(client):
    sets = {each["name"]: each for each in client.get("/v1/question-sets").json()["question_sets"]}
    assert {"general", "birds", "food"} <= set(sets)
    assert all("{a_name}" in question or "{name}" in question for question in sets["birds"]["base"])
