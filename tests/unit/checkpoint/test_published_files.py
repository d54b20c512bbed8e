"""Files of the published code as they are passed around: averaged tables, parts, prefixes,
precisions, other files.
"""

from __future__ import annotations

import gzip
import json
import pickle
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from promoe_ds import load_model
from promoe_ds.checkpoint.conversion import Request, convert
from promoe_ds.checkpoint.conversion.branch import find_start
from promoe_ds.checkpoint.conversion.convert import open_source
from promoe_ds.checkpoint.conversion.upcycling import UpcycleRequest, upcycle
from promoe_ds.checkpoint.torch_file import load_torch
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.shards import Shard
from promoe_ds.errors import CheckpointError, PromoeError
from promoe_ds.evaluation.features import load_extractor
from promoe_ds.model.build import build_model
from promoe_ds.model.export import fill_network
from promoe_ds.model.official import is_published_parameter, published_order, to_official
from promoe_ds.model.shards import ShardReader
from promoe_ds.pipeline import ProMoEPipeline

from ..builders import of_method, random_network, random_tensor, small_config

DECAY = 0.9999
STEPS = (0, 250, 20_000)
CONFIG = small_config()
INPUTS = (random_tensor(3, 1, 4, 4), torch.tensor([10.0, 500.0, 990.0]), torch.tensor([0, 3, 10]))


@cache
def averaged_table(steps: int) -> Tensor:
    """Return the table after so many steps of the published loop, by its own two calls in fp32."""
    table = random_network().positions[None]
    average = table.clone()
    for _ in range(steps):
        average.mul_(DECAY).add_(table, alpha=1 - DECAY)
    return average


def published(steps: int = 0) -> dict[str, Any]:
    """Return a file's content: trained and averaged weights, whose table is `steps` old."""
    raw, average = (to_official(random_network(seed).state_dict(), CONFIG) for seed in (0, 1))
    return {
        "step": steps,
        "model_state_dict": raw,
        "ema_model_state_dict": average | {"pos_embed": averaged_table(steps)},
    }


def go(
    content: Any,
    folder: Path,
    to: str = "single",
    config: RunConfig | None = CONFIG,
    **options: Any,
) -> Any:
    """Convert a file with this content, or what is at this path."""
    folder.mkdir(exist_ok=True)
    if not isinstance(content, Path):
        torch.save(content, folder / "file.pth")
        content = folder / "file.pth"
    return convert(content, Request(destination=folder / to, to=to, **options), config)


def sampled(content: dict[str, Tensor]) -> Tensor:
    """Return what the published sampler's network predicts: its own table added, all in fp32."""
    plain = random_network(1).eval()
    plain.positions = content["pos_embed"][0]
    return plain(*INPUTS)


@pytest.mark.parametrize("steps", STEPS)
def test_averaged_position_table_survives_every_format_bit_for_bit(
    tmp_path: Path, steps: int
) -> None:
    content = published(steps)
    average = content["ema_model_state_dict"]
    has_own = not torch.equal(average["pos_embed"], content["model_state_dict"]["pos_embed"])
    assert has_own == (steps > 0)
    expected = sampled(average)
    for via in ("single", "diffusers"):
        go(content, tmp_path, via)
        go(tmp_path / via, tmp_path / via, "single", None)
        model = load_model(tmp_path / via / "single")
        torch.testing.assert_close(model(*INPUTS), expected, rtol=1e-6, atol=1e-6)
        assert ("positions" in model.state_dict()) == has_own
    ProMoEPipeline.from_pretrained(tmp_path / "single").save_pretrained(tmp_path / "saved")
    for folder in ("diffusers", "single", "saved"):
        network = ProMoEPipeline.from_pretrained(tmp_path / folder).transformer
        torch.testing.assert_close(network(*INPUTS).sample, expected, rtol=1e-6, atol=1e-6)
    go(content, tmp_path, "official")
    go(tmp_path / "single", tmp_path / "back", "official", None)
    for folder, sections in ((tmp_path, SECTIONS), (tmp_path / "back", SECTIONS[1:])):
        again = torch.load(next((folder / "official").glob("*.pth")), weights_only=True)
        for section in sections:
            assert again[section].keys() == content[section].keys()
            assert all(torch.equal(again[section][key], content[section][key]) for key in average)
    assert ("position table" in go(content, tmp_path, "deepspeed").note) == has_own


def test_averaged_position_table_is_kept_by_upcycling(tmp_path: Path) -> None:
    dense = random_network(routing={"method": "dense"})
    state = to_official(dense.state_dict(), dense.config) | {"pos_embed": averaged_table(20_000)}
    torch.save(state, tmp_path / "dense.pth")
    request = UpcycleRequest(destination=tmp_path / "moe", to="single")
    _, differences = upcycle(tmp_path / "dense.pth", CONFIG, request, dense.config)
    assert differences["null samples"] < 1e-6


def test_network_that_was_filled_with_another_table_does_not_keep_it() -> None:
    state = random_network().state_dict()
    with torch.device("meta"):
        own, computed = build_model(CONFIG), build_model(CONFIG)
    fill_network(own, {**state, "positions": torch.zeros(4, 16)})
    assert not own.positions.any() and fill_network(computed, state).positions.any()


WHOLE = published(250)
SECTIONS = ("model_state_dict", "ema_model_state_dict")
RAW, AVERAGE = (WHOLE[name] for name in SECTIONS)


def average_as(change: Any) -> dict[str, Any]:
    """Return a file's content whose averaged weights are changed, key by key and value by value."""
    return {**WHOLE, SECTIONS[1]: dict(change(*item) for item in AVERAGE.items())}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"ema_model_state_dict": AVERAGE}, AVERAGE),
        ({"model_state_dict": RAW}, RAW),
        (AVERAGE, AVERAGE),
        ({"state_dict": RAW}, RAW),
        ({"model": RAW, "ema": AVERAGE, "opt": {}}, AVERAGE),
        *(
            (average_as(lambda key, value, prefix=prefix: (prefix + key, value)), AVERAGE)
            for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")
        ),
        (average_as(lambda key, value: (key.replace("s.0.", "s.0._orig_mod."), value)), AVERAGE),
        *(
            (
                average_as(lambda key, value, kind=kind: (key, value.to(kind))),
                {key: value.to(kind).float() for key, value in AVERAGE.items()},
            )
            for kind in (torch.float16, torch.bfloat16)
        ),
    ],
    ids=lambda _: "",
)
def test_parts_prefixes_and_precisions_of_a_published_file_are_read(
    tmp_path: Path, content: Any, expected: dict[str, Tensor]
) -> None:
    report = go(content, tmp_path)
    is_average = "ema" in " ".join(content)
    assert list(report.kinds) == ["ema" if is_average else "weights"]
    found = to_official(load_model(tmp_path / "single").state_dict(), CONFIG)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    keys = content.get(SECTIONS[1], ())
    has_prefix = any("module." in key or "_orig_mod." in key for key in keys)
    assert ("prefix" in report.note) == has_prefix


@pytest.mark.parametrize("method", ["diff_moe", "ec_dit", "dit_moe", "dense"])
def test_file_of_diffmoes_own_training_is_read_with_its_optimizer(
    tmp_path: Path, method: str
) -> None:
    """Its `N.pt`: three state dicts and the command line's arguments; no step beside them."""
    none = {"num_unconditional_experts": 0, "num_shared_experts": 0}
    sections = of_method(method, **none) if method != "dense" else {"routing": {"method": "dense"}}
    networks = [random_network(seed, **sections) for seed in (0, 1)]
    config = networks[0].config
    raw, average = (to_official(network.state_dict(), config) for network in networks)
    counted = sorted(filter(is_published_parameter, raw), key=published_order)
    assert counted[0] == "pos_embed"  # the first of the parameters, and frozen
    states = {
        index: {
            "step": torch.tensor(40.0),
            "exp_avg": raw[key] + 1,
            "exp_avg_sq": raw[key].square(),
        }
        for index, key in enumerate(counted)
        if index > 0
    }
    opt = {"state": states, "param_groups": [{"lr": 1e-4, "params": list(range(len(counted)))}]}
    raw = {key: raw[key] for key in sorted(raw, key=published_order)}
    content = {"model": raw, "ema": average, "opt": opt, "args": Namespace(config="a.yaml")}
    report = go(content, tmp_path, config=config, with_optimizer=True)
    assert report.step == 40 and list(report.kinds) == ["ema", "weights", "exp_avg", "exp_avg_sq"]
    assert "model.time=data" in report.note
    source = open_source(tmp_path / "single")
    for name, value in networks[0].named_parameters():
        assert torch.equal(source.read("weights", name), value)
        assert torch.equal(source.read("exp_avg", name), value + 1)
        assert torch.equal(source.read("exp_avg_sq", name), value.square())
        assert torch.equal(source.read("ema", name), networks[1].get_parameter(name))
    (start,) = find_start(tmp_path / "file.pth", config, tmp_path / "start")
    assert torch.equal(open_source(start).read("ema", name), networks[1].get_parameter(name))
    sees_data = small_config(**{**sections, "model": {"time": "data"}})
    assert "model.time" not in go(content, tmp_path / "data", config=sees_data).note


def test_diffmoe_file_in_half_precision_holds_its_decay_rounded(tmp_path: Path) -> None:
    none = {"num_unconditional_experts": 0, "num_shared_experts": 0}
    network = random_network(**of_method("diff_moe", **none))
    state = to_official(network.state_dict(), network.config)
    content = {key: value.bfloat16() for key, value in state.items()}
    go(content, tmp_path, config=network.config)
    written = load_file(tmp_path / "single" / "model.safetensors")
    for name, value in network.named_parameters():
        assert torch.equal(written[name].float(), value.bfloat16().float()), name


def test_parameter_with_and_without_a_prefix_is_ambiguous(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="with and without a prefix"):
        go({**RAW, **{f"module.{key}": value for key, value in RAW.items()}}, tmp_path)


class Runs:
    """Runs a command when unpickled."""

    def __reduce__(self) -> tuple:
        return eval, ("1/0",)


#: Files that are no file of torch: their bytes, or what writes them, and a word that says it.
OTHERS: dict[str, tuple[bytes | Callable[[Path], Any], str]] = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "empty": (b"", "empty file"),
    "text": (b"Not found\n", "text file"),
    "page": (b"\n<!DOCTYPE html><html></html>", "web page"),
    "safetensors": (lambda path: save_file({"a": torch.ones(1)}, path), "safetensors"),
    "legacy": (
        lambda path: torch.save(WHOLE, path, _use_new_zipfile_serialization=False),
        "before 1.6",
    ),
    "pickle": (pickle.dumps({"a": 1}), "pickle"),
    "gzip": (gzip.compress(b"x"), "gzip"),
    "cut": (b"PK\x03\x04" + bytes(1000), "cut off"),
    "script": (
        lambda path: torch.jit.trace(torch.nn.Identity(), torch.ones(1)).save(path),
        "TorchScript",
    ),
    "code": (lambda path: torch.save({"model_state_dict": {"x": Runs()}}, path), "eval"),
}


def read_export(path: Path) -> None:
    """Read weights of an export whose file is this one."""
    ShardReader(path.rename(path.with_name("model.safetensors")).parent, "model")


READERS: dict[str, Callable[[Path], Any]] = {
    "convert": lambda path: go(path, path.parent),
    "checkpoint": load_torch,
    "export": read_export,
    "latents": Shard,
    "extractor": lambda path: load_extractor(str(path), "cpu"),
}
#: What is as wanted, and what some readers say in other words.
WANTED = {("export", "safetensors"), ("extractor", "script"), ("latents", "safetensors")}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_file_is_named_for_what_it_is_by_every_reader(
    tmp_path: Path, kind: str, reader: str
) -> None:
    path, (content, expected) = tmp_path / "file.pth", OTHERS[kind]
    if (reader, kind) in WANTED:
        return
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    with pytest.raises(PromoeError) as raised:
        READERS[reader](path)
    message = str(raised.value).replace(str(tmp_path), "")
    if kind == "code" and reader not in ("convert", "checkpoint"):
        expected = "file of torch.save"
    assert expected in message
    assert "weights_only" not in message and "\n" not in message


@pytest.mark.parametrize(
    "change", [{"format": 99}, {"train": {"warp": 9}}, {"routing": {"method": "of_2030"}}]
)
@pytest.mark.parametrize(
    ("to", "file"),
    [
        ("single", "config.json"),
        ("deepspeed", "step_0000000/manifest.json"),
        ("diffusers", "transformer/config.json"),
    ],
)
def test_checkpoint_of_a_newer_version_says_so(
    tmp_path: Path, to: str, file: str, change: dict[str, Any]
) -> None:
    if to == "diffusers" and "format" in change:
        return  # its format is diffusers' own
    go(WHOLE, tmp_path, to)
    path = tmp_path / to / file
    values = json.loads(path.read_text())
    values.pop("xxh3", None)
    if "format" in change:
        values |= change
    else:
        values.get("origin", values).setdefault("versions", {})["promoe_ds"] = "99.0"
        for section, fields in change.items():
            values.get("run", values.get("config"))[section] |= fields
    path.write_text(json.dumps(values))
    with pytest.raises(PromoeError) as raised:
        go(tmp_path / to, tmp_path, "official", None)
    message = str(raised.value)
    assert str(path) in message and "did you mean" not in message
    assert ("99.0" in message) == ("format" not in change)
    assert ("train.warp" in message) == ("train" in change)


def test_average_that_is_mostly_its_start_is_reported_by_the_conversion(tmp_path: Path) -> None:
    for step, reported in ((900, True), (50_000, False)):
        content, folder = {**WHOLE, "step": step}, tmp_path / str(step)
        assert ("of the average ema" in go(content, folder).note) == reported
        assert go(content, folder, "official", weights="raw").note == ""
