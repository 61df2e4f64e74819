"""A server that speaks as ComfyUI does where `calibquant queue` listens, and misbehaves on request.

A job's node 1 says by its input ``kind`` what becomes of it: ok, fails, crash (the server goes down while it runs),
bad (refused), half (refused in part), explodes (the core's own error 500).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import WSMsgType, web

WORK = 0.03  # seconds a job takes
AWAY = 0.2  # seconds a crashed server takes to start again
BAD = {"errors": [{"message": "Value not in list", "details": "kind: 'bad'"}], "class_type": "Work"}


class FakeComfy:
    """Runs in a thread of its own from `with` to its end. Counts what it ran and how much waited at most."""

    def __init__(
        self, drops: int = 0, forgets: int = 0, mints: bool = False, deaf: bool = False, stuck: bool = False
    ) -> None:
        """drops: connections broken after a job was taken; forgets: jobs missing in the history; mints: own ids, as
        old cores; deaf: no websocket; stuck: jobs do not end as long as this is set."""
        self.drops, self.forgets, self.mints, self.deaf, self.stuck = drops, forgets, mints, deaf, stuck
        self.ran: Counter[str] = Counter()
        self.most = 0
        self.port = 0
        self.pending: list[tuple[str, dict[str, Any]]] = []
        self.running: list[tuple[str, dict[str, Any]]] = []
        self.history: dict[str, Any] = {}
        self._sockets: list[web.WebSocketResponse] = []
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeComfy:
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.call(self.up())
        self._work = asyncio.run_coroutine_threadsafe(self._execute(), self._loop)
        return self

    def __exit__(self, *_: object) -> None:
        self._work.cancel()
        self.call(self.down())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def later(self, seconds: float, what: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        def start() -> None:
            self._loop.call_later(seconds, lambda: self._loop.create_task(what()))

        self._loop.call_soon_threadsafe(start)

    def call(self, what: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(10)

    async def up(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.get("/ws", self._ws),
                web.get("/queue", self._queue),
                web.get("/history/{id}", self._history),
                web.post("/prompt", self._prompt),
                web.post("/queue", self._delete),
                web.post("/interrupt", self._interrupt),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def down(self) -> None:
        """Everything in memory is lost, as when the process ends."""
        self.pending, self.running, self.history = [], [], {}
        for socket in self._sockets:
            with contextlib.suppress(Exception):
                await socket.close()
        self._sockets = []
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = None

    # --- what it does

    async def _execute(self) -> None:
        while True:
            await asyncio.sleep(0.005)
            if not self.pending or self._runner is None:
                continue
            prompt_id, graph = self.pending.pop(0)
            self.running = [(prompt_id, graph)]
            kind, label = graph["1"]["inputs"]["kind"], str(graph["1"]["inputs"])
            await self._tell("status", {})
            await self._tell("executing", {"node": "1", "prompt_id": prompt_id})
            await self._tell("progress", {"node": "1", "prompt_id": prompt_id, "value": 1, "max": 2})
            end = self._loop.time() + WORK
            while self.running and (self.stuck or self._loop.time() < end):
                await asyncio.sleep(0.005)
            if not self.running:  # went down meanwhile, or was interrupted
                continue
            self.ran[label] += 1
            if kind == "crash":
                await self.down()
                await asyncio.sleep(AWAY)
                await self.up()
                continue
            self._finish(prompt_id, label, kind)
            await self._tell("status", {})

    def _finish(self, prompt_id: str, label: str, kind: str) -> None:
        self.running = []
        if self.forgets:
            self.forgets -= 1
            return
        error = {"node_id": "1", "node_type": "Work", "exception_message": "out of memory\nmore", "timestamp": 3000}
        messages = [["execution_start", {"timestamp": 1000}], ["execution_success", {"timestamp": 3500}]]
        if kind == "fails":
            messages[1] = ["execution_error", error]
        status = {"status_str": "error" if kind == "fails" else "success", "messages": messages}
        picture = {"filename": "a.png", "subfolder": "x", "type": "output"}
        self.history[prompt_id] = {"status": status, "outputs": {"1": {"text": [label], "images": [picture]}}}

    async def _tell(self, kind: str, data: dict[str, Any]) -> None:
        for socket in self._sockets:
            with contextlib.suppress(Exception):
                await socket.send_json({"type": kind, "data": data})

    # --- its routes

    async def _ws(self, request: web.Request) -> web.StreamResponse:
        if self.deaf:
            raise web.HTTPNotFound
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self._sockets.append(socket)
        await socket.send_str("no JSON")  # is passed over
        async for message in socket:
            if message.type is WSMsgType.ERROR:
                break
        return socket

    async def _queue(self, _: web.Request) -> web.Response:
        parts = {"queue_running": self.running, "queue_pending": self.pending}
        return web.json_response({k: [[0, *item, {}, []] for item in part] for k, part in parts.items()})

    async def _history(self, request: web.Request) -> web.Response:
        found = request.match_info["id"]
        return web.json_response({found: self.history[found]} if found in self.history else {})

    async def _prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        kind = body["prompt"]["1"]["inputs"]["kind"]
        if kind == "explodes":
            raise web.HTTPInternalServerError
        if kind == "bad":
            return web.json_response({"error": {"message": "all failed"}, "node_errors": {"1": BAD}}, status=400)
        prompt_id = str(uuid.uuid4()) if self.mints else body["prompt_id"]
        self.pending.append((prompt_id, body["prompt"]))
        self.most = max(self.most, len(self.pending) + len(self.running))
        if self.drops:
            self.drops -= 1
            request.transport.abort()
        return web.json_response({"prompt_id": prompt_id, "node_errors": {"1": BAD} if kind == "half" else {}})

    async def _delete(self, request: web.Request) -> web.Response:
        gone = (await request.json())["delete"]
        self.pending = [item for item in self.pending if item[0] not in gone]
        return web.Response()

    async def _interrupt(self, request: web.Request) -> web.Response:
        if [item[0] for item in self.running] == [(await request.json())["prompt_id"]]:
            self.running = []
        return web.Response()
