"""ablate.py: the parts, few images, other settings; paired over seeds or folds."""

import csv
import json
from xml.etree import ElementTree

import pytest
from conftest import mistake
from scipy import stats

import ablate
import checkpoint
import train


@pytest.fixture
def ask(script, pictures, base, tmp_path):
    def run(*question):
        arguments = ["--data", pictures / "manifest.csv", "--weights", base, "--steps", 2, "--lr", 1e-2]
        return script(ablate, *arguments, "--folder", tmp_path / "a", *question)

    return run


def table(folder, question):
    return json.loads((folder / f"{question}.json").read_text())["rows"]


def test_every_part_is_switched_off_by_its_own_setting(ask, script, pictures, base, tmp_path):
    status, out, err = ask("--seeds", 0, 1)
    assert status == 0, err
    off = {
        "LoRA": ("lora_rank", 0),
        "levels": ("fusion", "none"),
        "slerp": ("slerp", 0),
        "contrastive": ("contrastive", 0),
    }
    names = {"head": [], "all": list(off)}
    names |= {f"head + {part}": [part] for part in off}
    names |= {f"all but {part}": [other for other in off if other != part] for part in off}
    names |= {"head + LoRA + levels": ["LoRA", "levels"], "head + LoRA + levels + slerp": ["LoRA", "levels", "slerp"]}
    rows = [line.split("|")[1].strip() for line in out.splitlines()[2:]]
    assert set(rows) == {*names, "zero-shot, class names", "zero-shot, prompts", "all but prompts"}
    rows = table(tmp_path / "a", "parts")
    for row, on in names.items():
        folder = tmp_path / "a" / f"{'+'.join(on) or 'head'}-1"
        settings = checkpoint.read_safetensors(folder / "adapter.safetensors")[1]["settings"]
        assert settings["seed"] == 1 and settings["steps"] == 2
        for part, (key, value) in off.items():
            assert (settings[key] == value) != (part in on), row
        assert rows[row]["t2i_mrr"]["values"][1] == json.loads((folder / "metrics.json").read_text())["t2i_mrr"]
    nameless = checkpoint.read_safetensors(tmp_path / "a/names-1/adapter.safetensors")[1]
    assert nameless["prompts"] == {name: [name] for name in nameless["classes"]}
    # The untrained model, asked by name and by prompts: without training, a run of one step at no learning rate.
    for row, prompts in (
        ("zero-shot, class names", ["--prompts", tmp_path / "names.json"]),
        ("zero-shot, prompts", []),
    ):
        (tmp_path / "names.json").write_text(json.dumps(nameless["prompts"]))
        arguments = ["--data", pictures / "manifest.csv", "--weights", base, "--steps", 1, "--lr", 0, "--seed", 1]
        assert script(train, *arguments, *prompts, "--run", tmp_path / row)[0] == 0
        untrained = json.loads((tmp_path / row / "metrics.json").read_text())["t2i_mrr"]
        assert rows[row]["t2i_mrr"]["values"][1] == pytest.approx(untrained)
    assert rows["zero-shot, class names"]["t2i_mrr"] != rows["zero-shot, prompts"]["t2i_mrr"]


def test_an_interrupted_ablation_goes_on_and_another_is_refused(ask, tmp_path):
    status, out, _ = ask("--seeds", 0, 1)
    assert status == 0
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").glob("*/metrics.json")}
    (tmp_path / "a/head-0/metrics.json").unlink()  # as if it had been interrupted there
    status, again, err = ask("--seeds", 0, 1)
    assert again == out and "1 training in" in err
    changed = {file for file, time in finished.items() if file.stat().st_mtime_ns != time}
    assert changed == {tmp_path / "a/head-0/metrics.json"}
    assert "other settings" in mistake(ask("--batch-size", 4))
    assert "one question" in mistake(ask("--parts", "--vary", "lr=1"))
    assert "--seeds" in mistake(ask("--seed", 3))


def test_a_difference_has_students_interval():
    own, other = [0.5, 0.7, 0.9, 0.8], [0.4, 0.7, 0.7, 0.75]

    def metrics(values):
        return [{"accuracy": value, "by_class": {"a": {"images": 10}}} for value in values]

    summary = ablate.summarize({"row": (metrics(own), metrics(other))})["row"]["accuracy"]
    differences = [a - b for a, b in zip(own, other, strict=True)]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    assert summary["mean"] == pytest.approx(sum(own) / 4)
    assert summary["difference"] == pytest.approx((low + high) / 2)
    assert summary["interval"] == pytest.approx((high - low) / 2, rel=1e-3)
    for n, t in enumerate(ablate.STUDENT, start=2):
        assert t == pytest.approx(stats.t.ppf(0.975, n - 1), abs=1e-3)


def test_folds_hold_out_every_image_once_and_count_by_their_images(ask, pictures, tmp_path):
    status, out, err = ask("--split", "group", "--folds", 4, "--vary", "fusion=none")
    assert status == 0 and out.startswith("| 4 folds |"), err
    held_out, correct = [], 0
    for k in (1, 2, 3, 4):
        run = tmp_path / f"a/fusion=none-fold-{k}-of-4"
        held_out += [row["image"] for row in csv.DictReader((run / "split.csv").open()) if row["split"] == "val"]
        by_class = json.loads((run / "metrics.json").read_text())["by_class"].values()
        correct += sum(row["images"] * (row["recall"] or 0) for row in by_class)
    assert sorted(held_out) == sorted(str(file) for file in (pictures / "images").rglob("*.png"))
    assert table(tmp_path / "a", "vary")["fusion=none"]["accuracy"]["mean"] == pytest.approx(correct / 18)


def test_shots_are_so_many_images_of_each_class_and_the_same_are_held_out(ask, tmp_path):
    status, out, err = ask("--seeds", 0, "--shots", "1,3")
    assert status == 0 and "3 images, LoRA" in out, err
    splits = {}
    for shots in (1, 3):
        rows = list(csv.DictReader((tmp_path / f"a/head-{shots}-shots-0/split.csv").open()))
        splits[shots] = {side: {row["image"] for row in rows if row["split"] == side} for side in ("train", "val")}
        assert len(splits[shots]["train"]) == 3 * shots
    assert splits[1]["val"] == splits[3]["val"] and splits[1]["train"] < splits[3]["train"]
    picture = ElementTree.parse(tmp_path / "a/shots.svg").getroot()
    words = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert {"accuracy", "zero-shot", "LoRA", "1", "3"} <= set(words)


def test_a_setting_is_varied_as_train_py_takes_it(ask, tmp_path):
    status, _, err = ask("--seeds", 0, "--vary", "lora-rank=2 levels=1,3")
    assert status == 0, err
    settings = checkpoint.read_safetensors(tmp_path / "a/lora-rank=2 levels=1,3-0/adapter.safetensors")[1]["settings"]
    assert settings["lora_rank"] == 2 and settings["levels"] == [1, 3] and settings["steps"] == 2
    for text, says in (
        ("lora-rank=-1", "--lora-rank"),
        ("split=random", "changes no setting"),
        ("shots=4", "no setting"),
    ):
        status, _, err = ask("--seeds", 0, "--vary", text)
        assert status == 2 and says in err.splitlines()[-1] and "Traceback" not in err


def test_the_table_names_what_a_line_is_compared_with_and_marks_what_is_more_than_chance():
    figure = {"mean": 0.5, "values": [0.5] * 3}
    rows = {"base": {"accuracy": figure}}
    for name, difference, interval in (
        ("more", 0.2, 0.1),
        ("less", -0.2, 0.1),
        ("chance", 0.1, 0.2),
        ("same", 0.1, None),
    ):
        rows[name] = {"accuracy": figure | {"difference": difference, "interval": interval}}
    lines = ablate.markdown(rows, dict.fromkeys(rows, "base") | {"base": None}, "3 seeds").splitlines()
    assert lines[0] == "| 3 seeds | compared with | accuracy |"
    assert lines[2:] == [
        "| base |  | 0.500 |",
        "| more | base | 0.500 **(+0.200 ± 0.100)** |",
        "| less | base | 0.500 **(-0.200 ± 0.100)** |",
        "| chance | base | 0.500 (+0.100 ± 0.200) |",
        "| same | base | 0.500 (+0.100) |",
    ]


def test_each_part_is_compared_with_the_line_that_lacks_it_alone():
    for full in (False, True):
        rows = ablate.rows_of_parts(full)
        for name, row in rows.items():
            if not row.against or not row.trained or not rows[row.against].trained:
                continue
            on, without = ({*r.variant.name.split("+")} - {"head"} for r in (row, rows[row.against]))
            if "prompts" not in name:
                assert len(on ^ without) == 1, name
