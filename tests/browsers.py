"""A browser to look at a page with: Chromium without a window, spoken to in its own protocol over two pipes.

No driver and no library. The helpers at the end look at the first study of a report.
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIRE = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execvp(a[3], a[3:])"
LOADED = "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(performance.now()))))"


class Browser:
    """One page in a headless Chromium, by its DevTools protocol: JSON with a zero byte after it, over pipes 3 and 4."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.events, self.count, self.rest, self.session = folder, [], 0, b"", None
        theirs_in, self.out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        self.into, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        wired = [sys.executable, "-c", WIRE, str(theirs_in), str(theirs_out), CHROMIUM, *FLAGS]
        self.process = subprocess.Popen(
            [*wired, f"--user-data-dir={folder / 'profile'}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(1280, 900)

    def close(self) -> None:
        self.session = None
        with contextlib.suppress(OSError):
            self.send("Browser.close")
        self.process.wait(20)
        os.close(self.out)
        os.close(self.into)

    def send(self, method: str, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def receive(self) -> dict:
        """The next message; what the page does of itself is kept in `events`."""
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.into], [], [], 60)
            data = os.read(self.into, 1 << 20) if ready else b""
            if not data:
                raise OSError("Chromium is gone" if ready else "Chromium has not answered for a minute")
            self.rest += data
        message, self.rest = self.rest.split(b"\0", 1)
        answer = json.loads(message)
        if "id" not in answer:
            self.events.append(answer)
        return answer

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: str) -> float:
        """Open a page from a file and say how many milliseconds that took until all was drawn."""
        file = self.folder / "report.html"
        file.write_text(page, encoding="utf-8")
        self.events.clear()
        self.send("Page.navigate", url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.receive()
        return self.run(LOADED)

    def run(self, script: str):
        """The value of an expression in the page."""
        how = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.send("Runtime.evaluate", expression=script, **how)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def each(self, selector: str, script: str) -> list:
        """The value of an expression of `one` for each element that a selector finds."""
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => {script})")

    def first(self, selector: str, script: str):
        """The same for the first of them."""
        return self.run(f"((one) => {script})(document.querySelector({json.dumps(selector)}))")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element, scrolled into view."""
        self.first(selector, "one.scrollIntoView({ block: 'center', behavior: 'instant' })")
        self.run(LOADED)
        edges = "(({ left, top, width, height }) => [left, top, width, height])(one.getBoundingClientRect())"
        return tuple(self.first(selector, edges))

    def mouse(self, kind: str, x: float, y: float, **more) -> None:
        self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def hover(self, selector: str) -> None:
        left, top, width, height = self.box(selector)
        self.mouse("Moved", left + width / 2, top + height / 2)

    def click(self, selector: str, times: int = 1) -> None:
        left, top, width, height = self.box(selector)
        for count in range(1, times + 1):
            for kind in ("Pressed", "Released"):
                button = {"button": "left", "buttons": 1, "clickCount": count}
                self.mouse(kind, left + width / 2, top + height / 2, **button)

    def key(self, key: str, **more) -> None:
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, file: Path, whole: bool = True) -> None:
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list:
        """Console messages, exceptions, dialogs, and requests for anything but the page itself."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        kinds += ("Page.javascriptDialogOpening",)
        asked = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        own = [one for one in asked if one["request"]["url"].startswith((one["documentURL"], "blob:", "data:"))]
        return [event for event in self.events if event["method"] in kinds] + [one for one in asked if one not in own]


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(prefix="gptlab-page-", ignore_cleanup_errors=True) as folder:
        one = Browser(Path(folder))
        yield one
        one.close()


# -- the first study of a report ------------------------------------------------------------------------------------

TABLE, CHARTS, FOREST = "#study-0-table", "#study-0-curves", "#study-0-differences"
BLUE, SKY = "#0072B2", "#56B4E9"  # the first arm's colour, on white and on black


def arms_in(browser: Browser, where: str, row: str = "tbody tr") -> list[str]:
    return browser.each(f"{where} {row}", "one.dataset.arm")


def picked(browser: Browser) -> list[str]:
    return browser.each(f"{TABLE} input:checked", "one.dataset.pick")


def tip(browser: Browser) -> str:
    return browser.first("#tip", "one.hidden ? '' : one.innerText")


def x_ticks(browser: Browser) -> list[str]:
    return browser.each(f"{CHARTS} .curves > div:first-child text[text-anchor=middle]", "one.textContent")


def inked(browser: Browser, color: str) -> int:
    """How many pixels of the first study's curves have this colour."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)] + [255]
    read = (  # of a copy: the page's own canvas stays where the browser has put it
        "(() => { const from = document.querySelector('CANVAS'), copy = new OffscreenCanvas(from.width, from.height);"
        " const pen = copy.getContext('2d', { willReadFrequently: true }); pen.drawImage(from, 0, 0);"
        " const { data } = pen.getImageData(0, 0, copy.width, copy.height); let count = 0;"
        " for (let i = 0; i < data.length; i += 4) count += WANTED.every((one, j) => Math.abs(data[i + j] - one) < 3);"
        " return count; })()"
    )
    return browser.run(read.replace("CANVAS", f"{CHARTS} canvas").replace("WANTED", str(wanted)))
