"""The report over a run folder written by hand."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from models.errors import Refusal
from pipeline.context import Context
from pipeline.report import chart, units
from pipeline.report.page import _of_training
from pipeline.report.report import write_report
from pipeline.report.terminal import table

MEASURED = (
    "perplexity",
    "perplexity_interval",
    "bits_per_byte",
    "generate_tokens_per_second",
    "prefill_tokens_per_second",
    "first_token_ms",
    "peak_memory_bytes",
)
FIELDS = ["stage", "path", "parameters", "bytes", *MEASURED, "seconds", "tokens", "documents"]


def digest(letter: str) -> str:
    return f"sha256:{letter * 64}"


def write_artifact(
    run: Path,
    stage: str,
    letter: str,
    parents: dict[str, str] | None = None,
    curve: list[dict[str, float]] | None = None,
    **changes: Any,
) -> None:
    """A finished folder; `parents` names role → stage, whose hashes are read from their manifests."""
    folder = run / stage
    folder.mkdir(parents=True, exist_ok=True)
    known = {
        role: {
            "path": str(run / name),
            "content_hash": json.loads((run / name / "manifest.json").read_text())["content_hash"],
        }
        for role, name in (parents or {}).items()
    }
    manifest = {
        "stage": stage,
        "kind": "model",
        "parents": known,
        "config": {},
        "fingerprint": digest("f"),
        "seed": 0,
        "tokens": 819_200,
        "steps": 400,
        "seconds": 57.2,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "git_commit": "4f1e2d3c",
        "metrics": {"parameters": 500_000},
        "certificates": {},
        "files": {
            "model.safetensors": {"bytes": 2_000_000, "sha256": "0"},
            "config.json": {"bytes": 612, "sha256": "0"},
            "metrics.jsonl": {"bytes": 9999, "sha256": "0"},
        },
        "content_hash": digest(letter),
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if curve is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))


def row(run: Path, stage: str, **changes: Any) -> dict[str, Any]:
    return {
        "stage": stage,
        "path": str(run / stage),
        "parameters": 500_000,
        "bytes": 2_000_612,
        "perplexity": 97.1,
        "bits_per_byte": 2.108,
        "generate_tokens_per_second": 540.4,
        "prefill_tokens_per_second": 61_000.0,
        "documents": 40,
        "perplexity_interval": [95.0, 99.2],
        "first_token_ms": 4.31,
        "peak_memory_bytes": 401_000_000,
        "seconds": 57.2,
        "tokens": 819_200,
        **changes,
    }


def curve(last: float, steps: int = 400) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []
    for step in range(10, steps + 1, 10):
        lines.append({"step": step, "loss": last + 100 / step, "tokens": step * 2048})
        if step % 100 == 0:
            lines.append({"step": step, "validation_loss": last + 50 / step, "tokens": step * 2048})
    return lines


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A quickstart: a teacher, a distilled student, a control, all measured; and an export that is not."""
    run = tmp_path / "quickstart"
    write_artifact(run, "pretrain", "1", curve=curve(4.1, 600), steps=600, tokens=1_228_800, seconds=100.3)
    write_artifact(run, "distill", "2", {"teacher": "pretrain"}, curve=curve(4.5))
    write_artifact(run, "control", "3", curve=curve(4.7), seconds=26.4)
    write_artifact(run, "export", "5", {"model": "distill"}, steps=0, tokens=None, seconds=2.0, metrics={})
    measure(run)
    return run


def measure(run: Path, **extra: Any) -> None:
    rows = [
        row(
            run,
            "pretrain",
            parameters=2_020_000,
            bytes=8_100_000,
            perplexity=63.0,
            perplexity_interval=[62.1, 64.0],
            seconds=100.3,
            tokens=1_228_800,
            **extra,
        ),
        row(run, "distill", **extra),
        row(run, "control", perplexity=107.9, seconds=26.4, **extra),
    ]
    comparison = {
        "stage": "distill",
        "against": "control",
        "perplexity": 97.1,
        "against_perplexity": 107.9,
        "difference": -10.8,
        "relative": -10.8 / 107.9,
    }
    write_artifact(
        run,
        "evaluate",
        "4",
        {n: n for n in ("pretrain", "distill", "control")},
        kind="results",
        steps=0,
        tokens=None,
        seconds=12.0,
        metrics={"rows": rows, "comparisons": [comparison]},
        files={},
    )


# --- report.json ---------------------------------------------------------------------------------------------------


def test_report_json_is_what_evaluate_measured_and_nothing_else(run):
    report = write_report(run)
    assert json.loads((run / "report.json").read_text()) == report
    assert list(report) == ["rows", "comparisons", "verdicts"]
    assert [r["stage"] for r in report["rows"]] == ["pretrain", "distill", "control", "export"]
    assert report["rows"][1] == row(run, "distill")
    assert [list(r) for r in report["rows"]] == [FIELDS] * 4
    assert report["comparisons"][0]["difference"] == -10.8


def test_artifact_that_was_not_evaluated_has_its_known_fields_and_null_measurements(run):
    export = write_report(run)["rows"][3]
    assert export["bytes"] == 2_000_612
    assert (export["path"], export["seconds"], export["tokens"]) == (str(run / "export"), 2.0, None)
    assert [export[key] for key in MEASURED] == [None] * 7
    write_artifact(run, "export", "5", metrics={"parameters": 480_000})
    assert write_report(run)["rows"][3]["parameters"] == 480_000


def test_a_stage_made_again_after_its_evaluation_is_not_shown_with_its_old_figures(run):
    write_artifact(run, "distill", "9", {"teacher": "pretrain"}, curve=curve(4.0))
    report = write_report(run)
    distill = next(r for r in report["rows"] if r["stage"] == "distill")
    assert distill["perplexity"] is None
    assert distill["seconds"] == 57.2
    assert report["comparisons"] == []
    assert "(replaced since)" in (run / "report.md").read_text()


def test_external_teacher_keeps_its_row(run):
    manifest = json.loads((run / "evaluate" / "manifest.json").read_text())
    teacher = row(Path("/models"), "teacher", seconds=None, tokens=None)
    manifest["metrics"]["rows"].append(teacher)
    manifest["parents"]["teacher"] = {"path": "/models/teacher", "content_hash": digest("7")}
    (run / "evaluate" / "manifest.json").write_text(json.dumps(manifest))
    report = write_report(run)
    assert teacher in report["rows"]
    assert "| teacher | 500 k |" in (run / "report.md").read_text()


def test_columns_of_later_stages_are_kept_and_shown(run):
    measure(run, accuracy=0.61803, scheme=None)
    report = write_report(run)
    assert report["rows"][0]["accuracy"] == 0.61803
    assert "accuracy" not in report["rows"][3]
    text = (run / "report.md").read_text()
    assert "| tokens spent | accuracy | scheme |" in text
    assert "| 0.618 | – |" in text


def test_a_column_without_a_figure_is_left_out(run):
    unknown = dict.fromkeys(MEASURED[3:])
    manifest = json.loads((run / "evaluate" / "manifest.json").read_text())
    manifest["metrics"]["rows"] = [row | unknown for row in manifest["metrics"]["rows"]]
    (run / "evaluate" / "manifest.json").write_text(json.dumps(manifest))
    report = write_report(run)
    heading = next(line for line in (run / "report.md").read_text().splitlines() if line.startswith("| stage"))
    named = ["stage", "parameters", "on disk", "test perplexity", "95 % interval", "bits per byte"]
    named += ["time spent", "tokens spent"]
    assert heading == f"| {' | '.join(named)} |"
    assert len(table(report).columns) == len(named) - 1  # without the interval


def test_a_second_evaluation_adds_what_the_first_did_not_measure(run):
    write_artifact(
        run,
        "tasks",
        "8",
        {"distill": "distill"},
        kind="results",
        metrics={"rows": [{"stage": "distill", "path": str(run / "distill"), "accuracy": 0.5}], "comparisons": []},
    )
    rows = [r for r in write_report(run)["rows"] if r["stage"] == "distill"]
    assert rows == [row(run, "distill") | {"accuracy": 0.5}]


def test_numbers_that_are_not_finite_are_null(run):
    text = (run / "evaluate" / "manifest.json").read_text().replace('"perplexity": 63.0', '"perplexity": Infinity')
    (run / "evaluate" / "manifest.json").write_text(text)
    assert write_report(run)["rows"][0]["perplexity"] is None
    assert json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)


def test_same_folder_gives_the_same_bytes_and_leaves_nothing_else_behind(run):
    write_report(run)
    first = {path.name: path.read_bytes() for path in run.glob("*report*")}
    write_report(run)
    assert {path.name: path.read_bytes() for path in run.glob("*report*")} == first
    assert sorted(first) == ["report.html", "report.json", "report.md"]


def test_a_report_that_cannot_be_written_leaves_the_old_one_and_nothing_else(run, monkeypatch):
    write_report(run)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    (run / ".report.md.partial").symlink_to("/dev/full")
    monkeypatch.setattr("models.files.remove", lambda path: None)  # or the link would go
    with pytest.raises(OSError, match="No space left on device"):
        write_report(run)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_folders_still_being_written_are_not_reported(run):
    (run / "distill").rename(run / ".distill.partial")
    assert [r["stage"] for r in write_report(run)["rows"]] == ["pretrain", "distill", "control", "export"]
    (run / "evaluate").rename(run / ".evaluate.partial")
    assert [r["stage"] for r in write_report(run)["rows"]] == ["control", "export", "pretrain"]


def test_run_without_artifacts_has_an_empty_report(tmp_path):
    assert write_report(tmp_path) == {"rows": [], "comparisons": [], "verdicts": []}
    assert "No finished model yet." in (tmp_path / "report.html").read_text()


def test_a_broken_manifest_is_named(run):
    (run / "control" / "manifest.json").write_text('{"stage": ')
    with pytest.raises(Refusal, match=r"control/manifest.json is not JSON .*: delete that folder"):
        write_report(run)


def test_report_loads_no_torch_and_no_matplotlib(run):
    script = (
        f"import sys\nfrom pathlib import Path\nfrom pipeline.report.report import write_report\n"
        f"write_report(Path({str(run)!r}))\nprint({{'torch', 'matplotlib'}} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "set()\n"


# --- report.md and the terminal ------------------------------------------------------------------------------------


def test_markdown_has_human_units_comparison_lineage_cost_and_environment(run):
    write_report(run)
    text = (run / "report.md").read_text()
    assert (
        "| pretrain | 2.02 M | 8.1 MB | 63.0 | 62.1 to 64.0 | 2.108 | 540 | 61.0 k | 4.3 | 401 MB | 100 s | 1.23 M |\n"
        in text
    )
    assert "| export | – | 2.0 MB | – | – | – | – | – | – | – | 2.0 s | – |\n" in text
    assert "- distill 97.1 against control 107.9: -10.0 %\n" in text
    assert "- distill `22222222` ← teacher pretrain `11111111`\n" in text
    assert "- evaluate ← pretrain `11111111`, distill `22222222`, " in text  # results are the manifest: no hash
    assert "<code></code>" not in (run / "report.html").read_text()
    assert "| distill | 400 | 819 k | 57 s | 14.3 k |\n" in text
    assert "198 s in all" not in text
    assert "3.3 min in all.\n" in text
    assert "- commit: 4f1e2d3c\n- seed: 0\n- torch: 2.13.0\n" in text


def test_environment_names_the_stages_that_differ(run):
    write_artifact(run, "control", "3", versions={"torch": "2.11.0"}, git_commit=None)
    write_report(run)
    text = (run / "report.md").read_text()
    assert "- torch: 2.13.0 (pretrain, distill, evaluate, export); 2.11.0 (control)\n" in text
    assert "not a git checkout (control)" in text


def test_terminal_table_fits_80_columns_with_every_figure(run):
    out = StringIO()
    Console(file=out, width=80).print(table(write_report(run)))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert [
        "pretrain",
        "2.02",
        "M",
        "8.1",
        "MB",
        "63.0",
        "2.108",
        "540",
        "61.0",
        "k",
        "4.3",
        "401",
        "MB",
        "100",
        "s",
        "1.23",
        "M",
    ] in lines
    assert ["distill", "97.1", "against", "control", "107.9:", "-10.0", "%"] in lines


# --- report.html ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Every element with its attributes, the text of each kind of element, and whether what opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


@pytest.fixture
def page(run: Path) -> Page:
    write_report(run)
    return Page((run / "report.html").read_text())


def test_page_is_self_contained(run, page):
    assert not page.open
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "embed", "use", "a"}
    named = [name for _, attributes in page.elements for name in attributes]
    assert not {"src", "href", "xlink:href", "srcset", "data", "action"} & set(named)
    assert not [name for name in named if name.startswith("on")]
    assert not re.findall(r"url\(|@import|https?://", (run / "report.html").read_text())


def test_page_shows_the_table_with_its_values(page):
    assert page.texts["td"][:11] == [
        "2.02 M",
        "8.1 MB",
        "63.0",
        "62.1 to 64.0",
        "2.108",
        "540",
        "61.0 k",
        "4.3",
        "401 MB",
        "100 s",
        "1.23 M",
    ]
    assert page.texts["h1"] == ["quickstart"]
    assert "−10.0 %" in page.texts["p"]


def test_page_plots_the_trade_off_and_the_losses_of_all_trained_stages_with_text_alternatives(page):
    assert page.texts["title"] == [
        "quickstart · Retort report",
        "Size and quality",
        "Validation loss",
        "pretrain: loss",
        "distill: loss",
        "control: loss",
    ]
    described = page.texts["desc"]
    assert described[0] == (
        "pretrain: 8.1 MB, perplexity 63.0; distill: 2.0 MB, perplexity 97.1; control: 2.0 MB, perplexity 107.9"
    )
    assert described[3] == (
        "training from 14.50 at step 10 to 4.75 at step 400; validation from 5.00 at step 100 to 4.62 at step 400"
    )
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert len(pictures) == 5
    for picture in pictures:
        assert picture["role"] == "img"
        assert set((picture["aria-labelledby"] or "").split()) <= ids
    assert len(ids) == 10  # none used twice


def test_page_follows_light_and_dark_and_fits_a_phone(run, page):
    text = (run / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements


def test_names_a_user_chose_are_text_everywhere(tmp_path):
    name = '<script>alert("x|y`z")</script>&[red]'.replace("/", "")
    run = tmp_path / '<b>run|"'
    write_artifact(run, name, "1", curve=curve(4.0), versions={"torch": "<i>2</i>"})
    write_artifact(
        run,
        "evaluate",
        "2",
        {"model": name},
        kind="results",
        metrics={
            "rows": [row(run, name, **{"<img src=x>": "<u>1</u>"})],
            "comparisons": [
                {
                    "stage": name,
                    "against": "<s>",
                    "perplexity": 1.0,
                    "against_perplexity": 2.0,
                    "difference": -1.0,
                    "relative": -0.5,
                }
            ],
        },
    )
    report = write_report(run)
    page = Page((run / "report.html").read_text())
    assert not {tag for tag, _ in page.elements} & {"script", "b2", "i", "u", "s", "img"}
    assert name in page.texts["th"]
    assert page.texts["h1"] == ['<b>run|"']
    assert f"{name}: loss" in page.texts["title"]
    text = (run / "report.md").read_text()
    assert r"\<script\>alert" in text
    assert r"x\|y\`z" in text
    cells = next(line for line in text.splitlines() if line.startswith(r"| \<script"))
    assert len(re.split(r"(?<!\\)\|", cells)) == 13 + 2
    out = StringIO()
    Console(file=out, width=400).print(table(report))
    assert name in out.getvalue()


def test_torn_line_of_the_metrics_is_left_out(run):
    with (run / "distill" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 410, "loss": null}\n{"step": 420, "lo')
    write_report(run)
    assert "4.75 at step 400" in (run / "report.html").read_text()


def test_long_curves_are_averaged_to_what_a_page_can_show(run):
    write_artifact(
        run,
        "distill",
        "2",
        {"teacher": "pretrain"},
        curve=[{"step": s, "loss": 5.0 + (-1) ** s} for s in range(1, 100_001)],
    )
    write_report(run)
    assert (run / "report.html").stat().st_size < 60_000


# --- charts and units ----------------------------------------------------------------------------------------------


def numbers(path: str) -> list[tuple[float, float]]:
    values = [float(n) for n in re.findall(r"-?[\d.]+", path)]
    return list(zip(values[::2], values[1::2], strict=True))


def test_chart_line_goes_through_its_points():
    svg = chart.line_chart(
        [chart.Series("a", [(0, 1.0), (50, 2.0), (100, 3.0)], 0)],
        name="n",
        title="t",
        description="d",
        x_label="x",
        y_label="y",
    )
    (first, middle, last) = numbers(re.search(r'class="line c0" d="([^"]+)"', svg)[1])
    assert middle == pytest.approx(((first[0] + last[0]) / 2, (first[1] + last[1]) / 2), abs=0.1)
    assert first[1] > last[1]  # up is more
    assert first[0] == chart.LEFT


@pytest.mark.parametrize(
    "points",
    [
        [("one", 8.1e6, 63.0)],
        [(f"stage-with-a-long-name-{n}", 2e6, 97.0) for n in range(10)],
        [("small", 1e3, 4.0), ("large", 2.6e10, 90_000.0)],
    ],
)
def test_chart_keeps_every_point_and_label_inside_and_labels_apart(points):
    svg = chart.point_chart(
        [chart.Dot(*point, n) for n, point in enumerate(points)],
        name="n",
        title="t",
        description="d",
        x_label="x",
        y_label="y",
        x_format=units.size,
    )
    assert svg.count("<circle") == len(points)
    for x, y in re.findall(r' (?:cx|x)="([-\d.]+)" (?:cy|y)="([-\d.]+)"', svg):
        assert 0 <= float(x) <= chart.WIDTH
        assert 0 <= float(y) <= chart.HEIGHT
    labels = [
        (float(x) - (width if end else 0), float(y), width)
        for end, x, y, text in re.findall(r'class="label( end)? c\d" x="([-\d.]+)" y="([-\d.]+)"[^>]*>([^<]+)<', svg)
        for width in [chart.LETTER_WIDTH * len(text)]
    ]
    assert len(labels) == len(points)
    for n, (x, y, width) in enumerate(labels):
        assert x >= 0
        assert x + width <= chart.WIDTH
        for other_x, other_y, other_width in labels[:n]:
            apart = x >= other_x + other_width or other_x >= x + width or abs(y - other_y) >= chart.LABEL_HEIGHT - 0.11
            assert apart
    assert len(re.findall('class="tick middle"', svg)) >= 2


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0, 600, False, [0, 200, 400, 600]),
        (4.1, 7.6, False, [5, 6, 7]),
        (1.8e6, 1.2e7, True, [2e6, 5e6, 1e7]),
        (1, 1e8, True, [1, 1e2, 1e4, 1e6, 1e8]),
    ],
)
def test_ticks_are_round_and_few(low, high, log, ticks):
    assert chart.Axis(low, high, log).ticks(5) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.si(2_020_000), "2.02 M"),
        (units.si(819_200), "819 k"),
        (units.si(999_950), "1.00 M"),
        (units.si(310), "310"),
        (units.si(8_030_261_248), "8.03 G"),
        (units.si(0), "0"),
        (units.si(None), "–"),
        (units.si(54.321), "54.3"),
        (units.size(8_100_000), "8.1 MB"),
        (units.size(612), "612 B"),
        (units.size(999_999), "1.0 MB"),
        (units.score(97.12), "97.1"),
        (units.score(107.94), "107.9"),
        (units.score(25.818), "25.82"),
        (units.score(5.4306), "5.431"),
        (units.percent(-0.10009), "-10.0 %"),
        (units.percent(0.05), "+5.0 %"),
        (units.duration(9.51), "9.5 s"),
        (units.duration(100.3), "100 s"),
        (units.duration(1000), "16.7 min"),
        (units.duration(9000), "2.5 h"),
        (units.duration(400_000), "4.6 d"),
    ],
)
def test_numbers_read_as_a_person_writes_them(shown, expected):
    assert shown == expected


def test_the_cache_is_a_column_where_it_differs(run: Path) -> None:
    measure(run, cache_bytes_per_token=2048.0)
    write_report(run)
    assert "cache bytes per token" not in (run / "report.md").read_text()
    manifest = json.loads((run / "evaluate" / "manifest.json").read_text())
    manifest["metrics"]["rows"][1]["cache_bytes_per_token"] = 1536.0
    (run / "evaluate" / "manifest.json").write_text(json.dumps(manifest))
    write_report(run)
    assert "cache bytes per token" in (run / "report.md").read_text()
    assert "1.54 k" in (run / "report.md").read_text()


def test_what_the_length_limit_took_stands_in_the_report_once_for_those_that_read_the_same(tmp_path: Path) -> None:
    lost = "37 of 500 conversations were cut at 64 tokens (data.max_length)"
    data = {"train": {"documents": 500, "truncated": 37, "sequences": 90, "cut": lost}, "validation": {"sequences": 9}}
    write_artifact(tmp_path, "record", "a", metrics={"data": data["train"]})
    write_artifact(tmp_path, "distill", "b", {"teacher_cache": "record"}, metrics={"data": data})
    write_artifact(tmp_path, "control", "c", metrics={"data": {"train": {"sequences": 90}}})
    write_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert page.count(lost) == 1
    assert f"record, distill: train: {lost}." in page


def test_a_sequence_that_is_not_read_again_is_not_said_to_be_left_out() -> None:
    turn = {"step": 12, "changed": [], "skipped": [7, 253], "not_read": [253]}
    assert _of_training("distill", {"turns": [turn]}) == [
        "distill was taken up at step 12 with changes: without the sequences 7; the sequences 253 were to be left out, "
        "but are not read from there on."
    ]


def test_a_turn_that_a_later_one_left_is_said_to_be_left_and_its_sequences_are_not_said_to_be_left_out() -> None:
    left = {"step": 10, "changed": [["training.max_steps", 20, 30]], "skipped": [5]}
    turns = [left, {"step": 10, "changed": [], "skipped": [6]}, {"step": 6, "changed": [], "skipped": [7]}]
    assert Context({}, "distill", turns=turns).skipped == {7: 6}  # as it was trained
    assert _of_training("distill", {"turns": turns}) == [
        "distill was taken up at step 10 with changes: training.max_steps 20 → 30 (left again, for step 10).",
        "distill was taken up at step 10 (left again, for step 6).",
        "distill was taken up at step 6 with changes: without the sequences 7.",
    ]
