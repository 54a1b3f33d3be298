"""A real headless browser for tests, driven by the Chrome DevTools protocol over a pipe: no package, no port."""

import json
import os
import select
import shutil
import subprocess
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT = 60  # seconds for one answer


def find_program() -> str | None:
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """One browser process; `close` ends it."""

    def __init__(self, program: str, profile: Path):
        (child_in, self.out), (self.input, child_out) = os.pipe(), os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # The protocol's pipes are file descriptors 3 and 4.
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{child_in} 4>&{child_out}', program, *flags]
        self.process = subprocess.Popen(command, pass_fds=(child_in, child_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(child_in)
        os.close(child_out)
        self.last_id, self.unread, self.events = 0, b"", []

    def call(self, method: str, session: str | None = None, **parameters) -> dict:
        """The result of a protocol command; events that come meanwhile are kept in `events`."""
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.last_id:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.unread:
            assert select.select([self.input], [], [], TIMEOUT)[0], "the browser does not answer"
            received = os.read(self.input, 1 << 20)
            assert received, "the browser has ended"
            self.unread += received
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def run(self, page: Path, body: str, before: str = "", dark: bool = False) -> tuple[dict, list[str]]:
        """Open page in a window of 1200 x 900, run the body of an async function with an object `result`; (result, URLs the page asked for).

        before: a script that runs before those of the page; dark: the system prefers dark colours.
        """
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network"):
            self.call(f"{domain}.enable", session)
        self.call("Emulation.setDeviceMetricsOverride", session, width=1200, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", session, features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Emulation.setFocusEmulationEnabled", session, enabled=True)
        self.call("Page.addScriptToEvaluateOnNewDocument", session, source=before)
        self.call("Page.navigate", session, url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())
        script = f"(async () => {{ const result = {{}}; {body}; return result; }})()"
        answer = self.call("Runtime.evaluate", session, expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        self.call("Target.closeTarget", targetId=target)
        asked = [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return answer["result"]["value"], [url for url in asked if url != page.as_uri() and not url.startswith("data:")]

    def close(self) -> None:
        self.call("Browser.close")
        os.close(self.out)
        self.process.wait(TIMEOUT)
        os.close(self.input)
