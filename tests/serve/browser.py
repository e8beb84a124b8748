"""A real headless Chromium, driven over its own protocol, just enough to use a page."""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

ROOT = Path(__file__).resolve().parents[2]


class Page:
    """One open page. What its scripts log or throw is collected in ``problems``."""

    def __init__(self, connection: ClientConnection, session: str) -> None:
        self._connection = connection
        self._session = session
        self._numbers = itertools.count(1000)
        self.problems: list[str] = []
        self.requested: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call the browser and return its result."""
        number = next(self._numbers)
        message = {
            "id": number, "method": method, "params": parameters, "sessionId": self._session
        }  # fmt: skip
        self._connection.send(json.dumps(message))
        while True:
            answer = json.loads(self._connection.recv(timeout=60))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]  # type: ignore[no-any-return]
            self._note(answer)

    def evaluate(self, script: str) -> Any:
        """Return what a script evaluates to, promises awaited."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, *, timeout_s: float = 30.0) -> None:
        """Return when a condition becomes true.

        Raises:
            TimeoutError: it did not.
        """
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{condition}; problems: {self.problems}")
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """Press the mouse on an element, as a person would."""
        self.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = self.evaluate(
            f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left",
                clickCount=1,
            )  # fmt: skip

    def type_into(self, selector: str, text: str) -> None:
        """Replace the text of a field by typing."""
        self.evaluate(f"document.querySelector({selector!r}).select()")
        self.evaluate(f"document.querySelector({selector!r}).focus()")
        self.call("Input.insertText", text=text)

    def press(self, selector: str, key: str, times: int = 1) -> None:
        """Press a key on an element."""
        self.evaluate(f"document.querySelector({selector!r}).focus()")
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}[key]
                self.call(
                    "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                    windowsVirtualKeyCode=code,
                )  # fmt: skip

    def screenshot(self, path: Path) -> None:
        """Save a picture of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(str(parameters["exceptionDetails"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.problems.append(str(parameters["entry"]["text"]))
            case "Network.requestWillBeSent":
                self.requested.append(str(parameters["request"]["url"]))
            case _:
                pass


@contextmanager
def open_page(url: str, folder: Path, *, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """Open a page in a Chromium of its own, which ends with the block.

    Args:
        url: of the page.
        folder: for the browser's profile.
        width: of the window, in pixels.
        height: of the window, in pixels.
    """
    program, more = _tool().find()
    command = [
        str(program), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-dev-shm-usage", "--remote-debugging-port=0", "--hide-scrollbars",
        f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **more})
    try:
        with connect(_address(folder, process), max_size=None) as connection:
            yield _opened(connection, url)
    finally:
        process.kill()
        process.wait()


def _opened(connection: ClientConnection, url: str) -> Page:
    connection.send(
        json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}})
    )
    target = _result(connection, 1)["targetId"]
    parameters = {"targetId": target, "flatten": True}
    connection.send(json.dumps({"id": 2, "method": "Target.attachToTarget", "params": parameters}))
    page = Page(connection, str(_result(connection, 2)["sessionId"]))
    page.call("Page.navigate", url=url)
    page.wait(f"document.readyState === 'complete' && location.href.startsWith({url!r})")
    return page


def _result(connection: ClientConnection, number: int) -> dict[str, Any]:
    while True:
        answer = json.loads(connection.recv(timeout=60))
        if answer.get("id") == number:
            return answer["result"]  # type: ignore[no-any-return]


def _address(folder: Path, process: subprocess.Popen[bytes]) -> str:
    """Where the browser listens; it writes that into its profile."""
    deadline = time.monotonic() + 60
    file = folder / "DevToolsActivePort"
    while not (file.is_file() and len(file.read_text().split()) == 2):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Chromium did not start: {(folder / 'log').read_text()[-500:]}")
        time.sleep(0.05)
    port, path = file.read_text().split()
    return f"ws://127.0.0.1:{port}{path}"


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("browser_tool", ROOT / "tools" / "browser.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
