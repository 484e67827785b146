"""Random views, against Pillow, which makes them one change after the other."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from augment import ROOM, View, augment, draw_view
from images import FRAMES, Preprocessing, normalize, preprocess, to_square

AS_IT_IS = View(1, 1, 0, 0, 0, 1, 1, 1, False)


def smooth(side, seed=0):
    """A square image without sharp edges, of which interpolations agree."""
    small = np.random.default_rng(seed).integers(60, 200, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def views_of(count, seed=0):
    rng = random.Random(seed)
    return [draw_view(rng, bool(i % 2)) for i in range(count)]


def by_pillow(image, view, size):
    """The positions by Image.transform, which takes pixels to pixels; the colours by ImageEnhance."""
    half, cos, sin = image.width / 2, math.cos(view.angle), math.sin(view.angle)
    step = image.width / size
    a, b, d, e = view.width * cos, -view.width * sin, view.height * sin, view.height * cos
    matrix = (step * a, step * b, half * (1 + view.x - a - b), step * d, step * e, half * (1 + view.y - d - e))
    image = image.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    image = ImageOps.mirror(image) if view.mirrored else image
    for enhancer, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), view[5:8], strict=True
    ):
        image = enhancer(image).enhance(factor)
    return np.asarray(image, np.float32)


@pytest.mark.parametrize("side, size", [(280, 224), (64, 64), (50, 40)])
def test_views_are_what_pillow_makes_step_by_step(side, size):
    images, views = [smooth(side, seed) for seed in range(8)], views_of(8)
    seen = augment([np.asarray(image) for image in images], views, size)
    assert seen.shape == (8, size, size, 3) and seen.dtype == torch.float32
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[size // 4 : -size // 4, size // 4 : -size // 4] = True  # Pillow has other edges
    for image, view, pixels in zip(images, views, seen, strict=True):
        expected = torch.from_numpy(by_pillow(image, view, size))
        assert (pixels - expected)[inside].abs().max() < 5  # after each of four steps, it rounds down
        assert (pixels - expected).abs().median() < 2.5


def test_a_view_of_the_whole_image_is_the_image():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    plain, mirrored = augment([image] * 2, [AS_IT_IS, AS_IT_IS._replace(mirrored=True)], 32)
    torch.testing.assert_close(plain, torch.from_numpy(image).float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(mirrored, plain.flip(1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name, factor", [("brightness", 1.2), ("contrast", 0.8), ("saturation", 0.8)])
def test_each_change_of_colours_alone(name, factor):
    image = np.asarray(smooth(32))
    (changed,) = augment([image], [AS_IT_IS._replace(**{name: factor})], 32)
    x, grey = image.astype(float), (image @ [0.299, 0.587, 0.114])[..., None]
    expected = {
        "brightness": x * factor,
        "contrast": grey.mean() + factor * (x - grey.mean()),
        "saturation": grey + factor * (x - grey),
    }[name]
    np.testing.assert_allclose(changed, expected.clip(0, 255), atol=1e-3)


def test_grey_stays_grey_and_levels_stay_levels():
    grey = np.repeat(np.asarray(smooth(32).convert("L"))[..., None], 3, axis=2)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    seen = augment([grey] * 20 + [noise] * 20, views_of(40), 32)
    assert seen.min() >= 0 and seen.max() <= 255 and seen.max() > 250
    assert (seen[:20].amax(3) - seen[:20].amin(3)).max() < 1e-3


def test_a_flip_mirrors_and_changes_nothing_else():
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for view in views_of(6):
        plain, flipped = augment([image] * 2, [view._replace(mirrored=side) for side in (False, True)], 48)
        torch.testing.assert_close(flipped, plain.flip(1), rtol=0, atol=0.05)
        assert (flipped - plain).abs().mean() > 10


def test_a_batch_is_its_images_one_by_one():
    images = [np.asarray(smooth(40, seed)) for seed in range(5)]
    views = views_of(5)
    for image, view, pixels in zip(images, views, augment(images, views, 32), strict=True):
        torch.testing.assert_close(augment([image], [view], 32)[0], pixels, rtol=0, atol=1e-3)


def test_views_follow_their_random_generator():
    first, again, other = (draw_view(random.Random(seed), False) for seed in (1, 1, 2))
    assert first == again != other
    assert draw_view(random.Random(1), True) == first._replace(mirrored=True)


def test_views_show_half_of_the_image_or_more_and_differ():
    views = views_of(2000)
    areas = [view.width * view.height for view in views]
    assert 0.5 - 1e-9 <= min(areas) < 0.52 and 0.9 < max(areas) <= 1
    for view in views:
        assert abs(view.x) + view.width <= 1 + 1e-9 and abs(view.y) + view.height <= 1 + 1e-9
        assert abs(math.degrees(view.angle)) <= 15 and all(0.8 <= factor <= 1.2 for factor in view[5:8])
    assert np.std([math.degrees(view.angle) for view in views]) > 8
    assert np.std([view.width / view.height for view in views]) > 0.1


def test_beyond_the_image_it_is_black():
    white = np.full((64, 64, 3), 255, np.uint8)
    (turned,) = augment([white], [AS_IT_IS._replace(angle=math.radians(15))], 64)
    assert turned[0, 0].max() == 0 and turned[32, 32].min() > 254


@pytest.mark.parametrize("frame", FRAMES)
def test_a_view_of_the_whole_is_what_the_model_will_see(frame):
    """Training frames a picture as evaluation does, at ROOM times the size."""
    how = Preprocessing(frame)
    picture = ImageOps.expand(smooth(300), (75, 0), fill="black")
    large = to_square(picture, round(ROOM * 64), how)
    seen = normalize(augment([large], [AS_IT_IS], 64), how)[0]
    expected = preprocess(picture, 64, how)
    assert (seen - expected)[:, 2:-2, 2:-2].abs().mean() < 0.05  # pad rounds other heights
