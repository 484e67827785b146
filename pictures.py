"""Pictures of results: a contact sheet of what was found, curves, and the charts of a report."""

import colorsys
import io
import math
import os
import re
import sys
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from errors import UserError, counted, shown
from files import whole
from images import load_image, to_rgb

TILE, GAP, CAPTION, COLUMNS, PAGE = 224, 16, 142, 5, 50
BACKGROUND, CARD, WHITE, GREY, ALARM = "#121417", "#1d2026", "#f2f2f2", "#9aa0a8", "#ff8a80"
SHAPES = ((0, 0), (4, 0), (3, 0), (4, 45), (6, 0), (3, 180), (5, 0))  # (sides, rotation); 0 sides: a disk


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


def spaced(name):
    """A class's name as words."""
    return re.sub("[_-]+", " ", name)


def jpeg(image, side, quality=88):
    """A Pillow image → its bytes as a JPEG, no side longer than `side`."""
    image, content = to_rgb(image), io.BytesIO()
    image.thumbnail((side, side))
    image.save(content, "JPEG", quality=quality)
    return content.getvalue()


def class_look(name, classes):
    """→ a colour and a shape for a class, (sides, rotation in degrees), 0 sides: a disk. The colours are spaced over
    the run's classes, from yellow to purple: red would look like an alarm."""
    place = classes.index(name) if name in classes else len(classes)
    hue = (45 + 270 * place / max(1, len(classes))) / 360
    return tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.65, 0.65)), SHAPES[place % len(SHAPES)]


def thumbnail(file, frame=None):
    """An image file → a square of TILE pixels that shows all of it. frame "crop": a line around what the model sees."""
    image = to_rgb(load_image(file, TILE))
    scale = TILE / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]  # a thread of an image has at least one pixel
    tile = ImageOps.pad(image.resize(size, Image.Resampling.LANCZOS), (TILE, TILE), color="black")
    if frame == "crop" and min(size) < max(size):
        half = min(size) / 2
        ends = TILE / 2 - half, TILE / 2 + half - 1
        ImageDraw.Draw(tile).rectangle((ends[0], ends[0], ends[1], ends[1]), outline=GREY)
    return tile


def contact_sheets(cards, classes, title, said, frame=None, dress=None):
    """Yield pages, Pillow images, of 50 cards each.

    A card is a dict: "image", a file, and, as far as known, "rank", "score", "class", what it is, "predicted" and
    "probability", what the model says, "captions", "group", "heat", an image to show instead of it, and "query": it is
    what was asked by. said: a line below the title; frame: of images.FRAMES; dress: what is to be done to the cards of
    a page before it is drawn, as maps of all pages at once would take much memory."""
    pages = [cards[first : first + PAGE] for first in range(0, len(cards), PAGE)]
    for number, page in enumerate(pages, start=1):
        columns = max(3, min(COLUMNS, len(page)))  # room for the title
        rows, header, width = -(-len(page) // columns), 76, GAP + columns * (TILE + GAP)
        sheet = Image.new("RGB", (width, header + rows * (TILE + CAPTION + GAP)), BACKGROUND)
        draw = ImageDraw.Draw(sheet)
        more = f", page {number} of {len(pages)}" if len(pages) > 1 else ""
        for y, text, size, colour in ((24, title, 24, WHITE), (54, f"{said}{more}; not a medical device", 14, GREY)):
            draw.text((GAP, y), fit(draw, text, font(size), width - 2 * GAP), colour, font(size), anchor="lm")
        for i, card in enumerate(dress(page) if dress else page):
            corner = GAP + i % columns * (TILE + GAP), header + i // columns * (TILE + CAPTION + GAP)
            _draw_card(sheet, draw, *corner, card, classes, frame)
        yield sheet


def _draw_card(sheet, draw, x, y, card, classes, frame):
    label, predicted = card.get("class"), card.get("predicted")
    name = label or predicted
    colour, (sides, rotation) = class_look(name, classes)
    draw.rectangle((x, y, x + TILE - 1, y + TILE + CAPTION - 1), CARD)
    sheet.paste(card.get("heat") or thumbnail(card["image"], frame), (x, y))
    if card.get("query"):
        draw.rectangle((x, y, x + TILE - 1, y + TILE + CAPTION - 1), outline=WHITE, width=3)
    else:
        draw.rectangle((x, y + TILE, x + TILE - 1, y + TILE + 4), colour)
    lines = [("the query" if card.get("query") else str(card.get("rank") or ""), WHITE, 17)]
    if name:
        middle = (x + 17, y + TILE + 45)
        if sides:
            draw.regular_polygon((*middle, 8), sides, rotation, fill=colour)
        else:
            draw.ellipse((middle[0] - 7, middle[1] - 7, middle[0] + 7, middle[1] + 7), fill=colour)
        plain = [spaced(each or "") for each in (label, predicted)]
        sure = "" if card.get("probability") is None else f" {card['probability']:.2f}"
        agree = label in (None, predicted)
        said = f"the model agrees,{sure}" if label and agree else f"the model says {plain[1]},{sure}"
        lines += [(plain[0] or plain[1], colour, 16), (said, GREY if agree else ALARM, 13)]
    for row, (text, tint, size) in enumerate(lines):
        left, middle = x + (10, 34, 10)[row], y + TILE + (20, 45, 68)[row]
        draw.text((left, middle), fit(draw, text, font(size), x + TILE - 10 - left), tint, font(size), anchor="lm")
    if card.get("score") is not None:
        draw.text((x + TILE - 10, y + TILE + 20), f"{card['score']:.3f}", WHITE, font(16), anchor="rm")
    words = "; ".join(card.get("captions") or ())
    draw.text((x + 10, y + TILE + 82), fit(draw, words, font(13), TILE - 20, lines=2), WHITE, font(13))
    alike = [f"{card['group']}, {counted(card.get('of_group', 1), 'image')}"] if card.get("group") else []
    alike += [f"{card['copies']} more of the same picture"] if card.get("copies") else []
    file = "; ".join([Path(card["image"]).name, *alike])
    draw.text((x + 10, y + TILE + CAPTION - 14), fit(draw, file, font(12), TILE - 20), GREY, font(12), anchor="lm")


def write_sheets(file, cards, *sheet, **more):
    """`contact_sheets` → image files: x.png, x.page-2.png, … Raises UserError where that would overwrite an image that
    is shown."""
    kind, shown_images = Image.registered_extensions()[file.suffix.lower()], [card["image"] for card in cards]
    pages = -(-len(cards) // PAGE)
    for number in range(1, pages + 1):
        refuse_inputs(page_of(file, number), shown_images)
    for number, page in enumerate(contact_sheets(cards, *sheet, **more), start=1):
        with whole(page_of(file, number)) as temporary:
            page.save(temporary, kind)
    if pages > 1:
        print(f"the sheet has {pages} pages, the last is {shown(page_of(file, pages))}", file=sys.stderr)
    if page_of(file, pages + 1).exists():
        print(f"note: {shown(page_of(file, pages + 1))} is of an older sheet", file=sys.stderr)


def page_of(file, number):
    return file if number == 1 else file.with_stem(f"{file.stem}.page-{number}")


def refuse_inputs(file, inputs):
    """Raise UserError where a picture is to be written over one of the images that it is made of."""
    if file.exists() and any(file.samefile(image) for image in inputs if os.path.exists(image)):
        raise UserError(f"{file} is one of the images themselves; write the picture to another file")


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
