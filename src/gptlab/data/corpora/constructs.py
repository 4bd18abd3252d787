"""The corpus `constructs`: functions of the running Python's standard library, labelled with the syntax in them.

A multi-label corpus without a download. Its labels range from "return", which most functions have, to "match", which
few have.
"""

from __future__ import annotations

import ast
import platform
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator

from gptlab.data.corpora.base import SPLITS, LabeledCorpus, Reading, Row, Wanted, fraction_of
from gptlab.data.corpora.text import stdlib_files, stdlib_modules
from gptlab.errors import DataError
from gptlab.progress import tell_nobody

SHORTEST, LONGEST = 60, 180  # characters of a function: as long as a small encoder reads whole

# Labels that the type of a node decides; `constructs_of` adds a few more.
_LABELS = """
    If:if For:for While:while Try:try With:with Match:match Return:return Raise:raise Assert:assert Delete:del
    Break:break Continue:continue Pass:pass Global:global Nonlocal:nonlocal Import:import ImportFrom:from-import
    AugAssign:augmented-assignment AnnAssign:annotated-assignment NamedExpr:walrus Lambda:lambda
    IfExp:conditional-expression ListComp:list-comprehension DictComp:dict-comprehension SetComp:set-comprehension
    GeneratorExp:generator-expression Yield:yield YieldFrom:yield-from Await:await AsyncFor:async-for
    AsyncWith:async-with JoinedStr:f-string Starred:starred Slice:slice ClassDef:nested-class
"""
NODES = {getattr(ast, name): label for name, label in (pair.split(":") for pair in _LABELS.split())}


def open_constructs(wanted: Wanted) -> LabeledCorpus:
    """The functions of the Python that runs this."""
    if wanted.source is not None or wanted.label_field is not None:
        raise DataError("the corpus constructs is made from the Python that runs it: it takes no --from or fields")

    reading = Reading()

    def read(size: int) -> None:
        reading.done += size

    def splits() -> dict[str, Iterable[Row]]:
        """Rows of the splits, which are read in this order; the library is read once."""
        reading.begin({}, {})
        reading.total = sum(path.stat().st_size for path in stdlib_modules().values())
        kept: dict[str, list[Row]] = {name: [] for name in SPLITS}
        found = documents(read)

        def rows(name: str) -> Iterator[Row]:
            yield from kept[name]
            for split, text, labels in found:
                row = Row(text, labels or None, "a function")
                if split == name:
                    yield row
                elif SPLITS.index(split) > SPLITS.index(name):
                    kept[split].append(row)

        return {name: rows(name) for name in SPLITS}

    return LabeledCorpus(wanted.name, {"python": platform.python_version()}, splits, reading=reading)


def constructs_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The labels of a function: the syntax in it, in its decorators and in its signature, sorted."""
    found = set()
    for node in ast.walk(function):
        if label := NODES.get(type(node)):
            found.add(label)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node is not function:
                found.add("nested-function")
            if node.decorator_list:
                found.add("decorator")
        elif isinstance(node, ast.Try) and node.finalbody:
            found.add("finally")
        elif isinstance(node, ast.For | ast.AsyncFor | ast.While) and node.orelse:
            found.add("loop-else")
        elif isinstance(node, ast.Compare) and len(node.ops) > 1:
            found.add("chained-comparison")
    return sorted(found)


def documents(read: Callable[[int], None] = tell_nobody) -> Iterator[tuple[str, str, list[str]]]:
    """(split, source of a function, its labels), in the order of the library's files and of their lines.

    `read` is called with the size of each file.

    Top-level functions and methods of top-level classes are taken. All functions of a module are in one split, chosen
    by a hash of the module's name: about 80, 10 and 10 percent of the modules are train, val and test. A function
    that was seen before is left out, so no function is in two splits.
    """
    seen: set[str] = set()
    for module, text in stdlib_files():
        read(len(text))
        if not module.endswith(".py"):
            continue  # a topic of help()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes in other people's literals
                tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        place = fraction_of(module)
        split = "train" if place < 0.8 else "val" if place < 0.9 else "test"
        lines = text.split("\n")  # as the parser counts them: a form feed does not end one
        for function in _functions(tree):
            first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
            source = textwrap.dedent("\n".join(lines[first - 1 : function.end_lineno])) + "\n"
            if SHORTEST <= len(source) <= LONGEST and source not in seen:
                seen.add(source)
                yield split, source, constructs_of(function)


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                yield inner
