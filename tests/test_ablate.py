"""ablate.py: the method part by part."""

import csv
import json

import pytest
from conftest import mistake

import ablate
import checkpoint


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
    script(ablate, "--data", tmp_path / "elsewhere", "--folder", tmp_path / "b")  # nothing is trained: it may be mended
    status, _, err = script(ablate, "--data", tmp_path / "nowhere", "--folder", tmp_path / "b")
    assert status == 2 and err.splitlines()[-1].startswith("error: there is no") and "Traceback" not in err


def test_folds_hold_out_every_image_once(script, pictures, base, tmp_path):
    arguments = ["--data", pictures / "manifest.csv", "--weights", base, "--epochs", 1, "--folder", tmp_path / "a"]
    status, out, err = script(ablate, *arguments, "--split", "group", "--folds", 3)
    assert status == 0 and out.startswith("| "), err
    held_out = []
    for k in (1, 2, 3):
        rows = csv.DictReader((tmp_path / f"a/LoRA-fold-{k}/split.csv").open())
        held_out += [row["image"] for row in rows if row["split"] == "val"]
    assert sorted(held_out) == sorted(str(file) for file in (pictures / "images").rglob("*.png"))
