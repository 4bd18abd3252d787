"""The notebook of examples/: its outputs are small and of its own cells, and every cell runs in an empty folder."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "first-steps.ipynb"
SHORTER = {
    '"train.max_steps": 400': '"train.max_steps": 40',
    "settings.train.max_steps = 150": "settings.train.max_steps = 30",
}

# Like a notebook, show the value of a cell's last expression.
RUN_CELLS = """
import ast, json, sys
names = {"__name__": "__main__"}
for source in json.load(open(sys.argv[1], encoding="utf-8")):
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        print(repr(value))
        for method in ("_repr_html_", "_repr_markdown_", "_repr_png_"):
            getattr(value, method, lambda: None)()
"""


def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return found


def sources() -> list[str]:
    return ["".join(cell["source"]) for cell in content()["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_has_the_outputs_of_one_run_from_top_to_bottom() -> None:
    cells = [cell for cell in content()["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    for call in ("gptlab.train(", "gptlab.run_study("):  # each has one display
        (cell,) = (cell for cell in cells if call in "".join(cell["source"]))
        assert [output["output_type"] for output in cell["outputs"]].count("display_data") == 1
    for output in outputs:
        output.get("data", {}).pop("image/png", None)
    for path in (str(Path.home()), "/tmp/", "site-packages"):
        assert path not in json.dumps([cells, outputs])


def test_the_notebook_is_small_and_its_cells_parse() -> None:
    assert NOTEBOOK.stat().st_size < 120_000
    for source in sources():
        ast.parse(source)


@pytest.mark.slow
def test_every_cell_runs_in_an_empty_folder(tmp_path: Path) -> None:
    cells = content()
    for long, short in SHORTER.items():
        assert sum(long in source for source in sources()) == 1
        for cell in cells["cells"]:
            cell["source"] = "".join(cell["source"]).replace(long, short)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel"):
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.from_dict(cells)
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute(env=environment)
        assert "Report(first-study, answers=" in json.dumps(notebook)
    else:
        file = tmp_path.parent / "cells.json"
        file.write_text(json.dumps([c["source"] for c in cells["cells"] if c["cell_type"] == "code"]), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", RUN_CELLS, str(file)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Report(first-study, answers=" in done.stdout
    assert (tmp_path / "results" / "first-study" / "report.html").is_file()
    assert json.loads((tmp_path / "runs/first/result.json").read_text(encoding="utf-8"))["status"] == "completed"
