"""Sampling prompts: images that depend on their own prompt, files safe for any text, and what is
refused.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from promoe_ds.cli.sample import main
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.evaluation.grids import captioned_grid
from promoe_ds.evaluation.images import slug
from promoe_ds.evaluation.sample_job import draw_samples
from promoe_ds.evaluation.sample_request import SampleRequest, read_prompts

from ..data.text_encoders import save_encoder
from .made import make_export, text_sections

APPLE, HEART = "a red apple", "purple heart"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    return make_export(folder, sampling={"cfg_scale": 2.0}, **text_sections(folder))


def draw(export: Path, out: Path, **request: Any) -> np.ndarray:
    """Return the images of one request, uint8."""
    values = {"prompts": (APPLE, HEART), "steps": 3, "exact": True, **request}
    draw_samples(SampleRequest(model=export, out=out, **values))
    with np.load(out / "samples.npz") as data:
        return data["arr_0"]


def test_image_is_a_function_of_its_seed_index_and_prompt(export: Path, tmp_path: Path) -> None:
    both = draw(export, tmp_path / "both", num=4)
    apples = draw(export, tmp_path / "apples", prompts=(APPLE,), num=3)
    assert np.array_equal(both[[0, 2]], apples[[0, 2]])
    # The noise of image 1 is its own; only the prompt differs.
    assert not np.array_equal(both[1], apples[1])
    batched = draw(export, tmp_path / "batched", num=4, exact=False, batch_size=3)
    assert np.abs(batched.astype(int) - both).max() <= 1
    assert not np.array_equal(draw(export, tmp_path / "seed", num=4, seed=1), both)


def test_null_prompt_negative_prompt_and_interval_each_change_what_is_drawn(
    export: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = {
        name: draw(export, tmp_path / name, prompts=(APPLE,), **given)
        for name, given in {
            "null": {},
            "blank": {"negative_prompt": " "},
            "negative": {"negative_prompt": HEART},
            "interval": {"cfg_interval": (0.5, 1.0)},
            "alone": {"cfg_scale": 1.0},
        }.items()
    }
    # A blank negative prompt is the empty text, which is what guidance leads away from anyway.
    assert np.array_equal(drawn.pop("blank"), drawn["null"])
    assert len({images.tobytes() for images in drawn.values()}) == 4
    assert "--negative-prompt: 1 of 1 blank: the null condition" in caplog.text
    caplog.clear()
    # What is guided away from itself is drawn as it is.
    empty = draw(export, tmp_path / "empty", prompts=("",))
    assert np.array_equal(empty, draw(export, tmp_path / "no", prompts=("\t",), cfg_scale=1.0))
    assert caplog.text.count("--prompt: 1 of 1 blank") == 2


def test_prompts_are_in_the_record_beside_and_inside_the_pictures(
    export: Path, tmp_path: Path
) -> None:
    prompts, out = ("purple/../heart", "心 \U0001f49c\n", APPLE), tmp_path / "out"
    written = draw_samples(
        SampleRequest(model=export, out=out, prompts=prompts, num=4, steps=2, grid=True)
    )
    names = ["img000000_purple-heart.png", "img000001_prompt.png", "img000002_a-red-apple.png"]
    names.append("img000003_purple-heart.png")
    shown = [*prompts, prompts[0]]
    assert json.loads((out / "prompts.json").read_text()) == dict(zip(names, shown, strict=True))
    for name, prompt in zip(names, shown, strict=True):
        assert Image.open(out / name).text["prompt"] == prompt
    record = json.loads((out / "samples.json").read_text())
    assert record["prompts"] == list(prompts) and record["text_encoder"].startswith("xxh3_128:")
    with np.load(out / "samples.npz") as data:
        assert data["labels"].tolist() == [0, 1, 2, 0]
    assert [path.name for path in written][-1] == "grid.png"


def test_sampling_of_prompts_resumes_with_the_same_and_refuses_others(
    export: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    whole = draw(export, out, num=4)
    next(out.glob("img000002*")).unlink()
    assert np.array_equal(draw(export, out, num=4), whole)
    for change, name in (
        ({"prompts": (APPLE,)}, "prompts"),
        ({"negative_prompt": HEART}, "negative_prompt"),
        ({"cfg_interval": (0.2, 0.8)}, "cfg_interval"),
    ):
        with pytest.raises(ConfigError, match=f"other settings: {name} is"):
            draw(export, out, num=4, **change)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (APPLE, "a-red-apple"),
        ("../../etc/passwd", "etc-passwd"),
        ("Crème brûlée", "creme-brulee"),
        ("CON", "con"),
        ("心", "prompt"),
        ("", "prompt"),
        ("word " * 50, "word-word-word-word-word-word-word-word"),
    ],
)
def test_names_of_files_are_safe_for_any_prompt(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


@pytest.mark.parametrize("height", [8, 4])
def test_grid_shows_each_image_above_its_caption(height: int) -> None:
    images = np.stack([np.full((height, 8, 1), value, np.uint8) for value in (40, 80, 120)])
    grid = np.asarray(captioned_grid(images, [APPLE, "", "word " * 90]))
    cell, end = 96 + 6, 6 + 12 * height
    for place, value in enumerate((40, 80, 120)):
        assert (grid[6:end, 6 + place * cell : 102 + place * cell] == value).all()
    below = grid[end:]
    inked = [(below[:, 6 + place * cell : 102 + place * cell] < 128).sum() for place in range(3)]
    assert inked[1] == 0 < inked[0] < inked[2]


def test_grid_of_narrow_images_has_captions_all_the_same() -> None:
    grid = captioned_grid(np.zeros((1, 96, 8, 1), np.uint8), [APPLE])
    assert grid.size == (8 + 2 * 6, 96 + 3 * 14 + 6)


def test_prompts_file_holds_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red apple\r\n\r\n心\u2028heart\n".encode())
    assert read_prompts(path) == (APPLE, "", "心\u2028heart")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b" \n\n", "holds no prompt"),
        (b"apple\nheart\nca\xffe\n", r"line 3 is not UTF-8 \(byte 0xff\)"),
        (None, "No such file"),
    ],
)
def test_prompts_file_that_cannot_be_read_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"--prompts .*prompts.txt: {message}"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": ()}, "--prompt: .*conditioned on text"),
        ({"prompts": (), "classes": (1,)}, "--classes: .*conditioned on text"),
        ({"prompts": ("caf\udcff",)}, r"--prompt 'caf\\udcff': is not UTF-8"),
        ({"cfg_interval": (0.8, 0.2)}, "--cfg-interval=0.8,0.2: .*two noise levels"),
        ({"cfg_interval": (0.2,)}, "--cfg-interval=0.2: .*two noise levels"),
        ({"cfg_interval": (0.2, float("nan"))}, "--cfg-interval=0.2,nan: .*two noise levels"),
        ({"cfg_interval": (0.2, 0.8), "cfg_scale": 1.0}, "--cfg-interval: has no effect .* 1:"),
        ({"negative_prompt": HEART, "cfg_scale": 1.0}, "--negative-prompt: has no effect"),
    ],
)
def test_sampling_that_a_text_model_cannot_do_is_refused(
    export: Path, tmp_path: Path, given: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(export, tmp_path / "out", **given)


@pytest.mark.parametrize(
    "given", [{"prompts": (APPLE,)}, {"negative_prompt": ""}, {"text_encoder": "t5"}]
)
def test_texts_for_a_model_of_classes_are_refused(tmp_path: Path, given: dict) -> None:
    name = "--" + next(iter(given)).replace("_", "-").removesuffix("s")
    with pytest.raises(ConfigError, match=f"{name}: .*conditioned on classes.*--classes"):
        draw(make_export(tmp_path), tmp_path / "out", **{"prompts": (), **given})


def test_encoder_of_other_weights_is_refused_and_a_copy_is_not(
    export: Path, tmp_path: Path
) -> None:
    same, other = (str(save_encoder(tmp_path / str(seed), "bert", seed)) for seed in (0, 1))
    with pytest.raises(DataError, match=f"{other} has the weights xxh3_128:"):
        draw(export, tmp_path / "out", text_encoder=other)
    by_name = draw(export, tmp_path / "own")
    assert np.array_equal(draw(export, tmp_path / "copy", text_encoder=same), by_name)


def test_command_line_takes_prompts_given_and_from_a_file(
    export: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text(f"{APPLE}\n{HEART}\n", encoding="utf-8")
    common = ["--model", str(export), "--steps", "2", "--cfg-interval", "0.2,0.8", "--grid"]
    ways = {
        "given": ["--prompt", APPLE, "--prompt", HEART],
        "file": ["--prompts", str(tmp_path / "prompts.txt")],
    }
    with caplog.at_level(logging.INFO):
        for name, options in ways.items():
            main([*common, *options, "--out", str(tmp_path / name)])
    given, file = ((tmp_path / name / "samples.npz").read_bytes() for name in ways)
    assert given == file
    with pytest.raises(SystemExit):
        main([*common, *ways["given"], *ways["file"], "--out", str(tmp_path / "both")])
