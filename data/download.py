"""Many requests at once, few to any one host: every row of a list of URLs ends in an image or in a reason.

A try of a row is a chain of requests, one for each redirect, and every request waits for its turn at its own host.
Waiting rows hold no slot and are bounded in number, so that neither a slow host nor millions of rows cost memory.
"""

import asyncio
import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from yarl import URL

from data.fetch import Fetcher, Picture
from data.received import Failure

WINDOW = 16  # rows that may wait, for each request at a time
POLL = 0.2  # seconds between two looks at whether to stop
LATER_ONLY = ("too-slow", "host-down")  # may pass, but not within seconds


@dataclass(frozen=True)
class Pace:
    """How many requests at once, and what is done about failures that may pass."""

    concurrency: int = 64
    per_host: int = 4
    retries: int = 3
    backoff: float = 1.0  # seconds before the second try; doubled for each further one, and varied by half
    max_wait: float = 60.0  # seconds at most before another try, whatever the server asks for
    host_failures: int = 20  # rows in a row, all tries of them, after which a host is not asked again in this run


@dataclass(slots=True)
class Job:
    """A row of the list on its way; problem: why its line cannot be used at all."""

    row: int
    caption: str
    text: str  # the URL as in the list
    problem: str | None = None
    url: URL | None = None  # of the next request
    tries: int = 0
    redirects: int = 0
    seconds: float = 0.0  # spent on requests of this try


@dataclass(frozen=True)
class Result:
    """The end of a row: its image, in the file part, or its failure."""

    job: Job
    outcome: Picture | Failure
    part: Path


@dataclass(slots=True)
class Host:
    """A host: its requests, the rows that wait for it, how many failed since its last answer, until when it pauses."""

    name: str
    active: int = 0
    waiting: deque[Job] = field(default_factory=deque)
    failures: int = 0
    paused_until: float = 0.0
    listed: bool = False  # among those with something to do


class Download:
    """Runs jobs. finish is awaited once for each, with the result; parts is the folder of files that are not whole."""

    def __init__(self, fetcher: Fetcher, pace: Pace, parts: Path, finish: Callable[[Result], Awaitable[None]]) -> None:
        self.fetcher, self.pace, self.parts, self.finish = fetcher, pace, parts, finish
        self.hosts: dict[str, Host] = {}
        self.ready: deque[Host] = deque()
        # A heap of what is due when: a job, or for None the end of a host's pause; the number keeps the order.
        self.later: list[tuple[float, int, Host, Job | None]] = []
        self.order = itertools.count()
        self.jitter = random.Random()
        self.tasks: set[asyncio.Task] = set()
        self.unfinished = 0

    async def run(self, jobs: Iterator[Job], stopped: Callable[[], bool] = lambda: False) -> None:
        """Until every job is finished or stopped() says so; then requests under way are dropped."""
        more = True
        try:
            while not stopped():
                while more and self._has_room():
                    job = next(jobs, None)
                    more = job is not None
                    if job is not None:
                        self._begin(job)
                self._wake()
                while len(self.tasks) < self.pace.concurrency and (host := self._next_host()):
                    host.active += 1
                    self._start(self._request(host, host.waiting.popleft()))
                    self._list(host)
                if not (more or self.unfinished or self.tasks):
                    return
                await self._wait()
        finally:
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)

    def _has_room(self) -> bool:
        """Whether another row of the list may be taken in; rows that end at once are tasks, but wait for nothing."""
        return self.unfinished < WINDOW * self.pace.concurrency and len(self.tasks) < 2 * self.pace.concurrency

    async def _wait(self) -> None:
        """Until a task ends or something is due. Raises what a task raised."""
        pause = min(max(self.later[0][0] - time.monotonic(), 0.0), POLL) if self.later else POLL
        if not self.tasks:
            await asyncio.sleep(pause)
            return
        done, _ = await asyncio.wait(self.tasks, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        self.tasks -= done

    def _start(self, work) -> None:
        self.tasks.add(asyncio.create_task(work))

    def _begin(self, job: Job) -> None:
        self.unfinished += 1
        if job.problem is not None:
            self._start(self._end(job, Failure("line", job.problem)))
            return
        try:
            job.url = self.fetcher.check_url(job.text)
        except Failure as failure:
            self._start(self._end(job, failure))
            return
        job.tries = 1
        self._queue(job)

    def _queue(self, job: Job) -> None:
        name = job.url.raw_host
        host = self.hosts.get(name)
        if host is None:
            host = self.hosts[name] = Host(name)
        host.waiting.append(job)
        self._list(host)

    def _list(self, host: Host) -> None:
        """Put a host that has something to do and a request free among the ready ones; forget one that has nothing."""
        if host.listed:
            return
        if host.waiting and host.active < self.pace.per_host:
            host.listed = True
            self.ready.append(host)
        elif not (host.waiting or host.active or host.failures or host.paused_until > time.monotonic()):
            self.hosts.pop(host.name, None)

    def _next_host(self) -> Host | None:
        while self.ready:
            host = self.ready.popleft()
            host.listed = False
            if host.failures >= self.pace.host_failures:
                down = f"{host.failures} rows of {host.name} failed in a row"
                while host.waiting:
                    failure = Failure("host-down", down, may_pass=True)
                    self._start(self._end(host.waiting.popleft(), failure))
            elif host.paused_until > time.monotonic():
                host.listed = True
                heapq.heappush(self.later, (host.paused_until, next(self.order), host, None))
            elif host.waiting:
                return host
        return None

    def _wake(self) -> None:
        """Let the jobs and hosts go on whose time has come."""
        while self.later and self.later[0][0] <= time.monotonic():
            _, _, host, job = heapq.heappop(self.later)
            if job is not None:
                self._queue(job)
            else:
                host.listed = False
                self._list(host)

    async def _request(self, host: Host, job: Job) -> None:
        begun = time.monotonic()
        part = self.parts / str(job.row)
        try:
            outcome = await self.fetcher.fetch(job.url, part, self.fetcher.limits.total_timeout - job.seconds)
        except Failure as failure:
            outcome = failure
        host.active -= 1
        job.seconds += time.monotonic() - begun
        if isinstance(outcome, Failure) and self._try_again(host, job, outcome):
            self._list(host)
            return
        failed = isinstance(outcome, Failure) and (outcome.may_pass or outcome.reason == "dns")
        host.failures = host.failures + 1 if failed else 0
        self._list(host)
        if isinstance(outcome, URL):
            outcome = self._redirect(job, outcome)
        if outcome is not None:
            await self._end(job, outcome)

    def _redirect(self, job: Job, target: URL) -> Failure | None:
        job.redirects += 1
        limit = self.fetcher.limits
        if job.redirects > limit.max_redirects:
            return Failure("redirects", f"more than {limit.max_redirects}, the last one to {target.raw_host}")
        if job.seconds >= limit.total_timeout:
            return Failure("too-slow", f"not done after {limit.total_timeout:g} s", may_pass=True)
        job.url = target
        self._queue(job)
        return None

    def _try_again(self, host: Host, job: Job, failure: Failure) -> bool:
        if not failure.may_pass or failure.reason in LATER_ONLY or job.tries > self.pace.retries:
            return False
        backoff = self.pace.backoff * 2 ** (job.tries - 1) * self.jitter.uniform(0.5, 1.5)
        wait = min(max(backoff, failure.wait or 0.0), self.pace.max_wait)
        now = time.monotonic()
        if failure.wait is not None:
            # The server speaks for all its pages: nobody asks it before.
            host.paused_until = max(host.paused_until, now + min(failure.wait, self.pace.max_wait))
        job.tries += 1
        job.redirects, job.seconds, job.url = 0, 0.0, self.fetcher.check_url(job.text)
        heapq.heappush(self.later, (now + wait, next(self.order), host, job))
        return True

    async def _end(self, job: Job, outcome: Picture | Failure) -> None:
        await self.finish(Result(job, outcome, self.parts / str(job.row)))
        self.unfinished -= 1
