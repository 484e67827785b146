"""Random views of images, a batch of them at once, on the device that trains.

    positions   each pixel of the view → where on the image it looks
    colours     the colour found there → the colour shown

Both maps are affine: a matrix and a shift. Affine maps one after the other are again one: a crop, a turn and a mirror
image become one 2 × 3 matrix, brightness, contrast and saturation one 3 × 4 matrix. So however much is changed, each
image is read once and written once. A few numbers describe a view. They are drawn on the CPU, image by image, the same
ones on every machine; what is made of them is a few operations on the whole batch, as a GPU likes it.

Exercise: a view that is turned and not square sees a parallelogram of the image. Exchange `height` and `width` before
the two sines, and it sees a rectangle.
"""

import math
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

ROOM = 1.25  # images are kept at so many times the model's size: a side of the smallest view has 0.88 of its pixels
AT_ONCE = 8  # images on a CPU: they fit into its cache (0.9 ms an image; 64 at once: 1.5 ms)
GREY = (0.299, 0.587, 0.114)  # how bright red, green and blue look (ITU-R BT.601)


class View(NamedTuple):
    """A view of a square image, whose middle is (0, 0), and whose edges are at −1 (left, top) and 1."""

    width: float  # of the view, as a part of the image's
    height: float
    x: float  # of its middle
    y: float
    angle: float  # in radians
    brightness: float  # 1: as it is, for all three
    contrast: float
    saturation: float
    mirrored: bool


def draw_view(rng, mirrored):
    """A crop of half the area or more, turned by up to 15°, with brightness, contrast and saturation within 20 %. rng:
    a random.Random."""
    scale, aspect = rng.uniform(0.5, 1) ** 0.5, rng.uniform(3 / 4, 4 / 3) ** 0.5
    width, height = min(scale * aspect, 1), min(scale / aspect, 1)
    x, y = rng.uniform(width - 1, 1 - width), rng.uniform(height - 1, 1 - height)
    angle = math.radians(rng.uniform(-15, 15))
    return View(width, height, x, y, angle, *(rng.uniform(0.8, 1.2) for _ in range(3)), mirrored)


def augment(images, views, size, device="cpu"):
    """B arrays, each (S, S, 3) uint8, and their Views → (B, size, size, 3) float32, from 0 to 255, on the device.
    Between pixels it interpolates (bilinear); beyond the image it is black, as around a scope's field."""
    images, views = torch.from_numpy(np.stack(images)).to(device), torch.tensor(views).to(device)
    at_once = AT_ONCE if images.device.type == "cpu" else len(images)
    parts = zip(images.split(at_once), views.split(at_once), strict=True)
    return torch.cat([_augment(image.movedim(-1, 1).float(), view, size) for image, view in parts]).movedim(1, -1)


def _augment(images, views, size):
    """(B, 3, S, S), (B, 9) → (B, 3, size, size)."""
    return recolour(F.grid_sample(images, positions(views, size), align_corners=False), views)


def positions(views, size):
    """(B, 9) → (B, size, size, 2): x and y of where each pixel of the view looks."""
    width, height, x, y, angle, *_, mirrored = views[:, :, None].unbind(1)  # (B, 1) each
    cos, sin = angle.cos(), angle.sin()
    steps = (2 * torch.arange(size, device=views.device) + 1) / size - 1  # the middles of the pixels, from −1 to 1
    u, v = steps * (1 - 2 * mirrored), steps  # (B, size) along a row, (size,) along a column
    of_row = torch.stack([width * cos * u + x, height * sin * u + y], dim=-1)  # (B, size, 2)
    of_column = torch.stack([-width * sin * v, height * cos * v], dim=-1)
    return of_row[:, None] + of_column[:, :, None]


def recolour(images, views):
    """(B, 3, H, W), (B, 9) → (B, 3, H, W).

    Brightness b multiplies: y = b·x. Contrast c pulls towards the image's mean grey m: c·y + (1 − c)·m. Saturation s
    pulls each pixel towards its own grey, g·x with g = GREY: s·x + (1 − s)·(g·x). Together that is A·x + k with
    A = c·b·(s·1 + (1 − s)·[g, g, g]) and k = (1 − c)·b·(mean of g·x), as a grey k is the same grey after the last.
    """
    brightness, contrast, saturation = views[:, 5:8, None, None].unbind(1)  # (B, 1, 1) each
    grey = torch.tensor(GREY, device=views.device)
    matrix = brightness * contrast * (saturation * torch.eye(3, device=views.device) + (1 - saturation) * grey)
    mean = (images.mean((2, 3)) @ grey)[:, None, None]  # (B, 1, 1)
    return (matrix @ images.flatten(2)).add_((1 - contrast) * brightness * mean).clamp_(0, 255).view_as(images)


def main():
    """Views of an image with one bright spot, and where they show it."""
    image = np.zeros((280, 280, 3), np.uint8)
    image[70:72, 210:212] = 255
    rng = random.Random(0)
    for mirrored in (False, False, True):
        view = draw_view(rng, mirrored)
        (seen,) = augment([image], [view], 224)
        row, column = divmod(int(seen.sum(-1).argmax()), 224)
        print(
            f"{view.width:.2f} × {view.height:.2f} of the image around ({view.x:+.2f}, {view.y:+.2f}), turned by "
            f"{math.degrees(view.angle):+.0f}°{', mirrored' * mirrored}: row 70, column 210 is at {row}, {column}"
        )


if __name__ == "__main__":
    main()
