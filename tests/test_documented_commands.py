"""The command blocks of the documents, typed in order into one empty folder, as a reader would.

Only the work is shortened: programs named gptlab and torchrun stand first on the PATH. They put short recipes and
studies of the same names in the place of the shipped ones, give `prepare` a local text where it would download one, run
two arms of a study, and start two processes where a block asks for eight. The README's commands have the packages of
`make demo` only.
"""

import importlib.metadata
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from conftest import text_of
from packaging.requirements import Requirement

from gptlab.config import shipped
from gptlab.config.recipe import merged

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.M | re.S)
PAGES = ["README.md", "docs/studies.md", "docs/reports.md", "docs/sparsity.md", "docs/planning.md"]  # in this order
# What a block needs that a test has not: an installation of its own, a cluster, somebody who looks at a page.
NOT_HERE = re.compile(
    r"^(make |source |sbatch|python experiments/|gptlab watch)"
    r"|results/precision-cls|results/pilot|until-decided|runs/mine_"
)

SHORT: dict[str, Any] = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
    "batch": {"micro_batch": 4, "tokens_per_step": 128},
    "schedule": {"warmup_steps": 2},
    "train": {"max_steps": 8, "eval_every": 4, "device": "cpu"},
    "eval": {"tokens": 256},
    "sample": {"max_tokens": 20},
    "checkpoint": {"every": 0},
    "compile": {"enabled": False},
    "hellaswag": {"every": 0},
}
RECIPES = ("shakespeare-char-cpu", "shakespeare-char-fast", "gpt2-124m-openwebtext", "gpt2-124m-fineweb-edu")
STUDIES = ("architecture-smoke", "precision-lm-smoke", "precision-lm")

GPTLAB = """#!{python}
import os, sys
sys.modules.update(dict.fromkeys(os.environ.get("NOT_INSTALLED", "").split()))
from pathlib import Path
folder, words = Path({folder!r}), sys.argv[1:]
if words[0] in ("train", "study", "bench", "launch") and "power" not in words:
    words = [str(folder / (word + ".toml")) if (folder / (word + ".toml")).is_file() else word for word in words]
if words[:2] == ["study", "run"] and "--until-decided" not in words and "--arm" not in words:
    from gptlab.config import load_study
    words += ["--arm", *list(load_study(words[2]).arms)[:2], "--seeds", "2"]
if words[0] == "prepare":
    more = {{"shakespeare": ["--from", str(folder / "text.txt")], "constructs": ["--max-documents", "60"]}}
    words += more.get(words[1], [])
from gptlab.cli import main
main(words)
"""
TORCHRUN = """#!{python}
import os, re, sys
words = " ".join(sys.argv[1:]).replace("-m gptlab", {program!r})
words = re.sub(r"--nproc-per-node \\d+", "--nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0", words)
os.execv({python!r}, [{python!r}, "-m", "torch.distributed.run", *words.split()])
"""


def shortened(name: str, kind: str, folder: Path = Path()) -> dict[str, Any]:
    """A shipped file with short settings, under its own name; a study's recipe is the short one in `folder`."""
    content = {"name": name, **tomllib.loads(shipped(kind)[name].read_text(encoding="utf-8"))}
    if kind == "studies":
        own = content.get("settings", {})
        if content.get("recipe") in RECIPES:
            return content | {"recipe": str(folder / f"{content['recipe']}.toml"), "seeds": [0, 1, 2]}
        kept = {key: value for key, value in SHORT.items() if key not in ("model", "checkpoint")}
        return content | {"settings": merged(own, kept), "seeds": [0, 1]}
    content.get("model", {}).pop("preset", None)
    content = merged(content, SHORT)
    data = {"corpus": "stdlib", "tokenizer": "byte"} if name.startswith("gpt2") else content["data"]
    return content | {"data": data}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """An empty folder to type in, and the environment with the two programs."""
    folder = tmp_path_factory.mktemp("programs")
    for name in RECIPES:
        (folder / f"{name}.toml").write_text(tomli_w.dumps(shortened(name, "recipes")), encoding="utf-8")
    for name in STUDIES:
        (folder / f"{name}.toml").write_text(tomli_w.dumps(shortened(name, "studies", folder)), encoding="utf-8")
    (folder / "text.txt").write_text("ROMEO:\n" + "\n".join(text_of(40, seed) for seed in range(40)), encoding="utf-8")
    programs = folder / "bin"
    programs.mkdir()
    facts = {"python": sys.executable, "folder": str(folder), "program": str(programs / "gptlab")}
    for name, text in (("gptlab", GPTLAB), ("torchrun", TORCHRUN)):
        (programs / name).write_text(text.format(**facts), encoding="utf-8")
        (programs / name).chmod(stat.S_IRWXU)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    return tmp_path_factory.mktemp("typed"), environment


def beyond_the_demo() -> list[str]:
    """The modules of this environment that `make demo` does not install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["offline"]]
    needs = [(Requirement(line), "") for line in wanted]
    kept = {"pip", "setuptools", "gptlab"}
    while needs:
        need, extra = needs.pop()
        name = need.name.lower().replace("_", "-")
        if (need.marker and not need.marker.evaluate({"extra": extra})) or (name in kept and not need.extras):
            continue
        kept.add(name)
        for line in importlib.metadata.requires(name) or []:
            needs += [(Requirement(line), extra) for extra in ("", *need.extras)]
    owners = importlib.metadata.packages_distributions()
    return [module for module, of in owners.items() if kept.isdisjoint(name.lower().replace("_", "-") for name in of)]


def commands(page: str) -> list[str]:
    """The commands of a page's blocks in order; continued lines are joined."""
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return [line for line in lines if line.strip() and not NOT_HERE.search(line)]


@pytest.mark.slow
def test_every_command_of_the_pages_runs_in_order(place: tuple[Path, dict[str, str]]) -> None:
    """One test: a page may use what the page before it made."""
    folder, environment = place
    for page in PAGES:
        assert len(commands(page)) >= 3
        has = environment | {"NOT_INSTALLED": " ".join(beyond_the_demo() if page == "README.md" else [])}
        for command in commands(page):
            done = subprocess.run(
                ["bash", "-ec", command], cwd=folder, env=has, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_the_python_of_the_readme_runs(place: tuple[Path, dict[str, str]]) -> None:
    folder, environment = place
    [block] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    if not (folder / "data/shakespeare-char").is_dir():
        subprocess.run(
            ["bash", "-ec", "gptlab prepare shakespeare --tokenizer char"], cwd=folder, env=environment, check=True
        )
    code = block.replace('"shakespeare-char-cpu"', repr(str(folder / "short.toml")))
    content = shortened("shakespeare-char-cpu", "recipes")
    (folder / "short.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ROMEO:" in done.stdout
    assert json.loads((folder / "runs/short/result.json").read_text())["steps"] == 500


def test_what_is_left_out_needs_what_a_test_has_not() -> None:
    for page in PAGES:
        for line in "\n".join(BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))).splitlines():
            if NOT_HERE.search(line):
                assert shlex.split(line, comments=True)[0] in ("make", "source", "python", "gptlab"), line
