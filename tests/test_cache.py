"""cache: the pixels with it are those without it, whatever happens to the files and the disk."""

import os
import resource
import signal

import numpy as np
import pytest
from PIL import Image

import train
from cache import NO_CACHE, PixelCache, open_cache
from checkpoint import read_safetensors
from images import load_image, to_square


def noise(file, size=(90, 70), seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(file)
    return file


def read(store, file, side=40):
    return store.get(file, side, lambda: to_square(load_image(file, side), side))


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_what_was_made_is_found_and_made_no_more(name, tmp_path):
    file, store = noise(tmp_path / name), PixelCache(tmp_path, 10**6)
    first = read(store, file)
    assert first.shape == (40, 40, 3) and np.array_equal(first, read(NO_CACHE, file))
    for _ in range(2):
        found = store.get(file, 40, lambda: pytest.fail("it was made again"))
        assert np.array_equal(found, first)
    assert read(store, file, side=20).shape == (20, 20, 3)  # another kind
    assert os.listdir(tmp_path) == [name]  # the file has no name


def test_a_file_that_has_changed_is_read_again(tmp_path):
    file, store = noise(tmp_path / "a.png"), PixelCache(tmp_path, 10**6)
    first = read(store, file).copy()
    noise(file, seed=1)
    assert not np.array_equal(read(store, file), first)
    assert np.array_equal(read(store, file), read(NO_CACHE, file))
    file.unlink()
    with pytest.raises(Exception, match="there is no such file"):
        read(store, file)


def test_beyond_the_limit_nothing_is_kept(tmp_path):
    files = [noise(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    store = PixelCache(tmp_path, 2 * 40 * 40 * 3)
    assert all(np.array_equal(read(store, file), read(NO_CACHE, file)) for file in files * 2)
    assert [(file, 40) in store.places for file in files] == [True, True, False]
    assert open_cache(tmp_path, 0.001).limit == 10**6 and open_cache(tmp_path, 0).file is None
    assert 0 < open_cache(tmp_path).limit < 10**15


def test_a_full_disk_is_no_error(tmp_path, capsys):
    files, store = [noise(tmp_path / f"{i}.png", seed=i) for i in range(2)], PixelCache(tmp_path, 10**6)
    read(store, files[0])

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before[1]))  # one and two thirds of them
    try:
        for _ in range(2):
            assert all(np.array_equal(read(store, file), read(NO_CACHE, file)) for file in files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.count("note: decoded images are no longer kept (the disk is full)") == 1
    assert [(file, 40) in store.places for file in files] == [True, False]


def test_pixels_that_are_held_hold_no_files(tmp_path):
    file, store = noise(tmp_path / "a.png"), PixelCache(tmp_path, 10**6)
    before = len(os.listdir("/proc/self/fd"))
    held = [read(store, file) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before and len(held) == 50


def test_a_training_ends_with_the_same_bits_with_and_without_a_cache(script, pictures, base, tmp_path, monkeypatch):
    for name, flags in (("with", ()), ("without", ("--cache-gb", 0)), ("little", ("--cache-gb", 1e-5))):
        run = "--run", tmp_path / name, "--steps", 8, "--lr", "1e-3", "--batch-size", 8
        assert script(train, "--data", pictures / "images", "--weights", base, *run, *flags, "--device", "cpu")[0] == 0
    with_it, without, little = (
        read_safetensors(tmp_path / name / "adapter.safetensors")[0] for name in ("with", "without", "little")
    )
    assert all(with_it[name].equal(without[name]) and with_it[name].equal(little[name]) for name in with_it)
    assert {file.name for file in (tmp_path / "with").iterdir()} == {
        file.name for file in (tmp_path / "without").iterdir()
    }


def test_a_large_jpeg_is_decoded_at_half_its_size(tmp_path):
    large, small = noise(tmp_path / "large.jpg", (1280, 1008)), noise(tmp_path / "small.png", (60, 50))
    assert load_image(large, 448).size == (640, 504) and load_image(large).size == (1280, 1008)
    whole, half = (to_square(image, 280).astype(float) for image in (load_image(large), load_image(large, 280)))
    assert np.abs(whole - half).mean() < 12  # of noise; what is scaled down twice is a little softer
    assert load_image(small, 280).size == (60, 50)
