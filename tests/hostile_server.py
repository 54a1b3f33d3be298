"""A web server on loopback that misbehaves in every way a downloader meets, chosen by the path: /KIND/ROW."""

import asyncio
import contextlib
import gzip
import io
import socket
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator

from PIL import Image

MAX_BYTES = 200_000  # what the tests allow for an image
PAUSE = 0.2  # seconds between the bytes of a server that drips


def picture(row: int) -> bytes:
    """A small image of its own for every row, a JPEG or a PNG."""
    image = Image.new("RGB", (24 + row % 5, 16), (row % 256, row // 256 % 256, 77))
    buffer = io.BytesIO()
    if row % 2:
        image.save(buffer, "JPEG", comment=f"row {row}")
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def huge_png() -> bytes:
    """The beginning of a PNG that says it has 50,000 x 50,000 pixels, and then much more."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 90_000) + b"IDAT" + bytes(90_000)


HTML = b"<!doctype html><title>Sorry</title>" + b"<p>no picture here</p>" * 200
BOMB = gzip.compress(b"\xff\xd8\xff" + bytes(50_000_000))
EMPTY_BLOCK = b"\0\0\0\xff\xff"  # of a deflate stream: five bytes that unpack to nothing
INWARD = (
    "http://169.254.169.254/latest/meta-data/", "file:///etc/passwd", "http://10.0.0.1/", "http://[::ffff:127.0.0.1]/", "http://127.0.0.1:22/",
    "http://2130706433/", "gopher://127.0.0.1/", "http://user:word@127.0.0.1/", "//192.168.0.1/x.jpg", "http://[fd00:ec2::254]/",
)  # fmt: skip
ROBOTS = (  # a header, and whether it forbids
    ("noai", True), ("NoImageAI, nofollow", True), ("clip-t5-captioner: noai", True), ("max-snippet: 20, noindex", True), ("otherbot: noai", False),
    ("nofollow", False), ("unavailable_after: 25 Jun 2040 15:00:00 GMT", False), ("max-image-preview: large", False),
)  # fmt: skip


class HostileServer:
    """The server in a thread of its own, listening on every loopback address; asked: how often each path was asked for."""

    def __init__(self, host: str = "0.0.0.0", ssl_context=None) -> None:
        self.host, self.ssl_context = host, ssl_context
        self.asked: Counter[str] = Counter()
        self.requests: list[tuple[str, dict[str, str]]] = []  # (address asked on, headers)

    def __enter__(self) -> "HostileServer":
        self.loop = asyncio.new_event_loop()
        started = threading.Event()

        def serve() -> None:
            asyncio.set_event_loop(self.loop)
            server = self.loop.run_until_complete(
                asyncio.start_server(self.answer, self.host, 0, backlog=1024, ssl=self.ssl_context)
            )
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            self.loop.run_forever()
            server.close()
            for task in (tasks := asyncio.all_tasks(self.loop)):
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.close()

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(20)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            while True:
                request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                path = request.split(" ")[1]
                headers = dict(line.lower().split(": ", 1) for line in request.split("\r\n")[1:] if ": " in line)
                self.asked[path] += 1
                self.requests.append((writer.get_extra_info("sockname")[0], headers))
                kind, row = path.split("/")[1:3]
                await getattr(self, f"_{kind}")(writer, int(row), self.asked[path])
                await writer.drain()
        writer.close()

    def _send(self, writer, body: bytes, status: str = "200 OK", **headers: str) -> None:
        fields = {"content-type": "image/jpeg", "content-length": str(len(body))} | {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body)

    async def _good(self, writer, row, time) -> None:
        self._send(writer, picture(row))

    async def _slow(self, writer, row, time) -> None:
        body = picture(row)
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        for begin in range(0, len(body), len(body) // 2 + 1):
            await asyncio.sleep(0.1)
            writer.write(body[begin : begin + len(body) // 2 + 1])
            await writer.drain()

    async def _endless(self, writer, row, time) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n" + picture(2 * row + 1))
        while True:
            writer.write(bytes(2**16))
            await writer.drain()

    async def _short(self, writer, row, time) -> None:
        body = picture(row)
        self._send(writer, body[: len(body) // 2], content_length=str(len(body)))
        raise EOFError

    async def _long(self, writer, row, time) -> None:
        body = picture(row)
        self._send(writer, body, content_length=str(len(body) // 2))

    async def _mistyped(self, writer, row, time) -> None:
        self._send(writer, picture(row), content_type="text/html")

    async def _inward(self, writer, row, time) -> None:
        self._send(writer, b"", "302 Found", location=INWARD[row // 20 % len(INWARD)])

    async def _loop(self, writer, row, time) -> None:
        self._send(writer, b"", "301 Moved", location=f"/loop/{row}")

    async def _moved(self, writer, row, time) -> None:
        self._send(writer, HTML, "307 Moved", location=f"http://127.0.0.30:{self.port}/good/{row}")

    async def _reset(self, writer, row, time) -> None:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise EOFError

    async def _busy(self, writer, row, time) -> None:
        if time == 1:
            self._send(writer, HTML, "429 Too Many Requests", retry_after="1")
        else:
            self._send(writer, picture(row))

    async def _flaky(self, writer, row, time) -> None:
        if time == 1:
            self._send(writer, HTML, ("500 Oh", "502 Bad", "503 Not now")[row % 3])
        else:
            self._send(writer, picture(row))

    async def _broken(self, writer, row, time) -> None:
        self._send(writer, HTML, "503 Never")

    async def _silent(self, writer, row, time) -> None:
        await asyncio.sleep(3600)

    async def _drip(self, writer, row, time) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n\xff\xd8\xff" + bytes(9996):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(PAUSE)

    async def _bomb(self, writer, row, time) -> None:
        self._send(writer, BOMB, content_encoding="gzip")

    async def _cookie(self, writer, row, time) -> None:
        self._send(writer, picture(row), set_cookie="who=you; Path=/")

    async def _voids(self, writer, row, time) -> None:
        begin = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b"")[:10]
        await self._forever(writer, begin, EMPTY_BLOCK * 10_000)

    async def _tail(self, writer, row, time) -> None:
        await self._forever(writer, b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(picture(row)), bytes(2**16))

    async def _zipped(self, writer, row, time) -> None:
        self._send(writer, gzip.compress(picture(row)), content_encoding="gzip")

    async def _chunks(self, writer, row, time) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n\xff\xd8\xff\r\nxyz\r\nnonsense\r\n")

    async def _torn(self, writer, row, time) -> None:
        body = picture(row)
        writer.write(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode() + body[:30])
        raise EOFError

    async def _flood(self, writer, row, time) -> None:
        await self._forever(writer, b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 500)

    async def _extension(self, writer, row, time) -> None:
        await self._forever(writer, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;", b"a" * 10_000)

    async def _crumbs(self, writer, row, time) -> None:
        await self._forever(writer, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n\xff\xd8\xff\r\n", b"1\r\n\0\r\n" * 2000)

    async def _trailers(self, writer, row, time) -> None:
        begin = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n\xff\xd8\xff\r\n0\r\n"
        await self._forever(writer, begin, b"x: " + b"a" * 1000 + b"\r\n")

    async def _headers(self, writer, row, time) -> None:
        await self._forever(writer, b"HTTP/1.1 200 OK\r\n", b"x: " + b"a" * 1000 + b"\r\n")

    async def _noise(self, writer, row, time) -> None:
        await self._forever(writer, b"", bytes(range(256)) * 40)

    async def _forever(self, writer, begin: bytes, more: bytes) -> None:
        writer.write(begin)
        while True:
            writer.write(more)
            await writer.drain()

    async def _bytes(self, writer, row, time) -> None:
        writer.write(b"HTTP/1.1 404 \xff\xfe\xed\xa0\x80\r\nContent-Length: 0\r\n\r\n")

    async def _strange(self, writer, row, time) -> None:
        writer.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: http://\xff\xed\xa0\x80/\xff\r\n\r\n")

    async def _coding(self, writer, row, time) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Encoding: \xff\xfe\r\n\r\n")

    async def _gone(self, writer, row, time) -> None:
        self._send(writer, HTML, "404 Not Found")

    async def _html(self, writer, row, time) -> None:
        self._send(writer, HTML)

    async def _cut(self, writer, row, time) -> None:
        self._send(writer, picture(row)[:-40])

    async def _header(self, writer, row, time) -> None:
        self._send(writer, picture(row), x_padding="a" * 300_000)

    async def _noai(self, writer, row, time) -> None:
        self._send(writer, picture(row), x_robots_tag="noai, noimageai")

    async def _robots(self, writer, row, time) -> None:
        self._send(writer, picture(row), x_robots_tag=ROBOTS[row][0])

    async def _away(self, writer, row, time) -> None:
        self._send(writer, b"", "302 Found", location=f"http://rebound.test:{self.port}/good/{row}")

    async def _pixels(self, writer, row, time) -> None:
        self._send(writer, huge_png())

    async def _empty(self, writer, row, time) -> None:
        self._send(writer, b"")


EVIL = (
    "slow", "endless", "short", "long", "mistyped", "inward", "loop", "reset", "busy", "flaky", "silent", "drip", "bomb", "chunks", "gone", "html",
    "cut", "header",
)  # fmt: skip
REST = ("good", "moved", "zipped", "noai", "pixels", "good", "good", "good", "good", "empty")
GOOD = frozenset(("slow", "mistyped", "busy", "flaky", "good", "moved", "zipped"))
REASONS = {
    "endless": {"too-many-bytes"}, "short": {"cut-off"}, "long": {"protocol", "truncated"}, "inward": {"address", "url"}, "loop": {"redirects"},
    "reset": {"reset"}, "silent": {"timeout"}, "drip": {"too-slow"}, "bomb": {"too-many-bytes"}, "chunks": {"protocol"}, "gone": {"http-404"},
    "html": {"format"}, "cut": {"truncated"}, "header": {"protocol"}, "noai": {"opt-out"}, "pixels": {"too-large"}, "empty": {"empty"},
}  # fmt: skip


def kinds(count: int) -> Iterator[str]:
    """The kind of each of count rows: a twentieth of each of EVIL, and the rest."""
    for row in range(count):
        place = row % 20
        yield EVIL[place] if place < len(EVIL) else REST[(row // 20 * 2 + place) % len(REST)]
