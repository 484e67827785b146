"""What the scripts share: their flags, and the folder of a fine-tuned model, a "run".

    runs/<name>/adapter.safetensors   only what was trained: LoRA, fusion, head, scale (or everything, with --full);
                                      classes, prompts, settings and the base's fingerprint as JSON in the metadata
    runs/<name>/last.safetensors      all that resuming needs (train.py)
    runs/<name>/metrics.json(l)       the final figures; a line an epoch (train.py)
    runs/<name>/merges.txt            the BPE merges of a model trained from scratch
    runs/<name>/index.safetensors     embeddings of the searched images (retrieve.py)

Everything is safetensors and JSON: reading a file from elsewhere can't run code.
"""

import argparse
import contextlib
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from checkpoint import fingerprint, load_base, read_safetensors
from errors import UserError
from fusion import FusedCLIP
from images import load_image, normalize, prefetch, resize_and_crop
from lora import add_lora, merge_lora
from model import CLIP, CLIPConfig
from tokenizer import Tokenizer, learn_merges, save_merges

RUNS = Path("runs")
# The architecture of `--weights scratch`: small enough for a laptop, deep enough for levels to mean something.
SCRATCH = CLIPConfig(
    embed_dim=128,
    image_size=128,
    patch_size=16,
    vision_width=128,
    vision_layers=8,
    text_width=128,
    text_layers=4,
)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Name the defaults, where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser with the flags that all scripts share, whose errors are one line, as all our errors are."""

    def __init__(
        self,
        description,
        data_help="images, as train.py takes them (default: those that the run was trained with)",
        run_help="a fine-tuned model's folder (default: the newest in runs/)",
    ):
        super().__init__(description=description, formatter_class=Help)
        self.add_argument("--data", help=data_help)
        self.add_argument("--weights", help="base model: clip-vit-b-16, phantom, or a path to CLIP weights")
        self.add_argument("--run", type=Path, help=run_help)
        self.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
        self.add_argument("--seed", type=int, default=0, help="fixes the split and everything random")
        self.add_argument("--batch-size", type=positive_int, default=32, help="images at a time")
        self.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that read images")

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")


def positive_int(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def find_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):  # AssertionError: PyTorch without CUDA
        raise UserError(f"there is no device {name!r} on this machine; try --device cpu") from None


def mixed_precision(device):
    """The towers' type: bfloat16 on GPUs that compute in it, float16 on older ones, float32 elsewhere."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def autocast(device):
    dtype = mixed_precision(device)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class Progress:
    """At most one line a second, and the last: progress, images/s and time left; on a terminal, in place."""

    def __init__(self, total, file=sys.stdout):
        self.total, self.file, self.start = total, file, time.monotonic()
        self.last = self.start

    def __call__(self, done, text, loss=None):
        """loss: a scalar tensor; on a GPU it is waited for only when the line is due."""
        now = time.monotonic()
        if now - self.last < 1:
            return
        self.last = now
        rate = done / (now - self.start)
        left = round((self.total - done) / rate)
        text += "" if loss is None else f"  loss {loss:.3f}"
        line = f"{text}  {done / self.total:4.0%}  {rate:.1f} images/s  {left // 60}:{left % 60:02} left"
        tty = self.file.isatty()
        print(f"\r{line}\x1b[K" if tty else line, end="\r" if tty else "\n", file=self.file, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Models


def start_from_scratch(texts, run):
    """A small CLIP with random weights whose BPE merges, learned from the texts, are kept in the run's folder."""
    run.mkdir(parents=True, exist_ok=True)
    save_merges(learn_merges(texts, 1000), run / "merges.txt")
    tokenizer = Tokenizer(run)
    return CLIP(CLIPConfig(**{**asdict(SCRATCH), "vocab_size": len(tokenizer)})).initialize(), tokenizer


def assemble(clip, settings, num_classes):
    """CLIP + LoRA + fusion + head as the settings say; what is to be trained, and only that, requires a gradient."""
    if settings["full"]:
        clip.requires_grad_(True)
    else:
        clip.requires_grad_(False)
        clip.logit_scale.requires_grad_(True)
        if settings["lora_rank"]:
            keys = ("rank", "alpha", "dropout", "projections", "blocks", "towers")
            if not add_lora(clip, *(settings[f"lora_{key}"] for key in keys)):
                raise UserError(f"--lora-blocks: the base model has no such block; it has {len(clip.visual.blocks)}")
    levels = settings["levels"]
    if levels and max(levels) > len(clip.visual.blocks):
        raise UserError(f"--levels: the base model has {len(clip.visual.blocks)} blocks, not {max(levels)}")
    return FusedCLIP(clip, num_classes, settings["fusion"], levels)


def trained_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def find_run(run, file="adapter.safetensors"):
    """The --run flag → the run's folder, by default the newest that has `file`. Raises UserError."""
    if run is None:
        runs = sorted(RUNS.glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError(f"there is no run in {RUNS}/; train one with `python train.py`, or give its --run")
        return runs[-1].parent
    if not (run / file).is_file():
        raise UserError(f"there is no {file} in {run}; train one with `python train.py --run {run}`")
    return run


def load_run(run, device, weights=None):
    """A run's folder → (FusedCLIP for inference, its adapters merged; Tokenizer; info).

    info holds "classes", "prompts", "settings" and "base"; weights says where the base model is, should it have moved.
    Raises UserError.
    """
    tensors, info = read_safetensors(run / "adapter.safetensors")
    base = info["base"]
    if base["weights"] == "scratch":
        clip, tokenizer = CLIP(CLIPConfig(**base["config"])), Tokenizer(run)
    else:
        clip, tokenizer = load_base(weights or base["weights"])
        if fingerprint(clip) != base["fingerprint"]:
            raise UserError(f"{run} was trained on other base weights than {weights or base['weights']}; use --weights")
    model = assemble(clip, info["settings"], len(info["classes"]))
    load_trained(model, tensors, run / "adapter.safetensors")
    merge_lora(model)
    return model.to(device).eval(), tokenizer, info


def load_trained(model, tensors, file):
    """Copy a run's tensors into the model; every trained parameter must be there, and nothing else."""
    parameters = trained_parameters(model)
    wrong = [n for n in parameters if n not in tensors or tensors[n].shape != parameters[n].shape]
    wrong += tensors.keys() - parameters.keys()
    if wrong:
        raise UserError(f"{file} does not fit its own settings: {', '.join(sorted(wrong))}; train again")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


@torch.inference_mode()
def encode_images(model, files, device, batch_size, workers, what="encoding"):
    """Image files → (N, embed_dim) float32 fused embeddings on the CPU, not of unit length."""
    size = model.clip.config.image_size
    batches = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    progress, features = Progress(len(files), sys.stderr), []
    for arrays in prefetch(lambda file: resize_and_crop(load_image(file), size), batches, workers):
        pixels = normalize(torch.from_numpy(np.stack(arrays)).to(device))
        with autocast(device):
            features.append(model.encode_image(pixels).float().cpu())
        progress(sum(map(len, features)), what)
    return torch.cat(features) if features else torch.empty(0, model.clip.config.embed_dim)


@torch.inference_mode()
def encode_texts(model, tokenizer, texts, device):
    """Texts → (N, embed_dim) float32 embeddings on the CPU, not of unit length."""
    tokens = tokenizer(texts, model.clip.config.context_length)
    with autocast(device):
        return torch.cat([model.encode_text(part.to(device)).float().cpu() for part in tokens.split(256)])
