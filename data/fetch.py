"""One request to a server that nobody vouches for: bytes of an image in a file, or a `Failure` that says why not.

The name is resolved here, each address is judged by `data.addresses`, and the connection goes to an address that was
judged; the socket is made only after a last look at the very address it is for. TLS is verified against the name in the
URL. Bytes, pixels and time are limited while they arrive. Needs aiohttp.
"""

import asyncio
import datetime
import email.utils
import errno
import hashlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.http_exceptions import BadHttpMessage, ContentLengthError, TransferEncodingError
from yarl import URL

from data.addresses import AddressError, UrlError, address_problem, checked_url
from data.images import BadImage, open_image
from data.received import Failure, Unpacking, check_format, check_pixels, check_scans
from data.rows import DataError

REDIRECTS = (301, 302, 303, 307, 308)
MAY_PASS_STATUS = (408, 425, 429, *range(500, 600))
OPT_OUT = frozenset(("noai", "noimageai", "noindex", "noimageindex"))  # the directives that img2dataset respects
VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
AGENT_TOKEN = "clip-t5-captioner"
USER_AGENT = f"{AGENT_TOKEN}/0.1 (downloads the pictures of a captioned list; respects X-Robots-Tag: noai)"
HEAD_BYTES = 2**16  # enough to see how large nearly every image is before the rest has come
DECODERS = 4  # images in memory at once, each up to 16 bytes a pixel
DNS_SECONDS = 60  # an address is used again for so long without another look at the name's records
KEEP_ALIVE_SECONDS = 2.0
ENDED_EARLY = (ContentLengthError, TransferEncodingError)
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True)
class Limits:
    """What one request may cost: seconds, bytes as stored and as sent, pixels."""

    timeout: float = 10.0  # without a byte: of a name lookup, a connection, a read
    total_timeout: float = 60.0  # of one try with all its redirects
    max_bytes: int = 20_000_000
    max_pixels: int = 40_000_000
    max_redirects: int = 5


@dataclass(frozen=True)
class Picture:
    """An image that is whole: its file's SHA-256 and size in bytes, upright width and height, extension by content."""

    sha256: str
    bytes: int
    width: int
    height: int
    extension: str


def system_lookup(threads: ThreadPoolExecutor) -> Callable[[str], Awaitable[list[str]]]:
    """The addresses of a name as the system resolves it, in threads: a silent name server blocks nobody else."""

    async def lookup(host: str) -> list[str]:
        found = await asyncio.get_running_loop().run_in_executor(
            threads, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        )
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    return lookup


class CheckedResolver(AbstractResolver):
    """Resolves a name to those of its addresses that are public."""

    def __init__(self, lookup: Callable[[str], Awaitable[list[str]]], allow_loopback: bool, timeout: float) -> None:
        self.lookup, self.allow_loopback, self.timeout = lookup, allow_loopback, timeout

    async def resolve(self, host: str, port: int = 0, family=socket.AF_UNSPEC) -> list[ResolveResult]:
        """Raises Failure where the name has no address, or none that is public."""
        try:
            async with asyncio.timeout(self.timeout):
                addresses = await self.lookup(host)
        except socket.gaierror as error:
            raise Failure("dns", f"{host}: {error.strerror}", may_pass=error.errno == socket.EAI_AGAIN) from error
        except TimeoutError as error:
            raise Failure("dns", f"{host}: no answer from the name server", may_pass=True) from error
        except (UnicodeError, ValueError) as error:
            raise Failure("dns", f"{host}: no possible name") from error
        problems = [address_problem(address, self.allow_loopback) for address in addresses]
        if all(problems):
            raise Failure("address", f"{host}: {problems[0]}" if problems else f"{host} has no address")
        return [
            ResolveResult(
                hostname=host, host=address, port=port, proto=0, flags=socket.AI_NUMERICHOST,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
            )
            for address, problem in zip(addresses, problems, strict=True) if not problem
        ]  # fmt: skip

    async def close(self) -> None:
        """Nothing is held."""


class Fetcher:
    """Sends requests, as an async context manager. lookup and ssl_context replace the system's."""

    def __init__(
        self,
        limits: Limits,
        allow_loopback: bool = False,
        user_agent: str = USER_AGENT,
        lookup: Callable[[str], Awaitable[list[str]]] | None = None,
        ssl_context: ssl.SSLContext | None = None,
        threads: int = 64,
    ) -> None:
        self.limits, self.allow_loopback, self.user_agent = limits, allow_loopback, user_agent
        self.agent_token = user_agent.split("/")[0].strip().lower()
        self.lookup, self.ssl_context, self.threads = lookup, ssl_context, threads

    async def __aenter__(self) -> "Fetcher":
        self.lookups = ThreadPoolExecutor(self.threads, "lookup")
        self.decoders = ThreadPoolExecutor(DECODERS, "decode")
        lookup = self.lookup or system_lookup(self.lookups)
        connector = aiohttp.TCPConnector(
            resolver=CheckedResolver(lookup, self.allow_loopback, self.limits.timeout),
            ssl=self.ssl_context or ssl.create_default_context(),
            socket_factory=self._socket,
            limit=0,
            ttl_dns_cache=DNS_SECONDS,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
        )
        self.session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # a proxy would resolve the name again
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.limits.timeout, sock_read=self.limits.timeout),
            headers={"User-Agent": self.user_agent, "Accept": "image/*", "Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(self, *_) -> None:
        await self.session.close()
        self.lookups.shutdown(wait=False, cancel_futures=True)
        self.decoders.shutdown(wait=True, cancel_futures=True)

    def _socket(self, address_info) -> socket.socket:
        """The last look: whatever way an address came here, the socket is made only for one that may be reached."""
        family, kind, protocol, _, address = address_info
        problem = address_problem(str(address[0]), self.allow_loopback)
        if problem:
            raise Failure("address", problem)
        return socket.socket(family, kind, protocol)

    def check_url(self, text: str, base: URL | None = None) -> URL:
        """The URL to ask for; raises Failure."""
        try:
            return checked_url(text, base, self.allow_loopback)
        except UrlError as error:
            raise Failure("address" if isinstance(error, AddressError) else "url", f"the URL {error}") from error

    async def fetch(self, url: URL, part: Path, seconds: float) -> URL | Picture:
        """One request: where it is redirected to, or the image, which then is in the file part.

        seconds: left for the request. Raises Failure, and DataError where the disk is at fault; part is then gone.
        """
        try:
            answer = await self._request(url, part, seconds)
            if isinstance(answer, URL):
                return answer
            return await asyncio.get_running_loop().run_in_executor(self.decoders, self._picture, part, answer)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    async def _request(self, url: URL, part: Path, seconds: float) -> URL | tuple[str, int, str]:
        """Where it leads, or (SHA-256, bytes, extension) of what is in part."""
        try:
            async with asyncio.timeout(seconds) as deadline, self.session.get(url, allow_redirects=False) as response:
                self._check_opt_out(response)
                if response.status in REDIRECTS and "Location" in response.headers:
                    return self.check_url(response.headers["Location"], url)
                if response.status != 200:
                    may_pass = response.status in MAY_PASS_STATUS
                    wait = retry_after(response.headers.get("Retry-After", "")) if may_pass else None
                    raise Failure(f"http-{response.status}", response.reason or "", may_pass, wait)
                return await self._receive(response, part)
        except (Failure, DataError, MemoryError):
            raise
        except TimeoutError as error:
            if deadline.expired():
                raise Failure("too-slow", f"not done after {self.limits.total_timeout:g} s", may_pass=True) from error
            raise Failure("timeout", f"no byte for {self.limits.timeout:g} s", may_pass=True) from error
        except Exception as error:
            raise _network_failure(error) from error

    def _check_opt_out(self, response: aiohttp.ClientResponse) -> None:
        for value in response.headers.getall("X-Robots-Tag", ()):
            directives = value.lower()
            agent, colon, own = directives.partition(":")
            if colon and "," not in agent and agent.strip() not in VALUED_DIRECTIVES:
                directives = own if agent.strip() in (AGENT_TOKEN, self.agent_token) else ""
            refused = OPT_OUT.intersection(word.strip() for word in directives.split(","))
            if refused:
                raise Failure("opt-out", f"X-Robots-Tag: {', '.join(sorted(refused))}")

    async def _receive(self, response: aiohttp.ClientResponse, part: Path) -> tuple[str, int, str]:
        limit = self.limits.max_bytes
        if (response.content_length or 0) > limit:
            raise Failure("too-many-bytes", f"{response.content_length} bytes, more than the limit of {limit}")
        decode = Unpacking(response.headers.get("Content-Encoding", ""), limit)
        digest, sent, size, head, extension = hashlib.sha256(), 0, 0, b"", None
        with _open_part(part) as file:
            async for chunk in response.content.iter_any():
                sent += len(chunk)  # counted too: a packed stream can go on for ever and hold nothing
                content = decode(chunk)
                size += len(content)
                if max(sent, size) > limit:
                    raise Failure("too-many-bytes", f"more than the limit of {limit}")
                if extension is None:
                    head += content
                    if len(head) >= 16:
                        check_format(head)
                    if len(head) >= HEAD_BYTES:
                        extension = await self._look(head)
                digest.update(content)
                _write(file, content, part)
        decode.check_end()
        return digest.hexdigest(), size, extension or check_format(head)

    async def _look(self, head: bytes) -> str:
        """The extension of an image's beginning; raises Failure where it says that there are too many pixels."""
        await asyncio.get_running_loop().run_in_executor(self.decoders, check_pixels, head, self.limits.max_pixels)
        return check_format(head)

    def _picture(self, part: Path, received: tuple[str, int, str]) -> Picture:
        sha256, size, extension = received
        if extension == "jpg":
            check_scans(part.read_bytes())
        try:
            image = open_image(part, self.limits.max_pixels)
        except BadImage as error:
            raise Failure(error.reason, error.detail) from error
        return Picture(sha256, size, image.width, image.height, extension)


def retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None where it holds neither."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max((moment - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)


def _network_failure(error: Exception) -> Failure:
    """The reason for whatever aiohttp raised. Raises DataError where this machine, not the server, is at fault."""
    detail = str(error) or type(error).__name__
    cause = getattr(error, "os_error", error)
    if isinstance(cause, OSError) and cause.errno in OUT_OF_RESOURCES:
        raise DataError(f"cannot open another connection: {cause.strerror}; lower the concurrency") from error
    if isinstance(cause, Failure):
        return cause
    if isinstance(error, aiohttp.ClientSSLError):
        return Failure("tls", detail)
    if isinstance(error, aiohttp.ClientConnectorError):
        return Failure("connection", cause.strerror or detail, may_pass=True)
    if isinstance(error, aiohttp.ClientPayloadError):
        cut_off = not isinstance(error.__cause__, BadHttpMessage) or isinstance(error.__cause__, ENDED_EARLY)
        return Failure("cut-off", detail, may_pass=True) if cut_off else Failure("protocol", detail)
    if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, OSError)):
        return Failure("reset", detail, may_pass=True)
    # Whatever a server makes its parser stumble over must not end the download of the rest.
    return Failure("protocol", detail)


def _open_part(part: Path):
    try:
        # Without a buffer: what the disk has no room for fails in _write, not where the file is closed.
        return open(part, "wb", buffering=0)
    except OSError as error:
        raise DataError(f"cannot write {part}: {error.strerror or error}") from error


def _write(file, content: bytes, part: Path) -> None:
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise DataError(f"cannot write {part}: {error.strerror or error}") from error
