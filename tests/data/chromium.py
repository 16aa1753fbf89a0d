"""Headless Chromium, driven through its own DevTools protocol over two pipes.

    with Chromium(tmp_path) as browser:
        browser.open(page)                       # a file, shown as file://...
        browser.evaluate("document.title")       # the value, as JSON would have it
        browser.press("ArrowRight")
        browser.screenshot(tmp_path / "page.png")

Needs a program named chromium, chromium-browser or google-chrome, and no other package.
"""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROGRAM = next(
    filter(
        None,
        map(
            shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        ),
    ),
    None,
)

NO_ARGUMENTS: dict[str, Any] = {}


class Chromium:
    """One browser with one tab."""

    def __init__(
        self, profile: Path, *, width: int = 1440, height: int = 900, dark: bool = False
    ) -> None:
        assert PROGRAM is not None, "no Chromium: apt-get install chromium"
        self._last_id = 0
        self.events: list[dict[str, Any]] = []
        """All that the browser reported by itself: console messages, requests, exceptions."""
        from_us, self._write = os.pipe()
        self._read, to_us = os.pipe()
        command = [
            PROGRAM,
            "--headless=new",
            "--remote-debugging-pipe",  # on file descriptors 3 and 4
            "--no-sandbox",  # which root, as in a container, cannot have
            "--disable-gpu",
            "--no-first-run",
            "--disable-dev-shm-usage",
            f"--window-size={width},{height}",
            f"--user-data-dir={profile / 'chromium'}",
        ]
        script = f'exec "$@" 3<&{from_us} 4>&{to_us}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(from_us, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self._buffer = b""
        self._session: str | None = None
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        arguments = {"targetId": target, "flatten": True}
        self._session = self.call("Target.attachToTarget", arguments)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", {"features": [theme]})

    def call(self, method: str, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._last_id += 1
        message: dict[str, Any] = {
            "id": self._last_id,
            "method": method,
            "params": dict(arguments),
        }
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "the browser is gone"
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, page: Path, fragment: str = "") -> None:
        """Show a file, and wait until its script has run."""
        self.call("Page.navigate", {"url": page.resolve().as_uri() + fragment})
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, a promise awaited."""
        arguments = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", arguments)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 30) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press and release a key, named as `KeyboardEvent.key`."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", {"type": "keyDown", "key": key, **text})
        self.call("Input.dispatchKeyEvent", {"type": "keyUp", "key": key})

    def move_to(self, x: float, y: float) -> None:
        """Move the pointer."""
        self.call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def screenshot(self, file: Path) -> None:
        """Write what can be seen as PNG."""
        result = self.call("Page.captureScreenshot", {"format": "png"})
        file.write_bytes(base64.b64decode(result["data"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._write)
        os.close(self._read)


def keep_screenshot(browser: Chromium, file: Path, variable: str) -> Path:
    """Take a screenshot; the environment variable is a folder to keep a copy in."""
    browser.screenshot(file)
    folder = os.environ.get(variable)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)
    return file


def trouble(browser: Chromium, page: str, pictures: str) -> list[object]:
    """Exceptions, refused content, and requests for anything but the page and its own pictures.

    Args:
        browser: with a page open.
        page: the name of its file.
        pictures: how the addresses of its pictures begin.
    """
    found: list[object] = []
    for event in browser.events:
        method, params = event["method"], event["params"]
        if method == "Runtime.exceptionThrown":
            found.append(params["exceptionDetails"])
        elif method == "Log.entryAdded":
            found.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(pictures) and page not in url:
                found.append(url)
    return found
