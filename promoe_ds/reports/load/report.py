"""A run's expert load for a notebook: findings, numbers, figures, and the page."""

from __future__ import annotations

from dataclasses import dataclass

from promoe_ds.reports.charts import Chart
from promoe_ds.reports.load.findings import Finding, find
from promoe_ds.reports.load.page import all_charts, build_page, layer_rows
from promoe_ds.reports.load.run import RunView
from promoe_ds.reports.page import render


@dataclass(frozen=True)
class ExpertLoad:
    """How one run uses its experts; made by `promoe_ds.reports.expert_load`."""

    view: RunView

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
        return {chart.title: chart for chart in all_charts(self.view, [self.view])}

    def to_html(self) -> str:
        """Return the page: one document, which opens offline.

        Raises: ConfigError without vl-convert.
        """
        return render(build_page([self.view]))
