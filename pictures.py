"""Pictures of results: a contact sheet of what was found, curves, and the charts of a report."""

import colorsys
import math
import re
import zlib
from html import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from errors import counted, shown
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
    for word in shown(text[:300]).split():  # no card holds more
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
    image = to_rgb(load_image(file))
    scale = TILE / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]  # a thread of an image has at least one pixel
    return ImageOps.pad(image.resize(size, Image.Resampling.LANCZOS), (TILE, TILE), color="black")


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
        words = fit(draw, "; ".join(result["captions"]) or name, font(15), TILE - 20, lines=2)
        draw.text((x + 10, y + TILE + 40), words, colour, font(15))
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# Heat maps

HEAT = ((0, (0, 0, 4)), (0.25, (87, 16, 110)), (0.5, (188, 55, 84)), (0.75, (249, 142, 9)), (1, (252, 255, 164)))


def overlay(square, heat):
    """What a model saw, a square Pillow image, and its map, (rows, columns) from 0 to 1 → the image in grey, and the
    map over it in colours from dark to bright."""
    level = Image.fromarray(np.asarray(heat, np.float32)).resize(square.size, Image.Resampling.BICUBIC)
    level = np.asarray(level).clip(0, 1)
    places, colours = zip(*HEAT, strict=True)
    colour = np.stack([np.interp(level, places, channel) for channel in zip(*colours, strict=True)], axis=-1)
    grey, share = np.asarray(square.convert("L").convert("RGB"), np.float32), (0.65 * level)[..., None]
    return Image.fromarray(((1 - share) * grey + share * colour).astype(np.uint8))


def explained(square, heat, title):
    """→ a Pillow image: what the model saw, beside it the map, and above both a title."""
    side, header = 448, 56
    picture = Image.new("RGB", (2 * side + 3 * GAP, header + side + GAP), BACKGROUND)
    draw, square = ImageDraw.Draw(picture), square.resize((side, side), Image.Resampling.BICUBIC)
    draw.text((GAP, header / 2), fit(draw, title, font(20), picture.width - 2 * GAP), WHITE, font(20), anchor="lm")
    picture.paste(square, (GAP, header))
    picture.paste(overlay(square, heat), (2 * GAP + side, header))
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# Curves

COLOURS = ("#888888", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by colour-blind people, too


def curves(panels, x_label, width=400, height=300):
    """{title: {series: [(x > 0, [value of each repeat]), …]}} → SVG: a panel for each title, side by side, x growing by
    factors. A line joins the means; a bar goes from the least to the greatest value."""
    left, right, top, bottom = 48, 16, 34, 74
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(panels)} {height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]

    def text(x, y, words, anchor="middle", more=""):
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>')

    for number, (title, series) in enumerate(panels.items()):
        xs = sorted({x for points in series.values() for x, _ in points})
        values = [value for points in series.values() for _, of_x in points for value in of_x]
        step = next(s for s in (0.02, 0.05, 0.1, 0.2) if max(values) - min(values) <= 6 * s)  # between grid lines
        first = math.floor(min(values) / step)
        last = max(math.ceil(max(values) / step), first + 1)
        low, high = first * step, last * step
        span = math.log(xs[-1] / xs[0]) or 1

        def at(x, y, offset=number * width, least=xs[0], span=span, low=low, high=high):
            across = (width - left - right) * math.log(x / least) / span
            return offset + left + across, top + (height - top - bottom) * (high - y) / (high - low)

        text(number * width + width / 2, 20, title, more='font-weight="bold"')
        for line in range(first, last + 1):
            (x1, y), (x2, _) = at(xs[0], line * step), at(xs[-1], line * step)
            parts.append(f'<path d="M{x1:.1f} {y:.1f}H{x2:.1f}" stroke="#dddddd"/>')
            text(x1 - 8, y + 4, f"{line * step:.2f}", "end")
        for x in xs:
            text(at(x, low)[0], height - bottom + 18, str(x))
        text(number * width + width / 2, height - bottom + 36, x_label)
        for i, (name, points) in enumerate(series.items()):
            colour = COLOURS[i % len(COLOURS)]
            means = " ".join("{:.1f},{:.1f}".format(*at(x, sum(of_x) / len(of_x))) for x, of_x in points)
            parts.append(f'<polyline points="{means}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for x, of_x in points:
                (place, best), (_, worst) = at(x, max(of_x)), at(x, min(of_x))
                place += 2 * (i - (len(series) - 1) / 2)  # side by side where they would hide each other
                parts.append(f'<path d="M{place:.1f} {best:.1f}V{worst:.1f}" stroke="{colour}" stroke-width="1.5"/>')
            x = number * width + left + (width - left - right) * (i + 0.5) / len(series)
            text(x, height - 14, name, more=f'fill="{colour}" font-weight="bold"')
    return "\n".join([*parts, "</svg>"]) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Charts of a report, whose page has the colours of the classes a, b, c, grid, path and fill

LEFT, RIGHT, TOP, BOTTOM = 52, 16, 44, 52


def line_chart(series, x_label, width=480, height=280):
    """{name: [(x, y), …]}, up to three of them → SVG."""
    xs, ys = zip(*(point for points in series.values() for point in points), strict=True)
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 1e9) if max(ys) - min(ys) <= 5 * s)
    low = math.floor(min(ys) / step)
    high = max(low + 1, math.ceil(max(ys) / step))
    at = _scale((min(xs), max(xs)), (low * step, high * step), width, height)
    y_ticks = [(i * step, f"{i * step:.2f}") for i in range(low, high + 1)]
    parts = _axes(at, [(x, f"{x:,}") for x in (min(xs), max(xs))], y_ticks, x_label, width, height)
    left = LEFT
    for colour, (name, points) in zip("abc", series.items(), strict=False):
        line = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in points)
        parts.append(f'<polyline class="path {colour}" points="{line}"/>')
        parts.append(f'<path class="path {colour}" d="M{left} 16h18"/><text x="{left + 24}" y="20">{name}</text>')
        left += 44 + 7 * len(name)
    return _svg(parts, width, height, f"{', '.join(series)} by {x_label}")


def reliability_chart(rows, width=480, height=320):
    """What calibration.reliability gives → SVG: how often the model was right, over what it said."""
    at, ticks = _scale((0, 1), (0, 1), width, height), [(i / 5, f"{i / 5:.1f}") for i in range(6)]
    parts = _axes(at, ticks, ticks, "probability of the class that was given", width, height)
    (x1, y1), (x2, y2) = at(0, 0), at(1, 1)
    parts.append(f'<path class="path b" stroke-dasharray="5 5" d="M{x1} {y1}L{x2} {y2}"/>')
    most = max(row["images"] for row in rows)
    for row in rows:
        (x, y), half = at(row["probability"], row["accuracy"]), 3 + 9 * (row["images"] / most) ** 0.5
        words = f"{counted(row['images'], 'image')}: said {row['probability']:.2f}, right {row['accuracy']:.2f}"
        box = f'x="{x - half:.1f}" y="{y:.1f}" width="{2 * half:.1f}" height="{y1 - y:.1f}"'
        parts.append(f'<rect class="fill a" {box}><title>{words}</title></rect>')
    parts.append(f'<text x="{LEFT}" y="20">share that was right; wider bars are of more images</text>')
    return _svg(parts, width, height, "how often the model was right, by its probability")


def _scale(xs, ys, width, height):
    """The ends of both axes → a function from values to places."""

    def at(x, y):
        across, up = (x - xs[0]) / (xs[1] - xs[0] or 1), (y - ys[0]) / (ys[1] - ys[0])
        return LEFT + (width - LEFT - RIGHT) * across, height - BOTTOM - (height - TOP - BOTTOM) * up

    return at


def _axes(at, x_ticks, y_ticks, x_label, width, height):
    """Grid lines and numbers. ticks: (value, what to write)."""
    parts = []
    for y, words in y_ticks:
        place = at(0, y)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{width - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{words}</text>')
    for x, words in x_ticks:
        parts.append(f'<text x="{at(x, 0)[0]:.1f}" y="{height - 34}" text-anchor="middle">{words}</text>')
    return [*parts, f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">{x_label}</text>']


def _svg(parts, width, height, says):
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{says}">{"".join(parts)}</svg>'
