"""All figures of a fine-tuned model on labelled images: python evaluate.py [--run RUN] [--data PATH]

Without --data it repeats the figures of the run's own held-out images. With --data it evaluates on other labelled
images, from another hospital, say; their classes should be named as the run's are.

    classification   each image gets the class whose vector it is nearest to
    image→image      each image queries the images of other groups; those of its class are relevant
    text→image       each prompt queries all images; those of its class are relevant
    … same caption   the same two searches, but only images with exactly the query's caption are relevant
    … its match      only the one image that the data set names as the query's match is relevant (ENTRep's i2i.json)
"""

import sys
from dataclasses import replace

import torch

from build import read_run, to_device
from cache import NO_CACHE
from cli import Parser, add_run_flags, find_device, print_json, report_bad
from data import load_dataset
from encoding import encode_images, encode_texts
from errors import UserError, run_script, shown
from metrics import (
    FEWEST_GROUPS,
    Shared,
    accuracy,
    by_class,
    classification_intervals,
    confusion_matrix,
    first_relevant_ranks,
    macro_f1,
    ranks_in_resamples,
    resample,
    retrieval_intervals,
    retrieval_metrics,
)
from prompts import plain_name
from runs import find_run
from split_file import read_split, trained_images
from splits import scored_split
from trust import find_data, find_samples, follow_images


def evaluate(
    model, tokenizer, samples, metadata, device, batch_size, workers, intervals=False, bad=None, cache=NO_CACHE
):
    """Classify and search labelled samples → {"accuracy", "macro_f1", "by_class": {class: {"images", "recall",
    "precision"}}, "i2i_recall@1", …, "t2i_mrr"}; with captions also "i2i_caption_…" and "t2i_caption_…", with matches
    "i2i_match_…"; if asked for, "intervals": {figure: [low, high]} of accuracy, macro-F1, and each search's R@1 and MRR
    (metrics.py).

    A figure without a query is None: image→image search needs two groups of a class. Images that cannot be read are put
    into `bad`, {file: why}, and left out; without it they are a UserError.
    """
    model.eval()
    classes = metadata.classes
    files = [sample.image for sample in samples]
    images = encode_images(model, files, device, batch_size, workers, "evaluating", bad, cache)  # (N, D)
    samples = [sample for sample in samples if sample.image not in (bad or {})]
    if not samples:
        raise UserError(f"none of the {len(files):,} images can be read, {bad[files[0]]}")
    labels = torch.tensor([classes.index(sample.label) for sample in samples])  # (N,)
    with torch.inference_mode():
        predictions = model.classify(images.to(device)).argmax(1).cpu()
    confusion = confusion_matrix(labels, predictions, len(classes))
    results = {"accuracy": accuracy(confusion), "macro_f1": macro_f1(confusion)}
    results["by_class"] = by_class(confusion, classes)

    # An image's own group (else only itself) is not searched: finding the next frame of the same video proves nothing.
    of_image, of_group = [(s.label,) for s in samples], [(s.group or s.image,) for s in samples]
    same_class, same_group = Shared(of_image, of_image), Shared(of_group, of_group)
    texts, of_text = zip(*((p, (name,)) for name in classes for p in metadata.prompts[name]), strict=True)
    prompts, of_prompt = encode_texts(model, tokenizer, texts, device), Shared(of_text, of_image)
    ranks = {
        "i2i": first_relevant_ranks(images, images, same_class, same_group),
        "t2i": first_relevant_ranks(prompts, images, of_prompt),
    }
    groups = _numbers(of_group)
    if intervals and groups.max() + 1 >= FEWEST_GROUPS:
        weights = resample(groups)
        found = classification_intervals(labels, predictions, len(classes), weights)
        redrawn = ranks_in_resamples(prompts, images, of_prompt[:], weights)
        results["intervals"] = found | _search_intervals(ranks["i2i"], redrawn, weights)
    captions = list(dict.fromkeys(caption for sample in samples for caption in sample.captions))
    if captions:
        texts = encode_texts(model, tokenizer, captions, device)
        ranks |= _caption_searches(samples, captions, images, texts, same_group)
    ranks |= _match_search(samples, images)
    return results | {f"{name}_{key}": v for name, r in ranks.items() for key, v in retrieval_metrics(r).items()}


def _search_intervals(i2i, t2i, weights):
    """(N,) ranks of the images' queries, which stay as they are however often one is drawn; (1000, P) of the prompts',
    which depend on the images that were drawn; weights: as `resample` gives → the intervals of both searches."""
    searches = {"i2i": (i2i, weights), "t2i": (t2i, torch.ones_like(t2i))}
    return {
        f"{name}_{key}": ends
        for name, (ranks, times_drawn) in searches.items()
        if not ranks.isnan().all()
        for key, ends in retrieval_intervals(ranks, times_drawn).items()
    }


def _caption_searches(samples, captions, images, texts, same_group):
    """What the samples are, (N, D), and all that is said of them, (C, D) → the ranks of both searches."""
    of_image, of_text = [sample.captions for sample in samples], [(caption,) for caption in captions]
    return {
        "i2i_caption": first_relevant_ranks(images, images, Shared(of_image, of_image), same_group),
        "t2i_caption": first_relevant_ranks(texts, images, Shared(of_text, of_image)),
    }


def _match_search(samples, images):
    """→ the ranks of the search for each image's match, {} where there are none. Only the image itself is left out: its
    match may well be of its group."""
    files = [sample.image for sample in samples]
    known = set(files)
    rows = [i for i, sample in enumerate(samples) if sample.match in known]
    if not rows:
        return {}
    names = [(file,) for file in files]
    match, itself = Shared([(samples[i].match,) for i in rows], names), Shared([names[i] for i in rows], names)
    return {"i2i_match": first_relevant_ranks(images[rows], images, match, itself)}


def selection_score(results):
    """What the best model is best in: the mean of the three tasks' figures, as far as the split has them."""
    values = [results[key] for key in ("macro_f1", "i2i_mrr", "t2i_mrr") if results[key] is not None]
    return sum(values) / len(values)


def _numbers(names):
    """Hashable names → (N,) int64: equal ones get the same number."""
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([number[name] for name in names])


# ---------------------------------------------------------------------------------------------------------------------
# Showing figures

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
    return "\n".join(lines)


def interval_of(results, key):
    """→ "0.936–0.982", or nothing where there is no interval."""
    return "–".join(f"{end:.3f}" for end in results.get("intervals", {}).get(key, []))


# ---------------------------------------------------------------------------------------------------------------------


def other_samples(data, run, metadata):
    """--data → labelled samples, and a note if the run was trained on some of them. Labels may be written in another
    way than the run's classes: ear_left, Ear Left. Raises UserError where they are missing or unknown to the run."""
    samples, spelling = find_samples(data, metadata, run), {}
    for name in metadata.classes:
        spelling.setdefault(plain_name(name), []).append(name)
    for i, sample in enumerate(samples):
        same = spelling.get(plain_name(sample.label or ""), [])
        if sample.label not in metadata.classes and len(same) == 1:
            samples[i] = replace(sample, label=same[0])
    bare = next((sample.image for sample in samples if sample.label is None), None)
    if bare:
        raise UserError(
            f"{bare} has no label; evaluate.py needs a folder for each class, or a manifest with the column label"
        )
    unknown = sorted({sample.label for sample in samples} - set(metadata.classes))
    if unknown:
        known = ", ".join(metadata.classes)
        raise UserError(
            f"{data} has labels that the run does not know: {', '.join(unknown)}; rename them to its classes, "
            f"{known}, or leave their images out"
        )
    trained = trained_images(run)
    seen = sum(sample.image.resolve() in trained for sample in samples)
    note = (
        f"; note: the run was trained on {seen:,} of them, by their paths, so the figures are too good" if seen else ""
    )
    return samples, note


def main():
    parser = Parser("All figures of a fine-tuned model on labelled images")
    data_help = "labelled images; by default those that the run held out"
    add_run_flags(
        parser, data_help, batch_help="images at a time; by default as in training, as other batches round otherwise"
    )
    parser.set_defaults(batch_size=None)
    parser.add_argument("--json", action="store_true", help="print JSON, by the names of metrics.json")
    args = parser.parse_args()
    device, run = find_device(args.device), find_run(args.run)
    model, tokenizer, metadata = read_run(run, args.weights)
    to_device(model.requires_grad_(False), metadata.settings, device)  # as in training, adapters apart
    if args.data:
        name = args.data
        samples, note = other_samples(name, run, metadata)
    else:
        data = find_data(None, metadata, run)
        splits = read_split(run, load_dataset(data) if data == "phantom" else None)
        follow_images(splits, run)
        name, note = f"{scored_split(splits)} of {data}", ""
        samples = splits[scored_split(splits)]
        if not {sample.label for sample in samples} <= set(metadata.classes):
            raise UserError(f"{run / 'split.csv'} has other classes than the run; restore a copy, or add --data PATH")
    batch_size, bad = args.batch_size or metadata.settings.batch_size, {}
    results = evaluate(model, tokenizer, samples, metadata, device, batch_size, args.workers, True, bad)
    print(shown(f"{run} on the {len(samples) - len(bad):,} images of {name}{note}"), file=sys.stderr)
    if args.json:
        print_json(results)
    else:
        print(table(results))
    report_bad(bad)


if __name__ == "__main__":
    run_script(main)
