"""evaluate.py: figures of held-out and of other images."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import mistake
from shapes import SHAPES

import build
import classify
import encoding
import evaluate
import train
from data import Sample, load_dataset
from fusion import FusedCLIP
from metrics import (
    classification_intervals,
    first_relevant_ranks,
    interval,
    ranks_in_resamples,
    resample,
    retrieval_metrics,
)


def test_images_of_the_same_group_are_not_searched(pictures, base):
    samples = load_dataset(pictures / "manifest.csv")
    model, tokenizer = build.load_base(str(base))
    model = FusedCLIP(model, len(SHAPES), mode="none").eval()
    metadata = SimpleNamespace(classes=sorted(SHAPES), prompts={name: [name] for name in SHAPES})

    def figures(samples):
        seen = evaluate.see(model, samples, metadata.classes, torch.device("cpu"), 8, 0)
        return evaluate.evaluate(model, tokenizer, seen, metadata, torch.device("cpu"))

    every, one_group = figures(samples), figures([s for s in samples if s.group.endswith("0")])
    assert one_group["i2i_mrr"] is None and one_group["t2i_mrr"] is not None
    images = encoding.encode_images(model, [s.image for s in samples], torch.device("cpu"), 8, 0)
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
    recalls = [row["recall"] for row in every["by_class"].values()]
    assert every["by_class"].keys() == SHAPES.keys()
    assert [sum(row) for row in every["confusion"]] == [row["images"] for row in every["by_class"].values()]
    assert sum(recalls) / 3 == pytest.approx(every["accuracy"])  # classes of the same size


def test_a_runs_own_held_out_images_give_exactly_its_metrics(script, trained):
    status, out, err = script(evaluate, "--run", trained, "--json")
    assert status == 0 and "val" in err
    figures, metrics = json.loads(out), json.loads((trained / "metrics.json").read_text())
    assert {key: metrics[key] for key in figures} == figures
    rest = {key for key in metrics if not key.startswith("zero_shot_")} - figures.keys()
    assert rest == {"split", "step", "train_seconds"}


def test_the_table_shows_every_class_and_search(script, trained):
    _, out, _ = script(evaluate, "--run", trained, "--json")
    figures = json.loads(out)
    status, out, _ = script(evaluate, "--run", trained)
    assert status == 0
    rows = {line.split("  ")[0]: line.split()[-3:] for line in out.splitlines()}
    for name in SHAPES:
        row = figures["by_class"][name]
        shown = ["–" if row[key] is None else f"{row[key]:.3f}" for key in ("recall", "precision")]
        assert rows[name] == [str(row["images"]), *shown]
    assert rows["text→image, same caption"][-1] == f"{figures['t2i_caption_mrr']:.3f}"
    assert f"accuracy {figures['accuracy']:.3f}\n" in out and "intervals" not in figures  # of three groups


def test_intervals_are_of_whole_groups_and_only_of_queries_that_have_an_answer():
    """Thirty groups of two images; the last group's class has no other, so its images are no queries."""
    torch.manual_seed(0)
    groups = torch.arange(60) // 2
    labels = (groups % 2).masked_fill(groups == 29, 2)
    images, prompts, prompt_labels = torch.randn(60, 8), torch.randn(3, 8), torch.arange(3)
    predictions = torch.randint(3, (60,))
    figures = {"accuracy": [], "i2i_recall@1": [], "t2i_mrr": []}
    same_group, relevant = groups[:, None] == groups, labels[:, None] == labels
    ranks, weights = first_relevant_ranks(images, images, relevant, same_group), resample(groups)
    assert ranks.isnan().sum() == 2
    redrawn = ranks_in_resamples(prompts, images, prompt_labels[:, None] == labels, weights)
    found = classification_intervals(labels, predictions, 3, weights)
    found |= evaluate._search_intervals(ranks, redrawn, weights)
    for drawn in weights.long():
        rows = torch.arange(60).repeat_interleave(drawn)
        figures["accuracy"].append((labels[rows] == predictions[rows]).double().mean())
        figures["i2i_recall@1"].append((ranks[rows[rows < 58]] == 1).double().mean())
        searched = first_relevant_ranks(prompts, images[rows], prompt_labels[:, None] == labels[rows])
        figures["t2i_mrr"].append((1 / searched.double()).nanmean())
    for key, values in figures.items():
        assert found[key] == pytest.approx(interval(torch.stack(values))), key


def test_other_labelled_images_are_all_evaluated(script, trained, pictures):
    status, out, err = script(evaluate, "--run", trained, "--data", pictures / "images", "--json")
    figures = json.loads(out)
    assert "the run was trained on 12 of them" in err
    assert status == 0 and [row["images"] for row in figures["by_class"].values()] == [6, 6, 6]
    _, out, _ = script(classify, "--run", trained, "--json", pictures / "images")
    right = [result["class"] in result["image"] for result in json.loads(out)]
    assert figures["accuracy"] == pytest.approx(sum(right) / 18)
    assert "t2i_caption_mrr" not in figures
    _, out, _ = script(evaluate, "--run", trained, "--data", pictures / "images")
    low, high = figures["intervals"]["accuracy"]
    assert low < high and f"accuracy {figures['accuracy']:.3f}, 95 % interval {low:.3f}–{high:.3f}\n" in out
    ends = ["–".join(f"{end:.3f}" for end in figures["intervals"][f"i2i_{key}"]) for key in ("recall@1", "mrr")]
    assert next(line for line in out.splitlines() if line.startswith("image→image")).endswith(", ".join(ends))


def test_a_part_of_the_classes_is_enough(script, trained, pictures, tmp_path):
    for label in ("half-left", "half-right"):
        shutil.copytree(pictures / "images" / label, tmp_path / "other" / label)
    status, out, err = script(evaluate, "--run", trained, "--data", tmp_path / "other")
    assert status == 0 and "note:" not in err
    assert next(line for line in out.splitlines() if line.startswith("field-green")).split()[1:3] == ["0", "–"]


def test_images_that_cannot_be_evaluated_are_one_line(script, trained, pictures, tmp_path):
    one_class = pictures / "images" / "half-left"
    assert "has no label" in mistake(script(evaluate, "--run", trained, "--data", one_class))
    shutil.copytree(one_class, tmp_path / "other" / "half-top")
    shutil.copytree(one_class, tmp_path / "other" / "half-left")
    line = mistake(script(evaluate, "--run", trained, "--data", tmp_path / "other"))
    assert "does not know: half-top;" in line and "half-right" in line


def test_signs_tell_classes_apart(script, pictures, base, tmp_path, trained):
    for old, new in (("half-left", "HPV+"), ("half-right", "HPV-")):
        shutil.copytree(pictures / "images" / old, tmp_path / "data" / new)
    flags = ["--weights", base, "--steps", 1, "--device", "cpu", "--run", tmp_path / "run"]
    assert script(train, "--data", tmp_path / "data", *flags)[0] == 0
    shutil.move(tmp_path / "data/HPV-", tmp_path / "data/HPV")
    assert "does not know: HPV;" in mistake(script(evaluate, "--run", tmp_path / "run", "--data", tmp_path / "data"))


def test_searches_for_captions_and_matches_by_hand():
    angles = torch.tensor([0.0, 10.0, 30.0, 100.0]).deg2rad()
    images = torch.stack([angles.cos(), angles.sin()], 1)
    files = [Path(f"{i}.png") for i in range(4)]
    captions = [("red", "large"), ("red",), ("large",), ()]
    matches = [files[2], files[0], None, Path("elsewhere.png")]
    samples = [Sample(*row[:1], "x", row[1], match=row[2]) for row in zip(files, captions, matches, strict=True)]
    found = evaluate._match_search(samples, images)
    # Image 0 finds 1 before its match 2; image 1 finds its match 0 first; image 3's is not among them.
    assert found["i2i_match"].tolist() == [2, 1]
    texts = torch.stack([angles[[1, 3]].cos(), angles[[1, 3]].sin()], 1)  # "red" points at image 1, "large" at image 3
    found = evaluate._caption_searches(samples, ["red", "large"], images, texts, torch.eye(4, dtype=torch.bool))
    # Image 0 shares a caption with 1 and 2, and finds 1 first; image 1 finds 0 first; image 2 finds 1, then 0.
    assert found["i2i_caption"][:3].tolist() == [1, 1, 2] and found["i2i_caption"][3].isnan()
    assert found["t2i_caption"].tolist() == [1, 2]  # "large": 3, then 2
    assert evaluate._match_search(samples[2:], images[2:]) == {}
