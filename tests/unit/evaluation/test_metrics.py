"""FID, sFID, Inception Score, precision and recall against independent implementations, and through
the whole evaluation.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prdc import compute_prdc
from torch import nn

from promoe_ds.distributed.context import single_process
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.evaluation.features import load_extractor
from promoe_ds.evaluation.frechet import Gaussian, fit_gaussian, frechet_distance
from promoe_ds.evaluation.metrics import EvaluateRequest, check_target, evaluate
from promoe_ds.evaluation.precision_recall import share_in_manifold
from promoe_ds.evaluation.reference import save_statistics
from promoe_ds.evaluation.sources import FolderImages, NpzImages, npz_array
from promoe_ds.evaluation.statistics import InceptionScore, RunningGaussian

TEAM = single_process()


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, **values: Any
) -> tuple[float, float]:
    return share_in_manifold(samples, reference, TEAM, **values), share_in_manifold(
        reference, samples, TEAM, **values
    )


def features(count: int, dimension: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.standard_normal((count, dimension)) @ random.standard_normal(
        (dimension, dimension)
    ) + random.random(dimension)


def scipy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """ADM's formula with scipy's matrix root, from the features."""
    means, covariances = [x.mean(axis=0) for x in (a, b)], [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(
        ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    )


@pytest.mark.parametrize(
    ("counts", "dimension"), [((101, 57), 13), ((257, 263), 31), ((999, 1001), 7)]
)
def test_frechet_distance_equals_scipys(counts: tuple[int, int], dimension: int) -> None:
    a, b = features(counts[0], dimension, 0), features(counts[1], dimension, 1)
    assert frechet_distance(fit_gaussian(a), fit_gaussian(b)) == pytest.approx(
        scipy_frechet(a, b), rel=1e-6
    )


@pytest.mark.parametrize("count", [5, 40, 400])
def test_frechet_distance_of_a_set_to_itself_is_zero(count: int) -> None:
    # Five and forty images of 101 features: singular covariances, where a matrix root of the
    # product is not exact.
    own = fit_gaussian(features(count, 101, 2))
    assert frechet_distance(own, own) == pytest.approx(0.0, abs=1e-9 * np.trace(own.covariance))


def test_frechet_distance_of_singular_gaussians_equals_the_closed_form() -> None:
    # Diagonal covariances commute: the distance is that of the deviations.
    a, b = np.array([4.0, 0.0, 1.0]), np.array([9.0, 2.0, 0.0])
    distance = frechet_distance(
        Gaussian(np.zeros(3), np.diag(a)), Gaussian(np.array([1.0, 0.0, 2.0]), np.diag(b))
    )
    assert distance == pytest.approx(5.0 + ((a**0.5 - b**0.5) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_frechet_distance_of_what_is_not_finite_is_no_figure(broken: float) -> None:
    own = fit_gaussian(features(40, 5, 2))
    bad = Gaussian(own.mean.copy(), own.covariance.copy())
    bad.covariance[2, 2] = broken
    assert np.isnan(frechet_distance(own, bad)) and np.isnan(frechet_distance(bad, own))
    running = RunningGaussian(
        3, 5
    )  # as the evaluation while training sums a diverged model's features up
    running.add(0, np.full((3, 5), broken))
    assert np.isnan(frechet_distance(running.result(TEAM), own))


def test_running_gaussian_in_uneven_batches_equals_numpys_far_from_zero() -> None:
    values = features(203, 11, 3) + 1e6
    running = RunningGaussian(203, 11)
    for part in np.split(values, [1, 2, 2, 60, 199]):
        running.add(0, part)
    found = running.result(TEAM)
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-12)
    # 1e6 away, sums of squares in fp64 would keep four digits.
    np.testing.assert_allclose(
        found.covariance, np.cov(values - 1e6, rowvar=False), rtol=1e-7, atol=1e-7
    )


def scipy_inception_score(probabilities: np.ndarray, split: int) -> float:
    scores = []
    for start in range(0, len(probabilities), split):
        part = probabilities[start : start + split]
        scores.append(
            np.exp(
                scipy.special.rel_entr(part, part.mean(axis=0, keepdims=True)).sum(axis=1).mean()
            )
        )
    return float(np.mean(scores))


@pytest.mark.parametrize("count", [17, 40, 41])
def test_inception_score_over_splits_equals_scipys(count: int, monkeypatch) -> None:
    monkeypatch.setattr(InceptionScore, "SPLIT", 20)
    probabilities = scipy.special.softmax(features(count, 9, 4), axis=1)
    probabilities[3] = np.eye(9)[2]  # a network that is certain: 0 log 0
    score = InceptionScore(count, 9)
    for start in range(0, count, 7):
        score.add(start, probabilities[start : start + 7])
    assert score.result(TEAM) == pytest.approx(scipy_inception_score(probabilities, 20), rel=1e-6)


@pytest.mark.parametrize(
    ("counts", "dimension", "neighbours"), [((101, 57), 13, 3), ((33, 77), 5, 1), ((64, 65), 9, 2)]
)
def test_precision_recall_equal_prdcs(
    counts: tuple[int, int], dimension: int, neighbours: int, monkeypatch
) -> None:
    monkeypatch.setattr(
        "promoe_ds.evaluation.precision_recall._BLOCK_VALUES", 700
    )  # several blocks
    reference, samples = (
        features(counts[0], dimension, 5),
        features(counts[1], dimension, 5) * 0.8 + 0.5,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        expected = compute_prdc(reference, samples, nearest_k=neighbours)
    found = precision_recall(reference, samples, neighbours=neighbours)
    assert found == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
    assert 0 < found[0] < 1 and 0 < found[1] < 1


def test_precision_recall_of_a_set_to_itself_are_one_and_far_away_zero() -> None:
    values = features(50, 4, 6)
    assert precision_recall(values, values) == (1.0, 1.0)
    assert precision_recall(values, values + 1e3) == (0.0, 0.0)


# The whole evaluation, with a small network in place of Inception.


class TinyNetwork(nn.Module):
    """Pooled features, a map of nine channels, and logits, of images of any size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 9, 3, stride=2), nn.Linear(9, 4)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        maps = torch.relu(self.conv(images.float() / 255))
        pool = maps.mean(dim=(2, 3))
        return pool, maps, self.head(pool) * 20


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    torch.jit.script(TinyNetwork()).save(str(folder / "tiny.pt"))
    (folder / "tiny.py").write_text(
        "from tests.unit.evaluation.test_metrics import TinyNetwork\nnothing = 3\n"
    )
    random = np.random.default_rng(0)
    np.savez(folder / "samples.npz", arr_0=random.integers(0, 200, (61, 12, 12, 3), dtype=np.uint8))
    np.savez(
        folder / "reference.npz", arr_0=random.integers(30, 256, (47, 12, 12, 3), dtype=np.uint8)
    )
    return folder


def request(files: Path, **values: Any) -> EvaluateRequest:
    return replace(
        EvaluateRequest(
            samples=files / "samples.npz",
            reference=files / "reference.npz",
            extractor=str(files / "tiny.pt"),
            batch_size=16,
        ),
        **values,
    )


def test_evaluation_figures_equal_their_definitions(files: Path) -> None:
    report = evaluate(request(files), TEAM)
    network, outputs = TinyNetwork(), []
    for name in ("samples", "reference"):
        images = torch.from_numpy(np.load(files / f"{name}.npz")["arr_0"]).permute(0, 3, 1, 2)
        with torch.no_grad():
            pool, maps, logits = network(images)
        outputs.append(
            (
                pool.numpy().astype(np.float64),
                maps.permute(0, 2, 3, 1)[..., :7].flatten(1).numpy().astype(np.float64),
                logits.double().softmax(dim=1).numpy(),
            )
        )
    (pool, spatial, probabilities), (reference_pool, reference_spatial, _) = outputs
    with contextlib.redirect_stdout(io.StringIO()):
        manifold = compute_prdc(reference_pool, pool, nearest_k=3)
    assert report["metrics"]["fid"] == pytest.approx(
        scipy_frechet(pool, reference_pool), rel=1e-4
    )  # fp32 features
    # 175 features of 61 images: singular, hence the norm of the product of roots instead of scipy's
    # root.
    assert report["metrics"]["sfid"] == pytest.approx(
        frechet_distance(fit_gaussian(spatial), fit_gaussian(reference_spatial)), rel=1e-4
    )
    assert report["metrics"]["is"] == pytest.approx(
        scipy_inception_score(probabilities, 5000), rel=1e-4
    )
    assert report["metrics"]["precision"] == pytest.approx(manifold["precision"])
    assert report["metrics"]["recall"] == pytest.approx(manifold["recall"])
    assert (report["samples"]["count"], report["reference"]["images"]) == (61, 47)
    assert json.loads(json.dumps(report)) == report


def test_evaluation_against_itself_is_perfect(files: Path) -> None:
    metrics = evaluate(request(files, reference=files / "samples.npz"), TEAM)["metrics"]
    assert metrics["fid"] == pytest.approx(0.0, abs=1e-9) and metrics["sfid"] == pytest.approx(
        0.0, abs=1e-9
    )
    assert metrics["precision"] == metrics["recall"] == 1.0


def test_evaluation_of_a_folder_a_compressed_and_a_stored_npz_agree(
    files: Path, tmp_path: Path
) -> None:
    images = np.load(files / "samples.npz")["arr_0"]
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=images)
    (tmp_path / "png").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "png" / f"img{index:06d}_class0.png")
    expected = evaluate(request(files), TEAM)["metrics"]
    for path in ("compressed.npz", "png"):
        assert evaluate(request(files, samples=tmp_path / path), TEAM)["metrics"] == expected
    assert isinstance(npz_array(files / "samples.npz", "arr_0"), np.memmap)


def test_evaluation_states_what_makes_figures_comparable(files: Path, tmp_path: Path) -> None:
    images = np.load(files / "samples.npz")["arr_0"]
    (tmp_path / "png").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "png" / f"img{index:06d}_class0.png")
    npz, folder = (
        evaluate(request(files, samples=path, reference=tmp_path / "png", batch_size=size), TEAM)
        for path, size in ((files / "samples.npz", 16), (tmp_path / "png", 7))
    )
    assert npz["samples"]["pixels"] == folder["samples"]["pixels"] == npz["reference"]["pixels"]
    images[60, 3, 3, 0] ^= 1
    np.savez(tmp_path / "other.npz", arr_0=images)
    assert (
        evaluate(request(files, samples=tmp_path / "other.npz"), TEAM)["samples"]["pixels"]
        != npz["samples"]["pixels"]
    )
    protocol = npz["protocol"]
    assert (protocol["device"], protocol["batch_size"], protocol["tf32"]) == ("cpu", 16, False)
    assert npz["extractor"]["weights"].startswith("xxh3_128:")


def test_evaluation_takes_stated_statistics_as_adm_does(files: Path, tmp_path: Path) -> None:
    whole = evaluate(request(files, save_reference=tmp_path / "stated.npz"), TEAM)["metrics"]
    stated = evaluate(
        request(files, reference=tmp_path / "stated.npz", metrics=("fid", "sfid")), TEAM
    )
    assert stated["metrics"] == {"fid": whole["fid"], "sfid": whole["sfid"]}
    assert stated["reference"]["statistics"] == "as stated"
    arrays = dict(np.load(tmp_path / "stated.npz"))
    np.savez(
        tmp_path / "both.npz",
        **{**arrays, "mu": arrays["mu"] + 1.0, "arr_0": np.load(files / "reference.npz")["arr_0"]},
    )
    both = evaluate(request(files, reference=tmp_path / "both.npz"), TEAM)["metrics"]
    assert both["fid"] > whole["fid"] + 1 and both["precision"] == whole["precision"]


def test_evaluation_crops_reference_images_of_another_size(files: Path, tmp_path: Path) -> None:
    (tmp_path / "n01").mkdir()
    for index in range(5):
        Image.fromarray(np.full((40, 30, 3), 10 * index, dtype=np.uint8)).save(
            tmp_path / "n01" / f"{index}.jpg"
        )
    report = evaluate(request(files, reference=tmp_path, metrics=("fid",)), TEAM)
    assert report["reference"]["images"] == 5 and report["metrics"]["fid"] > 0


# What does not fit.


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (
            {"metrics": ("fid", "kid")},
            ConfigError,
            "--metrics fid,kid: choose from fid,sfid,is,precision,recall",
        ),
        (
            {"reference": None},
            ConfigError,
            "--reference is needed for fid, sfid, precision, recall",
        ),
        ({"reference": Path("nowhere")}, DataError, "nowhere: no such file or folder"),
        ({"samples": Path("nowhere.npz")}, DataError, r"nowhere\.npz: not a readable npz"),
        (
            {"extractor": "nothing.pt"},
            ConfigError,
            r"extractor nothing\.pt: no such file, and neither inception nor pixels",
        ),
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
    ],
)
def test_evaluation_that_cannot_be_is_refused(
    files: Path, values: dict, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        evaluate(request(files, **values), TEAM)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (
            {"reference": "stated.npz"},
            ConfigError,
            r"--metrics sfid: .*stated\.npz states mu and sigma, but neither mu_s nor sigma_s",
        ),
        (
            {"reference": "stated.npz", "metrics": ("precision",)},
            ConfigError,
            r"stated\.npz holds no images \(arr_0\)",
        ),
        (
            {"reference": "nan.npz"},
            DataError,
            r"nan\.npz: mu \(float64\) is not all finite numbers",
        ),
        ({"reference": "text.npz"}, DataError, r"text\.npz: mu \(<U1\) is not all finite numbers"),
        (
            {"reference": "few.npz"},
            ConfigError,
            "--metrics precision: needs at least 4 images on both sides, got 3",
        ),
        (
            {"extractor": "pixels", "metrics": ("sfid",)},
            ConfigError,
            "extractor pixels returns no spatial features",
        ),
        (
            {"save_reference": "nowhere/x.npz"},
            ConfigError,
            r"--save-reference .*x\.npz: there is no folder .*nowhere: make it first",
        ),
        ({"save_reference": "."}, ConfigError, "is a folder: name a file in it"),
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
    one = fit_gaussian(features(20, 9, 0))
    save_statistics(tmp_path / "stated.npz", {("pool", RunningGaussian): one})
    save_statistics(
        tmp_path / "nan.npz",
        {("pool", RunningGaussian): Gaussian(one.mean * np.nan, one.covariance)},
    )
    np.savez(tmp_path / "text.npz", mu=np.array(["a"] * 9), sigma=one.covariance)
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 12, 12, 3), dtype=np.uint8))
    monkeypatch.setattr(
        "promoe_ds.evaluation.metrics.summarise",
        lambda *args, **kwargs: pytest.fail("a batch was computed"),
    )
    paths = {
        name: tmp_path / value if name in ("reference", "save_reference") and value else value
        for name, value in values.items()
    }
    with pytest.raises(kind, match=message):
        evaluate(request(files, **paths), TEAM)


def test_target_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*metrics\.json: there is no folder"):
        check_target(tmp_path / "nowhere" / "metrics.json", "--out")
    check_target(tmp_path / "metrics.json", "--out")


def test_features_that_are_not_finite_name_their_images(files: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
        "        return (x.flatten(1).float() - 199).sqrt()[:, :4]\n"
    )
    with pytest.raises(
        DataError,
        match=r"samples\.npz: extractor .* not finite for the images 0 \.\.\. 15: no figure",
    ):
        evaluate(request(files, extractor=f"{tmp_path / 'net.py'}:Net", metrics=("fid",)), TEAM)


def test_folder_with_grey_and_coloured_files_gives_the_samples_channels(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 7).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (7, 7, 9)).save(tmp_path / "b.png")
    assert FolderImages(tmp_path, 8, 3).read(range(2))[:, 0, 0].tolist() == [[7, 7, 7], [7, 7, 9]]
    with pytest.raises(DataError, match=r"b\.png: is in colour, expected grey"):
        FolderImages(tmp_path).read(range(2))
    assert FolderImages(tmp_path, 4, 1).read(range(1)).shape == (1, 4, 4, 1)


def test_folder_whose_first_image_is_not_square_names_it(tmp_path: Path) -> None:
    Image.new("L", (8, 9)).save(tmp_path / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"a\.png: 8 x 9 pixels"):
        FolderImages(tmp_path)
    assert FolderImages(tmp_path, 8, 1).read(range(2)).shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    ("shape", "dtype", "word"),
    [
        ((9, 3, 12, 12), "u1", "transpose"),
        ((9, 1, 12, 12), "u1", "transpose"),
        ((9, 12, 12, 4), "u1", "fourth"),
        ((9, 12, 13, 3), "u1", "expected"),
        ((9, 12, 12, 2), "u1", "expected"),
        ((12, 12, 3), "u1", "expected"),
        ((9, 12, 12, 3), "f4", "uint8"),
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
        evaluate(
            request(files, **{side: tmp_path / "x.npz"}, extractor="pixels", metrics=("fid",)), TEAM
        )
    assert word in str(refusal.value) or (
        side == "samples" and len(shape) == 4 and shape[1] in (6, 12)
    )


@settings(max_examples=60)
@given(
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=5),
    st.floats(0.3, 1.0),
)
def test_any_damage_of_an_npz_gives_its_shape_or_names_it(
    compressed: bool, changes: list, kept: float
) -> None:
    out = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(
        out, arr_0=np.arange(192, dtype=np.uint8).reshape(4, 4, 4, 3)
    )
    data = bytearray(out.getvalue())
    for place, value in changes:
        data[int(place * len(data))] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npz"
        path.write_bytes(data[: int(len(data) * kept) + 1])
        try:
            images = NpzImages(path)
            assert images.read(range(len(images))).shape[1:] in (
                (images.height, images.height, 3),
                (images.height,) * 2 + (1,),
            )
        except DataError as error:
            assert "x.npz" in str(error)


def test_few_images_for_their_features_are_said(files: Path, monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        "promoe_ds.evaluation.frechet._LOG.warning",
        lambda message, *values: told.append(message % values),
    )
    evaluate(request(files, metrics=("fid",)), TEAM)  # 61 and 47 images, 9 features
    assert not told
    evaluate(request(files, metrics=("fid",), extractor="pixels"), TEAM)
    assert ["61 images for 432 features" in told[0], "47 images for 432 features" in told[1]] == [
        True,
        True,
    ]


def test_images_that_a_reference_states_beside_its_statistics_may_have_another_size(
    files: Path, tmp_path: Path
) -> None:
    np.savez(
        tmp_path / "both.npz",
        mu=np.zeros(9),
        sigma=np.eye(9),
        arr_0=np.zeros((9, 6, 6, 3), np.uint8),
    )
    assert (
        evaluate(request(files, reference=tmp_path / "both.npz", metrics=("fid",)), TEAM)[
            "metrics"
        ]["fid"]
        > 0
    )
    with pytest.raises(DataError, match="6 pixels"):
        evaluate(request(files, reference=tmp_path / "both.npz", metrics=("precision",)), TEAM)
    np.savez(tmp_path / "half.npz", mu=np.zeros(9))
    with pytest.raises(DataError, match="one of mu and sigma"):
        evaluate(request(files, reference=tmp_path / "half.npz", metrics=("fid",)), TEAM)


def half_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """ADM's formula in half precision, one value after another; sums of products in single
    precision, as GPUs have them.
    """
    a, b = a.astype(np.float16), b.astype(np.float16)
    norms = [np.square(x).astype(np.float32).sum(axis=1).astype(np.float16) for x in (a, b)]
    products = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float16)
    return np.maximum(
        norms[0][:, None] - np.float16(2) * products + norms[1][None], np.float16(0)
    ).astype(np.float32)


def test_half_precision_manifold_equals_adms_and_differs_from_fp64(files: Path) -> None:
    random = np.random.default_rng(0)
    reference, samples = (
        (np.abs(random.standard_normal((300, 512))) + 1).astype(np.float32) * scale
        for scale in (0.5, 0.49)
    )
    radii = [np.partition(half_distances(x, x), 3, axis=1)[:, 3] for x in (reference, samples)]
    between = half_distances(samples, reference)
    expected = (
        (between <= radii[0]).any(axis=1).mean(),
        (between.T <= radii[1]).any(axis=1).mean(),
    )
    found = precision_recall(reference, samples, half=True)
    assert found == pytest.approx(expected, abs=1e-12)
    assert found != precision_recall(reference, samples)
    # Where half precision overflows, ADM computes in single precision.
    assert precision_recall(reference * 1e3, samples * 1e3, half=True) == precision_recall(
        reference, samples
    )
    report = evaluate(request(files, half_precision_manifold=True), TEAM)
    assert (
        report["protocol"]["distances"] == "float16 where finite"
        and 0 <= report["metrics"]["precision"] <= 1
    )


def test_image_made_to_exhaust_the_memory_is_named(tmp_path: Path, monkeypatch) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"bomb\.png: not a readable image"):
        FolderImages(tmp_path, 8, 3)


def test_evaluation_of_files_that_do_not_fit_names_them(files: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tiny\.py:nothing: nothing there is no class or function"
    ):
        load_extractor(f"{files / 'tiny.py'}:nothing", "cpu")
    with pytest.raises(ConfigError, match=r"samples\.npz: no TorchScript archive"):
        load_extractor(str(files / "samples.npz"), "cpu")
    save_statistics(
        tmp_path / "other.npz", {("pool", RunningGaussian): fit_gaussian(features(9, 4, 0))}
    )
    with pytest.raises(DataError, match=r"other\.npz: mu has 4 features, the extractor 9"):
        evaluate(request(files, reference=tmp_path / "other.npz", metrics=("fid",)), TEAM)
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((3, 4, 4, 3)))
    with pytest.raises(
        DataError, match=r"floats\.npz: float64 \(3, 4, 4, 3\), expected uint8 images"
    ):
        evaluate(request(files, samples=tmp_path / "floats.npz"), TEAM)
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"objects\.npz: not a readable npz .*Python objects"):
        evaluate(request(files, samples=tmp_path / "objects.npz"), TEAM)


def test_evaluation_of_samples_not_all_drawn_is_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(json.dumps({"num": 3}))
    Image.new("RGB", (12, 12)).save(tmp_path / "img000000_class0.png")
    with pytest.raises(DataError, match="1 of 3 samples exist"):
        evaluate(request(files, samples=tmp_path), TEAM)
