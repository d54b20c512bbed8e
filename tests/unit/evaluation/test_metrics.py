"""The whole evaluation, with a small network in place of Inception: its figures against their
definitions, and what does not fit.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from promoe_ds.cli.options import check_target
from promoe_ds.distributed.context import single_process
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.evaluation.features import load_extractor
from promoe_ds.evaluation.frechet import fit_gaussian, frechet_distance
from promoe_ds.evaluation.metrics import EvaluateRequest, evaluate
from promoe_ds.evaluation.reference import save_features
from promoe_ds.evaluation.sources import NpzImages, npz_array

from .made import TinyNetwork, features, save_tiny
from .test_statistics import prdc, scipy_frechet, scipy_inception_score

TEAM = single_process()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder, random = tmp_path_factory.mktemp("evaluation"), np.random.default_rng(0)
    save_tiny(folder)
    images = random.integers(0, 200, (61, 12, 12, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", arr_0=images)
    np.savez_compressed(folder / "compressed.npz", arr_0=images)
    (folder / "png").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / "png" / f"img{index:06d}_class0.png")
    images = random.integers(30, 256, (47, 12, 12, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=images)
    return folder


def judge(files: Path, **values: Any) -> dict[str, Any]:
    common = EvaluateRequest(
        samples=files / "samples.npz",
        reference=files / "reference.npz",
        extractor=str(files / "tiny.pt"),
        batch_size=16,
    )
    return evaluate(replace(common, **values), TEAM)


def test_evaluation_figures_equal_their_definitions(files: Path) -> None:
    report, outputs = judge(files), []
    for name in ("samples", "reference"):
        images = torch.from_numpy(np.load(files / f"{name}.npz")["arr_0"]).permute(0, 3, 1, 2)
        with torch.no_grad():
            pool, maps, logits = TinyNetwork()(images)
        spatial = maps.permute(0, 2, 3, 1)[..., :7].flatten(1)
        outputs.append([x.double().numpy() for x in (pool, spatial, logits.double().softmax(1))])
    (pool, spatial, probabilities), (reference_pool, reference_spatial, _) = outputs
    precision, recall = prdc(reference_pool, pool)
    # 175 features of 61 images: singular, hence the norm of the product of roots instead of scipy's
    # root.
    sfid = frechet_distance(fit_gaussian(spatial), fit_gaussian(reference_spatial))
    expected = {
        "fid": scipy_frechet(pool, reference_pool),
        "sfid": sfid,
        "is": scipy_inception_score(probabilities, 5000),
        "precision": precision,
        "recall": recall,
    }
    assert report["metrics"] == pytest.approx(expected, rel=1e-4)  # fp32 features
    assert (report["samples"]["count"], report["reference"]["images"]) == (61, 47)
    assert json.loads(json.dumps(report)) == report
    half = judge(files, half_precision_manifold=True)
    assert half["protocol"]["distances"] == "float16 where finite"
    assert 0 <= half["metrics"]["precision"] <= 1


def test_evaluation_against_itself_is_perfect(files: Path) -> None:
    metrics = judge(files, reference=files / "samples.npz")["metrics"]
    assert (metrics["fid"], metrics["sfid"]) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert metrics["precision"] == metrics["recall"] == 1.0


def test_evaluation_of_a_folder_a_compressed_and_a_stored_npz_agree(
    files: Path, tmp_path: Path
) -> None:
    expected = judge(files)
    for path in ("compressed.npz", "png"):
        found = judge(files, samples=files / path)
        assert found["metrics"] == expected["metrics"]
        assert found["samples"]["pixels"] == expected["samples"]["pixels"]
    assert isinstance(npz_array(files / "samples.npz", "arr_0"), np.memmap)
    images = np.load(files / "samples.npz")["arr_0"]
    images[60, 3, 3, 0] ^= 1
    np.savez(tmp_path / "other.npz", arr_0=images)
    other = judge(files, samples=tmp_path / "other.npz", reference=files / "png", batch_size=7)
    assert other["samples"]["pixels"] != other["reference"]["pixels"]
    assert other["reference"]["pixels"] == expected["samples"]["pixels"]
    protocol = expected["protocol"]
    assert (protocol["device"], protocol["batch_size"], protocol["tf32"]) == ("cpu", 16, False)
    assert expected["extractor"]["weights"].startswith("xxh3_128:")


def test_evaluation_takes_stated_statistics_as_adm_does(files: Path, tmp_path: Path) -> None:
    whole = judge(files, save_reference=tmp_path / "stated.npz")["metrics"]
    report = judge(files, reference=tmp_path / "stated.npz", metrics=("fid", "sfid"))
    assert report["metrics"] == {"fid": whole["fid"], "sfid": whole["sfid"]}
    assert report["reference"]["statistics"] == "as stated"
    arrays, images = dict(np.load(tmp_path / "stated.npz")), np.load(files / "reference.npz")
    arrays |= {"mu": arrays["mu"] + 1.0, "arr_0": images["arr_0"]}
    np.savez(tmp_path / "both.npz", **arrays)
    both = judge(files, reference=tmp_path / "both.npz")["metrics"]
    assert both["fid"] > whole["fid"] + 1 and both["precision"] == whole["precision"]
    # Images that are not used may be of another size.
    np.savez(tmp_path / "both.npz", **arrays | {"arr_0": images["arr_0"][:, :6, :6]})
    assert judge(files, reference=tmp_path / "both.npz", metrics=("fid",))["metrics"]["fid"] > 0
    with pytest.raises(DataError, match="6 pixels"):
        judge(files, reference=tmp_path / "both.npz", metrics=("precision",))


def test_evaluation_crops_reference_images_of_another_size(files: Path, tmp_path: Path) -> None:
    (tmp_path / "n01").mkdir()
    for index in range(5):
        image = Image.new("L", (30, 40), 10 * index)
        image.save(tmp_path / "n01" / f"{index}.jpg")
    report = judge(files, reference=tmp_path, metrics=("fid",))
    assert report["reference"]["images"] == 5 and report["metrics"]["fid"] > 0


# What does not fit.


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"metrics": ("fid", "kid")}, ConfigError, "--metrics fid,kid"),
        (
            {"reference": None},
            ConfigError,
            "--reference is needed for fid, sfid, precision, recall",
        ),
        ({"reference": "nowhere"}, DataError, "nowhere: no such file or folder"),
        ({"samples": "nowhere.npz"}, DataError, r"nowhere\.npz: not a readable npz"),
        ({"samples": "objects.npz"}, DataError, r"objects\.npz: not a readable npz .*objects"),
        ({"samples": "few"}, DataError, "1 of 3 samples exist"),
        ({"extractor": "nothing.pt"}, ConfigError, r"extractor nothing\.pt: no such file"),
        ({"extractor": "few.npz"}, ConfigError, r"few\.npz: no TorchScript archive"),
        (
            {"extractor": "pixels", "metrics": ("sfid",)},
            ConfigError,
            "--metrics sfid: extractor pixels returns no spatial features",
        ),
        (
            {"extractor": "pixels", "metrics": ("is",)},
            ConfigError,
            "--metrics is: extractor pixels returns no logits",
        ),
        ({"reference": "stated.npz"}, ConfigError, r"--metrics sfid: .*stated\.npz .*mu_s"),
        (
            {"reference": "stated.npz", "metrics": ("precision",)},
            ConfigError,
            r"stated\.npz holds no images \(arr_0\)",
        ),
        ({"reference": "nan.npz"}, DataError, r"nan\.npz: mu \(float64\)"),
        ({"reference": "text.npz"}, DataError, r"text\.npz: mu \(<U1\)"),
        ({"reference": "half.npz"}, DataError, "one of mu and sigma"),
        ({"reference": "four.npz", "metrics": ("fid",)}, DataError, r"four\.npz: mu has 4 .* 9"),
        ({"reference": "few.npz"}, ConfigError, "--metrics precision: needs at least 4 .*got 3"),
        (
            {"save_reference": "x.npz", "reference": None, "metrics": ("is",)},
            ConfigError,
            "there is no --reference whose statistics",
        ),
    ],
)
def test_evaluation_finds_mistakes_before_the_first_batch(
    files: Path, tmp_path: Path, monkeypatch, values: dict, kind: type[Exception], message: str
) -> None:
    one, four = fit_gaussian(features(20, 9, 0)), fit_gaussian(features(20, 4, 0))
    for name, arrays in {
        "stated": {"mu": one.mean, "sigma": one.covariance},
        "four": {"mu": four.mean, "sigma": four.covariance},
        "nan": {"mu": one.mean * np.nan, "sigma": one.covariance},
        "text": {"mu": np.array(["a"] * 9), "sigma": one.covariance},
        "half": {"mu": one.mean},
        "few": {"arr_0": np.zeros((3, 12, 12, 3), dtype=np.uint8)},
        "objects": {"arr_0": np.array([{"a": 1}], dtype=object)},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "samples.json").write_text(json.dumps({"num": 3}))
    Image.new("RGB", (12, 12)).save(tmp_path / "few" / "img000000_class0.png")
    monkeypatch.setattr(
        "promoe_ds.evaluation.metrics.summarise",
        lambda *args, **kwargs: pytest.fail("a batch was computed"),
    )
    monkeypatch.chdir(tmp_path)
    paths = {
        name: Path(value) if name in ("reference", "save_reference", "samples") and value else value
        for name, value in values.items()
    }
    with pytest.raises(kind, match=message):
        judge(files, **paths)


def test_target_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*metrics\.json: there is no folder"):
        check_target(tmp_path / "nowhere" / "metrics.json", "--out")
    with pytest.raises(ConfigError, match=r"--save-reference .* is a folder"):
        check_target(tmp_path, "--save-reference")
    check_target(tmp_path / "metrics.json", "--out")


def test_features_that_are_not_finite_name_their_images(files: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
        "        return (x.flatten(1).float() - 199).sqrt()[:, :4]\n"
    )
    with pytest.raises(DataError, match=r"samples\.npz: extractor .* the images 0 \.\.\. 15"):
        judge(files, extractor=f"{tmp_path / 'net.py'}:Net", metrics=("fid",))


@pytest.mark.parametrize(
    ("shape", "dtype", "word"),
    [
        ((9, 3, 12, 12), "u1", "transpose"),
        ((9, 1, 12, 12), "u1", "transpose"),
        ((9, 12, 12, 4), "u1", "fourth"),
        ((9, 12, 13, 3), "u1", "12x13"),
        ((9, 12, 12, 2), "u1", "expected"),
        ((12, 12, 3), "u1", "expected"),
        ((9, 12, 12, 3), "f4", "float32"),
        ((9, 12, 12, 3), "i2", "uint8"),
        ((0, 12, 12, 3), "u1", "expected"),
        ((), "u1", "expected"),
        ((9, 6, 6, 3), "u1", "6 pixels"),
        ((9, 12, 12, 1), "u1", "1 channels"),
    ],
)
@pytest.mark.parametrize("side", ["samples", "reference"])
def test_npz_of_another_layout_is_one_sentence(
    files: Path, tmp_path: Path, side: str, shape: tuple, dtype: str, word: str
) -> None:
    np.savez(tmp_path / "x.npz", arr_0=np.zeros(shape, dtype=dtype))
    with pytest.raises(DataError, match=r"\.npz: ") as refusal:
        judge(files, **{side: tmp_path / "x.npz"}, extractor="pixels", metrics=("fid",))
    fits_itself = side == "samples" and shape in ((9, 6, 6, 3), (9, 12, 12, 1))
    assert word in str(refusal.value) or fits_itself


def test_few_images_for_their_features_are_reported(files: Path, told: list[str]) -> None:
    judge(files, metrics=("fid",))  # 61 and 47 images, 9 features
    assert not told
    judge(files, metrics=("fid",), extractor="pixels")
    found = [line.partition(": ")[2].partition(":")[0] for line in told]
    assert found == ["61 images for 432 features", "47 images for 432 features"]


def test_statistics_of_samples_give_the_distances_of_their_images(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = judge(files, save_reference=tmp_path / "reference.npz")
    extractor = load_extractor(str(files / "tiny.pt"), "cpu")
    path, images = tmp_path / "features.npz", NpzImages(files / "samples.npz")
    save_features(path, images, extractor, TEAM, batch_size=20)
    before = path.stat().st_mtime_ns
    save_features(path, images, extractor, TEAM, batch_size=20)
    assert path.stat().st_mtime_ns == before
    (tmp_path / "samples.json").write_text('{"num": 61, "labels": "balanced"}')
    given = {"samples": path, "reference": tmp_path / "reference.npz", "metrics": ("fid", "sfid")}
    report = judge(files, **given)
    expected = {name: whole["metrics"][name] for name in ("fid", "sfid")}
    # Of covariances of about 1: a small distance is the difference of large numbers.
    assert report["metrics"] == pytest.approx(expected, rel=1e-9, abs=1e-10)
    assert report["extractor"] == whole["extractor"] and report["samples"]["settings"]["num"] == 61
    assert "--labels random" in caplog.text
    shutil.copy(path, tmp_path / "of_others.npz")
    others = judge(files, **{**given, "samples": tmp_path / "of_others.npz"})
    assert others["metrics"] == report["metrics"] and others["samples"]["settings"] is None
    for values, message in (
        ({"metrics": ("fid", "is")}, "--metrics is: .*states statistics alone"),
        ({"num": 3}, "--num: .*states statistics alone"),
        ({"reference": files / "reference.npz"}, "--metrics fid: .*states no mu and sigma"),
    ):
        with pytest.raises(ConfigError, match=message):
            judge(files, **{**given, **values})
    save_features(tmp_path / "other.npz", images, load_extractor("pixels", "cpu"), TEAM, 20)
    with pytest.raises(DataError, match=r"other\.npz: .*another extractor"):
        judge(files, **{**given, "reference": tmp_path / "other.npz"})
    with np.load(path) as stated:
        other = {"extractor": np.array('{"weights": "other"}')}
        np.savez(tmp_path / "renamed.npz", **{**stated, **other})
    for samples in (path, files / "samples.npz"):
        renamed = {"samples": samples, "reference": tmp_path / "renamed.npz"}
        with pytest.raises(DataError, match=r"renamed\.npz: .*another extractor"):
            judge(files, **{**given, **renamed})
    with np.load(tmp_path / "reference.npz") as stated:
        np.savez(tmp_path / "foreign.npz", **{**stated, "extractor": np.array("inception")})
    foreign = {"reference": tmp_path / "foreign.npz"}
    assert judge(files, **{**given, **foreign})["metrics"] == report["metrics"]
    path.write_bytes(path.read_bytes()[:99])  # what cannot be read is made again
    save_features(path, images, extractor, TEAM, batch_size=20)
    assert judge(files, **given)["metrics"] == report["metrics"]
