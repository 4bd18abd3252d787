"""gptlab watch"""

import argparse
import os
import platform
import sys
import webbrowser
from typing import Any

from gptlab.cli.common import add_verb, named


def add_to(verbs: Any) -> None:
    help = "Follow runs in a browser while they train: a page on this machine, which needs no network and no account."
    v = add_verb(verbs, "watch", do_watch, help)
    help = "a run, a study's folder or a folder of runs (default: runs and results)"
    v.add_argument("folders", type=named, nargs="*", metavar="RUN|STUDY|DIR", help=help)
    v.add_argument("--port", type=int, metavar="N", help="port of 127.0.0.1 (default: 8421, or a free one)")
    v.add_argument("--no-browser", action="store_true", help="open no browser, only print the address")


def do_watch(options: argparse.Namespace) -> None:
    from gptlab.errors import UserError
    from gptlab.report.listing import FOLDERS
    from gptlab.report.watching import Watched, open_server

    folders = options.folders or [folder for folder in FOLDERS if folder.is_dir()]
    if not folders:
        raise UserError("there is no folder runs and no folder results: `gptlab watch DIR` names another")
    try:
        with open_server(Watched(folders), options.port) as server:
            print(f"{server.address}  (Ctrl-C ends it)", flush=True)
            if "SSH_CONNECTION" in os.environ:
                port = server.server_port
                print(f"from your own machine: ssh -L {port}:127.0.0.1:{port} {platform.node()}", flush=True)
            if not options.no_browser and _has_display():
                webbrowser.open(server.address)
            server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        print()


def _has_display() -> bool:
    """Whether a browser can open a window: one in the terminal would take it over."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
