"""The README's figure of the method, drawn from phantoms: python docs/figure.py docs/method.png"""

import sys
from math import cos, radians, sin
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.append(str(Path(__file__).parents[1]))
from cli import Parser
from errors import run_script
from phantom import draw

WIDTH, HEIGHT, SCALE = 1500, 800, 2  # drawn twice as large, then reduced: smooth edges
INK, GREY, PALE, BLUE, ORANGE, GREEN = "#20242a", "#7a828c", "#dfe5ec", "#3b73b9", "#e07b1f", "#2e8b57"
LEVELS = {3: "#a7c7ec", 6: "#7aa7dc", 9: "#5088c8", 12: "#2c5f9e"}
SPHERE, RADIUS = (1225, 370), 215
# Where images of some classes lie on the circle, in degrees clockwise from 12 o'clock, and texts.
IMAGES = {"ear-left": (-78, -12), "throat": (62, 96), "vc-open": (150, 184)}
TEXTS = {-45: "left ear,\nperforated eardrum", 79: "a throat", 167: "vocal cords open"}


class Sheet:
    """Pillow's drawing, in coordinates of the reduced picture."""

    def __init__(self):
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size=17, colour=INK, anchor="mm"):
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((x * SCALE, y * SCALE), text, colour, font, anchor=anchor, align="center")

    def box(self, x, y, width, height, fill, outline=None, radius=6):
        corners = [SCALE * v for v in (x, y, x + width, y + height)]
        self.draw.rounded_rectangle(corners, radius * SCALE, fill, outline, SCALE * 2)

    def disc(self, x, y, radius, fill, outline=None):
        corners = [SCALE * v for v in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(corners, fill, outline, SCALE * 2)

    def line(self, *points, colour=GREY, width=2, arrow=False):
        self.draw.line([SCALE * v for point in points for v in point], colour, width * SCALE, joint="curve")
        if arrow:
            (ax, ay), (bx, by) = points[-2:]
            length = ((bx - ax) ** 2 + (by - ay) ** 2) ** 0.5
            dx, dy = (bx - ax) / length * 10, (by - ay) / length * 10
            tip = [(bx + dx, by + dy), (bx - dy * 0.6, by + dx * 0.6), (bx + dy * 0.6, by - dx * 0.6)]
            self.draw.polygon([(SCALE * x, SCALE * y) for x, y in tip], colour)

    def picture(self, image, x, y, size, ring=None):
        """A square picture centred on x, y; with a ring, round."""
        image = image.resize((size * SCALE, size * SCALE), Image.Resampling.LANCZOS)
        mask = None
        if ring:
            mask = Image.new("L", image.size)
            ImageDraw.Draw(mask).ellipse((0, 0, *image.size), 255)
            self.disc(x, y, size / 2 + 3, ring)
        self.image.paste(image, (round((x - size / 2) * SCALE), round((y - size / 2) * SCALE)), mask)


def picture(label, seed):
    return draw(label, np.random.default_rng(seed), "A", size=(240, 240))[0]


def on_circle(degrees, radius=RADIUS):
    return SPHERE[0] + radius * sin(radians(degrees)), SPHERE[1] - radius * cos(radians(degrees))


def image_tower(s):
    s.picture(picture("ear-left", 3), 125, 190, 180)
    for i in range(15):
        s.line((35 + 180 / 14 * i, 100), (35 + 180 / 14 * i, 280), colour="#ffffff", width=1)
        s.line((35, 100 + 180 / 14 * i), (215, 100 + 180 / 14 * i), colour="#ffffff", width=1)
    s.text(125, 302, "image (3, 224, 224)", colour=GREY)
    s.text(125, 324, "14 by 14 patches", colour=GREY)
    s.text(125, 346, "and CLS: (197, 768)", colour=GREY)
    s.line((222, 190), (252, 190), arrow=True)
    s.text(555, 70, "vision transformer of 12 blocks, frozen; the bright marks are LoRA adapters", colour=GREY)
    for block in range(1, 13):
        x = 274 + (block - 1) * 48
        s.box(x, 100, 34, 180, LEVELS.get(block, PALE))
        s.text(x + 17, 118, str(block), 15, "white" if block in LEVELS else GREY)
        for y in (150, 176, 202, 228):
            s.box(x + 6, y, 22, 8, ORANGE, radius=3)
        if block in LEVELS:
            s.line((x + 17, 280), (x + 17, 316), colour=LEVELS[block], width=3, arrow=True)
            s.box(x - 22, 328, 78, 34, "white", LEVELS[block])
            s.text(x + 17, 345, "LN", 16)
            s.line((x + 17, 362), (x + 17, 400), colour=LEVELS[block], width=3)
    s.line((387, 400), (819, 400), colour=BLUE, width=3)
    s.text(580, 428, "CLS tokens of four levels, (768) each: z = W c12 + V [c3; c6; c9]; V starts at zero", colour=GREY)
    s.line((819, 400), (868, 400), colour=BLUE, width=3, arrow=True)
    s.disc(902, 400, 23, "white", BLUE)
    s.text(902, 399, "fuse", 16)
    s.line((925, 400), (970, 400), colour=BLUE, width=3, arrow=True)
    s.text(948, 376, "z (512)", 17, BLUE)


def text_tower(s):
    lines = ["“otoscopy of the left ear”", "“vocal folds wide open”", "…", "“left ear, perforated eardrum”"]
    s.box(35, 510, 268, 132, "white", PALE)
    for i, line in enumerate(lines):
        s.text(169, 530 + 30 * i, line, 17)
    s.text(169, 662, "prompts, captions: (77) tokens", colour=GREY)
    s.line((310, 575), (344, 575), arrow=True)
    for block in range(12):
        x = 366 + block * 40
        s.box(x, 525, 28, 100, PALE)
        for y in (543, 562, 581, 600):
            s.box(x + 4, y, 20, 8, ORANGE, radius=3)
    s.text(600, 662, "text transformer of 12 blocks, frozen, with adapters: (77, 512)", colour=GREY)
    s.text(905, 555, "(512)", 17, GREEN)
    s.line((846, 575), (965, 575), (1010, 530), colour=GREEN, width=3, arrow=True)


def sphere(s):
    s.disc(*SPHERE, RADIUS, "#f7f9fb", PALE)
    first, second = IMAGES["ear-left"]
    s.line(*(on_circle(first + (second - first) * i / 40) for i in range(41)), colour=ORANGE, width=5)
    for label, angles in IMAGES.items():
        for seed, angle in enumerate(angles):
            s.picture(picture(label, seed + 4), *on_circle(angle), 84, BLUE)
    mixed = on_circle(-31)
    s.disc(*mixed, 9, ORANGE, "white")
    s.text(mixed[0] - 42, mixed[1] - 30, "slerp", 18, ORANGE)
    for angle, text in TEXTS.items():
        x, y = on_circle(angle, RADIUS - 3)
        s.box(x - 9, y - 9, 18, 18, GREEN, "white", radius=2)
        inner_x, inner_y = on_circle(angle, RADIUS - 50)
        s.line((x + (inner_x - x) * 0.2, y + (inner_y - y) * 0.2), (inner_x, inner_y), colour=GREEN, width=1)
        s.text(*on_circle(angle, RADIUS - 90), text, 17, GREEN)
    s.text(SPHERE[0], 70, "the sphere of unit embeddings", colour=GREY)


def losses(s):
    s.box(880, 672, 585, 100, "#fff8f0", ORANGE)
    s.text(1172, 700, "loss = cross-entropy( mixed z, class vectors )", 18)
    s.text(1172, 740, "+ weight · contrastive( mixed z, prompts;  z, captions )", 18)
    s.text(
        440,
        728,
        "Trained: the adapters, a LayerNorm for each level, V, the class vectors, the scale",
        colour=GREY,
    )


def main():
    parser = Parser(__doc__.split(":")[0])
    parser.add_argument("file", type=Path, help="the picture to write, .png")
    file = parser.parse_args().file
    if file.suffix.lower() != ".png" or not file.parent.is_dir():
        parser.error(f"{file} should be a .png in a folder that exists")
    s = Sheet()
    for part in (image_tower, text_tower, sphere, losses):
        part(s)
    s.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(file, optimize=True)


if __name__ == "__main__":
    run_script(main)
