"""A published checkpoint through the converter, and back into the published layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from promoe_ds import load_model
from promoe_ds.checkpoint.conversion import Request, convert
from promoe_ds.errors import CheckpointError
from promoe_ds.model.official import published_order

from .conftest import Case
from .published import model_config


def _parts(case: Case):
    return model_config(case.sidecar), case.path.parent / case.sidecar["checkpoint_file"]


@pytest.mark.golden_level("checkpoint")
@pytest.mark.parametrize(("weights", "output"), [("ema", "ema"), ("raw", "model")])
def test_published_checkpoint_converted_reproduces_its_output(
    case: Case, tmp_path: Path, weights: str, output: str
) -> None:
    config, file = _parts(case)
    convert(file, Request(destination=tmp_path / "export", to="single", weights=weights), config)
    inputs = case.tensors("in")
    with torch.no_grad():
        found = load_model(tmp_path / "export")(inputs["x"], inputs["t"], inputs["y"])
    torch.testing.assert_close(found, case.tensors("out")[output], **case.tolerance)


@pytest.mark.golden_level("checkpoint")
@pytest.mark.parametrize("way", ["deepspeed", "single"])
def test_published_checkpoint_there_and_back_is_bit_exact(
    case: Case, tmp_path: Path, way: str
) -> None:
    config, file = _parts(case)
    convert(file, Request(destination=tmp_path / way, to=way, with_optimizer=True), config)
    convert(
        tmp_path / way, Request(destination=tmp_path / "back", to="official", with_optimizer=True)
    )
    before = torch.load(file, weights_only=True)
    after = torch.load(tmp_path / "back" / "ckpt_step_7.pth", weights_only=True)
    assert after["step"] == before["step"]
    for section in ("model_state_dict", "ema_model_state_dict"):
        assert list(after[section]) == list(before[section])
        # Training computes the position table, which the published average has a little off.
        assert all(
            torch.equal(after[section][key], value)
            for key, value in before[section].items()
            if key != "pos_embed" or way == "single"
        )
        torch.testing.assert_close(
            after[section]["pos_embed"], before[section]["pos_embed"], rtol=0, atol=1e-6
        )
    states = (before["optimizer_state_dict"]["state"], after["optimizer_state_dict"]["state"])
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        assert state.keys() == states[1][index].keys()
        assert all(torch.equal(states[1][index][key], value) for key, value in state.items())


@pytest.mark.golden_level("checkpoint")
def test_published_checkpoint_foreign_architecture_is_refused_by_name(
    case: Case, tmp_path: Path
) -> None:
    config, file = _parts(case)
    other = config.model_copy(
        update={"routing": config.routing.model_copy(update={"num_experts": 2})}
    )
    with pytest.raises(
        CheckpointError,
        match=r"ckpt_step_7\.pth: weights: blocks\.1\.mlp\.experts\.3\.\S+ has no place",
    ):
        convert(file, Request(destination=tmp_path / "x", to="single"), other)


@pytest.mark.golden_level("model")
def test_published_order_is_that_of_the_published_modules(case: Case) -> None:
    keys = [
        key.removeprefix("state.") for key in case.sidecar["tensors"] if key.startswith("state.")
    ]
    assert sorted(keys, key=published_order) == keys
    assert sorted(reversed(keys), key=published_order) == keys
