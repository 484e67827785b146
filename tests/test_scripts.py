"""train.py, classify.py and retrieve.py as a user runs them, on small pictures drawn here."""

import csv
import io
import json
import os
import random
import sys

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import ablate
import checkpoint
import classify
import phantom
import retrieve
import runs
import train
from checkpoint import load_clip, save_clip
from errors import run_script
from metrics import retrieval_metrics
from model import CLIP, CLIPConfig
from tokenizer import Tokenizer, learn_merges, save_merges
from weights import export

SHAPES = {"half-left": ("left", "red"), "half-right": ("right", "red"), "field-green": ("all", "green")}


def draw(place, colour, rng):
    """A grey image whose left or right half, or all of it but the rim, has a colour."""
    image = Image.new("RGB", (80, 64), (40 + rng.randrange(20),) * 3)
    left, right = {"left": (0, 39), "right": (40, 79), "all": (4, 75)}[place]
    ImageDraw.Draw(image).rectangle((left, rng.randrange(4), right, 63 - rng.randrange(4)), fill=colour)
    return image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with a sub-folder for each of three classes, 6 images each, and a manifest of the same."""
    folder, rng = tmp_path_factory.mktemp("pictures"), random.Random(0)
    rows = []
    for label, (place, colour) in SHAPES.items():
        (folder / "images" / label).mkdir(parents=True)
        for i in range(6):
            file = folder / "images" / label / f"{i}.png"
            draw(place, colour, rng).save(file)
            rows.append([f"images/{label}/{i}.png", label, f"a {colour} shape, {place}", f"{label} {i // 2}"])
    with open(folder / "manifest.csv", "w", newline="") as f:
        csv.writer(f).writerows([["image", "label", "caption", "group"], *rows])
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A pretrained base model, small and random, as a user would have it: model.safetensors and merges.txt."""
    folder = tmp_path_factory.mktemp("base")
    save_merges(
        learn_merges(["red and green shapes on the left and on the right of all images"] * 2, 40), folder / "merges.txt"
    )
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 16, "vision_width": 64, "text_width": 64, "embed_dim": 64}
    clip = CLIP(CLIPConfig(**sizes, vision_layers=4, text_layers=2, vocab_size=len(Tokenizer(folder)))).initialize()
    save_clip(clip, folder / "model.safetensors")
    return folder


@pytest.fixture
def script(monkeypatch, tmp_path, capsys):
    """Run a script's main with arguments in an empty folder → (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            run_script(module.main)
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def trained(pictures, base, tmp_path_factory):
    """A run of adapters on the small base model."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    arguments = ["train.py", "--data", pictures / "manifest.csv", "--weights", base, "--run", run, "--epochs", 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, arguments), "--lr", "3e-3", "--device", "cpu"])
        train.main()
    return run


# ---------------------------------------------------------------------------------------------------------------------
# train.py


def test_a_run_holds_what_the_design_says(trained):
    tensors, info = checkpoint.read_safetensors(trained / "adapter.safetensors")
    assert not any("base" in name or "mlp" in name for name in tensors)
    assert {"head", "clip.logit_scale", "fusion.gates"} < tensors.keys()
    assert any("lora_A" in name for name in tensors)
    assert info["classes"] == sorted(SHAPES) and info["prompts"].keys() == SHAPES.keys()
    assert len(info["base"]["fingerprint"]) == 16
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    final = json.loads((trained / "metrics.json").read_text())
    figures = ("accuracy", "macro_f1", "i2i_recall@1", "i2i_mrr", "t2i_recall@1", "t2i_mrr", "t2i_finding_mrr")
    best = lines[final["epoch"] - 1]
    assert all(final[key] == best[key] for key in figures)
    assert 0 <= final["zero_shot_accuracy"] <= 1 and final["train_seconds"] > 0


def test_only_the_adapters_and_new_parts_change(trained, base, pictures):
    before, _ = checkpoint.load_base(str(base))
    model, _, _ = runs.load_run(trained, torch.device("cpu"))
    for name, tensor in before.state_dict().items():
        after = model.clip.state_dict()[name.replace("_proj.", "_proj.base.")]
        adapted = "attn" in name and name.endswith("weight")  # merged for inference
        assert torch.equal(tensor, after) != (adapted or name == "logit_scale"), name


@pytest.mark.parametrize("extra", [[], ["--split", "random", "--full", "--fusion", "none"], ["--fusion", "slerp"]])
def test_an_interrupted_training_ends_with_the_same_bits(script, pictures, base, tmp_path, monkeypatch, extra):
    arguments = ["--data", pictures / "manifest.csv", "--weights", base, "--epochs", 3, "--batch-size", 5, *extra]
    assert script(train, *arguments, "--run", tmp_path / "whole")[0] == 0

    step, calls = train.Optimization.step, []

    def interrupted(self, loss, number):
        calls.append(number)
        if number == 4:  # in the second epoch
            raise KeyboardInterrupt
        return step(self, loss, number)

    monkeypatch.setattr(train.Optimization, "step", interrupted)
    assert script(train, *arguments, "--run", tmp_path / "broken")[0] == 130
    monkeypatch.setattr(train.Optimization, "step", step)
    status, out, _ = script(train, "--resume", "--run", tmp_path / "broken", "--workers", 0)
    assert status == 0 and "resuming after epoch 1" in out
    for name in ("adapter", "last"):
        whole, broken = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "broken"))
        assert whole.keys() == broken.keys()
        assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "broken/metrics.jsonl").read_text()


def test_training_from_scratch_learns_and_answers_without_the_base(script, pictures, tmp_path):
    arguments = ["--data", pictures / "images", "--weights", "scratch", "--epochs", 12, "--batch-size", 6]
    status, out, _ = script(train, *arguments, "--run", tmp_path / "scratch")
    assert status == 0, out
    losses = [json.loads(line)["loss"] for line in (tmp_path / "scratch/metrics.jsonl").read_text().splitlines()]
    assert min(losses) < 0.8 * losses[0]
    status, out, _ = script(classify, "--run", tmp_path / "scratch", pictures / "images", "--json")
    assert status == 0 and len(json.loads(out)) == 18


def test_a_test_split_is_what_the_final_figures_come_from(script, pictures, base, tmp_path):
    rows = list(csv.DictReader((pictures / "manifest.csv").read_text().splitlines()))
    for i, row in enumerate(rows):
        row |= {"image": str(pictures / row["image"]), "split": ["train", "train", "val", "test"][i % 4]}
    manifest = tmp_path / "split.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    assert script(train, "--data", manifest, "--weights", base, "--epochs", 1, "--run", tmp_path / "run")[0] == 0
    final = json.loads((tmp_path / "run/metrics.json").read_text())
    assert final["split"] == "test"
    assert final["accuracy"] * 4 == pytest.approx(round(final["accuracy"] * 4))  # 4 test images


def test_flips_swap_sides_or_do_not_happen(pictures):
    samples = train.load_dataset(pictures / "manifest.csv")
    prompts = {name: [f"prompt {name}"] for name in SHAPES}
    info = {"prompts": prompts, "settings": {"seed": 0, "batch_size": 4, "flip": "swap"}}
    items = [
        item for epoch in range(3) for batch in train.training_items(samples, info, epoch, 32, 0) for item in batch
    ]
    assert len(items) == 3 * len(samples)
    seen, columns = [], torch.arange(32.0)
    for pixels, label, prompt, caption in items:
        assert prompt == f"prompt {label}"
        red = torch.from_numpy(pixels[..., 0].astype(float) - pixels[..., 1]).clamp(min=0).sum(0)  # in each column
        if "half" in label and red[[0, -1]].max() > 10 * red[[0, -1]].min():
            side = "left" if (red * columns).sum() / red.sum() < columns.mean() else "right"
            assert label == f"half-{side}" and side in caption
            seen.append(label)
    assert min(seen.count("half-left"), seen.count("half-right")) > 5
    one_sided = [s for s in samples if s.label != "half-right"]
    info["prompts"] = {name: texts for name, texts in prompts.items() if name != "half-right"}
    labels = [label for batch in train.training_items(one_sided, info, 0, 32, 0) for _, label, _, _ in batch]
    assert "half-right" not in labels

    info["prompts"], info["settings"]["flip"] = prompts, "naive"
    items = [item for batch in train.training_items(samples, info, 0, 32, 0) for item in batch]
    assert sorted(label for _, label, _, _ in items) == sorted(sample.label for sample in samples)
    centres = {}
    for pixels, label, _, _ in items:
        red = torch.from_numpy(pixels[..., 0].astype(float) - pixels[..., 1]).clamp(min=0).sum(0)
        centres.setdefault(label, []).append(float((red * columns).sum() / red.sum()) if red.sum() else 0.0)
    for label in ("half-left", "half-right"):
        assert min(centres[label]) < 14 and max(centres[label]) > 18  # mirrored, and still called what it was


def test_images_of_the_same_group_are_not_searched(pictures, base):
    samples = train.load_dataset(pictures / "manifest.csv")
    model, tokenizer = checkpoint.load_base(str(base))
    model = train.assemble(model, {"full": True, "levels": None, "fusion": "none"}, len(SHAPES)).eval()
    info = {"classes": sorted(SHAPES), "prompts": {name: [name] for name in SHAPES}, "settings": {"batch_size": 8}}

    def evaluate(samples):
        return train.evaluate(model, tokenizer, samples, info, torch.device("cpu"), 0)

    every, one_group = evaluate(samples), evaluate([s for s in samples if s.group.endswith("0")])
    assert one_group["i2i_mrr"] is None and one_group["t2i_mrr"] is not None
    images = runs.encode_images(model, [s.image for s in samples], torch.device("cpu"), 8, 0)
    similarity = (
        torch.nn.functional.normalize(images.double(), dim=1) @ torch.nn.functional.normalize(images.double()).T
    )
    ranks = []
    for query, scores in zip(samples, similarity.tolist(), strict=True):
        others = sorted(
            (-score, other.label == query.label)
            for other, score in zip(samples, scores, strict=True)
            if other.group != query.group
        )
        ranks.append(1 + [relevant for _, relevant in others].index(True))
    assert every["i2i_mrr"] == pytest.approx(retrieval_metrics(torch.tensor(ranks))["mrr"])
    assert every["class_recall"].keys() == SHAPES.keys()
    assert sum(every["class_recall"].values()) / 3 == pytest.approx(every["accuracy"])  # classes of the same size


def test_without_data_phantoms_are_drawn_once_trained_on_and_searched(script, tmp_path, monkeypatch):
    monkeypatch.setattr(phantom, "DEFAULT", tmp_path / "phantoms")
    write = phantom.write_dataset
    monkeypatch.setattr(phantom, "write_dataset", lambda folder: write(folder, count=28))
    status, _, err = script(train, "--epochs", 1, "--run", "runs/a")
    assert status == 0 and "drawing" in err
    _, info = checkpoint.read_safetensors(tmp_path / "runs/a/adapter.safetensors")
    assert info["settings"]["data"] == info["settings"]["weights"] == "phantom"
    assert info["classes"] == sorted(phantom.CLASSES)
    status, out, err = script(retrieve, "--text", "left ear", "--top", 3, "--json")
    assert status == 0 and "drawing" not in err, err
    assert all(str(tmp_path / "phantoms") in result["image"] for result in json.loads(out))
    status, out, _ = script(classify, "--json")
    assert status == 0 and len(json.loads(out)) == 28


def test_an_exported_run_is_a_base_model(script, pictures, base, tmp_path, trained):
    arguments = ["--data", pictures / "images", "--weights", base, "--epochs", 1, "--lr", 1e-2]
    for run, extra in (("lora", ["--fusion", "none"]), ("full", ["--fusion", "none", "--full"])):
        assert script(train, *arguments, *extra, "--run", tmp_path / run)[0] == 0
        status, out, err = script(export, tmp_path / run, tmp_path / f"{run}-base")
        assert status == 0 and "bytes" in out, err
        model, tokenizer, _ = runs.load_run(tmp_path / run, torch.device("cpu"))
        exported, its_tokenizer = checkpoint.load_base(str(tmp_path / f"{run}-base"))
        pixels, texts = torch.randn(2, 3, 32, 32), ["a red shape", "left"]
        with torch.no_grad():
            torch.testing.assert_close(exported.encode_image(pixels), model.encode_image(pixels), rtol=0.01, atol=0.01)
            tokens, its_tokens = tokenizer(texts), its_tokenizer(texts)
            torch.testing.assert_close(
                exported.encode_text(its_tokens), model.encode_text(tokens), rtol=0.01, atol=0.01
            )
        assert not torch.equal(exported.visual.blocks[0].attn.q_proj.weight,
                               load_clip(base).visual.blocks[0].attn.q_proj.weight)  # fmt: skip
    assert "--fusion none" in mistake(script(export, trained, tmp_path / "fused"))


# ---------------------------------------------------------------------------------------------------------------------
# ablate.py


def test_ablation_averages_runs_over_seeds_and_goes_on_where_it_stopped(script, pictures, base, tmp_path):
    arguments = ["--data", pictures / "manifest.csv", "--weights", base, "--epochs", 1, "--folder", tmp_path / "a"]
    status, out, err = script(ablate, *arguments, "--seeds", 0, 1)
    assert status == 0, err
    rows = [line.split("|")[1].strip() for line in out.splitlines()[2:]]
    assert rows == ["zero-shot", *ablate.PARTS]
    table = json.loads((tmp_path / "a/ablation.json").read_text())["rows"]
    runs_of = {
        "+ LoRA": {"fusion": "none", "slerp": 0, "contrastive": 0},
        "+ multi-level CLS": {"fusion": "gate", "slerp": 0, "contrastive": 0},
        "+ slerp": {"fusion": "gate", "slerp": 0.5, "contrastive": 0},
        "+ contrastive": {"fusion": "gate", "slerp": 0.5, "contrastive": 0.5},
    }
    for name, expected in runs_of.items():
        folders = [tmp_path / "a" / f"{name.strip('+ ').replace(' ', '-')}-{seed}" for seed in (0, 1)]
        for seed, folder in enumerate(folders):
            settings = checkpoint.read_safetensors(folder / "adapter.safetensors")[1]["settings"]
            assert expected.items() <= settings.items() and settings["seed"] == seed
        first, second = (json.loads((folder / "metrics.json").read_text())["t2i_mrr"] for folder in folders)
        assert table[name]["t2i_mrr"]["mean"] == pytest.approx((first + second) / 2)
        assert table[name]["t2i_mrr"]["spread"] == pytest.approx(abs(first - second) / 2**0.5)
    untrained = json.loads((tmp_path / "a/LoRA-0/metrics.json").read_text())["zero_shot_t2i_mrr"]
    assert table["zero-shot"]["t2i_mrr"]["values"][0] == untrained
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").glob("*/metrics.json")}
    assert script(ablate, *arguments, "--seeds", 0, 1)[1] == out
    assert finished == {file: file.stat().st_mtime_ns for file in (tmp_path / "a").glob("*/metrics.json")}
    assert "other flags" in mistake(script(ablate, *arguments, "--batch-size", 4))
    status, _, err = script(ablate, "--data", tmp_path / "nowhere", "--folder", tmp_path / "b")
    assert status == 2 and err.splitlines()[-1].startswith("error: there is no") and "Traceback" not in err


# ---------------------------------------------------------------------------------------------------------------------
# classify.py and retrieve.py


def test_classify_prints_the_same_as_table_json_and_csv(script, trained, pictures):
    folder = pictures / "images" / "half-left"
    _, out, _ = script(classify, "--run", trained, folder, "--json")
    results = json.loads(out)
    assert [r["image"] for r in results] == [str(folder / f"{i}.png") for i in range(6)]
    for r in results:
        assert r["classes"].keys() == SHAPES.keys()
        assert r["probability"] == max(r["classes"].values()) == r["classes"][r["class"]]
        assert sum(r["classes"].values()) == pytest.approx(1, abs=1e-3)
    _, out, _ = script(classify, "--run", trained, folder, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(r["image"], r["class"], float(r["half-left"])) for r in rows] == [
        (r["image"], r["class"], r["classes"]["half-left"]) for r in results
    ]
    _, out, _ = script(classify, "--run", trained, folder / "0.png")
    assert len(out.splitlines()) == 2 and results[0]["class"] in out


def test_retrieve_ranks_by_cosine_for_text_image_and_both(script, trained, pictures, tmp_path):
    example = pictures / "images/field-green/0.png"
    queries = {"text": ["--text", "a green shape"], "image": ["--image", example]}
    queries["both"] = queries["text"] + queries["image"]
    found = {}
    for name, query in queries.items():
        status, out, err = script(retrieve, "--run", trained, *query, "--json", "--top", 20)
        assert status == 0, err
        found[name] = json.loads(out)
        scores = [r["score"] for r in found[name]]
        assert scores == sorted(scores, reverse=True) and [r["rank"] for r in found[name]] == list(
            range(1, len(scores) + 1)
        )
    assert len(found["text"]) == 18 and len(found["image"]) == len(found["both"]) == 17  # not the example itself

    model, tokenizer, _ = runs.load_run(trained, torch.device("cpu"))
    text = runs.encode_texts(model, tokenizer, ["a green shape"], torch.device("cpu"))
    images = runs.encode_images(model, [r["image"] for r in found["text"]], torch.device("cpu"), 8, 0)
    assert torch.cosine_similarity(text, images).tolist() == pytest.approx(
        [r["score"] for r in found["text"]], abs=1e-4
    )
    for mix, name in ((0, "image"), (1, "text")):
        _, out, _ = script(retrieve, "--run", trained, *queries["both"], "--mix", mix, "--json", "--top", 17)
        expected = [r["image"] for r in found[name] if r["image"] != str(example)]
        assert [r["image"] for r in json.loads(out)] == expected


def test_only_new_and_changed_images_are_encoded_again(script, base, pictures, tmp_path, monkeypatch):
    gallery = tmp_path / "gallery"
    for label in SHAPES:
        (gallery / label).mkdir(parents=True)
        for i in range(3):
            (gallery / label / f"{i}.png").write_bytes((pictures / "images" / label / f"{i}.png").read_bytes())
    assert script(train, "--data", gallery, "--weights", base, "--epochs", 1, "--run", "runs/a")[0] == 0
    encoded, encode = [], retrieve.encode_images

    def counted(model, files, *rest):
        encoded.append([file.name for file in files])
        return encode(model, files, *rest)

    monkeypatch.setattr(retrieve, "encode_images", counted)

    def search():
        encoded.clear()
        status, out, err = script(retrieve, "--text", "red", "--json")  # the newest run, and its data
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
    (gallery / "half-left/new.png").unlink()
    assert search()[1] == 0
    (tmp_path / "runs/a/index.safetensors").write_bytes(b"damaged")
    assert search()[1] == 9
    assert script(train, "--data", gallery, "--weights", base, "--epochs", 1, "--run", "runs/b", "--seed", 1)[0] == 0
    assert search()[1] == 9  # the newest run is another model now


def test_the_contact_sheet_shows_every_result(script, trained, pictures, tmp_path):
    sheet = tmp_path / "sheet.png"
    arguments = ["--text", "red " * 60, "--image", pictures / "images/half-left/0.png", "--top", 7, "--sheet", sheet]
    assert script(retrieve, "--run", trained, *arguments)[0] == 0
    image = Image.open(sheet).convert("RGB")
    assert image.width == 5 * (224 + 16) + 16
    cards = [(16 + i % 5 * 240, image.height - (2 - i // 5) * 324) for i in range(10)]
    ranges = [image.crop((x, y, x + 224, y + 224)).convert("L").getextrema() for x, y in cards]
    assert all(high - low > 20 for low, high in ranges[:7]) and all(high == low for low, high in ranges[7:])


def test_a_folder_without_labels_can_be_searched(script, trained, pictures, tmp_path):
    (tmp_path / "flat").mkdir()
    for i, label in enumerate(SHAPES):
        (tmp_path / f"flat/{i}.png").write_bytes((pictures / "images" / label / "0.png").read_bytes())
    status, out, _ = script(retrieve, "--run", trained, "--data", tmp_path / "flat", "--text", "green")
    assert status == 0 and all(line.split()[2].endswith("?") for line in out.splitlines()[1:])


# ---------------------------------------------------------------------------------------------------------------------
# A user's mistakes


def mistake(result):
    """Exit status 2, nothing but one line on standard error that begins with `error: `."""
    status, _, err = result
    lines = err.splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def test_mistakes_with_data_are_one_line(script, pictures, base, tmp_path):
    def training(data, *extra):
        return mistake(script(train, "--data", data, "--weights", base, "--epochs", 1, *extra))

    assert "no" in training(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no images" in training(tmp_path / "empty")
    (tmp_path / "one/only").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"one/only/{i}.png")
    assert "one class" in training(tmp_path / "one")
    (tmp_path / "one/single").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one/single/0.png")
    assert "'single' has one image" in training(tmp_path / "one")
    (tmp_path / "one/single/1.png").write_bytes(b"\x89PNG\r\n\x1a\n nonsense")
    assert "1.png" in training(tmp_path / "one")
    (tmp_path / "prompts.json").write_text('{"hlaf-left": ["a half"]}')
    assert "hlaf-left" in training(pictures / "images", "--prompts", tmp_path / "prompts.json")
    rows = [f"{pictures}/images/half-left/{i}.png,{label},{split}" for i, label, split in
            ((0, "a", "train"), (1, "b", "train"), (2, "c", "val"))]  # fmt: skip
    (tmp_path / "m.csv").write_text("\n".join(["image,label,split", *rows]))
    assert "labels that train lacks: c" in training(tmp_path / "m.csv")


def test_mistakes_with_weights_are_one_line(script, pictures, base, tmp_path):
    def training(weights, *extra):
        return mistake(script(train, "--data", pictures / "images", "--weights", weights, "--epochs", 1, *extra))

    if not (checkpoint.WEIGHTS / "clip-vit-b-16").exists():
        assert "python weights/download.py" in training("clip-vit-b-16")
    assert "python weights/download.py" in training(tmp_path / "nowhere")
    tensors = load_file(base / "model.safetensors")
    tensors["text_projection.weight"] = torch.zeros(64, 63)
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    save_file(tensors, wrong / "model.safetensors")
    assert "text_projection.weight is (64, 63) instead of (64, 64)" in training(wrong)
    save_file(load_file(base / "model.safetensors"), wrong / "model.safetensors")
    assert "merges.txt" in training(wrong)
    save_merges([("a", "b")], wrong / "merges.txt")
    assert "tokens" in training(wrong)
    assert "4 blocks" in training(base, "--levels", "3,9") and "4" in training(base, "--lora-blocks", "12")


def test_other_mistakes_are_one_line(script, trained, base, pictures, tmp_path):
    assert "--resume" in mistake(script(train, "--data", pictures / "images", "--run", trained, "--weights", base))
    assert "finished" in mistake(script(train, "--resume", "--run", trained))
    assert "train.py" in mistake(script(train, "--resume"))
    assert "invalid choice" in mistake(script(train, "--data", pictures, "--fusion", "sum"))
    assert "cuda:7" in mistake(script(train, "--data", pictures, "--device", "cuda:7"))
    assert "train.py" in mistake(script(classify, pictures / "images"))
    assert "nowhere" in mistake(script(classify, tmp_path / "nowhere"))
    (tmp_path / "text.png").write_text("not an image")
    assert "text.png" in mistake(script(classify, "--run", trained, tmp_path / "text.png"))
    assert "--text" in mistake(script(retrieve, "--run", trained))
    assert "--mix" in mistake(script(retrieve, "--run", trained, "--text", "a", "--mix", 2))
    assert ".png" in mistake(script(retrieve, "--run", trained, "--text", "a", "--sheet", "sheet.xyz"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/adapter.safetensors").write_bytes(b"\0" * 100)
    assert "damaged" in mistake(script(classify, "--run", tmp_path / "bad", pictures / "images"))
    other = tmp_path / "other"
    other.mkdir()
    tensors = {name: tensor + 1 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors")
    (other / "merges.txt").write_text((base / "merges.txt").read_text())
    assert "other base weights" in mistake(script(classify, "--run", trained, "--weights", other, pictures / "images"))
