"""The corpus `constructs`: functions of the running Python's standard library, labelled with the syntax they use.

A multi-label corpus that needs no download, with labels from "return", which most functions have, to "match", which
hardly any has.
"""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Iterator

from gptlab.data.corpora import fraction_of, stdlib_files

SHORTEST, LONGEST = 60, 180  # characters of a function: as long as a small encoder reads whole

# What a node says by its type alone; `constructs_of` knows a few more.
NODES: dict[type[ast.AST], str] = {
    ast.If: "if",
    ast.For: "for",
    ast.While: "while",
    ast.Try: "try",
    ast.With: "with",
    ast.Match: "match",
    ast.Return: "return",
    ast.Raise: "raise",
    ast.Assert: "assert",
    ast.Delete: "del",
    ast.Break: "break",
    ast.Continue: "continue",
    ast.Pass: "pass",
    ast.Global: "global",
    ast.Nonlocal: "nonlocal",
    ast.Import: "import",
    ast.ImportFrom: "from-import",
    ast.AugAssign: "augmented-assignment",
    ast.AnnAssign: "annotated-assignment",
    ast.NamedExpr: "walrus",
    ast.Lambda: "lambda",
    ast.IfExp: "conditional-expression",
    ast.ListComp: "list-comprehension",
    ast.DictComp: "dict-comprehension",
    ast.SetComp: "set-comprehension",
    ast.GeneratorExp: "generator-expression",
    ast.Yield: "yield",
    ast.YieldFrom: "yield-from",
    ast.Await: "await",
    ast.AsyncFor: "async-for",
    ast.AsyncWith: "async-with",
    ast.JoinedStr: "f-string",
    ast.Starred: "starred",
    ast.Slice: "slice",
    ast.ClassDef: "nested-class",
}


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


def documents() -> Iterator[tuple[str, str, list[str]]]:
    """(split, source of a function, its labels), in the order of the library's files and of their lines.

    A function is one at the top of a module or a method of a class there. A module is in one split as a whole, by a
    hash of its name: about 80, 10 and 10 percent of the modules are train, val and test. Of equal functions only the
    first is there, so none is in two splits.
    """
    seen: set[str] = set()
    for module, text in stdlib_files():
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
