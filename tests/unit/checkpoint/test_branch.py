"""Starting a run from a model that differs: what is kept, made new, refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from promoe_ds.checkpoint.conversion.branch import find_start
from promoe_ds.checkpoint.conversion.convert import Request, convert, open_source
from promoe_ds.config import RunConfig
from promoe_ds.errors import CheckpointError, ConfigError
from promoe_ds.model import DiT

from ..builders import (
    METHODS,
    NO_NULL,
    TEXT,
    of_method,
    random_network,
    save_export,
    small_config,
)

LABELS = "label_embedding.table.weight"


def _export(folder: Path, network: DiT) -> Path:
    return save_export(folder, network, step=7, kind="ema")


def _start(path: Path, config: RunConfig, **options: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the checkpoint that a run of `config` starts from."""
    (folder,) = find_start(path, config, path.parent / "start", **options)
    source = open_source(folder)
    assert source.info.step == 0 and source.info.config.model == config.model
    return {name: source.read("weights", name) for name in source.shapes}


@pytest.fixture(autouse=True)
def _log_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="promoe_ds")


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    network = random_network()
    return _export(tmp_path / "export", network), network.state_dict()


@pytest.mark.parametrize("size", [8, [8, 4]])
@pytest.mark.parametrize("buckets", [[], [6]])
def test_other_resolution_keeps_every_weight(small, caplog, size, buckets) -> None:
    path, before = small
    sizes = {"input_size": size, "buckets": buckets and [size, [2, 8]]}
    larger = small_config(model={**sizes, "position_scale": 0.5})
    after = _start(path, larger)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert f"resume: {len(before)} tensors copied" in caplog.text


def test_label_map_keeps_rows_and_starts_the_others_anew(small, tmp_path, caplog) -> None:
    path, before = small
    labels = tmp_path / "labels.yaml"
    labels.write_text("0: 9\n1: new\n2: 3\n", encoding="utf-8")
    config = small_config(model={"num_classes": 3})
    after = _start(path, config, label_map=labels)
    table, old = after.pop(LABELS), before[LABELS]
    assert torch.equal(table[[0, 2, 3]], old[[9, 3, 10]])
    assert 0 < table[1].std() < 0.05, "as at the start of a run"
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert f"with 2 old rows of 3: {LABELS}" in caplog.text
    fresh = _start(path, config)[LABELS]
    assert torch.equal(fresh[1], table[1]) and torch.equal(fresh[3], old[10])
    assert not torch.equal(fresh[0], old[9])


def test_branch_to_another_data_set_keeps_what_loading_asks_of_the_old_one(tmp_path) -> None:
    digits = {"dataset": "digits", "latent_scale": 0.5}
    optimizer = {"ema_decays": [0.9, 0.99], "lr": 0.5}
    network = random_network(model={"input_size": 8}, data=digits, optimizer=optimizer)
    path, old = _export(tmp_path / "export", network), network.state_dict()[LABELS]
    labels = tmp_path / "labels.yaml"
    labels.write_text("0: 9\n1: new\n2: 3\n3: 0\n", encoding="utf-8")
    config = small_config(model={"input_size": 8, "num_classes": 4}, train={"max_steps": 3})
    (folder,) = find_start(path, config, tmp_path / "start", labels)
    source = open_source(folder)
    assert torch.equal(source.read("weights", LABELS)[[0, 2, 3, 4]], old[[9, 3, 0, 10]])
    saved = source.info.config
    assert (saved.data.dataset, saved.data.latent_scale) == ("synthetic", 0.5)
    assert (saved.optimizer, saved.train) == (network.config.optimizer, network.config.train)


def test_label_map_of_a_model_without_a_null_label_maps_every_row(tmp_path) -> None:
    network = random_network(**NO_NULL)
    path, old = _export(tmp_path / "export", network), network.state_dict()[LABELS]
    labels = tmp_path / "labels.yaml"
    labels.write_text("0: 9\n1: new\n2: 3\n", encoding="utf-8")
    config = small_config(**{**NO_NULL, "model": {"null_row": False, "num_classes": 3}})
    published = tmp_path / "published"
    convert(path, Request(destination=published, to="official"))
    for source in (path, next(published.glob("*.pth"))):
        table = _start(source, config, label_map=labels)[LABELS]
        assert table.shape == (3, 16) and torch.equal(table[[0, 2]], old[[9, 3]])
    with pytest.raises(CheckpointError, match=r"model\.null_row is False there and True here"):
        find_start(path, small_config(routing=NO_NULL["routing"]), tmp_path / "other")


def test_label_map_of_as_many_classes_moves_rows(small, tmp_path) -> None:
    path, before = small
    labels = tmp_path / "labels.yaml"
    labels.write_text("".join(f"{new}: {9 - new}\n" for new in range(10)), encoding="utf-8")
    checkpoint, link = tmp_path / "checkpoint", tmp_path / "latest"
    convert(path, Request(destination=checkpoint, to="deepspeed"))
    link.symlink_to(path)
    for source in (path, link, checkpoint, checkpoint / "latest"):
        after = _start(source, small_config(), label_map=labels)
        assert torch.equal(after[LABELS], before[LABELS][[*range(9, -1, -1), 10]])


def test_pipeline_of_diffusers_starts_a_run(small, tmp_path) -> None:
    path, before = small
    pipeline = tmp_path / "pipeline"
    convert(path, Request(destination=pipeline, to="diffusers"))
    after = _start(pipeline, small_config())
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("experts", [6, 3])
def test_other_number_of_experts_copies_them_in_turn(tmp_path, method, experts) -> None:
    if method == "classification":
        pytest.skip("its experts are the superclasses")
    network = random_network(**of_method(method))
    path, before = _export(tmp_path / "export", network), network.state_dict()
    values = of_method(method, num_experts=experts)
    after = _start(path, small_config(**values))
    kept = min(4, experts)
    for name, value in after.items():
        if value.shape == before[name].shape:
            assert torch.equal(value, before[name]), name
            continue
        assert torch.equal(value[:kept], before[name][:kept]), name
        if ".routed." in name:
            assert torch.equal(value, before[name][torch.arange(experts) % 4]), name
        elif (
            experts > 4
            and before[name].any()
            and not name.endswith(("bias", "thresholds", "load_average"))
        ):
            assert 0 < (value[4:] - before[name][: experts - 4]).std() < before[name].std(), name


def test_published_file_starts_a_run_of_other_classes_and_size(small, tmp_path) -> None:
    path, before = small
    published = tmp_path / "published"
    convert(path, Request(destination=published, to="official"))
    (file,) = published.glob("*.pth")
    after = _start(file, small_config(model={"num_classes": 4, "input_size": 8}))
    assert after[LABELS].shape == (5, 16) and torch.equal(after[LABELS][-1], before[LABELS][-1])
    others = after.keys() - {LABELS}
    assert all(torch.equal(after[name], before[name]) for name in others)


def test_text_in_place_of_classes_adds_nothing_at_first(small) -> None:
    path, before = small
    after = _start(path, small_config(**TEXT))
    assert LABELS not in after
    for name, value in after.items():
        if name in before:
            assert torch.equal(value, before[name]), name
        elif name.endswith("text_kv.weight"):
            keys, values = value.chunk(2)
            assert keys.any() and not values.any()
        elif "text_k_norm" not in name:
            assert not value.any(), name


def test_run_with_frozen_labels_starts_one_of_texts(tmp_path) -> None:
    network = random_network(train={"freeze": ["label_embedding.*", "patch_embedding.*"]})
    path, before = _export(tmp_path / "export", network), network.state_dict()
    after = _start(path, small_config(**TEXT))
    assert torch.equal(after["patch_embedding.proj.bias"], before["patch_embedding.proj.bias"])


def test_own_checkpoint_is_taken_as_it_is(small, tmp_path) -> None:
    path, _ = small
    checkpoint = tmp_path / "checkpoint"
    convert(path, Request(destination=checkpoint, to="deepspeed"))
    found = find_start(checkpoint, small_config(), tmp_path / "start")
    assert found[0].parent == checkpoint and not (tmp_path / "start").exists()
    other = small_config(model={"depth": 3})
    assert find_start(checkpoint, other, tmp_path / "start") == found, "loading names what differs"


def test_newest_checkpoint_without_a_readable_manifest_is_left_to_resuming(small, tmp_path) -> None:
    """Resuming skips it and says so, as it does with other damage."""
    path, _ = small
    checkpoints = tmp_path / "run" / "checkpoints"
    convert(path, Request(destination=checkpoints, to="deepspeed"))
    damaged = checkpoints / "step_0000009"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{", encoding="utf-8")
    found = find_start(tmp_path / "run", small_config(), tmp_path / "start")
    assert [folder.name for folder in found] == ["step_0000009", "step_0000000"]
    shutil.rmtree(checkpoints / "step_0000000")
    assert find_start(tmp_path / "run", small_config(), tmp_path / "start") == [damaged]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0: 9\n2: 3\n", "misses class 1"),
        ("0: 9\n1: 10\n2: 3\n", "has «1: 10»"),
        ("0: 9\n1: 1\n2: old\n", "new label and old label"),
        ("0: 9\n1: 1\n2: 2\n3: 3\n", "has «3: 3»"),
        ("[1, 2]", "new label and old label"),
    ],
)
def test_label_map_that_does_not_fit_is_refused(small, tmp_path, text, said) -> None:
    labels = tmp_path / "labels.yaml"
    labels.write_text(text, encoding="utf-8")
    config = small_config(model={"num_classes": 3})
    with pytest.raises(ConfigError) as error:
        find_start(small[0], config, tmp_path / "start", labels)
    assert said in str(error.value) and str(labels) in str(error.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"depth": 3}, r"model\.depth is 2 there and 3 here"),
        ({"block": "modern"}, r"model\.block is 'dit' there and 'modern' here"),
    ],
)
def test_another_architecture_is_refused(small, tmp_path, model, said) -> None:
    with pytest.raises(CheckpointError, match=said):
        find_start(small[0], small_config(model=model), tmp_path / "start")
