"""entrep.py against the quirks of the challenge's folders."""

import json

import pytest
from PIL import Image
from test_data import user_error

from data import load_dataset


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


def test_labels_of_the_test_part_make_a_test_split(tmp_path):
    (entrep(tmp_path) / "test/cls.json").write_text(json.dumps({"t.png": "throat"}))
    splits = {sample.image.name: sample.split for sample in load_dataset(tmp_path)}
    assert splits == {"_Image07.png": "train", "a.png": "train", "B.png": "train", "t.png": "test"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train/train/cls.json", {"a.png": "nose"}, "unknown label 'nose'"),
        ("train/train/cls.json", {"a.png": 7}, "unknown label 7"),
        ("train/train/cls.json", {"c.png": "throat"}, "c.png, which is not in"),
        ("train/train/cls.json", ["a.png"], "cls.json should be {image: class}"),
        ("public/data.json", [{"Path": "_image07.png"}], "unknown label None"),
        ("public/data.json", {"Path": "_image07.png"}, "should be a list of"),
        ("train/train/t2i.json", {"a polyp": ["a.png"]}, "t2i.json should be {description: image}"),
    ],
)
def test_a_broken_entrep_is_refused(tmp_path, name, content, says):
    (entrep(tmp_path) / name).write_text(json.dumps(content))
    assert says in user_error(load_dataset, tmp_path)
