"""The configuration reference, as Markdown made from conf/ and from the classes that its files name.

Nothing of it is written by hand: what a key means stands beside the key, in the yaml or in the dataclass.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
OWN_PAGE = {  # groups with a page of their own: file → title, introduction
    "experiment": (
        "Experiments",
        "A whole run: its stages, their order and their settings. Choose one with `+experiment=NAME`; without one, "
        "`python train.py` runs the quickstart.",
    ),
    "stage": (
        "Stages",
        "What an experiment is made of. The settings of a stage are `stages.NAME.KEY=VALUE` on the command line.",
    ),
}


@dataclass
class Key:
    """A line of a table."""

    name: str
    value: str
    says: str
    kind: str = ""


@dataclass
class Choice:
    """A file of conf/."""

    path: Path
    says: str = ""
    package: str = ""
    target: str = ""
    keys: list[Key] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.relative_to(CONF).with_suffix("").as_posix().partition("/")[2]


@cache
def choice(path: Path) -> Choice:
    """What a yaml file says, comments included."""
    made = Choice(path)
    parents: list[tuple[int, str]] = []  # indentation and name of the keys that the present line lies in
    head: list[str] = []
    body = False
    for line in path.read_text().splitlines():
        text, _, comment = _uncommented(line)
        if not text.strip():
            if found := re.match(r"@package (\S+)", comment):
                made.package = found[1]
            elif comment and not body:
                head.append(comment)
            elif comment and line.startswith(" ") and made.keys:
                made.keys[-1].says += f" {comment}"
            continue
        body = True
        if found := re.match(r"(\s*)- (.*)", text):
            _default(made, found[2], comment)
            continue
        if not (found := re.match(r"(\s*)([\w.$-]+):(?:\s+(.*?))?\s*$", text)):
            continue
        indent, name, value = len(found[1]), found[2], found[3] or ""
        parents = [(depth, parent) for depth, parent in parents if depth < indent]
        dotted = ".".join([*(parent for _, parent in parents), name])
        parents.append((indent, name))
        if name == "defaults" and indent == 0:
            continue
        if name == "_target_":
            if indent == 0:
                made.target = value
            continue
        if dotted.startswith("hydra"):
            continue
        if value and not value.startswith("&"):
            made.keys.append(Key(dotted, value, comment))
        elif comment:
            made.keys.append(Key(dotted, "", comment))
    made.says = _joined(head)
    return made


def _uncommented(line: str) -> tuple[str, str, str]:
    """A line without its comment, and the comment."""
    quoted = ""
    for i, letter in enumerate(line):
        if quoted:
            quoted = "" if letter == quoted else quoted
        elif letter in "\"'" and (i == 0 or line[i - 1] in " [{:,"):
            quoted = letter
        elif letter == "#" and (i == 0 or line[i - 1] == " "):
            return line[:i].rstrip(), "#", line[i + 1 :].strip()
    return line.rstrip(), "", ""


def _default(made: Choice, entry: str, comment: str) -> None:
    """An entry of a defaults list: the group it takes, and where."""
    if found := re.match(r"(?:override )?/?([\w/]+)(?:@([\w.]+))?:\s*(\S+)", entry):
        group, at, chosen = found[1], found[2] or found[1], found[3]
        made.keys.append(Key(at, chosen, comment or f"a choice of the group [{group}]({_link(group)})", "group"))


def _joined(comments: list[str]) -> str:
    """Comment lines as text; lines that are set in, as code."""
    text: list[str] = []
    code: list[str] = []
    for line in comments:
        if re.match(r"(python|\.venv|\+|sbatch|make) ?", line) or (code and code[-1].endswith("\\")):
            code.append(line)
        else:
            text.append(line)
    return " ".join(text) + ("\n\n```text\n" + "\n".join(code) + "\n```" if code else "")


@cache
def constructor(target: str) -> tuple[str, tuple[Key, ...]]:
    """First sentence of the docstring, and the fields, of the class or function that `_target_` names; read from its
    source, so that nothing is imported."""
    module, _, name = target.rpartition(".")
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.is_file():
        return "", ()
    source = path.read_text()
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name != name:
            continue
        fields = []
        for item in node.body if isinstance(node, ast.ClassDef) else []:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name) or not item.end_lineno:
                continue
            kind = ast.unparse(item.annotation)
            if "ClassVar" not in kind:
                comment = _uncommented(lines[item.end_lineno - 1])[2]
                fields.append(Key(item.target.id, ast.unparse(item.value) if item.value else "???", comment, kind))
        return (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " "), tuple(fields)
    return "", ()


def groups() -> list[str]:
    """Every folder of conf/ that holds yaml files."""
    return sorted({path.parent.relative_to(CONF).parts[0] for path in CONF.glob("*/**/*.yaml")})


def choices(group: str) -> list[Choice]:
    return [choice(path) for path in sorted((CONF / group).glob("**/*.yaml"))]


def _link(group: str) -> str:
    group = group.partition("/")[0]
    return f"{group}s.md" if group in OWN_PAGE else f"choices.md#{group}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""  # Markdown's own rule for tables: no bar within code ends a cell


def table(made: Choice) -> str:
    """The keys of a choice, with the fields that its class has beyond them."""
    _, fields = constructor(made.target)
    types = {key.name: key.kind for key in fields}
    rows = [
        Key(key.name, key.value, key.says or next((f.says for f in fields if f.name == key.name), ""), key.kind)
        for key in made.keys
    ]
    known = {key.name.partition(".")[0] for key in made.keys}
    inherits = any(key.kind == "group" and key.name.partition("/")[0] not in types for key in made.keys)
    rows += [key for key in fields if key.name not in known and not inherits and key.value != "???"]
    if not rows:
        return ""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key in rows:
        kind = types.get(key.name, "") if key.kind != "group" else ""
        said = _cell(key.says) + (f" ({_code(kind)})" if kind and kind not in ("Any", "str") else "")
        lines.append(f"| {_code(key.name)} | {_code(key.value)} | {said.strip()} |")
    return "\n".join(lines)


def section(made: Choice, level: str = "###") -> str:
    meaning, _ = constructor(made.target)
    parts = [f"{level} {made.name}"]
    if made.says or meaning:
        parts.append(made.says or meaning)
    if made.package and made.package != "_global_":
        parts.append(f"Its keys stand at `{made.package}`.")
    if made.target:
        parts.append(f"Built from `{made.target}`." + (f" {meaning}" if meaning and made.says else ""))
    parts.append(table(made))
    return "\n\n".join(part for part in parts if part)


def overview() -> str:
    lines = [
        "# Configuration reference",
        "",
        "This reference is generated from the files in `conf/` and the dataclasses behind them whenever the "
        "documentation is built. `python train.py --cfg job` prints the whole configuration of a run, with every "
        "default; `python train.py --help` shows the experiments and groups.",
        "",
        "A choice is written `group=name` (`quantizer=awq`), a value `key=value` (`stages.prune.kept_fraction=0.7`).",
        "",
        "| group | choices |",
        "|---|---|",
    ]
    for group in groups():
        names = ", ".join(f"`{made.name}`" for made in choices(group))
        lines.append(f"| [{group}]({_link(group)}) | {names} |")
    lines += ["", "## Keys of every run", "", "From `pipeline/config.py` and `conf/config.yaml`.", ""]
    sections = {"Config": "", "Trainer": "trainer.", "Checkpoint": "trainer.checkpoint.", "Forecast": "forecast."}
    for name, prefix in sections.items():
        doc, fields = constructor(f"pipeline.config.{name}")
        comments = {key.name: key.says for key in choice(CONF / "config.yaml").keys}
        if prefix:
            lines += ["", f"### {prefix}", ""]
        lines += [doc, ""] if doc and not doc.startswith(name + "(") else []
        lines += ["| key | default | meaning |", "|---|---|---|"]
        for key in fields:
            value = re.sub(r"field\(default_factory=(\w+)\)", r"\1", key.value).replace("MISSING", "???")
            value = {"list": "[]", "dict": "{}"}.get(value, value)
            said = key.says or comments.get(key.name, "")
            if not said and (CONF / key.name).is_dir():
                said = f"the group [{key.name}]({_link(key.name)})"
            lines.append(f"| {_code(prefix + key.name)} | {_code(value)} | {_cell(said)} |")
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """File below docs/reference → Markdown."""
    made = {"index.md": overview()}
    for group, (title, says) in OWN_PAGE.items():
        parts = [f"# {title}", says]
        parts += [section(each, "##") for each in choices(group)]
        made[f"{group}s.md"] = "\n\n".join(parts) + "\n"
    parts = [
        "# Choices",
        "Every group of `conf/` that is neither an [experiment](experiments.md) nor a [stage](stages.md). `???` is a "
        "value that you must give; `${…}` is taken from elsewhere in the configuration.",
    ]
    for group in groups():
        if group not in OWN_PAGE:
            parts += [f"## {group}", *(section(each) for each in choices(group))]
    made["choices.md"] = "\n\n".join(parts) + "\n"
    return made


TITLES = {"index.md": "All groups", "experiments.md": "Experiments", "stages.md": "Stages", "choices.md": "Choices"}
