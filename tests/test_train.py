"""train.py as a user runs it, on small pictures drawn here."""

import csv
import json
import shutil

import pytest
import torch
from conftest import mistake
from safetensors.torch import load_file, save_file
from shapes import SHAPES

import build
import checkpoint
import classify
import phantom
import retrieve
import train


def test_a_run_holds_what_the_design_says(trained):
    tensors, info = checkpoint.read_safetensors(trained / "adapter.safetensors")
    assert not any("base" in name or "mlp" in name for name in tensors)
    assert {"head", "clip.logit_scale", "fusion.mix.weight"} < tensors.keys()
    assert any("lora_A" in name for name in tensors)
    assert info["classes"] == sorted(SHAPES) and info["prompts"].keys() == SHAPES.keys()
    assert len(info["base"]["fingerprint"]) == 16
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    final = json.loads((trained / "metrics.json").read_text())
    figures = ("accuracy", "macro_f1", "i2i_recall@1", "i2i_mrr", "t2i_recall@1", "t2i_mrr", "t2i_caption_mrr")
    best = lines[final["step"] - 1]
    assert all(final[key] == best[key] for key in figures)
    assert 0 <= final["zero_shot_accuracy"] <= 1 and final["train_seconds"] > 0


def test_only_the_adapters_and_new_parts_change(trained, base, pictures):
    before, _ = build.load_base(str(base))
    model, _, _ = build.load_run(trained, torch.device("cpu"))
    for tower in ("visual", "text"):
        build.prepare(model, tower)
    for name, tensor in before.state_dict().items():
        after = model.clip.state_dict()[name.replace("_proj.", "_proj.base.")]
        adapted = "attn" in name and name.endswith("weight")  # merged for inference
        assert torch.equal(tensor, after) != (adapted or name == "logit_scale"), name


@pytest.mark.parametrize("extra", [[], ["--split", "random", "--full", "--fusion", "none"], ["--fusion", "slerp"]])
def test_an_interrupted_training_ends_with_the_same_bits(script, pictures, base, tmp_path, monkeypatch, extra):
    arguments = ["--data", pictures / "manifest.csv", "--weights", base, "--steps", 20, "--batch-size", 5, *extra]
    assert script(train, *arguments, "--run", tmp_path / "whole")[0] == 0

    step, calls = train.Optimization.step, []

    def interrupted(self, loss, number):
        calls.append(number)
        if number == 7:  # in the fourth round, of steps 6 and 7, and the third epoch, of steps 6 to 8
            raise KeyboardInterrupt
        return step(self, loss, number)

    monkeypatch.setattr(train.Optimization, "step", interrupted)
    assert script(train, *arguments, "--run", tmp_path / "broken")[0] == 130
    monkeypatch.setattr(train.Optimization, "step", step)
    status, out, _ = script(train, "--resume", "--run", tmp_path / "broken", "--workers", 0)
    assert status == 0 and "resuming after step 6" in out
    for name in ("adapter", "last"):
        whole, broken = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "broken"))
        assert whole.keys() == broken.keys()
        assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "broken/metrics.jsonl").read_text()


def test_training_from_scratch_learns_and_answers_without_the_base(script, pictures, tmp_path):
    arguments = ["--data", pictures / "images", "--weights", "scratch", "--steps", 36, "--batch-size", 6]
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
    assert script(train, "--data", manifest, "--weights", base, "--steps", 1, "--run", tmp_path / "run")[0] == 0
    final = json.loads((tmp_path / "run/metrics.json").read_text())
    assert final["split"] == "test"
    assert final["accuracy"] * 4 == pytest.approx(round(final["accuracy"] * 4))  # 4 test images


def test_without_data_phantoms_are_drawn_once_trained_on_and_searched(script, tmp_path, monkeypatch):
    monkeypatch.setattr(phantom, "DEFAULT", tmp_path / "phantoms")
    write = phantom.write_dataset
    monkeypatch.setattr(phantom, "write_dataset", lambda folder: write(folder, count=28))
    status, _, err = script(train, "--steps", 1, "--run", "runs/a")
    assert status == 0 and "drawing" in err
    _, info = checkpoint.read_safetensors(tmp_path / "runs/a/adapter.safetensors")
    assert info["settings"]["data"] == info["settings"]["weights"] == "phantom"
    assert info["classes"] == sorted(phantom.CLASSES)
    status, out, err = script(retrieve, "--text", "left ear", "--top", 3, "--json")
    assert status == 0 and "drawing" not in err, err
    assert all(str(tmp_path / "phantoms") in result["image"] for result in json.loads(out))
    status, out, _ = script(classify, "--json")
    assert status == 0 and len(json.loads(out)) == 28 + 14


def test_resuming_on_other_base_weights_is_refused(script, pictures, base, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("model.safetensors", "merges.txt"):
        (folder / name).write_bytes((base / name).read_bytes())
    run = tmp_path / "run"
    assert script(train, "--data", pictures / "images", "--weights", folder, "--steps", 1, "--run", run)[0] == 0
    (run / "metrics.json").unlink()  # as if it were interrupted just before its end
    tensors = {name: tensor + 1 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    assert "other weights" in mistake(script(train, "--resume", "--run", run))


def test_the_split_is_kept_and_resuming_goes_on_with_it(script, pictures, base, tmp_path):
    arguments = ["--data", pictures / "images", "--weights", base, "--steps", 1, "--fold", "2/3"]
    status, out, _ = script(train, *arguments, "--run", tmp_path / "run")
    assert status == 0 and "12 train, 6 val" in out and "half-left    4 train, 2 val" in out
    rows = list(csv.DictReader((tmp_path / "run/split.csv").open()))
    assert sorted(row["split"] for row in rows) == ["train"] * 12 + ["val"] * 6


def test_copies_of_a_picture_are_reported(script, pictures, base, tmp_path):
    shutil.copytree(pictures / "images", tmp_path / "images")
    shutil.copy(tmp_path / "images/half-left/0.png", tmp_path / "images/half-left/copy.png")
    arguments = ["--data", tmp_path / "images", "--weights", base, "--steps", 1]
    assert "1 picture found more than once" in script(train, *arguments, "--run", tmp_path / "a")[1]
    assert "more than once" not in script(train, *arguments, "--run", tmp_path / "b", "--duplicates", "ignore")[1]
