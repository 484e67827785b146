"""Where the model looked, against transformers' attentions and autograd, and on phantoms whose findings are known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import mistake
from PIL import Image

import explain
from build import load_base, load_run
from checkpoint import load_clip
from explain import kept_weights, relevance
from fusion import FusedCLIP
from images import normalize, to_square
from lora import add_lora
from phantom import CLASSES, draw
from pictures import overlay

CPU = torch.device("cpu")


def fused(clip):
    """A model with adapters and levels that do something."""
    torch.manual_seed(0)
    add_lora(clip, rank=2)
    model = FusedCLIP(clip, 3)
    for name, p in model.named_parameters():
        if "lora_B" in name or "mix" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model.requires_grad_(False).eval()


def test_the_map_is_that_of_transformers_attentions(small):
    """Plain CLIP, without adapters and levels: weights and gradients as transformers and autograd give them."""
    clip, theirs = (
        load_clip(small.folder),
        transformers.CLIPModel.from_pretrained(small.folder, attn_implementation="eager"),
    )
    model = FusedCLIP(clip, 2, "none").requires_grad_(False).eval()
    size = clip.config.image_size
    pixels, direction = torch.randn(3, 3, size, size), torch.randn(clip.config.embed_dim)
    found = relevance(model, pixels, direction)

    theirs.requires_grad_(True)
    output = theirs.vision_model(pixels, output_attentions=True)
    cosines = F.cosine_similarity(theirs.visual_projection(output.pooler_output), direction[None])
    gradients = torch.autograd.grad(cosines.sum(), output.attentions)
    expected = sum((a * g)[:, :, 0, 1:].mean(1) for a, g in zip(output.attentions, gradients, strict=True)).clamp(min=0)
    expected = (expected / expected.amax(1, keepdim=True)).view(found.shape).detach()
    assert found.amax((1, 2)).tolist() == pytest.approx([1, 1, 1]) and found.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_weights_are_kept_while_asked_for_and_change_nothing(small):
    model = fused(load_clip(small.folder))
    size = model.clip.config.image_size
    pixels = torch.randn(2, 3, size, size)
    plain, attentions = model.encode_image(pixels), [block.attn for block in model.clip.visual.blocks]
    with kept_weights(attentions) as kept:
        torch.testing.assert_close(model.encode_image(pixels), plain, rtol=1e-4, atol=1e-5)
    assert len(kept) == len(attentions)
    for weights in kept:
        torch.testing.assert_close(weights.sum(3), torch.ones_like(weights[..., 0]))
    assert torch.equal(model.encode_image(pixels), plain)  # as before
    with pytest.raises(ZeroDivisionError), kept_weights(attentions):
        raise ZeroDivisionError
    assert torch.equal(model.encode_image(pixels), plain) and len(kept) == len(attentions)


def test_the_products_are_what_the_weights_contribute(small):
    """All weights of a block a little larger and smaller: the score changes by the sum of the products."""
    model = fused(load_clip(small.folder))
    size = model.clip.config.image_size
    pixels, direction = torch.randn(1, 3, size, size), torch.randn(model.clip.config.embed_dim)
    attentions = [block.attn for block in model.clip.visual.blocks]

    def score():
        return F.cosine_similarity(model.encode_image(pixels), direction[None]).double().sum()

    with kept_weights(attentions) as kept, torch.enable_grad():
        gradients = torch.autograd.grad(score(), kept)
    for attention, weights, gradient in zip(attentions, kept, gradients, strict=True):
        scores = []
        for factor in (1.01, 0.99):  # of the values, which is what a factor of the weights would give
            handle = attention.v_proj.register_forward_hook(lambda module, given, made, factor=factor: made * factor)
            scores.append(score().item())
            handle.remove()
        expected = (scores[0] - scores[1]) / 0.02
        assert (weights * gradient).sum().item() == pytest.approx(expected, rel=0.02, abs=1e-4)
    assert abs(expected) > 1e-3


def test_a_direction_for_each_image(small):
    model = fused(load_clip(small.folder))
    size = model.clip.config.image_size
    pixels, directions = torch.randn(2, 3, size, size), torch.randn(2, model.clip.config.embed_dim)
    both = relevance(model, pixels, directions)
    for i in range(2):
        torch.testing.assert_close(relevance(model, pixels[i : i + 1], directions[i])[0], both[i], rtol=1e-3, atol=1e-4)
    assert (both[0] - relevance(model, pixels[:1], -directions[0])[0]).abs().max() > 0.1


def test_on_phantoms_the_map_points_at_what_the_text_names():
    """Fluid and mucus, which the small CLIP finds easily."""
    clip, tokenizer = load_base("phantom")
    model = FusedCLIP(clip, 2, "none").requires_grad_(False).eval()
    hits, chance, number = [], [], 0
    texts = {"fluid": "amber fluid behind the eardrum", "mucus": "yellow-green mucus"}
    while len(hits) < 12:
        label, places = CLASSES[number % 4], {}
        image, _ = draw(label, np.random.default_rng([9, number]), "A", places=places)
        number += 1
        for finding in places.keys() & texts.keys():
            square, mask = (to_square(p.convert("RGB"), 128) for p in (image, Image.fromarray(places[finding])))
            with torch.no_grad():
                (direction,) = model.encode_text(tokenizer([texts[finding]]))
            heat = relevance(model, normalize(torch.from_numpy(square)[None]), direction)[0]
            row, column = divmod(heat.argmax().item(), 8)
            patch = mask[16 * row : 16 * row + 16, 16 * column : 16 * column + 16, 0]
            hits.append((patch > 127).any())
            chance.append((mask > 127).mean())
    assert np.mean(hits) > 0.7 > 3 * np.mean(chance)


def test_findings_are_marked_where_they_are_drawn():
    """The darkest part of an ear is its hole; amber fluid is amber. Nothing else about a phantom changes."""
    seen = set()
    for number in range(140):
        places, label = {}, CLASSES[number % 7]
        image, caption = draw(label, np.random.default_rng([3, number]), places=places)
        plain, same = draw(label, np.random.default_rng([3, number]))
        assert plain.tobytes() == image.tobytes() and same == caption
        pixels = np.asarray(image, float)
        for finding, place in places.items():
            seen.add((label.split("-")[0], finding))
            assert place.shape == (240, 320) and 20 < place.sum() < 20_000
            if finding == "hole":
                assert np.median(pixels[place]) < 60
            if finding == "fluid":
                assert np.median(pixels[place][:, 0] - pixels[place][:, 2]) > 15
    assert len(seen) == 12


# ---------------------------------------------------------------------------------------------------------------------


def test_the_script_writes_a_picture(script, trained, pictures, tmp_path):
    image = next((pictures / "images").rglob("*.png"))
    for number, flags in enumerate(
        ((), ("--text", "a red shape"), ("--class", sorted(p.name for p in (pictures / "images").iterdir())[0]))
    ):
        status, out, err = script(explain, image, "--run", trained, "--out", f"{number}.png", *flags)
        assert status == 0, err
        assert "cosine" in out and Image.open(tmp_path / f"{number}.png").width > 800
    assert len({(tmp_path / f"{number}.png").read_bytes() for number in range(3)}) > 1
    assert "knows no class" in mistake(script(explain, image, "--run", trained, "--class", "none"))
    assert "--out cannot write" in mistake(script(explain, image, "--run", trained, "--out", "x.txt"))
    assert "there is no such file" in mistake(script(explain, "missing.png", "--run", trained))


def test_a_loaded_run_can_be_explained_after_it_was_used(trained, pictures):
    """Weights that were merged under inference mode cannot be asked for gradients."""
    from encoding import encode_images

    model, _, _ = load_run(trained, CPU)
    files = sorted((pictures / "images").rglob("*.png"))[:3]
    encode_images(model, files, CPU, 2, 0, None)
    pairs = explain.explain(model, files, model.head[0].detach(), CPU, batch_size=2)
    assert len(pairs) == 3 and all(heat.max() <= 1 and heat.shape == (2, 2) for _, heat in pairs)


def test_an_overlay_is_grey_where_nothing_is_and_bright_where_most_is():
    square, heat = Image.new("RGB", (64, 64), (200, 40, 40)), torch.zeros(4, 4)
    heat[0, 0] = 1
    pixels = np.asarray(overlay(square, heat)).astype(int)
    assert np.ptp(pixels[60, 60]) == 0 and pixels[4, 4, 0] > pixels[60, 60, 0] + 80
