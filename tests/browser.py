"""A headless Chromium, driven over the DevTools protocol by nothing but pipes.

Chromium with --remote-debugging-pipe reads JSON messages from its descriptor 3 and writes them to
its descriptor 4, each ended by a NUL, so no port, no websocket and no driver is needed.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
    "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run",
    "--hide-scrollbars", "--force-color-profile=srgb",
)  # fmt: skip
# Descriptors 3 and 4 may be in use in the parent; only the child may move them.
_START = (
    "import fcntl, os, sys; r, w = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]);"
    "os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def find() -> str | None:
    """The path of a Chromium or Chrome on this machine, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of one browser. `events` holds what it told unasked, oldest first."""

    def __init__(self, send: int, receive: int, timeout_s: float) -> None:
        self.send, self.receive, self.timeout_s = send, receive, timeout_s
        self.events: list[dict[str, Any]] = []
        self._left, self._number, self._session = b"", 0, None
        self._selector = selectors.DefaultSelector()
        self._selector.register(receive, selectors.EVENT_READ)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer. Raises RuntimeError where it fails."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event: str) -> dict[str, Any]:
        """The first event of this name after those already read."""
        seen = 0
        while True:
            for told in self.events[seen:]:
                if told.get("method") == event:
                    return told["params"]
            seen = len(self.events)
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + self.timeout_s
        while b"\0" not in self._left:
            if not self._selector.select(max(0.0, end - time.monotonic())):
                raise TimeoutError(f"the browser said nothing for {self.timeout_s} s")
            piece = os.read(self.receive, 1 << 20)
            if not piece:
                raise RuntimeError("the browser went away")
            self._left += piece
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def show(self, page: Path, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Loads `page` at this width (CSS pixels), without network, and waits until it is drawn."""
        self.events.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media="screen", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        self.call("Network.emulateNetworkConditions", offline=True, latency=0,
                  downloadThroughput=-1, uploadThroughput=-1)  # fmt: skip
        self.call("Page.navigate", url=page.as_uri())
        self.wait_for("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, which the page itself need not know about."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def screenshot(self, **clip: float) -> bytes:
        """PNG of the whole page, or of x, y, width, height."""
        extra = {"clip": clip | {"scale": 1}} if clip else {}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, **extra)
        return b64decode(shot["data"])


@contextmanager
def browser(path: str, profile: Path, timeout_s: float = 60.0) -> Iterator[Browser]:
    """Starts the browser at `path` with an empty profile in `profile`, and ends it."""
    to_child, send = os.pipe()
    receive, from_child = os.pipe()
    command = [sys.executable, "-c", _START, str(to_child), str(from_child), path, *FLAGS,
               f"--user-data-dir={profile}"]  # fmt: skip
    process = subprocess.Popen(command, pass_fds=(to_child, from_child), stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    os.close(to_child)
    os.close(from_child)
    try:
        page = Browser(send, receive, timeout_s)
        yield page
        page._session = None
        page.call("Browser.close")
    finally:
        os.close(send)
        os.close(receive)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
