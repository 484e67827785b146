"""fusion.py against its formulas, written out here in float64 on the CLS tokens of transformers' CLIP."""

import math

import pytest
import torch
import torch.nn.functional as F

from checkpoint import load_clip
from fusion import MODES, FusedCLIP, MultiLevelFusion, default_levels, slerp_mix

ZERO_START = {"slerp": "fractions", "concat": "mix.weight"}


def gap(ours, theirs):
    """The largest relative error of a row."""
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def random_pixels(config, batch=3):
    return torch.randn(batch, 3, config.image_size, config.image_size)


def random_tokens(config, prompts):
    tokens = torch.randint(1, config.vocab_size - 2, (prompts, 9))
    tokens[:, -1] = config.vocab_size - 1
    return tokens


def fused_clip(reference, mode="concat", levels=None, num_classes=4):
    return FusedCLIP(load_clip(reference.folder), num_classes, mode, levels)


def formula(mode, levels, cls, projection, new):
    """cls: block number → its CLS token; new: the fusion's parameters by name."""
    normed = []
    for i, level in enumerate(levels):
        x = cls[level] - cls[level].mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
        normed.append(x * new[f"norms.{i}.weight"] + new[f"norms.{i}.bias"])
    *earlier, last = (x @ projection.T for x in normed)
    if mode == "concat":
        return last + torch.cat(normed[:-1], dim=1) @ new["mix.weight"].T
    if mode == "slerp":
        a = unit(last)
        for t, e in zip(new["fractions"], earlier, strict=True):
            b = unit(e)
            angle = (a * b).sum(1, keepdim=True).acos()
            a = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
        return a


# ---------------------------------------------------------------------------------------------------------------------
# Fusion


@pytest.mark.parametrize("mode", ["concat", "none", "slerp"])
@torch.no_grad()
def test_untrained_fusion_is_clip(small, mode):
    model, pixels = fused_clip(small, mode), random_pixels(small.config)
    fused, own = model.encode_image(pixels), model.clip.encode_image(pixels)
    if mode == "slerp":
        assert (fused - unit(own)).abs().max() < 1e-6
    else:
        assert torch.equal(fused, own)


@torch.no_grad()
def test_untrained_fusion_is_clip_at_full_size(vit_b16):
    visual = load_clip(vit_b16.folder).visual
    cls = visual(random_pixels(vit_b16.config, batch=2))
    own = visual.project(cls[:, -1])
    assert torch.equal(MultiLevelFusion(visual, (3, 6, 9, 12), "concat")(cls, visual.proj), own)
    assert (MultiLevelFusion(visual, (3, 6, 9, 12), "slerp")(cls, visual.proj) - unit(own)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("levels", "used"), [(None, [1, 2, 4, 5]), ((2,), [2, 5]), ((4, 1, 1), [1, 4, 5]), ((3, 5), [3, 5])]
)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_every_mode_computes_its_formula(small, mode, levels, used):
    model, pixels = fused_clip(small, mode, levels), random_pixels(small.config)
    for parameter in model.fusion.parameters():
        parameter.add_(torch.rand_like(parameter))
    assert list(model.fusion.levels) == used

    hidden = small.model.vision_model(pixels, output_hidden_states=True).hidden_states
    expected = formula(
        mode,
        used,
        {level: hidden[level][:, 0].double() for level in used},
        small.model.visual_projection.weight.double(),
        {name: p.double() for name, p in model.fusion.named_parameters()},
    )
    assert gap(model.encode_image(pixels), expected) < 1e-5


@pytest.mark.parametrize("mode", ZERO_START)
def test_gradients_reach_the_new_parts_from_their_zero_start(small, mode):
    model = fused_clip(small, mode)
    embedding = model.encode_image(random_pixels(small.config))
    (embedding * torch.randn_like(embedding)).sum().backward()
    new = model.fusion.get_parameter(ZERO_START[mode])
    assert not new.any()
    assert new.grad.ne(0).all()


@pytest.mark.parametrize(
    ("layers", "levels"),
    [(12, (3, 6, 9, 12)), (24, (6, 12, 18, 24)), (4, (1, 2, 3, 4)), (3, (1, 2, 3)), (2, (1, 2)), (1, (1,))],
)
def test_default_levels_are_the_quarters_of_the_depth(layers, levels):
    assert default_levels(layers) == levels


def test_an_unknown_mode_is_refused(small):
    with pytest.raises(ValueError, match=r"'max'.*concat, slerp"):
        fused_clip(small, "max")


@pytest.mark.parametrize("level", [0, 6, -1])
def test_a_level_outside_the_tower_is_refused(small, level):
    with pytest.raises(ValueError, match="between 1 and 5"):
        fused_clip(small, levels=(2, level))


# ---------------------------------------------------------------------------------------------------------------------
# The class head


@torch.no_grad()
def test_set_head_averages_the_unit_embeddings_of_each_classes_prompts(small):
    model = fused_clip(small, num_classes=3)
    prompts = [random_tokens(small.config, count) for count in (1, 2, 5)]
    model.set_head(prompts)
    embeddings = [small.model.get_text_features(tokens).pooler_output.double() for tokens in prompts]
    assert gap(model.head, torch.stack([unit(e).mean(0) for e in embeddings])) < 1e-5


def test_set_head_wants_prompts_for_every_class(small):
    with pytest.raises(ValueError):
        fused_clip(small, num_classes=3).set_head([random_tokens(small.config, 2)] * 2)


@torch.no_grad()
def test_classify_gives_scaled_cosines(small):
    model = fused_clip(small)
    model.head.normal_()
    model.clip.logit_scale.fill_(math.log(20))
    embedding = 5 * torch.randn(6, small.config.embed_dim)
    cosine = F.cosine_similarity(embedding.double()[:, None], model.head.double(), dim=2)
    assert (model.classify(embedding) - 20 * cosine).abs().max() < 1e-4


@torch.no_grad()
def test_the_scale_is_at_most_100(small):
    model = fused_clip(small)
    for logarithm, scale in ((math.log(99), 99), (math.log(100.5), 100), (10.0, 100)):
        model.clip.logit_scale.fill_(logarithm)
        assert model.scale.item() == pytest.approx(scale)


# ---------------------------------------------------------------------------------------------------------------------
# slerp_mix


def on_the_arc(x, a, b):
    """Whether x = αâ + βb̂ with α, β > 0 and unit length: inside the shorter arc between â and b̂."""
    plane = torch.stack([unit(a), unit(b)], dim=1)
    coefficients = torch.linalg.lstsq(plane, x[:, None]).solution
    off_plane = (plane @ coefficients - x[:, None]).norm()
    return bool(off_plane < 1e-9 and (coefficients > 0).all() and abs(x.norm() - 1) < 1e-9)


def test_probability_0_mixes_nothing():
    embedding = torch.randn(8, 16)
    assert torch.equal(slerp_mix(embedding, torch.zeros(8, dtype=torch.int64), 0.0), embedding)


def test_probability_1_moves_each_row_to_one_other_row_of_its_class():
    labels = [0, 1, 0, 2, 0, 1, 0]
    embedding = 3 * torch.randn(7, 16, dtype=torch.float64)
    mixed = slerp_mix(embedding, torch.tensor(labels), 1.0)
    for i in range(7):
        towards = [j for j in range(7) if j != i and on_the_arc(mixed[i], embedding[i], embedding[j])]
        if labels[i] == 2:
            assert torch.equal(mixed[i], embedding[i])
        else:
            assert len(towards) == 1 and labels[towards[0]] == labels[i]


def test_probability_is_the_share_of_mixed_rows():
    embedding = torch.randn(1000, 4)
    mixed = slerp_mix(embedding, torch.zeros(1000, dtype=torch.int64), 0.3)
    moved = (mixed != embedding).any(1)
    assert 0.25 < moved.float().mean() < 0.35
    assert gap(mixed[moved], unit(mixed[moved])) < 1e-6


def test_partner_and_place_on_the_arc_are_uniform_and_independent_of_the_choice_to_mix():
    axes, labels = torch.eye(5), torch.zeros(5, dtype=torch.int64)
    mixed = torch.stack([slerp_mix(axes, labels, 0.5) for _ in range(1000)])
    partners = (mixed > 0).sum(0)[~torch.eye(5, dtype=torch.bool)]  # expected 125, standard deviation 11
    assert (partners - 125).abs().max() < 45
    cosine = mixed.diagonal(dim1=1, dim2=2).flatten()
    t = cosine[cosine < 1].acos() / (math.pi / 2)
    assert (t.sort().values - torch.linspace(0, 1, len(t))).abs().max() < 0.04


def test_mixing_is_repeated_by_the_same_seed():
    embedding, labels = torch.randn(20, 8), torch.arange(20) % 3

    def mix(seed, generator=None):
        torch.manual_seed(seed)
        return slerp_mix(embedding, labels, 0.5, generator)

    assert torch.equal(mix(1), mix(1))
    assert not torch.equal(mix(1), mix(2))
    assert torch.equal(mix(1, torch.Generator().manual_seed(7)), mix(2, torch.Generator().manual_seed(7)))
