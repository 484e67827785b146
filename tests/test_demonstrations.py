"""Every module runs by itself and shows what it is about."""

import argparse
import dataclasses
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from settings import Settings

ROOT = Path(__file__).parents[1]


def test_the_figure_is_drawn(tmp_path):
    command = [sys.executable, ROOT / "docs/figure.py", tmp_path / "figure.png"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (1500, 800) and len(image.convert("L").resize((60, 32)).getcolors()) > 50


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("model.py", "CLIP ViT-B/16 has 149,620,737 parameters"),
        ("tokenizer.py", "merges learned"),
        ("lora.py", "983,040 trainable parameters"),
        ("fusion.py", "concat, block 8 only"),
        ("prompts.py", "vocal fold polyp"),
        ("metrics.py", "macro-F1"),
        ("checkpoint.py", "vision_model.encoder.layers.0.self_attn.q_proj.weight"),
        ("images.py", "pixels (3, 224, 224)"),
        ("augment.py", "mirrored: row 70, column 210 is at 36, 47"),
        ("cache.py", "with    a cache, third  time: (280, 280, 3)"),
        ("sides.py", "cone of light at 5 o'clock"),
        ("files.py", "it is nested too deeply"),
        ("data.py", "cone at 5 o'clock"),
        ("splits.py", "0 patients on both sides"),
        ("entrep.py", "public/images/_Image0001.png"),
        ("phantom.py", "right ear"),
        ("kernels/reference.py", "slerp"),
        ("kernels/first_steps.py", "program"),
        ("kernels/search.py", "the two nearest of three"),
        ("index.py", "one more ['red', 'copy', 'blue', 'new']: (4, 128)"),
        ("kernels/triton_tiny.py", "relative error"),
        ("kernels/triton_tiles.py", "5 × 1 tiles of 64 × 64"),
        ("kernels/triton_contrastive.py", "FakeTensor"),
        ("kernels/triton_search.py", "in plain PyTorch"),
        ("kernels/triton_slerp.py", "arccos"),
    ],
)
def test_a_module_demonstrates_itself(module, says, tmp_path):
    result = subprocess.run([sys.executable, ROOT / module], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert says in result.stdout and not result.stderr
    assert not list(tmp_path.iterdir())


def test_the_demonstration_of_clip_recognizes_what_it_shows(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "model.py"], cwd=tmp_path, capture_output=True, text=True)
    tables = result.stdout.split("a row for an image of the class\n")[1:]
    assert len(tables) == 3  # cosines, scaled, softmax
    for table in tables:
        rows = [[float(value) for value in line.split()[1:]] for line in table.splitlines()[:7]]
        assert [row.index(max(row)) for row in rows] == list(range(7))
    assert all(abs(sum(row) - 1) < 0.04 for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# --help

SCRIPTS = ["train", "evaluate", "classify", "retrieve", "ablate", "phantom", "weights.download", "weights.export"]


class Caught(Exception):
    pass


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_says_what_it_does_and_does_something(name, monkeypatch):
    def catch(self, *_):
        raise Caught(self)

    module = importlib.import_module(name)
    for method in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, catch)
    with pytest.raises(Caught) as caught:
        module.main()
    settings = {field.name for field in dataclasses.fields(Settings)} if name in ("train", "ablate") else set()
    for action in caught.value.args[0]._actions:
        assert action.help, action.dest
        used = f"args.{action.dest}" in inspect.getsource(module)
        assert action.dest in {"help"} | settings or used, f"{action.dest} does nothing"


@pytest.mark.parametrize("file", ["train.py", "kernels/benchmark.py", "docs/figure.py", "weights/download.py"])
def test_help_is_no_traceback(file, tmp_path):
    result = subprocess.run([sys.executable, ROOT / file, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("usage:") and not result.stderr


def test_the_help_of_train_names_every_default():
    command = [sys.executable, ROOT / "train.py", "--help"]
    text = " ".join(subprocess.run(command, capture_output=True, text=True).stdout.split())
    for default in ("seed", "lora-dropout", "slerp", "batch-size"):
        assert "(default: " in text.split(f"--{default} ")[-1].split(" --")[0], default
    for part in ("scratch (a new small model)", "on phantoms 200", "2e-3 on phantoms", "q,k,v,out"):
        assert part in text
