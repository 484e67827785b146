"""runs.py: interrupted and simultaneous trainings, moved folders, paths that a run from elsewhere names."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import mistake
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shapes import SHAPES

import build
import classify
import evaluate
import optimization
import retrieve
import runs
import train
import trust

ROOT = Path(__file__).parents[1]


def arguments(data, base, *extra):
    flags = ["--data", data, "--weights", base, "--batch-size", 6, "--device", "cpu", "--workers", 0, *extra]
    return flags if "--steps" in extra else [*flags, "--steps", 10]


def interrupt(monkeypatch, at, problem=KeyboardInterrupt):
    """Let step number `at` of the next training end in an exception."""
    step = optimization.Optimization.step

    def interrupted(self, loss, number):
        if number == at:
            monkeypatch.setattr(optimization.Optimization, "step", step)
            raise problem
        return step(self, loss, number)

    monkeypatch.setattr(optimization.Optimization, "step", interrupted)


# ---------------------------------------------------------------------------------------------------------------------
# At once


def test_trainings_at_once_get_a_folder_each(pictures, base, tmp_path):
    flags = list(map(str, arguments(pictures / "images", base, "--steps", 2)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    started = [subprocess.Popen([*command, "--seed", str(seed)], cwd=tmp_path, env=environment) for seed in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    made = list((tmp_path / "runs").glob("*/metrics.json"))
    seeds = {runs.Metadata.read(_stored(file.with_name("adapter.safetensors")), file).settings.seed for file in made}
    assert len(made) == 3 and seeds == {0, 1, 2}


def test_two_trainings_into_one_folder_are_refused(script, pictures, base, tmp_path):
    flags = arguments(pictures / "images", base, "--run", tmp_path / "run")
    (tmp_path / "run").mkdir()
    with runs.claimed(tmp_path / "run"):
        code = f"import sys; sys.argv = {['train.py', *map(str, flags)]!r}; import train, errors\n"
        command = [sys.executable, "-c", code + "errors.run_script(train.main)"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "another training writes to" in result.stderr
    assert script(train, *flags)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted


def test_an_interruption_in_the_first_round_can_be_resumed_and_says_how(script, pictures, base, tmp_path, monkeypatch):
    interrupt(monkeypatch, at=0)
    status, _, err = script(train, *arguments(pictures / "images", base))
    run = next((tmp_path / "runs").iterdir())
    assert status == 130
    assert err.splitlines()[-1] == f"interrupted; go on with: python train.py --resume --run runs/{run.name}"
    assert "--resume" in mistake(script(train, *arguments(pictures / "images", base, "--run", run)))
    status, out, _ = script(train, "--resume", "--workers", 0)  # the newest unfinished run
    assert status == 0 and "resuming after step 0" in out


def test_without_a_name_the_newest_unfinished_run_is_resumed(script, pictures, base, tmp_path, monkeypatch):
    interrupt(monkeypatch, at=5)
    assert script(train, *arguments(pictures / "images", base, "--run", "runs/broken"))[0] == 130
    assert script(train, *arguments(pictures / "images", base, "--run", "runs/whole"))[0] == 0
    status, out, _ = script(train, "--resume")
    assert status == 0 and "runs/broken" in out
    assert "no unfinished run" in mistake(script(train, "--resume"))


def test_a_damaged_metrics_file_does_not_pass_for_a_finished_run(script, pictures, base, tmp_path):
    assert script(train, *arguments(pictures / "images", base, "--run", "runs/a"))[0] == 0
    (tmp_path / "runs/a/metrics.json").write_text("")
    (tmp_path / "runs/a/metrics.jsonl").write_text("{\n\xff" + '{"step": 99}\n{"step": 3}\n[]\n', encoding="latin-1")
    status, out, _ = script(train, "--resume")
    assert status == 0 and "resuming after step 10" in out
    assert (tmp_path / "runs/a/metrics.jsonl").read_text() == '{"step": 3}\n'


def test_a_finished_run_can_be_prolonged(script, pictures, base, tmp_path, monkeypatch):
    assert script(train, *arguments(pictures / "images", base, "--run", "runs/a"))[0] == 0
    assert "is finished; to train it longer, add --steps N" in mistake(script(train, "--resume", "--run", "runs/a"))
    assert "less than the 10 steps" in mistake(script(train, "--resume", "--run", "runs/a", "--steps", 9))
    status, out, _ = script(train, "--resume", "--run", "runs/a", "--steps", 20)
    assert status == 0 and "resuming after step 10" in out
    lines = [json.loads(line) for line in (tmp_path / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 11), *range(12, 21, 2)]
    assert _stored(tmp_path / "runs/a/adapter.safetensors")["settings"]["steps"] == 20
    interrupt(monkeypatch, at=20)
    assert script(train, "--resume", "--run", "runs/a", "--steps", 30)[0] == 130
    status, out, _ = script(train, "--resume")  # up to 30 steps, as was said
    assert status == 0 and "step   30/30" in out
    assert runs.finished(tmp_path / "runs/a")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seed", 1], "begun with --seed 0; leave the flag out"),
        (["--lr", 0.1], "begun with --lr 0.0005"),
        (["--full"], "begun without --full"),
        (["--levels", "1,2"], "begun with --levels the default"),
        (["--prompts", "x.json"], "leave --prompts out"),
    ],
)
def test_resuming_refuses_what_would_change_the_training_by_name(
    script, pictures, base, tmp_path, monkeypatch, flags, says
):
    interrupt(monkeypatch, at=5)
    assert script(train, *arguments(pictures / "images", base, "--run", "runs/a"))[0] == 130
    assert says in mistake(script(train, "--resume", *flags))
    assert script(train, "--resume", "--seed", 0, "--workers", 0)[0] == 0  # as it was


def test_moved_images_and_weights_are_named_and_the_result_is_the_same(script, pictures, base, tmp_path, monkeypatch):
    shutil.copytree(pictures / "images", tmp_path / "old/images")
    shutil.copytree(base, tmp_path / "base")
    flags = arguments("old/images", "base", "--seed", 3)
    assert script(train, *flags, "--run", "runs/whole")[0] == 0
    interrupt(monkeypatch, at=5)
    assert script(train, *flags, "--run", "runs/broken")[0] == 130
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "base").rename(tmp_path / "moved")
    assert "say where they are by train.py --resume" in mistake(script(train, "--resume"))
    assert "download.py" in mistake(script(train, "--resume", "--data", "new/images"))
    assert script(train, "--resume", "--data", "new/images", "--weights", "moved")[0] == 0
    whole, broken = (load_file(f"runs/{name}/adapter.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    status, out, _ = script(retrieve, "--run", "runs/broken", "--text", "red", "--json")
    assert status == 0 and all("new/images" in result["image"] for result in json.loads(out))


def test_a_changed_split_is_refused(script, pictures, base, tmp_path, monkeypatch):
    interrupt(monkeypatch, at=5)
    assert script(train, *arguments(pictures / "images", base, "--run", "runs/a"))[0] == 130
    split = tmp_path / "runs/a/split.csv"
    lines = split.read_text().splitlines()
    split.write_text("\n".join(lines[:1] + lines[2:]))  # an image is missing
    assert "are others than when the run was begun" in mistake(script(train, "--resume"))
    swapped = [line.replace(",train", ",x").replace(",val", ",train").replace(",x", ",val") for line in lines]
    split.write_text("\n".join(swapped))
    assert "are others than" in mistake(script(train, "--resume"))


@pytest.mark.parametrize("when", ["in the middle", "at the last step"])
def test_a_diverged_training_stops_before_its_weights_are_kept(script, pictures, base, tmp_path, monkeypatch, when):
    step = optimization.Optimization.step

    def diverge(self, loss, number):
        step(self, loss * float("inf") if number == 5 and when == "in the middle" else loss, number)
        if number == 9:
            with torch.no_grad():
                next(iter(self.parameters.values())).fill_(float("nan"))

    monkeypatch.setattr(optimization.Optimization, "step", diverge)
    line = mistake(script(train, *arguments(pictures / "images", base, "--run", "runs/a")))
    assert f"not finite after step {6 if when == 'in the middle' else 10}, learning rate" in line
    assert line.count(".png") == 5 and "smaller --lr" in line
    tensors = load_file(tmp_path / "runs/a/adapter.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


# ---------------------------------------------------------------------------------------------------------------------
# From elsewhere


def _stored(file):
    with safe_open(file, "pt") as f:
        return json.loads(f.metadata()["info"])


def test_paths_that_a_run_names_are_followed_only_where_that_is_safe(script, trained, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "NAMED", Path("named-paths.json"))  # nothing was named yet
    image = pictures / "images/half-left/0.png"
    line = mistake(script(classify, "--run", trained, image))
    base = _stored(trained / "adapter.safetensors")["base"]["weights"]
    assert f"if you trust it, add --weights {base}" in line
    assert script(classify, "--run", trained, image, "--weights", base)[0] == 0
    assert script(classify, "--run", trained, image)[0] == 0  # named once, known from then on
    for module, flags in ((classify, []), (retrieve, ["--text", "red"]), (evaluate, [])):
        assert f"add --data {pictures / 'manifest.csv'}" in mistake(script(module, "--run", trained, *flags))
    assert script(retrieve, "--run", trained, "--text", "red", "--data", pictures / "manifest.csv")[0] == 0
    assert script(evaluate, "--run", trained)[0] == 0
    folders = [str(pictures / "images" / label) for label in sorted(SHAPES)]
    assert json.loads(Path("named-paths.json").read_text()) == [base, str(pictures / "manifest.csv"), *folders]


def test_what_a_training_names_need_not_be_named_again(script, pictures, base, tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "NAMED", Path("named-paths.json"))
    assert script(train, *arguments(pictures / "images", base))[0] == 0
    assert script(retrieve, "--text", "red")[0] == 0


def test_the_merges_of_a_run_from_scratch_are_checked(script, pictures, tmp_path):
    assert script(train, *arguments(pictures / "images", "scratch", "--run", "runs/a"))[0] == 0
    merges = tmp_path / "runs/a/merges.txt"
    whole = merges.read_text()
    for text in ("", "\n".join(reversed(whole.splitlines()))):
        merges.write_text(text)
        line = mistake(script(classify, "--run", "runs/a", pictures / "images"))
        assert "merges.txt" in line or "own settings" in line
    merges.write_text(whole)
    assert script(classify, "--run", "runs/a", pictures / "images")[0] == 0


def test_tensors_that_do_not_fit_the_settings_take_no_memory(script, trained, pictures, tmp_path):
    file, tensors = trained / "adapter.safetensors", load_file(trained / "adapter.safetensors")
    stored = _stored(file)
    for changes, says in (({"lora_rank": 4096}, "another rank"), ({"levels": [1]}, "does not fit its own settings")):
        info = {**stored, "settings": {**stored["settings"], **changes}}
        save_file(tensors, tmp_path / file.name, metadata={"info": json.dumps(info)})
        assert says in mistake(script(classify, "--run", tmp_path, pictures / "images"))
    tensors["head"][0, 0] = float("nan")
    save_file(tensors, tmp_path / file.name, metadata={"info": json.dumps(stored)})
    assert "not finite, in head" in mistake(script(classify, "--run", tmp_path, pictures / "images"))


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["a"]},
        {"classes": ["a", "a"]},
        {"classes": "ab"},
        {"prompts": {}},
        {"prompts": {"field-green": ["x"], "half-left": ["x"], "half-right": []}},
        {"base": {"weights": 3, "fingerprint": "x"}},
        {"base": None},
        {"settings": []},
    ],
)
def test_odd_metadata_is_refused(script, trained, pictures, tmp_path, change):
    file = trained / "adapter.safetensors"
    save_file(load_file(file), tmp_path / file.name, metadata={"info": json.dumps({**_stored(file), **change})})
    assert "another version or damaged" in mistake(script(classify, "--run", tmp_path, pictures / "images"))


def test_images_that_a_foreign_split_or_a_link_names_are_not_read(script, trained, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "NAMED", Path("named-paths.json"))
    shutil.copytree(trained, tmp_path / "run")
    base = _stored(trained / "adapter.safetensors")["base"]["weights"]
    secret = tmp_path.parent / "secret"
    shutil.copytree(pictures / "images", secret)
    trust.remember(base, pictures / "manifest.csv", *(pictures / "images").iterdir())
    assert script(evaluate, "--run", "run")[0] == 0
    split = tmp_path / "run/split.csv"
    split.write_text(split.read_text().replace(str(pictures / "images"), str(secret)))
    line = mistake(script(evaluate, "--run", "run"))
    assert f"wants to read {secret}" in line and "if you trust it, add --data" in line
    (tmp_path / "data/x").mkdir(parents=True)
    (tmp_path / "data/x/linked").symlink_to(secret)
    file = tmp_path / "run/adapter.safetensors"
    info = {**_stored(file)}
    info["settings"]["data"] = str(tmp_path / "data")
    save_file(load_file(file), file, metadata={"info": json.dumps(info)})
    assert "wants to read" in mistake(script(retrieve, "--run", "run", "--text", "red"))


def test_a_folder_that_is_not_ours_is_not_written_to(script, pictures, base, tmp_path):
    for name in ("merges.txt", "split.csv"):
        (tmp_path / name[:-4]).mkdir()
        (tmp_path / name[:-4] / name).write_text("mine")
        line = mistake(script(train, *arguments(pictures / "images", "scratch", "--run", name[:-4])))
        assert "files that would be overwritten" in line and (tmp_path / name[:-4] / name).read_text() == "mine"


def test_a_wrong_place_leaves_the_run_as_it_was(script, pictures, base, tmp_path, monkeypatch):
    shutil.copytree(pictures / "images", tmp_path / "old")
    shutil.copytree(pictures / "images", tmp_path / "other")
    for file in (tmp_path / "other").rglob("*.png"):
        file.write_bytes(file.read_bytes() + b"\0")  # other pictures of the same names
    interrupt(monkeypatch, at=5)
    assert script(train, *arguments("old", base, "--run", "runs/a"))[0] == 130
    (tmp_path / "old").rename(tmp_path / "new")
    kept = (tmp_path / "runs/a/split.csv").read_text()
    (tmp_path / "empty").mkdir()
    for wrong, says in (("nowhere", "there is no"), ("empty", "no images"), ("other", "are others than")):
        assert says in mistake(script(train, "--resume", "--data", wrong)), wrong
        assert (tmp_path / "runs/a/split.csv").read_text() == kept
    assert script(train, "--resume", "--data", "new")[0] == 0


def test_a_manifest_beside_its_images_may_move_with_them(script, pictures, base, tmp_path, monkeypatch):
    shutil.copytree(pictures / "images", tmp_path / "old/images")
    (tmp_path / "old/meta").mkdir()
    rows = (pictures / "manifest.csv").read_text().replace("images/", "../images/")
    (tmp_path / "old/meta/m.csv").write_text(rows)
    interrupt(monkeypatch, at=5)
    assert script(train, *arguments("old/meta/m.csv", base, "--run", "runs/a"))[0] == 130
    (tmp_path / "old").rename(tmp_path / "new")
    assert script(train, "--resume", "--data", "new/meta/m.csv")[0] == 0


def test_resuming_a_run_from_scratch_keeps_its_merges(script, pictures, tmp_path, monkeypatch):
    interrupt(monkeypatch, at=5)
    assert script(train, *arguments(pictures / "manifest.csv", "scratch", "--run", "runs/a"))[0] == 130
    merges = (tmp_path / "runs/a/merges.txt").read_bytes()
    monkeypatch.setattr(build, "learn_merges", lambda texts, count: [("a", "b")])  # of another version
    assert script(train, "--resume", "--run", "runs/a")[0] == 0
    assert (tmp_path / "runs/a/merges.txt").read_bytes() == merges
