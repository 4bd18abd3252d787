"""The page of a run and of runs that are watched: what is read as a run grows, what is served, what a browser shows."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsers import LOADED, Browser, needs_chromium, tip
from conftest import tiny_recipe
from test_cli import call
from test_report_charts import reading
from test_report_plots import evaluations, make_run, training

from gptlab.cli.train import draw_run
from gptlab.errors import UserError
from gptlab.report import run_page, watching
from gptlab.report.run_page import FILE, Follower, write_run_page
from gptlab.report.watching import IDLE_MS, TRAINING_MS, Server, Watched, open_server
from gptlab.rundir import RunDir

EVIL = "</script><img src=x onerror=alert(1)>"


def append(run: RunDir, lines, cut: int = 0) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with open(run.metrics_file, "a", encoding="utf-8") as file:
        file.write(text[: len(text) - cut])


def points(follower: Follower, key: str = "train") -> dict[int, float]:
    return dict(zip(*follower.payload()[key], strict=True))


# -- reading ------------------------------------------------------------------------------------------------------


def test_a_growing_file_is_read_on_and_nothing_twice(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", [*evaluations([0], [4.0]), *training([1, 2], [3.5, 3.25])])
    follower, read = Follower(run.path, "a"), []
    parse = run_page.parse_metrics
    monkeypatch.setattr(run_page, "parse_metrics", lambda line: read.append(line) or parse(line))
    assert follower.update() and not follower.update()
    assert points(follower) == {1: 3.5, 2: 3.25} and points(follower, "val") == {0: 4.0}
    append(run, training([3, 4], [3.0, 2.75]), cut=10)  # the second line is half written
    assert follower.update() and points(follower) == {1: 3.5, 2: 3.25, 3: 3.0}
    with open(run.metrics_file, "ab") as file:
        file.write(json.dumps(training([4], [2.75])[0]).encode()[-9:] + b"\n")
    follower.update()
    assert points(follower) == {1: 3.5, 2: 3.25, 3: 3.0, 4: 2.75}
    assert sorted(json.loads(line)["step"] for line in read if line) == [0, 1, 2, 3, 4]


def test_a_run_that_resumes_from_an_earlier_step_is_read_anew(tmp_path):
    run = make_run(tmp_path / "a", training([1, 2, 3], [3.5, 3.25, 9.0]))
    follower = Follower(run.path, "a")
    follower.update()
    run.cut_metrics(2)
    append(run, training([3], [3.0]))
    follower.update()
    assert points(follower) == {1: 3.5, 2: 3.25, 3: 3.0}


def test_what_is_new_in_large_files_is_read_in_bounded_memory(tmp_path, monkeypatch):
    steps = list(range(1, 5001))
    losses = [4 - step / 2000 for step in steps]
    losses[3000] = 50.0  # a spike stays visible
    run = make_run(tmp_path / "a", [*training(steps, losses), *evaluations([2500], [1.5])])
    parts, whole = Follower(run.path, "a"), Follower(run.path, "a")
    parts.update()
    monkeypatch.setattr(run_page, "LINE_BYTES", 10_000)
    whole.update()
    for follower in (parts, whole):
        shown = points(follower)
        assert len(shown) <= run_page.MOST_POINTS + 2 and shown[3001] == 50.0 and {1, 5000} <= set(shown)
        assert points(follower, "val") == {2500: 1.5}
        assert all(len(kept) <= 3 * run_page.MOST_POINTS for kept in follower.points.values())
    append(run, training([5001], [1.25]))
    parts.update()
    assert points(parts)[5001] == 1.25


def test_many_runs_have_fewer_points_each(tmp_path):
    assert run_page.points_of_a_curve(1) == 600 and run_page.points_of_a_curve(10_000) == 150


def test_what_is_not_finite_is_left_out(tmp_path):
    run = make_run(tmp_path / "a", training([1, 2, 3], [3.5, None, 3.0]), {"status": "diverged", "failed_at_step": 2})
    follower = Follower(run.path, "a")
    follower.update()
    told = follower.payload()
    assert points(follower) == {1: 3.5, 3: 3.0} and (told["status"], told["ended"]) == ("diverged", 2)
    json.dumps(told, allow_nan=False)


def test_samples_are_the_last_and_some_before(tmp_path):
    run = make_run(tmp_path / "a", [])
    (run.path / "samples").mkdir()
    for step in range(0, 1000, 10):
        (run.path / f"samples/step-{step:08d}.txt").write_bytes(b"\xff" + f"{step} {'x' * 9000}".encode())
    (run.path / "samples/step-x.txt").write_text("not one", encoding="utf-8")
    found = run_page.samples_of(run)
    assert len(found) == 6 and found[0]["step"] == 0 and found[-1]["step"] == 990
    assert all(len(one["text"]) <= 3001 and one["text"].endswith("…") for one in found)


# -- run.html -----------------------------------------------------------------------------------------------------


def test_run_html_is_one_small_file_that_asks_for_nothing(tmp_path):
    steps = list(range(1, 5001))
    lines = [line | {"grad_norm": 1.0, "memory_gb": 2.0} for line in training(steps, [4 - s / 2000 for s in steps])]
    run = make_run(tmp_path / EVIL.replace("/", "|"), lines, {"status": "completed", "steps": 5000, "reason": EVIL})
    (run.path / "samples").mkdir()
    (run.path / "samples/step-00000001.txt").write_text(EVIL, encoding="utf-8")
    file = write_run_page(run)
    page = file.read_text(encoding="utf-8")
    assert file == run.path / FILE and file.stat().st_size < 300_000
    assert not re.search(r"(https?|wss?)://|@import|url\(|innerHTML|insertAdjacentHTML|document\.write|\beval\(", page)
    assert "connect-src 'none'" in page and "<img" not in page and page.count("</script>") == 2


def test_the_page_is_written_where_the_card_is(tmp_path, monkeypatch):
    monkeypatch.setattr("gptlab.report.plots.draw", lambda runs, out: [])
    run = make_run(tmp_path / "a", training([1], [3.0]), {"status": "completed"})
    draw_run(run.path)
    assert {"card.md", FILE} <= {path.name for path in run.path.iterdir()}
    failed = make_run(tmp_path / "b", [], {"status": "failed"})
    draw_run(failed.path)
    assert not (failed.path / FILE).exists()


# -- the server ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(*folders: Path) -> Iterator[Server]:
    with open_server(Watched(list(folders)), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: Server, path: str, **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_only_the_runs_are_served_and_only_to_their_own_page(tmp_path):
    run = make_run(tmp_path / "runs/a", training([1, 2], [3.0, 2.0]), {"status": "completed"})
    (run.path / "secret.txt").write_text("secret", encoding="utf-8")
    with serving(tmp_path / "runs") as server:
        assert server.server_address[0] == "127.0.0.1"
        status, page, headers = ask(server, "/")
        assert status == 200 and "connect-src 'self'" in page and headers["X-Frame-Options"] == "DENY"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and "Access-Control-Allow-Origin" not in headers
        assert ask(server, "/data", Host=f"localhost:{server.server_port}")[0] == 200
        for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", ""):
            assert ask(server, "/data", Host=host)[0] == 403
        assert ask(server, "/data", Origin="http://evil.example")[0] == 403
        assert ask(server, "/data", Origin="null")[0] == 403
        for path in ("/secret.txt", "/a/secret.txt", "/../runs/a/secret.txt", "/%2e%2e/a/recipe.toml", "//etc/passwd"):
            status, text, _ = ask(server, path)
            assert status == 404 and "secret" not in text
        assert ask(server, "/data?since=" + "9" * 10_000)[0] == 200
        assert ask(server, "/data?since=-1%00")[0] == 200


def test_news_are_what_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(watching, "READ_EVERY", 0.0)
    a = make_run(tmp_path / "a", training([1, 2], [3.0, 2.0]), {"status": "completed"})
    b = make_run(tmp_path / "b", training([1], [3.5]))
    watched = Watched([tmp_path])
    first = watched.news()
    assert (
        first["remarks"] == [] and first["names"] == ["a", "b"] and [run["arm"] for run in first["runs"]] == ["a", "b"]
    )
    assert watched.news(first["version"])["runs"] == [] and first["wait"] == IDLE_MS
    with b.lock():
        append(b, training([2], [3.25]))
        second = watched.news(first["version"])
        assert [(run["arm"], run["status"], run["train"][1]) for run in second["runs"]] == [
            ("b", "running", [3.5, 3.25])
        ]
        assert second["wait"] == TRAINING_MS
    make_run(tmp_path / "sub/c", training([1], [4.0]))  # a new run appears
    make_run(tmp_path / "1/2/3/4/5/6/7", [])  # too deep
    third = watched.news(second["version"])
    assert "levels deep" in third["remarks"][0]
    assert third["names"] == ["a", "b", "c"] and "c" in [run["arm"] for run in third["runs"]]
    assert Watched([tmp_path]).news()["version"] > third["version"]  # a page of an earlier server gets all anew
    assert Watched([a.path]).news()["wait"] == 0  # it has ended, and no other can appear
    assert Watched([b.path]).news()["wait"] == IDLE_MS
    with pytest.raises(UserError, match="is no folder"):
        Watched([tmp_path / "nowhere"])


def test_a_port_in_use_is_a_sentence(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} cannot be opened: it is in use; `--port 0`"):
            open_server(Watched([tmp_path]), port)
        monkeypatch.setattr(watching, "PORT", port)
        with open_server(Watched([tmp_path]), None) as server:  # nobody asked for that port
            assert server.server_port != port
    with pytest.raises(UserError, match="from 0 to 65535"):
        open_server(Watched([tmp_path]), 99_999)


def test_the_command_says_where_the_page_is(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "runs/a", training([1], [3.0]))
    monkeypatch.chdir(tmp_path)
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("SSH_CONNECTION", "1.2.3.4")

    def stopped(server, poll_interval):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", stopped)
    status, out, err = call(capsys, "watch", "--port", "0")
    assert status == 0 and err == "" and opened == [out.split()[0]] and "ssh -L " in out
    assert call(capsys, "watch", "runs/a", "--port", "0", "--no-browser")[0] == 0 and len(opened) == 1
    monkeypatch.chdir(tmp_path / "runs/a")
    assert "`gptlab watch DIR` names another" in call(capsys, "watch")[2]


@pytest.mark.slow
def test_ctrl_c_ends_the_command_with_status_0(tmp_path):
    make_run(tmp_path / "runs/a", training([1], [3.0]))
    command = [sys.executable, "-m", "gptlab", "watch", "--no-browser", "--port", "0"]
    own = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}  # a batch system ignores it
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **own) as p:
        address = p.stdout.readline().split()[0]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        p.send_signal(signal.SIGINT)
        assert p.wait(60) == 0 and p.stderr.read() == ""


# -- a browser ----------------------------------------------------------------------------------------------------

LOSS = "#curves > .chart .curves"


def visit(browser: Browser, address: str) -> None:
    browser.events.clear()
    browser.send("Page.navigate", url=address)
    while not any(event["method"] == "Page.loadEventFired" for event in browser.events):
        browser.receive()
    browser.run(LOADED)


def noted(browser: Browser) -> list:
    """What a page from a server complains about, its own requests left out."""
    return [one for one in browser.complaints() if "request" not in one]


@pytest.mark.slow
@needs_chromium
def test_run_html_shows_hovers_and_zooms(browser, tmp_path):
    steps = list(range(1, 201))
    losses = [4 - step / 100 for step in steps]
    val = evaluations([0, 100, 200], [4.0, 3.1, 2.05])
    lines = [line | {"grad_norm": 1.5, "memory_gb": 2.0} for line in training(steps, losses)]
    result = {"status": "completed", "steps": 200, "final_val_loss": 2.05, "wall_seconds": 75.0}
    run = make_run(tmp_path / "evil<b>", [*val, *lines], result, optim__lr=1e-3)
    (run.path / "samples").mkdir()
    (run.path / "samples/step-00000200.txt").write_text(f"once {EVIL}\n", encoding="utf-8")
    page = write_run_page(run).read_text(encoding="utf-8")
    for width, dark in ((1280, False), (390, True)):
        browser.resize(width, 900, dark)
        browser.open(page)
        assert browser.complaints() == [] and browser.run("document.documentElement.scrollWidth") == width
    browser.resize(1280, 900)
    browser.open(page)
    assert browser.first("h1", "one.textContent") == "evil<b>"
    titles = browser.each(".chart h4", "one.textContent")
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Throughput", "Peak memory"]
    assert "once </script><img" in browser.first(".sample", "one.textContent")
    assert "1 min 15 s" in browser.first("#results", "one.innerText")
    assert "optim.lr" in browser.first("#settings", "one.textContent")

    left, top, width, height = browser.box(LOSS)
    for across in (0.2, 0.5, 0.9):  # anywhere: a vertical line, and both curves' values at the nearest step
        browser.mouse("Moved", left + across * width, top + 0.3 * height)
        step, _ = reading(browser)
        values = browser.each("#tip tr", "[one.cells[3].innerText, one.cells[2].innerText]")
        told = {text.split(",")[0]: float(value) for text, value in values}
        assert told["training"] == pytest.approx(losses[step - 1], abs=1e-3)
        assert told["validation"] in (4.0, 3.1, 2.05)
        (at,) = browser.each(f"{LOSS} .crosshair line", "Number(one.getAttribute('x1'))")
        assert abs(at - across * width) < 10
    browser.mouse("Pressed", left + 0.5 * width, top + 0.5 * height, button="left", buttons=1, clickCount=1)
    browser.mouse("Moved", left + 0.7 * width, top + 0.5 * height, button="left", buttons=1)
    browser.mouse("Released", left + 0.7 * width, top + 0.5 * height, button="left", clickCount=1)
    ticks = browser.each(f"{LOSS} > div:first-child text[text-anchor=middle]", "Number(one.textContent)")
    assert min(ticks) > 80 and max(ticks) < 150
    browser.mouse("Moved", 2, 2)
    assert tip(browser) == "" and browser.complaints() == []


@pytest.mark.slow
@needs_chromium
def test_a_run_is_followed_while_it_trains(browser, dataset, tmp_path):
    runs = tmp_path / "runs"
    make_run(
        runs / "before", [*evaluations([0, 10], [3.0, 2.5]), *training([5, 10], [2.9, 2.5])], {"status": "completed"}
    )
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tiny_recipe(dataset, train__max_steps=100_000, train__eval_every=40).to_toml(), encoding="utf-8")
    browser.resize(1280, 900)
    command = [sys.executable, "-m", "gptlab", "train", str(recipe), "--out", str(runs / "now")]
    with serving(runs) as server:
        visit(browser, server.address)
        assert browser.each("#curves .chip", "one.textContent") == []  # one run alone
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **quiet) as training_run:
            try:
                wait_for(browser, "document.querySelectorAll('#runs tbody tr').length === 2")
                assert "now" in browser.each("#curves .chip", "one.textContent")
                step = "study.runs.find((run) => run.arm === 'now')?.train?.[0].at(-1) ?? 0"
                wait_for(browser, f"({step}) > 10")
                browser.click("#curves > .chart .choices:first-of-type button:nth-child(3)")  # training
                left, top, width, height = browser.box(LOSS)
                browser.mouse("Moved", left + 0.97 * width, top + 0.5 * height)
                seen = browser.run(step)
                wait_for(browser, f"({step}) > {seen + 20}")  # the charts go on, and what is read stays
                assert "now" in tip(browser)
                wait_for(browser, "study.runs.find((run) => run.arm === 'now').status === 'running'")
                assert "1 of 2 runs training" in browser.first("#top [role=status]", "one.textContent")
                texts = browser.each("#runs tbody tr", "[one.dataset.arm, one.innerText]")
                assert "running" in dict(texts)["now"]
            finally:
                training_run.send_signal(signal.SIGINT)
                training_run.wait(120)
        wait_for(browser, "study.runs.find((run) => run.arm === 'now').status === 'interrupted'")
        assert noted(browser) == []


def wait_for(browser: Browser, condition: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not browser.run(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.2)
