"""images.py against transformers' image processor."""

import os
import random
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from test_data import LARYNX, needs_larynx, user_error
from transformers.image_utils import load_image as their_load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import build
import encoding
import train
from errors import UserError
from images import (
    FRAMES,
    Preprocessing,
    crop_to_field,
    find_duplicates,
    load_image,
    look,
    look_at,
    prefetch,
    preprocess,
    to_rgb,
    to_square,
)
from phantom import CLASSES
from phantom import draw as draw_phantom
from pictures import thumbnail

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


# ---------------------------------------------------------------------------------------------------------------------
# Pixels

SIZES = [(640, 480), (480, 640), (320, 320), (224, 224), (225, 224), (224, 227), (301, 200), (1, 1), (3, 5), (10, 300)]
SIZES += [(300, 10), (500, 223), (1000, 300)]


@pytest.mark.parametrize("size", [224, 128, 97])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pixels_are_those_of_transformers(width, height, size):
    image = noise(width, height)
    assert_same_pixels(to_square(image, size), image, size)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 160))
def test_pixels_are_those_of_transformers_for_any_size(width, height, size):
    image = noise(width, height, seed=width * 301 + height)
    if max(image.size) <= 20 * min(image.size):  # a strip would be stretched to hundreds of megabytes
        assert_same_pixels(to_square(image, size), image, size)


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
    assert_same_pixels(to_square(image), image)


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
        assert_same_pixels(to_square(image), their_load_image(str(file)))
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
    assert_same_pixels(to_square(image, 32), their_load_image(str(file)), 32)
    if suffix == "png" and orientation == 6:  # the stored picture's top is the right-hand side: turn it clockwise
        np.testing.assert_array_equal(np.asarray(image), np.rot90(np.asarray(stored), k=-1))


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tif", "jpg", "webp"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_image_files_of_every_format_are_read_as_by_transformers(tmp_path, mode, suffix):
    image = in_mode(mode)
    image = image.convert("RGB") if suffix in ("jpg", "webp") and mode == "P" else image
    image.save(tmp_path / f"image.{suffix}")
    file = str(tmp_path / f"image.{suffix}")
    assert_same_pixels(to_square(load_image(file), 64), their_load_image(file), 64)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_contrast(tmp_path, suffix):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{suffix}")
    image = load_image(tmp_path / f"ramp.{suffix}")
    np.testing.assert_array_equal(np.asarray(image), ramp // 256)
    assert_same_pixels(to_square(image), Image.fromarray((ramp // 256).astype(np.uint8)))


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


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "PCX"])
def test_a_file_of_another_format_is_not_opened_whatever_its_name(tmp_path, kind):
    """Pillow would hand EPS to Ghostscript, a program that runs what the file says."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", kind)
    assert "it is none of JPEG" in user_error(load_image, tmp_path / "x.jpg")


def test_a_phones_jpeg_of_several_pictures_is_read(tmp_path):
    picture = noise(40, 30)
    picture.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[noise(20, 10)])
    assert load_image(tmp_path / "phone.jpg").size == (40, 30)


def test_a_missing_image_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "missing.png", tmp_path):
        assert str(path) in user_error(load_image, path)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_images_of_any_depth_are_neither_black_nor_white(tmp_path, bits):
    ramp = np.linspace(0, 2**bits - 1, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    grey = np.asarray(load_image(tmp_path / "ramp.png"))
    assert grey.dtype == np.uint8 and grey.min() == 0 and grey.max() == 255
    assert np.array_equal(grey, ramp >> (bits - 8))


@pytest.mark.parametrize(("top", "expected"), [(1.0, 255), (255.0, 255), (4095.0, 255)])
def test_images_of_numbers_with_a_point_are_shown_as_meant(tmp_path, top, expected):
    ramp = np.linspace(-0.1 * top, top, 64 * 64, dtype=np.float32).reshape(64, 64)
    ramp[0, 0] = float("nan")
    Image.fromarray(ramp).save(tmp_path / "ramp.tif")
    grey = np.asarray(load_image(tmp_path / "ramp.tif"))
    assert grey.dtype == np.uint8 and grey.min() == 0 and grey.max() == expected and 110 < grey.mean() < 130


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1), (20_000, 3), (1, 1)])
def test_a_thread_of_an_image_takes_no_memory(size):
    pixels = to_square(Image.new("RGB", size, "red"), 224)
    assert pixels.shape == (224, 224, 3) and (pixels == (255, 0, 0)).all()
    assert thumbnail_of(Image.new("RGB", size, "red")).size == (224, 224)


def thumbnail_of(image):
    with tempfile.TemporaryDirectory() as folder:
        image.save(Path(folder, "x.png"))
        return thumbnail(Path(folder, "x.png"))


def test_huge_images_are_refused_before_they_are_decoded(tmp_path):
    Image.new("1", (10_000, 5_001)).save(tmp_path / "huge.png")
    line = user_error(load_image, tmp_path / "huge.png")
    assert "10000 × 5001 are more than 50,000,000 pixels" in line


def test_large_images_become_smaller_ones(tmp_path):
    Image.new("RGBA", (5000, 3000), (255, 0, 0, 255)).save(tmp_path / "large.png")
    image = load_image(tmp_path / "large.png")
    assert image.size == (2500, 1500) and image.getpixel((1000, 1000)) == (255, 0, 0)


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "pipe.png (there is no such file)" in user_error(load_image, tmp_path / "pipe.png")


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
    batches = list(prefetch(lambda file: to_square(load_image(file), 32), [files[:3], files[3:]], workers))
    pixels = np.stack([pixels for batch in batches for pixels in batch])
    np.testing.assert_array_equal(pixels, [to_square(noise(60, 50, seed=i), 32) for i in range(8)])


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
# Duplicates


def test_copies_are_found_whatever_their_size_and_compression(tmp_path):
    originals = [draw_phantom(label, np.random.default_rng([3, i]), "B")[0] for i, label in enumerate(CLASSES * 2)]
    for i, image in enumerate(originals):
        image.save(tmp_path / f"{i:02}.png")
    (tmp_path / "03 again.png").write_bytes((tmp_path / "03.png").read_bytes())
    originals[5].save(tmp_path / "05.jpg", quality=50)
    small = originals[5].resize((originals[5].width // 2, originals[5].height // 2), Image.Resampling.LANCZOS)
    small.convert("RGB").save(tmp_path / "05 small.webp")
    ImageOps.mirror(originals[8]).save(tmp_path / "08 mirrored.png")  # not a copy: another side of the patient
    found = find_duplicates(look_at(sorted(tmp_path.iterdir()), workers=2)[0])
    assert sorted(sorted(file.name for file in copies) for copies in found) == [
        ["03 again.png", "03.png"],
        ["05 small.webp", "05.jpg", "05.png"],
    ]


def test_black_frames_are_no_copies(tmp_path):
    for i in range(3):
        Image.new("RGB", (64, 48), (i, i, i)).save(tmp_path / f"{i}.png")
    assert find_duplicates(look_at(list(tmp_path.iterdir()), workers=0)[0]) == []


def test_different_phantoms_of_a_class_are_no_copies(tmp_path):
    for i in range(60):
        draw_phantom("ear-left", np.random.default_rng([4, i]), "B")[0].save(tmp_path / f"{i}.png")
    assert find_duplicates(look_at(list(tmp_path.iterdir()), workers=2)[0]) == []
    assert find_duplicates({}) == []


@needs_larynx
def test_neighbouring_frames_of_real_videos_are_no_copies():
    assert find_duplicates(look_at(sorted((LARYNX / "images").rglob("*.jpg")), workers=2)[0]) == []


def test_the_difference_hash_is_as_by_hand():
    grey = np.add.outer(np.zeros(8, int), [0, 9, 5, 5, 6, 3, 8, 1, 2]).astype(np.uint8)  # 8 × 9: no resizing
    bits, thumbnail = look(Image.fromarray(grey))
    assert np.unpackbits(bits).reshape(8, 8).tolist() == [[1, 0, 0, 1, 0, 1, 0, 1]] * 8 and thumbnail.shape == (768,)


# ---------------------------------------------------------------------------------------------------------------------
# Frames


def scope(size, centre, radius, level=150):
    """A picture of an endoscope: a bright disk with a black hole on black, and letters beside it."""
    image = Image.new("RGB", size, (8, 6, 7))
    draw = ImageDraw.Draw(image)
    (x, y), r = centre, radius
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(level, level // 2, level // 2))
    draw.ellipse((x - 10, y - 10, x + 10, y + 10), fill="black")
    draw.text((5, 5), "PAT 17", fill="white")
    return image


@pytest.mark.parametrize("centre, radius", [((200, 150), 100), ((420, 240), 200), ((320, 130), 120)])
def test_the_field_is_found_beside_letters(centre, radius):
    field = crop_to_field(scope((640, 480), centre, radius))
    assert all(1.93 * radius <= side <= 2.05 * radius for side in field.size)
    assert field.getpixel((field.width // 2, field.height // 2)) == (0, 0, 0)  # the hole in its middle
    square = to_square(scope((640, 480), centre, radius), 64, Preprocessing("field"))
    assert square.shape == (64, 64, 3) and square[32, 2:62].max(1).min() >= 0 and square[32, 12].max() > 100


def test_a_picture_without_a_field_stays_as_it_is():
    for image in (noise(80, 60), Image.new("RGB", (80, 60)), scope((640, 480), (100, 100), 20), Image.new("L", (1, 1))):
        assert crop_to_field(image).tobytes() == image.tobytes()


def test_padding_and_squashing_keep_the_whole_picture():
    image = Image.new("RGB", (400, 100), "red")
    padded = to_square(image, 64, Preprocessing("pad"))
    assert (padded[24:40] == (255, 0, 0)).all() and (padded[:24] == 0).all() and (padded[40:] == 0).all()
    assert (to_square(image, 64, Preprocessing("squash")) == (255, 0, 0)).all()
    for size in ((1, 1000), (1000, 1), (3, 2)):
        for frame in FRAMES:
            assert to_square(Image.new("RGB", size), 32, Preprocessing(frame)).shape == (32, 32, 3)


@pytest.mark.parametrize("frame", FRAMES)
def test_a_thread_does_not_fill_the_memory(frame):
    image = Image.new("RGB", (60_000, 12), "red")
    assert to_square(image, 32, Preprocessing(frame)).shape == (32, 32, 3)


def test_a_run_keeps_its_frame(script, base, pictures, tmp_path):
    arguments = ["--data", pictures / "images", "--weights", base, "--steps", 1, "--frame", "squash", "--run", "run"]
    status, _, err = script(train, *arguments)
    assert status == 0, err
    model, _, _ = build.load_run(tmp_path / "run", torch.device("cpu"))
    image = pictures / "images/field-green/0.png"
    pixels = preprocess(load_image(image), 32, Preprocessing("squash"))
    with torch.no_grad():
        expected = model.encode_image(pixels[None])
    torch.testing.assert_close(encoding.encode_images(model, [image], torch.device("cpu"), 1, 0), expected)
