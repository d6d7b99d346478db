"""What MkDocs adds to the hand-written pages: the configuration reference, the picture of imports, the benchmarks."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import imports
import reference

sys.path.pop(0)
ROOT = Path(__file__).resolve().parents[2]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    nav: Any = config.nav
    nav[-1:-1] = [{"Configuration": [{title: f"reference/{page}"} for page, title in reference.TITLES.items()]}]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for page, text in reference.pages().items():
        files.append(File.generated(config, f"reference/{page}", content=text))
    files.append(File.generated(config, "assets/imports.svg", content=imports.picture()))
    files.append(File.generated(config, "benchmarks.md", content=benchmarks()))
    return files


def benchmarks() -> str:
    """benchmarks/README.md, whose relative links start in its own folder."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    text = re.sub(r"\]\(\.\./docs/([^)]*)\)", r"](\1)", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#|[\w/-]+\.md)([^)]*)\)", r"\1 (`benchmarks/\2`)", text)
