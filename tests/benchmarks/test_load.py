"""The computations of the benchmarks."""

import asyncio
from collections import Counter
from contextlib import asynccontextmanager, suppress
from email import message_from_bytes
from email.policy import HTTP

import pytest

from benchmarks.load import Tally, classify_requests, closed_loop, open_loop, percentile_ms, photographs, summary
from benchmarks.processes import working
from benchmarks.soak import growth

pytestmark = [pytest.mark.anyio, pytest.mark.blocks_event_loop("the load generator encodes photographs")]


@pytest.mark.parametrize(
    ("seconds", "percent", "expected"),
    [([0.3, 0.1, 0.2], 50, 200), ([0.1] * 99 + [9.0], 99, 100), ([0.1] * 98 + [9.0] * 2, 99, 9000), ([], 50, None)],
)
def test_a_percentile_is_the_value_of_the_nearest_rank(seconds, percent, expected):
    assert percentile_ms(seconds, percent) == expected


def test_only_responses_with_status_200_count_as_images():
    tally = Tally()
    for status in (200, 503, 200, 0):
        tally.add(status, 0.5)
    figures = summary(tally, images_per_request=8, seconds=4.0, cpu_s=0.1)
    assert figures["images_per_s"] == 4.0
    assert figures["statuses"] == {"0": 1, "200": 2, "503": 1}


def test_photographs_are_reproducible_and_different():
    assert photographs(3) == photographs(3)
    assert len(set(photographs(3))) == 3


def test_a_request_is_a_complete_form():
    head, _, body = classify_requests(2)[0].partition(b"\r\n\r\n")
    headers = message_from_bytes(head.partition(b"\r\n")[2] + b"\r\n\r\n", policy=HTTP)
    assert int(headers["content-length"]) == len(body)
    form = message_from_bytes(b"Content-Type: " + headers["content-type"].encode() + b"\r\n\r\n" + body, policy=HTTP)
    names = [part.get_param("name", header="content-disposition") for part in form.iter_parts()]
    assert names == ["labels", "image", "image"]


@asynccontextmanager
async def responding(statuses, delay_s=0.0):
    """Serve these statuses in turn; yield the address and the counts of connections and requests."""
    counted, handlers = Counter(), set()

    async def serve(reader, writer):
        handlers.add(asyncio.current_task())
        counted["connections"] += 1
        with suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
                status = statuses[counted["requests"] % len(statuses)]
                counted["requests"] += 1
                await asyncio.sleep(delay_s)
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\n{}" % status)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[:2], counted
    await asyncio.gather(*handlers)


async def test_a_closed_loop_reuses_its_connections_and_counts_every_response():
    async with responding([200, 503, 504]) as (address, counted):
        tally = await closed_loop(address, classify_requests(1), connections=3, seconds=0.3)
    assert counted["connections"] == 3
    assert sum(tally.statuses.values()) == counted["requests"] > 3
    assert set(tally.statuses) == {200, 503, 504}
    assert len(tally.latencies) == tally.statuses[200]


async def test_an_open_loop_measures_latency_from_the_time_a_request_was_due():
    async with responding([200], delay_s=0.2) as (address, counted):
        tally = await open_loop(address, classify_requests(1), rate=50, seconds=0.4)
    assert sum(tally.statuses.values()) == counted["requests"] == 20
    assert min(tally.latencies) >= 0.2


async def test_a_missing_server_counts_as_no_response():
    async with responding([200]) as (address, _):
        pass
    tally = await closed_loop(address, classify_requests(1), connections=1, seconds=0.1)
    assert set(tally.statuses) == {0}


async def test_a_load_generator_that_stays_loaded_answers_one_command_after_another():
    async with responding([200]) as ((host, port), counted):
        with working("benchmarks.load") as load:
            command = (f"http://{host}:{port}", "closed", "--connections", 2, "--seconds", 0.1)
            found = [await asyncio.to_thread(load.ask, *command) for _ in range(2)]
            assert load.process.poll() is None
    assert sum(figures["statuses"]["200"] for figures in found) == counted["requests"]


def test_growth_is_detected_and_warming_up_is_not():
    assert growth([50.0] * 10 + [100.0] * 30) == 0
    assert growth([100.0] * 30 + [120.0] * 10) == pytest.approx(0.2)
