"""Pictures of results: a contact sheet of what was found."""

import colorsys
import re
import zlib

from PIL import Image, ImageDraw, ImageFont, ImageOps

from images import load_image, to_rgb

TILE, GAP, CAPTION, COLUMNS = 224, 16, 84, 5
BACKGROUND, CARD, WHITE, GREY = "#121417", "#1d2026", "#f2f2f2", "#9aa0a8"


def font(size):
    for name in ("DejaVuSans.ttf", "Arial.ttf"):  # more scripts than Pillow's own font knows
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def fit(draw, text, face, width, lines=1):
    """Break a text into at most `lines` lines of a width in pixels, and cut what is left."""
    fitted = []
    for word in text.split():
        if fitted and (draw.textlength(f"{fitted[-1]} {word}", face) <= width or len(fitted) == lines):
            fitted[-1] += f" {word}"
        else:
            fitted.append(word)
    for i, line in enumerate(fitted):
        while draw.textlength(fitted[i], face) > width:
            line = line[:-1]
            fitted[i] = line.rstrip() + "…"
    return "\n".join(fitted)


def class_colour(name):
    """The same colour for the same class on every sheet."""
    r, g, b = colorsys.hls_to_rgb(zlib.crc32(name.encode()) % 360 / 360, 0.6, 0.65)
    return (round(255 * r), round(255 * g), round(255 * b))


def thumbnail(file):
    return ImageOps.pad(to_rgb(load_image(file)), (TILE, TILE), Image.Resampling.LANCZOS, color="black")


def contact_sheet(results, text, image):
    """Results of a search, and its query → a Pillow image: a card for each, with rank, score, and caption or class."""
    columns = min(COLUMNS, len(results))
    rows = -(-len(results) // columns)
    columns = max(columns, 3)  # room for the query
    header = TILE // 2 + 2 * GAP if image else 76
    width = GAP + columns * (TILE + GAP)
    sheet = Image.new("RGB", (width, header + rows * (TILE + CAPTION + GAP)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)

    left = GAP
    if image:
        sheet.paste(thumbnail(image).resize((TILE // 2, TILE // 2), Image.Resampling.LANCZOS), (left, GAP))
        left += TILE // 2 + GAP
    title = " + ".join([f"“{text}”"] * bool(text) + [image.name if image else ""] * bool(image))
    draw.text((left, header / 2 - 14), fit(draw, title, font(24), width - left - GAP), WHITE, font(24), anchor="lm")
    draw.text((left, header / 2 + 16), f"the {len(results)} nearest images, by cosine", GREY, font(14), anchor="lm")

    for i, result in enumerate(results):
        x, y = GAP + i % columns * (TILE + GAP), header + i // columns * (TILE + CAPTION + GAP)
        draw.rectangle((x, y, x + TILE - 1, y + TILE + CAPTION - 1), CARD)
        sheet.paste(thumbnail(result["image"]), (x, y))
        name = re.sub("[_-]+", " ", result["class"] or result["predicted"])
        colour = class_colour(name)
        draw.rectangle((x, y + TILE, x + max(0, round((TILE - 1) * result["score"])), y + TILE + 4), colour)
        draw.text((x + 10, y + TILE + 22), f"{result['rank']}", WHITE, font(18), anchor="lm")
        draw.text((x + TILE - 10, y + TILE + 22), f"{result['score']:.3f}", WHITE, font(16), anchor="rm")
        name += "?" * (result["class"] is None)  # no label, but a prediction
        words = fit(draw, result["caption"] or name, font(15), TILE - 20, lines=2)
        draw.text((x + 10, y + TILE + 40), words, colour, font(15))
    return sheet
