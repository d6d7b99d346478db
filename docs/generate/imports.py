"""The picture of imports: rooms of the code as boxes, imports between them as arrows, taken from the code itself.

Written as SVG when the documentation is built (docs/generate/hooks.py); `python docs/generate/imports.py FILE`
writes it by hand.
"""

from __future__ import annotations

import sys
from collections import Counter
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "callbacks", "models")
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN, LABELS = 150, 40, 90, 46, 18, 100
FILL = {"train.py": "#5e7ce0", "pipeline": "#3d8f6d", "callbacks": "#b0662d", "models": "#7a56a8"}


def imports() -> Counter[tuple[str, str]]:
    """(room, room that it imports from) → number of imports between their modules."""
    sys.path.insert(0, str(ROOT))
    try:
        graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    finally:
        sys.path.remove(str(ROOT))
    found: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            if room(module) != room(imported):
                found[room(module), room(imported)] += 1
    for package in ("pipeline", "models"):  # the front door lies outside the packages
        found["train.py", package] += (ROOT / "train.py").read_text().count(f"from {package}")
    return found


def room(module: str) -> str:
    """The folder that a module lies in: `models.quantization`, or `models` for modules that lie beside the folders."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and (ROOT / parts[0] / parts[1]).is_dir() else parts[0]


def levels(edges: Counter[tuple[str, str]]) -> dict[str, int]:
    """Room → row of the picture: below everything that imports it, where two rooms import from each other below the
    one that imports more."""
    downward = [(a, b) for (a, b), count in edges.items() if count > edges.get((b, a), 0)]
    level = {name: 0 for edge in edges for name in edge}
    for _ in level:  # longest paths; a circle of three rooms would grow for ever
        for a, b in downward:
            level[b] = min(max(level[b], level[a] + 1), len(level))
    lowest = 1 + max((row for name, row in level.items() if not name.startswith("models")), default=0)
    for name, row in level.items():  # no room of models beside one of the pipeline
        if name.startswith("models"):
            level[name] = max(row, lowest)
    for _ in level:
        for a, b in downward:
            level[b] = min(max(level[b], level[a] + 1), 2 * len(level))
    rows = sorted(set(level.values()))
    return {name: rows.index(row) for name, row in level.items()}


def picture() -> str:
    edges = imports()
    level = levels(edges)
    rows: dict[int, list[str]] = {}
    for name in sorted(level):
        rows.setdefault(level[name], []).append(name)
    widest = max(len(names) for names in rows.values())
    total = LABELS + widest * WIDTH + (widest - 1) * GAP_X + 2 * MARGIN
    place = {}
    for row, names in rows.items():
        inset = (total - LABELS - len(names) * WIDTH - (len(names) - 1) * GAP_X) / 2
        for column, name in enumerate(names):
            place[name] = (LABELS + inset + column * (WIDTH + GAP_X), MARGIN + row * (HEIGHT + GAP_Y))
    height = 2 * MARGIN + len(rows) * HEIGHT + (len(rows) - 1) * GAP_Y
    lines, boxes = [], []
    for (a, b), count in sorted(edges.items()):
        back = level[a] >= level[b]
        (x1, y1), (x2, y2) = place[a], place[b]
        x1, x2 = x1 + WIDTH / 2, x2 + WIDTH / 2
        y1, y2 = (y1, y2 + HEIGHT) if back else (y1 + HEIGHT, y2)
        bend = (y2 - y1) / 2
        style = ' stroke-dasharray="4 4"' if back else ""
        title = f"{a} imports from {b}: {count}"
        lines.append(
            f'<path d="M{x1:.0f},{y1:.0f} C{x1:.0f},{y1 + bend:.0f} {x2:.0f},{y2 - bend:.0f} {x2:.0f},{y2:.0f}" '
            f'stroke-width="{1 + min(count, 40) / 14:.1f}"{style} marker-end="url(#head)"><title>{title}</title></path>'
        )
    for name, (x, y) in place.items():
        short = name.partition(".")[2] + "/" if "." in name and name != "train.py" else name
        label = short if short == "train.py" or short.endswith("/") else f"{name}/*.py"
        boxes.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="7" '
            f'fill="{FILL[name if name == "train.py" else name.partition(".")[0]]}"/>'
            f'<text x="{x + WIDTH / 2:.0f}" y="{y + HEIGHT / 2 + 5:.0f}" text-anchor="middle" fill="#fff">'
            f"{escape(label)}</text>"
        )
    for package in ("pipeline", "models"):
        first = min(y for name, (_, y) in place.items() if name.partition(".")[0] == package)
        boxes.append(
            f'<text x="{MARGIN}" y="{first + HEIGHT / 2 + 5:.0f}" fill="{FILL[package]}" font-weight="bold">'
            f"{package}/</text>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total:.0f} {height:.0f}" width="{total:.0f}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="14">\n'
        "<title>Which rooms of the code import from which</title>\n"
        f'<rect width="{total:.0f}" height="{height:.0f}" rx="10" fill="#f6f6f8"/>\n'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto" '
        'markerUnits="userSpaceOnUse"><path d="M0,0 L8,4 L0,8 z" fill="#8a8f99"/></marker></defs>\n'
        '<g fill="none" stroke="#8a8f99" stroke-opacity="0.75">\n' + "\n".join(lines) + "\n</g>\n"
        "<g>\n" + "\n".join(boxes) + "\n</g>\n</svg>\n"
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture())
