"""gptlab ledger"""

import argparse
from pathlib import Path
from typing import Any

from gptlab.cli.common import add_json, add_verb, json_too, named, wide_console
from gptlab.errors import UserError
from gptlab.files import printable


def add_to(verbs: Any) -> None:
    help = "List all comparisons that folders of reports were ever asked about, and what the next one has to show."
    v = add_verb(verbs, "ledger", do_ledger, help)
    help = "a folder with a ledger.jsonl, or of such folders (default: results)"
    v.add_argument("folder", type=named, nargs="?", default=Path("results"), metavar="DIR", help=help)
    add_json(v)


def do_ledger(options: argparse.Namespace) -> None:
    from gptlab.report.ledger import FILE, adjusted, read_ledger, summary

    folder = options.folder
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name the folder of a report, which has a {FILE}")
    found = [folder] if (folder / FILE).is_file() else sorted(file.parent for file in folder.glob(f"*/{FILE}"))
    if not found:
        raise UserError(f"{folder} has no {FILE}: `gptlab study report` and `gptlab judge` write one beside the page")
    ledgers = []
    for one in found:
        looks = read_ledger(one)
        rows = [look | {"p_adjusted": p} for look, p in adjusted(looks)]
        ledgers.append({"folder": str(one)} | summary(looks) | {"looks": rows})
    with json_too(options.json) as tell:
        tell(ledgers)
        for ledger in ledgers:
            _show(ledger)


def _show(ledger: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = wide_console(200)
    console.print(Text(printable(f"{ledger['folder']}: {ledger['text']}")), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ("call", "date", "study", "a", "b", "metric", "at", "n", "difference", "p", "in the ledger", "verdict")
    for name in names:
        right = name in ("call", "n", "difference", "p", "in the ledger")
        table.add_column(name, justify="right" if right else "left", no_wrap=name not in ("a", "b"))
    for look in ledger["looks"]:
        difference = "" if look.get("difference") is None else f"{look['difference']:+.3g}"
        cells = [str(look["asked"]), str(look.get("date") or "")[:16], *(str(look[key]) for key in ("study", "a", "b"))]
        cells += [look["metric"], str(look.get("at") or "last"), str(look.get("n") or ""), difference]
        cells += [f"{look['p']:.2g}", f"{look['p_adjusted']:.2g}", str(look.get("verdict") or "")]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console.print(table)
