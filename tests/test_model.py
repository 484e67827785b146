"""model.py against transformers' CLIP, and its loader against files in both namings, whole and broken."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import UserError
from model import CLIP, CLIPConfig, load_clip

ROOT = Path(__file__).parent.parent


def gap(ours, theirs):
    """The largest relative error of a row."""
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()


def image_features(reference, pixels):
    return reference.model.get_image_features(pixels).pooler_output


def text_features(reference, tokens):
    return reference.model.get_text_features(tokens).pooler_output


def random_pixels(config, batch=2):
    return torch.randn(batch, 3, config.image_size, config.image_size)


def random_tokens(config, lengths, pad=0):
    """Texts of these lengths, start and end token included, filled up to the context length with `pad`."""
    start, end = config.vocab_size - 2, config.vocab_size - 1
    tokens = torch.full((len(lengths), config.context_length), pad)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.tensor([start, *torch.randint(1, start, (length - 2,)), end])
    return tokens


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


# ---------------------------------------------------------------------------------------------------------------------
# The same features as transformers


def test_the_reference_is_vit_b16(vit_b16):
    assert sum(p.numel() for p in vit_b16.model.parameters()) == 149_620_737
    assert all(p.ne(0).all() and p.ne(1).all() for p in vit_b16.model.parameters() if p.dim() < 2)


@pytest.mark.parametrize("size", ["vit_b16", "small"])
@torch.no_grad()
def test_image_features_are_those_of_transformers(request, size):
    reference = request.getfixturevalue(size)
    pixels = random_pixels(reference.config)
    ours = load_clip(reference.folder).encode_image(pixels)
    assert ours.dtype == torch.float32
    assert gap(ours, image_features(reference, pixels)) < 1e-5


@pytest.mark.parametrize("size", ["vit_b16", "small"])
@torch.no_grad()
def test_text_features_are_those_of_transformers_with_any_padding_or_none(request, size):
    reference = request.getfixturevalue(size)
    config = reference.config
    zero_padded = random_tokens(config, [2, 3, 17], pad=0)
    end_padded = random_tokens(config, [2, 9, 17], pad=config.vocab_size - 1)
    tokens = torch.cat([zero_padded, end_padded])
    expected = text_features(reference, tokens)
    clip = load_clip(reference.folder)
    assert gap(clip.encode_text(tokens), expected) < 1e-5
    assert gap(clip.encode_text(tokens[:, :17]), expected) < 1e-5


@torch.no_grad()
def test_a_text_that_fills_the_context_is_encoded(small):
    tokens = random_tokens(small.config, [small.config.context_length, 4])
    assert gap(load_clip(small.folder).encode_text(tokens), text_features(small, tokens)) < 1e-5


@torch.no_grad()
def test_visual_gives_the_cls_token_after_every_block(vit_b16):
    pixels = random_pixels(vit_b16.config)
    cls = load_clip(vit_b16.folder).visual(pixels)
    hidden = vit_b16.model.vision_model(pixels, output_hidden_states=True).hidden_states
    assert cls.shape == (2, 12, 768)
    assert len(hidden) == 13
    for i in range(12):
        assert gap(cls[:, i], hidden[i + 1][:, 0]) < 1e-5


@pytest.mark.parametrize("shape", [(1, 3, 48, 48), (1, 3, 40, 48), (1, 1, 40, 40), (3, 40, 40)])
def test_pixels_of_another_shape_are_refused(small, shape):
    with pytest.raises(ValueError, match=r"\(B, 3, 40, 40\)"):
        load_clip(small.folder).encode_image(torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Training from scratch


def test_initialize_draws_what_clips_own_code_draws():
    config = CLIPConfig(64, 64, 8, vision_width=256, vision_layers=2, vocab_size=400, text_width=128, text_layers=3)
    weights = dict(CLIP(config).initialize().named_parameters())
    expected = {
        "visual.blocks.1.attn.k_proj.weight": 256**-0.5,
        "visual.blocks.1.attn.out_proj.weight": 256**-0.5 / 2,
        "visual.blocks.0.mlp.fc1.weight": 512**-0.5,
        "visual.blocks.0.mlp.fc2.weight": 256**-0.5 / 2,
        "visual.position_embedding": 256**-0.5,
        "visual.proj.weight": 256**-0.5,
        "text.blocks.2.attn.q_proj.weight": 128**-0.5,
        "text.blocks.2.attn.v_proj.weight": 128**-0.5,
        "text.blocks.2.attn.out_proj.weight": 128**-0.5 * 6**-0.5,
        "text.blocks.0.mlp.fc1.weight": 256**-0.5,
        "text.blocks.0.mlp.fc2.weight": 128**-0.5 * 6**-0.5,
        "text.token_embedding.weight": 0.02,
        "text.position_embedding": 0.01,
        "text.proj.weight": 128**-0.5,
    }
    for name, std in expected.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.05), name
        assert abs(weights[name].mean().item()) < 0.05 * std, name
    assert weights["visual.class_embedding"].std().item() == pytest.approx(1 / 16, rel=0.2)
    for name, parameter in weights.items():
        if name.endswith(".bias"):
            assert not parameter.any(), name
        elif ".ln_" in name:
            assert parameter.eq(1).all(), name
    assert weights["logit_scale"].item() == pytest.approx(math.log(1 / 0.07))


def test_gradients_reach_every_parameter(small):
    clip = load_clip(small.folder)
    image = clip.encode_image(random_pixels(small.config))
    text = clip.encode_text(random_tokens(small.config, [5, small.config.context_length]))
    (clip.logit_scale.exp() * image @ text.T).square().sum().backward()
    for name, parameter in clip.named_parameters():
        # A key bias shifts all of a query's logits alike, so softmax ignores it and its gradient is only rounding.
        assert parameter.grad is not None, name
        assert parameter.grad.any() or name.endswith("k_proj.bias"), name


# ---------------------------------------------------------------------------------------------------------------------
# Loading


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
from model import load_clip

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
    assert "`python weights/download.py`" in loading_error(tmp_path / name)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_file_is_not_whole(small, tmp_path, kept):
    file = tmp_path / "model.safetensors"
    file.write_bytes((small.folder / "model.safetensors").read_bytes()[:kept])
    message = loading_error(file)
    assert str(file) in message
    assert "download it again" in message


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("<!DOCTYPE html>\n<html>Not found</html>\n" * 100)
    assert "is not a whole safetensors file" in loading_error(tmp_path)


@pytest.mark.parametrize("tensors", [{}, {"fc.weight": torch.zeros(3, 3)}, {"visual.conv1.weight": torch.zeros(3)}])
def test_tensors_of_something_else_are_not_a_clip(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    assert "is not a CLIP ViT checkpoint" in loading_error(tmp_path)


def test_a_width_without_whole_heads_is_not_a_clip(tmp_path, checkpoint):
    name = next(name for name in checkpoint if name.endswith("token_embedding.weight"))
    checkpoint[name] = checkpoint[name][:, :100].contiguous()
    save_file(checkpoint, tmp_path / "model.safetensors")
    assert "width 100 is not a multiple of 64" in loading_error(tmp_path)


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
    named = dict(part.split(": ") for part in message.split("does not fit a CLIP ViT: ")[1].split("; "))
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
    assert "is not a CLIP ViT checkpoint" in loading_error(tmp_path)
