"""Shared fixtures: CLIP models with random weights from transformers, the independent implementation to agree with."""

import csv
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run on the CPU, in Python

import transformers
from shapes import SHAPES, draw

import train
import trust
from checkpoint import save_clip
from errors import run_script
from files import write_json
from model import CLIP, CLIPConfig
from tokenizer import Tokenizer, learn_merges, save_merges
from weights.export import to_transformers

# Whatever this CPU can do, tests compute in float32, unless they say otherwise.
torch.cpu.get_capabilities = dict
torch.set_num_threads(1)  # threads that wait for each other are many times slower than one where cores are shared


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _reference(config, folder):
    """transformers' CLIP of our `config`, saved in `folder`. No weight is left at 0 or 1 and attention is not nearly
    uniform, as both are in transformers' own initialization: a forgotten bias or mask must show."""
    towers = {}
    for tower, width, layers in (
        ("vision_config", config.vision_width, config.vision_layers),
        ("text_config", config.text_width, config.text_layers),
    ):
        towers[tower] = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": width // 64,
            "num_hidden_layers": layers,
            "projection_dim": config.embed_dim,
        }
    towers["vision_config"] |= {"image_size": config.image_size, "patch_size": config.patch_size}
    towers["text_config"] |= {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
    }
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=config.embed_dim, **towers)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "q_proj" in name or "k_proj" in name:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return SimpleNamespace(config=config, model=model, folder=folder)


@pytest.fixture(scope="session")
def vit_b16(tmp_path_factory):
    """Full-size ViT-B/16: `config` (ours), `model` (transformers'), `folder` (its 599 MB file)."""
    folder = tmp_path_factory.mktemp("vit-b-16")
    yield _reference(CLIPConfig(), folder)
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The same for a small CLIP that shares no number with ViT-B/16."""
    config = CLIPConfig(
        embed_dim=48,
        image_size=40,
        patch_size=8,
        vision_width=128,
        vision_layers=5,
        context_length=21,
        vocab_size=300,
        text_width=192,
        text_layers=3,
    )
    return _reference(config, tmp_path_factory.mktemp("small"))


# ---------------------------------------------------------------------------------------------------------------------
# Scripts, as a user runs them


@pytest.fixture(autouse=True, scope="session")
def _named_paths(tmp_path_factory):
    """What one test names by a flag, others may follow; nothing is left in the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "NAMED", tmp_path_factory.mktemp("named") / "named-paths.json")
        yield


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
    for name, content in zip(("config.json", "preprocessor_config.json"), to_transformers(clip.config), strict=True):
        write_json(folder / name, content)
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
    arguments = ["train.py", "--data", pictures / "manifest.csv", "--weights", base, "--run", run, "--steps", 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, arguments), "--lr", "3e-3", "--device", "cpu"])
        train.main()
    return run


def readme_code(name):
    """The lines of the code block below the mark `<!-- test: NAME -->` in README.md."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    return text.split(f"<!-- test: {name} -->\n```python\n")[1].split("```")[0]


def mistake(result):
    """Exit status 2, nothing but one line on standard error, beside notes, that begins with `error: `."""
    status, _, err = result
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]
