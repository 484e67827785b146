"""A run: the folder of a fine-tuned model, and how the model is put together again from it.

    runs/<name>/adapter.safetensors   only what was trained: LoRA, fusion, head, scale (or everything, with --full);
                                      settings, classes, prompts and base model as JSON in the file's metadata
    runs/<name>/last.safetensors      all that resuming needs (train.py)
    runs/<name>/metrics.jsonl         the held-out figures after each tenth of the steps, a line each (train.py)
    runs/<name>/metrics.json          the figures of the best model, and of the untrained one (train.py)
    runs/<name>/split.csv             which image was trained on, and which held out: a manifest (train.py)
    runs/<name>/merges.txt            the BPE merges of a model trained from scratch
    runs/<name>/index.safetensors     embeddings of the searched images (retrieve.py)

Everything is safetensors and JSON: reading a file from elsewhere can't run code.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import fingerprint, load_base, read_safetensors
from cli import Progress, autocast
from data import class_names
from errors import UserError
from fusion import FusedCLIP, default_levels
from images import load_image, mirror_text, normalize, prefetch, resize_and_crop
from lora import add_lora, merge_lora
from model import CLIP, CLIPConfig
from settings import Settings
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


@dataclass(frozen=True)
class Metadata:
    """What adapter.safetensors says of itself: all that is needed, beside its tensors, to build the model again."""

    settings: Settings
    classes: list[str]  # in the order of the head's rows
    prompts: dict[str, list[str]]  # of each class
    base: dict  # {"weights": the flag, "fingerprint": of the weights}, from scratch {"weights", "config": CLIPConfig's}

    @classmethod
    def read(cls, stored, file):
        """stored: the file's JSON object. Raises UserError where it is not what a run's file holds."""
        try:
            settings = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["settings"].items()}
            rest = {f.name: stored[f.name] for f in fields(cls) if f.name != "settings"}
            return cls(Settings(**settings), **rest)
        except (KeyError, TypeError, AttributeError, UserError) as problem:
            raise UserError(f"{file} has settings that do not fit ({problem}); train again") from None


def start_from_scratch(texts, run):
    """A small CLIP with random weights whose BPE merges, learned from the texts, are kept in the run's folder."""
    run.mkdir(parents=True, exist_ok=True)
    save_merges(learn_merges(texts, 1000), run / "merges.txt")
    tokenizer = Tokenizer(run)
    return CLIP(CLIPConfig(**{**asdict(SCRATCH), "vocab_size": len(tokenizer)})).initialize(), tokenizer


def new_model(settings, prompts, samples, run):
    """→ untrained FusedCLIP, Tokenizer, Metadata. prompts: of each class; samples: those to train on; run: the folder
    for the merges of a model from scratch."""
    torch.manual_seed(settings.seed)
    scratch = settings.weights == "scratch"
    if scratch:
        texts = [text for texts in prompts.values() for text in texts]
        texts += [text for s in samples if s.caption for text in (s.caption, mirror_text(s.caption))]
        clip, tokenizer = start_from_scratch(texts, run)
        base = {"weights": "scratch", "config": asdict(clip.config)}
    else:
        clip, tokenizer = load_base(settings.weights)
        base = {"weights": settings.weights, "fingerprint": fingerprint(clip)}
    model = assemble(clip, settings, len(prompts))
    if scratch:  # an untrained text tower sees no difference between classes: start at random
        torch.nn.init.normal_(model.head)
    else:
        model.set_head([tokenizer(texts, clip.config.context_length) for texts in prompts.values()])
    return model, tokenizer, Metadata(settings, list(prompts), prompts, base)


def assemble(clip, settings, num_classes):
    """CLIP + LoRA + fusion + head as the settings say; what is to be trained, and only that, requires a gradient."""
    if settings.full:
        clip.requires_grad_(True)
    else:
        clip.requires_grad_(False)
        clip.logit_scale.requires_grad_(True)
        if settings.lora_rank:
            parts = ("rank", "alpha", "dropout", "projections", "blocks", "towers")
            if not add_lora(clip, **{part: getattr(settings, f"lora_{part}") for part in parts}):
                raise UserError(f"--lora-blocks: the base model has no such block; it has {len(clip.visual.blocks)}")
    levels, last = settings.levels, len(clip.visual.blocks)
    if levels and max(levels) > last:
        raise UserError(f"--levels: the base model has {last} blocks, not {max(levels)}")
    if settings.fusion != "none" and set(levels or default_levels(last)) == {last}:
        raise UserError("--levels: there is nothing to fuse with the last block alone; name another, or --fusion none")
    return FusedCLIP(clip, num_classes, settings.fusion, levels)


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
    if not run.is_dir():
        raise UserError(f"there is no folder {run}; the runs are in {RUNS}/")
    if not (run / file).is_file():
        raise UserError(f"there is no {file} in {run}; train one with `python train.py --run {run}`")
    return run


@dataclass
class State:
    """Where a training stands. Kept with the optimizer's tensors in last.safetensors."""

    zero_shot: dict  # the untrained model's figures
    step: int = 0  # finished steps
    seconds: float = 0.0  # spent on them, evaluation included
    best_score: float = -1.0
    best_step: int = 0  # after which the model was best
    scaler: dict = field(default_factory=dict)  # GradScaler's


class Saved(NamedTuple):
    """What last.safetensors holds."""

    metadata: Metadata
    state: State
    tensors: dict


def new_run(args):
    """→ the folder to train into, its Settings, and None for what was saved there."""
    settings = Settings.from_flags(args)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run = args.run or RUNS / f"{Path(settings.data).stem}-{Path(settings.weights).stem}-{stamp}"
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file; choose another --run")
    if (run / "adapter.safetensors").exists():
        raise UserError(f"{run} holds a model already; choose another --run, or go on with it by --resume")
    return run, settings, None


def resumed_run(run):
    """→ the folder of an interrupted run, its Settings, and what was Saved there."""
    run = find_run(run, "last.safetensors")
    file = run / "last.safetensors"
    tensors, stored = read_safetensors(file)
    if (run / "metrics.json").exists():
        raise UserError(f"{run} is finished, there is nothing to resume; train a new one without --resume")
    try:
        saved = Saved(Metadata.read(stored, file), State(**stored["state"]), tensors)
    except (KeyError, TypeError):
        raise UserError(f"{file} is of another version; train again") from None
    return run, saved.metadata.settings, saved


def resume(run, saved, samples, metadata, model, optimization, device):
    """Set model and optimizer back to where the run was interrupted → State. samples: those to train on. Raises
    UserError where classes or weights are others than when the run was begun."""
    if metadata.classes != class_names(samples):
        raise UserError(f"{metadata.settings.data} has other classes than when {run} was begun; train a new run")
    if metadata.base != saved.metadata.base:
        raise UserError(f"{metadata.settings.weights} has other weights than when {run} was begun; train a new run")
    prefix = "model."
    trained = {name.removeprefix(prefix): t for name, t in saved.tensors.items() if name.startswith(prefix)}
    load_trained(model, trained, run / "last.safetensors")
    optimization.restore(saved.tensors, device)
    optimization.scaler.load_state_dict(saved.state.scaler)
    log = run / "metrics.jsonl"
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= saved.state.step]
    log.write_text("".join(f"{line}\n" for line in lines))
    print(f"resuming after step {saved.state.step}", flush=True)
    return saved.state


def load_run(run, device, weights=None, merge=True):
    """A run's folder → (FusedCLIP for inference, Tokenizer, Metadata).

    weights: where the base model is, should it have moved; merge: add the adapters into the weights, which is faster
    but rounds. Raises UserError.
    """
    file = run / "adapter.safetensors"
    tensors, stored = read_safetensors(file)
    metadata = Metadata.read(stored, file)
    base = metadata.base
    if base["weights"] == "scratch":
        clip, tokenizer = CLIP(CLIPConfig(**base["config"])), Tokenizer(run)
    else:
        clip, tokenizer = load_base(weights or base["weights"])
        if fingerprint(clip) != base["fingerprint"]:
            raise UserError(f"{run} was trained on other base weights than {weights or base['weights']}; use --weights")
    model = assemble(clip, metadata.settings, len(metadata.classes))
    load_trained(model, tensors, file)
    if merge:
        merge_lora(model)
    return model.to(device).eval(), tokenizer, metadata


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
