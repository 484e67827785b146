"""Classify images with a fine-tuned model: python classify.py IMAGE-OR-FOLDER…"""

import sys

import torch

from build import load_run
from calibration import CALIBRATION, UNLIKE, Calibration
from cli import (
    Parser,
    add_query_flags,
    add_run_flags,
    check_query_flags,
    check_sheet,
    file_path,
    find_device,
    fraction,
    print_csv,
    print_json,
    report_bad,
)
from encoding import encode_images
from entrep import class_numbers, find_queries, read_queries, zip_submission
from errors import UserError, run_script, shown
from explain import add_heat
from images import find_images
from pictures import write_sheets
from runs import find_run
from trust import find_samples

UNSURE = "unsure"


def classify(model, classes, files, device, batch_size, workers, calibration, unsure=0.0):
    """Image files → a dict each, "image", "class", "probability", "familiarity" (calibration.py) and the probabilities
    of all classes, "classes"; and {file that cannot be read: why}. unsure: a class that is less probable is UNSURE."""
    bad = {}
    features = encode_images(model, files, device, batch_size, workers, "classifying", bad)
    files = [file for file in files if file not in bad]
    with torch.inference_mode():
        table = calibration.probabilities(model.classify(features.to(device)).cpu()).tolist()  # (files, classes)
    familiar = calibration.familiarity(features)
    results = []
    for number, (file, row) in enumerate(zip(files, table, strict=True)):
        probabilities = {name: round(p, 6) for name, p in zip(classes, row, strict=True)}
        best = classes[row.index(max(row))]
        result = {"image": str(file), "class": best if max(row) >= unsure else UNSURE}
        result["probability"] = probabilities[best]
        result["familiarity"] = None if familiar is None else round(familiar[number].item(), 4)
        results.append(result | {"classes": probabilities})
    return results, bad


def draw(results, model, metadata, device, args, run):
    """Write contact sheets of the results."""
    cards, frame = [], model.clip.config.preprocessing.frame
    for r in results:
        best, said = max(r["classes"], key=r["classes"].get), (UNSURE if r["class"] == UNSURE else "", note(r))
        card = {"image": r["image"], "predicted": best, "probability": r["probability"]}
        cards.append(card | {"captions": [words for words in said if words]})

    def dress(page):
        vector = dict(zip(metadata.classes, model.head.detach(), strict=True))
        return add_heat(page, model, lambda card: vector[card["predicted"]], device)

    said = f"{len(results):,} images by run {run.name}"
    write_sheets(args.sheet, cards, metadata.classes, "classified", said, frame, dress if args.explain else None)


def note(result):
    strange = result["familiarity"] is not None and result["familiarity"] < UNLIKE
    return "unlike the training images" if strange else ""


def show(results, classes, args):
    """Print them in the form that was asked for."""
    if args.json:
        print_json(results)
    elif args.csv:
        columns = "image", "class", "probability", "familiarity"
        print_csv([[*columns, *classes], *([*(r[c] for c in columns), *r["classes"].values()] for r in results)])
    else:
        table = [("image", "class", "probability", "runner-up", "")]
        for r in results:
            second = sorted(r["classes"], key=r["classes"].get)[-2]
            columns = f"{r['probability']:.3f}", f"{second} {r['classes'][second]:.3f}"
            table.append((r["image"], r["class"], *columns, note(r)))
        table = [tuple(map(shown, row)) for row in table]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def main():
    parser = Parser(__doc__)
    add_run_flags(parser)
    parser.add_argument("images", nargs="*", type=file_path, metavar="IMAGE-OR-FOLDER", help="default: all of --data")
    parser.add_argument(
        "--unsure", type=fraction, default=0.0, help="below this probability the class is given as unsure"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, with the probability of every class")
    form.add_argument("--csv", action="store_true", help="print CSV, with the probability of every class")
    parser.add_argument("--sheet", type=file_path, help="draw the images and their classes into this image file")
    parser.add_argument("--explain", action="store_true", help="with --sheet: show where the model looked")
    add_query_flags(parser, "cls.csv gives {image: class number}, for the images of --data")
    args = parser.parse_args()
    check_query_flags(args, "csv", "unsure", "sheet")
    check_sheet(args)
    if args.images and (args.data or args.queries):
        raise UserError("--data and --queries choose the images; leave them out, or the images that you named")
    queries = read_queries(args.queries) if args.queries else []
    files = []
    for path in args.images:
        found = find_images(path) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            where = f"there are no images in {path}" if path.is_dir() else f"there is no file {path}"
            raise UserError(f"{where}; check the path")
        files += found
    device = find_device(args.device)
    run = find_run(args.run)
    model, _, metadata = load_run(run, device, args.weights)
    number = class_numbers(metadata.classes) if queries else {}
    files = list(dict.fromkeys(files or (s.image for s in find_samples(args.data, metadata, run))))
    asked = dict(zip(queries, find_queries(queries, files, args.queries), strict=True))  # {query: file}
    files = list(dict.fromkeys(asked.values())) or files
    calibration = Calibration.load(run / CALIBRATION, model.head.shape[1])
    how = device, args.batch_size, args.workers, calibration, args.unsure
    results, bad = classify(model, metadata.classes, files, *how)
    print(f"{len(results):,} images by {shown(run)}", file=sys.stderr)

    if queries:
        found = {r["image"]: r["class"] for r in results}
        answers = {query: number[found[str(file)]] for query, file in asked.items() if str(file) in found}
        print_json(answers)
        if args.zip:
            zip_submission(answers, args.queries.stem, args.zip)
    else:
        show(results, metadata.classes, args)
    if args.sheet and results:
        draw(results, model, metadata, device, args, run)
    report_bad(bad)


if __name__ == "__main__":
    run_script(main)
