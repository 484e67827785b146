"""phantom.py: deterministic, of either side, and written in a layout that data.py reads."""

import csv
import json
from collections import Counter

import numpy as np
import pytest

from data import load_dataset
from errors import UserError
from phantom import CLASSES, TEST_START, draw, phantom, write_dataset
from prompts import ENTREP_PROMPTS


def pixels(label, seed, scope="A"):
    image, caption = draw(label, np.random.default_rng(seed), scope, size=(96, 96))
    return np.asarray(image).astype(float), caption


def test_the_classes_are_entreps():
    assert tuple(ENTREP_PROMPTS) == CLASSES


@pytest.mark.parametrize("label", CLASSES)
def test_a_phantom_is_the_same_for_the_same_seed_and_lies_in_a_round_field(label):
    (first, caption), (again, same), (other, _) = pixels(label, 0), pixels(label, 0), pixels(label, 1)
    assert np.array_equal(first, again) and caption == same
    assert not np.array_equal(first, other)
    assert first[:4, :4].max() < 40 < first[40:56, 40:56].mean()  # a black corner, a lit middle


@pytest.mark.parametrize("site", ["nose", "ear"])
def test_a_left_phantom_is_a_right_one_in_a_mirror(site):
    """Averaged over many, as pose, lamp and noise are not mirrored."""
    right, left = (np.mean([pixels(f"{site}-{side}", i)[0] for i in range(30)], axis=0) for side in ("right", "left"))
    assert np.abs(left - right[:, ::-1]).mean() < 0.9 * np.abs(left - right).mean()


def test_captions_name_the_side_and_the_same_findings_in_both_scopes():
    for i in range(14):
        (image, label, caption), (other, _, same) = phantom(i, "A"), phantom(i, "A", seed=0)
        assert np.array_equal(image, other) and caption == same and image.size == (320, 240)
        for side in ("left", "right"):
            assert (side in caption.split()) == label.endswith(side)
    assert not np.array_equal(phantom(0, "A")[0], phantom(0, "B")[0])


def test_a_data_set_is_read_as_it_was_written(tmp_path):
    write_dataset(tmp_path / "set", count=28, scope="B", seed=3)
    samples = load_dataset(tmp_path / "set")
    assert Counter((s.split, s.label) for s in samples) == {
        (split, label): n for split, n in (("train", 4), ("test", 2)) for label in CLASSES
    }
    for sample in samples:
        number = int("".join(filter(str.isdigit, sample.image.stem)))
        _, label, caption = phantom(number + TEST_START * (sample.split == "test"), "B", seed=3)
        assert sample.label == label and sample.captions in ((caption,), ())
    pairs = json.loads((tmp_path / "set/train/i2i.json").read_text())
    assert all((tmp_path / "set/train/imgs" / name).is_file() for pair in pairs.items() for name in pair)
    with open(tmp_path / "set/test/cls.csv", newline="") as file:
        names = [name for (name,) in csv.reader(file)]
    assert len(names) == 14 and all((tmp_path / "set/test/imgs" / name).is_file() for name in names)
    with pytest.raises(UserError, match="not empty"):
        write_dataset(tmp_path / "set", count=7)
