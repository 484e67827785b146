"""Search images by text, by example, or by both: python retrieve.py --text "…" [--image FILE] [--sheet out.png]

Without any of these it asks for texts, one after another, until an empty line.
"""

import argparse
import contextlib
import json
import sys

import numpy as np
import torch
import torch.nn.functional as F

from archive import Archive, Vocabulary, about, mixed, nearest
from build import load_run
from calibration import CALIBRATION, Calibration
from checkpoint import save_tensors
from cli import (
    Parser,
    add_query_flags,
    add_run_flags,
    check_query_flags,
    check_sheet,
    file_path,
    find_device,
    fraction,
    positive_int,
    print_csv,
    print_json,
    report_bad,
)
from encoding import describe_cut, encode_texts
from entrep import find_queries, name_images, read_queries, zip_submission
from errors import UserError, counted, run_script, shown
from explain import add_heat
from files import whole
from images import load_image
from index import index_images
from pictures import refuse_inputs, write_sheets
from runs import find_run, finished
from serve import MOST_FOUND, Site, serve
from split_file import trained_captions
from trust import find_samples


def answer_texts(queries, model, tokenizer, files, gallery, device):
    """Texts, image files and their (N, D) unit embeddings → {text: name of the most similar image}."""
    print(describe_cut(tokenizer, queries, model.clip.config.context_length), end="", file=sys.stderr)
    _, found = nearest(encode_texts(model, tokenizer, queries, device), gallery, 1)
    return {query: files[i].name for query, i in zip(queries, found[:, 0].tolist(), strict=True)}


def answer_images(asked, files, gallery):
    """{query: image file}, image files and their (N, D) unit embeddings → {query: name of the most similar image}. An
    image is never its own answer; one that is not among the files, as it can't be read, gets none. Raises UserError
    where there is nothing else to find."""
    if len(files) < 2:
        raise UserError("there is no other image to find; name more of them by --data")
    place = {image: i for i, image in enumerate(files)}
    queries = [query for query, image in asked.items() if image in place]
    own = torch.tensor([place[asked[query]] for query in queries], dtype=torch.int64)
    _, found = nearest(gallery[own], gallery, 2)
    found = torch.where(found[:, 0] == own, found[:, 1], found[:, 0])
    return {query: files[i].name for query, i in zip(queries, found.tolist(), strict=True)}


def write_embeddings(file, files, gallery):
    """Write the images' paths and unit embeddings: .npz with the arrays `paths` and `embeddings`, or .safetensors with
    the paths in its metadata, as a JSON list."""
    paths, embeddings = [str(path.resolve()) for path in files], F.normalize(gallery.float(), dim=1)
    if file.suffix.lower() == ".npz":
        with whole(file) as temporary, open(temporary, "wb") as out:
            np.savez(out, paths=np.array(paths), embeddings=embeddings.numpy())
    else:
        save_tensors({"embeddings": embeddings}, file, {"paths": json.dumps(paths)})


def print_table(results):
    names = [shown(r["class"] or f"{r['predicted']}?") for r in results]  # no label, but a prediction
    width = max(map(len, ["class", *names]))
    print(f"rank  score  {'class':{width}}  image")
    for r, name in zip(results, names, strict=True):
        print(f"{r['rank']:4}  {r['score']:.3f}  {name:{width}}  {shown(r['image'])}")


COLUMNS = ("rank", "score", "image", "class", "predicted", "probability", "captions", "group", "of_group", "copies")


def show(archive, results, query, text, args, run):
    """Print the results of a query, and draw them if asked for."""
    if args.sheet:
        cards = [{"image": args.image, "query": True}, *results] if args.image else results

        def dress(page):
            return add_heat(page, archive.model, lambda card: query[0], archive.device)

        title = " + ".join([f"“{text}”"] * bool(text) + [args.image.name if args.image else ""] * bool(args.image))
        said = f"the {len(results)} nearest of {len(archive.samples):,} images by cosine; run {run.name}"
        frame = archive.model.clip.config.preprocessing.frame
        dressed = dress if args.explain else None
        write_sheets(args.sheet, cards, archive.metadata.classes, title, said, frame, dressed)
    results = [{column: r[column] for column in COLUMNS} for r in results]
    if args.json:
        print_json(results)
    elif args.csv:
        print_csv([COLUMNS, *({**r, "captions": "; ".join(r["captions"])}.values() for r in results)])
    else:
        print_table(results)


def answer(archive, bad, args, run):
    """The query of the command line, those that are typed, or those of the page."""
    same = (i for i, s in enumerate(archive.samples) if args.image and s.image.resolve() == args.image.resolve())
    own = next(same, None)
    if own is not None and len(archive.group_of(own)) == len(archive.samples):
        raise UserError("there is nothing to search but the query's own group; name other images by --data")
    vocabulary = Vocabulary(archive.metadata, trained_captions(run))
    header = about(run, archive.metadata, len(archive.samples), finished(run))
    print(shown(header["line"]), file=sys.stderr)
    if args.serve:
        if bad:
            print(f"note: {counted(len(bad), 'image')} could not be read; they are listed at the end", file=sys.stderr)
        serve(Site(archive, {**header, "top": args.top, "per_group": args.per_group}, vocabulary), args.open)
        return
    for text in [args.text] if args.text or args.image else ask():
        cut = describe_cut(archive.tokenizer, [text or ""], archive.model.clip.config.context_length)
        note = vocabulary.note(text or "")
        print(cut + (f"note: {shown(note)}\n" if note else ""), end="", file=sys.stderr)
        of_text, of_image = text and archive.of_text(text), args.image and archive.of_image(args.image)
        query = mixed(of_text, of_image, args.mix)
        show(archive, archive.search(query, args.top, None, args.per_group, own), query, text, args, run)


def ask():
    """Yield what the user types, line by line, until an empty one."""
    with contextlib.suppress(EOFError):
        while text := input("search for: ").strip():
            yield text


def parse_arguments():
    parser = Parser(__doc__.splitlines()[0])
    add_run_flags(parser)
    parser.add_argument("--text", help="what to look for, in words")
    parser.add_argument("--image", type=file_path, help="what to look for, by example: an image file")
    parser.add_argument(
        "--mix", type=fraction, help="with --text and --image: 0 is the image alone, 1 the text alone; default: 0.5"
    )
    parser.add_argument(
        "--per-group",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show only the nearest image of each group, as those of a video are nearly the same, and of copies",
    )
    parser.add_argument("--top", type=positive_int, default=10, help="how many images to show")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV")
    parser.add_argument("--sheet", type=file_path, help="write a contact sheet of the results to this image file")
    parser.add_argument("--explain", action="store_true", help="with --sheet: show where the model looked")
    parser.add_argument(
        "--embeddings", type=file_path, help="write all images' paths and unit embeddings to this .npz or .safetensors"
    )
    parser.add_argument("--index-only", action="store_true", help="encode the images for later searches, and end")
    parser.add_argument("--serve", action="store_true", help="search in a page, for this machine alone, until Ctrl-C")
    parser.add_argument("--open", action="store_true", help="with --serve: show the page in the browser")
    add_query_flags(parser, "i2i.csv or t2i.csv gives {query: image}, from the images of --data")
    args = parser.parse_args()
    check_arguments(parser, args)
    return args


def check_arguments(parser, args):
    check_query_flags(args, "text", "image", "sheet", "csv")
    check_sheet(args)
    args.text = args.text and args.text.strip()
    args.asks = not (args.text or args.image or args.queries or args.embeddings or args.index_only or args.serve)
    if args.serve and (
        args.text or args.image or args.queries or args.index_only or args.sheet or args.json or args.csv
    ):
        raise UserError("--serve takes its questions from the page; leave out the other ones")
    if args.open and not args.serve:
        raise UserError("--open has no effect without --serve; leave it out")
    if args.index_only and (args.text or args.image or args.queries or args.embeddings):
        raise UserError("--index-only ends before any query; leave it out, or the others")
    if args.asks and not sys.stdin.isatty():
        parser.error("say what to look for with --text, --image or both")
    if args.sheet and not (args.text or args.image or args.asks):
        raise UserError("--sheet needs --text or --image; leave it out, or add one")
    if args.embeddings and args.embeddings.suffix.lower() not in (".npz", ".safetensors"):
        raise UserError(
            f"--embeddings cannot write {args.embeddings}; give it a name that ends in .npz or .safetensors"
        )
    folder = args.embeddings and args.embeddings.parent
    if folder and (not folder.is_dir() or (folder / "adapter.safetensors").exists()):
        raise UserError(f"--embeddings cannot write into {folder}; name a folder that exists and is no run's")
    if args.mix is not None and not (args.text and args.image):
        raise UserError("--mix needs both --text and --image; leave it out, or add the other")
    args.mix = 0.5 if args.mix is None else args.mix
    if args.serve and args.top > MOST_FOUND:
        raise UserError(f"the page shows at most {MOST_FOUND} images; use a smaller --top")
    if args.image:
        load_image(args.image)  # before anything takes long
    if args.sheet and args.top > 200:
        raise UserError("contact sheets have room for 200 images; use a smaller --top")
    if args.sheet and args.image:
        refuse_inputs(args.sheet, [args.image])


def main():
    args = parse_arguments()
    device, run = find_device(args.device, alone=not args.index_only), find_run(args.run)
    model, tokenizer, metadata = load_run(run, device, args.weights)
    queries = read_queries(args.queries) if args.queries else []
    samples = {sample.image: sample for sample in find_samples(args.data, metadata, run)}  # an image once
    if args.image and not any(file.resolve() != args.image.resolve() for file in samples):
        raise UserError("there is nothing to search but the query image itself; name other images by --data")
    files, gallery, bad = index_images(run, model, list(samples), device, args.batch_size, args.workers)
    if args.index_only:
        print(f"{len(files):,} images are indexed in {shown(run)}")
    if args.embeddings:
        write_embeddings(args.embeddings, files, gallery)
        print(f"{len(files):,} embeddings in {shown(args.embeddings)}", file=sys.stderr)
    if queries:
        if name_images(queries):
            asked = dict(zip(queries, find_queries(queries, samples, args.queries), strict=True))
            answers = answer_images(asked, files, gallery)
        else:
            answers = answer_texts(queries, model, tokenizer, files, gallery, device)
        print_json(answers)
        if args.zip:
            zip_submission(answers, args.queries.stem, args.zip)
    if args.text or args.image or args.asks or args.serve:
        calibration, found = Calibration.load(run / CALIBRATION, gallery.shape[1]), [samples[file] for file in files]
        answer(Archive(model, tokenizer, metadata, found, gallery, device, calibration), bad, args, run)
    report_bad(bad)


if __name__ == "__main__":
    run_script(main)
