"""Which saved settings must agree with this run's before its checkpoint is taken."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from promoe_ds.checkpoint.load import _tell_changes, differing_fields
from promoe_ds.checkpoint.manifest import Layout, Manifest

from ..builders import small_config


def _saved(**sections):
    return small_config(**sections).model_dump(mode="json")


def test_differing_fields_equal_runs_have_none() -> None:
    assert differing_fields(_saved(), small_config(), architecture_only=False) == []


def test_differing_fields_names_saved_and_current_value() -> None:
    found = differing_fields(_saved(routing={"top_k": 2}), small_config(), architecture_only=False)
    assert found == ["routing.top_k is 2 there and 1 here"]
    assert differing_fields(_saved(routing={"top_k": 2}), small_config(), architecture_only=True) == []


def test_differing_fields_expert_type_is_architecture() -> None:
    found = differing_fields(_saved(routing={"expert_type": "swiglu"}), small_config(), architecture_only=True)
    assert found == ["routing.expert_type is 'swiglu' there and 'gelu' here"]


def test_differing_fields_objective_belongs_to_what_weights_are() -> None:
    """A network of velocities predicts no noise, whatever its shapes; the sampler's shift and the noise levels may change."""
    saved = _saved(diffusion={"objective": "ddpm", "num_train_timesteps": 500})
    found = differing_fields(saved, small_config(diffusion={"shift": 2.0}), architecture_only=True)
    assert found == ["diffusion.objective is 'ddpm' there and 'rectified_flow' here",
                     "diffusion.num_train_timesteps is 500 there and 1000 here"]


def test_differing_fields_field_younger_than_the_checkpoint_stands_at_its_default() -> None:
    saved = _saved()
    del saved["sampling"]["solver"], saved["routing"]["threshold_decay"]
    assert differing_fields(saved, small_config(), architecture_only=False) == []
    changed = small_config(routing={"method": "diff_moe", "threshold_decay": 0.5, "num_unconditional_experts": 0})
    assert "routing.threshold_decay is 0.95 there and 0.5 here" in differing_fields(saved, changed, architecture_only=False)


def test_differing_fields_sampler_is_free_and_a_router_s_head_is_architecture() -> None:
    assert differing_fields(_saved(sampling={"cfg_scale": 3.0, "solver": "euler"}), small_config(), architecture_only=False) == []
    race = {"method": "expert_race", "num_unconditional_experts": 0}
    saved = _saved(routing={**race, "per_layer_weight": 0.0})
    found = differing_fields(saved, small_config(routing=race), architecture_only=True)
    assert found == ["routing.per_layer_weight is False there and True here"]
    saved = _saved(routing={**race, "per_layer_weight": 0.1})
    assert differing_fields(saved, small_config(routing=race), architecture_only=True) == []


def test_changes_that_leave_a_trace_are_told(caplog: pytest.LogCaptureFixture) -> None:
    layout = Layout(world_size=2, ep_size=1, dispatch="local", zero_stage=0, precision="fp32")
    manifest = Manifest(step=1, samples_seen=8, layout=layout, config=_saved(train={"global_batch_size": 8}), files={}, versions={},
                        dataset_size=100)

    def told(size: int, scale: float, micro_batch: int, **options: bool) -> list[str]:
        caplog.clear()
        session = SimpleNamespace(dataset=range(size), config=small_config(data={"latent_scale": scale}),
                                  batches=SimpleNamespace(micro_batch=micro_batch))
        _tell_changes(session, manifest, **options)
        return [record.message.split(":")[1].strip() for record in caplog.records]

    assert told(100, 1.0, 4, same_run=True) == []
    assert told(90, 0.5, 2, same_run=True) == ["the micro-batch was 4 and is 2", "data.latent_scale was 1 and is 0.5",
                                               "the data set had 100 samples and has 90"]
    assert told(90, 1.0, 4, same_run=False) == [], "a branch may well have other data"
