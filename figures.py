"""Figures as text: a line for the log of a training, a table at its end. What `evaluate` gives is what they show."""

import math

from errors import shown

SEARCHES = {
    "i2i": "image→image",
    "t2i": "text→image",
    "i2i_caption": "image→image, same caption",
    "t2i_caption": "text→image, same caption",
    "i2i_match": "image→image, its match",
}


def show(figure):
    return "–" if figure is None else f"{figure:.3f}"


def summary(results):
    """The figures in a line, for the training's log."""
    parts = [f"accuracy {show(results['accuracy'])}  F1 {show(results['macro_f1'])}"]
    for key in ("i2i", "t2i"):
        recalls = "/".join(show(results[f"{key}_recall@{k}"]) for k in (1, 5, 10))
        parts.append(f"{SEARCHES[key]} R@1/5/10 {recalls}  MRR {show(results[f'{key}_mrr'])}")
    return "  ".join(parts)


def table(results):
    """The figures as a table: every class, then every search."""
    width = max(map(len, [*map(shown, results["by_class"]), *SEARCHES.values()]))
    lines = [f"{'class':{width}}  images  recall  precision"]
    for name, row in results["by_class"].items():
        lines.append(f"{shown(name):{width}}  {row['images']:6}  {show(row['recall']):>6}  {show(row['precision']):>9}")
    for key, name in (("accuracy", "accuracy"), ("macro_f1", "macro-F1")):
        ends = interval_of(results, key)
        lines.append(f"{name} {show(results[key])}" + (f", 95 % interval {ends}" if ends else ""))
    known = "intervals" in results
    heading = f"{'search':{width}}  {'R@1':>6}  {'R@5':>6}  {'R@10':>6}  {'MRR':>6}"
    lines += ["", heading + "   95 % intervals of R@1 and MRR" * known]
    for key, name in SEARCHES.items():
        if f"{key}_mrr" in results:
            figures = [results[f"{key}_{figure}"] for figure in ("recall@1", "recall@5", "recall@10", "mrr")]
            ends = [ends for figure in ("recall@1", "mrr") if (ends := interval_of(results, f"{key}_{figure}"))]
            lines.append(f"{name:{width}}  " + "  ".join(f"{show(figure):>6}" for figure in figures))
            lines[-1] += f"   {', '.join(ends)}" if ends else ""
    if "ece" in results:
        before, after, T = (results[key] for key in ("ece_uncalibrated", "ece", "temperature"))
        lines += ["", f"calibration error {before:.3f}, {after:.3f} with a temperature of {T:.2f}"]
        for row in results["coverage"][1:]:
            least = f"with a probability of {at_least(row)} or more"
            lines.append(f"accuracy of the surest {100 * row['share']:.0f} %, those {least}: {show(row['accuracy'])}")
    return "\n".join(lines)


def at_least(row):
    """→ the least probability of a row of `coverage`, rounded down, so that --unsure keeps the images of that row."""
    return f"{math.floor(1000 * row['at_least']) / 1000:.3f}"


def interval_of(results, key):
    """→ "0.936–0.982", or nothing where there is no interval."""
    return "–".join(f"{end:.3f}" for end in results.get("intervals", {}).get(key, []))
