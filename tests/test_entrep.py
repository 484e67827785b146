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
        "train/train/t2i.json": {"a polyp on the right": "a.png", "a polyp": "A.png"},
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
    assert [
        (s.image.relative_to(tmp_path).as_posix(), s.label, s.captions, s.match and s.match.name) for s in samples
    ] == [
        ("public/images/_Image07.png", "ear-left", ("left ear",), None),
        ("train/train/imgs/a.png", "nose-right", ("a polyp on the right", "a polyp"), "B.png"),
        ("train/train/imgs/B.png", "throat", (), None),
    ]


def test_labels_of_the_test_part_make_a_test_split(tmp_path):
    (entrep(tmp_path) / "test/cls.json").write_text(json.dumps({"t.png": "throat"}))
    splits = {sample.image.name: sample.split for sample in load_dataset(tmp_path)}
    assert splits == {"_Image07.png": "train", "a.png": "train", "B.png": "train", "t.png": "test"}


def test_captions_are_found_whatever_the_case_and_path_of_the_name(tmp_path):
    folder = entrep(tmp_path)
    t2i = {"a polyp on the right": "imgs/A.PNG", "a tonsil": "imgs\\b.png"}
    (folder / "train/train/t2i.json").write_text(json.dumps(t2i))
    captions = {sample.image.name: sample.captions for sample in load_dataset(folder)}
    assert captions == {"a.png": ("a polyp on the right",), "B.png": ("a tonsil",), "_Image07.png": ("left ear",)}


def test_of_two_files_of_a_name_the_path_says_which(tmp_path):
    folder = entrep(tmp_path)
    (folder / "train/train/more").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "train/train/more/a.png")
    assert "a.png, of which there are two" in user_error(load_dataset, folder)
    labels = {"imgs/a.png": "nose-right", "more/a.png": "throat"}
    (folder / "train/train/t2i.json").write_text(json.dumps({"a polyp": "imgs/a.png"}))
    (folder / "train/train/i2i.json").unlink()
    (folder / "train/train/cls.json").write_text(json.dumps(labels))
    found = {sample.image.parent.name: sample.label for sample in load_dataset(folder)}
    assert found == {"imgs": "nose-right", "more": "throat", "images": "ear-left"}


def test_another_programs_data_json_does_no_harm(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / label / "0.png")
    (tmp_path / "data.json").write_text('{"version": 3}')
    (tmp_path / "a/cls.json").write_text("[")
    assert [sample.label for sample in load_dataset(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train/train/cls.json", {"a.png": "nose"}, "unknown label 'nose'"),
        ("train/train/cls.json", {"a.png": 7}, "unknown label 7"),
        ("train/train/cls.json", {"a.png": "²"}, "unknown label '²'"),
        ("train/train/cls.json", {"a.png": True}, "unknown label True"),
        ("train/train/cls.json", {"c.png": "throat"}, "c.png, which is not among"),
        ("train/train/cls.json", ["a.png"], "cls.json should be a JSON object like"),
        ("public/data.json", [{"Path": "_image07.png"}], "unknown label None"),
        ("public/data.json", {"Path": "_image07.png"}, "should be a list of"),
        ("train/train/t2i.json", {"a polyp": ["a.png"]}, "t2i.json should be a JSON object like"),
        ("train/train/i2i.json", ["a.png"], "i2i.json should be a JSON object like"),
        ("train/train/i2i.json", {"a.png": "c.png"}, "i2i.json names c.png, which is not among"),
    ],
)
def test_a_broken_entrep_is_refused(tmp_path, name, content, says):
    (entrep(tmp_path) / name).write_text(json.dumps(content))
    assert says in user_error(load_dataset, tmp_path)
