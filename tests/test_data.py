"""Images against transformers' image processor, data sets and splits against what a user's files say."""

import csv
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image as their_load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data import (
    Sample,
    augment,
    load_dataset,
    load_image,
    mirror_text,
    prefetch,
    preprocess,
    resize_and_crop,
    split_dataset,
    to_rgb,
)
from errors import UserError

LARYNX = Path(__file__).parents[2] / "shared" / "larynx"
needs_larynx = pytest.mark.skipif(not LARYNX.is_dir(), reason="the larynx images are not at hand")
UINT8 = {"do_rescale": False, "do_normalize": False}


def theirs(image, size=224, **options):
    """transformers' processor: (3, size, size)."""
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    return CLIPImageProcessorPil(**sizes)(image, return_tensors="pt", **options)["pixel_values"][0]


def noise(width, height, bands=3, seed=0):
    shape = (height, width, bands) if bands > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def assert_same_pixels(ours, image, size=224):
    expected = theirs(image, size, **UINT8).permute(1, 2, 0).numpy()
    assert ours.dtype == expected.dtype == np.uint8
    np.testing.assert_array_equal(ours, expected)


def user_error(function, *arguments, **options):
    """Calls, expects a UserError of one line, returns the line."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    line = str(error.value)
    assert line
    assert len(line.splitlines()) == 1
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Pixels

SIZES = [(640, 480), (480, 640), (320, 320), (224, 224), (225, 224), (224, 227), (301, 200), (1, 1), (3, 5), (10, 300)]
SIZES += [(300, 10), (500, 223), (1000, 300)]


@pytest.mark.parametrize("size", [224, 128, 97])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pixels_are_those_of_transformers(width, height, size):
    image = noise(width, height)
    assert_same_pixels(resize_and_crop(image, size), image, size)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 160))
def test_pixels_are_those_of_transformers_for_any_size(width, height, size):
    image = noise(width, height, seed=width * 301 + height)
    if max(image.size) <= 20 * min(image.size):  # a strip would be stretched to hundreds of megabytes
        assert_same_pixels(resize_and_crop(image, size), image, size)


def in_mode(mode):
    """A noise image of this Pillow mode; of those with transparency, some of it."""
    if mode in ("L", "RGB"):
        return noise(250, 230, len(mode))
    if mode in ("LA", "PA"):
        return noise(250, 230, 4).convert("LA").convert(mode)
    if mode == "P, transparent":
        image = noise(250, 230).quantize(16)
        image.info["transparency"] = 3
        return image
    if mode in ("I", "I;16", "F"):
        grey = np.random.default_rng(0).integers(0, 300, (230, 250))
        return Image.fromarray(grey.astype({"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]))
    return noise(250, 230, 4 if mode in ("RGBA", "RGBX", "RGBa") else 3).convert(mode)


MODES = ["1", "L", "LA", "P", "P, transparent", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
MODES += ["I", "I;16", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_pixels_of_every_mode_are_those_of_transformers(mode):
    image = in_mode(mode)
    assert image.mode == mode.split(",")[0]
    assert_same_pixels(resize_and_crop(image), image)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P, transparent"])
def test_what_is_transparent_is_white(mode):
    image = in_mode(mode)
    if mode == "P, transparent":
        clear = np.asarray(image) == 3
    else:
        image.putalpha(Image.new("L", image.size, 0))
        clear = np.ones((230, 250), bool)
    rgb = np.asarray(to_rgb(image))
    assert clear.any()
    assert (rgb[clear] == 255).all()


@pytest.mark.parametrize("size", [224, 128])
def test_normalized_pixels_are_those_of_transformers(size):
    image = noise(333, 250)
    pixels = preprocess(image, size)
    assert pixels.shape == (3, size, size)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    torch.testing.assert_close(pixels, theirs(image, size), rtol=0, atol=1e-6)


@needs_larynx
def test_pixels_of_real_images_are_those_of_transformers():
    files = sorted(LARYNX.rglob("*.jpg"))
    assert len(files) == 139
    for file in files[::9]:
        image = load_image(file)
        assert_same_pixels(resize_and_crop(image), their_load_image(str(file)))
        torch.testing.assert_close(preprocess(image), theirs(their_load_image(str(file))), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Image files


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, orientation, suffix):
    exif, file = Image.Exif(), tmp_path / f"image.{suffix}"
    exif[0x0112] = orientation
    stored = noise(60, 40)
    stored.save(file, exif=exif)
    image = load_image(file)
    assert image.size == ((60, 40) if orientation < 5 else (40, 60))
    assert_same_pixels(resize_and_crop(image, 32), their_load_image(str(file)), 32)
    if suffix == "png" and orientation == 6:  # the stored picture's top is the right-hand side: turn it clockwise
        np.testing.assert_array_equal(np.asarray(image), np.rot90(np.asarray(stored), k=-1))


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tif", "jpg", "webp"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_image_files_of_every_format_are_read_as_by_transformers(tmp_path, mode, suffix):
    image = in_mode(mode)
    image = image.convert("RGB") if suffix in ("jpg", "webp") and mode == "P" else image
    image.save(tmp_path / f"image.{suffix}")
    file = str(tmp_path / f"image.{suffix}")
    assert_same_pixels(resize_and_crop(load_image(file), 64), their_load_image(file), 64)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_contrast(tmp_path, suffix):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{suffix}")
    image = load_image(tmp_path / f"ramp.{suffix}")
    np.testing.assert_array_equal(np.asarray(image), ramp // 256)
    assert_same_pixels(resize_and_crop(image), Image.fromarray((ramp // 256).astype(np.uint8)))


def encoded(tmp_path, suffix):
    noise(40, 30).save(tmp_path / f"whole.{suffix}")
    return (tmp_path / f"whole.{suffix}").read_bytes()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged TIFF headers
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "tif", "webp"])
def test_empty_cut_and_foreign_files_are_named(tmp_path, suffix):
    data, file = encoded(tmp_path, suffix), tmp_path / f"broken image.{suffix}"
    for content in (b"", data[:1], data[:20], data[: len(data) // 2], b"not an image\n" * 99, b"\0" * 999):
        file.write_bytes(content)
        assert str(file) in user_error(load_image, file)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged TIFF headers
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif"])
def test_a_damaged_image_is_read_or_named(tmp_path, suffix):
    data, file, rng = encoded(tmp_path, suffix), tmp_path / f"damaged.{suffix}", random.Random(suffix)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            assert load_image(file).size > (0, 0)
        except UserError as error:
            assert str(file) in str(error)
            assert len(str(error).splitlines()) == 1


def test_a_missing_image_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "missing.png", tmp_path):
        assert str(path) in user_error(load_image, path)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_a_folder_a_class_with_images_at_any_depth(tmp_path):
    touch(tmp_path, "polyp/b.PNG", "polyp/a.jpg", "polyp/patient 1/deep/c.Jpeg", "normal/x.tiff", "normal/notes.txt")
    assert load_dataset(tmp_path) == load_dataset(str(tmp_path))
    assert load_dataset(tmp_path) == [
        Sample(tmp_path / "normal/x.tiff", "normal"),
        Sample(tmp_path / "polyp/a.jpg", "polyp"),
        Sample(tmp_path / "polyp/b.PNG", "polyp"),
        Sample(tmp_path / "polyp/patient 1/deep/c.Jpeg", "polyp"),
    ]


def test_hidden_files_and_macos_debris_are_passed_over(tmp_path):
    touch(tmp_path, "a/1.png", "a/.hidden.png", "a/._1.png", ".cache/2.png", "__MACOSX/a/1.png", "a/__MACOSX/._1.png")
    touch(tmp_path, "._stray.png", ".DS_Store", "a/Thumbs.db")
    (tmp_path / "a" / "folder.png").mkdir()
    assert load_dataset(tmp_path) == [Sample(tmp_path / "a/1.png", "a")]


def test_a_data_set_may_lie_below_a_hidden_folder(tmp_path):
    folder = touch(tmp_path / ".cache" / "__MACOSX", "a/1.png")
    assert load_dataset(folder) == [Sample(folder / "a/1.png", "a")]


def test_a_flat_folder_has_no_labels(tmp_path):
    touch(tmp_path, "b.png", "a.webp", "readme.md")
    assert load_dataset(tmp_path) == [Sample(tmp_path / "a.webp"), Sample(tmp_path / "b.png")]


def test_an_image_beside_the_class_folders_is_a_mistake(tmp_path):
    touch(tmp_path, "a/1.png", "b/2.png", "stray.png")
    assert "stray.png" in user_error(load_dataset, tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.csv", "empty", "texts", "notes.txt", "a.png"])
def test_what_is_no_data_set_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "texts/class/a.txt", "notes.txt", "a.png")
    assert str(tmp_path / name) in user_error(load_dataset, tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# Manifests


def manifest(folder, text, name="manifest.csv", encoding="utf-8"):
    touch(folder, "a.png", "sub/b.png")
    (folder / name).write_text(text, encoding=encoding, newline="")
    return folder / name


def test_csv_rows_become_samples(tmp_path):
    file = manifest(tmp_path, "image,label,caption,group,split\na.png,polyp,a polyp,p1,train\nsub/b.png,cyst,,,\n")
    assert load_dataset(file) == [
        Sample(tmp_path / "a.png", "polyp", "a polyp", "p1", "train"),
        Sample(tmp_path / "sub/b.png", "cyst"),
    ]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_may_come_from_excel(tmp_path, encoding, line_end):
    text = line_end.join(["Caption, LABEL ,Image,remark", '" polyp, ""large""",Dây thanh, a.png ,x', ""])
    file = manifest(tmp_path, text, "Export.CSV", encoding)
    assert load_dataset(file) == [Sample(tmp_path / "a.png", "Dây thanh", 'polyp, "large"')]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_caption_may_have_commas_quotes_and_lines(tmp_path, line_end):
    caption = line_end.join(['a "large", pale polyp', "on the left;", "", "no oedema"])
    touch(tmp_path, "a.png")
    with open(tmp_path / "m.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["caption", "image"], [caption, "a.png"]])
    assert load_dataset(tmp_path / "m.csv") == [Sample(tmp_path / "a.png", caption=caption)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_lines_become_samples(tmp_path, encoding):
    rows = [{"image": "a.png", "Label": 0, "caption": "tai\nphải", "group": None}, {"label": "x", "image": "sub/b.png"}]
    text = json.dumps(rows[0], ensure_ascii=False) + "\n\n" + json.dumps(rows[1])
    file = manifest(tmp_path, text, "m.jsonl", encoding)
    assert load_dataset(file) == [
        Sample(tmp_path / "a.png", "0", "tai\nphải"),
        Sample(tmp_path / "sub/b.png", "x"),
    ]


def test_an_image_may_have_an_absolute_path(tmp_path):
    touch(tmp_path, "elsewhere/c.png")
    file = manifest(tmp_path, f"image\n{tmp_path / 'elsewhere/c.png'}\n")
    assert load_dataset(file) == [Sample(tmp_path / "elsewhere/c.png")]


@pytest.mark.parametrize(
    ("written", "split"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("VAL", "val"),
        ("valid", "val"),
        ("validation", "val"),
        ("Test", "test"),
    ],
)
def test_splits_have_their_usual_names(tmp_path, written, split):
    assert load_dataset(manifest(tmp_path, f"image,split\na.png,{written}\n"))[0].split == split


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("label,caption\na,b\n", "entry 1 has no image"),
        ("image,label\na.png,x\n,y\n", "entry 2 has no image"),
        ("image,label\na.png,x\nmissing.png,y\n", "missing.png"),
        ("image,label\nsub,x\n", "sub"),
        ("image,split\na.png,holdout\n", "'holdout'"),
        ("image,label\n", "no images"),
        ("", "no images"),
        ('image,caption\na.png,"' + "x" * 200_000 + '"\n', "cannot read"),
    ],
)
def test_mistakes_in_a_csv_are_named(tmp_path, text, says):
    file = manifest(tmp_path, text)
    line = user_error(load_dataset, file)
    assert str(file) in line
    assert says in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"label": "x"}', "entry 1 has no image"),
        ('{"image": "a.png"}\n{"image": "missing.png"}', "missing.png"),
        ('{"image": "a.png", "split": "holdout"}', "'holdout'"),
        ('{"image": "a.png"}\n["image", "a.png"]', "not a JSON object"),
        ('{"image": "a.png"}\n{"image": ', "cannot read"),
        ("\n\n", "no images"),
    ],
)
def test_mistakes_in_json_lines_are_named(tmp_path, text, says):
    file = manifest(tmp_path, text, "m.jsonl")
    line = user_error(load_dataset, file)
    assert str(file) in line
    assert says in line


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_manifest_that_is_not_utf_8_is_named(tmp_path, name):
    file = manifest(tmp_path, "image,label\na.png,d\u00e2y\n", name, "latin-1")
    assert str(file) in user_error(load_dataset, file)


@needs_larynx
def test_the_larynx_images_are_read_from_folder_and_manifest():
    folders, rows = load_dataset(LARYNX / "images"), load_dataset(LARYNX / "manifest.csv")
    assert len(folders) == len(rows) == 139
    assert {s.image.resolve() for s in folders} == {s.image.resolve() for s in rows}
    assert len({s.label for s in folders}) == len({s.label for s in rows}) == 4
    assert all(s.caption and s.group for s in rows)


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def table(*rows):
    """(label, group, split) … → samples of an image each."""
    return [
        Sample(Path(f"{i}.png"), label=row[0], **dict(zip(("group", "split"), row[1:], strict=False)))
        for i, row in enumerate(rows)
    ]


def classes(samples):
    return Counter(sample.label for sample in samples)


def assert_covering(splits, samples):
    assert list(splits) == ["train", "val", "test"]
    everything = [sample for part in splits.values() for sample in part]
    assert Counter(everything) == Counter(samples)


@pytest.mark.parametrize("seed", range(5))
def test_a_random_split_holds_out_a_fifth_of_each_class(seed):
    samples = table(*[("a",)] * 100 + [("b",)] * 35 + [("c",)] * 2)
    splits = split_dataset(samples, seed=seed)
    assert classes(splits["val"]) == {"a": 20, "b": 7, "c": 1}
    assert not splits["test"]
    assert_covering(splits, samples)


def test_a_random_split_follows_its_seed_not_the_order_of_the_samples():
    samples = table(*[("a",), ("b",)] * 30)
    splits = [split_dataset(samples, "random", seed=seed)["val"] for seed in range(10)]
    assert splits == [split_dataset(samples, "random", seed=seed)["val"] for seed in range(10)]
    assert len({tuple(val) for val in splits}) == 10
    assert set(split_dataset(samples[::-1], "random", seed=3)["val"]) == set(splits[3])


def test_splits_are_the_same_in_every_process():
    """Python's sets of strings come in another order in each process: resuming a run would train on its val images."""
    code = """if True:
        from data import *
        samples = [Sample(Path(f"{i}.png"), "ab"[i % 2], group=f"{i % 2}{i // 4}") for i in range(80)]
        print([[s.image.name for s in split_dataset(samples, how)["val"]] for how in ("random", "group")])"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 100


def test_a_split_may_hold_out_another_fraction():
    splits = split_dataset(table(*[("a",), ("b",)] * 20), fraction=0.4)
    assert classes(splits["val"]) == {"a": 8, "b": 8}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=4, max_size=40), st.integers(0, 9))
def test_an_image_with_several_captions_stays_on_one_side(captions, seed):
    samples = [Sample(Path(f"{i}.png"), "ab"[i % 2], f"caption {j}") for i, n in enumerate(captions) for j in range(n)]
    splits = split_dataset(samples, "random", seed=seed)
    assert_covering(splits, samples)
    assert not {s.image for s in splits["train"]} & {s.image for s in splits["val"]}


rows = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("pqrstuvw")), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows, st.integers(0, 9), st.sampled_from([0.1, 0.2, 0.5]))
def test_no_group_is_on_both_sides_and_every_class_is_trained_on(rows, seed, fraction):
    samples = table(*rows)
    homes = {label: {g for lab, g in rows if lab == label} for label, _ in rows}
    free = [g for _, g in rows if all(homes[label] != {g} for label in homes)]  # groups that no class depends on
    if len(homes) < 2 or not free:
        user_error(split_dataset, samples, "group", seed, fraction)
        return
    splits = split_dataset(samples, "group", seed, fraction)
    assert_covering(splits, samples)
    assert not {s.group for s in splits["train"]} & {s.group for s in splits["val"]}
    assert classes(splits["train"]).keys() == homes.keys()
    assert splits["val"]
    assert splits == split_dataset(samples, "group", seed, fraction)


@pytest.mark.parametrize("seed", range(5))
def test_a_group_split_holds_out_a_fifth_of_the_groups_of_each_class(seed):
    samples = table(*[(label, f"{label}{i // 3}") for label in "ab" for i in range(30)])
    val = split_dataset(samples, "group", seed=seed)["val"]
    assert classes(val) == {"a": 6, "b": 6}
    assert len({s.group for s in val}) == 4


def test_group_splits_differ_by_seed():
    samples = table(*[(label, f"{label}{i}") for label in "ab" for i in range(20)])
    assert len({tuple(split_dataset(samples, "group", seed=seed)["val"]) for seed in range(10)}) == 10


def test_a_class_of_one_group_stays_in_train():
    samples = table(*[("a", "p")] * 5, *[("b", "q"), ("b", "r")] * 3)
    for seed in range(5):
        splits = split_dataset(samples, "group", seed=seed)
        assert classes(splits["train"]) == {"a": 5, "b": 3}
        assert classes(splits["val"]) == {"b": 3}


def test_the_manifests_own_split_is_kept():
    samples = table(("a", "p", "train"), ("b", "p", "train"), ("a", "p", "val"), ("b", "p", "test"), ("b", "q", "val"))
    splits = split_dataset(samples)
    assert [[samples.index(s) for s in part] for part in splits.values()] == [[0, 1], [2, 4], [3]]


def test_where_the_manifest_has_train_and_test_only_val_comes_from_train():
    samples = table(*[("a", None, "train"), ("b", None, "train")] * 10, *[("a", None, "test"), ("b", None, "test")] * 3)
    splits = split_dataset(samples, seed=1)
    assert splits["test"] == samples[20:]
    assert classes(splits["val"]) == {"a": 2, "b": 2}
    assert_covering(splits, samples)


def test_auto_prefers_the_manifests_split_to_groups_and_groups_to_chance():
    rows = [(label, f"{label}{i // 2}", "val" if i > 6 else "train") for label in "ab" for i in range(8)]
    split = {how: split_dataset(table(*rows), how) for how in ("auto", "manifest", "group", "random")}
    assert split["auto"] == split["manifest"]
    assert len(split["manifest"]["val"]) == 2
    grouped = table(*[row[:2] for row in rows])
    assert split_dataset(grouped) == split_dataset(grouped, "group") != split_dataset(grouped, "random")
    alone = table(*[row[:1] for row in rows])
    assert split_dataset(alone) == split_dataset(alone, "random")


@pytest.mark.parametrize(
    ("rows", "how", "says"),
    [
        ([("a",)] * 9, "random", "'a'"),
        ([("a", "p"), ("a", "q")] * 9, "group", "'a'"),
        ([("a",)] * 9 + [("b",)], "random", "'b'"),
        ([("a",), (None,), ("b",)], "auto", "1.png"),
        ([("a", None, "train"), ("b", None, "train"), ("c", None, "val")], "auto", "lacks: c"),
        ([("a", None, "train"), ("b", None, "train"), ("a", None, "val"), ("d", None, "test")], "auto", "lacks: d"),
        ([("a", None, "train"), ("b", None, "train")], "auto", "validate"),
        ([("a", None, "train"), ("b", None, "train"), ("b",)], "auto", "not every entry"),
        ([("a", None, "train"), ("b", None, "train"), ("b",)], "manifest", "not every entry"),
        ([("a", "p"), ("a", "q"), ("b", "p"), ("b",)], "auto", "not every image"),
        ([("b",), ("a", "p"), ("a", "q"), ("b", "p")], "auto", "not every image"),
        ([("b",), ("a", None, "train"), ("b", None, "val")], "auto", "not every entry"),
        ([("a", None, "val"), ("b", None, "val")], "auto", "nothing to train on"),
        ([("a",), ("a",), ("b",), ("b",)], "group", "not every image"),
        ([("a", "p"), ("b", "p")] * 9, "group", "validate"),
    ],
)
def test_labels_that_do_not_allow_to_train_are_named(rows, how, says):
    assert says in user_error(split_dataset, table(*rows), how)


@needs_larynx
def test_the_larynx_sequences_are_kept_apart():
    splits = split_dataset(load_dataset(LARYNX / "manifest.csv"))
    assert not {s.group for s in splits["train"]} & {s.group for s in splits["val"]}
    assert len(classes(splits["train"])) == 4
    assert sum(map(len, splits.values())) == 139


# ---------------------------------------------------------------------------------------------------------------------
# Mirrors


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("nose-left", "nose-right"),
        ("ear_right", "ear_left"),
        ("LEFT vocal fold", "RIGHT vocal fold"),
        ("Right ear, left side.", "Left ear, right side."),
        ("left/right", "right/left"),
        ("the right's", "the left's"),
        ("tai trái", "tai phải"),
        ("Phải và TRÁI", "Trái và PHẢI"),
        ("at 7 o'clock", "at 5 o'clock"),
        ("at 10 o’clock and 2o'clock", "at 2 o’clock and 10o'clock"),
        ("12 o'clock", "12 o'clock"),
        ("6 o'clock", "6 o'clock"),
        ("11 o'clock", "1 o'clock"),
        ("left at 3 o'clock", "right at 9 o'clock"),
        ("between 5 and 7 O'Clock", "between 7 and 5 O'Clock"),
        ("perforated from 1 to 4 o'clock, 2 mm", "perforated from 11 to 8 o'clock, 2 mm"),
    ],
)
def test_left_and_right_are_swapped(text, mirrored):
    assert mirror_text(text) == mirrored
    assert mirror_text(mirrored) == text


@pytest.mark.parametrize(
    "text",
    ["bright", "leftover", "upright cleft", "right1", "throat", "", "7 mm", "5 clocks", "13 o'clock", "rıght RİGHT"],
)
def test_other_words_are_left_alone(text):
    assert mirror_text(text) == text


sides = st.sampled_from(["left", "Left", "LEFT", "right", "Right", "trái", "Trái", "TRÁI", "phải", "PHẢI"])
hours = st.integers(1, 12).map("{} o'clock".format)
others = st.sampled_from([" ", "-", "_", "/", ", ", "bright", "Leftover", "3", "ear"]) | st.text(max_size=3)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(sides | hours | others, max_size=8).map("".join))
def test_mirrored_twice_is_the_original(text):
    assert mirror_text(mirror_text(text)) == text


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation


@pytest.mark.parametrize("size", [224, 32])
@pytest.mark.parametrize("shape", [(640, 480), (300, 900), (1, 1), (2, 50), (17, 3)])
def test_augmented_images_have_the_right_shape(shape, size):
    for seed in range(4):
        pixels = augment(noise(*shape), size, random.Random(seed), flip=bool(seed % 2))
        assert pixels.shape == (size, size, 3)
        assert pixels.dtype == np.uint8


@pytest.mark.parametrize("mode", MODES)
def test_images_of_every_mode_can_be_augmented(mode):
    assert augment(in_mode(mode), 48, random.Random(0), flip=False).shape == (48, 48, 3)


def test_augmentation_follows_its_random_generator():
    image = noise(90, 70)
    first, again, other = (augment(image, 64, random.Random(seed), flip=False) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("seed", range(5))
def test_a_flip_mirrors_and_changes_nothing_else(seed):
    image, rngs = noise(90, 70), (random.Random(seed), random.Random(seed))
    plain, flipped = (augment(image, 64, rng, flip) for rng, flip in zip(rngs, (False, True), strict=True))
    np.testing.assert_array_equal(flipped, plain[:, ::-1])
    assert (flipped != plain).any()
    assert rngs[0].random() == rngs[1].random()


def test_augmentation_leaves_the_image_as_it_was():
    image = noise(90, 70)
    before = image.tobytes()
    augment(image, 64, random.Random(0), flip=True)
    assert image.tobytes() == before


def test_an_augmented_image_shows_half_of_the_original_or_more():
    stripes = np.zeros((200, 200, 3), np.uint8)
    stripes[:, np.arange(200) // 5 % 2 == 1] = 255
    images = [Image.fromarray(stripes), Image.fromarray(stripes.transpose(1, 0, 2).copy())]
    areas = []
    for seed in range(30):
        across, down = (augment(image, 200, random.Random(seed), flip=False).mean(2) for image in images)
        middles = [line > (line.min() + line.max()) / 2 for line in (across[100], down[:, 100])]
        edges = [np.count_nonzero(np.diff(line)) for line in middles]  # of 39, fewer where less is seen
        areas.append(edges[0] * edges[1] / 39**2)
    assert min(areas) > 0.5 * np.cos(np.radians(15)) ** 2 - 0.05  # a turned line crosses fewer stripes
    assert max(areas) - min(areas) > 0.2


# ---------------------------------------------------------------------------------------------------------------------
# Prefetching

WORKERS = pytest.mark.parametrize("workers", [0, 1, 4])


@WORKERS
def test_batches_arrive_in_order_whatever_takes_longest(workers):
    rng = random.Random(0)
    batches = [[(i, j, rng.random() / 500) for j in range(i % 4)] for i in range(20)]

    def function(item):
        time.sleep(item[2])
        return item[:2]

    assert list(prefetch(function, batches, workers)) == [[item[:2] for item in batch] for batch in batches]


@WORKERS
def test_no_batches_give_nothing(workers):
    assert list(prefetch(str, [], workers)) == []


@WORKERS
def test_images_are_the_same_whatever_the_workers(workers, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(8)]
    for i, file in enumerate(files):
        noise(60, 50, seed=i).save(file)
    batches = list(prefetch(lambda file: resize_and_crop(load_image(file), 32), [files[:3], files[3:]], workers))
    pixels = np.stack([pixels for batch in batches for pixels in batch])
    np.testing.assert_array_equal(pixels, [resize_and_crop(noise(60, 50, seed=i), 32) for i in range(8)])


@WORKERS
def test_an_exception_arrives_as_it_was_raised_after_the_batches_before_it(workers):
    mistake = UserError("item 7 is broken")

    def function(item):
        if item == 7:
            raise mistake
        return item

    batches = prefetch(function, [[i, i + 1] for i in range(0, 20, 2)], workers)
    assert [next(batches) for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(UserError) as error:
        next(batches)
    assert error.value is mistake


@WORKERS
def test_closing_early_ends_the_threads_and_starts_no_more_work(workers):
    before, started, released = threading.active_count(), [], threading.Event()

    def function(item):
        started.append(item)
        if item > 0:
            released.wait(20)
        return item

    batches = prefetch(function, ([i] * 10 for i in range(10_000)), workers)
    assert next(batches) == [0] * 10
    release = threading.Timer(0.5, released.set)
    release.start()
    batches.close()
    release.join()
    assert threading.active_count() == before
    assert started.count(0) == 10
    assert len(started) <= 10 + workers


def test_only_a_few_batches_are_prepared_ahead():
    taken = []
    batches = prefetch(str, (taken.append(i) or [i] for i in range(1000)), 4)
    for i in range(50):
        assert next(batches) == [str(i)]
        assert len(taken) <= i + 4


def test_workers_work_at_the_same_time():
    meeting = threading.Barrier(3, timeout=20)  # passed only by three at once
    batches = list(prefetch(lambda item: meeting.wait() >= 0, [[0], [1], [2]], 3))
    assert batches == [[True]] * 3


# ---------------------------------------------------------------------------------------------------------------------
# The ENTRep layout


def entrep(folder):
    """The layout with its quirks: a folder deeper, macOS debris, numbers for labels, another case in data.json."""
    for name in ("train/train/imgs/a.png", "train/train/imgs/B.png", "public/images/_Image07.png", "test/imgs/t.png",
                 "__MACOSX/train/imgs/._a.png", "train/train/imgs/._a.png"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    files = {
        "train/train/cls.json": {"a.png": "nose-right", "b.png": 6},
        "train/train/t2i.json": {"a polyp on the right": "a.png"},
        "train/train/i2i.json": {"a.png": "b.png"},
        "public/data.json": [
            {"Path": "_image07.png", "Classification": "ear-left", "Type": "ear", "Description": "tai trái",
             "DescriptionEN": "left ear"}
        ],
        "__MACOSX/cls.json": ["debris"],
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_entrep_is_read_with_its_quirks(tmp_path):
    samples = load_dataset(entrep(tmp_path))
    assert [(s.image.relative_to(tmp_path).as_posix(), s.label, s.caption) for s in samples] == [
        ("public/images/_Image07.png", "ear-left", "left ear"),
        ("train/train/imgs/a.png", "nose-right", "a polyp on the right"),
        ("train/train/imgs/B.png", "throat", None),
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train/train/cls.json", {"a.png": "nose"}, "unknown label 'nose'"),
        ("train/train/cls.json", {"a.png": 7}, "unknown label 7"),
        ("train/train/cls.json", {"c.png": "throat"}, "c.png, which is not in"),
        ("train/train/cls.json", ["a.png"], "cls.json is not as ENTRep's is"),
        ("public/data.json", [{"Path": "_image07.png"}], "KeyError: 'Classification'"),
    ],
)
def test_a_broken_entrep_is_refused(tmp_path, name, content, says):
    (entrep(tmp_path) / name).write_text(json.dumps(content))
    assert says in user_error(load_dataset, tmp_path)
