"""One ComfyUI server over plain HTTP and its websocket; every core since 2023 serves these routes.

The websocket only wakes and tells progress: what became of a job is asked of ``/queue`` and ``/history``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import CalibQuantError, OptionError
from .workflow import Graph, Job

if TYPE_CHECKING:
    import aiohttp

ANSWER = 60.0  # seconds; a core busy with rounding answers late
RECONNECT = 1.0


class UnreachableError(Exception):
    """The server does not answer, or not as ComfyUI does; it may come back."""


class RefusedError(Exception):
    """The server does not take the job; the message has a line for each reason."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended; error is "" when all went well."""

    seconds: float | None = None
    results: list[str] = field(default_factory=list)
    error: str = ""


class Queued:
    """The job waits or runs."""


def load_aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError as e:
        raise CalibQuantError("calibquant queue needs aiohttp: pip install aiohttp") from e
    return aiohttp


def address(text: str) -> str:
    """A server's address as all parts of the program write it."""
    url = (text if "://" in text else f"http://{text}").rstrip("/")
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # of the port
        known = False
    if not known or parts.query or parts.fragment:
        raise OptionError(f"--server {text}: is no address: write it as http://HOST:8188")
    return url


class Server:
    """A ComfyUI server. Raises UnreachableError wherever it does not answer."""

    def __init__(self, url: str, session: aiohttp.ClientSession, poll: float = 5.0) -> None:
        self.url, self.gone = url, False  # gone: given up
        self.ran: set[str] = set()  # prompt ids that were seen at work
        self._session, self._poll = session, poll
        self._client = uuid.uuid4().hex
        self._waiting: dict[str, tuple[Job, asyncio.Event]] = {}  # by prompt id
        self._doing: dict[str, str] = {}

    def doing(self) -> list[str]:
        """The node that each running job is at, and how far."""
        return list(self._doing.values())

    async def check(self) -> None:
        """UnreachableError unless a ComfyUI answers there."""
        await self._queue()

    async def back(self, patience: float) -> bool:
        """Wait until it answers again; False when it did not in so many seconds."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            with contextlib.suppress(UnreachableError):
                await self.check()
                return True
            await asyncio.sleep(min(self._poll, max(0.0, end - time.monotonic())))
        return False

    async def submit(self, graph: Graph, prompt_id: str) -> str:
        """Queue it; the id the server gives it, which old cores make up themselves. RefusedError."""
        body = {"prompt": graph, "prompt_id": prompt_id, "client_id": self._client}
        status, answer = await self._ask("POST", "/prompt", json=body)
        reasons = _reasons(answer)
        given = answer.get("prompt_id") if isinstance(answer, dict) else None
        if status == 200 and isinstance(given, str):
            if reasons:  # ComfyUI would run what is left of the graph and call that a success
                await self.cancel([given])
                raise RefusedError("\n".join(reasons))
            return given
        raise RefusedError("\n".join(reasons) or f"the server answers {status} to the job")

    async def find(self, prompt_id: str) -> Outcome | type[Queued] | None:
        """How it ended, Queued, or None when the server does not know it (any more)."""
        # The queue first: a job that has left it since is in the history by then.
        if prompt_id in await self._queue():
            return Queued
        history = await self._get(f"/history/{prompt_id}")
        try:
            return _outcome(history[prompt_id]) if prompt_id in history else None
        except (AttributeError, KeyError, TypeError, IndexError) as e:
            raise UnreachableError("is no ComfyUI") from e

    async def wait(self, job: Job, prompt_id: str) -> Outcome | None:
        """Wait for its end; None when the server has lost it."""
        event = asyncio.Event()
        self._waiting[prompt_id] = job, event
        try:
            while (found := await self.find(prompt_id)) is Queued:
                await _woken(event, self._poll)
                event.clear()
            return found  # type: ignore[return-value]
        finally:
            del self._waiting[prompt_id]
            self._doing.pop(prompt_id, None)

    async def cancel(self, prompt_ids: list[str]) -> None:
        """Take jobs out of the queue, and stop the one that runs."""
        await self._ask("POST", "/queue", json={"delete": prompt_ids})
        for prompt_id in (await self._queue()).intersection(prompt_ids):  # no longer waiting, so running
            await self._ask("POST", "/interrupt", json={"prompt_id": prompt_id})

    async def listen(self) -> None:
        """Follow the websocket for ever, through every loss of it."""
        aiohttp = load_aiohttp()
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
                address = f"{self.url}/ws?clientId={self._client}"
                async with self._session.ws_connect(address, heartbeat=ANSWER, max_msg_size=0) as socket:
                    async for message in socket:
                        if message.type is aiohttp.WSMsgType.TEXT:
                            self._heard(message.data)
            await asyncio.sleep(RECONNECT)

    async def fetch(self, result: str, into: Path) -> None:
        """Bring a file from below the server's output folder. CalibQuantError when it is not there."""
        aiohttp = load_aiohttp()
        subfolder, _, name = result.removeprefix("output/").rpartition("/")
        where = {"filename": name, "subfolder": subfolder, "type": "output"}
        patient = aiohttp.ClientTimeout(total=None, sock_connect=ANSWER, sock_read=ANSWER)
        try:
            async with self._session.get(f"{self.url}/view", params=where, timeout=patient) as answer:
                if answer.status != 200:
                    raise CalibQuantError(f"{result}: {self.url} answers {answer.status}: is the file still there?")
                with into.open("wb") as file:
                    async for chunk in answer.content.iter_chunked(1 << 20):
                        file.write(chunk)
        except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError) as e:
            raise CalibQuantError(f"{result}: {self.url} does not answer: start it, then run this again") from e

    def _heard(self, text: str) -> None:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
            event = json.loads(text)
            kind, data = event["type"], event["data"]
            if kind == "status":  # something entered or left the queue
                for _, changed in self._waiting.values():
                    changed.set()
            prompt_id = data.get("prompt_id")
            if prompt_id not in self._waiting:
                return
            job, changed = self._waiting[prompt_id]
            if kind in ("executing", "progress") and data["node"] is not None:
                share = f" {100 * data['value'] // data['max']:.0f} %" if kind == "progress" else ""
                self._doing[prompt_id] = job.title(data["node"]) + share
            elif kind.startswith("execution_") and kind not in ("execution_start", "execution_cached"):
                changed.set()

    async def _queue(self) -> set[str]:
        """Prompt ids of the jobs that run and wait."""
        answer = await self._get("/queue")
        try:
            running, pending = ({item[1] for item in answer[name]} for name in ("queue_running", "queue_pending"))
            self.ran |= running
            return running | pending
        except (KeyError, TypeError, IndexError) as e:
            raise UnreachableError("is no ComfyUI") from e

    async def _get(self, path: str) -> Any:
        status, answer = await self._ask("GET", path)
        if status != 200 or answer is None:
            raise UnreachableError(f"is no ComfyUI, or keeps us out: {path.split('/')[1]} answers {status}")
        return answer

    async def _ask(self, method: str, path: str, **sent: Any) -> tuple[int, Any]:
        """(status, the JSON of the answer or None)."""
        aiohttp = load_aiohttp()
        try:
            async with self._session.request(method, self.url + path, **sent) as answer:
                text = await answer.read()
                if answer.status >= 500:
                    raise UnreachableError(f"answers {answer.status}")
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as e:
            raise UnreachableError("does not answer") from e
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, None


@contextlib.asynccontextmanager
async def opened(urls: Sequence[str], poll: float, listen: bool = True) -> AsyncIterator[list[Server]]:
    """Servers of one session; each is listened to until the end."""
    aiohttp = load_aiohttp()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER, sock_connect=10)) as session:
        servers = [Server(url, session, poll) for url in urls]
        ears = [asyncio.create_task(server.listen()) for server in servers if listen]
        try:
            yield servers
        finally:
            await end(ears)


async def end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel them; again where a library swallowed it, as asyncio.wait_for does before Python 3.12."""
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=1)
    await asyncio.gather(*tasks, return_exceptions=True)  # what they raised is looked at


async def _woken(event: asyncio.Event, seconds: float) -> None:
    waiter = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([waiter], timeout=seconds)
    finally:
        waiter.cancel()


# --- what a server says


def _reasons(answer: Any) -> list[str]:
    """Why a job was refused, a line for each reason: what ComfyUI says of nodes, else of the whole."""
    if not isinstance(answer, dict):
        return []
    lines = []
    nodes = answer.get("node_errors")
    for node, about in nodes.items() if isinstance(nodes, dict) else ():
        for error in about.get("errors", []):
            lines.append(f"node {node} ({about.get('class_type')}): {_words(error)}")
    return lines or ([_words(answer["error"])] if answer.get("error") else [])


def _words(error: Any) -> str:
    if not isinstance(error, dict):
        return str(error)
    return ": ".join(" ".join(str(error[name]).split()) for name in ("message", "details") if error.get(name))


def _outcome(entry: dict[str, Any]) -> Outcome:
    """From an entry of the history."""
    status = entry.get("status") or {}
    messages = {message[0]: message[1] for message in status.get("messages") or []}
    times = [data["timestamp"] for data in messages.values() if isinstance(data.get("timestamp"), int | float)]
    seconds = (max(times) - min(times)) / 1000 if times else None
    if status.get("status_str", "success") == "success":
        return Outcome(seconds, _results(entry.get("outputs") or {}))
    if "execution_interrupted" in messages:
        return Outcome(seconds, error="was interrupted on the server")
    failure = messages.get("execution_error", {})
    what = str(failure.get("exception_message", "no reason given")).strip().splitlines() or ["no reason given"]
    return Outcome(seconds, error=f"node {failure.get('node_id')} ({failure.get('node_type')}): {what[0]}")


def _results(outputs: dict[str, Any]) -> list[str]:
    """Files below the server's output folder that its nodes name: ours by path, the core's as pictures are named."""
    found: list[str] = []
    for lists in outputs.values():
        for item in (item for values in lists.values() if isinstance(values, list) for item in values):
            if isinstance(item, dict) and isinstance(item.get("path"), str):
                found.append(item["path"])
            elif isinstance(item, dict) and item.get("type") == "output" and isinstance(item.get("filename"), str):
                found.append("/".join(filter(None, ("output", item.get("subfolder"), item["filename"]))))
    return list(dict.fromkeys(found))
