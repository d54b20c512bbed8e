"""How long the phases of a run may take before its ranks end themselves."""

from __future__ import annotations

from pydantic import Field

from promoe_ds.config.section import Section


class SupervisionConfig(Section):
    """Time-outs of one rank's watchdog; those of single collectives are
    `parallel.timeout_seconds`.
    """

    setup_timeout_seconds: float = Field(
        1800.0, gt=0, description="from the start of a process to the end of its first step"
    )
    step_timeout_seconds: float = Field(
        900.0, gt=0, description="one optimizer step, with what is logged after it"
    )
    checkpoint_timeout_seconds: float = Field(1800.0, gt=0, description="saving one checkpoint")
    evaluation_timeout_seconds: float = Field(
        7200.0, gt=0, description="sampling and evaluating of one evaluation.every"
    )
    launcher_timeout_seconds: float = Field(
        60.0, gt=0, description="without a sign of life from promoe_ds.cli.launch"
    )
