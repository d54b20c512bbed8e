"""Which saved settings must agree with this run's before its checkpoint is taken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from promoe_ds.checkpoint.load import (
    FREE_FIELDS,
    _changed_schedule,
    _report_changes,
    differing_fields,
)
from promoe_ds.checkpoint.manifest import CONVERTED, Layout, Manifest
from promoe_ds.config.loader import dotted_names
from promoe_ds.config.optimizer import learning_rate
from promoe_ds.errors import CheckpointError

from ..builders import small_config


def _saved(**sections):
    return small_config(**sections).model_dump(mode="json")


RACE = {"method": "expert_race", "num_unconditional_experts": 0}


@pytest.mark.parametrize(
    ("saved", "now", "architecture", "differing"),
    [
        ({}, {}, [], []),
        ({"routing": {"top_k": 2}}, {}, [], ["routing.top_k is 2 there and 1 here"]),
        (
            {"routing": {"expert_type": "swiglu"}},
            {},
            ["routing.expert_type is 'swiglu' there and 'gelu' here"],
            None,
        ),
        # A network of velocities predicts no noise, whatever its shapes; the sampler's shift and
        # the noise levels may change.
        (
            {"diffusion": {"objective": "ddpm", "num_train_timesteps": 500}},
            {"diffusion": {"shift": 2.0}},
            [
                "diffusion.objective is 'ddpm' there and 'rectified_flow' here",
                "diffusion.num_train_timesteps is 500 there and 1000 here",
            ],
            None,
        ),
        ({"sampling": {"cfg_scale": 3.0, "solver": "euler"}}, {}, [], []),
        # A router's head is architecture, the weight of its loss is not.
        (
            {"routing": {**RACE, "per_layer_weight": 0.0}},
            {"routing": RACE},
            ["routing.per_layer_weight is False there and True here"],
            None,
        ),
        ({"routing": {**RACE, "per_layer_weight": 0.1}}, {"routing": RACE}, [], None),
    ],
)
def test_differing_fields(saved, now, architecture, differing) -> None:
    """Of the architecture alone, and of everything (None: not looked at)."""
    here = small_config(**now)
    assert differing_fields(_saved(**saved), here, architecture_only=True) == architecture
    if differing is not None:
        assert differing_fields(_saved(**saved), here, architecture_only=False) == differing


def test_differing_fields_field_newer_than_the_checkpoint_has_its_default() -> None:
    saved = _saved()
    del saved["sampling"]["solver"], saved["routing"]["threshold_decay"]
    assert differing_fields(saved, small_config(), architecture_only=False) == []
    routing = {"method": "diff_moe", "threshold_decay": 0.5, "num_unconditional_experts": 0}
    found = differing_fields(saved, small_config(routing=routing), architecture_only=False)
    assert "routing.threshold_decay is 0.95 there and 0.5 here" in found


def test_changes_that_leave_a_trace_are_told(caplog: pytest.LogCaptureFixture) -> None:
    layout = Layout(world_size=2, ep_size=1, dispatch="local", zero_stage=0, precision="fp32")
    manifest = Manifest(
        step=1,
        samples_seen=8,
        layout=layout,
        config=_saved(train={"global_batch_size": 8}),
        files={},
        versions={},
        dataset_size=100,
    )

    def told(size: int, scale: float, micro_batch: int, **options: bool) -> list[str]:
        caplog.clear()
        session = SimpleNamespace(
            dataset=range(size),
            config=small_config(data={"latent_scale": scale}),
            batches=SimpleNamespace(micro_batch=micro_batch),
        )
        _report_changes(session, manifest, manifest.run_config(Path("step_1")), **options)
        return [record.message.split(":")[1].strip() for record in caplog.records]

    assert told(100, 1.0, 4, same_run=True) == []
    assert told(90, 0.5, 2, same_run=True) == [
        "the micro-batch was 4 and is 2",
        "the normalisation of latents was scaled by 1.0 and is scaled by 0.5",
        "the number of samples in the data set was 100 and is 90",
    ]
    assert told(90, 1.0, 4, same_run=False) == ["settings changed from the checkpoint's"], (
        "a branch may well have other data"
    )
    manifest = replace(manifest, layout=replace(layout, world_size=1, dispatch=CONVERTED))
    assert told(100, 1.0, 2, same_run=True) == [], "nobody knows the micro-batch of a conversion"


COSINE = {"schedule": "cosine", "lr": 1e-3}


@pytest.mark.parametrize(
    ("train", "optimizer", "changed"),
    [
        ({"max_steps": 20}, {}, True),
        ({"max_steps": 6}, {}, True),
        ({"max_steps": 20}, {"schedule_steps": 10}, False),
        ({}, {"lr": 2e-3}, True),
        ({}, {"min_lr": 1e-4}, True),
        ({}, {"warmup_steps": 5}, True),
        ({}, {"schedule": "linear"}, True),
        ({"log_every": 2}, {"betas": (0.8, 0.9)}, False),
    ],
)
def test_schedule_changed_is_reported_with_both_rates_and_the_old_one_comes_back(
    train, optimizer, changed
) -> None:
    saved = small_config(optimizer=COSINE, train={"max_steps": 10})
    now = small_config(optimizer={**COSINE, **optimizer}, train={"max_steps": 10, **train})
    line = _changed_schedule(saved, now, 5)
    assert bool(line) == changed
    if changed:
        before, here = (
            learning_rate(5, run.train.max_steps, run.optimizer) for run in (saved, now)
        )
        assert f"{before:.3g}" in line
        assert f"{here:.3g}" in line
        kept = dict(
            each.removeprefix("optimizer.").split("=")
            for each in line.partition("--set ")[2].split()
        )
        undone = small_config(
            optimizer={**now.optimizer.model_dump(), **kept}, train={"max_steps": 10, **train}
        )
        assert not _changed_schedule(saved, undone, 5)


def test_schedule_constant_has_no_end() -> None:
    saved, now = (small_config(train={"max_steps": steps}) for steps in (10, 20))
    assert not _changed_schedule(saved, now, 5)


def test_manifest_of_a_newer_version_says_so() -> None:
    layout = Layout(world_size=1, ep_size=1, dispatch="local", zero_stage=0, precision="fp32")
    saved = _saved()
    saved["optimizer"]["momentum_of_tomorrow"] = 1
    for versions, expected in (
        ({"promoe_ds": "99.1"}, r"99\.1"),
        ({}, "of_tomorrow"),
        ({"promoe_ds": None}, "no such field"),
    ):
        manifest = Manifest(
            step=1, samples_seen=8, layout=layout, config=saved, files={}, versions=versions
        )
        with pytest.raises(CheckpointError, match=expected):
            manifest.run_config(Path("step_1"))


def test_free_fields_exist_and_shape_neither_weights_nor_data() -> None:
    names = {f"{section}.{name}" for section, fields in FREE_FIELDS.items() for name in fields}
    assert names <= set(dotted_names())
    assert not {
        name
        for name in names
        if name.startswith(("model.", "routing.", "diffusion.", "optimizer."))
    } - {"optimizer.schedule_steps", "optimizer.implementation"}
    assert not names & {
        "train.seed",
        "train.global_batch_size",
        "data.dataset",
        "data.latent_scale",
        "data.flip",
    }
