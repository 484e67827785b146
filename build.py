"""A model is put together: CLIP, low-rank adapters, fusion and class head, as the settings say; and its embeddings."""

import hashlib
import sys
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch

from checkpoint import fingerprint, load_base
from cli import Progress, autocast
from errors import UserError, counted, reason, shown
from fusion import FusedCLIP, default_levels
from images import load_image, normalize, prefetch, resize_and_crop
from lora import add_lora
from model import CLIP, CLIPConfig
from settings import Settings
from sides import mirror_text
from tokenizer import Tokenizer, learn_merges, save_merges

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
    base: dict[str, str]  # {"weights": the flag, "fingerprint": of the weights, or, from scratch, of the merges}

    @classmethod
    def read(cls, stored, file):
        """stored: the file's JSON object. Raises UserError where it is not what a run's file holds."""
        try:
            settings = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["settings"].items()}
            rest = {f.name: stored[f.name] for f in fields(cls) if f.name != "settings"}
            metadata = cls(Settings(**settings), **rest)
            classes, prompts, base = metadata.classes, metadata.prompts, metadata.base
            if not (isinstance(classes, list) and _texts(classes) and len(set(classes)) == len(classes) > 1):
                raise UserError("classes")
            if list(prompts) != classes or not all(isinstance(p, list) and _texts(p) for p in prompts.values()):
                raise UserError("prompts")
            if base.keys() != {"weights", "fingerprint"} or not _texts(base.values()):
                raise UserError("base")
            return metadata
        except (KeyError, TypeError, AttributeError, UserError) as problem:
            raise UserError(
                f"{file} is of another version or damaged ({reason(problem)}); restore a copy, or train again"
            ) from None


def _texts(items):
    return bool(items) and all(isinstance(item, str) and item for item in items)


def start_from_scratch(texts, run):
    """A small CLIP with random weights whose BPE merges, learned from the texts, are kept in the run's folder. A run
    that is resumed has them already."""
    if not (run / "last.safetensors").exists():
        save_merges(learn_merges(texts, 1000), run / "merges.txt")
    tokenizer = Tokenizer(run)
    return CLIP(CLIPConfig(**{**asdict(SCRATCH), "vocab_size": len(tokenizer)})).initialize(), tokenizer


def fingerprint_of_merges(tokenizer):
    return hashlib.sha256(repr(list(tokenizer.ranks)).encode()).hexdigest()[:16]


def check_model(settings):
    """Raise UserError where the settings do not fit the base model, or there is none: before hours of other work."""
    clip = CLIP(SCRATCH) if settings.weights == "scratch" else load_base(settings.weights)[0]
    assemble(clip, settings, num_classes=2)


def new_model(settings, prompts, samples, run):
    """→ untrained FusedCLIP, Tokenizer, Metadata. prompts: of each class; samples: those to train on; run: the folder
    for the merges of a model from scratch."""
    torch.manual_seed(settings.seed)
    scratch = settings.weights == "scratch"
    if scratch:
        texts = [text for texts in prompts.values() for text in texts]
        texts += [text for s in samples if s.caption for text in (s.caption, mirror_text(s.caption)) if text]
        clip, tokenizer = start_from_scratch(texts, run)
    else:
        clip, tokenizer = load_base(settings.weights)
    own = fingerprint_of_merges(tokenizer) if scratch else fingerprint(clip)
    base = {"weights": settings.weights, "fingerprint": own}
    model = assemble(clip, settings, len(prompts))
    if scratch:  # an untrained text tower sees no difference between classes: start at random
        torch.nn.init.normal_(model.head)
    else:
        model.set_head([tokenizer(texts, clip.config.context_length) for texts in prompts.values()])
    return model, tokenizer, Metadata(settings, list(prompts), prompts, base)


def assemble(clip, settings, num_classes):
    """CLIP + LoRA + fusion + head as the settings say; what is to be trained, and only that, requires a gradient.
    Raises UserError where the model has no such blocks."""
    levels, last = settings.levels, len(clip.visual.blocks)
    if settings.full:
        clip.requires_grad_(True)
    else:
        clip.requires_grad_(False)
        clip.logit_scale.requires_grad_(True)
        if settings.lora_rank:
            parts = ("rank", "alpha", "dropout", "projections", "blocks", "towers")
            if not add_lora(clip, **{part: getattr(settings, f"lora_{part}") for part in parts}):
                raise UserError(f"--lora-blocks: the base model's blocks are 1 to {last}; name some of these")
    if levels and max(levels) > last:
        raise UserError(f"--levels: there is no block {max(levels)}, the base model has {last}; name some of these")
    if settings.fusion != "none" and set(levels or default_levels(last)) == {last}:
        raise UserError("--levels: there is nothing to fuse with the last block alone; add another, or --fusion none")
    return FusedCLIP(clip, num_classes, settings.fusion, levels)


def trained_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


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
def encode_batches(model, files, device, batch_size, workers, what, bad=None):
    """Yield (files, their (B, embed_dim) float32 fused embeddings on the CPU, not of unit length) of each batch.

    Files that cannot be read are left out and put into `bad`, {file: why}. Without it they are a UserError."""
    size = model.clip.config.image_size

    def pixels_of(file):
        try:
            return resize_and_crop(load_image(file), size)
        except UserError as problem:
            if bad is None:
                raise
            bad[file] = str(problem)

    batches = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    progress, done = Progress(len(files), sys.stderr), 0
    for batch, arrays in zip(batches, prefetch(pixels_of, batches, workers), strict=True):
        good = [(file, array) for file, array in zip(batch, arrays, strict=True) if array is not None]
        if good:
            read, arrays = zip(*good, strict=True)
            pixels = normalize(torch.from_numpy(np.stack(arrays)).to(device))
            with autocast(device):
                yield read, model.encode_image(pixels).float().cpu()
        done += len(batch)
        progress(done, what)


def encode_images(model, files, device, batch_size, workers, what="encoding", bad=None):
    """Image files → (N, embed_dim) float32; see `encode_batches`."""
    features = [f for _, f in encode_batches(model, files, device, batch_size, workers, what, bad)]
    return torch.cat(features) if features else torch.empty(0, model.clip.config.embed_dim)


@torch.inference_mode()
def encode_texts(model, tokenizer, texts, device):
    """Texts → (N, embed_dim) float32 embeddings on the CPU, not of unit length."""
    tokens = tokenizer(texts, model.clip.config.context_length)
    with autocast(device):
        return torch.cat([model.encode_text(part.to(device)).float().cpu() for part in tokens.split(256)])


def describe_cut(tokenizer, texts, context_length):
    """→ a line about the texts that are too long, or nothing where there are none."""
    cut = too_long(tokenizer, dict.fromkeys(texts), context_length)
    what = counted(len(cut), "prompt or caption")
    return f"note: too long for the model, so that the end is cut: {what}; {shown(cut[0][:60])}…\n" if cut else ""


def too_long(tokenizer, texts, context_length):
    """→ those of the texts that the text tower cannot see whole. The start and end tokens take two places."""
    return [text for text in texts if len(tokenizer.encode(text)) > context_length - 2]
