"""One rank of a team without a training engine: draws, encodes and judges as listed."""

from __future__ import annotations

import json
from pathlib import Path

from promoe_ds.cli.options import write_figures
from promoe_ds.data.encode import encode
from promoe_ds.data.sources.packing import EncodeRequest
from promoe_ds.distributed.context import DistributedContext, join_processes
from promoe_ds.distributed.process_group import stop_distributed
from promoe_ds.errors import PromoeError
from promoe_ds.evaluation.metrics import EvaluateRequest, evaluate
from promoe_ds.evaluation.sample_job import SampleRequest, draw_samples
from promoe_ds.evaluation.sharded_model import load_sharded_model


def run_task(kind: str, values: dict, team: DistributedContext) -> str:
    """Run one task; return "", the message of the error that ended it, or the experts' parameters
    that are held here.
    """
    values = {
        name: Path(value) if name in ("model", "out", "samples", "reference", "source") else value
        for name, value in values.items()
    }
    try:
        if kind == "sample":
            draw_samples(SampleRequest(**values), team)
        elif kind == "share":
            network = load_sharded_model(values["model"], team, ep_size=values["ep_size"])
            return str(
                sum(
                    p.numel()
                    for layer in network.moe_layers().values()
                    for p in layer.routed.parameters()
                )
            )
        elif kind == "encode":
            encode(EncodeRequest(**values), team)
        else:
            out = values.pop("out")
            figures = evaluate(EvaluateRequest(**values), team)
            if team.is_main:
                write_figures(out, figures)
    except PromoeError as error:
        return str(error)
    return ""


def run_team_worker(tasks: list[tuple[str, dict]], target: Path) -> None:
    """Be one rank: run all tasks, rank 0 writes everybody's messages."""
    team = join_processes("cpu")
    gathered = team.gather([run_task(kind, dict(values), team) for kind, values in tasks])
    if team.is_main:
        target.write_text(json.dumps(gathered))
    stop_distributed()
