"""Low-rank adapters as Hugging Face's PEFT stores them: adapter_config.json and adapter_model.safetensors.

    base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight        (rank, in)
    base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_B.weight        (out, rank)

PEFT names the layers of transformers' CLIPModel, whose names `checkpoint.HUGGING_FACE` knows. A and B are ours. Of what
PEFT can do beside them (DoRA, trained biases, ranks that differ from layer to layer, …) nothing is read or written.

Source: PEFT's LoraConfig, and the files that its save_pretrained writes.
"""

import re

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from checkpoint import HUGGING_FACE, WEIGHTS, fingerprint, refuse_odd, save_tensors, translate
from errors import UserError, reason
from files import read_json, write_json
from lora import LoRALinear

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
HUB = {  # base models by their names on Hugging Face
    "openai/clip-vit-base-patch16": "clip-vit-b-16",
    "openai/clip-vit-base-patch32": "clip-vit-b-32",
    "openai/clip-vit-large-patch14": "clip-vit-l-14",
    "openai/clip-vit-large-patch14-336": "clip-vit-l-14-336",
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": "clip-vit-b-16-laion",
}
# Keys that are read, or that change nothing beside the ones that are. All others must be off, or have these values.
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "base_model_name_or_path", "lora_dropout"}
READ |= {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config", "layers_pattern"}
READ |= {"megatron_core", "qalora_group_size"}
ACCEPTED = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal")}


def base_of(folder):
    """→ where the base model of an adapter's folder is: in the folder itself, or where weights/download.py puts the one
    that it names. Raises UserError where it is neither."""
    if any((folder / name).is_file() for name in ("model.safetensors", "open_clip_model.safetensors")):
        return folder
    name = _config(folder).get("base_model_name_or_path")
    known = HUB.get(name) if isinstance(name, str) else None
    if known and (WEIGHTS / known).is_dir():
        return WEIGHTS / known
    hint = f"run python weights/download.py --model {known}" if known else "copy or link its files there"
    raise UserError(f"{folder} holds an adapter, but not its base model, {str(name)[:200]!r}; {hint}")


def merge_adapter(clip, folder):
    """Add an adapter to the weights of the `CLIP` that it was trained on → the hash of both. Raises UserError where it
    does not fit, or has what we can't represent."""
    config, file = _config(folder), folder / TENSORS
    try:
        with open(file, "rb"), safe_open(file, "pt") as f:
            tensors, about = load_file(file), f.metadata() or {}
    except (OSError, SafetensorError, ValueError, RuntimeError) as problem:
        raise UserError(f"cannot read {file} ({reason(problem)}); get it again") from None
    refuse_odd(tensors, file)
    base = fingerprint(clip.state_dict())
    if about.get("base", base) != base:  # as `save_adapter` writes it
        raise UserError(f"{file} was trained on another base model than the one in {folder}; put its own there")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (_number(rank) and isinstance(rank, int) and _number(alpha)):
        raise UserError(f"{folder / CONFIG} says r = {rank!r} and lora_alpha = {alpha!r}; get it again")
    scaling = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank

    layers = _linear_layers(clip)
    found = {name.rsplit(".lora_", 1)[0] for name in tensors if ".lora_" in name}
    chosen = {PREFIX + name for name in layers if _is_target(name, config.get("target_modules"))}
    expected = {f"{name}.lora_{part}.weight" for name in found & {PREFIX + n for n in layers} | chosen for part in "AB"}
    problems = [
        f"{kind}: {', '.join(sorted(names)[:5])}"
        for kind, names in (("missing", expected - tensors.keys()), ("unexpected", tensors.keys() - expected))
        if names
    ]
    if problems:
        raise UserError(f"{file} does not fit a CLIP ViT or its {CONFIG}: {'; '.join(problems)}")
    for name in expected:
        layer = layers[name.removeprefix(PREFIX).rsplit(".lora_", 1)[0]]
        shape = (rank, layer.in_features) if "lora_A" in name else (layer.out_features, rank)
        if tensors[name].shape != shape:
            raise UserError(
                f"{file} has {name} of {tuple(tensors[name].shape)} instead of {shape}: its rank is not the r of "
                f"{CONFIG}, or it was trained on another base model"
            )
    with torch.no_grad():
        for name in expected:
            if "lora_A" in name:
                A, B = tensors[name].float(), tensors[name.replace("lora_A", "lora_B")].float()
                layers[name.removeprefix(PREFIX).rsplit(".lora_", 1)[0]].weight += scaling * (B @ A)
    return fingerprint({f"{base} {scaling}": torch.zeros(0), **tensors})


def save_adapter(clip, settings, folder, base_name, base):
    """Write the adapters of a `CLIP`, not merged ones, as PEFT does. base_name: of the base model, a path or a name on
    Hugging Face; base: the fingerprint of its weights, kept beside the tensors."""
    tensors, layers = {}, []
    for name, layer in clip.named_modules():
        if isinstance(layer, LoRALinear):
            layers.append(translate(name, HUGGING_FACE))
            for part in ("lora_A", "lora_B"):
                tensors[f"{PREFIX}{layers[-1]}.{part}.weight"] = getattr(layer, part).weight
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "r": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": layers,
    }
    write_json(folder / CONFIG, config)
    save_tensors(tensors, folder / TENSORS, {"format": "pt", "base": base})


def _config(folder):
    """adapter_config.json, without anything that we can't represent."""
    config, file = read_json(folder / CONFIG), folder / CONFIG
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{file} describes no LoRA adapter; use another")
    for name in config.keys() - READ:
        if config[name] not in (None, False, [], {}, *ACCEPTED.get(name, ())):
            raise UserError(
                f"{file} says {name} = {str(config[name])[:100]}, which our model cannot represent; use another adapter"
            )
    targets = config.get("target_modules")
    listed = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    try:
        readable = listed or (isinstance(targets, str) and re.compile(targets))
    except re.error:
        readable = False
    if not readable:
        raise UserError(f"{file} says target_modules = {str(targets)[:100]}; get it again")
    return config


def _linear_layers(clip):
    return {
        translate(name, HUGGING_FACE): layer for name, layer in clip.named_modules() if isinstance(layer, nn.Linear)
    }


def _is_target(name, targets):
    """Whether PEFT would adapt the layer: targets are a regular expression for whole names, or a list of their ends."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6
