"""Export a run for other programs: python weights/export.py RUN FOLDER --format hf | peft | openai

    hf       a folder that transformers' CLIPModel and CLIPProcessor load: weights with adapters merged, tokenizer,
             preprocessing. It also serves as --weights for further runs; weights/phantom was made so
    peft     the adapters alone, which PEFT loads onto the base model
    openai   weights with adapters merged by OpenAI's names, and their configuration, as open_clip loads them

The fusion of levels and the class head are no part of CLIP. They are written beside it, into fusion_head.safetensors;
the README shows how to use them.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parents[1]))
from build import read_run
from checkpoint import HUGGING_FACE, OPENAI, base_folder, save_clip, write_safetensors
from cli import Parser, add_machine_flags, file_path, find_device, typed
from clip_config import RESAMPLE, RESIZE_MODES
from data import load_dataset
from encoding import encode_images
from errors import UserError, run_script, shown
from files import make_folder, write_json
from lora import fold_lora
from peft_format import CONFIG, HUB, TENSORS, save_adapter
from runs import find_run
from split_file import read_split
from splits import scored_split
from tokenizer import END, START, save_merges
from trust import find_data, follow_images

EXTRA = "fusion_head.safetensors"
WEIGHTS = {"hf": "model.safetensors", "peft": TENSORS, "openai": "open_clip_model.safetensors"}
TAKEN = (*WEIGHTS.values(), "adapter.safetensors", "last.safetensors")  # what no second export may stand beside


def to_transformers(config):
    """CLIPConfig → the JSON objects of config.json and preprocessor_config.json. Raises UserError for a frame that
    CLIPImageProcessor doesn't have."""
    how, size = config.preprocessing, config.image_size
    if how.frame not in ("crop", "squash"):
        raise UserError(f"CLIPProcessor has nothing like --frame {how.frame}; export a run of --frame crop or squash")
    same = {"hidden_act": config.activation, "layer_norm_eps": config.norm_eps, "projection_dim": config.embed_dim}
    square = {"height": size, "width": size}
    model = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "text_config": same
        | {
            "model_type": "clip_text_model",
            "hidden_size": config.text_width,
            "intermediate_size": 4 * config.text_width,
            "num_attention_heads": config.text_width // config.text_head_width,
            "num_hidden_layers": config.text_layers,
            "max_position_embeddings": config.context_length,
            "vocab_size": config.vocab_size,
            "bos_token_id": config.vocab_size - 2,
            "eos_token_id": config.vocab_size - 1,
        },
        "vision_config": same
        | {
            "model_type": "clip_vision_model",
            "hidden_size": config.vision_width,
            "intermediate_size": 4 * config.vision_width,
            "num_attention_heads": config.vision_width // config.vision_head_width,
            "num_hidden_layers": config.vision_layers,
            "image_size": size,
            "patch_size": config.patch_size,
        },
    }
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if how.frame == "crop" else square,
        "resample": {name: number for number, name in RESAMPLE.items()}[how.resample],
        "do_center_crop": how.frame == "crop",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
    }
    return model, pixels


def to_open_clip(config):
    """CLIPConfig → the JSON object of open_clip_config.json. Raises UserError for what it can't say."""
    how = config.preprocessing
    if how.frame == "field":
        raise UserError("open_clip has nothing like --frame field; export a run of another frame")
    norm = {} if config.norm_eps == 1e-5 else {"norm_kwargs": {"eps": config.norm_eps}}
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": config.image_size,
            "layers": config.vision_layers,
            "width": config.vision_width,
            "patch_size": config.patch_size,
            "head_width": config.vision_head_width,
            **norm,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": config.vocab_size,
            "width": config.text_width,
            "heads": config.text_width // config.text_head_width,
            "layers": config.text_layers,
            **norm,
        },
    }
    pixels = {
        "mean": list(how.mean),
        "std": list(how.std),
        "interpolation": how.resample,
        "resize_mode": {ours: theirs for theirs, ours in RESIZE_MODES.items()}[how.frame],
    }
    return {"model_cfg": model, "preprocess_cfg": pixels}


def export_tokenizer(tokenizer, context_length, folder):
    """What transformers' CLIPTokenizer reads."""
    save_merges(tokenizer.ranks, folder / "merges.txt")
    write_json(folder / "vocab.json", tokenizer.ids)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", special)
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", about | special)


def name_of_base(metadata, base, run):
    """→ what PEFT calls the base model. Raises UserError where a run has no adapters, or nothing that PEFT could load
    them onto."""
    if metadata.settings.full or not metadata.settings.lora_rank:
        raise UserError(f"{run} has no adapters; use --format hf or openai")
    path = base_folder(base)
    if any((path / name).is_file() for name in ("adapter.safetensors", CONFIG)):
        raise UserError(f"{run} was trained on {base}, which has adapters itself; use --format hf or openai")
    on_hub = {ours: theirs for theirs, ours in HUB.items()}
    return on_hub[base] if base in on_hub else str(path.resolve())


def export_extra(model, metadata, folder):
    """Write what CLIP has no place for: fusion, class head, and the trained scale."""
    state = model.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if name == "head" or name.startswith("fusion.")}
    fusion = {"mode": "none"} if model.fusion is None else {"mode": model.fusion.mode, "levels": model.fusion.levels}
    classes = {"classes": metadata.classes, "prompts": metadata.prompts}
    write_safetensors(folder / EXTRA, tensors, fusion | {"scale": model.scale.item()} | classes)


def compare_fused(model, metadata, run, data, device, workers):
    """→ a line on how far the fused embeddings are from those of the last level, CLIP's own, over held-out images."""
    try:
        place = find_data(data, metadata, run)
        splits = read_split(run, load_dataset(place) if data or place == "phantom" else None)
        follow_images(splits, run)
        files = [sample.image for sample in splits[scored_split(splits)]]
        fused = encode_images(model, files, device, 32, workers)
    except UserError as problem:
        return f"how far they are apart is not known ({problem})"
    fusion, model.fusion = model.fusion, None
    last = encode_images(model, files, device, 32, workers)
    model.fusion = fusion
    cosines = F.cosine_similarity(fused, last)
    return f"over {len(files):,} held-out images their cosine is {cosines.mean():.3f}, at least {cosines.min():.3f}"


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("run", type=file_path, help="a fine-tuned model's folder")
    parser.add_argument("folder", type=file_path, help="where to write")
    parser.add_argument("--format", choices=tuple(WEIGHTS), default="hf", help="whose files to write")
    parser.add_argument("--half", action="store_true", help="weights in float16, half as large")
    parser.add_argument("--weights", type=typed(str), help="where the run's base model is, should it have moved")
    parser.add_argument("--data", type=typed(str), help="where its images are, should they have moved")
    add_machine_flags(parser)
    args = parser.parse_args()
    if args.half and args.format == "peft":
        raise UserError("--half has no effect with --format peft; leave it out")
    taken = [name for name in TAKEN if (args.folder / name).exists()]
    if taken:
        raise UserError(f"{args.folder} already holds weights, {taken[0]}; choose another folder")
    device, run = find_device(args.device, alone=True), find_run(args.run)
    model, tokenizer, metadata = read_run(run, args.weights)
    model.to(device).eval()
    config = model.clip.config
    # Each raises UserError where the format can't hold the run, before anything is written.
    if args.format == "peft":
        base = name_of_base(metadata, args.weights or metadata.base["weights"], run)
    else:
        described = to_transformers(config) if args.format == "hf" else to_open_clip(config)
    file = args.folder / WEIGHTS[args.format]
    make_folder(args.folder)
    export_extra(model, metadata, args.folder)
    distance = compare_fused(model, metadata, run, args.data, device, args.workers) if model.fusion is not None else ""
    if args.format == "peft":
        save_adapter(model.clip, metadata.settings, args.folder, base, metadata.base["fingerprint"])
    else:
        if args.format == "hf":
            export_tokenizer(tokenizer, config.context_length, args.folder)
            write_json(args.folder / "config.json", described[0])
            write_json(args.folder / "preprocessor_config.json", described[1])
        else:
            save_merges(tokenizer.ranks, args.folder / "merges.txt")
            write_json(args.folder / "open_clip_config.json", described)
        fold_lora(model.clip)
        naming = OPENAI if args.format == "openai" else HUGGING_FACE
        save_clip(model.clip, file, torch.float16 if args.half else torch.float32, naming)  # last: then all is done
    print(f"{shown(file)}: {file.stat().st_size:,} bytes")
    print(f"the class head is no part of CLIP; it is in {shown(args.folder / EXTRA)}")
    if distance:
        print(f"nor is the fusion, which is there, too. Other programs see the last level alone; {shown(distance)}")


if __name__ == "__main__":
    run_script(main)
