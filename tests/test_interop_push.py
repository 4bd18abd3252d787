"""`gptlab export --push`: uploads to a local stand-in of the Hugging Face hub, and what is said when it fails."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from processes import free_port

from gptlab.errors import HubError
from gptlab.interop.push import create_repository, upload

TOKEN = "hf_stand_in"


class Hub(ThreadingHTTPServer):
    """The parts of the hub's HTTP API that an upload uses; files of a repository by name."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", free_port()), Answer)
        self.status, self.created, self.objects, self.files = status, [], {}, {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: object = None) -> None:
        body = json.dumps(content or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while size := int(self.rfile.readline(), 16):  # chunked
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_PUT(self) -> None:  # a large file, to where the LFS batch said
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer(200)

    def do_GET(self) -> None:
        self.answer(404)

    def do_POST(self) -> None:
        body, hub, path = self.body(), self.server, self.path.partition("?")[0]
        if hub.status != 200:
            return self.answer(hub.status, {"error": "refused"})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            created = {"url": f"{hub.url}/{asked['organization']}/{asked['name']}"}
            if hub.created:
                return self.answer(409, created | {"error": "You already created this model repo"})
            hub.created.append(asked)
            return self.answer(200, created)
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/models/somebody/model/preupload/main":
            modes = [
                {"path": file["path"], "shouldIgnore": False, "uploadMode": "lfs" if file["size"] > 999 else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": modes})
        if path == "/somebody/model.git/info/lfs/objects/batch":
            objects = [
                item | {"actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if path == "/api/models/somebody/model/commit/main":
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            return self.answer(200, {"commitUrl": f"{hub.url}/somebody/model/commit/1", "commitOid": "1" * 40})
        return self.answer(404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        stand_in(monkeypatch, server.url)
        yield server
        server.shutdown()


def stand_in(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Talk to `url`, as HF_ENDPOINT would have it in a new process, by the protocol that all versions know."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model/plots").mkdir(parents=True)
    (tmp_path / "model/README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    (tmp_path / "model/model.safetensors").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "model/plots/loss.png").write_bytes(b"png" * 1000)
    return tmp_path / "model"


def test_a_folder_is_uploaded_file_by_file_small_and_large(hub: Hub, folder: Path) -> None:
    create_repository("somebody/model")
    assert [(row["organization"], row["name"]) for row in hub.created] == [("somebody", "model")]
    assert hub.created[0].get("visibility") == "private" or hub.created[0].get("private") is True
    assert upload(folder, "somebody/model") == f"{hub.url}/somebody/model"
    assert len(hub.objects) == 2
    written = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files == written
    create_repository("somebody/model")  # one that exists is written to


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the hub does not know this token: `hf auth login` makes another one"),
        (403, "this token may not write to somebody/model"),
        (404, "this token may not write to somebody/model"),
        (500, "the hub answers 500"),
    ],
)
def test_refusals_are_one_sentence(
    hub: Hub, folder: Path, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts of the library
    hub.status = status
    for work, then in (
        (lambda: create_repository("somebody/model"), ""),
        (lambda: upload(folder, "somebody/model"), f"`hf upload somebody/model {folder}` sends it again"),
    ):
        with pytest.raises(HubError) as error:
            work()
        assert str(error.value).startswith("--push somebody/model: ")
        assert said in str(error.value)
        assert str(error.value).endswith(then)
        assert "\n" not in str(error.value)


def test_without_token_network_or_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    stand_in(monkeypatch, url)
    with pytest.raises(HubError, match=f"talking to {url} failed .*refused"):
        create_repository("somebody/model")
    with pytest.raises(HubError, match="--push model: a repository is named USER/NAME"):
        create_repository("model")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match="`hf auth login` asks for it, or set HF_TOKEN"):
        create_repository("somebody/model")
