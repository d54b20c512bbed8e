"""A run's expert load for a notebook: findings, numbers, figures, and the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from promoe_ds.reports.charts import Chart
from promoe_ds.reports.load.charts import overview_charts
from promoe_ds.reports.load.findings import Finding, find
from promoe_ds.reports.load.layer_charts import layer_charts
from promoe_ds.reports.load.page import build_page, layer_rows
from promoe_ds.reports.load.run import RunView
from promoe_ds.reports.page import render


@dataclass(frozen=True)
class ExpertLoad:
    """How one run uses its experts; made by `promoe_ds.reports.expert_load`."""

    view: RunView

    @classmethod
    def open(cls, run_dir: Path, last_steps: int | None = None) -> ExpertLoad:
        """Read a run; as `promoe_ds.reports.expert_load`."""
        return cls(RunView.open(run_dir, last_steps))

    def findings(self) -> list[Finding]:
        """Return what is to be said of the run, the worst first: `level`, `title`, `text` each."""
        return find(self.view)

    def layers(self) -> dict[str, list[object]]:
        """Return the numbers of every MoE layer as columns: `pandas.DataFrame(columns)` takes
        them.
        """
        head, *rows = layer_rows(self.view)
        columns = zip(*rows, strict=True)
        return {str(name): list(cells) for name, cells in zip(head, columns, strict=True)}

    def figures(self) -> dict[str, Chart]:
        """Return the figures by title; a notebook shows one as a picture, with vl-convert."""
        sections = overview_charts(self.view, [self.view]).values()
        charts = [chart for section in sections for chart in section if chart is not None]
        charts += [
            chart for layer in self.view.log.layers for chart in layer_charts(self.view, layer)
        ]
        return {chart.title: chart for chart in charts}

    def to_html(self) -> str:
        """Return the page: one document, which opens offline.

        Raises: ConfigError without vl-convert.
        """
        return render(build_page([self.view]))
