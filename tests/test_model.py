"""model.py against transformers' CLIP."""

import math
from pathlib import Path

import pytest
import torch

from checkpoint import load_clip
from model import CLIP, CLIPConfig

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
