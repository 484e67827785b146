"""retrieve.py as a user runs it, and its contact sheet."""

import csv
import io
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import mistake, readme_code
from PIL import Image
from safetensors import safe_open
from shapes import SHAPES, draw

import build
import classify
import encoding
import explain
import index
import pictures as pictures_module
import retrieve
import train
from archive import Vocabulary, words
from checkpoint import read_safetensors
from data import load_dataset
from pictures import class_look, contact_sheets


def test_retrieve_ranks_by_cosine_for_text_image_and_both(script, trained, pictures, tmp_path):
    example = pictures / "images/field-green/0.png"
    queries = {"text": ["--text", "a green shape"], "image": ["--image", example]}
    queries["both"] = queries["text"] + queries["image"]
    found = {}
    for name, query in queries.items():
        status, out, err = script(retrieve, "--run", trained, *query, "--json", "--top", 20, "--no-per-group")
        assert status == 0, err
        found[name] = json.loads(out)
        scores = [r["score"] for r in found[name]]
        assert scores == sorted(scores, reverse=True) and [r["rank"] for r in found[name]] == list(
            range(1, len(scores) + 1)
        )
    assert len(found["text"]) == 18 and len(found["image"]) == len(found["both"]) == 16  # not the example's group

    model, tokenizer, _ = build.load_run(trained, torch.device("cpu"))
    text = encoding.encode_texts(model, tokenizer, ["a green shape"], torch.device("cpu"))
    images = encoding.encode_images(model, [r["image"] for r in found["text"]], torch.device("cpu"), 8, 0)
    assert torch.cosine_similarity(text, images).tolist() == pytest.approx(
        [r["score"] for r in found["text"]], abs=1e-4
    )
    for mix, name in ((0, "image"), (1, "text")):
        flags = "--mix", mix, "--json", "--top", 17, "--no-per-group"
        _, out, _ = script(retrieve, "--run", trained, *queries["both"], *flags)
        searched = {r["image"] for r in found["image"]}
        expected = [r["image"] for r in found[name] if r["image"] in searched]
        assert [r["image"] for r in json.loads(out)] == expected


def lines(run):
    return (run / "index.jsonl").read_text().splitlines()


def test_only_new_and_changed_images_are_encoded_again(script, base, pictures, tmp_path, monkeypatch):
    gallery = tmp_path / "gallery"
    for label in SHAPES:
        (gallery / label).mkdir(parents=True)
        for i in range(3):
            (gallery / label / f"{i}.png").write_bytes((pictures / "images" / label / f"{i}.png").read_bytes())
    assert script(train, "--data", gallery, "--weights", base, "--steps", 1, "--run", "runs/a")[0] == 0
    encoded, encode = [], index.encode_together

    def counted(model, files, *rest):
        encoded.append([file.name for file in files])
        return encode(model, files, *rest)

    monkeypatch.setattr(index, "encode_together", counted)

    def search():
        encoded.clear()
        status, out, err = script(retrieve, "--text", "red", "--json", "--no-per-group")  # the newest run, and its data
        assert status == 0, err
        return json.loads(out), sum(map(len, encoded))

    first, count = search()
    assert count == 9
    again, count = search()
    assert count == 0 and again == first
    draw("all", "blue", random.Random(1)).save(gallery / "half-left/1.png")
    draw("all", "blue", random.Random(1)).save(gallery / "half-left/new.png")
    os.utime(gallery / "half-left/1.png", ns=(1, 1))
    changed, count = search()
    assert count == 2 and len(changed) == 10
    assert len(lines(tmp_path / "runs/a")) == 1 + 9 + 2  # only what is new was written
    (gallery / "half-left/new.png").unlink()
    assert search()[1] == 0
    (tmp_path / "runs/a/index.jsonl").write_bytes(b"damaged")
    assert search()[1] == 9
    assert script(train, "--data", gallery, "--weights", base, "--steps", 1, "--run", "runs/b", "--seed", 1)[0] == 0
    assert search()[1] == 9  # the newest run is another model now


def test_the_contact_sheet_shows_every_result(script, trained, pictures, tmp_path):
    sheet = tmp_path / "sheet.png"
    arguments = ["--text", "red " * 60, "--image", pictures / "images/half-left/0.png", "--top", 7, "--sheet", sheet]
    assert script(retrieve, "--run", trained, *arguments)[0] == 0
    image = Image.open(sheet).convert("RGB")
    assert image.width == 5 * (224 + 16) + 16
    cards = [(16 + i % 5 * 240, 76 + i // 5 * 382) for i in range(10)]  # the query first
    ranges = [image.crop((x, y, x + 224, y + 224)).convert("L").getextrema() for x, y in cards]
    assert all(high - low > 20 for low, high in ranges[:8]) and all(high == low for low, high in ranges[8:])
    status, _, err = script(retrieve, "--run", trained, "--text", "red", "--sheet", "heat.png", "--explain")
    assert status == 0, err
    assert script(retrieve, "--run", trained, "--text", "red", "--sheet", "plain.png")[0] == 0
    heat, plain = (Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("heat", "plain"))
    assert heat.size == plain.size and heat.tobytes() != plain.tobytes()
    assert "--explain has no effect" in mistake(script(retrieve, "--run", trained, "--text", "red", "--explain"))
    status, _, err = script(classify, "--run", trained, pictures / "images", "--sheet", "classes.png", "--explain")
    assert status == 0, err
    assert Image.open(tmp_path / "classes.png").height == 76 + 4 * 382


def test_a_sheet_has_pages_and_shows_what_is_cut_away(tmp_path):
    Image.new("RGB", (200, 100), (0, 0, 255)).save(tmp_path / "wide.png")
    card = {"image": tmp_path / "wide.png", "class": "a", "predicted": "b", "probability": 0.7, "group": "p1"}
    pages = list(contact_sheets([card] * 120, ["a", "b"], "title", "said", "crop"))
    assert [page.height for page in pages] == [76 + 10 * 382] * 2 + [76 + 4 * 382]
    (whole,), (cut,) = (list(contact_sheets([card], ["a", "b"], "title", "said", frame)) for frame in ("pad", "crop"))
    differ = np.asarray(whole).astype(int) != np.asarray(cut)
    rows, columns = np.nonzero(differ.any(2))
    assert [rows.min() - 76, rows.max() - 76, columns.min() - 16, columns.max() - 16] == [56, 167, 56, 167]


def test_sheets_overwrite_no_image_and_name_old_pages(script, trained, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures_module, "PAGE", 4)
    flags = "--run", trained, "--text", "red", "--sheet", "o.png"
    Image.new("RGB", (5, 5)).save(tmp_path / "o-2.png")
    status, _, err = script(retrieve, *flags, "--top", 9)
    assert status == 0 and "the sheet has 3 pages, the last is o.page-3.png" in err
    assert Image.open(tmp_path / "o-2.png").size == (5, 5) and (tmp_path / "o.page-3.png").exists()
    assert script(retrieve, *flags, "--top", 5)[0] == 0
    _, _, err = script(retrieve, *flags, "--top", 5)
    assert "o.page-3.png is of an older sheet" in err
    image = shutil.copy(pictures / "images/half-left/0.png", tmp_path / "query.png")
    before = Path(image).read_bytes()
    for module, flag in ((retrieve, "--sheet"), (explain, "--out")):
        given = ("--image", image) if module is retrieve else (image,)
        assert "one of the images themselves" in mistake(script(module, "--run", trained, *given, flag, image))
    assert Path(image).read_bytes() == before


def test_the_sheet_of_unsure_images_names_the_class(script, trained, pictures, tmp_path, monkeypatch):
    cards = []
    monkeypatch.setattr(classify, "write_sheets", lambda file, made, *rest: cards.extend(made))
    flags = "--run", trained, pictures / "images", "--unsure", 1, "--sheet", "s.png"
    assert script(classify, *flags)[0] == 0
    assert len(cards) == 18 and {card["predicted"] for card in cards} <= set(SHAPES)
    assert all(card["captions"][0] == "unsure" for card in cards)


def test_classes_have_colours_of_their_own_and_none_is_red():
    classes = [f"class {i}" for i in range(12)]
    looks = [class_look(name, classes) for name in classes]
    assert len(set(looks)) == 12
    for (red, green, blue), _ in looks:
        assert red < max(green, blue) + 60


def test_results_as_a_table_for_other_programs(script, trained):
    status, out, _ = script(retrieve, "--run", trained, "--text", "red", "--csv", "--top", 4)
    rows = list(csv.DictReader(io.StringIO(out)))
    _, found, _ = script(retrieve, "--run", trained, "--text", "red", "--json", "--top", 4)
    assert status == 0 and len(rows) == 4
    for row, result in zip(rows, json.loads(found), strict=True):
        assert row["image"] == result["image"] and float(row["score"]) == result["score"]
        assert row["captions"] == "; ".join(result["captions"]) and row["group"] == result["group"]
        assert 0 < result["probability"] <= 1


def test_a_folder_without_labels_can_be_searched(script, trained, pictures, tmp_path):
    (tmp_path / "flat").mkdir()
    for i, label in enumerate(SHAPES):
        (tmp_path / f"flat/{i}.png").write_bytes((pictures / "images" / label / "0.png").read_bytes())
    status, out, _ = script(retrieve, "--run", trained, "--data", tmp_path / "flat", "--text", "green")
    assert status == 0 and all(line.split()[2].endswith("?") for line in out.splitlines()[1:])


def test_what_cannot_be_searched_or_drawn_is_said(script, trained, pictures, tmp_path):
    (tmp_path / "one").mkdir()
    image = tmp_path / "one/1.png"
    image.write_bytes((pictures / "images/half-left/0.png").read_bytes())
    flags = ["--run", trained, "--data", tmp_path / "one"]
    assert "nothing to search but the query image" in mistake(script(retrieve, *flags, "--image", image))
    assert "--mix needs both" in mistake(script(retrieve, *flags, "--text", "red", "--mix", 1))
    assert "room for 200 images" in mistake(script(retrieve, *flags, "--text", "red", "--top", 201, "--sheet", "a.png"))
    assert "--data: it is empty" in mistake(script(retrieve, "--run", trained, "--data", "", "--text", "red"))
    long = [{"rank": 1, "score": 0.5, "image": image, "class": None, "predicted": "x", "captions": ["word " * 20_000]}]
    assert next(contact_sheets(long, ["x"], "word " * 20_000, "")).width > 0


def test_embeddings_serve_other_programs(script, trained, pictures, tmp_path):
    files = {}
    for name in ("out.npz", "out.safetensors"):
        status, out, err = script(retrieve, "--run", trained, "--embeddings", name)
        assert status == 0 and not out and "18 embeddings in" in err, err
        files[name] = tmp_path / name
    with np.load(files["out.npz"]) as stored:
        paths, embeddings = stored["paths"].tolist(), stored["embeddings"]
    with safe_open(files["out.safetensors"], "np") as stored:
        assert json.loads(stored.metadata()["paths"]) == paths
        np.testing.assert_array_equal(stored.get_tensor("embeddings"), embeddings)
    model, _, _ = build.load_run(trained, torch.device("cpu"))
    expected = F.normalize(encoding.encode_images(model, paths, torch.device("cpu"), 8, 0), dim=1)
    assert len(set(paths)) == 18 and all(Path(path).is_absolute() for path in paths)
    np.testing.assert_allclose(embeddings, expected, atol=3e-4)  # kept in float16

    files["out.npz"].rename("images.npz")
    found = {}
    exec(readme_code("faiss"), found)
    status, out, err = script(retrieve, "--run", trained, "--image", paths[0], "--json", "--top", 18, "--no-per-group")
    ours = {os.path.realpath(r["image"]): r["score"] for r in json.loads(out)}  # but for those of the query's group
    rows, cosines = found["rows"][0].tolist(), found["cosines"][0].tolist()
    theirs = {paths[i]: cosine for i, cosine in zip(rows, cosines, strict=True) if paths[i] in ours}
    assert rows[0] == 0 and len(theirs) >= 3 and list(ours)[: len(theirs)] == list(theirs)
    assert list(ours.values())[: len(theirs)] == pytest.approx(list(theirs.values()), abs=1e-4)

    assert ".npz or .safetensors" in mistake(script(retrieve, "--run", trained, "--embeddings", "out.csv"))
    assert "--sheet needs" in mistake(script(retrieve, "--run", trained, "--embeddings", "a.npz", "--sheet", "a.png"))


def test_a_query_that_is_cut_is_said_with_its_text(script, trained):
    text = "a very long query " * 30
    status, _, err = script(retrieve, "--run", trained, "--text", text)
    assert status == 0 and err.count("so that its end is cut: a very long query a very") == 1


def test_without_a_query_a_terminal_is_asked_until_an_empty_line(script, trained, monkeypatch):
    typed = iter(["a green shape", " red ", "", "never asked for"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr(index.sys.stdin, "isatty", lambda: True, raising=False)
    status, out, err = script(retrieve, "--run", trained, "--top", 3)
    assert status == 0 and out.count("rank  score") == 2 and list(typed) == ["never asked for"], err
    single = script(retrieve, "--run", trained, "--top", 3, "--text", "red")[1]
    assert out.endswith(single)
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
    assert script(retrieve, "--run", trained)[0] == 0
    monkeypatch.setattr(index.sys.stdin, "isatty", lambda: False, raising=False)
    assert "say what to look for" in mistake(script(retrieve, "--run", trained))


def test_each_image_has_its_own_row_beside_copies(trained, pictures, tmp_path):
    """New, known and copied images in any order, in batches of any size."""
    model, _, _ = build.load_run(trained, torch.device("cpu"))
    originals, cpu = sorted((pictures / "images").rglob("*.png")), torch.device("cpu")
    (tmp_path / "run").mkdir()
    rng, files = random.Random(0), []
    for turn in range(4):
        for _ in range(6):
            files.append(tmp_path / f"{len(files)}.png")
            shutil.copy(rng.choice(originals[: 4 * (turn + 1)]), files[-1])
        rng.shuffle(files)
        good, rows, bad = index.index_images(tmp_path / "run", model, files, cpu, rng.choice((1, 3, 99)), 0)
        expected = F.normalize(encoding.encode_images(model, good, cpu, 8, 0), dim=1)
        assert sorted(good) == sorted(files) and not bad and rows.dtype == torch.float16
        torch.testing.assert_close(rows.float(), expected, rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# A search one can trust


def test_groups_are_one_card_each_unless_all_are_asked_for(script, trained):
    """Nine groups of two images."""

    def found(*flags):
        status, out, err = script(retrieve, "--run", trained, "--text", "red", "--json", "--top", 18, *flags)
        assert status == 0, err
        return json.loads(out)

    every, nearest = found("--no-per-group"), found()
    assert len(every) == 18 and len(nearest) == 9
    best = {}
    for result in every:
        best.setdefault(result["group"], result)
    assert [r["image"] for r in nearest] == [r["image"] for r in best.values()]
    assert {r["of_group"] for r in nearest} == {2} and [r["rank"] for r in nearest] == list(range(1, 10))
    for top in (1, 3, 5):
        assert [r["image"] for r in found("--top", top)] == [r["image"] for r in nearest[:top]]


def test_many_copies_crowd_nothing_out(script, trained, pictures, tmp_path):
    for i in range(12):
        shutil.copy(pictures / "images/half-left/0.png", tmp_path / f"copy{i}.png")
    for label in SHAPES:
        shutil.copy(pictures / "images" / label / "3.png", tmp_path / f"{label}.png")
    status, out, err = script(retrieve, "--run", trained, "--data", tmp_path, "--text", "red", "--json", "--top", 3)
    assert status == 0, err
    assert len(json.loads(out)) == 3 and {r["copies"] for r in json.loads(out)} <= {0, 11}


def test_copies_are_one_card(script, trained, pictures, tmp_path):
    for name, label in (("a", "half-left"), ("b", "half-right"), ("c", "field-green")):
        image = Image.open(pictures / "images" / label / "0.png").convert("RGB").resize((300, 300))
        image.save(tmp_path / f"{name}.png")
        if name != "c":
            image.resize((210, 210)).save(tmp_path / f"{name}2.jpg", quality=60)
    image.save(tmp_path / "c3.bmp")
    flags = "--run", trained, "--data", tmp_path, "--text", "red", "--json"
    status, out, err = script(retrieve, *flags)
    assert status == 0, err
    assert sorted((Path(r["image"]).stem[0], r["copies"]) for r in json.loads(out)) == [("a", 1), ("b", 1), ("c", 1)]
    _, out, _ = script(retrieve, *flags, "--no-per-group")
    assert len(json.loads(out)) == 6 and {r["copies"] for r in json.loads(out)} == {0}


def test_an_image_query_leaves_out_its_own_group(script, trained, pictures):
    image = pictures / "images/half-left/0.png"
    status, out, _ = script(retrieve, "--run", trained, "--image", image, "--json", "--top", 18, "--no-per-group")
    results = json.loads(out)
    own = next(s.group for s in load_dataset(pictures / "manifest.csv") if s.image.samefile(image))
    assert status == 0 and len(results) == 16 and own not in {r["group"] for r in results}


def test_words_that_training_never_saw_are_named(script, trained, pictures, tmp_path):
    for text, note in (
        ("a red cat on the left", "note: training never saw: cat; the base model may know it\n"),
        ("RED shapes, on the LEFT: a shape!", ""),
        ("T1a", "never saw: t1a;"),
    ):
        status, _, err = script(retrieve, "--run", trained, "--text", text)
        assert status == 0 and (note in err if note else "note" not in err)
    shutil.copytree(trained, tmp_path / "shared")  # without its captions, nobody knows what it has read
    (tmp_path / "shared/split.csv").unlink()
    weights = read_safetensors(trained / "adapter.safetensors")[1]["base"]["weights"]
    flags = "--run", "shared", "--weights", weights, "--data", pictures / "images"
    status, _, err = script(retrieve, *flags, "--text", "a cat")
    assert status == 0 and "never saw" not in err, err


def test_words_by_hand():
    found = words("The left ear-drum, “perforated” at 7 o'clock; no T1a.")
    assert found == ["left", "ear", "drum", "perforated", "7", "o'clock", "t1a"]
    assert words("कान का परदा") == ["कान", "का", "परदा"]
    assert words("左耳") == [] and words("tai trái") == ["tai", "trái"]
    settings = SimpleNamespace(weights="phantom")
    metadata = SimpleNamespace(classes=["ear-left"], prompts={"ear-left": ["a left eardrum"]}, settings=settings)
    vocabulary = Vocabulary(metadata, {"wax"})
    assert vocabulary.note("left ears, eardrums and some wax") == ""
    assert vocabulary.note("a cat in the left ear") == "training never saw: cat"
    assert vocabulary.note("a purring cat, left") == "training never saw: purring, cat; probably nothing here matches"
    assert Vocabulary(metadata, None).note("a cat") == ""


def test_nothing_but_the_querys_own_group_is_said(script, trained, pictures, tmp_path):
    rows = [
        row for row in csv.DictReader(io.StringIO((pictures / "manifest.csv").read_text())) if "left 0" in row["group"]
    ]
    lines = ["image,label,group", *(f"{pictures / row['image']},{row['label']},{row['group']}" for row in rows)]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    flags = "--run", trained, "--data", tmp_path / "m.csv", "--image", pictures / rows[0]["image"]
    assert len(rows) == 2 and "query's own group" in mistake(script(retrieve, *flags))


def test_a_folders_name_is_a_label_only_if_the_run_knows_it(script, trained, pictures, tmp_path):
    for name, label in (("Half Left", "half-left"), ("holiday", "half-right")):
        (tmp_path / "other" / name).mkdir(parents=True)
        shutil.copy(pictures / "images" / label / "0.png", tmp_path / "other" / name / f"{label}.png")
    status, out, _ = script(retrieve, "--run", trained, "--data", tmp_path / "other", "--text", "red", "--json")
    assert status == 0
    assert {Path(r["image"]).stem: r["class"] for r in json.loads(out)} == {
        "half-left": "half-left",
        "half-right": None,
    }


def test_an_answer_begins_with_what_it_is_from(script, trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    _, _, err = script(retrieve, "--run", trained, "--text", "red")
    line = next(line for line in err.splitlines() if "images" in line)
    assert str(trained) in line and ": 18 images, 3 classes; held out: accuracy " in line
    assert f"accuracy {metrics['accuracy']:.3f}" in line and line.endswith("not a medical device")
