"""Weights on disk: CLIP's tensors in OpenAI's and Hugging Face's names, and our own files, all of them safetensors.

Our parameter names are translated to the file's, not the other way round, so that an error speaks the file's own
language. Nothing here reads or writes pickle, so a file from elsewhere can't run code.
"""

import hashlib
import json
import math
import os
import re
import shlex
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import clip_config
from errors import UserError, reason
from files import parse_json, whole
from model import CLIP, CLIPConfig

WEIGHTS = Path(__file__).parent / "weights"
# What --weights names beside paths; all but the first are what `weights/download.py --model` fetches.
NAMES = ("phantom", "clip-vit-b-16", "clip-vit-b-32", "clip-vit-l-14", "clip-vit-l-14-336", "clip-vit-b-16-laion")

HUGGING_FACE = [
    (r"^visual\.patch_embed\b", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.position_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\b", "vision_model.pre_layrnorm"),  # their spelling
    (r"^visual\.ln_post\b", "vision_model.post_layernorm"),
    (r"^visual\.proj\b", "visual_projection"),
    (r"^text\.token_embedding\b", "text_model.embeddings.token_embedding"),
    (r"^text\.position_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^text\.ln_final\b", "text_model.final_layer_norm"),
    (r"^text\.proj\b", "text_projection"),
    (r"^visual\.blocks\b", "vision_model.encoder.layers"),
    (r"^text\.blocks\b", "text_model.encoder.layers"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
]
OPENAI = [
    (r"^visual\.patch_embed\b", "visual.conv1"),
    (r"^visual\.position_embedding", "visual.positional_embedding"),
    (r"^visual\.proj\.weight", "visual.proj"),  # stored as (width, embed_dim): transposed
    (r"^text\.proj\.weight", "text_projection"),  # likewise
    (r"^text\.position_embedding", "positional_embedding"),
    (r"^visual\.blocks\b", "visual.transformer.resblocks"),
    (r"^text\.blocks\b", "transformer.resblocks"),
    (r"^text\.", ""),
    (r"\.attn\.[qkv]_proj\.", ".attn.in_proj_"),  # one matrix of q, k and v, stacked
    (r"\.mlp\.fc1\b", ".mlp.c_fc"),
    (r"\.mlp\.fc2\b", ".mlp.c_proj"),
]
# Bookkeeping that some checkpoints carry and no model needs.
IGNORED = re.compile(r".*\.position_ids|input_resolution|context_length|vocab_size")


def translate(name, naming):
    """A parameter's name in `CLIP` → its name in `HUGGING_FACE` or `OPENAI`."""
    for pattern, replacement in naming:
        name = re.sub(pattern, replacement, name)
    return name


def load_clip(path, dtype=torch.float32, checked=False):
    """Build a `CLIP` from a .safetensors file, or a folder with a model.safetensors or open_clip_model.safetensors.

    OpenAI's and Hugging Face's tensor names are both read, in any floating type. The file is mapped into memory: where
    it already holds `dtype`, no weight is copied until training writes to it. What the shapes of the tensors don't show
    is read from the configuration files beside it (clip_config.py). checked: its values are known to be finite.

    Raises UserError if there is no such file, if it is not a CLIP ViT checkpoint, holds a value that is not finite, or
    with every missing, unexpected and mis-shaped tensor by its name in the file.
    """
    file = weights_file(Path(path))
    try:
        with open(file, "rb"):  # safetensors calls a file that may not be read missing
            tensors = {name: t for name, t in load_file(file).items() if not IGNORED.fullmatch(name)}
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as problem:
        raise UserError(f"{file} is no safetensors file or damaged ({reason(problem)}); download it again") from None
    if not checked:
        refuse_odd(tensors, file)

    naming = OPENAI if "visual.conv1.weight" in tensors else HUGGING_FACE
    config = infer_config(tensors, naming, file)
    config = clip_config.complete(config, file.parent, naming is OPENAI, file)
    with torch.device("meta"):  # shapes without memory: the numbers come from the file
        clip = CLIP(config)

    state, missing, misshaped, used = {}, [], [], set()
    for name, parameter in clip.state_dict().items():
        source = translate(name, naming)
        used.add(source)
        if source not in tensors:
            missing.append(source)
            continue
        tensor = tensors[source]
        shape, unpack = _stored(name, tuple(parameter.shape), naming)
        if tensor.shape != shape:
            misshaped.append(f"{source} is {tuple(tensor.shape)} instead of {shape}")
            continue
        state[name] = unpack(tensor).to(dtype)
    problems = [
        f"{kind}: {', '.join(dict.fromkeys(names))}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", sorted(tensors.keys() - used)),
            ("mis-shaped", misshaped),
        )
        if names
    ]
    if problems:
        raise UserError(f"{file} does not fit a CLIP ViT, name another by --weights: {'; '.join(problems)}")
    clip.load_state_dict(state, assign=True)
    return clip


PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def weights_file(path):
    """A file or folder → the file of its weights. Raises UserError where there is none, or one that could run code."""
    names = ("open_clip_model.safetensors", "model.safetensors")  # beside the former timm's, perhaps: a tower alone
    files = [path / name for name in names] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), files[-1])
    if path.is_dir() and not file.is_file():
        file = min((f for f in path.iterdir() if f.suffix in PICKLES), default=file)
    if not file.is_file():
        model = path.name if path.name in NAMES[1:] else NAMES[1]
        raise UserError(
            f"there are no weights at {file}; `python weights/download.py --model {model}` fetches CLIP, or name "
            "others by --weights: phantom, or the path of a CLIP file or folder"
        )
    if file.suffix in PICKLES:
        raise UserError(f"{file} may run code when it is read; get a .safetensors file, or convert it: {convert(file)}")
    return file


def convert(file):
    """→ the command that makes a .safetensors file of a pickled one, without running code that it may hold. OpenAI's
    own files are programs for TorchScript, which can't read or write other files."""
    try:
        script = any("/code/" in name for name in zipfile.ZipFile(file).namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        script = False
    read = "torch.jit.load(old, 'cpu').state_dict()" if script else "torch.load(old, 'cpu', weights_only=True)"
    new = file.with_name("open_clip_model.safetensors" if "open_clip" in file.name else "model.safetensors")
    code = f"import sys, torch, safetensors.torch as s; old, new = sys.argv[1:]; t = {read}; "
    code += "s.save_file({k: v.contiguous().clone() for k, v in t.items()}, new)"
    return f'python -c "{code}" {shlex.quote(str(file))} {shlex.quote(str(new))}'


def _stored(name, shape, naming):
    """How a file of this naming stores a parameter → its shape there, and a function that makes our tensor of it."""
    part = re.search(r"\.attn\.([qkv])_proj\.", name)
    if naming is OPENAI and part:  # q, k and v stand one below the other in one matrix
        number = "qkv".index(part[1])
        return (3 * shape[0], *shape[1:]), lambda tensor: tensor.chunk(3)[number]
    if naming is OPENAI and name.endswith(".proj.weight"):
        return shape[::-1], lambda tensor: tensor.T.contiguous()
    return shape, lambda tensor: tensor


def save_clip(clip, file, dtype=torch.float16, naming=HUGGING_FACE):
    """Write a `CLIP`, without adapters, to a .safetensors file by the tensor names of the `naming`. float16's range is
    enough, and its rounding (1/2000) is far smaller than the difference between two training runs."""
    own, tensors = clip.state_dict(), {}
    for name, tensor in own.items():
        if naming is OPENAI and name.endswith(".proj.weight"):
            tensor = tensor.T
        if naming is OPENAI and "attn.q_proj" in name:
            tensor = torch.cat([own[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        if naming is OPENAI and (".k_proj" in name or ".v_proj" in name):
            continue  # they stand below q
        tensors[translate(name, naming)] = tensor.to(dtype).contiguous()
    save_tensors(tensors, file, {"format": "pt"})


def infer_config(tensors, naming, file):
    """Read the architecture off the tensors' names and shapes. naming: `HUGGING_FACE`, `OPENAI`, or [] for our own."""

    def shape(name, dims):
        source = translate(name, naming)
        if source not in tensors or tensors[source].dim() != dims or 0 in tensors[source].shape:
            raise UserError(f"{file} is no CLIP ViT, it has no {dims}-dimensional {source}; name another by --weights")
        return tensors[source].shape

    def layers(name):
        pattern = re.compile(re.escape(translate(name, naming)) + r"\.(\d+)\.")
        return len({m[1] for m in map(pattern.match, tensors) if m})  # a gap shows as a missing tensor

    vision_width, _, patch_size, _ = shape("visual.patch_embed.weight", 4)
    vocab_size, text_width = shape("text.token_embedding.weight", 2)
    grid = math.isqrt(shape("visual.position_embedding", 2)[0] - 1)
    projection = shape("text.proj.weight", 2)
    context_length = shape("text.position_embedding", 2)[0]
    if not (grid and layers("visual.blocks") and layers("text.blocks") and context_length > 2):
        raise UserError(f"{file} is no CLIP ViT, it lacks patches, blocks or positions; name another")
    return CLIPConfig(
        embed_dim=projection[1] if naming is OPENAI else projection[0],
        image_size=grid * patch_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=layers("visual.blocks"),
        context_length=context_length,
        vocab_size=vocab_size,
        text_width=text_width,
        text_layers=layers("text.blocks"),
    )


def refuse_odd(tensors, file):
    """Raise UserError where a tensor holds a value that is not finite, or other than floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{file} holds no floating-point numbers in {name}, but {tensor.dtype}; get another file")
        # NaN and infinity survive a sum, which is 20 times as fast as looking at each value.
        if not math.isfinite(tensor.float().sum()) and not tensor.float().isfinite().all():
            raise UserError(f"{file} holds values that are not finite, in {name}; restore a copy, or get it again")


def fingerprint(tensors):
    """A short hash that tells a model's weights from others': of the names, shapes and values of all tensors, {name:
    tensor}. A value counts as float32, so that a file in half precision and its copy in float32 are the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = np.ascontiguousarray(tensor.float().cpu().numpy())
        checksum = zlib.crc32(
            values.reshape(-1).view(np.uint8)
        )  # under half of SHA-256's time; all of ViT-B/16 takes 0.15 s
        digest.update(f"{name} {tuple(tensor.shape)} {checksum}".encode())
    return digest.hexdigest()[:16]


def base_folder(weights):
    """The --weights flag → where the base model is: a name is a folder of weights/, anything else a path."""
    return WEIGHTS / weights if weights in NAMES else Path(weights)


# ---------------------------------------------------------------------------------------------------------------------
# Our own files


def write_safetensors(file, tensors, info):
    """Tensors and a JSON object, whole or not at all."""
    save_tensors(tensors, file, {"info": json.dumps(info)})


def save_tensors(tensors, file, metadata):
    """Write a .safetensors file, whole or not at all. metadata: {text: text}."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with whole(file) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as problem:
            raise OSError(str(problem)) from None


def read_safetensors(file):
    """→ (tensors, JSON object) as `write_safetensors` wrote them. Raises UserError."""
    try:
        if not os.path.isfile(file):  # a pipe, say, which may never end
            raise OSError("it is no file")
        with open(file, "rb"), safe_open(file, "pt") as f:
            info = parse_json(f.metadata()["info"])
            if not isinstance(info, dict):
                raise ValueError("its metadata is no JSON object")
            # cloned: the file may be written anew while its tensors are in use
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as problem:
        raise UserError(
            f"{file} is not a file of ours or is damaged ({reason(problem)}); restore a copy, or train again"
        ) from None
    refuse_odd(tensors, file)
    return tensors, info


def main():
    print("the same parameter here, in Hugging Face's files and in OpenAI's:")
    for name in ("visual.patch_embed.weight", "visual.blocks.0.attn.q_proj.weight", "text.proj.weight"):
        print(f"  {name:36} {translate(name, HUGGING_FACE):54} {translate(name, OPENAI)}")
    clip = load_clip(base_folder("phantom"))
    print(f"read off the shapes of weights/phantom: {clip.config}")
    print(f"fingerprint {fingerprint(clip.state_dict())}", end="; ")
    with torch.no_grad():
        clip.visual.proj.weight += 1e-3
    print(f"with one matrix changed by a thousandth {fingerprint(clip.state_dict())}")


if __name__ == "__main__":
    main()
