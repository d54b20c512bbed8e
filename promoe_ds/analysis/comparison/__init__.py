"""Recipes trained alike and judged alike, over several seeds: `compare` does it all, tools/compare.py calls it.

`contenders` who competes, and whether that is fair; `experiment` the folder and what must not change in it; `runner` the
child processes; `judge` what each child does after training; `results` the figures and their statistics; `report`,
`figures` the page.
"""

from promoe_ds.analysis.comparison.contenders import ComparisonRequest
from promoe_ds.analysis.comparison.experiment import compare

__all__ = ["ComparisonRequest", "compare"]
