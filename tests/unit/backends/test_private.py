"""The library's insides are checked before they are trusted: what moved is named."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from promoe_ds import torch_private
from promoe_ds.backends import deepspeed_private, zero_private
from promoe_ds.backends.deepspeed_private import ZeroPartitions, check_gate
from promoe_ds.backends.stock_deepspeed import PlanGate
from promoe_ds.backends.zero_private import UpdateGate
from promoe_ds.errors import ConfigError
from promoe_ds.private_names import check_names, check_parameters, find_private
from promoe_ds.torch_private import KeepsBuffersPrecise

TABLES = [torch_private.NAMES, torch_private.TRACE_NAMES, deepspeed_private.NAMES]
if find_spec("megatron"):
    from promoe_ds.backends import megatron_private

    TABLES.append(megatron_private.NAMES)


@pytest.mark.parametrize(
    ("table", "path", "name"),
    [(table, path, name) for table in TABLES for path, names in table.items() for name in names],
)
def test_check_names_reports_each_name_that_has_moved(table, path, name, monkeypatch) -> None:
    check_names(table)
    owner = importlib.import_module(path)
    *parts, attribute = name.split(".")
    for part in parts:
        owner = getattr(owner, part)
    for where in getattr(owner, "__mro__", (owner,)):
        if attribute in vars(where):
            monkeypatch.delattr(where, attribute)
    with pytest.raises(ConfigError) as error:
        check_names(table)
    library = path.partition(".")[0].replace("megatron", "megatron.core")
    version = importlib.import_module(library).__version__
    assert f"{library} {version} has no" in str(error.value) and attribute in str(error.value)


def test_module_that_has_moved_is_named_and_one_that_is_missing_is_not_taken_for_it(
    monkeypatch,
) -> None:
    with pytest.raises(ConfigError, match=r"torch .* has no torch\.nowhere"):
        find_private("torch.nowhere", "name")
    with pytest.raises(ModuleNotFoundError):
        find_private("no_such_library.part", "name")


def test_parameter_that_has_moved_is_named() -> None:
    check_parameters(nn.Linear(1, 1), ["weight", "bias"], library="torch")
    with pytest.raises(ConfigError, match=r"torch .*Linear\.weight0"):
        check_parameters(nn.Linear(1, 1), ["weight0"], library="torch")


def test_gate_of_other_arguments_is_reported(monkeypatch) -> None:
    check_gate(PlanGate)
    monkeypatch.setattr(
        deepspeed_private.TopKGate, "forward", lambda self, tokens, used_token: None
    )
    with pytest.raises(
        ConfigError, match=r"TopKGate\.forward\(used_token, sparse_routes, use_tutel\)"
    ):
        check_gate(PlanGate)


def test_cast_that_goes_another_way_is_reported(monkeypatch) -> None:
    monkeypatch.delattr(nn.Module, "_apply")
    with pytest.raises(ConfigError, match=r"torch .*_apply"):
        KeepsBuffersPrecise()


def test_file_without_offsets_is_reported(tmp_path, monkeypatch) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    with torch_private.fake_tensors():
        place = torch.load(tmp_path / "a.pt", weights_only=True)["a"]
    assert 0 < torch_private.file_offset(place) < (tmp_path / "a.pt").stat().st_size
    monkeypatch.setattr(torch.UntypedStorage, "_checkpoint_offset", property(), raising=False)
    with pytest.raises(ConfigError, match=r"torch .*_checkpoint_offset"):
        torch_private.file_offset(place)


def test_operation_that_tells_nothing_of_itself_is_reported() -> None:
    for read, name in (
        (torch_private.operation_family, "_overloadpacket"),
        (torch_private.changes_inputs, "_schema"),
    ):
        with pytest.raises(ConfigError, match=rf"torch .*{name}"):
            read(SimpleNamespace())
    with pytest.raises(ConfigError, match=r"torch .*aten\._nowhere"):
        torch_private.traced_operation("_nowhere.default")


def test_prepared_library_compiles_nothing_and_takes_our_optimizer() -> None:
    script = (
        "import sys\n"
        "from promoe_ds.backends.deepspeed_private import prepare_library\n"
        "prepare_library(60)\n"
        "from deepspeed.runtime.zero import utils\n"
        "utils.dist.get_rank = lambda: 1\n"
        "optimizer = utils.torch.optim.AdamW([utils.torch.zeros(1)])\n"
        "assert utils.is_zero_supported_optimizer(optimizer)\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def zero_optimizer() -> SimpleNamespace:
    return SimpleNamespace(
        overflow=False,
        check_grad_overflow=False,
        check_overflow=lambda: None,
        single_partition_of_fp32_groups=[],
        optimizer=SimpleNamespace(state={}),
        bit16_groups=[],
    )


def test_update_gate_decides_and_notices_where_it_is_not_asked() -> None:
    optimizer = zero_optimizer()
    gate = UpdateGate(optimizer)
    gate.set(skip=True)
    optimizer.check_overflow()
    gate.confirm()
    assert optimizer.overflow and optimizer.check_grad_overflow
    gate.set(skip=False)
    with pytest.raises(ConfigError, match="check_overflow"):
        gate.confirm()


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        (UpdateGate, "overflow"),
        (UpdateGate, "check_grad_overflow"),
        (UpdateGate, "check_overflow"),
        (ZeroPartitions, "single_partition_of_fp32_groups"),
        (ZeroPartitions, "optimizer"),
        (ZeroPartitions, "bit16_groups"),
    ],
)
def test_attribute_of_zero_that_has_moved_is_named(reader, name) -> None:
    optimizer = zero_optimizer()
    delattr(optimizer, name)
    with pytest.raises(ConfigError, match=f"deepspeed.*SimpleNamespace.{name}"):
        reader(optimizer)


def test_training_under_a_moved_library_ends_at_its_first_step(tmp_path, monkeypatch) -> None:
    from promoe_ds.cli import train
    from promoe_ds.distributed.process_group import stop_distributed

    real = zero_private.UpdateGate.__init__

    def moved(self, optimizer) -> None:
        real(self, optimizer)
        optimizer.check_overflow = lambda partition_gradients=True: (
            None
        )  # as if `step` asked another method

    monkeypatch.setattr(zero_private.UpdateGate, "__init__", moved)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "") or monkeypatch.delenv(name)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(ConfigError, match=r"deepspeed .*check_overflow"):
        train.main(
            [
                "--recipe",
                "digits_promoe",
                "--deepspeed_config",
                str(tmp_path / "ds.json"),
                "--run-dir",
                str(tmp_path / "run"),
                "--set",
                "parallel.ep_size=1",
                "model.hidden_size=32",
                "model.depth=2",
                "model.num_heads=2",
                "train.global_batch_size=8",
                "logging.tensorboard=false",
            ]
        )
    stop_distributed()
    # DeepSpeed would give the ended group to the next engine
    deepspeed_private.forget_expert_groups()
    assert not list((tmp_path / "run/checkpoints").iterdir())
