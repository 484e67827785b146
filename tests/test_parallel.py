"""Several processes on one machine, by torchrun and gloo, against one process with the whole batch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import mistake
from safetensors.torch import load_file

import ablate
import retrieve
import train
from weights import export

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
FLAGS = ("--steps", 20, "--lr", "1e-4", "--batch-size", 7, "--precision", "float32", "--device", "cpu", "--workers", 1)


def command(processes, script, *flags):
    """What a user types."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The -- keeps torchrun from taking --run for an option of its own.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", port]
    return list(map(str, [*torchrun, "--", ROOT / script, *flags]))


def run(processes, script, *flags, folder):
    result = subprocess.run(
        command(processes, script, *flags), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("slerp, contrastive", [(0.5, 0.5), (0, 0)])
def test_loss_and_gradients_are_those_of_one_process(pictures, tmp_path, slerp, contrastive):
    flags = pictures / "images", "out.safetensors", slerp, contrastive
    found = []
    for processes in (1, 2, 3):
        (tmp_path / str(processes)).mkdir()
        run(processes, "tests/parallel_worker.py", *flags, folder=tmp_path / str(processes))
        found.append(load_file(tmp_path / f"{processes}/out.safetensors"))
    alone, *together = found
    trained = [name for name, gradient in alone.items() if gradient.abs().sum() > 0]
    assert len(trained) > (70 if contrastive else 30) and any("visual" in name for name in trained)
    for several in together:
        for name in alone:
            torch.testing.assert_close(several[name], alone[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("extra", [(), ("--contrastive", 0, "--full")])  # then no text is encoded
def test_a_training_by_two_processes_ends_with_the_weights_of_one(script, pictures, base, tmp_path, extra):
    flags = "--data", pictures / "manifest.csv", "--weights", base, *FLAGS, *extra
    assert script(train, *flags, "--run", "one")[0] == 0
    out = run(2, "train.py", *flags, "--run", "two", folder=tmp_path)
    assert out.count("before training, on val") == out.count("20/20") == 1  # the first process alone prints
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    # A bias of k moves all logits of a query alike, which a softmax does not see. Its gradient is rounding, of which
    # AdamW makes steps as long as any.
    for name in (name for name in one if "k_proj.bias" not in name):
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5, msg=name)
    assert {file.name for file in (tmp_path / "one").iterdir()} == {file.name for file in (tmp_path / "two").iterdir()}
    figures = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert all(figures[0][key] == pytest.approx(value, abs=1e-4) for key, value in figures[1].items() if key[0] in "am")


def test_a_new_model_shares_its_merges_and_full_training_works(pictures, tmp_path):
    flags = "--data", pictures / "manifest.csv", "--weights", "scratch", *FLAGS, "--steps", 2, "--batch-size", 3
    run(2, "train.py", *flags, "--run", "two", folder=tmp_path)
    assert (tmp_path / "two/merges.txt").is_file() and (tmp_path / "two/metrics.json").is_file()


def test_a_rank_that_dies_ends_the_job_and_others_go_on(script, pictures, base, tmp_path):
    """Killed in the middle; resumed by one process, and by three; the end is that of an undisturbed training."""
    flags = "--data", pictures / "manifest.csv", "--weights", base, *FLAGS[2:]
    with open(tmp_path / "log", "w+") as log:
        job = subprocess.Popen(
            command(2, "train.py", *flags, "--steps", 4000, "--run", "a"),
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
        )
        try:
            started, second = time.monotonic(), None
            while not second and time.monotonic() - started < 120:
                time.sleep(0.2)
                if "before training" in (tmp_path / "log").read_text():
                    ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
                    second = next(int(pid) for pid in ranks if b"RANK=1" in environment(pid))
            time.sleep(1)
            os.kill(second, signal.SIGKILL)
            assert job.wait(120) != 0
        finally:
            job.kill()
    said = (tmp_path / "log").read_text()
    assert ("lost another one" in said and "--resume" in said) or "SIGKILL" in said or "Signal 9" in said
    assert not (tmp_path / "a/metrics.json").exists() and (tmp_path / "a/last.safetensors").exists()

    assert script(train, *flags, "--steps", 10, "--run", "whole")[0] == 0
    assert script(train, *flags, "--steps", 10, "--run", "b")[0] == 0
    for processes in (2, 3):
        steps = 10 + 10 * (processes - 1)
        run(processes, "train.py", "--resume", "--run", "b", "--steps", steps, "--device", "cpu", folder=tmp_path)
        assert script(train, "--resume", "--run", "whole", "--steps", steps, "--device", "cpu")[0] == 0
    one, others = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "b"))
    for name in one:
        torch.testing.assert_close(others[name], one[name], rtol=0, atol=1e-5, msg=name)


def environment(pid):
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def test_several_processes_index_what_one_would(script, trained, pictures, tmp_path):
    (tmp_path / "images").mkdir()
    for number, file in enumerate(sorted((pictures / "images").rglob("*.png"))):
        (tmp_path / f"images/{number}.png").write_bytes(file.read_bytes())
    (tmp_path / "images/broken.png").write_bytes(b"no image")
    search = "--run", "run", "--data", "images", "--text", "red", "--json", "--top", 20
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        (folder / "images").symlink_to(tmp_path / "images")
        for name in ("adapter.safetensors", "split.csv"):
            (folder / "run").mkdir(exist_ok=True)
            (folder / "run" / name).write_bytes((trained / name).read_bytes())
        flags = "--run", "run", "--data", "images", "--index-only", "--batch-size", 4, "--device", "cpu"
        weights = "--weights", json_of(trained)["base"]["weights"]
        result = subprocess.run(
            command(processes, "retrieve.py", *flags, *weights),
            cwd=folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert result.stdout == "18 images are indexed in run\n" and "broken.png" in result.stderr
        status, out, err = script_in(folder, script, retrieve, *search, *weights)
        assert status == 1 and "indexing" not in err  # the broken one, as ever
        found.append([(Path(r["image"]).name, round(r["score"], 3)) for r in json.loads(out)])
    assert len(found[0]) == 18 and sorted(found[0]) == sorted(found[1])


def json_of(run):
    from checkpoint import read_safetensors

    return read_safetensors(run / "adapter.safetensors")[1]


def script_in(folder, script, module, *flags):
    os.chdir(folder)
    return script(module, *flags)


def test_what_is_for_one_process_is_refused(script, trained, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "work for one process" in mistake(script(retrieve, "--run", trained, "--text", "red"))
    assert "work for one process" in mistake(script(ablate, "--data", "phantom"))
    assert "work for one process" in mistake(script(export, trained, "out"))
    assert "--index-only ends before" in mistake(script(retrieve, "--index-only", "--text", "red"))
