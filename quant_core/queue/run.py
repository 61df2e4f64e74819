"""A batch: jobs handed to servers, followed to their end whatever happens to the servers, written down on the way."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import CalibQuantError, printable
from ..files.text import counted
from ..progress import Progress
from .journal import DONE, FAILED, SENT, WITHDRAWN, Entry, Journal
from .server import Outcome, RefusedError, Server, UnreachableError, end, opened
from .workflow import Job

TICK = 0.5  # seconds between two looks at the progress
LEAVING = 20.0  # seconds that taking jobs back from a server may take


@dataclass(frozen=True)
class Limits:
    """in_flight: jobs at one server at a time; patience: seconds to wait for a server that went away."""

    in_flight: int = 1
    crashes: int = 3  # of servers while they ran the same job
    attempts: int = 10  # of a job in all, so that one that waits does not pay for the one that crashes
    patience: float = 600.0
    poll: float = 5.0


@dataclass
class Row:
    """A job and what became of it."""

    number: int
    job: Job
    state: str = ""  # of the journal's; "" as long as no server has it
    server: str = ""
    prompt_id: str = ""
    attempts: int = 0
    crashes: int = 0
    outcome: Outcome = field(default_factory=Outcome)

    def entry(self) -> Entry:
        out = self.outcome
        return Entry(self.job.key, self.state, self.server, self.prompt_id, out.seconds, out.results, out.error)


def run(
    jobs: Sequence[Job], urls: Sequence[str], journal: Journal, limits: Limits, progress: Progress,
    say: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """All jobs, in their order, each done, failed or (when no server is left) as it was. CalibQuantError at the start
    when a server does not answer. An interruption takes back what is queued, and raises KeyboardInterrupt."""
    try:
        return asyncio.run(_run(jobs, urls, journal, limits, progress, say))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _run(
    jobs: Sequence[Job], urls: Sequence[str], journal: Journal, limits: Limits, progress: Progress,
    say: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    with _cancelled_by_signals():
        async with opened(urls, limits.poll) as servers:
            for server in servers:
                try:
                    await server.check()
                except UnreachableError as e:
                    raise CalibQuantError(f"{server.url}: {e}: start ComfyUI there, or check the address") from e
            batch = Batch(jobs, servers, journal, limits, progress, say)
            await batch.run()
            return batch.rows


@contextlib.contextmanager
def _cancelled_by_signals() -> Iterator[None]:
    """The first signal cancels this task, so that it can take its jobs back; later ones are ignored meanwhile."""
    loop, task, came = asyncio.get_running_loop(), asyncio.current_task(), []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def cancel() -> None:
        if not came and task is not None:
            task.cancel()
        came.append(True)

    handled = []
    for number in before:
        # Not on Windows nor beside the main thread: there KeyboardInterrupt ends the loop, which cancels the task too.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, cancel)
            handled.append(number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])


class Batch:
    """The rows of a batch, and the work on them: as many workers a server as it may have jobs at a time."""

    def __init__(
        self, jobs: Sequence[Job], servers: Sequence[Server], journal: Journal, limits: Limits, progress: Progress,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.rows = [Row(number, job) for number, job in enumerate(jobs, 1)]
        self._servers = {server.url: server for server in servers}
        self._journal, self._limits, self._progress = journal, limits, progress
        self._say = lambda text: say(printable(text))
        self._changed = asyncio.Condition()
        for row in self.rows:
            self._recall(row)
        self._waiting = [row for row in self.rows if not _ended(row)]

    async def run(self) -> None:
        workers = [
            asyncio.create_task(self._work(server))
            for _ in range(self._limits.in_flight)
            for server in self._servers.values()  # in turn, so that the first jobs go to different ones
        ]
        ticker = asyncio.create_task(self._tell())
        try:
            done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            for worker in done:
                worker.result()
        finally:
            await end([ticker, *workers])
            await asyncio.gather(*map(self._take_back, self._servers.values()))
        self._progress(*self._state())

    def _recall(self, row: Row) -> None:
        """What the journal knows of the job. One that failed gets another try; one that was sent is looked for."""
        known = self._journal.entries.get(row.job.key)
        if known is None or known.state not in (SENT, DONE):
            return
        if known.state == DONE:
            row.state, row.outcome = DONE, Outcome(known.seconds, known.results)
        elif known.server not in self._servers:
            return
        row.state, row.server, row.prompt_id = known.state, known.server, known.prompt_id

    async def _work(self, server: Server) -> None:
        while (row := await self._next(server)) is not None:
            try:
                while not await self._advance(row, server):
                    pass
            except UnreachableError as e:
                if not await self._outlast(server, e):
                    await self._give_up(server)
            if not _ended(row):
                await self._again(row, server)
            async with self._changed:
                self._changed.notify_all()

    async def _next(self, server: Server) -> Row | None:
        """A job for this server; None when it is gone or all jobs have ended."""
        async with self._changed:
            while not server.gone and not all(map(_ended, self.rows)):
                for row in self._waiting:
                    if row.server in ("", server.url):
                        self._waiting.remove(row)
                        return row
                await self._changed.wait()
        return None

    async def _advance(self, row: Row, server: Server) -> bool:
        """Send the job, or follow it; True when this server has no more to do with it."""
        if not row.prompt_id:
            await self._send(row, server)
            return _ended(row)
        outcome = await server.wait(row.job, row.prompt_id)
        if outcome is not None:
            self._end(row, outcome)
            return True
        row.crashes += row.prompt_id in server.ran
        row.prompt_id = ""
        if row.crashes >= self._limits.crashes or row.attempts >= self._limits.attempts:
            lost = counted(max(row.crashes, row.attempts), "time")
            self._end(row, Outcome(error=f"was lost {lost}, the last time by {server.url}: see the server's log"))
        else:
            self._say(f"note: job {row.number}: {server.url} does not know it any more: sent again")
        return True

    async def _send(self, row: Row, server: Server) -> None:
        row.attempts += 1
        row.server, row.prompt_id, row.state = server.url, str(uuid.uuid4()), SENT
        self._journal.add(row.entry())  # first: whatever happens now, the next run knows where to look
        try:
            given = await server.submit(row.job.graph, row.prompt_id)
        except RefusedError as e:
            self._end(row, Outcome(error="\n".join(map(printable, str(e).splitlines()))))
            return
        if given != row.prompt_id:
            row.prompt_id = given
            self._journal.add(row.entry())

    async def _outlast(self, server: Server, error: UnreachableError) -> bool:
        self._say(f"note: {server.url} {error}: waiting for it")
        return await server.back(self._limits.patience)

    async def _give_up(self, server: Server) -> None:
        if not server.gone:
            server.gone = True
            self._say(f"note: {server.url} did not come back: its jobs go to the others")
            for row in self._waiting:
                if row.server == server.url:
                    row.server = row.prompt_id = ""

    async def _again(self, row: Row, server: Server) -> None:
        """Back among those that wait: for its own server when that may still have it."""
        if server.gone or not row.prompt_id:
            row.server = row.prompt_id = ""
        async with self._changed:
            self._waiting.insert(0, row)

    def _end(self, row: Row, outcome: Outcome) -> None:
        row.state, row.outcome = (FAILED if outcome.error else DONE), outcome
        self._journal.add(row.entry())
        for line in outcome.error.splitlines():
            self._say(f"job {row.number} failed: {line}")

    async def _take_back(self, server: Server) -> None:
        """After an interruption: what still waits or runs there is removed, and may be sent anew by the next run."""
        rows = [row for row in self.rows if row.server == server.url and row.prompt_id and not _ended(row)]
        if not rows:
            return
        try:
            await asyncio.wait_for(self._withdraw(server, rows), LEAVING)
        except (UnreachableError, asyncio.TimeoutError):
            self._say(f"note: {server.url} may still run {counted(len(rows), 'job')}: it does not answer")

    async def _withdraw(self, server: Server, rows: list[Row]) -> None:
        for row in rows:
            found = await server.find(row.prompt_id)
            if isinstance(found, Outcome):  # it ended meanwhile
                self._end(row, found)
        left = [row for row in rows if not _ended(row)]
        await server.cancel([row.prompt_id for row in left])
        for row in left:
            row.state = WITHDRAWN
            self._journal.add(row.entry())
        if left:
            self._say(f"{counted(len(left), 'job')} taken back from {server.url}; the same command goes on")

    async def _tell(self) -> None:
        while True:
            self._progress(*self._state())
            await asyncio.sleep(TICK)

    def _state(self) -> tuple[int, int, str]:
        doing = [what for server in self._servers.values() for what in server.doing()]
        return sum(map(_ended, self.rows)), len(self.rows), printable(" · ".join(doing))


def _ended(row: Row) -> bool:
    return row.state in (DONE, FAILED)
