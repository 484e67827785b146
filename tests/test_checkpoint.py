"""checkpoint.py against files in both namings, whole and broken."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import gap, random_pixels, random_tokens

from checkpoint import load_clip
from errors import UserError
from model import CLIPConfig

ROOT = Path(__file__).parent.parent


def as_openai(tensors):
    """Hugging Face's tensors under the names and in the layout of OpenAI's checkpoints, with their bookkeeping."""
    renamed = {
        "logit_scale": tensors["logit_scale"],
        "visual.class_embedding": tensors["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": tensors["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": tensors["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": tensors["visual_projection.weight"].T.contiguous(),
        "token_embedding.weight": tensors["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "text_projection": tensors["text_projection.weight"].T.contiguous(),
        "input_resolution": torch.tensor(224),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    }
    for kind in ("weight", "bias"):
        renamed[f"visual.ln_pre.{kind}"] = tensors[f"vision_model.pre_layrnorm.{kind}"]
        renamed[f"visual.ln_post.{kind}"] = tensors[f"vision_model.post_layernorm.{kind}"]
        renamed[f"ln_final.{kind}"] = tensors[f"text_model.final_layer_norm.{kind}"]
        for theirs, ours in (
            ("vision_model.encoder.layers", "visual.transformer.resblocks"),
            ("text_model.encoder.layers", "transformer.resblocks"),
        ):
            for i in range(sum(name.startswith(theirs) and name.endswith("fc1.bias") for name in tensors)):
                qkv = [tensors[f"{theirs}.{i}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                renamed[f"{ours}.{i}.attn.in_proj_{kind}"] = torch.cat(qkv)
                renamed[f"{ours}.{i}.attn.out_proj.{kind}"] = tensors[f"{theirs}.{i}.self_attn.out_proj.{kind}"]
                renamed[f"{ours}.{i}.mlp.c_fc.{kind}"] = tensors[f"{theirs}.{i}.mlp.fc1.{kind}"]
                renamed[f"{ours}.{i}.mlp.c_proj.{kind}"] = tensors[f"{theirs}.{i}.mlp.fc2.{kind}"]
                renamed[f"{ours}.{i}.ln_1.{kind}"] = tensors[f"{theirs}.{i}.layer_norm1.{kind}"]
                renamed[f"{ours}.{i}.ln_2.{kind}"] = tensors[f"{theirs}.{i}.layer_norm2.{kind}"]
    return renamed


def assert_same_weights(ours, theirs):
    expected = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == expected.keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def loading_error(path):
    with pytest.raises(UserError) as caught:
        load_clip(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(params=["Hugging Face", "OpenAI"])
def checkpoint(request, small):
    """The small model's tensors in either naming."""
    tensors = load_file(small.folder / "model.safetensors")
    return as_openai(tensors) if request.param == "OpenAI" else tensors


@torch.no_grad()
def test_openais_naming_loads_the_same_model(vit_b16, tmp_path):
    file = tmp_path / "ViT-B-16.safetensors"
    save_file(as_openai(load_file(vit_b16.folder / "model.safetensors")), file)
    ours, theirs = load_clip(file), load_clip(vit_b16.folder)
    file.unlink()
    assert ours.config == theirs.config
    assert_same_weights(ours, theirs)
    # The features are not asked to be the same bits: BLAS rounds by the address at which the file's tensors are mapped.
    pixels, tokens = random_pixels(vit_b16.config, batch=1), random_tokens(vit_b16.config, [4])
    assert gap(ours.encode_image(pixels), theirs.encode_image(pixels)) < 1e-6
    assert gap(ours.encode_text(tokens), theirs.encode_text(tokens)) < 1e-6


def test_position_ids_of_old_hugging_face_files_are_passed_over(small, tmp_path):
    tensors = load_file(small.folder / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(21)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(26)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_weights(load_clip(tmp_path), load_clip(small.folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_float32(checkpoint, dtype, small, tmp_path):
    halves = {name: t.to(dtype) if t.is_floating_point() else t for name, t in checkpoint.items()}
    save_file(halves, tmp_path / "model.safetensors")
    expected = load_clip(small.folder)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(parameter.to(dtype))
    ours = load_clip(tmp_path)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert_same_weights(ours, expected)


def test_another_dtype_is_loaded_on_request(small):
    assert all(p.dtype == torch.bfloat16 for p in load_clip(small.folder, dtype=torch.bfloat16).parameters())


def test_the_architecture_is_read_off_the_shapes(vit_b16, small, checkpoint, tmp_path):
    assert load_clip(vit_b16.folder).config == CLIPConfig(512, 224, 16, 768, 12, 77, 49408, 512, 12)
    save_file(checkpoint, tmp_path / "model.safetensors")
    assert load_clip(tmp_path / "model.safetensors").config == small.config


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's own peak memory")
def test_loading_holds_the_file_in_memory_only_once(vit_b16):
    # Not ru_maxrss: a child starts with its parent's, and this process is large.
    script = """
import sys
from checkpoint import load_clip

def peak():
    line, = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

before = peak()
assert all(p.detach().sum().isfinite() for p in load_clip(sys.argv[1]).parameters())
print(peak() - before)
"""
    command = [sys.executable, "-c", script, vit_b16.folder]
    grown = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    size = (vit_b16.folder / "model.safetensors").stat().st_size
    assert 0.9 * size < grown < 1.3 * size


def test_training_does_not_write_into_the_file(small):
    file = small.folder / "model.safetensors"
    before = file.read_bytes()
    clip = load_clip(small.folder)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not a CLIP


@pytest.mark.parametrize("name", ["nothing", "nothing.safetensors", "."])
def test_missing_weights_say_how_to_get_them(tmp_path, name):
    assert "`python weights/download.py --model clip-vit-b-16`" in loading_error(tmp_path / name)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_file_is_not_whole(small, tmp_path, kept):
    file = tmp_path / "model.safetensors"
    file.write_bytes((small.folder / "model.safetensors").read_bytes()[:kept])
    message = loading_error(file)
    assert str(file) in message
    assert "download it again" in message


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("<!DOCTYPE html>\n<html>Not found</html>\n" * 100)
    assert "is no safetensors file or damaged" in loading_error(tmp_path)


@pytest.mark.parametrize("tensors", [{}, {"fc.weight": torch.zeros(3, 3)}, {"visual.conv1.weight": torch.zeros(3)}])
def test_tensors_of_something_else_are_not_a_clip(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    assert "is no CLIP ViT" in loading_error(tmp_path)


def test_a_width_without_whole_heads_is_not_a_clip(tmp_path, checkpoint):
    name = next(name for name in checkpoint if name.endswith("token_embedding.weight"))
    checkpoint[name] = checkpoint[name][:, :100].contiguous()
    save_file(checkpoint, tmp_path / "model.safetensors")
    assert "100 don't tell how many heads" in loading_error(tmp_path)


def test_every_misfit_is_named_as_the_file_names_it(tmp_path, checkpoint):
    openai = "visual.proj" in checkpoint
    block = "visual.transformer.resblocks.1" if openai else "vision_model.encoder.layers.1"
    missing = ["logit_scale", f"{block}.attn.in_proj_bias" if openai else f"{block}.self_attn.v_proj.bias"]
    unexpected = ["visual.head.weight", f"{block}.attn.extra"]
    misshaped = [
        "positional_embedding" if openai else "text_model.embeddings.position_embedding.weight",
        "visual.ln_post.weight" if openai else "vision_model.post_layernorm.weight",
        f"{block}.attn.in_proj_weight" if openai else f"{block}.self_attn.q_proj.weight",
        "visual.proj" if openai else "visual_projection.weight",
    ]
    for name in missing:
        del checkpoint[name]
    for name in unexpected:
        checkpoint[name] = torch.zeros(2)
    for name in misshaped:
        checkpoint[name] = torch.cat([checkpoint[name], checkpoint[name]], dim=-1)
    save_file(checkpoint, tmp_path / "model.safetensors")
    message = loading_error(tmp_path)
    named = dict(
        part.split(": ")
        for part in message.split("does not fit a CLIP ViT, name another by --weights: ")[1].split("; ")
    )
    assert set(named["missing"].split(", ")) == set(missing)
    assert set(named["unexpected"].split(", ")) == set(unexpected)
    assert set(re.findall(r"([\w.]+) is \(", named["mis-shaped"])) == set(misshaped)


def test_a_misfits_shapes_are_those_in_the_file(tmp_path, checkpoint):
    if "visual.proj" in checkpoint:
        checkpoint["visual.proj"] = torch.zeros(3, 5)
        checkpoint["visual.transformer.resblocks.0.attn.in_proj_bias"] = torch.tensor(1.0)
        says = ["visual.proj is (3, 5) instead of (128, 48)", "attn.in_proj_bias is () instead of (384,)"]
    else:
        checkpoint["visual_projection.weight"] = torch.zeros(3, 5)
        says = ["visual_projection.weight is (3, 5) instead of (48, 128)"]
    save_file(checkpoint, tmp_path / "model.safetensors")
    message = loading_error(tmp_path)
    assert all(part in message for part in says), message


@pytest.mark.parametrize("empty", ["patches", "blocks", "patch"])
def test_a_tower_of_nothing_is_not_a_clip(tmp_path, checkpoint, empty):
    tower = "visual" if "visual.proj" in checkpoint else "vision_model"
    for name in list(checkpoint):
        if empty == "blocks" and name.startswith(tower) and re.search(r"\.(resblocks|layers)\.", name):
            del checkpoint[name]
        elif empty == "patches" and name.startswith(tower) and "position" in name:
            checkpoint[name] = checkpoint[name][:1]
        elif empty == "patch" and re.search(r"visual\.conv1|patch_embedding", name):
            checkpoint[name] = torch.zeros(128, 3, 0, 0)
    save_file(checkpoint, tmp_path / "model.safetensors")
    assert "is no CLIP ViT" in loading_error(tmp_path)
