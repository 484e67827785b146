"""A model is put together: CLIP, low-rank adapters, fusion and class head, as the settings say."""

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import torch

import peft_format
from checkpoint import base_folder, fingerprint, infer_config, load_clip, read_safetensors, weights_file
from cli import find_precision
from errors import UserError, reason
from files import read_json, stamp_of, write_json
from fusion import FusedCLIP, default_levels
from lora import add_lora, fold_lora, merge_lora
from model import CLIP, CLIPConfig
from parallel import from_first
from settings import Settings
from sides import mirror_text
from tokenizer import Tokenizer, learn_merges, save_merges
from trust import find_base

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


SEEN = "base.json"  # in a run's folder: which file of base weights was checked


@dataclass(frozen=True)
class Metadata:
    """What adapter.safetensors says of itself: all that is needed, beside its tensors, to build the model again."""

    settings: Settings
    classes: list[str]  # in the order of the head's rows
    prompts: dict[str, list[str]]  # of each class
    # {"weights": the flag, "fingerprint": of the weights, or, from scratch, of the merges, "config": its CLIPConfig}
    base: dict

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
            if base.keys() != {"weights", "fingerprint", "config"} or not isinstance(base["config"], dict):
                raise UserError("base")
            if not _texts([base["weights"], base["fingerprint"]]):
                raise UserError("base")
            return metadata
        except (KeyError, TypeError, AttributeError, UserError) as problem:
            raise UserError(
                f"{file} is of another version or damaged ({reason(problem)}); restore a copy, or train again"
            ) from None


def _texts(items):
    return bool(items) and all(isinstance(item, str) and item for item in items)


def start_from_scratch(texts, run):
    """→ Base: a small CLIP with random weights whose BPE merges, learned from the texts, are kept in the run's folder.
    A run that is resumed has them already."""

    def learn():
        if not (run / "last.safetensors").exists():
            save_merges(learn_merges(texts, 1000), run / "merges.txt")

    from_first(learn)
    tokenizer = Tokenizer(run)
    clip = CLIP(replace(SCRATCH, vocab_size=len(tokenizer))).initialize()
    return Base(clip, tokenizer, fingerprint_of_merges(tokenizer))


def fingerprint_of_merges(tokenizer):
    return hashlib.sha256(repr(list(tokenizer.ranks)).encode()).hexdigest()[:16]


def check_model(settings):
    """Raise UserError where the settings do not fit the base model, or there is none: before hours of other work."""
    clip = CLIP(SCRATCH) if settings.weights == "scratch" else open_base(settings.weights).clip
    assemble(clip, settings, num_classes=2)


def new_model(settings, prompts, samples, run):
    """→ untrained FusedCLIP, Tokenizer, Metadata. prompts: of each class; samples: those to train on; run: the folder
    for the merges of a model from scratch."""
    torch.manual_seed(settings.seed)
    scratch = settings.weights == "scratch"
    if scratch:
        texts = [text for texts in prompts.values() for text in texts]
        texts += [text for s in samples for caption in s.captions for text in (caption, mirror_text(caption)) if text]
        base = start_from_scratch(texts, run)
    else:
        base = open_base(settings.weights)
    clip, tokenizer = base.clip, base.tokenizer
    about = {"weights": settings.weights, "fingerprint": base.fingerprint, "config": plain(clip.config)}
    model = assemble(clip, settings, len(prompts))
    if scratch:  # an untrained text tower sees no difference between classes: start at random
        torch.nn.init.normal_(model.head)
    else:
        model.set_head([tokenizer(texts, clip.config.context_length) for texts in prompts.values()])
    if base.start:
        go_on_from(base.start, model, prompts)
    return model, tokenizer, Metadata(settings, list(prompts), prompts, about)


def plain(config):
    """CLIPConfig → what JSON makes of it."""
    return json.loads(json.dumps(asdict(config)))


def assemble(clip, settings, num_classes):
    """CLIP + LoRA + fusion + head as the settings say; what is to be trained, and only that, requires a gradient.
    Raises UserError where the model has no such blocks."""
    levels, last = settings.levels, len(clip.visual.blocks)
    if settings.frame:
        how = replace(clip.config.preprocessing, frame=settings.frame)
        clip.config = replace(clip.config, preprocessing=how)
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


# ---------------------------------------------------------------------------------------------------------------------
# Base models and runs


class Base(NamedTuple):
    """What --weights names."""

    clip: CLIP
    tokenizer: Tokenizer
    fingerprint: str
    start: tuple | None = None  # of a run: its FusedCLIP and Metadata


def load_base(weights):
    """→ (CLIP, Tokenizer) of a base model."""
    return open_base(weights)[:2]


def open_base(weights, seen=None):
    """The --weights flag → Base: CLIP's weights, or a PEFT adapter or a run, merged with theirs. seen: a file that
    remembers CLIP's weights that were read before. Raises UserError where there are none, or their merges don't fit."""
    path, adapter = base_folder(weights), None
    if (path / "adapter.safetensors").is_file():
        if (path / "last.safetensors").is_file() and not (path / "metrics.json").is_file():
            raise UserError(f"{path} is not finished; go on with it first: python train.py --resume --run {path}")
        model, tokenizer, metadata = read_run(path)
        fold_lora(model.clip)
        return Base(model.clip, tokenizer, model.fingerprint, (model, metadata))
    if (path / peft_format.CONFIG).is_file():
        path, adapter = peft_format.base_of(path), path
    stamp, known = _known(seen, path) if seen else (None, None)
    clip = load_clip(path, checked=known is not None)
    tokenizer = Tokenizer(path if path.is_dir() else path.parent)
    if len(tokenizer) != clip.config.vocab_size:
        raise UserError(
            f"the merges.txt of {path} makes {len(tokenizer):,} tokens, the weights expect {clip.config.vocab_size:,}; "
            "put the merges.txt that belongs to the weights there"
        )
    if adapter:
        return Base(clip, tokenizer, peft_format.merge_adapter(clip, adapter))
    key = known or fingerprint(clip.state_dict())
    if seen and not known:
        with contextlib.suppress(UserError):  # a folder that may not be written to
            write_json(seen, {"stamp": stamp, "fingerprint": key})
    return Base(clip, tokenizer, key)


def _known(seen, path):
    """→ the stamp of a file of weights; and its fingerprint, if it was read and checked before and is unchanged, else
    None. All of a file of 600 MB need not be read again for a few words."""
    stamp = list(stamp_of(weights_file(path)))
    with contextlib.suppress(UserError, KeyError, TypeError):
        kept = read_json(seen)
        return stamp, kept["fingerprint"] if kept["stamp"] == stamp else None
    return stamp, None


def check_config(run, kept, found, weights):
    """Raise UserError where the files beside the base weights say something else than when the run was begun."""
    for name, value in found.items():
        if kept.get(name) != value:
            said = f"{run} was trained with {name} = {kept.get(name)}, but the files beside {weights} say {value}"
            raise UserError(f"{said}; restore them")


def go_on_from(start, model, prompts):
    """Give a new model what a run has learned beside CLIP: the vectors of the classes that it knows, and its fusion
    of levels, if the new model has the same one."""
    old, metadata = start
    if any(metadata.prompts.get(name, texts) != texts for name, texts in prompts.items()):
        print("note: the run was trained with other prompts; to use them again, give them by --prompts")
    with torch.no_grad():
        for row, name in zip(model.head, prompts, strict=True):
            if name in metadata.classes:
                row.copy_(old.head[metadata.classes.index(name)])
    kinds = [f and (f.mode, f.levels) for f in (old.fusion, model.fusion)]
    if kinds[0] == kinds[1] and old.fusion is not None:
        model.fusion.load_state_dict(old.fusion.state_dict())
    elif old.fusion is not None:
        print("note: the run fuses levels in another way, which is left behind; its class vectors were trained with it")


def load_run(run, device, weights=None):
    """A run's folder → (FusedCLIP for inference, Tokenizer, Metadata); `prepare` its towers before they are used.
    weights: where the base model is, should it have moved. Raises UserError."""
    model, tokenizer, metadata = read_run(run, weights)
    model.requires_grad_(False).eval().to(device)
    model.precision = find_precision(metadata.settings.precision, device)
    model.waiting = {"visual", "text"}
    return model, tokenizer, metadata


@torch.inference_mode(False)  # explain.py asks what is made here for gradients
@torch.no_grad()
def prepare(model, tower):
    """Before the first use of a tower, visual or text, of a loaded run: merge its adapters, and keep its matrices in
    the model's precision. A search by text so reads half of the base model's file."""
    if tower in model.waiting:
        merge_lora(getattr(model.clip, tower))
        _round(getattr(model.clip, tower), model.precision)
        model.waiting.remove(tower)


def to_device(model, settings, device, compiled=False):
    """Move a model to the device, and let it multiply in the settings' precision, if the device can. compiled: make
    few kernels of each block's many operations. Raises UserError."""
    model.precision = find_precision(settings.precision, device)
    _round(model, model.precision)
    model.to(device)
    if compiled:
        try:
            torch.compile(torch.neg)(torch.ones(1, device=device))
        except Exception as problem:  # there is no C++ compiler, or no Triton
            raise UserError(f"cannot compile for {device} ({reason(problem)}); leave out --compile") from None
        for block in (*model.clip.visual.blocks, *model.clip.text.blocks):  # of one tower they share what is compiled
            block.compile()


def _round(model, precision):
    """Keep matrices that are not trained in this type; autocast would convert them at every step."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(precision)


def read_run(run, weights=None):
    """A run's folder → (FusedCLIP in float32, its adapters apart, Tokenizer, Metadata). weights: as above."""
    file = run / "adapter.safetensors"
    tensors, stored = read_safetensors(file)
    metadata = Metadata.read(stored, file)
    settings, base = metadata.settings, metadata.base
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
    if ranks and ranks != {settings.lora_rank}:  # before memory is taken for what the settings say
        raise UserError(f"{file} has adapters of another rank than its settings say; train again")
    if base["weights"] == "scratch":
        own = {name.removeprefix("clip."): tensor for name, tensor in tensors.items()}
        with torch.device("meta"):  # shapes without memory: the numbers come from the file
            clip = CLIP(infer_config(own, [], file))
        expected = {name: tensor.shape for name, tensor in clip.state_dict().items()}
        if any(name not in own or own[name].shape != shape for name, shape in expected.items()):
            raise UserError(f"{file} does not fit its own settings; train again")
        clip.load_state_dict({name: own[name] for name in expected}, assign=True)
        tokenizer = Tokenizer(run)
        if fingerprint_of_merges(tokenizer) != base["fingerprint"]:
            raise UserError(f"{run / 'merges.txt'} is not what {file.name} was trained with; restore it")
    else:
        weights = find_base(weights, base["weights"], run)
        clip, tokenizer, own, _ = open_base(weights, run / SEEN)
        if own != base["fingerprint"]:
            raise UserError(f"{run} was trained on other base weights than {weights}; say where they are by --weights")
        check_config(run, base["config"], plain(clip.config), weights)
    model = assemble(clip, settings, len(metadata.classes))
    load_trained(model, tensors, file)
    # Merged weights may round otherwise elsewhere. So the hash is that of what was added to which base, and how.
    s = settings
    how = f"{base['fingerprint']} {s.lora_rank} {s.lora_alpha} {s.fusion} {s.levels} {s.frame}"
    model.fingerprint = fingerprint({how: torch.zeros(0), **tensors})
    return model, tokenizer, metadata
