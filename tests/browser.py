"""A headless Chromium for the tests of pages: the few commands of the WebDriver protocol that they need."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = "" if CHROMIUM and DRIVER else "needs chromium and chromedriver on the PATH"
KEYS = {"Right": "\ue014", "Left": "\ue012", "End": "\ue010", "Home": "\ue011", "Tab": "\ue004", "Enter": "\ue007"}
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Browser:
    """One session. `open` a page, `run` scripts in it, press `keys`, read what it `logged` and `requested`."""

    def __init__(self, address: str, folder: str) -> None:
        self._address = address
        options = {"args": [*_FLAGS, f"--user-data-dir={folder}", "about:blank"], "binary": CHROMIUM}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self._session = ""
        self._visits = 0
        answer = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{answer['sessionId']}"

    def open(self, page: Path) -> None:
        """Load a page. On a busy machine the driver answers while the page before is still shown: wait for this one."""
        self._visits += 1
        wanted = f"{page.resolve().as_uri()}?{self._visits}"  # so that a page that is opened again is told apart, too
        self._send("POST", "/url", {"url": wanted})
        deadline = time.monotonic() + 60
        while self.run("return [location.href, document.readyState]") != [wanted, "complete"]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{wanted} isn't shown after 60 s")
            time.sleep(0.02)

    def emulate(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show pages in a viewport of a size, and in the light or the dark scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script: str) -> Any:
        """The value that a script returns."""
        return self._send("POST", "/execute/sync", {"script": script, "args": []})

    def keys(self, *names: str) -> None:
        """Press and release keys, on whatever has the focus."""
        strokes = [(kind, KEYS.get(name, name)) for name in names for kind in ("keyDown", "keyUp")]
        actions = [{"type": kind, "value": value} for kind, value in strokes]
        self._send("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def point(self, x: int, y: int) -> None:
        """Move the pointer to a place of the viewport."""
        move = {"type": "pointerMove", "duration": 0, "x": x, "y": y, "origin": "viewport"}
        self._send("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def logged(self) -> list[str]:
        """What the console said since the last call."""
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def requested(self) -> list[str]:
        """The addresses that opened pages, not the browser's own, asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self._send("POST", "/se/log", _PERFORMANCE)]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        pages = [one["request"]["url"] for one in sent if one["documentURL"].startswith("file:")]
        return [address.partition("?")[0] for address in pages]

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Save the page, or what the viewport shows of it, as a PNG."""
        shape = {"captureBeyondViewport": whole, "format": "png"} | self._clip(whole)
        answer = self._devtools("Page.captureScreenshot", shape)
        path.write_bytes(base64.b64decode(answer["data"]))

    def quit(self) -> None:
        self._send("DELETE", "")

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        width, height = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        return {"clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}}

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._send("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(f"{self._address}{self._session}{path}", method=method)
        request.add_header("Content-Type", "application/json")
        data = json.dumps(body).encode() if body is not None else None
        try:
            with urllib.request.urlopen(request, data, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from None


_PERFORMANCE = {"type": "performance"}


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own, gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert DRIVER is not None
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            _wait_for(port)
            session = Browser(f"http://127.0.0.1:{port}", folder)
            try:
                yield session
            finally:
                session.quit()
    finally:
        driver.terminate()
        driver.wait(timeout=30)


def _wait_for(port: int, patience_s: float = 20.0) -> None:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("chromedriver doesn't answer")
