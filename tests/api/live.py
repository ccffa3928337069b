"""The application behind a real socket, for what a test client cannot do: leave, or come in crowds."""

import asyncio
import threading
from contextlib import contextmanager

import uvicorn


@contextmanager
def live(app, **config):
    """Serve in a thread; yields the host and the port. ``config`` is uvicorn's."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=10, **config)
    )
    started = threading.Event()

    async def serve():
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        started.set()
        await serving

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(30)
    try:
        yield server.servers[0].sockets[0].getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join(30)
