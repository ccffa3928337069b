"""Descriptions are written whatever happens: kill -9 loses no answer, and no answered question is asked again."""

import collections
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.settings import Settings
from tests.describing.chat_server import MODEL
from tests.end_to_end.commands import environment
from tests.end_to_end.forked_commands import ForkedCommand, deixis
from tests.end_to_end.server import serving

CLASSES = [f"thing {number}" for number in range(20)]
QUESTIONS = len(CLASSES) * 4
AT_ONCE = Settings.llm_concurrency


class Chat:
    """A chat server in a process of its own, which outlives whoever asks it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self._log = folder / "prompts.log"
        command = [sys.executable, "-m", "tests.describing.chat_server", "--log", self._log, *flags]
        self.process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()

    def prompts(self) -> list[str]:
        return [json.loads(line) for line in self._log.read_text("utf-8").splitlines()]

    def wait_for(self, prompts: int) -> None:
        give_up_at = time.monotonic() + 60
        while len(self.prompts()) < prompts:
            assert time.monotonic() < give_up_at
            time.sleep(0.01)


@pytest.fixture
def chat(tmp_path):
    chat = Chat(tmp_path, "--delay-ms", "20")
    yield chat
    chat.process.kill()
    chat.process.wait()
    chat.process.stdout.close()


@pytest.fixture
def settings(chat):
    return {"DEIXIS_LLM_BASE_URL": chat.url, "DEIXIS_LLM_MODEL": MODEL}


@pytest.fixture
def flags(settings):
    """The settings as flags of `serve`."""
    return [part for name, value in settings.items() for part in (f"--{name[7:].lower().replace('_', '-')}", value)]


def drafts_of(data_dir):
    listed = deixis("drafts", "list", "things", "--all", "--json", data_dir=data_dir)
    assert listed.returncode == 0, listed.stderr
    return json.loads(listed.stdout)


def check_each_question_was_asked_once(chat):
    """But for those that were under way when the asker was killed: nobody got their answers."""
    asked = collections.Counter(chat.prompts())
    assert len(asked) == QUESTIONS
    assert max(asked.values()) <= 2
    assert sum(count - 1 for count in asked.values()) <= AT_ONCE


def test_a_killed_command_resumes_when_it_is_run_again(chat, settings, tmp_path):
    things = tmp_path / "things.txt"
    things.write_text("\n".join(CLASSES))
    assert deixis("label-sets", "import", "things", things, data_dir=tmp_path).returncode == 0
    arguments = ["describe", "things", "--answers", "2", "--yes"]

    killed = ForkedCommand(
        *arguments, env=environment(DEIXIS_DATA_DIR=str(tmp_path), **settings), stderr=subprocess.DEVNULL
    )
    chat.wait_for(QUESTIONS // 2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = drafts_of(tmp_path)
    assert len({each["question"] for each in kept}) >= QUESTIONS // 2 - AT_ONCE - 1

    estimate = deixis("describe", "things", "--answers", "2", "--estimate", data_dir=tmp_path, **settings)
    assert "at most" in estimate.stderr
    done = deixis(*arguments, "--accept", data_dir=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    assert f"{QUESTIONS} questions" in done.stdout
    assert "accepted" in done.stdout

    check_each_question_was_asked_once(chat)
    found = drafts_of(tmp_path)
    assert found[: len(kept)] == [{**each, "status": "accepted", "decided_at": found[0]["decided_at"]} for each in kept]
    assert len(found) == len(CLASSES) * (3 * 2 + 3)
    exported = json.loads(deixis("label-sets", "export", "things", data_dir=tmp_path).stdout)
    assert all(len(each["descriptions"]) == 6 and len(each["features"]) == 3 for each in exported["classes"])


def test_an_interrupted_command_says_how_to_resume(chat, settings, tmp_path):
    assert deixis("label-sets", "import", "animals", data_dir=tmp_path).returncode == 0
    with ForkedCommand(
        *("describe", "animals", "--yes"),
        env=environment(DEIXIS_DATA_DIR=str(tmp_path), **settings),
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        chat.wait_for(4)
        running.send_signal(signal.SIGINT)
        output = running.stderr.read()
    assert running.returncode != 0
    assert "run the command again to resume" in output
    assert "Traceback" not in output


def test_a_job_of_a_killed_server_resumes_when_the_server_is_started_again(chat, flags, tmp_path):
    with serving(*flags, data_dir=tmp_path) as server, server.client() as client:
        client.put("/v1/label-sets/things", json={"classes": CLASSES}).raise_for_status()
        begun = client.post("/v1/label-sets/things/descriptions:generate", json={"answers": 2, "accept": True})
        assert begun.status_code == 202
        chat.wait_for(QUESTIONS // 2)
        half = client.get(begun.headers["location"]).json()
        assert (half["status"], half["total"]) == ("running", QUESTIONS)
        assert half["done"] > 0
        server.signal(signal.SIGKILL)
        server.wait()

    with serving(*flags, data_dir=tmp_path) as server, server.client() as client:
        give_up_at = time.monotonic() + 60
        while not (job := client.get(begun.headers["location"]).json())["finished_at"]:
            assert time.monotonic() < give_up_at, job
            time.sleep(0.1)
        assert job["status"] == "succeeded"
        assert job["result"]["answered_before"] >= half["done"]
        label_set = client.get("/v1/label-sets/things").json()
    assert label_set["version"] == 2
    assert all(len(each["descriptions"]) == 6 and len(each["features"]) == 3 for each in label_set["classes"])
    check_each_question_was_asked_once(chat)


def test_drafts_are_reviewed_through_a_server_too(chat, flags, tmp_path):
    with serving(*flags, data_dir=tmp_path) as server:
        with server.client() as client:
            client.put("/v1/label-sets/things", json={"classes": ["owl", "van"]}).raise_for_status()
        where = ["--server", server.url]

        def run(*arguments, stdin=None):
            return deixis(*arguments, *where, data_dir=tmp_path / "nothing here", stdin=stdin)

        refused = run("describe", "things", stdin="n\n")
        assert refused.returncode == 2
        assert chat.prompts() == []
        done = run("describe", "things", "--answers", "1", "--class", "owl", stdin="y\n")
        assert done.returncode == 0, done.stderr
        assert "4 questions, 0 of them answered earlier: 6 new drafts" in done.stdout
        table = run("drafts", "list", "things")
        assert table.stdout.count("description") == 3
        listed = json.loads(run("drafts", "list", "things", "--json").stdout)
        assert run("drafts", "reject", "things", "--id", listed[0]["id"]).stdout == "rejected 1\n"
        assert run("drafts", "accept", "things").stdout == "accepted 5 into things@2\n"
        nothing = run("drafts", "accept", "things")
        assert (nothing.returncode, nothing.stderr.count("\n")) == (2, 1)
        assert "no draft" in nothing.stderr


def test_without_a_language_model_the_error_says_how_to_set_one(tmp_path):
    deixis("label-sets", "import", "animals", data_dir=tmp_path)
    done = deixis("describe", "animals", "--yes", data_dir=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no language model is set; set DEIXIS_LLM_BASE_URL and DEIXIS_LLM_MODEL")
    assert done.stderr.count("\n") == 1


def test_methods_are_compared_through_a_server(server, photograph_folder, tmp_path):
    with server.client() as client:
        words = sorted({folder.name.replace("_", " ") for folder in photograph_folder.iterdir() if folder.is_dir()})
        classes = [{"name": word, "descriptions": [f"This is a {word}."]} for word in words]
        client.put("/v1/label-sets/words", json={"classes": classes}).raise_for_status()
    arguments = ("evaluate", photograph_folder, "--label-set", "words", "--method", "all", "--json", "-")
    done = deixis(*arguments, "--server", server.url, data_dir=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["images"] == sum(1 for file in photograph_folder.rglob("*.jpg"))
    assert {"zero-shot", "cupl", "dclip", "autoclip"} <= {each["method"] for each in report["methods"]}
    assert report["verdict"]

    inline = deixis("evaluate", photograph_folder, "--method", "all", "--server", server.url, data_dir=tmp_path)
    assert inline.returncode == 2
    assert "--label-set" in inline.stderr
