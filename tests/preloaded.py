"""What a rank or a command imports sooner or later: once, by the process that all are forked
from.
"""

import gc
from importlib import import_module

gc.disable()  # importing makes half a million objects, and no garbage
for name in (
    "torch",
    "setuptools",
    "sklearn.datasets",
    "diffusers",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # torch.compile's libraries
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "megatron.core.transformer.moe.moe_layer",
    "promoe_ds.training.loop",
    "promoe_ds.checkpoint.conversion",
    "promoe_ds.distributed.context",
    "promoe_ds.evaluation.sample_job",
    "promoe_ds.evaluation.metrics",
    "promoe_ds.data",
):
    import_module(name)
gc.freeze()  # forks neither look through all this nor copy its pages to do so
gc.enable()
