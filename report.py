"""A run's report: one HTML file that a browser opens, with nothing from elsewhere. Charts are SVG, images are in it.

Whoever has the report has the thumbnails in it; keep it as you keep the images.
"""

import base64
import math
import platform
import time
from dataclasses import asdict
from html import escape

import numpy
import PIL
import torch
import torch.nn.functional as F

from calibration import Calibration
from encoding import encode_texts
from errors import counted, shown
from figures import SEARCHES, at_least, interval_of, show
from files import read_bytes, write_text
from images import load_image
from pictures import jpeg, line_chart, reliability_chart, spaced
from runs import OVERVIEW, read_log
from split_file import count_classes

MISTAKES, EXAMPLES, FOUND, SIDE = 12, 5, 5, 160  # SIDE: of a thumbnail, in pixels
DISCLAIMER = "Teaching and research software, not a medical device: no decision about a patient may rest on it."
STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1b1f24; --dim: #5c6670; --line: #dde1e6;
  --main: #0b62a8; --second: #b4500b; --third: #0a7a55; --bad: #b3261e; --good: #0a7a55; }
@media (prefers-color-scheme: dark) { :root { --page: #121417; --card: #1d2026; --text: #f0f2f4; --dim: #a3acb5;
  --line: #363c45; --main: #6cb6f5; --second: #f0a060; --third: #5fd0a5; --bad: #ff8a80; --good: #5fd0a5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 8px; }
p { margin: 8px 0; max-width: 72ch; overflow-wrap: anywhere; }
.dim, figcaption, small { color: var(--dim); font-size: .875rem; }
.warn { border-left: 4px solid var(--second); padding: 8px 12px; background: var(--card); max-width: none; }
.row { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }
.wide { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0; padding: 12px;
  overflow-wrap: anywhere; break-inside: avoid; }
.card b { display: block; font-size: 1.5rem; line-height: 1.2; }
figcaption { margin-top: 6px; }
figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #000; border-radius: 4px; }
figure.query { border: 2px solid var(--main); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 8px; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; } th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.matrix td + td, .matrix th + th { text-align: center; }
.matrix td { background: color-mix(in srgb, var(--tint) var(--share), transparent); }
.matrix td:first-child, .matrix th { background: none; }
.good { color: var(--good); } .bad { color: var(--bad); }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--text); } .grid { stroke: var(--line); } .a { stroke: var(--main); } .b { stroke: var(--second); }
.c { stroke: var(--third); } svg .fill { fill: var(--main); fill-opacity: .35; } .path { fill: none; stroke-width: 2; }
@media print { body { background: #fff; } main { max-width: none; padding: 0; } h2 { break-after: avoid; } }
"""


def write_report(file, run, model, tokenizer, metadata, seen, metrics, device, where="held out"):
    """Write the report of a run, an HTML file. seen: evaluate.Seen; metrics: what evaluate.py gives of it, and, of a
    training, what metrics.json holds; where: which images were seen. Raises UserError and OSError."""
    settings, classes = metadata.settings, metadata.classes
    images = counted(len(seen.samples), "image")
    data = f"Trained on {settings.data}, from {settings.weights}; the figures are of {images}, {where}."
    parts = [
        f"<h1>{text(run.name)}</h1><p class=dim>{text(data)} {time.strftime('%Y-%m-%d')}</p>",
        f"<p class=warn>{DISCLAIMER}</p>",
        f"<div class=row>{_tiles(metrics)}</div>",
        _section("What it was trained on", _trained_on(run, classes)),
        _section("How training went", _curves(run)),
        _section("Which classes it recognizes", _classes(metrics, classes)),
        _section("How well searches work", _searches(metrics)),
        _section("How far its probabilities can be trusted", _trust(metrics)),
        _section(
            "The mistakes it was surest of", _mistakes(seen, classes, Calibration(metrics.get("temperature", 1.0)))
        ),
        _section("What searches find", _examples(seen, model, tokenizer, metadata, device)),
        _section("Settings and versions", _settings(settings, device)),
    ]
    head = f"<title>{text(run.name)}</title><style>{STYLE}</style>"
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    write_text(file, f'<!doctype html><html lang="en">{meta}{head}<main>{"".join(parts)}</main></html>\n')


def text(value):
    """Whatever names and captions hold, a browser shows it and obeys none of it."""
    return escape(shown(str(value)))


def embed(file, side=SIDE):
    """An image file → <img> that holds a small JPEG of it."""
    content = base64.b64encode(jpeg(load_image(file, side), side, quality=80)).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{content}">'


def _section(title, content):
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _table(header, rows, kind=""):
    """Cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(cell if cell.startswith('<td') else f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class=scroll><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def _name(label):
    return text(spaced(label))


def _tiles(metrics):
    tiles = []
    figures = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
    figures |= {f"{key}_mrr": f"{SEARCHES[key]} MRR" for key in ("i2i", "t2i")}
    for key, name in figures.items():
        ends, before = interval_of(metrics, key), metrics.get(f"zero_shot_{key}")
        more = [f"95 % interval<br>{ends}"] * bool(ends) + [f"before training<br>{show(before)}"] * (before is not None)
        tiles.append(f"<div class=card>{name}<b>{show(metrics[key])}</b><small>{'<br>'.join(more)}</small></div>")
    return "".join(tiles)


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def _trained_on(run, classes):
    counts, groups = count_classes(run)
    splits = [name for name in ("train", "val", "test") if sum(counts[name].values())]
    rows = [[_name(label), *(f"{counts[name][label]:,}" for name in splits)] for label in classes]
    rows.append(["<td><strong>all</strong>", *(f"{sum(counts[name].values()):,}" for name in splits)])
    if any(groups.values()):
        rows.append(["groups", *(f"{groups[name]:,}" for name in splits)])
    parts = [_table(["class", *splits], rows)]
    kept = run / OVERVIEW
    lines = read_bytes(kept).decode("utf-8", "replace").splitlines() if kept.is_file() else []
    parts += [f"<p>{text(line)}</p>" for line in lines if line.startswith("note: ")]
    if (run / "skipped.txt").is_file():
        skipped = read_bytes(run / "skipped.txt").decode("utf-8", "replace").splitlines()
        parts.append(f"<details><summary>{counted(len(skipped), 'image')} could not be read</summary>")
        parts.append("".join(f"<p class=dim>{text(line)}</p>" for line in skipped) + "</details>")
    return "".join(parts)


def _curves(run):
    lines = read_log(run)
    if len(lines) < 2:
        return ""  # one point makes no curve

    def series(key):
        return [
            (line["step"], line[key]) for line in lines if isinstance(line.get(key), float) and math.isfinite(line[key])
        ]

    figures = {"accuracy": "accuracy", "image→image MRR": "i2i_mrr", "text→image MRR": "t2i_mrr"}
    panels = [{name: series(key) for name, key in named.items()} for named in ({"loss": "loss"}, figures)]
    panels = [{name: points for name, points in panel.items() if points} for panel in panels]
    charts = "".join(f"<figure>{line_chart(panel, 'step')}</figure>" for panel in panels if panel)
    said = "After each round: the mean loss of its steps, and figures of the validation images."
    return f"<p>{said}</p><div class=wide>{charts}</div>"


def _classes(metrics, classes):
    rows = []
    for label in classes:
        row = metrics["by_class"][label]
        recall, precision = row["recall"], row["precision"]
        both = recall is not None and precision is not None and recall + precision > 0
        f1 = 2 * recall * precision / (recall + precision) if both else None
        rows.append([_name(label), f"{row['images']:,}", *map(show, (recall, precision, f1))])
    said = "Recall is the share of the class's images that were recognized, precision the share of those called so "
    said += "that are. Below, a row for each true class: how its images were called."
    matrix = []
    for label, counts in zip(classes, metrics["confusion"], strict=True):
        cells = []
        for other, count in zip(classes, counts, strict=True):
            tint, share = ("--main", "--bad")[other != label], 70 * count / max(1, sum(counts))
            cells.append(f'<td style="--tint: var({tint}); --share: {share:.0f}%">{count or "·"}')
        matrix.append([_name(label), *cells])
    table = _table(["class", "images", "recall", "precision", "F1"], rows)
    return table + f"<p>{said}</p>" + _table(["true class", *map(_name, classes)], matrix, "matrix")


def _searches(metrics):
    rows = []
    for key, name in SEARCHES.items():
        if f"{key}_mrr" in metrics:
            figures = [show(metrics[f"{key}_{figure}"]) for figure in ("recall@1", "recall@5", "recall@10", "mrr")]
            rows.append([name, *figures, interval_of(metrics, f"{key}_mrr") or "–"])
    said = "R@K is the share of searches with a right answer among the first K images; MRR is the mean of 1 / rank "
    said += "of the first right one."
    return _table(["search", "R@1", "R@5", "R@10", "MRR", "95 % interval"], rows) + f"<p>{said}</p>"


def _trust(metrics):
    if "ece" not in metrics:
        return ""  # an old run, or an interrupted one
    before, after, T = (metrics[key] for key in ("ece_uncalibrated", "ece", "temperature"))
    said = f"""Of the images that get their class with a probability of 0.9, nine in ten should be right. How far that
is from the truth, on average over all images, is the calibration error: {before:.3f} as the model says, {after:.3f}
with its logits divided by a temperature, {T:.2f}, which was chosen on the validation images. Such a probability knows
of the run's classes only: an image of none of them gets one, too."""
    rows = [[f"{100 * row['share']:.0f} %", at_least(row), show(row["accuracy"])] for row in metrics["coverage"]]
    table = _table(["the surest", "probability at least", "accuracy"], rows)
    chart = f"<figure>{reliability_chart(metrics['reliability'])}</figure>"
    return f"<p>{said}</p><div class=wide>{chart}<div>{table}</div></div>"


def _mistakes(seen, classes, calibration):
    sure, called = calibration.probabilities(seen.logits).max(1)
    wrong = (called != seen.labels).nonzero()[:, 0]
    if not len(wrong):
        return "<p>None: every image got its class.</p>"
    cards = []
    for i in wrong[sure[wrong].argsort(descending=True)][:MISTAKES].tolist():
        sample, name = seen.samples[i], _name(classes[called[i]])
        said = f"called <span class=bad>{name}</span>, {sure[i]:.2f}; is {_name(sample.label)}"
        cards.append(_card(sample, f"{said}<br><small>{text(sample.image.name)}</small>"))
    said = f"{counted(len(wrong), 'mistake')} in {counted(len(seen.samples), 'image')}"
    said += f", {len(cards)} are shown" if len(cards) < len(wrong) else ""
    return f"<p>{said}.</p><div class=row>{''.join(cards)}</div>"


def _card(sample, said, kind=""):
    return f'<figure class="{kind}">{embed(sample.image)}<figcaption>{said}</figcaption></figure>'


def _examples(seen, model, tokenizer, metadata, device):
    """Searches among what was seen: three by text, captions where there are some, and two by image."""
    images = F.normalize(seen.images, dim=1)
    captions = sorted({(caption, s.label) for s in seen.samples for caption in s.captions})
    texts = captions or [(metadata.prompts[name][0], name) for name in metadata.classes]
    count = min(3, len(texts))
    texts = [texts[len(texts) * i // count] for i in range(count)]
    queries = F.normalize(encode_texts(model, tokenizer, [words for words, _ in texts], device), dim=1)
    parts = []
    for (words, label), query in zip(texts, queries, strict=True):
        parts.append(f"<p>“{text(words)}”</p><div class=row>{_found(seen, images @ query, label)}</div>")
    for i in {len(images) * k // (EXAMPLES - len(texts)) for k in range(EXAMPLES - len(texts))}:
        sample = seen.samples[i]
        own = [(s.group or s.image) == (sample.group or sample.image) for s in seen.samples]
        found = _found(seen, (images @ images[i]).masked_fill(torch.tensor(own), -2), sample.label)
        query = _card(sample, f"the query, {_name(sample.label)}", "query")
        parts.append(f"<p>Images like {text(sample.image.name)}</p><div class=row>{query}{found}</div>")
    return "<p>The nearest of the images above, by the cosine of the embeddings.</p>" + "".join(parts)


def _found(seen, scores, label):
    cards = []
    for i in scores.argsort(descending=True)[:FOUND].tolist():
        sample = seen.samples[i]
        if scores[i] > -2:  # not of the query's own group
            mark = "<span class=good>✓</span>" if sample.label == label else "<span class=bad>✗</span>"
            said = f"{mark} {_name(sample.label)}, {scores[i]:.3f}"
            said += f"<br><small>{text('; '.join(sample.captions))}</small>" if sample.captions else ""
            cards.append(_card(sample, said))
    return "".join(cards)


def _settings(settings, device):
    rows = [[f"--{key.replace('_', '-')}", text(value)] for key, value in asdict(settings).items() if value is not None]
    versions = {"Python": platform.python_version(), "PyTorch": torch.__version__, "NumPy": numpy.__version__}
    versions |= {"Pillow": PIL.__version__, "system": platform.platform(), "device": device}
    rows += [[name, text(version)] for name, version in versions.items()]
    return _table(["setting", ""], rows, "settings")
