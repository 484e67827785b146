"""Data sets and splits against what a user's files say."""

import csv
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shapes import SHAPES

import images
from augment import augment
from data import Sample, load_dataset, training_batches
from errors import UserError

LARYNX = Path(__file__).parents[2] / "shared" / "larynx"
needs_larynx = pytest.mark.skipif(not LARYNX.is_dir(), reason="the larynx images are not at hand")


def user_error(function, *arguments, **options):
    """Calls, expects a UserError of one line, returns the line."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    line = str(error.value)
    assert line
    assert len(line.splitlines()) == 1
    return line


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


def test_a_class_folders_name_loses_its_outer_blanks_as_a_manifests_label_does(tmp_path):
    touch(tmp_path, "cats /1.png", "dogs/1.png")
    assert {sample.label for sample in load_dataset(tmp_path)} == {"cats", "dogs"}


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
        Sample(tmp_path / "a.png", "polyp", ("a polyp",), "p1", "train"),
        Sample(tmp_path / "sub/b.png", "cyst"),
    ]


def test_rows_of_one_image_are_one_sample_with_all_captions_and_a_match(tmp_path):
    rows = ["image,label,caption,match", "a.png,x,red,sub/b.png", "sub/b.png,y,,", "a.png,x,large,", "./a.png,x,red,"]
    assert load_dataset(manifest(tmp_path, "\n".join(rows))) == [
        Sample(tmp_path / "a.png", "x", ("red", "large"), match=tmp_path / "sub/b.png"),
        Sample(tmp_path / "sub/b.png", "y"),
    ]
    for extra, says in (
        ("a.png,x,,a.png", "has the matches"),
        ("a.png,x,,c.png", "c.png (line 6)"),
        ("a.png,z,,", "labels"),
    ):
        assert says in user_error(load_dataset, manifest(tmp_path, "\n".join([*rows, extra])))


def test_a_step_draws_one_of_the_captions(pictures):
    image = load_dataset(pictures / "manifest.csv")[0].image
    settings = SimpleNamespace(seed=0, batch_size=1, flip="swap")
    samples = [Sample(image, "x", ("on the left", "on the right", "red"))]
    drawn = [caption for ((*_, caption),) in training_batches(samples, {"x": ["p"]}, settings, range(60), 32, 0)]
    assert set(drawn) == {"on the left", "on the right", "red"} and min(map(drawn.count, set(drawn))) > 9


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_may_come_from_excel(tmp_path, encoding, line_end):
    text = line_end.join(["Caption, LABEL ,Image,remark", '" polyp, ""large""",Dây thanh, a.png ,x', ""])
    file = manifest(tmp_path, text, "Export.CSV", encoding)
    assert load_dataset(file) == [Sample(tmp_path / "a.png", "Dây thanh", ('polyp, "large"',))]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_caption_may_have_commas_quotes_and_lines(tmp_path, line_end):
    caption = line_end.join(['a "large", pale polyp', "on the left;", "", "no oedema"])
    touch(tmp_path, "a.png")
    with open(tmp_path / "m.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["caption", "image"], [caption, "a.png"]])
    assert load_dataset(tmp_path / "m.csv") == [Sample(tmp_path / "a.png", captions=(caption,))]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_lines_become_samples(tmp_path, encoding):
    rows = [{"image": "a.png", "Label": 0, "caption": "tai\nphải", "group": None}, {"label": "x", "image": "sub/b.png"}]
    text = json.dumps(rows[0], ensure_ascii=False) + "\n\n" + json.dumps(rows[1])
    file = manifest(tmp_path, text, "m.jsonl", encoding)
    assert load_dataset(file) == [
        Sample(tmp_path / "a.png", "0", ("tai\nphải",)),
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
        ("label,caption\na,b\n", "no column named image; its first line is 'label,caption'"),
        ("image,label\na.png,x\n,y\n", "line 3: the image is missing"),
        ("image,label\na.png,x\nmissing.png,y\n", "missing.png"),
        ("image,label\nsub,x\n", "sub"),
        ("image,split\na.png,holdout\n", "'holdout'"),
        ("image,label\n", "no images"),
        ("", "no column named image"),
        ('image,caption\na.png,"' + "x" * 200_000 + '"\n', "a quotation mark is missing"),
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
        ('{"label": "x"}', "line 1: the image is missing"),
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


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_csv_may_be_separated_as_in_other_countries(tmp_path, delimiter):
    rows = ("image", "label", "caption"), ("a.png", "x", "red, large"), ("", "", "")
    text = "\n".join(delimiter.join(row) for row in rows)
    assert load_dataset(manifest(tmp_path, text)) == [Sample(tmp_path / "a.png", "x", ("red, large",))]


def test_a_manifest_may_come_from_windows(tmp_path):
    file = manifest(tmp_path, "image\tlabel\r\nsub\\b.png\tGrün\r\n", encoding="utf-16")
    assert load_dataset(file) == [Sample(tmp_path / "sub/b.png", "Grün")]


def test_letters_of_two_parts_make_the_same_class(tmp_path):
    touch(tmp_path / "folders", "e\u0301/1.png", "o/1.png")
    assert {sample.label for sample in load_dataset(tmp_path / "folders")} == {"\u00e9", "o"}
    assert load_dataset(manifest(tmp_path, "image,label\na.png,e\u0301\n"))[0].label == "\u00e9"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('image,label\na.png,"x\nsub/b.png,y\n', "the row that begins in line 2: a quotation mark is missing"),
        ('image,label,caption\na.png,x,"open\nsub/b.png,y,"closed"\n', "a quotation mark"),
        ("image,label,caption\na.png,x,red, large\n", "line 2: there are more cells than columns"),
        ("image,label,Label\na.png,x,y\n", "two columns of the same name"),
        ("file,class\na.png,x\n", "its first line is 'file,class'"),
        ("image,label\na.png,nan\n", "line 2: the label is 'nan'"),
        ("image,label,group\na.png,x,NaN\n", "the group is 'NaN'"),
        ("image,label\na.png,x\nsub/../a.png,y\n", "has the labels 'x' and 'y' (as"),
        ("image,split\na.png,train\na.png,test\n", "has the splits 'train' and 'test'"),
        ("image,group\na.png,p1\na.png,p2\n", "has the groups 'p1' and 'p2'"),
        ("image\n" + "".join(f"{i}.png\n" for i in range(9)), "0.png (line 2), 1.png (line 3)"),
    ],
)
def test_what_would_be_silently_wrong_is_said(tmp_path, text, says):
    assert says in user_error(load_dataset, manifest(tmp_path, text))


def test_a_link_to_an_image_is_the_same_image(tmp_path):
    touch(tmp_path, "x/1.png", "y/2.png")
    (tmp_path / "y/copy.png").symlink_to(tmp_path / "x/1.png")
    line = user_error(load_dataset, tmp_path)
    assert "x/1.png has the labels 'x' and 'y'" in line and "y/copy.png" in line


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"image": "a.png", "label": true}', "'label' is neither a text nor a number"),
        ('{"image": ["a.png"]}', "'image' is neither a text nor a number"),
        ('{"image": "a.png", "label": NaN}', "NaN is not allowed"),
        ('{"image": "a.png", "image": "b.png"}', "the key 'image' is there twice"),
        ('{"image": "a.png", "label": "\\ud800"}', "the label is not UTF-8"),
    ],
)
def test_odd_json_lines_are_named(tmp_path, line, says):
    line = user_error(load_dataset, manifest(tmp_path, f'{{"image": "a.png", "label": 1}}\n{line}\n', "m.jsonl"))
    assert says in line and "line 2" in line


def test_the_name_of_an_image_may_have_any_bytes_but_a_label_not(tmp_path):
    (tmp_path / "gr\udcfcn.png").write_bytes(b"")
    (tmp_path / "m.csv").write_bytes(b"image,label\ngr\xfcn.png,x\n")
    assert load_dataset(tmp_path / "m.csv") == [Sample(tmp_path / "gr\udcfcn.png", "x")]
    (tmp_path / "m.csv").write_bytes(b"image,label\ngr\xfcn.png,gr\xfcn\n")
    assert "line 2: the label is not UTF-8; save the file as UTF-8" in user_error(load_dataset, tmp_path / "m.csv")


# ---------------------------------------------------------------------------------------------------------------------
# Folders as they are


def test_linked_class_folders_are_read_and_loops_end(tmp_path):
    touch(tmp_path, "data/a/1.png", "elsewhere/2.png")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere/self").symlink_to(".")
    found = load_dataset(tmp_path / "data")
    assert {(sample.image.name, sample.label) for sample in found} == {("1.png", "a"), ("2.png", "b")}


def test_a_class_folder_without_images_is_named(tmp_path):
    touch(tmp_path, "a/1.png", "b/1.dcm", ".git/x")
    assert f"{tmp_path / 'b'} has no images" in user_error(load_dataset, tmp_path)


def test_folders_of_a_split_hold_the_class_folders(tmp_path):
    touch(tmp_path, "train/a/1.png", "train/b/2.png", "Val/a/deep/3.png", "test/b/4.png")
    found = {(s.image.name, s.label, s.split) for s in load_dataset(tmp_path)}
    assert found == {("1.png", "a", "train"), ("2.png", "b", "train"), ("3.png", "a", "val"), ("4.png", "b", "test")}
    touch(tmp_path, "train/stray.png")
    assert "stray.png lies in no class" in user_error(load_dataset, tmp_path)


def test_columns_that_are_not_used_are_said(tmp_path, capsys):
    load_dataset(manifest(tmp_path, "image,label,patient\na.png,x,p1\n"))
    assert "these columns are not used: patient" in capsys.readouterr().err


def test_a_group_is_the_same_however_it_is_typed(tmp_path):
    rows = "a.png,x,M\u00fcller  1\nsub/b.png,x,Mu\u0308ller 1\n"
    samples = load_dataset(manifest(tmp_path, "image,label,group\n" + rows))
    assert samples[0].group == samples[1].group == "M\u00fcller 1"


@pytest.mark.parametrize("text", ["None", "N/A", "#N/A", "####", "<NA>", "null"])
def test_a_missing_group_is_no_patient(tmp_path, text):
    file = manifest(tmp_path, f"image,label,group\na.png,x,{text}\n")
    assert f"the group is {text!r}, as programs write a missing value" in user_error(load_dataset, file)


def test_folders_that_link_to_each_other_end(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST_FOLDERS", 500)
    for a in "abcdefgh":
        touch(tmp_path, f"{a}/1.png")
    for a, b in itertools.permutations("abcdefgh", 2):
        (tmp_path / a / f"to {b}").symlink_to(tmp_path / b)
    assert "more than 500 folders, by links perhaps" in user_error(load_dataset, tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.png", "b/1.png")
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert f"cannot read {tmp_path / 'b'} (Permission denied)" in user_error(load_dataset, tmp_path)


@needs_larynx
def test_the_larynx_images_are_read_from_folder_and_manifest():
    folders, rows = load_dataset(LARYNX / "images"), load_dataset(LARYNX / "manifest.csv")
    assert len(folders) == len(rows) == 139
    assert {s.image.resolve() for s in folders} == {s.image.resolve() for s in rows}
    assert len({s.label for s in folders}) == len({s.label for s in rows}) == 4
    assert all(s.captions and s.group for s in rows)


# ---------------------------------------------------------------------------------------------------------------------
# Batches to train on


def test_every_epoch_shows_each_image_once_and_a_step_has_its_batch_wherever_one_begins(pictures):
    samples = load_dataset(pictures / "manifest.csv")
    samples = [Sample(s.image, label=f"{i}") for i, s in enumerate(samples)]
    prompts = {sample.label: ["a prompt", "another"] for sample in samples}
    settings = SimpleNamespace(seed=0, batch_size=4, flip="none")

    def batches(steps):
        found = training_batches(samples, prompts, settings, steps, 32, 2)
        return [[(pixels.tobytes(), *rest) for pixels, *rest in batch] for batch in found]

    whole = batches(range(12))  # two epochs of five batches, and two batches
    assert [len(batch) for batch in whole[:5]] == [4, 4, 4, 3, 3]
    epochs = [[label for batch in part for _, _, label, _, _ in batch] for part in (whole[:5], whole[5:10])]
    assert epochs[0] != epochs[1]
    assert all(sorted(labels) == sorted(sample.label for sample in samples) for labels in epochs)
    assert batches(range(7, 11)) == whole[7:11]


def test_flips_swap_sides_or_do_not_happen(pictures):
    samples = load_dataset(pictures / "manifest.csv")
    prompts = {name: [f"prompt {name}"] for name in SHAPES}
    settings = SimpleNamespace(seed=0, batch_size=4, flip="swap")

    def items_of(samples, prompts, epoch=0):
        per_epoch = -(-len(samples) // settings.batch_size)
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        return [item for batch in training_batches(samples, prompts, settings, steps, 32, 0) for item in batch]

    items = [item for epoch in range(3) for item in items_of(samples, prompts, epoch)]
    assert len(items) == 3 * len(samples)
    seen, columns = [], torch.arange(32.0)
    for image, view, label, prompt, caption in items:
        (pixels,) = augment([image], [view], 32)
        assert prompt == f"prompt {label}"
        red = (pixels[..., 0] - pixels[..., 1]).clamp(min=0).sum(0)  # in each column
        if "half" in label and red[[0, -1]].max() > 10 * red[[0, -1]].min():
            side = "left" if (red * columns).sum() / red.sum() < columns.mean() else "right"
            assert label == f"half-{side}" and side in caption
            seen.append(label)
    assert min(seen.count("half-left"), seen.count("half-right")) > 5
    one_sided = [s for s in samples if s.label != "half-right"]
    one_sided_prompts = {name: texts for name, texts in prompts.items() if name != "half-right"}
    assert "half-right" not in [label for _, _, label, _, _ in items_of(one_sided, one_sided_prompts)]

    settings.flip = "naive"
    items = items_of(samples, prompts)
    assert sorted(label for _, _, label, _, _ in items) == sorted(sample.label for sample in samples)
    centres = {}
    for image, view, label, _, _ in items:
        (pixels,) = augment([image], [view], 32)
        red = (pixels[..., 0] - pixels[..., 1]).clamp(min=0).sum(0)
        centres.setdefault(label, []).append(float((red * columns).sum() / red.sum()) if red.sum() else 0.0)
    for label in ("half-left", "half-right"):
        assert min(centres[label]) < 14 and max(centres[label]) > 18  # mirrored, and still called what it was
