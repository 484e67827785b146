"""A small data set to train on in a second: coloured halves and fields."""

from PIL import Image, ImageDraw

SHAPES = {"half-left": ("left", "red"), "half-right": ("right", "red"), "field-green": ("all", "green")}


def draw(place, colour, rng):
    """A grey image whose left or right half, or all of it but the rim, has a colour."""
    image = Image.new("RGB", (80, 64), (40 + rng.randrange(20),) * 3)
    left, right = {"left": (0, 39), "right": (40, 79), "all": (4, 75)}[place]
    ImageDraw.Draw(image).rectangle((left, rng.randrange(4), right, 63 - rng.randrange(4)), fill=colour)
    return image
