"""Names without labels from a real server: databases of the command line, and a build that outlives kill -9."""

import signal
import time

from tests.captions.cased.test_lexicon import installed
from tests.end_to_end.forked_commands import deixis
from tests.end_to_end.server import serving

pytestmark = installed

# What each photograph shows is there twice at least, so that its word counts; the others are no word of theirs.
CAPTIONS = """
a tabby cat on a sofa
the face of a cat with green eyes
a cat and its kitten
a cup of coffee on a saucer
black coffee with a spoon
coffee is poured into a cup
a rocket on its launch pad
the launch of a rocket at night
a rocket above the clouds
an astronaut in a space suit
the portrait of an astronaut beside a flag
an astronaut on the moon
an old temple with a curved roof
a temple and its palace court
a red flower in a garden
a flower with yellow petals
"""
NAMES = {"chelsea": "cat", "coffee": "coffee", "rocket": "rocket", "flower": "flower"}
WAIT_S = 90


def test_a_database_of_the_command_line_names_photographs_for_a_server_that_runs_already(tmp_path, photographs):
    with serving(data_dir=tmp_path) as server, server.client() as client:
        refused = client.post("/v1/classify", files={"image": photographs["chelsea"]})
        assert refused.status_code == 501
        assert "deixis captions build" in refused.json()["detail"]
        built = deixis("captions", "build", "-", "--name", "things", data_dir=tmp_path, stdin=CAPTIONS)
        assert built.returncode == 0, built.stderr
        assert "16" in built.stdout
        for name, word in NAMES.items():
            told = client.post("/v1/classify", files={"image": photographs[name]}, data={"explain": "true"})
            assert told.status_code == 200, told.text
            (result,) = told.json()["results"]
            assert result["predictions"][0]["label"] == word
            assert word in result["explanation"]["captions"][0]["suggested"]
        images = [("image", (name, photographs[name])) for name in NAMES]
        grouped = client.post("/v1/classify", files=images, data={"group": "true"}).json()
        assert [each["predictions"][0]["label"] for each in grouped["results"]] == list(NAMES.values())


def finished(client, job):
    deadline = time.monotonic() + WAIT_S
    while (told := client.get(f"/v1/jobs/{job}").json())["finished_at"] is None:
        assert time.monotonic() < deadline, told
        time.sleep(0.2)  # there is nothing to wait for but the answer
    return told


def test_a_build_that_was_acknowledged_is_finished_by_the_process_that_comes_after_kill_9(tmp_path):
    captions = [f"{line} number {number}" for number in range(100) for line in CAPTIONS.split("\n") if line]
    with serving(data_dir=tmp_path) as server, server.client() as client:
        answer = client.put("/v1/databases/many", json={"captions": captions})
        assert answer.status_code == 202
        job = answer.json()["id"]
        server.signal(signal.SIGKILL)
        server.wait()
    with serving(data_dir=tmp_path) as server, server.client() as client:
        assert client.get("/v1/databases/many").status_code == 404
        server.signal(signal.SIGKILL)
        server.wait()
    with serving(data_dir=tmp_path) as server, server.client() as client:
        told = finished(client, job)
        assert (told["status"], told["result"]["captions"]) == ("succeeded", len(captions))
        found = client.post("/v1/databases/many/search", json={"text": "a rocket on its launch pad number 7"}).json()
        assert found["results"][0]["caption"] == "a rocket on its launch pad number 7"
