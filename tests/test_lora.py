"""lora.py against its formula and against PEFT."""

import copy

import peft
import pytest
import torch
from torch import nn

from checkpoint import HUGGING_FACE, load_clip, translate
from lora import PROJECTIONS, LoRALinear, add_lora, merge_lora, unmerge_lora
from model import CLIP, CLIPConfig


def gap(ours, theirs):
    """The largest relative error of a row."""
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()


def inputs(config):
    tokens = torch.randint(1, config.vocab_size - 2, (3, 11))
    tokens[:, -1] = config.vocab_size - 1
    return torch.randn(2, 3, config.image_size, config.image_size), tokens


def features(clip, pixels, tokens):
    return torch.cat([clip.encode_image(pixels), clip.encode_text(tokens)])


@torch.no_grad()
def train(layers):
    """Give B, which starts at zero, values as if it had been trained."""
    for layer in layers:
        nn.init.normal_(layer.lora_B.weight, std=0.1)


def random_layer(width=128, out=96, rank=4, alpha=10.0, dropout=0.0):
    layer = LoRALinear(nn.Linear(width, out), rank, alpha, dropout)
    train([layer])
    return layer


def adapted(clip):
    return {name for name, module in clip.named_modules() if isinstance(module, LoRALinear)}


def test_rank_8_on_all_attention_of_vit_b16_trains_983_040_parameters():
    with torch.device("meta"):
        clip = CLIP(CLIPConfig()).requires_grad_(False)
        layers = add_lora(clip, rank=8)
    assert len(layers) == 2 * 12 * 4
    assert sum(p.numel() for p in clip.parameters() if p.requires_grad) == 983_040


@torch.no_grad()
def test_a_layer_computes_the_formula():
    layer, x = random_layer(), torch.randn(7, 3, 128)
    W, b, A, B = (p.double() for p in (layer.base.weight, layer.base.bias, layer.lora_A.weight, layer.lora_B.weight))
    x64 = x.double()
    assert gap(layer(x), x64 @ W.T + b + 10 / 4 * (x64 @ A.T) @ B.T) < 1e-6


@torch.no_grad()
def test_an_untrained_adapter_changes_no_bit(small):
    clip, example = load_clip(small.folder), inputs(small.config)
    before = features(clip, *example)
    add_lora(clip, projections=PROJECTIONS)
    assert torch.equal(features(clip, *example), before)


@torch.no_grad()
def test_merging_keeps_the_function_and_unmerging_the_weights(small):
    clip, example = load_clip(small.folder), inputs(small.config)
    before = features(clip, *example)
    layers = add_lora(clip, projections=PROJECTIONS)
    train(layers)
    weights = [layer.base.weight.clone() for layer in layers]
    unmerged = features(clip, *example)
    assert gap(unmerged, before) > 0.01

    merge_lora(clip)
    merged = features(clip, *example)
    assert gap(merged, unmerged) < 1e-5
    for layer in layers:
        layer.lora_A.weight.mul_(2)  # a merged layer no longer takes the detour
    assert torch.equal(features(clip, *example), merged)
    for layer in layers:
        layer.lora_A.weight.div_(2)
    merge_lora(clip)
    assert torch.equal(features(clip, *example), merged)

    unmerge_lora(clip)
    assert all(gap(layer.base.weight, weight) < 1e-6 for layer, weight in zip(layers, weights, strict=True))
    assert gap(features(clip, *example), unmerged) < 1e-5
    unmerge_lora(clip)
    assert gap(features(clip, *example), unmerged) < 1e-5


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (
            {"projections": ("q", "fc2"), "blocks": (2,), "towers": ("text",)},
            {"text.blocks.1.attn.q_proj", "text.blocks.1.mlp.fc2"},
        ),
        (
            {"projections": ["v"], "blocks": [1, 5]},  # the text tower has three blocks
            {"visual.blocks.0.attn.v_proj", "visual.blocks.4.attn.v_proj", "text.blocks.0.attn.v_proj"},
        ),
        (
            {"projections": ("k", "fc1"), "towers": ("visual",)},
            {f"visual.blocks.{i}.{name}" for i in range(5) for name in ("attn.k_proj", "mlp.fc1")},
        ),
        (
            {},
            {f"visual.blocks.{i}.attn.{name}_proj" for i in range(5) for name in ("q", "k", "v", "out")}
            | {f"text.blocks.{i}.attn.{name}_proj" for i in range(3) for name in ("q", "k", "v", "out")},
        ),
    ],
)
def test_exactly_the_named_layers_are_adapted(small, choice, expected):
    clip = load_clip(small.folder)
    layers = add_lora(clip, **choice)
    assert adapted(clip) == expected
    assert {id(layer) for layer in layers} == {id(clip.get_submodule(name)) for name in expected}


def test_with_a_frozen_base_gradients_reach_only_a_and_b(small):
    clip = load_clip(small.folder).requires_grad_(False)
    train(add_lora(clip, projections=PROJECTIONS))
    features(clip, *inputs(small.config)).square().sum().backward()
    reached = {name for name, p in clip.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {f"{layer}.{matrix}.weight" for layer in adapted(clip) for matrix in ("lora_A", "lora_B")}


@torch.no_grad()
def test_dropout_acts_on_the_detour_in_training_only():
    layer = random_layer(dropout=0.5)
    x = torch.randn(128).expand(4000, 128)
    layer.eval()
    still = layer(x)
    assert torch.equal(layer(x), still)
    layer.train()
    noisy = layer(x)
    assert not torch.equal(layer(x), noisy)
    assert gap(noisy.mean(0), still[0]) < 0.05
    nn.init.zeros_(layer.lora_B.weight)
    assert torch.equal(layer(x), layer.base(x))


def peft_twin(reference, rank, alpha, projections):
    modules = [PROJECTIONS[name].split(".")[1] for name in projections]
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)
    return peft.get_peft_model(copy.deepcopy(reference.model), settings).eval()


@pytest.mark.parametrize("projections", [("q", "k", "v", "out"), tuple(PROJECTIONS)])
@torch.no_grad()
def test_peft_computes_the_same_with_the_same_a_and_b(small, projections):
    clip = load_clip(small.folder)
    train(add_lora(clip, rank=4, alpha=10.0, projections=projections))
    twin = peft_twin(small, 4, 10, projections)
    adapter = {
        f"base_model.model.{translate(name, HUGGING_FACE)}": parameter
        for name, parameter in clip.named_parameters()
        if ".lora_" in name
    }
    assert adapter.keys() == peft.get_peft_model_state_dict(twin).keys()
    peft.set_peft_model_state_dict(twin, adapter)

    pixels, tokens = inputs(small.config)
    assert gap(clip.encode_image(pixels), twin.get_image_features(pixels).pooler_output) < 1e-5
    assert gap(clip.encode_text(tokens), twin.get_text_features(tokens).pooler_output) < 1e-5


def test_a_and_b_start_as_peft_starts_them(small):
    twin = peft_twin(small, 32, 32, ["fc2"]).base_model.model.vision_model.encoder.layers[0].mlp.fc2
    layer = LoRALinear(nn.Linear(512, 128), rank=32, alpha=32)
    for A in (layer.lora_A.weight, twin.lora_A["default"].weight):
        assert A.shape == (32, 512)
        assert A.abs().max().item() == pytest.approx(512**-0.5, rel=0.01)
        assert A.std().item() == pytest.approx((3 * 512) ** -0.5, rel=0.02)
    assert not layer.lora_B.weight.any() and not twin.lora_B["default"].weight.any()
