"""The documents agree with the code: links, commands, flags, settings, shipped names, length."""

import contextlib
import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from gptlab import Recipe
from gptlab.cli import main
from gptlab.config import shipped

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/notebook.md"  # old entries keep the names of their day
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
PAGES += sorted(set((ROOT / "docs").glob("*.md")) - {NOTEBOOK})
EVERY_PAGE = [*PAGES, NOTEBOOK, *(ROOT / name for name in ("CHANGELOG.md", "SECURITY.md"))]
MOST_WORDS = 21_500  # of docs/*.md without the notebook; the marks of tables do not count

OTHERS = {"--nnodes", "--nproc-per-node", "--max-restarts", "--signals-to-handle"}  # torchrun's
OTHERS |= {"--max_iters", "--tiny", "--config", "--search", "--held-out"}  # those of scripts of this repository
SCRIPTS = [ROOT / "docs/make-front.md", ROOT / "benchmarks/README.md"]  # pages about the flags of other programs

FENCE = re.compile(r"^ *```.*?^ *```", re.M | re.S)
NOT_SETTINGS = {"safetensors", "json", "toml", "py", "txt", "bin", "npy"}  # model.safetensors is a file


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, no punctuation, dashes for spaces."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def code(page: Path) -> Iterator[str]:
    """Lines of code blocks, continued ones joined, and code spans."""
    text = page.read_text(encoding="utf-8")
    if page.name == "coming-from.md":
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)  # what other programs call it
    for block in FENCE.findall(text):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()[1:-1]
    yield from (span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)))


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `gptlab` of every command, up to a comment, a pipe or another command."""
    for line in code(page):
        for call in re.findall(r"(?:^|[\s/])gptlab ([^|;#&>\[]+)", line):
            yield call.split()


@cache
def options(*verb: str) -> frozenset[str]:
    """The flags of a verb, as its help shows them."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as end:
        main([*verb, "--help"])
    assert not end.value.code, f"there is no gptlab {' '.join(verb)}"
    return frozenset(re.findall(r"(?<![\w-])--[a-z][a-z-]*(?![\w.-])", shown.getvalue()))


@cache
def settings() -> frozenset[str]:
    def walk(model: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield prefix + name
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield f"{prefix}{name}.*"
                yield from walk(field.annotation, f"{prefix}{name}.")

    return frozenset({"model.preset", *walk(Recipe, "")})


def split_verb(words: list[str]) -> tuple[list[str], list[str]] | None:
    """A command's verb, `study run` being one, and what follows; None for placeholders: `gptlab VERB`."""
    if not re.fullmatch(r"[a-z]+(-[a-z]+)*", words[0]):
        return ([], words) if words[0].startswith("--") else None
    long = words[0] in ("study", "bench", "import") and words[1:] and re.fullmatch(r"[a-z][a-z-]*", words[1])
    return words[: 2 if long else 1], words[2 if long else 1 :]


def flags(words: list[str]) -> list[str]:
    return [word.split("=")[0].rstrip(",.:)") for word in words if re.match(r"--[a-z]", word)]


@pytest.mark.parametrize("page", EVERY_PAGE, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_verbs_and_flags_that_exist(page: Path) -> None:
    for words in commands(page):
        if not (call := split_verb(words)):
            continue
        verb, rest = call
        known = options(*verb)
        for flag in flags(rest):
            setting = flag[2:].replace("-", "_")
            assert setting in settings() if "." in flag else flag in known, f"gptlab {' '.join(words)}: {flag}"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in SCRIPTS], ids=name_of)
def test_flags_that_stand_alone_exist(page: Path) -> None:
    verbs = ["prepare", "train", "eval", "sample", "judge", "plot", "plan", "launch", "stop", "export"]
    parts = [
        ("study", "run"),
        ("study", "report"),
        ("study", "power"),
        ("bench", "inference"),
        ("bench", "step"),
        ("bench", "coords"),
    ]
    parts += [("import", "hf"), ("import", "log"), ("study", "new-from")]
    known = OTHERS.union({"--section.key"}, *(options(verb) for verb in verbs), *(options(*part) for part in parts))
    for span in code(page):
        for flag in flags(span.split()) if span.startswith("--") else []:
            assert flag in known or ("." in flag and flag[2:].replace("-", "_") in settings()), span


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_recipes_and_studies_that_are_shipped(page: Path) -> None:
    recipes, studies = set(shipped()), set(shipped("studies"))
    takes = {
        ("train",): recipes,
        ("plan",): recipes | studies,
        ("launch",): recipes | studies,
        ("study", "run"): studies,
        ("study", "power"): studies,
        ("bench", "inference"): recipes,
        ("bench", "step"): recipes,
        ("bench", "data"): recipes,
        ("bench", "coords"): recipes,
    }
    for words in commands(page):
        call = split_verb(words)
        if call and tuple(call[0]) in takes and call[1] and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", call[1][0]):
            assert call[1][0] in takes[tuple(call[0])], " ".join(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_exist(page: Path) -> None:
    sections = {name.split(".")[0] for name in settings() if "." in name}
    for span in code(page):
        for name in re.findall(r"^(?:--)?([a-z]+\.[\w*.-]+)", span):
            name = name.rstrip(".").replace("-", "_")
            section, key = name.split(".")[0], name.split(".")[-1]
            if section in sections and key not in NOT_SETTINGS:
                assert name in settings(), span


def test_the_readme_is_short_and_begins_with_a_result() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert "| bits per byte" in "\n".join(text.splitlines()[:40])


def test_the_notebook_has_an_index_of_its_sections() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert re.findall(r"^\d+\. \[(.+)\]\(#", text, re.M) == re.findall(r"^## (.+)$", text, re.M)


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", ROOT / "docs/how-it-works.md"], ids=name_of)
def test_files_of_the_code_exist(page: Path) -> None:
    for span in code(page):
        if not re.fullmatch(r"[a-z_*0-9]+(/[a-z_*0-9]+)*(/|\.py)", span):
            continue
        assert any(True for folder in (ROOT, ROOT / "src/gptlab") for _ in folder.glob(span)), span


def test_the_documentation_is_short() -> None:
    words = {page.name: len(page.read_text(encoding="utf-8").replace("|", " ").split()) for page in PAGES[3:]}
    assert sum(words.values()) < MOST_WORDS, words
