"""A run: the folder of a fine-tuned model.

    runs/<name>/adapter.safetensors   only what was trained: LoRA, fusion, head, scale (or everything, with --full);
                                      classes, prompts, settings and the base's fingerprint as JSON in the metadata
    runs/<name>/last.safetensors      all that resuming needs (train.py)
    runs/<name>/metrics.json(l)       the final figures; a line an epoch (train.py)
    runs/<name>/merges.txt            the BPE merges of a model trained from scratch
    runs/<name>/index.safetensors     embeddings of the searched images (retrieve.py)

Everything is safetensors and JSON: reading a file from elsewhere can't run code.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from checkpoint import fingerprint, load_base, read_safetensors
from cli import Progress, autocast
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
