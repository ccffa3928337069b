"""`deixis label-studio` as a process, before a real service."""

import base64
import signal
import subprocess

import httpx
import pytest

from tests.end_to_end.commands import environment
from tests.end_to_end.forked_commands import ForkedCommand

CONFIG = (
    '<View><Image name="photo" value="$image"/><Choices name="what" toName="photo">'
    '<Choice value="Cat" alias="felis"/><Choice value="Coffee cup"/><Choice value="Rocket"/></Choices></View>'
)


@pytest.fixture
def backend(server):
    process = ForkedCommand(
        *("label-studio", "--port", "0", "--server", server.url),
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line.startswith("listens on http://127.0.0.1:"), process.communicate()
    yield line.split()[-1]
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode in {0, -signal.SIGTERM}
    assert "Traceback" not in log


def test_photographs_are_predicted_with_the_choices_of_the_project(backend, photographs):
    names = ("chelsea", "coffee", "rocket")
    encoded = [base64.b64encode(photographs[name]).decode() for name in names]
    tasks = [{"id": at, "data": {"image": f"data:image/jpeg;base64,{each}"}} for at, each in enumerate(encoded)]
    body = {"tasks": tasks, "project": "1.2", "label_config": CONFIG, "params": {"context": None}}
    with httpx.Client(base_url=backend, timeout=60) as client:
        assert client.get("/health").json()["status"] == "UP"
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 421
        version = client.post("/setup", json={"project": "1.2", "schema": CONFIG}).json()["model_version"]
        results = client.post("/predict", json=body).json()["results"]
    assert [each["result"][0]["value"]["choices"] for each in results] == [["felis"], ["Coffee cup"], ["Rocket"]]
    assert {each["model_version"] for each in results} == {version}
    assert version.startswith("deixis embedded ")


def test_other_machines_need_a_login(server):
    process = ForkedCommand(
        *("label-studio", "--host", "0.0.0.0", "--port", "0", "--server", server.url),
        env=environment(PYTHONUNBUFFERED="1", BASIC_AUTH_USER="studio", BASIC_AUTH_PASS="s3cret"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        port = process.stdout.readline().strip().rpartition(":")[2]
        address = f"http://127.0.0.1:{port}/health"
        assert httpx.get(address).status_code == 401
        assert httpx.get(address, auth=("studio", "s3cret")).json()["status"] == "UP"
    finally:
        process.kill()
        process.communicate(timeout=60)
