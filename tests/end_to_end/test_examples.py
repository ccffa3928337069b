"""Example images of a real server: there after kill -9, learned from by the next process, and never their pixels."""

import hashlib
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data

from tests.conftest import photograph
from tests.end_to_end.server import serving

# Words that say nothing of the photographs, so that whatever is right was learned from the examples.
PHOTOGRAPHS = {"yours": skimage.data.chelsea, "mine": skimage.data.coffee, "theirs": skimage.data.rocket}
IMAGES = "/v1/label-sets/things/images"
SENT_AT_ONCE = 9
WAIT_S = 45


def views(pixels: np.ndarray, count: int, seed: int) -> list[bytes]:
    """Return crops of four fifths of a photograph, every other one flipped."""
    rng = np.random.default_rng(seed)
    height, width = (4 * side // 5 for side in pixels.shape[:2])
    cut = []
    for number in range(count):
        top, left = (
            int(rng.integers(0, side - kept)) for side, kept in zip(pixels.shape, (height, width), strict=False)
        )
        view = pixels[top : top + height, left : left + width]
        cut.append(photograph(view[:, ::-1] if number % 2 else view))
    return cut


@pytest.fixture(scope="module")
def examples() -> list[tuple[bytes, str]]:
    """Nine views of each photograph with its class, the three taking turns."""
    by_class = {name: views(load(), 9, seed=0) for name, load in PHOTOGRAPHS.items()}
    return [(by_class[name][number], name) for number in range(9) for name in PHOTOGRAPHS]


def holding(folder: Path, piece: bytes) -> list[str]:
    """Return the files of a folder that have a piece in them."""
    return [file.name for file in folder.rglob("*") if file.is_file() and piece in file.read_bytes()]


def test_examples_that_were_acknowledged_outlive_kill_9_and_are_learned_from_by_the_next_process(tmp_path, examples):
    with serving(data_dir=tmp_path) as server, server.client() as client:
        client.put("/v1/label-sets/things", json={"classes": list(PHOTOGRAPHS)}).raise_for_status()
        for first in range(0, len(examples), SENT_AT_ONCE):
            some = examples[first : first + SENT_AT_ONCE]
            answer = client.post(
                IMAGES,
                files=[("image", (f"{number}.jpg", image)) for number, (image, _) in enumerate(some)],
                data={"class": [name for _, name in some]},
            )
            assert answer.status_code == 201, answer.text
        server.signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        logs = list(server.log)
    acknowledged = answer.json()
    assert acknowledged["counts"]["labelled"] == dict.fromkeys(PHOTOGRAPHS, 9)

    with serving(data_dir=tmp_path) as server, server.client() as client:
        page = client.get(IMAGES).json()
        assert page["counts"] == acknowledged["counts"]
        assert [(each["sha256"], each["class"]) for each in page["images"]] == [
            (hashlib.sha256(image).hexdigest(), name) for image, name in examples
        ]

        # The job of the dead process is taken over once nobody has heard of that for a while.
        give_up_at = time.monotonic() + WAIT_S
        while not (job := client.get(f"/v1/jobs/{acknowledged['job']}").json())["finished_at"]:
            assert time.monotonic() < give_up_at, job
            time.sleep(0.2)
        assert job["status"] == "succeeded", job
        selection = client.get("/v1/label-sets/things/selection").json()
        assert (selection["current"], selection["labelled"]) == (True, len(examples))
        assert selection["method"] != "zero-shot"

        for name, load in PHOTOGRAPHS.items():
            (unseen,) = views(load(), 1, seed=1)
            told = client.post(
                "/classify", files={"image": unseen}, data={"label_set": "things", "method": "auto", "coverage": "0.9"}
            ).json()
            assert (told["method"], told["examples"]["labelled"]) == (selection["method"], len(examples))
            assert told["results"][0]["predictions"][0]["label"] == name
            assert name in told["results"][0]["prediction_set"]
        logs += server.log

    for image, _ in examples[:3]:
        piece = image[len(image) // 2 :][:32]
        assert holding(tmp_path, piece) == []
        assert not any(repr(piece)[2:-1] in line or piece.hex() in line for line in logs)
