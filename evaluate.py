"""All figures of a fine-tuned model on labelled images: python evaluate.py [--run RUN] [--data PATH]

Without --data it repeats the figures of the run's own held-out images. With --data it evaluates on other labelled
images, from another hospital, say; their classes should be named as the run's are.

    classification   each image gets the class whose vector it is nearest to
    image→image      each image queries the images of other groups; those of its class are relevant
    text→image       each prompt queries all images; those of its class are relevant
    … same caption   the same two searches, but only images with exactly the query's caption are relevant
    … its match      only the one image that the data set names as the query's match is relevant (ENTRep's i2i.json)
"""

import random
import sys
from dataclasses import replace
from typing import NamedTuple

import torch

from build import read_run, to_device
from cache import NO_CACHE
from calibration import CALIBRATION, MOST, Calibration
from cli import Parser, add_run_flags, file_path, find_device, print_json, report_bad
from data import load_dataset
from encoding import encode_images, encode_texts
from errors import UserError, run_script, shown
from figures import table
from files import write_json
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
from parallel import rank
from prompts import plain_name
from report import write_report
from runs import find_run
from split_file import read_split, trained_images
from splits import scored_split
from trust import find_data, find_samples, follow_images


class Seen(NamedTuple):
    """Labelled images, and what a model makes of them, on the CPU."""

    samples: list
    labels: torch.Tensor  # (N,) class numbers
    images: torch.Tensor  # (N, D) fused embeddings
    logits: torch.Tensor  # (N, C)


def see(model, samples, classes, device, batch_size, workers, bad=None, cache=NO_CACHE):
    """Labelled samples → Seen. Those that cannot be read are put into `bad`, {file: why}, and left out; without it they
    are a UserError."""
    model.eval()
    files = [sample.image for sample in samples]
    images = encode_images(model, files, device, batch_size, workers, "evaluating", bad, cache)
    samples = [sample for sample in samples if sample.image not in (bad or {})]
    if not samples:
        raise UserError(f"none of the {len(files):,} images can be read, {bad[files[0]]}")
    labels = torch.tensor([classes.index(sample.label) for sample in samples])
    with torch.inference_mode():
        return Seen(samples, labels, images, model.classify(images.to(device)).cpu())


def calibrate(model, val, files, device, batch_size, workers):
    """What is Seen of the validation images, and the files that were trained on → Calibration."""
    some = random.Random(0).sample(files, min(MOST, len(files)))
    known = encode_images(model, some, device, batch_size, workers, "calibrating")
    return Calibration.fit(val.logits, val.labels, val.images, known)


def evaluate(model, tokenizer, seen, metadata, device, intervals=False):
    """Classify and search what is Seen → {"accuracy", "macro_f1", "by_class": {class: {"images", "recall",
    "precision"}}, "confusion": a row for each true class, "i2i_recall@1", …, "t2i_mrr"}; with captions also
    "i2i_caption_…" and "t2i_caption_…", with matches "i2i_match_…"; if asked for, "intervals": {figure: [low, high]} of
    accuracy, macro-F1, and each search's R@1 and MRR (metrics.py). A figure without a query is None: image→image search
    needs two groups of a class.
    """
    samples, labels, images, logits = seen
    classes, predictions = metadata.classes, logits.argmax(1)
    confusion = confusion_matrix(labels, predictions, len(classes))
    results = {"accuracy": accuracy(confusion), "macro_f1": macro_f1(confusion)}
    results |= {"by_class": by_class(confusion, classes), "confusion": confusion.tolist()}

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


def finish(run, splits, model, tokenizer, metadata, state, device, workers, cache, report=True):
    """The figures of the best model, on the split that counts → metrics, kept and shown. report: calibrate its
    probabilities, too, and write a report."""
    # The best round was chosen by val, whose figures are therefore a little too good. Nothing was chosen by test.
    split, how = scored_split(splits), (device, metadata.settings.batch_size, workers)
    seen = see(model, splits[split], metadata.classes, *how, cache=cache)
    results = evaluate(model, tokenizer, seen, metadata, device, intervals=True)
    if report:
        val = seen if split == "val" else see(model, splits["val"], metadata.classes, *how, cache=cache)
        calibration = calibrate(model, val, [sample.image for sample in splits["train"]], *how)
        results |= calibration.figures(seen.logits, seen.labels)
    untrained = {f"zero_shot_{key}": value for key, value in state.zero_shot.items()}
    metrics = {
        "split": split,
        "step": state.best_step,
        **results,
        **untrained,
        "train_seconds": round(state.seconds, 1),
    }
    print(f"best after step {state.best_step}, on {split}:\n{table(metrics)}")
    if not rank():
        if report:
            calibration.save(run / CALIBRATION)
            where = (
                "held out, by which the best round and the temperature were chosen" if split == "val" else "held out"
            )
            write_report(run / "report.html", run, model, tokenizer, metadata, seen, metrics, device, where)
        write_json(run / "metrics.json", metrics)  # which says that the training is finished
    print(f"{state.seconds:.0f} s of training; the model is in {shown(run)}", flush=True)
    return metrics


def selection_score(results):
    """What the best model is best in: the mean of the three tasks' figures, as far as the split has them."""
    values = [results[key] for key in ("macro_f1", "i2i_mrr", "t2i_mrr") if results[key] is not None]
    return sum(values) / len(values)


def _numbers(names):
    """Hashable names → (N,) int64: equal ones get the same number."""
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([number[name] for name in names])


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
    parser.add_argument("--report", type=file_path, help="write a report to this .html file, with thumbnails of images")
    args = parser.parse_args()
    if args.report and (args.report.suffix.lower() != ".html" or not args.report.parent.is_dir()):
        raise UserError(
            f"--report cannot write {args.report}; give it a name that ends in .html, in a folder that exists"
        )
    device, run = find_device(args.device), find_run(args.run)
    model, tokenizer, metadata = read_run(run, args.weights)
    to_device(model.requires_grad_(False), metadata.settings, device)  # as in training, adapters apart
    calibration = Calibration.load(run / CALIBRATION, model.head.shape[1])
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
    seen = see(model, samples, metadata.classes, device, batch_size, args.workers, bad)
    results = evaluate(model, tokenizer, seen, metadata, device, intervals=True)
    results |= calibration.figures(seen.logits, seen.labels)
    print(shown(f"{run} on the {len(seen.samples):,} images of {name}{note}"), file=sys.stderr)
    if args.report:
        write_report(args.report, run, model, tokenizer, metadata, seen, results, device, f"those of {name}")
    if args.json:
        print_json(results)
    else:
        print(table(results))
    report_bad(bad)


if __name__ == "__main__":
    run_script(main)
