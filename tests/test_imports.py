"""What imports what: no module of the project imports itself by a detour, imports for type checkers and inside of
functions included; and no stage imports more than it needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("peft", "bitsandbytes", "deepspeed", "wandb", "matplotlib", "gguf", "compressed_tensors", "lm_eval")
PACKAGES = ("models", "callbacks", "pipeline")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(path: Path, modules: set[str]) -> set[str]:
    """The project's modules that a file imports, wherever in it the statement stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module` imports the module; `from module import name` imports the module itself.
            found |= names & modules or {node.module}
    return found & modules


def graph(package: str) -> dict[str, set[str]]:
    paths = {module_name(path): path for path in sorted((ROOT / package).rglob("*.py"))}
    return {name: imported_by(path, set(paths)) - {name} for name, path in paths.items()}


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected groups of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = lowest[name] = len(index)
        stack.append(name)
        for other in sorted(imports[name]):
            if other not in index:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], index[other])
        if lowest[name] == index[name]:
            group = [stack.pop()]
            while group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in imports:
        if name not in index:
            visit(name)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_by_a_detour(package: str) -> None:
    assert circles(graph(package)) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_a_stage_imports_no_library_that_it_may_not_need() -> None:
    """Each stage is a process: what takes seconds to import is imported where it is used."""
    stages = [path.stem for path in sorted((ROOT / "pipeline" / "stages").glob("*.py")) if path.stem != "__init__"]
    code = (
        f"import importlib, sys; [importlib.import_module(f'pipeline.stages.{{name}}') for name in {stages}];"
        f"print(*(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def _texts(path: Path) -> Iterator[str]:
    """Every text in a module that is no docstring; in a formatted one {} stands for each value."""
    tree = ast.parse(path.read_text())
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    left_out = {id(node.body[0].value) for node in ast.walk(tree)
                if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    left_out |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node.value


def _names_a_stage(text: str) -> bool:
    """Its key, the word itself, or a name that the configuration has for one, as who speaks or what is to be run. A
    setting of a kind of stage (`prune.kinds`) is none: the stage says it with its key in the run."""
    names = "|".join(sorted(path.stem for path in (ROOT / "conf" / "stage").glob("*.yaml")))
    as_a_word = " " in text and re.search(r"\bstages?\b", text)
    return bool(as_a_word or re.search(rf"\bstages\.|^({names}): |\b(run|only|force)[ =]({names})\b", text))


def test_what_works_on_tensors_names_no_stage_of_the_configuration() -> None:
    """A run may call its stages otherwise: what models/ says of a setting is true whatever the stage is called."""
    naming = [(path.name, text) for path in sorted((ROOT / "models").rglob("*.py"))
              for text in _texts(path) if _names_a_stage(text)]  # fmt: skip
    assert naming == []


def test_a_text_that_names_a_stage_is_found(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        '"""Of the stage record."""\n'
        'NAMES = [f"{path} is damaged; run stage record", f"({name}: stages.{name}.kinds)", "qat: no matrix"]\n'
        'FINE = {"stage": 3, "setting": f"prune.kinds={kinds}: name others, or prune the width", "name": "record"}\n'
    )
    found = [text for text in _texts(tmp_path / "module.py") if _names_a_stage(text)]
    assert found == ["{} is damaged; run stage record", "({}: stages.{}.kinds)", "qat: no matrix"]
