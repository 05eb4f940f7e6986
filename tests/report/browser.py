"""A real headless Chromium, driven through chromedriver's W3C WebDriver protocol with plain HTTP."""

import base64
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from support.ports import LOOPBACK, free_port, tried_again
from support.processes import running

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def binaries() -> tuple[str, str] | None:
    """Paths of Chromium and chromedriver, or None where either is absent."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One browser window. `script` runs JavaScript, `find` gives element ids, `keys` types."""

    def __init__(self, session: str) -> None:
        self._session = session

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return _call(method, f"{self._session}{path}", body)

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    @property
    def url(self) -> str:
        return str(self.call("GET", "/url"))

    def script(self, source: str, *arguments: Any) -> Any:
        return self.call("POST", "/execute/sync", {"script": source, "args": list(arguments)})

    def find(self, css: str) -> str:
        return str(self.call("POST", "/element", {"using": "css selector", "value": css})[_ELEMENT])

    def click(self, css: str) -> None:
        self.call("POST", f"/element/{self.find(css)}/click", {})

    def type(self, css: str, text: str) -> None:
        """Type into an element; for a file input `text` is a path."""
        self.call("POST", f"/element/{self.find(css)}/value", {"text": text})

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        steps = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": steps}]})

    def hover(self, css: str) -> None:
        origin = {_ELEMENT: self.find(css)}
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": origin}
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
        self.call("POST", "/actions", {"actions": [pointer]})

    def size(self, width: int, height: int) -> None:
        """Size of the page's own area, also below the least width of a window."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, name: str) -> None:
        """`light` or `dark`."""
        self.devtools("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": name}]})

    def devtools(self, command: str, params: dict[str, Any]) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.devtools("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))

    def log(self) -> list[str]:
        """Messages of the console since the last call: errors of scripts, refused resources."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile under `folder`; it and its driver end with the block."""
    found = binaries()
    assert found, "no Chromium here"
    with ExitStack() as stack:
        base = tried_again(lambda: stack.enter_context(_driver(found[1], folder)))
        options = {"binary": found[0], "args": [*_FLAGS, f"--user-data-dir={folder / 'profile'}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = _call("POST", f"{base}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        browser = Browser(f"{base}/session/{session}")
        try:
            yield browser
        finally:
            browser.call("DELETE", "")


@contextmanager
def _driver(program: str, folder: Path) -> Iterator[str]:
    port = free_port()
    base = f"http://{LOOPBACK}:{port}"
    with running(
        [program, f"--port={port}"], name="chromedriver", log_dir=folder, ready=lambda process: _is_ready(base)
    ):
        yield base


def _is_ready(base: str) -> bool:
    try:
        return bool(_call("GET", f"{base}/status")["ready"])
    except OSError:
        return False


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _call(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None and method != "POST" else json.dumps(body or {}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with _opener.open(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{method} {url}: {error.read().decode(errors='replace')[:500]}") from error
