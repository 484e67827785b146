"""A small data set to train on in a second: coloured halves and fields."""

from PIL import Image, ImageColor, ImageDraw

SHAPES = {"half-left": ("left", "red"), "half-right": ("right", "red"), "field-green": ("all", "green")}


def draw(place, colour, rng):
    """A grey image whose left or right half, or all of it but the rim, has a colour. Greys, shades and outlines differ,
    so that no two look like copies."""
    image = Image.new("RGB", (80, 64), (rng.randrange(20, 120),) * 3)
    left, right = {"left": (0, 39), "right": (40, 79), "all": (4, 75)}[place]
    shade = tuple(round(value * rng.uniform(0.5, 1)) for value in ImageColor.getrgb(colour))
    ImageDraw.Draw(image).rectangle((left, rng.randrange(12), right, 63 - rng.randrange(12)), fill=shade)
    return image
