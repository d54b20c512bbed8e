"""What a run is: recipe, DeepSpeed JSON, sizes. Imports no torch."""

from promoe_ds.config.accounting import count_parameters, training_flops_per_image
from promoe_ds.config.batching import BatchPlan, plan_batches
from promoe_ds.config.deepspeed_json import (
    DS_CONFIGS_DIR,
    DeepSpeedPlan,
    read_deepspeed_json,
    resolve_deepspeed,
)
from promoe_ds.config.loader import change_config, config_from_dict, list_recipes, load_config
from promoe_ds.config.named_files import read_superclasses
from promoe_ds.config.reference import field_lines
from promoe_ds.config.run_sections import SupervisionConfig
from promoe_ds.config.schema import RunConfig

__all__ = [
    "DS_CONFIGS_DIR",
    "BatchPlan",
    "DeepSpeedPlan",
    "RunConfig",
    "SupervisionConfig",
    "change_config",
    "config_from_dict",
    "count_parameters",
    "field_lines",
    "list_recipes",
    "load_config",
    "plan_batches",
    "read_deepspeed_json",
    "read_superclasses",
    "resolve_deepspeed",
    "training_flops_per_image",
]
