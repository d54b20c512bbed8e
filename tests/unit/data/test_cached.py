"""Latents that other programs keep in parquet and in files of torch: packed, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from promoe_ds.data.encode import encode
from promoe_ds.data.sources.packing import EncodeRequest
from promoe_ds.data.trees import scan_tree
from promoe_ds.distributed.context import single_process
from promoe_ds.errors import PromoeError

from .made import labelled, open_set, rows, true_moments

TEAM = single_process()


def cached(made: Path, folder: Path, form: str) -> tuple[EncodeRequest, bool]:
    """Write the true moments of the images in a form; return the request to pack them, and whether
    records are moments.
    """
    plain, mirrored = (true_moments(made, mirrored=side) for side in (False, True))
    labels, mean = torch.from_numpy(scan_tree(made / "images").labels), plain.chunk(2, 1)[0]
    folder.mkdir()
    if form == "pt moments":
        content = {"moments": plain, "moments_flip": mirrored, "labels": labels, "note": "x"}
        torch.save(content, folder / "x.pt")
    elif form == "pt latents":
        for number, rows_ in enumerate((slice(0, 8), slice(8, 15))):
            torch.save({"latents": mean[rows_], "label": labels[rows_]}, folder / f"{number}.pt")
    else:
        std = (plain.chunk(2, 1)[1] / 2).exp()
        columns = {"moments": plain, "moments_flip": mirrored}
        columns = {"parquet latents": {"latents": mean}, "parquet moments": columns}.get(
            form, {"mean": mean, "std": std}
        )
        table = {name: each.tolist() for name, each in columns.items()}
        pq.write_table(pa.table({**table, "label": labels.tolist()}), folder / "x.parquet")
    common = {"source": folder, "out": folder / "out", "vae_name": "tiny", "shard_size": 6}
    return EncodeRequest(**common, from_latents=True), form.split()[1] != "latents"


@pytest.mark.parametrize(
    "form", ["pt moments", "pt latents", "parquet moments", "parquet latents", "parquet posterior"]
)
def test_cached_latents_are_packed(made: Path, tmp_path: Path, form: str) -> None:
    packing, has_moments = cached(made, tmp_path / "source", form)
    index = encode(packing, TEAM)
    assert index.kind == ("moments" if has_moments else "latents")
    assert index.class_counts == (5, 5, 5) and index.flipped == form.endswith(" moments")
    where = np.array([2, 0, 14]), np.array([5, 6, 7]) if has_moments else None
    expected, labels = labelled(open_set(made / "latents", flip=index.flipped).take(*where))
    found, found_labels = labelled(open_set(packing.out, vae="tiny").take(*where))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found_labels, labels)


def save_pt(**content: Any) -> Callable[[Path], object]:
    return lambda folder: torch.save(content, folder / "x.pt")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (save_pt(other=torch.zeros(2)), r"x\.pt: holds other, expected moments or latents"),
        (save_pt(latents=torch.zeros(2, 1, 4, 4), labels=torch.zeros(3)), r"of \[2, 3\] records"),
        (
            save_pt(latents=torch.zeros(2, 1, 4, 4), labels=torch.zeros(2)),
            r"labels are torch\.float",
        ),
        (save_pt(latents=torch.zeros(2, 1, 4, 4).int()), r"x\.pt/0: latents int32 .*floats"),
        (save_pt(moments=torch.zeros(2, 3, 4, 4)), r"x\.pt/0: moments float32 .*2 Z"),
        (save_pt(latents=Fraction(1, 2)), "not a readable dict of tensors"),
        (rows(latents=[[[[0.0], [0.0, 1.0]]]]), r"x\.parquet/0: latents is no array"),
        (rows(latents=[None], label=[0]), r"x\.parquet/0: latents is null"),
        (rows(latents=[0.5]), r"x\.parquet/0: latents is double, no list"),
        (rows(latents=[[0.5]]), r"x\.parquet/0: latents float64 \(1,\) do not fit"),
        (rows(label=[0]), r"x\.parquet: holds label, expected moments or latents"),
    ],
)
def test_cached_latents_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path)
    common = {"source": tmp_path, "out": tmp_path / "out", "vae_name": "tiny"}
    with pytest.raises(PromoeError, match=message):
        encode(EncodeRequest(**common, from_latents=True), TEAM)
