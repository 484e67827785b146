"""ENT phantoms: synthetic endoscopy images of seven views, with findings and captions, drawn with NumPy and Pillow.

A phantom is the imaging term for a test object. These stand in for the ENTRep images where there are none: classes,
laterality and the layout on disk are the same, the anatomy is a sketch. They are no medical data.

How a picture comes about: a drawing is two maps, a colour and a height, which is the distance towards the scope (0 is
near, −3 deep in a passage). Each part of the anatomy is a soft mask that paints the one and shapes the other, from back
to front. Then the scope's lamp is put on (`light`): what is far is dark, what slants is dim, and wet mucosa glints
where it faces a lamp. Last comes the device (`record`): chip, colour, vignette, noise, field, compression.

Coordinates: x to the right, y down; the field of view is about the unit circle. Sites that have a side are drawn as the
patient's right one. For a left one the x axis is mirrored: a left picture is a right one in a mirror.

    python phantom.py entrep-phantom --count 1400 --scope B      # writes a data set in the ENTRep layout
"""

import csv
import io
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from math import cos, pi, radians, sin
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from errors import UserError, advice, reason, run_script
from files import locked
from images import prefetch

# A caption is the site's name and the findings' ones, joined by commas. English and Vietnamese.
SITES = {
    "nose-right": ("right nasal cavity", "hốc mũi phải"),
    "nose-left": ("left nasal cavity", "hốc mũi trái"),
    "ear-right": ("right ear", "tai phải"),
    "ear-left": ("left ear", "tai trái"),
    "vc-open": ("vocal cords open", "dây thanh mở"),
    "vc-closed": ("vocal cords closed", "dây thanh khép"),
    "throat": ("throat", "họng"),
}
CLASSES = tuple(SITES)
FINDINGS = {
    "nose": {
        "healthy": ("healthy mucosa", "niêm mạc bình thường"),
        "polyp": ("a pale polyp", "polyp nhạt màu"),
        "mucus": ("yellow-green mucus", "dịch nhầy vàng xanh"),
        "red": ("red swollen turbinates", "cuốn mũi đỏ phù nề"),
        "spur": ("a septal spur", "gai vách ngăn"),
    },
    "ear": {
        "healthy": ("healthy eardrum", "màng nhĩ bình thường"),
        "hole": ("perforated eardrum", "thủng màng nhĩ"),
        "wax": ("some wax", "có ráy tai"),
        "red": ("inflamed red eardrum", "màng nhĩ viêm đỏ"),
        "fluid": ("amber fluid behind the eardrum", "dịch vàng sau màng nhĩ"),
    },
    "vc": {
        "healthy": ("healthy vocal folds", "dây thanh bình thường"),
        "nodules": ("nodules on both vocal folds", "hạt xơ hai dây thanh"),
        "polyp": ("a polyp on one vocal fold", "polyp một bên dây thanh"),
        "red": ("red vocal folds", "dây thanh đỏ"),
        "mucus": ("strands of mucus", "dịch nhầy đọng"),
    },
    "throat": {
        "healthy": ("healthy mucosa", "niêm mạc bình thường"),
        "large": ("enlarged tonsils", "amidan quá phát"),
        "patches": ("white patches on the tonsils", "mảng trắng trên amidan"),
        "red": ("red bumpy back wall", "thành sau họng đỏ có hạt"),
        "uvula": ("swollen uvula", "lưỡi gà phù nề"),
    },
}
PAIRS = {  # findings that also occur together
    "nose": ("polyp mucus", "red mucus", "red spur"),
    "ear": ("hole wax", "red wax", "fluid wax"),
    "vc": ("red nodules", "red polyp", "polyp mucus"),
    "throat": ("large patches", "red large", "red uvula"),
}
VIETNAMESE = dict([*SITES.values(), *(names for site in FINDINGS.values() for names in site.values())])


@dataclass(frozen=True)
class Scope:
    tint: tuple  # gains of red, green and blue
    field: float  # radius of the picture
    lower: float  # y at which the picture is cut off below
    zoom: float
    tilt: float  # degrees, clockwise: how it is held on average
    vignette: float  # part of the light that is lost at the edge
    sensor: int  # lines of its chip: the fewer, the softer the picture
    noise: float  # standard deviation, of 255
    jpeg: int  # quality of the files of its recorder


SCOPES = {
    "A": Scope((1.06, 1.00, 0.93), field=0.97, lower=1, zoom=1, tilt=0, vignette=0.3, sensor=192, noise=2, jpeg=95),
    "B": Scope((0.92, 1.07, 1.08), field=0.9, lower=0.8, zoom=0.9, tilt=8, vignette=0.4, sensor=160, noise=4, jpeg=70),
}

# ---------------------------------------------------------------------------------------------------------------------
# Primitives


def rgb(*values):
    return np.array(values, np.float32)


def mix(a, b, t):
    return a + (b - a) * t


def soft(distance, width=0.03):
    """Signed distance (negative inside) → mask: 1 inside, 0 outside, a smooth step `width` wide between."""
    t = np.clip(0.5 - distance / width, 0, 1)
    return t * t * (3 - 2 * t)


class Canvas:
    """A drawing of S × S pixels: x, y (S, S) anatomical coordinates, colour (3, S, S), height (S, S); all float32.

    The coordinates contain the pose, and slow noise warps them, so that no contour is a perfect curve.
    """

    def __init__(self, size, rng, scope, mirrored):
        self.size, self.rng, self.scope = size, rng, scope
        line = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
        self.screen_x, self.screen_y = np.meshgrid(line, line)
        angle, zoom = radians(scope.tilt + rng.uniform(-10, 10)), scope.zoom * rng.uniform(0.88, 1.12)
        x, y = ((axis - rng.uniform(-0.1, 0.1)) / zoom for axis in (self.screen_x, self.screen_y))
        self.x = (x * cos(angle) + y * sin(angle) + self.noise(5, 0.025)) * (-1 if mirrored else 1)
        self.y = y * cos(angle) - x * sin(angle) + self.noise(5, 0.025)
        # Mucosa is pale pink, salmon, deep pink, tan, mauve or between: hues that vary within each class, not between.
        hues = rgb((0.90, 0.70, 0.66), (0.88, 0.55, 0.46), (0.78, 0.40, 0.38), (0.76, 0.53, 0.38), (0.70, 0.50, 0.55))
        self.mucosa = rgb(*rng.dirichlet([0.5] * 5)) @ hues
        self.red = self.mucosa * rgb(1, 0.42, 0.44)  # inflamed
        self.pale = mix(self.mucosa, rgb(0.90, 0.86, 0.80), 0.65)
        self.colour = np.zeros((3, size, size), np.float32)
        self.height = np.zeros((size, size), np.float32)
        self.spare = np.empty(3 * size * size, np.float32)  # memory to compute in: to ask for it each time is slow
        self.vessels = self._vessels()
        self.marks = {}  # finding: where it was drawn, (S, S) in 0…1

    def mark(self, finding, distance):
        """Remember where a finding is drawn that has a place."""
        self.marks[finding] = np.maximum(self.marks.get(finding, 0), soft(distance))

    def noise(self, cells, scale):
        """Smooth noise with `cells` cells across and a standard deviation of about `scale`, (S, S)."""
        grid = self.rng.normal(0, scale, (cells, cells)).astype(np.float32)
        return np.asarray(Image.fromarray(grid).resize((self.size, self.size), Image.Resampling.BICUBIC))

    def _vessels(self, count=26, steps=12):
        """Small vessels: random walks that bend, drawn as lines → (S, S) in 0…1."""
        layer = Image.new("L", (self.size, self.size))
        start = self.rng.uniform(0, self.size, (count, 1, 2))
        heading = self.rng.uniform(0, 2 * pi, (count, 1)) + self.rng.normal(0, 0.4, (count, steps)).cumsum(1)
        walks = start + np.stack([np.cos(heading), np.sin(heading)], -1).cumsum(1) * self.size / 40
        for walk in walks:
            ImageDraw.Draw(layer).line(walk.ravel().tolist(), fill=230, width=1 + self.size // 200)
        return np.asarray(layer.filter(ImageFilter.GaussianBlur(self.size / 300)), np.float32) / 255

    def ellipse(self, cx, cy, rx, ry, angle=0):
        """Signed distance to an ellipse, exact on its outline, (S, S). angle: degrees, clockwise."""
        x, y, c, s = self.x - cx, self.y - cy, cos(radians(angle)), sin(radians(angle))
        return (np.sqrt((x * (c / rx) + y * (s / rx)) ** 2 + (y * (c / ry) - x * (s / ry)) ** 2) - 1) * min(rx, ry)

    def line(self, points, radii):
        """Signed distance to a tube along `points` whose radius goes through `radii`, (S, S)."""
        nearest = np.inf
        for (ax, ay), (bx, by), ra, rb in zip(points, points[1:], radii, radii[1:], strict=False):
            x, y, dx, dy = self.x - ax, self.y - ay, bx - ax, by - ay
            t = np.clip((x * dx + y * dy) / (dx * dx + dy * dy), 0, 1)
            nearest = np.minimum(nearest, np.sqrt((x - t * dx) ** 2 + (y - t * dy) ** 2) - ra - (rb - ra) * t)
        return nearest

    def paint(self, mask, colour, height=None):
        """Blend a colour, (3,) or (3, S, S), and a height into the drawing by `mask`, (S, S) or a number."""
        colour = colour[:, None, None] if colour.ndim == 1 else colour
        for drawing, aim in ((self.colour, colour), *([(self.height, height)] if height is not None else [])):
            change = np.subtract(aim, drawing, out=self.spare[: drawing.size].reshape(drawing.shape))
            change *= mask
            drawing += change

    def bulge(self, distance, radius, colour, base, rise, vessels=0, edge=0.04):
        """A rounded body: from the height `base` at its outline it rises by `rise` to where it is `radius` deep.
        vessels: how strongly they show."""
        mask, outward = soft(distance, edge), np.clip(1 + distance / radius, 0, 1)
        self.paint(mask, colour, base + rise * (1 - outward * outward))
        if vessels:
            self.vascular(mask, vessels)

    def vascular(self, mask, strength):
        self.paint(mask * self.vessels * strength, self.red * 0.8)

    def light(self):
        """Shade the colour by the height. The lamp is at the scope's tip, so walls that face the middle are bright."""
        self.colour *= 1 + self.noise(7, 0.07) + self.noise(30, 0.03)
        self.height += self.noise(20, 0.006) + self.noise(60, 0.001)
        slope_y, slope_x = np.gradient(self.height, 2 / self.size)
        steep = 1 + np.sqrt(slope_x**2 + slope_y**2) / 1.6  # tissue scatters light: even a steep edge is not black
        slope_x, slope_y = slope_x / steep, slope_y / steep
        facing = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
        lamp_x, lamp_y = self.rng.uniform(-0.2, 0.2), self.rng.uniform(-0.2, 0.2)
        toward_x, toward_y = lamp_x - 0.6 * self.screen_x, lamp_y - 0.6 * self.screen_y
        lit = (1 - slope_x * toward_x - slope_y * toward_y) * facing / np.sqrt(1 + toward_x**2 + toward_y**2)
        # Light falls with the square of the distance, 1 − height; a camera's gamma takes about the root of it.
        self.colour *= (0.3 + 0.7 * np.clip(lit, 0, 1)) / np.maximum(1 - self.height, 0.8)
        self.colour *= self.rng.uniform(0.40, 0.56) / float(self.colour.mean())  # the camera's automatic exposure
        for side in (-0.32, 0.32):  # two fibre ends beside the lens, each with its glints
            glint = rgb(side + lamp_x, lamp_y - 0.35, 1)
            mirror = (1 - slope_x * glint[0] - slope_y * glint[1]) * facing / np.sqrt(glint @ glint)
            self.colour += 0.7 * np.exp(140 * (mirror - 1)) / np.maximum(1 - self.height, 1) ** 2

    def record(self, side):
        """What the device makes of the drawing → RGB image of `side` × `side` pixels."""
        scope, radius = self.scope, np.sqrt(self.screen_x**2 + self.screen_y**2)
        tint = rgb(*scope.tint) * np.exp(rgb(*self.rng.normal(0, 0.04, 3)))  # white balance is never perfect
        self.colour *= (1 - scope.vignette * (radius / scope.field) ** 2) * tint[:, None, None]
        self.colour += self.rng.standard_normal(radius.shape, np.float32) * (scope.noise / 255)
        field = soft(np.maximum(radius - scope.field, self.screen_y - scope.lower), 0.02)
        pixels = (np.clip(self.colour, 0, 1) * field * 255).astype(np.uint8).transpose(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=scope.jpeg)
        return Image.open(file).convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# The sites. Each function takes a canvas, its random generator and the findings.


def draw_nose(c, rng, found):
    """Right nasal cavity: septum on the right of the picture, turbinates on the left, a dark passage between."""
    tissue, swell, wet = (c.red, 1.22, 0.9) if "red" in found else (c.mucosa, rng.uniform(0.88, 1.02), 0.5)
    c.paint(1, c.mucosa * 0.45, -2.6)  # the passage, far away
    wall = c.x + 0.45 + 0.2 * c.y**2  # the lateral wall comes nearer towards the left edge
    c.paint(soft(wall, 0.2), c.mucosa * 0.9, -0.4 - 1.2 * np.exp(np.minimum(wall, 0) / 0.3))
    # Middle turbinate: a long drop that hangs from the roof, some way in.
    drop = [(rng.uniform(-0.22, -0.12), -1), (rng.uniform(-0.14, -0.06), rng.uniform(-0.24, -0.16))]
    c.bulge(c.line(drop, [0.3 * swell, 0.17 * swell]), 0.2, mix(tissue, c.pale, 0.15), -1.1, 0.55, wet)
    if "polyp" in found:  # smooth, pale and grey, out of the passage below the middle turbinate
        r, x, y = rng.uniform(0.20, 0.25), rng.uniform(-0.08, 0), rng.uniform(0, 0.08)
        polyp = c.ellipse(x, y, r, r * 1.2, 15)
        c.bulge(polyp, r, mix(c.pale, rgb(0.80, 0.83, 0.78), 0.8), -0.6, 0.4)
        c.mark("polyp", polyp)
    floor = 0.8 - c.y + 0.1 * c.x
    c.paint(soft(floor, 0.1), c.mucosa, -0.3 - 0.8 * np.exp(np.minimum(floor, 0) / 0.2))
    # Inferior turbinate: the big sausage low on the lateral side, that comes towards us.
    y = rng.uniform(0.36, 0.44)
    sausage = c.line([(-1.1, y - 0.1), (0.5 * swell - 0.9, y)], [0.42 * swell, 0.31 * swell])
    c.bulge(sausage, 0.33, tissue, -0.7, 0.55, wet)
    # Septum: a wall that begins at x = edge and comes nearer to the right. A spur is a ridge that juts out of it.
    edge = rng.uniform(0.20, 0.28) + rng.uniform(-0.1, 0.1) * np.sin(3 * c.y) + 0.06 * c.y
    off_crest = np.abs(c.y - rng.uniform(-0.02, 0.14))
    if "spur" in found:
        flat, edge = edge, edge - 0.34 * np.exp(-off_crest / 0.11)
        c.mark("spur", np.maximum(np.maximum(edge, flat - 0.3) - c.x, np.maximum(c.x - flat - 0.05, off_crest - 0.15)))
    septum = edge - c.x
    mask, depth = soft(septum), -0.15 - 0.95 * np.exp(np.minimum(septum, 0) / 0.25)
    c.paint(mask, mix(c.mucosa, c.pale, 0.25), depth)
    c.vascular(mask, 0.6)
    if "spur" in found:  # thin mucosa over bone: pale
        c.paint(0.8 * soft(off_crest - 0.02, 0.12) * soft(c.x - 0.35, 0.5) * mask, c.pale, depth + 0.3)
    if "mucus" in found:  # runs from the middle turbinate over the inferior one to the floor
        x, thick = rng.uniform(-0.26, -0.14), rng.uniform(0.07, 0.10)
        strand = c.line([(x - 0.1, -0.12), (x, 0.15), (x + 0.06, 0.45), (x + 0.2, 0.8)], [0.03, thick, 0.07, 0.13])
        c.bulge(strand, 0.08, rgb(0.80, 0.78, 0.40), -0.25, 0.14)
        c.mark("mucus", strand)


def draw_ear(c, rng, found):
    """Right ear: canal, pearly drum, handle of the malleus from 1 o'clock to the umbo, cone of light to 5 o'clock."""
    red, rx, ry = "red" in found, rng.uniform(0.62, 0.70), rng.uniform(0.66, 0.74)
    drum = c.ellipse(0, 0, rx, ry)
    c.paint(1, mix(c.mucosa, c.pale, 0.2), np.clip(2.2 * drum - 0.75, -0.8, 0.1))  # the canal, a funnel
    c.vascular(1, 0.45)
    # Drum: a shallow cone, deepest at the umbo in its middle. An inflamed one bulges towards us instead.
    skin = mix(rgb(0.84, 0.80, 0.77), c.mucosa, rng.uniform(0.15, 0.5))
    skin = mix(skin, rgb(0.85, 0.16, 0.15), 0.8) if red else skin
    inside = soft(drum)
    c.paint(soft(drum - 0.03), mix(c.pale, c.mucosa, 0.2))  # a pale rim
    c.paint(inside, skin, -0.62 + (-0.45 if red else 0.22) * drum)
    c.vascular(inside, 0.9 if red else 0.2)
    c.paint(0.6 * soft(c.ellipse(0.1, 0.1 - ry, 0.24, 0.14), 0.12) * inside, c.mucosa)  # its slack upper part is pink
    if "fluid" in found:  # amber up to a level, with a dark meniscus and bubbles
        below = rng.uniform(-0.14, 0) + 0.12 * c.x**2 - c.y
        c.paint(0.85 * soft(below) * inside, rgb(0.85, 0.56, 0.14))
        c.mark("fluid", np.maximum(below, drum))
        c.paint(0.8 * soft(np.abs(below) - 0.012, 0.02) * inside, rgb(0.30, 0.17, 0.07))
        for x in (-0.4, -0.22):
            bubble = c.ellipse(x + rng.uniform(-0.04, 0.04), rng.uniform(0.12, 0.3), 0.075, 0.075)
            c.paint(soft(np.abs(bubble) - 0.008, 0.02) * inside, rgb(0.97, 0.86, 0.55))
    if "hole" in found:  # behind and below the handle, through to the dark middle ear
        r = rng.uniform(0.19, 0.25)
        hole = c.ellipse(rng.uniform(-0.34, -0.28), rng.uniform(0.16, 0.26), r, r * rng.uniform(0.85, 1.15))
        c.paint(soft(hole - 0.03), c.pale)
        c.paint(soft(hole), c.mucosa * 0.5, -2.8)
        c.mark("hole", hole)
    # Handle of the malleus from the umbo upwards; the short process is the knob at its upper end.
    hour, bone = radians(rng.uniform(20, 34)), rgb(0.93, 0.62, 0.52) if red else rgb(0.93, 0.88, 0.76)
    top = (0.5 * sin(hour), -0.5 * cos(hour))
    c.bulge(c.line([top, (0, 0.05)], [0.05, 0.035]), 0.05, bone, -0.58, 0.08)
    c.bulge(c.ellipse(*top, 0.075, 0.065), 0.07, bone, -0.55, 0.12)
    # Cone of light: a wedge from the umbo towards 5 o'clock, which is 150° clockwise from 12.
    hour = radians(rng.uniform(142, 158))
    along = c.x * sin(hour) - (c.y - 0.05) * cos(hour)
    across = c.x * cos(hour) + (c.y - 0.05) * sin(hour)
    wedge = np.maximum(np.abs(across) - 0.27 * along, along - rng.uniform(0.42, 0.5))
    c.paint((0.6 if red else 0.9) * soft(wedge, 0.05), rgb(1.60, 1.55, 1.45))
    if "wax" in found:  # lumps on the canal that reach over the rim
        middle = rng.uniform(0, 360)
        for degrees, out in zip(middle + np.linspace(-26, 26, 5), rng.uniform(0.98, 1.3, 5).tolist(), strict=True):
            x, y, r = rx * out * sin(radians(degrees)), -ry * out * cos(radians(degrees)), rng.uniform(0.1, 0.2)
            amber = mix(rgb(0.72, 0.42, 0.10), rgb(0.45, 0.22, 0.05), rng.uniform())
            lump = c.ellipse(x, y, r, r * 0.75, rng.uniform(0, 180))
            c.bulge(lump, r, amber, -0.35, 0.22)
            c.mark("wax", lump)


def draw_larynx(c, rng, found, opening):
    """Larynx from above, its front at the top: epiglottis, and the vocal folds as an inverted V around the glottis.

    opening: half the width of the glottis at its back end; about 0 where the folds touch.
    """
    rim = c.ellipse(0, 0.02, rng.uniform(0.66, 0.74), 0.74)
    c.paint(1, c.mucosa, -0.25 - 0.3 * soft(rim, 0.25))  # the entrance of the larynx, and its wall inside of the rim
    c.vascular(1, 0.5)
    # Along the folds t goes from 0 at the front to 1 at the back; x is the distance from the midline, and the glottis
    # is where x < gap. `fold` and `glottis` are signed distances, cut off where the folds end.
    front, back, x = -0.42, 0.5, np.abs(c.x)
    t = np.clip((c.y - front) / (back - front), 0, 1)
    beyond = np.abs(c.y - (front + back) / 2) - (back - front) / 2
    gap = opening * t**0.85 * np.sqrt(1.02 - t**6) + 0.012
    if "nodules" in found:  # they keep folds that touch from closing: the gap becomes an hourglass
        gap = gap + 0.25 * np.abs(t - 0.42) * np.sqrt(t - t * t)
    glottis = np.maximum(x - gap, beyond)
    fold = np.maximum(x - gap - 0.06 - rng.uniform(0.11, 0.15) * np.sqrt(t), beyond)
    # False folds: broad and pink. The ventricle is the dark furrow between them and the true folds, which are white.
    c.bulge(fold - 0.2, 0.22, c.mucosa, -0.6, 0.1, edge=0.12)
    c.paint(soft(fold - 0.03, 0.06), c.mucosa * 0.5, -1.0)
    white = mix(rgb(1.00, 0.97, 0.90), c.mucosa, rng.uniform(0, 0.25))
    colour = mix(white, c.red, 0.75) if "red" in found else white
    c.bulge(fold, 0.15, colour, -0.6, 0.15, vessels=0.9 if "red" in found else 0.15)
    rings = 0.5 + 0.3 * np.sin(32 * (c.y + 0.9 * c.x**2) + rng.uniform(0, 6))  # of the trachea, far below
    c.paint(soft(glottis, 0.02), c.mucosa[:, None, None] * rings, -3.2 + np.minimum(x / gap, 1) ** 2)
    for side in (-1, 1):  # the arytenoids, two knobs behind the folds
        c.bulge(c.ellipse(side * (0.17 + 0.6 * opening), 0.62, 0.2, 0.16, -15 * side), 0.16, c.mucosa, -0.45, 0.3)
    # Epiglottis: a pale crescent in front.
    bow = np.abs(c.y - rng.uniform(-0.74, -0.66) - 0.6 * c.x**2)
    lid = bow + 0.03 - 0.17 * np.sqrt(np.clip(1 - (c.x / 0.62) ** 2, 0, 1))
    c.bulge(lid, 0.15, mix(c.mucosa, c.pale, 0.6), -0.35, 0.2, vessels=0.6)
    # Nodules and polyps grow from the free edge of a fold, near the end of its front third.
    y, edge = front + 0.42 * (back - front), opening * 0.42**0.85
    if "nodules" in found:
        r = rng.uniform(0.075, 0.095)
        for side in (-1, 1):
            knot = c.ellipse(side * max(edge + 0.3 * r, 0.95 * r), y, r, r * 1.1)  # folds that touch meet at the knots
            c.bulge(knot, r, mix(colour, rgb(1.00, 0.84, 0.74), 0.8), -0.55, 0.4)
            c.mark("nodules", knot)
    if "polyp" in found:
        side, r = rng.choice([-1, 1]).item(), rng.uniform(0.13, 0.16)
        polyp = c.ellipse(side * (edge + 0.25 * r), y + 0.12, r, r * 1.15)
        c.bulge(polyp, r, mix(c.mucosa, rgb(0.85, 0.35, 0.35), 0.5), -0.5, 0.45)
        c.mark("polyp", polyp)
    if "mucus" in found:  # threads from fold to fold
        lowest, reach = rng.uniform(0.05, 0.45), opening + 0.2
        for y in (lowest, lowest - 0.15):
            thread = c.line([(-reach, y), (0, y + rng.uniform(0.03, 0.1)), (reach, y - 0.03)], [0.07, 0.03, 0.07])
            c.bulge(thread, 0.05, rgb(0.86, 0.86, 0.55), -0.35, 0.15)
            c.mark("mucus", thread)


def draw_throat(c, rng, found):
    """Through the mouth: uvula in the midline, on each side two arches with a tonsil between them, tongue below."""
    red, large, swollen = "red" in found, "large" in found, "uvula" in found
    c.paint(1, c.red if red else c.mucosa, -1.3)  # the back wall
    c.vascular(1, 0.9 if red else 0.6)
    if red:  # follicles swell to bumps
        for x, y in zip(rng.uniform(-0.36, 0.36, 9).tolist(), rng.uniform(-0.1, 0.5, 9).tolist(), strict=True):
            c.bulge(c.ellipse(x, y, 0.07, 0.055), 0.06, c.red * 1.35, -1.2, 0.2)
    arch = -c.ellipse(0, 0.45, 0.52, 0.72)  # the inner arch: what is outside of it is nearer
    c.paint(soft(arch), c.mucosa, np.clip(-0.9 - 0.8 * arch, -1, -0.7))
    x, rx, ry = (0.46, 0.27, rng.uniform(0.30, 0.36)) if large else (0.60, 0.13, rng.uniform(0.20, 0.26))
    y = rng.uniform(0.14, 0.22)
    for side in (-1, 1):  # tonsils, with dark crypts
        tonsil = c.ellipse(side * x, y, rx, ry, 8 * side)
        c.bulge(tonsil, rx, mix(c.mucosa, c.red, 0.3), -0.75, 0.4 if large else 0.25, vessels=0.5)
        if large:
            c.mark("large", tonsil)
        for dx, dy in rng.uniform(-0.5, 0.5, (3, 2)).tolist():
            c.paint(0.7 * soft(c.ellipse(side * x + dx * rx, y + dy * ry, 0.022, 0.035)), c.red * 0.4)
    # Uvula: a drop in the midline. The palate with the outer arch, drawn next, covers its root.
    thick, tip = (rng.uniform(0.13, 0.16), 0.29) if swollen else (rng.uniform(0.07, 0.085), 0.11)
    sway, tip = rng.uniform(-0.05, 0.05), tip + rng.uniform(-0.05, 0.05)
    uvula = c.line([(0, -0.55), (sway / 2, -0.15), (sway, tip)], [0.12, thick * 0.85, thick])
    c.bulge(uvula, thick, mix(c.mucosa, c.red, 0.5 if swollen else 0), -0.7, 0.3, vessels=0.5)
    if swollen:
        c.mark("uvula", uvula)
    arch = -c.ellipse(0, 0.5, 0.74, 0.95)
    c.paint(soft(arch), c.mucosa, np.clip(-0.5 - 0.6 * arch, -0.6, 0))
    c.vascular(soft(arch), 0.6)
    if "patches" in found:
        for side in (-1, 1):
            for dy in (-0.6, 0, 0.6):
                dx, dy, r = rng.uniform(-0.4, 0.1), dy + rng.uniform(-0.1, 0.1), rng.uniform(0.06, 0.085)
                patch = c.ellipse(side * (x + dx * rx), y + dy * ry, r, r * rng.uniform(0.7, 1), rng.uniform(0, 180))
                c.bulge(patch, 0.08, rgb(0.97, 0.95, 0.82), -0.45, 0.08)
                c.mark("patches", patch)
    # Tongue: a broad hump with a pale, rough coat and a furrow.
    tongue, surface = c.ellipse(0, 1.15, 0.95, rng.uniform(0.5, 0.6)), c.noise(48, 0.008) - 0.1 * soft(np.abs(c.x), 0.2)
    c.bulge(tongue, 0.4, mix(c.mucosa, c.pale, rng.uniform(0.2, 0.7)), surface - 0.4, 0.45)


# ---------------------------------------------------------------------------------------------------------------------
# Images and data sets

COUNT = 1400  # as many as the images ENTRep has to train on
TEST_START = 1_000_000  # the number of the first test image, far from those of train and public


def draw(label, rng, scope="B", size=(320, 240), places=None):
    """One phantom of a class → (RGB image of `size`, caption). All that is random comes from rng, a NumPy Generator.
    places: a dict to be filled with where each finding is that has a place, (height, width) bool."""
    site, side = label.split("-")[0], min(size)
    choices = ["healthy", *FINDINGS[site], *PAIRS[site]]  # healthy is there twice, so twice as frequent as any other
    found = choices[rng.integers(len(choices))].split()
    canvas = Canvas(min(side, SCOPES[scope].sensor), rng, SCOPES[scope], mirrored=label.endswith("-left"))
    if site == "vc":
        draw_larynx(canvas, rng, found, rng.uniform(0.26, 0.36) if label == "vc-open" else rng.uniform(0, 0.015))
    else:
        {"nose": draw_nose, "ear": draw_ear, "throat": draw_throat}[site](canvas, rng, found)
    canvas.light()
    image = Image.new("RGB", size)
    corner = (size[0] - side) // 2, (size[1] - side) // 2
    image.paste(canvas.record(side), corner)
    for finding, mark in canvas.marks.items() if places is not None else ():
        mask = Image.new("L", size)
        mask.paste(Image.fromarray(np.uint8(255 * mark)).resize((side, side)), corner)
        places[finding] = np.asarray(mask) > 127
    return image, ", ".join([SITES[label][0], *(FINDINGS[site][name][0] for name in found)])


def phantom(i, scope="B", seed=0):
    """The i-th phantom of an endless data set, whatever part of it is wanted → (image, label, caption)."""
    label = CLASSES[i % len(CLASSES)]
    image, caption = draw(label, np.random.default_rng([seed, list(SCOPES).index(scope), i]), scope)
    return image, label, caption


def write_dataset(folder, count=COUNT, scope="B", seed=0):
    """Write phantoms in the layout of the ENTRep challenge as `data.py` reads it, quirks included.

    Of `count` images every fourth goes to train, the others to public; half as many more are the test part. Raises
    UserError where the folder is not empty or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; give a new folder for the phantoms")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".phantoms-", dir=folder.parent) as unfinished:
            made = Path(unfinished, folder.name)  # it takes its place when it is whole
            _write_train(made / "train", range(0, count, 4), scope, seed)
            _write_public(made / "public", [i for i in range(count) if i % 4], scope, seed)
            _write_test(made / "test", range(TEST_START, TEST_START + count // 2), scope, seed)
            (made / "__MACOSX").mkdir()
            (made / "__MACOSX/._x.png").write_bytes(b"\0\5\x16\7Mac OS X")  # as archives packed on a Mac have it
            made.replace(folder)
    except OSError as problem:
        raise UserError(f"cannot write phantoms to {folder} ({reason(problem)}); {advice(problem)}") from None


def _write_images(folder, prefix, numbers, scope, seed):
    """Yield the name, label and caption of each image, written. Threads share the work: NumPy and Pillow let others run
    while they compute."""
    folder.mkdir(parents=True)

    def write(i):
        name, (image, label, caption) = f"{prefix}{i % TEST_START:04d}.png", phantom(i, scope, seed)
        image.save(folder / name, compress_level=1)
        return name, label, caption

    chunks = [numbers[i : i + 32] for i in range(0, len(numbers), 32)]
    for written in prefetch(write, chunks, workers=os.cpu_count() or 1):
        yield from written


def _write_json(file, content):
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_train(folder, numbers, scope, seed):
    labels, same = {}, {}  # same: caption → names of the images that it describes
    for name, label, caption in _write_images(folder / "imgs", "Image", numbers, scope, seed):
        labels[name] = label
        same.setdefault(caption, []).append(name)
    pairs = {a: b for names in same.values() for a, b in zip(names, names[1:] + names[:1], strict=True) if a != b}
    _write_json(folder / "cls.json", labels)
    _write_json(folder / "i2i.json", pairs)
    _write_json(folder / "t2i.json", {caption: names[0] for caption, names in same.items()})


def _write_public(folder, numbers, scope, seed):
    rows = []
    for name, label, caption in _write_images(folder / "images", "_Image", numbers, scope, seed):
        path = name.lower() if len(rows) % 3 == 0 else name  # ENTRep's own list spells some so
        rows.append(_describe(path, label, caption))
    _write_json(folder / "data.json", rows)


def _write_test(folder, numbers, scope, seed):
    rows = list(_write_images(folder / "imgs", "Test", numbers, scope, seed))
    names, captions = [name for name, _, _ in rows], dict.fromkeys(caption for _, _, caption in rows)
    for task, queries in (("cls", names), ("i2i", names), ("t2i", captions)):
        with open(folder / f"{task}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([query] for query in queries)
    _write_json(folder / "data.json", [_describe(*row) for row in rows])  # the challenge keeps these to itself


def _describe(path, label, caption):
    vietnamese = ", ".join(VIETNAMESE[phrase] for phrase in caption.split(", "))
    row = {"Path": path, "Classification": label, "Type": SITES[label][0]}
    return row | {"Description": vietnamese, "DescriptionEN": caption}


DEFAULT = Path(__file__).parent / "phantoms"


def default_dataset():
    """The folder of the data set that `--data phantom` means, drawn at the first use: scope B."""
    if not DEFAULT.exists():
        drawn = f"{COUNT:,} ENT phantoms, and {COUNT // 2} to test on,"
        print(f"drawing {drawn} into {DEFAULT}, once", file=sys.stderr, flush=True)
        with locked(DEFAULT.with_suffix(".lock"), "another program draws them; waiting for its end", wait=True):
            if not DEFAULT.exists():
                write_dataset(DEFAULT)
    return DEFAULT


def main():
    from cli import Parser, file_path, positive_int, whole_number

    parser = Parser("Draw ENT phantoms: a data set in the ENTRep layout.")
    parser.add_argument(
        "folder", nargs="?", type=file_path, help="where to write; without it, some captions are printed"
    )
    parser.add_argument("--count", type=positive_int, default=COUNT, help="images of train and public together")
    parser.add_argument("--scope", choices=list(SCOPES), default="B", help="which of the two scopes sees them")
    parser.add_argument("--seed", type=whole_number, default=0, help="another number draws other phantoms")
    args = parser.parse_args()
    if args.folder:
        write_dataset(args.folder, args.count, args.scope, args.seed)
        print(f"{args.count} phantoms of scope {args.scope} in {args.folder}, and {args.count // 2} to test on")
        return
    for number, label in enumerate(CLASSES):
        captions = [phantom(i, args.scope, args.seed)[2] for i in (number, number + len(CLASSES))]
        print(f"{label:11}", " | ".join(captions))


if __name__ == "__main__":
    run_script(main)
