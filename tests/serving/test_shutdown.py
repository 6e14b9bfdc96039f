"""A stopping server closes every connection, also those that it has accepted a moment before."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import pytest
from fastapi import FastAPI

from addenda.serving.server import ConnectionServer, bind
from tests.support.places import ROOT


@pytest.mark.parametrize("own", [True, False], ids=["accepted-by-the-server", "accepted-by-others"])
def test_a_connection_accepted_just_before_the_shutdown_is_closed_at_once(
    own: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def stop() -> None:
        server = ConnectionServer(FastAPI(), stop_s=2)
        running = asyncio.ensure_future(server.serve([bind("127.0.0.1", 0)]))
        while not server.started:
            await asyncio.sleep(0.01)
        if own:
            client = socket.create_connection(server.servers[0].sockets[0].getsockname())
            await asyncio.sleep(0)  # the next turn of the event loop accepts it
        else:
            client, accepted = socket.socketpair()
            server.serve_connection(accepted)
        client.setblocking(False)
        await server.shutdown()
        with client, suppress(ConnectionResetError):  # it was not accepted yet
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1), 30) == b""
        server.should_exit = True
        await running

    asyncio.run(stop())
    assert "timeout graceful shutdown exceeded" not in caplog.text


@pytest.mark.slow
def test_a_signal_during_the_start_ends_the_process_at_once() -> None:
    script = (
        "import asyncio, contextlib, time\n"
        "from fastapi import FastAPI\n"
        "from addenda.serving.server import Server, bind\n"
        "@contextlib.asynccontextmanager\n"
        "async def lifespan(app):\n"
        "    print('starting', flush=True)\n"
        "    time.sleep(60)\n"
        "    yield\n"
        "app = FastAPI(lifespan=lifespan)\n"
        "app.state.draining = False\n"
        "asyncio.run(Server(app, drain_s=5, stop_s=2).serve([bind('127.0.0.1', 0)]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM


@pytest.mark.slow
def test_requests_for_websockets_are_not_logged_and_failures_not_twice() -> None:
    script = (
        "import asyncio\n"
        "from fastapi import FastAPI\n"
        "from addenda.serving.server import Server, bind, log_as_json\n"
        "app = FastAPI()\n"
        "app.state.draining = False\n"
        "@app.get('/fails')\n"
        "async def fails():\n"
        "    raise RuntimeError('at once')\n"
        "async def ask():\n"
        "    started = asyncio.Event()\n"
        "    server = Server(app, drain_s=0, stop_s=2, on_start=started.set)\n"
        "    running = asyncio.ensure_future(server.serve([bind('127.0.0.1', 0)]))\n"
        "    await started.wait()\n"
        "    host, port = server.servers[0].sockets[0].getsockname()\n"
        "    upgrade = b'Upgrade: websocket\\r\\nConnection: Upgrade'\n"
        "    for request in (b'GET / HTTP/1.1\\r\\n' + upgrade, b'GET /fails HTTP/1.1'):\n"
        "        reader, writer = await asyncio.open_connection(host, port)\n"
        "        writer.write(request + b'\\r\\nHost: localhost\\r\\n\\r\\n')\n"
        "        print((await reader.readline()).decode().strip(), flush=True)\n"
        "        writer.close()\n"
        "    server.should_exit = True\n"
        "    await running\n"
        "log_as_json('info')\n"
        "asyncio.run(ask())\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines() == ["HTTP/1.1 404 Not Found", "HTTP/1.1 500 Internal Server Error"], ended.stderr
    assert "WebSocket" not in ended.stderr
    assert "Exception in ASGI application" not in ended.stderr
