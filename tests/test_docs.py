"""README, docs/, examples/: every command composes, every file that is named exists, and what is generated is whole."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import yaml

from pipeline.building import build
from pipeline.data.tokenizer import train_tokenizer
from tests.command import ENVIRONMENT, ROOT, front_door
from tests.test_config import composed

TOPICS = sorted({text.strip() for text in topics.values()}, key=len)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "benchmarks" / "README.md", ROOT / "slurm" / "README.md"]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# first words of commands that are other people's
THEIRS = {
    "vllm",
    "wandb",
    "llama-server",
    "python3",
    "hf",
    "eval",
    ".venv/bin/pip",
    ".venv-peers/bin/pip",
    ".venv-auto-round/bin/pip",
}
# paths that a reader has or makes
MADE_BY_READERS = re.compile(r"(runs|path|generate|data)/|^(chat|stories|mymodule|config)\.|/(NAME|export)|<|…|org/")


def blocks(page: Path, language: str) -> Iterator[tuple[str, str]]:
    """(title, text) of the fenced blocks in a language."""
    for fence in re.finditer(rf"^( *)```{language}( title=\"([^\"]*)\")?\n(.*?)^\1```", page.read_text(), re.S | re.M):
        yield fence[3] or "", re.sub(rf"^{fence[1]}", "", fence[4], flags=re.M)


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every command in README, docs, benchmarks and slurm."""
    found = []
    for page, name in zip(PAGES, NAMES, strict=True):
        for _, text in blocks(page, "(?:bash|sh)"):
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # OMP_NUM_THREADS=1 before the command
                    words = words[1:]
                found += [(name, words)] if words else []
    return found


# where a command stands in a comment, a docstring or a text that is printed
AROUND = [ROOT / "Makefile", ROOT / "train.py", ROOT / "pipeline" / "help.py", *sorted((ROOT / "conf").rglob("*.yaml"))]
AROUND += [*sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "examples").glob("*.py"))]


def commands_around() -> list[tuple[str, list[str]]]:
    """(file, words) of the commands in AROUND; what stands after two spaces explains the command."""
    found = []
    for path in AROUND:
        for line in re.findall(r"\b(python (?:train|benchmarks/\w+|examples/\w+)\.py[^\"`\n]*)", path.read_text()):
            if "…" not in line:  # as in `+experiment=…`
                found.append((path.relative_to(ROOT).as_posix(), shlex.split(line.split("  ")[0])))
    return found


def of_train(words: list[str]) -> list[str] | None:
    """The arguments of `train.py`, of a command that runs it."""
    if words[0] == "sbatch":
        return ["launch=slurm", "trainer.nodes=1", "trainer.devices=8", *words[words.index("slurm/train.sbatch") + 1 :]]
    if words[2:3] in (["status"], ["cancel"]):  # tests/test_submission.py
        return None
    return words[2:] if Path(words[0]).name == "python" and words[1:2] == ["train.py"] else None


EVERY = {tuple(words): (name, words) for name, words in [*commands_around(), *commands()]}.values()  # each once
TRAIN = [(name, arguments) for name, words in EVERY if (arguments := of_train(words)) is not None]
OTHERS = [(name, words) for name, words in EVERY if of_train(words) is None]


FLAGS = {"--cfg", "job", "--help", "-m", "--shell-completion"}


def _command(name: str, words: list[str]) -> Any:
    """The README's in every run of the tests, those of the guides in the long one."""
    marks = () if name.startswith(("README", "docs/start")) else pytest.mark.slow
    return pytest.param(name, words, id=f"{name}: {' '.join(words)}"[:150], marks=marks)


@pytest.mark.parametrize(("name", "words"), [_command(*each) for each in TRAIN])
def test_every_command_composes_and_builds_its_stages(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers_own = types.ModuleType("mymodule")
    readers_own.keep = lambda candidate: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mymodule", readers_own)
    if "--help" in words:
        return
    several = "-m" in words
    words = front_door().arguments([word for word in words if word not in FLAGS])
    if several:  # the first of the runs
        words = [word if "[" in word or "{" in word else re.sub(r",.*", "", word) for word in words]
    config = composed(*words)
    for stage in config["order"]:
        assert callable(build(config, stage).run)


def test_the_command_for_an_own_teacher_composes_to_what_it_says() -> None:
    words = next(words for name, words in TRAIN if name == "docs/guides/distil.md")
    config = composed(*words)
    assert config["student"]["shape"]["num_hidden_layers"] == 2
    assert config["teacher"]["path"].startswith("path/to")


@pytest.mark.parametrize(("name", "words"), OTHERS, ids=[f"{n}: {' '.join(w)}"[:150] for n, w in OTHERS])
def test_every_other_command_names_what_is_there(name: str, words: list[str]) -> None:
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
    elif words[2:3] in (["status"], ["cancel"]):
        assert words[3].startswith("run_dir=")
    elif Path(words[0]).name == "python" and words[1].endswith(".py"):
        script = (ROOT / words[1]).read_text()
        for option in (word.partition("=")[0] for word in words[2:] if word.startswith("--")):
            setting = rf"^    {option[2:].replace('-', '_')}: "  # benchmarks have an option for each field of Settings
            assert f'"{option}"' in script or re.search(setting, script, re.M), f"{words[1]} has no {option}"
    elif words[:3] == [".venv/bin/python", "-m", "pip"] or words[:3] == [".venv/bin/python", "-m", "pytest"]:
        pass
    else:
        assert words[0] in THEIRS or "=" in words[0], f"{name}: what is {words[0]}?"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_file_that_is_named_exists(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        if link.startswith(("reference/", "../reference/")) or link in (
            "benchmarks.md",
            "../benchmarks.md",
            "assets/imports.svg",
        ):
            continue  # made by docs/generate; `mkdocs build --strict` looks for them
        assert (page.parent / link).exists(), f"{page}: {link}"
    for named in re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|yaml|toml|sbatch|md|txt|jinja))`", text):
        if not MADE_BY_READERS.search(named) and "NAME" not in named:
            assert (ROOT / named).is_file(), f"{page}: {named}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


FOLDERS = ("pipeline", "models", "callbacks", "conf", "docs", "benchmarks", "examples", "slurm", "tests")
OUR_OWN = [path for path in ROOT.iterdir() if path.suffix in (".md", ".py", ".toml", ".yml") or path.name == "Makefile"]
OUR_OWN += [
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".yaml", ".md", ".j2", ".jinja", ".sbatch") and path != Path(__file__)
]

HOME_MADE = (  # each with the field's own: recover, quantization scheme, sequence, pruned, activations, cross-entropy
    r"\bheal(s|ed|ing)?\b|\bgrids?\b|\brows of (packed|tokens|text)|\b(calibration|held-out|token|packed) rows\b|"
    r"what text had to say|numbers of the grid|cannot say\b|\bcutters?\b|\b(a|each|every|after the|of the) cuts?\b|"
    r"\buncut\b|what (the )?matri(x|ces) reads?\b|hard labels count|student writes itself"
)
OF_OTHERS = {  # words that are others' own, or old names that a reader of this version may still have
    "CHANGELOG.md": r"`[^`]*grid[^`]*`",
    "pipeline/artifact.py": r"grid\.safetensors",
    "pipeline/command_line.py": r"\"grid\": ",
    "tests/test_command_line.py": r"stages\.quantize\.grid=",
    "tests/stages/test_export.py": r"grid\\?\.safetensors",
    "pipeline/report/chart.py": r"`grid`|class=\"grid\"",  # CSS, and a chart's
    "pipeline/report/report.html.j2": r"display: grid|[-.]grid\b|grid-template",
}


def test_words_are_the_fields() -> None:
    for path in OUR_OWN:
        name = path.relative_to(ROOT).as_posix()
        text = re.sub(OF_OTHERS[name], "", path.read_text()) if name in OF_OTHERS else path.read_text()
        found = [line for line in text.splitlines() if re.search(HOME_MADE, line, re.I)]
        assert not found, f"{name}: {found}"


ELSEWHERE = ("examples/LLMs/prune_llm.py", "docs/reference", "models/café")  # a peer's, built, a reader's


def test_every_path_in_comments_docstrings_and_pages_exists() -> None:
    """A folder of ours, a slash, and what follows. Names in capitals stand for any; fenced blocks have own tests."""
    for path in OUR_OWN:
        if path.name in ("CHANGELOG.md", "test_extension.py"):  # what was there, and what is only there in a copy
            continue
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S) if path.suffix == ".md" else path.read_text()
        for named in re.findall(rf"(?<![\w/.{{}}$<>\]-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)", text):
            if named not in ELSEWHERE and not re.search(r"\b(NAME|GROUP|CHOICE)\b", named):
                assert (ROOT / named).exists(), f"{path}: {named}"


def test_every_paper_in_the_code_is_on_the_page_of_papers() -> None:
    papers = (ROOT / "docs" / "papers.md").read_text()
    for folder in ("models", "pipeline", "callbacks", "conf"):
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.yaml")]:
            for paper in re.findall(r"\b(\d{4}\.\d{4,5})\b", "".join(re.findall(r"arXiv:.*", path.read_text()))):
                assert paper in papers, f"{path}: {paper}"


# --- what is generated ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> Any:
    sys.path.insert(0, str(ROOT / "docs" / "generate"))
    try:
        import reference

        return reference
    finally:
        sys.path.pop(0)


def test_the_reference_has_every_group_choice_and_key(reference: Any) -> None:
    pages = reference.pages()
    everything = "\n".join(pages.values())
    for group in (path.name for path in (ROOT / "conf").iterdir() if path.is_dir()):
        assert f"[{group}](" in pages["index.md"], group
        for path in sorted((ROOT / "conf" / group).rglob("*.yaml")):
            made = reference.choice(path)
            section = reference.section(made)
            assert section in everything or section.replace("### ", "## ") in everything, path
            told = {key.name for key in made.keys}
            for key, value in (yaml.safe_load(path.read_text()) or {}).items():
                if key not in ("defaults", "_target_", "hydra") and not isinstance(value, dict):
                    assert key in told, f"{path}: {key}"


def test_what_the_yaml_says_of_a_key_is_in_the_reference(reference: Any) -> None:
    page = reference.pages()["stages.md"]
    assert "what may be removed: heads (a KV head with its query heads)" in page  # stages.prune.kinds
    assert "of every group's units" in page


def test_the_picture_of_imports_is_of_this_code() -> None:
    sys.path.insert(0, str(ROOT / "docs" / "generate"))
    try:
        import imports
    finally:
        sys.path.pop(0)
    picture = imports.picture()
    assert "pipeline.stages imports from models.pruning" in picture
    for folder in (path for root in ("pipeline", "models") for path in (ROOT / root).iterdir()):
        if (folder / "__init__.py").exists():
            assert f">{folder.name}/</text>" in picture, folder
    assert "models imports from pipeline" not in picture


def test_the_documentation_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in tmp_path.rglob("*.html"):
        assert not re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?https?:[^>]*>", page.read_text()), page


def save_little(folder: Path, tokenizer: Any, seed: int, width: int = 64) -> None:
    """A Llama of a few thousand random weights, or of some more."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- what a reader copies -------------------------------------------------------------------------------------------


def test_the_divergence_on_the_page_is_hellingers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code as printed, against the dense formula and autograd."""
    import torch

    from models.objectives.block import Block

    code = dict(blocks(ROOT / "docs" / "adding.md", "python"))["models/objectives/hellinger.py"]
    module = types.ModuleType("hellinger")
    monkeypatch.setitem(sys.modules, "hellinger", module)  # where dataclasses look a class's module up
    exec(compile(code, "adding.md", "exec"), module.__dict__)
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64)
    student.requires_grad_()
    expected = 4 * ((teacher / 2).softmax(-1).sqrt() - (student / 2).softmax(-1).sqrt()).square().sum(-1) / 2
    gradient = torch.zeros_like(student)
    hellinger = module.Hellinger(temperature=2.0)
    value = hellinger.add(Block(student.detach(), torch.zeros(5, dtype=torch.long), 1.0, gradient, teacher))
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0])


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with every file that docs/adding.md prints."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("conf", "pipeline", "models", "callbacks", "train.py", "pyproject.toml"):
        source = ROOT / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    page = ROOT / "docs" / "adding.md"
    new = {**dict(blocks(page, "python")), **dict(blocks(page, "yaml"))}
    assert len(new) == 12, list(new)  # two for each kind
    for path, text in new.items():
        assert not (folder / path).exists(), f"{path} is there already"
        (folder / path).write_text(text)
    return folder


@pytest.mark.skipif(not (ROOT / ".mypy_cache").is_dir(), reason="a minute without mypy's cache: make lint leaves one")
def test_the_printed_files_pass_mypy_and_ruff(printed: Path) -> None:
    new = list(dict(blocks(ROOT / "docs" / "adding.md", "python")))
    for words in (["mypy", f"--cache-dir={ROOT / '.mypy_cache'}"], ["ruff", "check"], ["ruff", "format", "--check"]):
        checker = str(Path(sys.executable).parent / words[0])
        done = subprocess.run([checker, *words[1:], *new], cwd=printed, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def extended(printed: Path) -> Path:
    """The copy with two models and a text beside it."""
    folder = printed
    tokenizer = train_tokenizer(TOPICS, 300, folder / "tokenizer")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    for seed, name in enumerate(("one", "two")):
        save_little(folder / name, tokenizer, seed)
    (folder / "lines.txt").write_text(
        "\n".join(line for text in TOPICS[:20] for line in text.splitlines() if line.strip())
    )
    return folder


SHORT = ["data=proverbs", "data.path=lines.txt", "trainer.accelerator=cpu"]
ADDED = {
    "divergence": ["+experiment=distill", "teacher.path=one", "student=folder", "student.path=two", "only=[distill]",
                   "divergence=hellinger", "stages.distill.training.max_steps=2"],
    "importance": ["+experiment=prune_recover", "model.path=one", "importance=spread", "stages.prune.multiple_of=1",
                   "stages.prune.protect_first=0", "stages.prune.protect_last=0", "only=[prune]"],
    "quantizer": ["+experiment=quantize_export", "model.path=one", "quantizer=stochastic", "scheme=w4a16_g32",
                  "format=[ollama]", "only=[quantize,export]"],  # and format
    "stage": ["+experiment=quantize_only", "model.path=one", "+stage@stages.average=average",
              "stages.average.models=[one,two]", "order=[average,quantize,evaluate]", "only=[average]"],
}  # fmt: skip


@pytest.mark.slow  # each is a run of its own
@pytest.mark.parametrize("kind", ADDED)
def test_two_new_files_are_all_that_an_extension_needs(extended: Path, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", *ADDED[kind], *SHORT, f"run_dir=runs/{kind}"],
        cwd=extended,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
