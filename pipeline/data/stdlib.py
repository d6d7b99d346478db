"""The embedded corpus, which needs no files: the language reference and the standard library's docstrings."""

from __future__ import annotations

import ast
import gc
import os
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from models.errors import Refusal


def library_files() -> list[Path]:
    """The source files of Python's standard library in a fixed order, without installed packages and tests.

    The folders `test`, `tests` and `idle_test` are left out: Linux distributions drop them, and their
    docstrings are short.
    """
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, names, found in os.walk(root):
        names[:] = sorted(set(names) - skipped)
        files += [Path(folder, name) for name in sorted(found) if name.endswith(".py")]
    if not files:
        raise Refusal(f"data.train=stdlib: this Python keeps no sources in {root}; give a file of your own")
    return files


@cache
def library_documents() -> tuple[str, ...]:
    """The embedded corpus: the language reference, then every docstring of over 80 characters, each once.

    Modules are parsed and never imported; all takes about 2 s. On Python 3.11 these are 4,522 documents and
    2.05 M characters, on another Python somewhat others.
    """
    from pydoc_data.topics import topics

    texts = [topics[name].strip() for name in sorted(topics)]
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is many objects and no garbage: looking for it would be a fifth of the time
    try:
        for path in library_files():
            texts += _docstrings(path.read_bytes())
    finally:
        if collecting:
            gc.enable()
    return tuple(dict.fromkeys(texts))


def _docstrings(source: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        try:
            nodes: list[ast.AST] = [ast.parse(source)]
        except (SyntaxError, ValueError):  # templates and deliberately broken files
            return
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) > 80:
                yield text
        children = list(ast.iter_child_nodes(node))
        nodes += [child for child in reversed(children) if isinstance(child, ast.stmt | ast.excepthandler)]
