"""Listing of trees: classes, links, leftovers, splits, names; the same for training and
evaluation.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promoe_ds.data.listing import FileList, image_suffixes
from promoe_ds.data.reading import shown
from promoe_ds.data.trees import scan_tree
from promoe_ds.errors import DataError
from promoe_ds.evaluation.sources import FolderImages

from .made import picture, save_images

PNG = picture("L", size=(2, 2))
SIX = {f"{name}/{number}.png": "" for name in ("cat", "dog") for number in range(3)}
NAMES = sorted(SIX)


def plant(root: Path, entries: dict[str, str]) -> Path:
    """Make files, and links where a target is given, below `root`."""
    for name, target in entries.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        else:
            path.write_bytes(PNG)
    return root


def test_tree_of_any_depth_is_sorted_and_labelled_by_first_folder(tmp_path: Path) -> None:
    tree = scan_tree(save_images(tmp_path / "images", per_class=2))
    assert tree.names == [
        "n01/deep/n01_1.png",
        "n01/n01_0.png",
        "n02/deep/n02_1.png",
        "n02/n02_0.png",
        "n03/deep/n03_1.png",
        "n03/n03_0.png",
    ]
    assert tree.labels.tolist() == [0, 0, 1, 1, 2, 2] and tree.classes == ("n01", "n02", "n03")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"cat/up": ".."}, "cat/up"),
        ({"cat/self": "."}, "cat/self"),
        ({"loop": "."}, "loop"),
        ({"above": "../.."}, "above"),
        ({"kitty": "cat"}, "kitty"),
        ({"cat/again.png": "0.png"}, "cat/again.png"),
        ({"cat/dog.png": "../dog/1.png"}, "cat/dog.png"),
        ({"cat/nothing": "/nowhere"}, "cat/nothing"),
        ({"cat/round": "round"}, "cat/round"),
        *(
            ({f"{name}/0.png": ""}, name)
            for name in ("__MACOSX", "@eaDir", ".git", "lost+found", "$RECYCLE.BIN", "#recycle")
        ),
        ({"cat/.ipynb_checkpoints/0-checkpoint.png": ""}, ".ipynb_checkpoints"),
        ({"cat/._0.png": ""}, "._*"),
        ({".DS_Store": ""}, ".DS_Store"),
        ({"THUMBS.DB": ""}, "THUMBS.DB"),
        ({"cat/x.heic": "", "cat/y.HEIC": ""}, "2 .heic"),
        ({"README": ""}, "1 without extension"),
    ],
)
def test_tree_lists_each_real_image_once_and_names_the_rest(
    tmp_path: Path, told: list[str], more: dict, named: str
) -> None:
    root = plant(tmp_path / "tree", {**SIX, **more})
    tree = scan_tree(root)
    assert (
        tree.names == NAMES
        and tree.classes == ("cat", "dog")
        and tree.labels.tolist() == [0] * 3 + [1] * 3
    )
    assert len(told) == 1 and named in told[0]
    assert [str(file.relative_to(root)) for file in FolderImages(root)._files] == NAMES


def test_tree_links_to_other_places_are_followed_once(tmp_path: Path, told: list[str]) -> None:
    plant(tmp_path, {"store/0.png": "", "store/deep/1.png": "", "file.png": ""})
    root = plant(
        tmp_path / "tree",
        {
            **SIX,
            ".hidden/9.png": "",
            "ant": "../store",
            "bee": "../store",
            "cow": ".hidden",
            "dog/x.png": "../../file.png",
            "dog/y.png": "../../file.png",
            "dog/gone.png": "/nowhere.png",
        },
    )
    (tmp_path / "store" / "back").symlink_to(root)
    tree = scan_tree(root)
    assert tree.names == sorted(
        [*NAMES, "ant/0.png", "ant/deep/1.png", "cow/9.png", "dog/gone.png", "dog/x.png"]
    )
    assert (
        tree.classes == ("ant", "cat", "cow", "dog") and "bee" in told[0] and "dog/x.png" in told[0]
    )


def test_tree_pipes_and_sockets_named_as_images_are_left_out(
    tmp_path: Path, told: list[str], monkeypatch
) -> None:
    root = plant(tmp_path / "tree", {**SIX, "cat/null.png": "/dev/null"})
    os.mkfifo(root / "cat" / "pipe.png")
    monkeypatch.chdir(root)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("cat/socket.png")
        assert scan_tree(root).names == NAMES
    assert "3 pipes and devices" in told[0]


def test_tree_takes_every_format_that_pillow_decodes_by_any_case(tmp_path: Path) -> None:
    names = [
        f"a/{number}{suffix}"
        for number, suffix in enumerate(
            (
                ".JPEG",
                ".jpg",
                ".Jfif",
                ".TIF",
                ".tiff",
                ".gif",
                ".avif",
                ".bmp",
                ".webp",
                ".jp2",
                ".ppm",
                ".tga",
                ".mpo",
            )
        )
    ]
    assert scan_tree(plant(tmp_path, dict.fromkeys(names, ""))).names == sorted(names)
    assert not image_suffixes() & {".eps", ".ps", ".wmf", ".h5", ".mpg", ".pdf"}


@pytest.mark.parametrize(
    "names",
    [
        ("Train/cat", "Train/dog", "Val/cat"),
        ("training/cat", "validation/cat"),
        ("TRAIN/cat",),
        ("train2017/a", "val2017/a"),
        ("train_set/cat", "test-set/cat"),
        ("Test/cat", "valid/cat"),
        ("train/cat", "Train/cat"),
        ("train/cat", "devkit/cat"),
        ("imagenet/cat", "imagenet/dog"),
        ("imagenet/train/cat",),
        ("train/imagenet/cat", "train/imagenet/dog"),
        ("train/Train/cat", "train/Val/cat"),
    ],
)
def test_tree_of_splits_or_a_wrapper_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = plant(tmp_path / "tree", {f"{name}/0.png": "" for name in names})
    with pytest.raises(DataError, match=str(root)):
        scan_tree(root)


@pytest.mark.parametrize(
    "classes", [("test", "cat"), ("valid", "invalid"), ("train_station", "harbour"), ("only",)]
)
def test_tree_of_classes_that_sound_like_splits_is_taken(
    tmp_path: Path, classes: tuple[str, ...]
) -> None:
    assert scan_tree(plant(tmp_path, {f"{name}/0.png": "" for name in classes})).classes == tuple(
        sorted(classes)
    )


def test_tree_above_train_and_val_gives_the_split(tmp_path: Path) -> None:
    save_images(tmp_path / "train", per_class=3)
    save_images(tmp_path / "val", per_class=1)
    plant(tmp_path, {"__MACOSX/train/0.png": ""})
    assert len(scan_tree(tmp_path)) == 9 and len(scan_tree(tmp_path, split="val")) == 3
    with pytest.raises(DataError, match="holds train, val but no test"):
        scan_tree(tmp_path, split="test")
    with pytest.raises(DataError, match="look like splits"):
        FolderImages(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "no such folder"),
        ({"cat/a.txt": ""}, r"no readable image below it: found 1 \.txt"),
        ({**SIX, "stray.png": ""}, r"stray\.png is beside the class folders"),
        ({**SIX, "eel": "/nowhere"}, "eel: is a link to nothing"),
        ({**SIX, "ant/a.heic": ""}, "1 of 3 class folders hold no readable image: ant"),
    ],
)
def test_tree_whose_labels_would_shift_is_refused(
    tmp_path: Path, entries: dict, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        scan_tree(plant(tmp_path / "tree", entries))


def test_tree_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch) -> None:
    root, scandir = plant(tmp_path / "tree", SIX), os.scandir

    def forbidden(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(DataError, match=r"dog: cannot be listed \(Permission denied\)"):
        FileList(root)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("2", "10"), ("label 0 is 10, not 2",)),
        (("class2", "class10", "x"), ("label 0 is class10",)),
        (("Cat", "cat"), ("Cat, cat",)),
        (("02", "10"), ()),
        (("n01", "n02"), ()),
    ],
)
def test_tree_in_an_order_that_surprises_is_said_by_rank_0(
    tmp_path: Path, told: list[str], monkeypatch, classes: tuple, words: tuple
) -> None:
    root = plant(tmp_path, {f"{name}/0.png": "" for name in classes})
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert scan_tree(root).classes == tuple(sorted(classes)) and (rank == "0" or not told)
    assert len(told) == len(words) and all(
        word in line for word, line in zip(words, told, strict=True)
    )


def test_names_with_line_breaks_and_foreign_bytes_are_shown_on_one_line(tmp_path: Path) -> None:
    names = [os.fsdecode(name) for name in (b"a/\xff.png", b"a/b\nc.png", "a/é.png".encode())]
    root = plant(tmp_path, dict.fromkeys(names, ""))
    assert sorted(scan_tree(root).names) == sorted(names)
    assert [shown(name) for name in names] == ["a/\\udcff.png", "a/b\\nc.png", "a/é.png"]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),
            st.sampled_from(("folder", "file", "link", "out", "leftover", "file link")),
            st.integers(0, 9),
        ),
        max_size=14,
    )
)
def test_any_tree_lists_each_reachable_file_once(entries: list[tuple[int, str, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        base = Path(name).resolve()
        root = plant(base / "tree", {"a/x.png": "", "b/x.png": ""})
        plant(base / "out", {"o.png": "", "p/q.png": ""})
        folders, files = (
            [root / "a", root / "b"],
            [root / "a/x.png", root / "b/x.png", base / "out/o.png"],
        )
        for number, (place, kind, target) in enumerate(entries):
            path = folders[place % len(folders)] / f"{number}"
            if kind == "folder":
                path.mkdir()
                folders.append(path)
            elif kind == "link":
                path.symlink_to([root, base, *folders][target % (len(folders) + 2)])
            elif kind == "out":
                path.symlink_to(base / "out" / ("p" if target % 2 else ""))
            elif kind == "file link":
                path.with_suffix(".png").symlink_to(files[target % len(files)])
            else:
                path = (
                    path.with_suffix(".png")
                    if kind == "file"
                    else path.with_name(f"._{number}.png")
                )
                path.write_bytes(PNG)
                files += [path] if kind == "file" else []
        tree = scan_tree(root)
        real = [(root / name).resolve() for name in tree.names]
        assert len(set(real)) == len(real) and tree.names == sorted(tree.names)
        inside = {file for file in files if file.is_relative_to(root)}
        assert inside <= set(real) <= {*inside, base / "out/o.png", base / "out/p/q.png"}
        assert all(
            (root / name).parent.resolve() == file.parent
            for name, file in zip(tree.names, real, strict=True)
            if file in inside
        )
        assert [tree.classes[label] for label in tree.labels] == [
            name.partition("/")[0] for name in tree.names
        ]
        assert np.array_equal(
            sorted(FolderImages(root)._files), sorted(root / name for name in tree.names)
        )
