"""The command blocks of the documents, typed in order into one empty folder, as a reader would.

Only the work is shortened: programs named gptlab and torchrun stand first on the PATH. They put short recipes and
studies of the same names in the place of the shipped ones, give `prepare` a local text where it would download one, run
two arms of a study, and start two processes where a block asks for eight. What cannot be typed here is in `NOT_HERE`.
The README's commands have the packages of `make demo` only.
"""

import gzip
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import stat
import subprocess
import sys
import time
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
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
PAGES = ["README.md", "docs/studies.md", "docs/reports.md", "docs/sparsity.md", "docs/planning.md"]  # in this order
PAGES += ["docs/launching.md", "docs/parallel.md", "docs/formats.md", "docs/recipes.md", "docs/judge.md"]
ELSEWHERE = {
    "docs/make-front.md": "an installation of its own; tests/test_kconfig.py and test_gpt2_scripts.py type these",
    "docs/researcher.md": "a checkout; tests/test_researcher.py runs the example",
    "docs/notebook.md": "the commands of measurements, which take as long as they say",
}
# The commands that are not typed here, and what they need.
NOT_HERE = {
    r"^(make |source |python experiments/)": "an installation of its own",
    r"^gptlab watch": "somebody who looks at the page",
    r"results/precision-cls|results/pilot|until-decided|runs/mine_": "studies and a run of hours",
    r"--nnodes": "several machines",
    r"^gptlab launch (?!.*--print).*--on slurm": "a cluster",
    r"^gptlab stop": "a run that trains",
    r"^gptlab train finetune-shakespeare": "the weights of the hub, and its tokenizer's dataset",
    r"--to gguf gpt2": "a byte-level BPE; tests/test_interop_gguf.py writes these",
    r"^gptlab eval runs/gpt2 ": "OpenWebText, HellaSwag, WikiText, LAMBADA, or tasks of the hub",
}

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
MINE = "--train.max-steps 4 --train.eval-every 2 --eval.tokens 512 --model.n-layer 1 --compile.enabled false"
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
    text = ["--from", str(folder / "text.txt")] * ("--merge" not in words)
    more = {{"shakespeare": text, "fineweb-edu": text, "constructs": ["--max-documents", "60"]}}
    words += more.get(words[1], [])
# one job; the model that README exports; fewer steps
here = {{"3/14": "1/1", "openai-community/gpt2": "exported", "1000": "10", "2000": "20"}}
words = [here.get(word, word) for word in words]
for flag in ("--push", "--model.preset"):  # no hub; the short shape of the recipe
    if flag in words and words[0] in ("export", "train"):
        del words[words.index(flag) : words.index(flag) + 2]
if words[:2] == ["train", "mine.toml"]:
    words += {mine!r}
if __name__ == "__main__":  # not in the processes of `bench step`
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
    facts = {"python": sys.executable, "folder": str(folder), "program": str(programs / "gptlab"), "mine": MINE.split()}
    for name, text in (("gptlab", GPTLAB), ("torchrun", TORCHRUN)):
        (programs / name).write_text(text.format(**facts), encoding="utf-8")
        (programs / name).chmod(stat.S_IRWXU)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    typed = tmp_path_factory.mktemp("typed")
    write_logs(typed)
    return typed, environment


def write_logs(folder: Path) -> None:
    """What docs/judge.md judges: runs of three arms as a table in three forms, and as text logs."""
    draw = random.Random(0)
    rows = []
    for arm, level in (("adamw", 3.3), ("muon", 3.2), ("soap", 3.15)):
        for seed in range(4):
            final = level + draw.gauss(0, 0.01)
            rows += [(arm, seed, step, round(final + 200 / step, 4)) for step in range(500, 3001, 500)]
    for name, titles in (("runs.csv", "optimizer,seed"), ("track3.csv.gz", "configuration,run")):
        text = "\n".join([f"{titles},step,val_loss", *(",".join(map(str, row)) for row in rows)]) + "\n"
        opened = gzip.open if name.endswith("gz") else open
        with opened(folder / name, "wt", encoding="utf-8") as file:
            file.write(text)
    (folder / "logs").mkdir()
    for arm, seed, step, loss in rows:
        with open(folder / f"logs/{arm}-s{seed}.log", "a", encoding="utf-8") as file:
            file.write(f"step {step}: train loss {loss:.4f}, val loss {loss:.4f}\n")
    columns = dict(zip(("optimizer", "seed", "step", "val_loss"), map(list, zip(*rows, strict=True)), strict=True))
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "sweep.parquet")


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


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of a page's blocks in order; continued lines are joined."""
    found = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    return [(language, re.sub(r"\\\n\s*", " ", text)) for language, text in found]


def commands(text: str) -> list[str]:
    """The commands of a block that can be typed here; of a script that is printed and submitted, the first part."""
    lines = [line.partition(" && ")[0] if "--print" in line else line for line in text.splitlines()]
    return [line for line in lines if line.strip() and not any(re.search(pattern, line) for pattern in NOT_HERE)]


@pytest.mark.slow
def test_every_command_of_the_pages_runs_in_order(place: tuple[Path, dict[str, str]]) -> None:
    """One test: a page may use what the page before it made."""
    folder, environment = place
    for page in PAGES:
        typed = 0
        has = environment | {"NOT_INSTALLED": " ".join(beyond_the_demo() if page == "README.md" else [])}
        for language, text in blocks(page):
            if language == "toml" and (file := re.match(r"# (\w+\.toml)\b", text)) and page != "docs/studies.md":
                (folder / file[1]).write_text(text, encoding="utf-8")
            for command in commands(text) if language in ("sh", "bash") else []:
                typed += 1
                for again in (True, False):
                    done = subprocess.run(
                        ["bash", "-ec", command], cwd=folder, env=has, capture_output=True, text=True, timeout=600
                    )
                    # rarely PyTorch aborts a rank, see docs/notebook.md
                    if not (again and "torchrun" in command and "exitcode  : -6" in done.stderr):
                        break
                error = done.stderr if len(done.stderr) < 9000 else f"{done.stderr[:6000]} ... {done.stderr[-3000:]}"
                assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-2000:]}\n{error}"
        assert typed
    background, until = folder / "runs/shakespeare-char-cpu_seed2/result.json", time.monotonic() + 120
    while not background.is_file() and time.monotonic() < until:
        time.sleep(0.5)
    assert json.loads(background.read_text(encoding="utf-8"))["status"] == "completed"


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


def test_every_page_with_commands_is_typed_or_says_why_not() -> None:
    pages = {page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").glob("*.md")} | {"README.md"}
    with_commands = {page for page in pages if any(language in ("sh", "bash") for language, _ in blocks(page))}
    assert with_commands == {*PAGES, *ELSEWHERE}
    lines = [line for page in PAGES for _, text in blocks(page) for line in text.splitlines()]
    for pattern in NOT_HERE:
        assert any(re.search(pattern, line) for line in lines), f"nothing is left out by {pattern}"
