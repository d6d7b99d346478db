"""Write the report of a run: all manifests of its folder side by side, as JSON, Markdown and one HTML page.

The parent process imports this, so nothing here loads torch. The same folder always gives the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.files import write_text
from pipeline.report.html import as_html
from pipeline.report.manifests import read_artifacts
from pipeline.report.markdown import as_markdown
from pipeline.report.measurements import measurements
from pipeline.report.page import page_of
from pipeline.report.plots import plots_of

Json = dict[str, Any]


def write_report(run_dir: Path) -> Json:
    """Write report.json, report.md and report.html into `run_dir` and return what report.json holds.

    A stage that was made again after it was measured appears unmeasured: an old figure is not passed off as the
    new folder's. Raises Refusal where a manifest is not JSON.
    """
    artifacts = read_artifacts(run_dir)
    report = measurements(artifacts)
    page = page_of(run_dir, artifacts, report)
    write_text(run_dir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_text(run_dir / "report.md", as_markdown(page))
    write_text(run_dir / "report.html", as_html(page | {"plots": plots_of(artifacts, report)}))
    return report
