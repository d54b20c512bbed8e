"""Files of the published code as they are passed around: averaged tables, parts, prefixes,
precisions, other files.
"""

from __future__ import annotations

import gzip
import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from promoe_ds import load_model
from promoe_ds.checkpoint import manifest
from promoe_ds.checkpoint.conversion import Request, convert
from promoe_ds.checkpoint.conversion.upcycling import UpcycleRequest, upcycle
from promoe_ds.checkpoint.torch_file import load_torch
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.shards import Shard
from promoe_ds.errors import CheckpointError, PromoeError
from promoe_ds.evaluation.features import load_extractor
from promoe_ds.model import initialise
from promoe_ds.model.build import build_model
from promoe_ds.model.export import fill_network
from promoe_ds.model.official import to_official
from promoe_ds.model.shards import ShardReader
from promoe_ds.pipeline import ProMoEPipeline

from ..builders import of_method, random_tensor, randomise, small_config

DECAY = 0.9999
STEPS = (0, 250, 20_000, 500_000)
CONFIG = small_config()
INPUTS = (random_tensor(3, 1, 4, 4), torch.tensor([10.0, 500.0, 990.0]), torch.tensor([0, 3, 10]))


def network_of(config: RunConfig, seed: int) -> Any:
    network = build_model(config)
    initialise(network, seed)
    return randomise(network, seed).eval()


@cache
def averaged_tables() -> dict[int, Tensor]:
    """Return the table after so many steps of the published loop, by its own two calls in fp32."""
    table = network_of(CONFIG, 0).positions[None]
    average, tables = table.clone(), {}
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            tables[step] = average.clone()
        before = average.clone()
        average.mul_(DECAY).add_(table, alpha=1 - DECAY)
        if torch.equal(before, average):  # it stays where it is from here on
            break
    return {step: tables.get(step, average) for step in STEPS}


def published(steps: int = 0, config: RunConfig = CONFIG) -> dict[str, Any]:
    """Return a file's content: trained and averaged weights, whose table is `steps` old."""
    raw, average = (to_official(network_of(config, seed).state_dict(), config) for seed in (0, 1))
    return {
        "step": steps,
        "model_state_dict": raw,
        "ema_model_state_dict": average | {"pos_embed": averaged_tables()[steps]},
    }


def go(
    content: Any,
    folder: Path,
    to: str = "single",
    config: RunConfig | None = CONFIG,
    **options: Any,
) -> Any:
    """Convert a file with this content, or what is at this path."""
    source = content if isinstance(content, Path) else folder / "file.pth"
    folder.mkdir(exist_ok=True)
    if not isinstance(content, Path):
        torch.save(content, source)
    return convert(source, Request(destination=folder / to, to=to, **options), config)


def sampled(content: dict[str, Tensor], config: RunConfig = CONFIG) -> Tensor:
    """Return what the published sampler's network predicts: its own table added, all in fp32."""
    plain = build_model(config)
    plain.load_state_dict(network_of(config, 1).state_dict())
    plain.positions = content["pos_embed"][0]
    return plain.eval()(*INPUTS)


@pytest.mark.parametrize("steps", STEPS)
def test_averaged_position_table_is_kept_and_written_back_bit_for_bit(
    tmp_path: Path, steps: int
) -> None:
    content = published(steps)
    table = content["ema_model_state_dict"]["pos_embed"]
    assert torch.equal(table, published()["model_state_dict"]["pos_embed"]) == (steps == 0)
    go(content, tmp_path)
    model = load_model(tmp_path / "single")
    torch.testing.assert_close(
        model(*INPUTS), sampled(content["ema_model_state_dict"]), rtol=1e-6, atol=1e-6
    )
    assert ("positions" in model.state_dict()) == (steps > 0)
    go(tmp_path / "single", tmp_path, "official", None)
    again = torch.load(next((tmp_path / "official").glob("*.pth")), weights_only=True)[
        "ema_model_state_dict"
    ]
    assert again.keys() == content["ema_model_state_dict"].keys()
    assert all(
        torch.equal(again[key], value) for key, value in content["ema_model_state_dict"].items()
    )


def test_averaged_position_table_survives_every_format(tmp_path: Path) -> None:
    content = published(20_000)
    go(content, tmp_path, "official")
    again = torch.load(next((tmp_path / "official").glob("*.pth")), weights_only=True)
    for section in ("model_state_dict", "ema_model_state_dict"):
        assert all(
            torch.equal(again[section][key], value) for key, value in content[section].items()
        )
    go(content, tmp_path, "diffusers")
    pipeline = ProMoEPipeline.from_pretrained(tmp_path / "diffusers")
    expected = sampled(content["ema_model_state_dict"])
    torch.testing.assert_close(pipeline.transformer(*INPUTS).sample, expected, rtol=1e-6, atol=1e-6)
    go(tmp_path / "diffusers", tmp_path, "single", None)
    torch.testing.assert_close(
        load_model(tmp_path / "single")(*INPUTS), expected, rtol=1e-6, atol=1e-6
    )
    assert "position table" in go(content, tmp_path, "deepspeed").note


def test_averaged_position_table_is_kept_by_upcycling(tmp_path: Path) -> None:
    dense = small_config(routing={"method": "dense"})
    state = to_official(network_of(dense, 0).state_dict(), dense) | {
        "pos_embed": averaged_tables()[20_000]
    }
    torch.save(state, tmp_path / "dense.pth")
    _, differences = upcycle(
        tmp_path / "dense.pth",
        CONFIG,
        UpcycleRequest(destination=tmp_path / "moe", to="single"),
        dense,
    )
    assert differences["null samples"] < 1e-6


def test_network_that_was_filled_with_another_table_does_not_keep_it() -> None:
    state = network_of(CONFIG, 0).state_dict()
    with torch.device("meta"):
        own, computed = build_model(CONFIG), build_model(CONFIG)
    fill_network(own, {**state, "positions": torch.zeros(4, 16)})
    assert not own.positions.any() and fill_network(computed, state).positions.any()


WHOLE = published(250)
SECTIONS = ("model_state_dict", "ema_model_state_dict")


def with_sections(change: Any) -> dict[str, Any]:
    return {key: change(value) if key in SECTIONS else value for key, value in WHOLE.items()}


def prefixed(prefix: str) -> dict[str, Any]:
    return with_sections(lambda state: {prefix + key: value for key, value in state.items()})


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"ema_model_state_dict": WHOLE["ema_model_state_dict"]}, "ema"),
        ({"model_state_dict": WHOLE["model_state_dict"]}, "weights"),
        (WHOLE["ema_model_state_dict"], "weights"),
        ({"state_dict": WHOLE["model_state_dict"]}, "weights"),
        (
            {"model": WHOLE["model_state_dict"], "ema": WHOLE["ema_model_state_dict"], "opt": {}},
            "ema",
        ),
        *(
            (prefixed(prefix), "ema")
            for prefix in (
                "module.",
                "_orig_mod.",
                "module._orig_mod.",
                "_orig_mod.module.",
                "module.module.",
            )
        ),
        (
            with_sections(
                lambda state: {
                    key.replace("blocks.0.", "blocks.0._orig_mod."): v for key, v in state.items()
                }
            ),
            "ema",
        ),
        (with_sections(lambda state: {key: v.half() for key, v in state.items()}), "ema"),
        (with_sections(lambda state: {key: v.bfloat16() for key, v in state.items()}), "ema"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_prefixes_and_precisions_of_a_published_file_are_read(
    tmp_path: Path, content: Any, kind: str
) -> None:
    report = go(content, tmp_path)
    assert list(report.kinds) == [kind]
    section = (
        content
        if "pos_embed" in content
        else next(
            content[name]
            for name in ("ema_model_state_dict", "ema", "model_state_dict", "state_dict")
            if name in content
        )
    )
    found = to_official(load_model(tmp_path / "single").state_dict(), CONFIG)
    assert all(
        torch.equal(found[key.replace("module.", "").replace("_orig_mod.", "")], value.float())
        for key, value in section.items()
    )
    has_prefix = any("module." in key or "_orig_mod." in key for key in section)
    assert ("prefix" in report.note) == has_prefix


def test_diffmoe_file_in_half_precision_holds_its_decay_rounded(tmp_path: Path) -> None:
    config = small_config(
        **of_method("diff_moe", num_unconditional_experts=0, num_shared_experts=0)
    )
    network = network_of(config, 0)
    state = to_official(network.state_dict(), config)
    go(
        {"model_state_dict": {key: value.bfloat16() for key, value in state.items()}},
        tmp_path,
        config=config,
    )
    written = load_file(tmp_path / "single" / "model.safetensors")
    for name, value in network.named_parameters():
        assert torch.equal(written[name].float(), value.bfloat16().float()), name


def test_parameter_with_and_without_a_prefix_is_ambiguous(tmp_path: Path) -> None:
    state = WHOLE["model_state_dict"]
    with pytest.raises(CheckpointError, match="with and without a prefix"):
        go({**state, **{f"module.{key}": value for key, value in state.items()}}, tmp_path)


class Runs:
    """Runs a command when unpickled."""

    def __reduce__(self) -> tuple:
        return eval, ("1/0",)


def write_other(path: Path, kind: str) -> None:
    """Write a file that is no file of torch."""
    texts = {
        "pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        "empty": "",
        "text": "Not found\n",
        "page": "\n<!DOCTYPE html><html></html>",
    }
    if kind in texts:
        path.write_text(texts[kind])
    elif kind == "safetensors":
        save_file({"a": torch.ones(1)}, path)
    elif kind == "legacy":
        torch.save(WHOLE, path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "gzip":
        path.write_bytes(gzip.compress(b"x"))
    elif kind == "cut":
        torch.save(WHOLE, path)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "script":
        torch.jit.trace(torch.nn.Identity(), torch.ones(1)).save(path)
    else:
        torch.save({"model_state_dict": {"x": Runs()}}, path)


OTHERS = {
    "pointer": "git lfs pull",
    "empty": "empty file",
    "text": "text file",
    "page": "web page",
    "safetensors": "safetensors",
    "legacy": "before 1.6",
    "pickle": "pickle",
    "gzip": "gzip",
    "cut": "cut off",
    "script": "TorchScript",
    "code": "eval",
}


def read_export(path: Path) -> None:
    """Read weights of an export whose file is this one."""
    path.rename(path.with_name("model.safetensors"))
    ShardReader(path.parent, "model")


@pytest.mark.parametrize(
    "reader",
    [
        lambda path: convert(path, Request(destination=path.parent / "out", to="single"), CONFIG),
        load_torch,
        read_export,
        Shard,
        lambda path: load_extractor(str(path), "cpu"),
    ],
    ids=["convert", "checkpoint", "export", "latents", "extractor"],
)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_file_is_named_for_what_it_is_by_every_reader(
    tmp_path: Path, request, kind: str, reader: Any
) -> None:
    path = tmp_path / "file.pth"
    write_other(path, kind)
    name = request.node.callspec.id
    if ("export" in name and kind == "safetensors") or ("extractor" in name and kind == "script"):
        return  # it is what is wanted
    with pytest.raises(PromoeError) as told:
        reader(path)
    message = str(told.value)
    expected = (
        "file of torch.save"
        if kind == "code" and not name.startswith(("code-convert", "code-checkpoint"))
        else OTHERS[kind]
    )
    if not (kind == "safetensors" and "latents" in name):
        assert expected in message.replace(str(tmp_path), "")
    assert "weights_only" not in message and "\n" not in message


@pytest.mark.parametrize(
    "change", [{"format": 99}, {"train": {"warp": 9}}, {"routing": {"method": "of_2030"}}]
)
@pytest.mark.parametrize("to", ["single", "deepspeed", "diffusers"])
def test_checkpoint_of_a_newer_version_says_so(
    tmp_path: Path, to: str, change: dict[str, Any]
) -> None:
    go(WHOLE, tmp_path, to)
    path = next(
        path
        for name in ("manifest.json", "transformer/config.json", "config.json")
        for path in (tmp_path / to).rglob(name)
        if path.parent.name != "scheduler"
    )
    values = json.loads(path.read_text())
    if "format" in change:
        if to == "diffusers":
            return  # its format is diffusers' own
        values |= change
    else:
        versions = (
            values["versions"] if to == "deepspeed" else values["origin"].setdefault("versions", {})
        )
        versions["promoe_ds"] = "99.0"
        config = values["run" if to == "diffusers" else "config"]
        for section, fields in change.items():
            config[section] |= fields
    if to == "deepspeed":
        values["xxh3"] = manifest._checksum_of(
            {key: value for key, value in values.items() if key != "xxh3"}
        )
    path.write_text(json.dumps(values))
    with pytest.raises(PromoeError) as told:
        go(tmp_path / to, tmp_path, "official", None)
    message = str(told.value)
    assert str(path) in message and "did you mean" not in message
    assert ("99.0" in message) == ("format" not in change)
    assert "format" in change or ("train.warp" in message) == ("train" in change)


def test_average_that_is_mostly_its_start_is_reported_by_the_conversion(tmp_path: Path) -> None:
    for step, reported in ((900, True), (50_000, False)):
        content = {**WHOLE, "step": step}
        assert (
            "of the average ema" in go(content, tmp_path / str(step), "single").note
        ) == reported
        assert go(content, tmp_path / str(step), "official", weights="raw").note == ""
