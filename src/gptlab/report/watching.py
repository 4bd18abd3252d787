"""What `gptlab watch` serves: one page of the runs in a folder, and what has changed since a version of it.

The server answers on 127.0.0.1 alone, and two addresses only: the page and its news. No path reaches a file. A request
under another name for this machine is refused, so that no web page elsewhere can read the runs by pointing a name of
its own here (DNS rebinding), and no other page may embed or read the answers.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gptlab.errors import UserError
from gptlab.files import because
from gptlab.report.listing import find_runs, tell_apart
from gptlab.report.page import RUNS, fill_page
from gptlab.report.reading import short_names
from gptlab.report.run_page import Follower, page_payload, points_of_a_curve
from gptlab.rundir import RunDir
from gptlab.status import STATUSES

HOST, PORT = "127.0.0.1", 8421
TRAINING_MS, IDLE_MS = 1500, 5000  # from one question of the page to the next
LOOK_EVERY, READ_EVERY = 3.0, 0.5  # seconds between looks for new runs, and between readings, whoever asks
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Watched:
    """The runs in folders, read on when somebody asks.

    Args:
        folders: run directories, studies' folders, or folders of runs.

    Raises:
        UserError: a folder that is none.
    """

    def __init__(self, folders: list[Path]) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"{folder} is no folder: name a run, a study's folder or a folder of runs")
        self.folders = folders
        self.fixed = all(RunDir(folder).exists() for folder in folders)  # no further run can appear
        self.title = ", ".join(folder.resolve().name for folder in folders)
        self.followers: dict[Path, Follower] = {}
        self.payloads: dict[str, tuple[int, dict[str, Any]]] = {}  # name to version and content
        self.remarks: list[str] = []
        self.version = time.time_ns() // 1000  # grows from one server to the next, too
        self._lock = threading.Lock()
        self._looked = self._read = -10.0 * LOOK_EVERY

    def news(self, since: int = 0) -> dict[str, Any]:
        """The names of all runs, and the content of those that have changed since a version."""
        with self._lock:
            self._update()
            changed = [content for version, content in self.payloads.values() if version > since]
            names = [follower.name for follower in self.followers.values()]
            told = {"version": self.version, "wait": self._wait(), "remarks": self.remarks}
            return {**told, "names": names, "runs": changed}

    def page(self) -> str:
        news = self.news()
        folder = ", ".join(map(str, self.folders))
        live = {key: news[key] for key in ("version", "wait", "remarks")}
        return fill_page(page_payload(self.title, news["runs"], folder=folder, **live), RUNS, connect="'self'")

    def _update(self) -> None:
        now = time.monotonic()
        if now - self._read < READ_EVERY:
            return
        self._read, fresh = now, False
        if now - self._looked >= LOOK_EVERY:
            self._looked, fresh = now, self._look()
        most = points_of_a_curve(len(self.followers))
        changed = [follower for follower in self.followers.values() if follower.update(most) or fresh]
        if not changed:
            return
        self.version += 1
        recipes = {path: recipe for path, f in self.followers.items() if (recipe := f.recipe) is not None}
        tell_apart([follower.row for follower in self.followers.values()], recipes)
        for follower in changed:
            self.payloads[follower.name] = self.version, follower.payload(most)

    def _look(self) -> bool:
        """Whether runs have appeared, or gone."""
        paths, self.remarks = find_runs(self.folders)
        if set(paths) == set(self.followers):
            return False
        names = dict(zip(paths, short_names(paths), strict=True))
        for path in paths:
            self.followers.setdefault(path, Follower(path, names[path])).name = names[path]
        self.followers = {path: self.followers[path] for path in paths}
        self.payloads = {}
        return True

    def _wait(self) -> int:
        """Milliseconds until the page asks again; 0: never, as nothing can change."""
        rows = [follower.row for follower in self.followers.values()]
        if any(row.running for row in rows):
            return TRAINING_MS
        return 0 if self.fixed and rows and all(row.status in STATUSES for row in rows) else IDLE_MS


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, watched: Watched, port: int) -> None:
        self.watched = watched
        super().__init__((HOST, port), Handler)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of an answer is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "gptlab", ""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if not self._ours():
            self._answer(403, "text/plain", "this server answers under its own address only")
        elif url.path == "/":
            self._answer(200, "text/html", self.server.watched.page())
        elif url.path == "/data":
            since = parse_qs(url.query).get("since", ["0"])[0][:20]
            news = self.server.watched.news(int(since) if since.isascii() and since.isdigit() else 0)
            self._answer(200, "application/json", json.dumps(news, allow_nan=False, separators=(",", ":")))
        else:
            self._answer(404, "text/plain", "there is nothing else here")

    do_HEAD = do_GET

    def _ours(self) -> bool:
        """Whether the request was sent to this server's own address, and by no page of another."""
        ours = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        elsewhere = origin is not None and origin not in {f"http://{one}" for one in ours}
        return self.headers.get("Host") in ours and not elsewhere

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def open_server(watched: Watched, port: int | None) -> Server:
    """A server on a port; without one on `PORT`, or on a free one where that is taken.

    Raises:
        UserError: the port is taken or not allowed.
    """
    try:
        return Server(watched, PORT if port is None else port)
    except OSError as error:
        if port is None and error.errno == errno.EADDRINUSE:
            return Server(watched, 0)
        why = "it is in use" if error.errno == errno.EADDRINUSE else because(error)
        raise UserError(f"port {port} cannot be opened: {why}; `--port 0` takes a free one") from None
    except OverflowError:
        raise UserError(f"--port {port}: a port is a number from 0 to 65535") from None
