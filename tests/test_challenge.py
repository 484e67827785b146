"""The ENTRep challenge from end to end: a data set in its layout, with every quirk, is trained on and answered."""

import csv
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import mistake
from PIL import Image

import build
import classify
import data
import encoding
import evaluate
import phantom
import retrieve
import train
from entrep import class_numbers
from prompts import ENTREP_PROMPTS

STRANGE = [
    'a polyp, "large"',
    "dây thanh: khối u, 3 mm",
    "; drop table\\n",
    "  a space on both sides ",
    "line\u2028here",
    "100 %",
]


@pytest.fixture(scope="module")
def challenge(tmp_path_factory):
    """A folder deeper, in other case, numbers for some labels, macOS debris, texts that name the same image."""
    folder = tmp_path_factory.mktemp("challenge") / "set"
    phantom.write_dataset(folder, count=84)
    (folder / "train").rename(folder / "outer")
    (folder / "train").mkdir()
    (folder / "outer").rename(folder / "train/train")
    root = folder / "train/train"
    labels, texts = (json.loads((root / f"{name}.json").read_text(encoding="utf-8")) for name in ("cls", "t2i"))
    names = list(labels)
    numbers = {name: number for number, name in enumerate(ENTREP_PROMPTS)}
    labels = {(n.upper() if i % 2 else n): numbers[c] if i % 3 else c for i, (n, c) in enumerate(labels.items())}
    (root / "cls.json").write_text(json.dumps(labels))
    texts |= dict.fromkeys(STRANGE[:2], names[0])
    (root / "t2i.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    (root / "i2i.json").write_text(
        json.dumps({a: b for x, y in zip(names[::2], names[1::2], strict=False) for a, b in ((x, y), (y, x))})
    )
    (folder / "__MACOSX/cls.json").write_text("debris")
    (folder / "test/data.json").rename(folder.parent / "answers.json")  # the challenge keeps them
    shutil.copy(folder / "test/t2i.csv", folder.parent)
    with open(folder / "test/t2i.csv", "a", encoding="utf-8", newline="") as file:
        file.write("".join(f"{text}\r\n" for text in STRANGE[1:]))  # a query a line, as it is
        csv.writer(file).writerow(STRANGE[:1])  # and as a program quotes it
    return folder


@pytest.fixture(scope="module")
def run(challenge, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "challenge"
    arguments = ["train.py", "--data", challenge, "--weights", base, "--run", folder, "--steps", 30, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*map(str, arguments), "--lr", "3e-3"])
        train.main()
    return folder


def strict_object(text):
    """A JSON object of distinct keys, as a grader reads it."""
    pairs = json.loads(text, object_pairs_hook=list)
    assert len({key for key, _ in pairs}) == len(pairs)
    return pairs


def check(out, archive, queries, allowed):
    """Every query is answered, in order, by something that there is; the archive has one file, with the same."""
    answers = strict_object(out)
    assert [key for key, _ in answers] == list(dict.fromkeys(queries))
    assert all(type(answer) is type(next(iter(allowed))) and answer in allowed for _, answer in answers)
    with zipfile.ZipFile(archive) as file:
        (name,) = file.namelist()
        assert name.endswith(".json") and "/" not in name and strict_object(file.read(name)) == answers
    return dict(answers)


def test_all_texts_and_pairs_are_kept_and_validated(challenge, run):
    samples = data.load_dataset(challenge)
    first = next(s for s in samples if s.image.name == "Image0000.png")
    assert set(STRANGE[:2]) < set(first.captions) and len(first.captions) == 3
    matched = [s for s in samples if s.match]
    assert len(matched) == 20 and all(s.match in {m.image for m in matched} for s in matched)
    figures = json.loads((run / "metrics.json").read_text())
    assert 0 <= figures["i2i_match_mrr"] <= 1 and 0 <= figures["t2i_caption_mrr"] <= 1
    with open(run / "split.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    side = {row["image"]: row["split"] for row in rows}
    assert all(side[row["match"]] == row["split"] for row in rows if row["match"])
    assert {row["caption"] for row in rows} > set(STRANGE[:2])


def test_three_submissions_are_what_a_strict_grader_accepts(challenge, run, script, tmp_path):
    test = challenge / "test"
    images = {file.name for file in (test / "imgs").iterdir()}
    names = [line.strip() for line in (test / "cls.csv").read_text().splitlines()]
    common = ["--data", test / "imgs", "--run", run, "--device", "cpu"]
    status, out, err = script(classify, "--queries", test / "cls.csv", "--zip", "cls.zip", *common)
    assert status == 0, err
    classes = check(out, tmp_path / "cls.zip", names, set(range(7)))

    status, out, err = script(retrieve, "--queries", test / "i2i.csv", "--zip", "i2i.zip", *common)
    assert status == 0, err
    found = check(out, tmp_path / "i2i.zip", names, images)
    assert all(query != answer for query, answer in found.items())

    with open(challenge.parent / "t2i.csv", encoding="utf-8", newline="") as file:  # without the strange ones
        plain = [text for (text,) in csv.reader(file)]
    status, out, err = script(retrieve, "--queries", test / "t2i.csv", "--zip", "t2i.zip", *common)
    assert status == 0, err
    texts = check(out, tmp_path / "t2i.zip", [*plain, *STRANGE[1:], STRANGE[0]], images)

    # The answers are those of the model, computed by hand.
    model, tokenizer, _ = build.load_run(run, torch.device("cpu"))
    images = encoding.encode_images(model, [test / "imgs" / name for name in names], torch.device("cpu"), 8, 0)
    gallery = F.normalize(images, dim=1).half().float()  # as the index keeps them
    cosines = F.normalize(gallery, dim=1) @ gallery.T
    cosines.fill_diagonal_(-2)
    assert [names[i] for i in cosines.argmax(1).tolist()] == [found[name] for name in names]
    queries = encoding.encode_texts(model, tokenizer, list(texts), torch.device("cpu"))
    best = (F.normalize(queries, dim=1) @ gallery.T).argmax(1).tolist()
    assert [names[i] for i in best] == list(texts.values())

    # The accuracy of the submission is the one that evaluate.py prints.
    answers = json.loads((challenge.parent / "answers.json").read_text(encoding="utf-8"))
    numbers = {name: number for number, name in enumerate(ENTREP_PROMPTS)}
    truth = {name.lower(): numbers[row["Classification"]] for row in answers for name in [row["Path"]]}
    correct = sum(truth[name.lower()] == number for name, number in classes.items()) / len(classes)
    rows = [f"{test / 'imgs' / name},{list(ENTREP_PROMPTS)[truth[name.lower()]]}" for name in names]
    Path("labelled.csv").write_text("\n".join(["image,label", *rows]))
    status, out, err = script(evaluate, "--run", run, "--data", "labelled.csv", "--json", "--device", "cpu")
    assert status == 0 and json.loads(out)["accuracy"] == pytest.approx(correct), err


def test_queries_that_cannot_be_answered_are_one_line(challenge, run, script, tmp_path):
    imgs, common = challenge / "test/imgs", ["--run", run, "--device", "cpu"]
    (tmp_path / "cls.csv").write_text("Test0000.png\nnowhere.png\n")
    (tmp_path / "empty.csv").write_text("\n\n")
    for tool, name in ((classify, "cls.csv"), (retrieve, "cls.csv")):
        assert "cls.csv names nowhere.png" in mistake(script(tool, "--queries", name, "--data", imgs, *common))
    for lines in ("image\nTest0000.png\n", "Test0000.png\nTest0001\n"):  # a heading, a name without its ending
        (tmp_path / "odd.csv").write_text(lines)
        assert "which is not among the images" in mistake(
            script(retrieve, "--queries", "odd.csv", "--data", imgs, *common)
        )
    (tmp_path / "latin.csv").write_bytes("dây".encode("latin-1", "replace") + b"\xe9\n")
    assert "is not UTF-8" in mistake(script(retrieve, "--queries", "latin.csv", "--data", imgs, *common))
    assert "there are no queries" in mistake(script(retrieve, "--queries", "empty.csv", "--data", imgs, *common))
    assert "ends in .zip" in mistake(
        script(classify, "--queries", "cls.csv", "--zip", "a/b.zip", "--data", imgs, *common)
    )
    assert "--zip has no effect" in mistake(script(classify, "--zip", "x.zip", "--data", imgs, *common))
    assert "--text has no effect with --queries" in mistake(
        script(retrieve, "--queries", "cls.csv", "--text", "a", *common)
    )
    (tmp_path / "one").mkdir()
    (tmp_path / "one/Test0000.png").write_bytes((imgs / "Test0000.png").read_bytes())
    (tmp_path / "i2i.csv").write_text("Test0000.png\n")
    assert "no other image" in mistake(script(retrieve, "--queries", "i2i.csv", "--data", "one", *common))
    # An image that can't be read is left out, and said.
    (tmp_path / "one/b.png").write_bytes(b"no picture")
    (tmp_path / "one/c.png").write_bytes((imgs / "Test0001.png").read_bytes())
    (tmp_path / "i2i.csv").write_text("b.png\nTEST0000.png\n")
    status, out, err = script(retrieve, "--queries", "i2i.csv", "--data", "one", *common)
    assert status == 1 and json.loads(out) == {"TEST0000.png": "c.png"} and "b.png" in err
    (tmp_path / "i2i.csv").write_text("b.png\n")
    status, out, err = script(retrieve, "--queries", "i2i.csv", "--data", "one", *common)
    assert status == 1 and json.loads(out) == {} and "b.png" in err


def test_the_challenges_numbers_are_given_whatever_the_spelling(trained, script, pictures, tmp_path):
    names = {name.replace("-", "_").upper(): number for number, name in enumerate(ENTREP_PROMPTS)}
    assert class_numbers(names) == names
    (tmp_path / "cls.csv").write_text("0.png\n")
    line = mistake(
        script(classify, "--run", trained, "--queries", "cls.csv", "--data", pictures / "images/field-green")
    )
    assert "has the class 'field-green', for which the ENTRep challenge has no number" in line


def test_images_of_one_name_in_two_folders_have_their_own_texts_and_matches(tmp_path):
    for name in ("imgs/p1/x.png", "imgs/p2/x.png", "imgs/p1/z.png", "imgs/A.png", "imgs/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    labels = {"p1/x.png": 0, "p2/x.png": 1, "z.png": 2, "A.png": 3, "a.png": 4}
    for name, content in (
        ("cls", labels),
        ("t2i", {"one": "p1/x.png", "two": "p2/x.png"}),
        ("i2i", {"p1/x.png": "z.png"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    samples = {s.image.relative_to(tmp_path / "imgs").as_posix(): s for s in data.load_dataset(tmp_path)}
    assert samples["p1/x.png"].captions == ("one",) and samples["p2/x.png"].captions == ("two",)
    assert samples["p1/x.png"].match.name == "z.png" and samples["p2/x.png"].match is None
    assert [samples[name].label for name in ("A.png", "a.png")] == ["ear-left", "vc-open"]
