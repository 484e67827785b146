"""Search images by text, by example, or by both: python retrieve.py --text "…" [--image FILE] [--sheet out.png]"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image

from checkpoint import fingerprint, read_safetensors, write_safetensors
from cli import Parser, add_run_flags, find_device, positive_int
from data import load_dataset
from errors import UserError, run_script
from kernels import slerp, top_k
from pictures import contact_sheet
from runs import encode_images, encode_texts, find_run, load_run


def index_images(run, model, files, device, batch_size, workers):
    """Image files → (N, embed_dim) embeddings, kept in the run's index.safetensors. Only images that are new, or whose
    size or time of change differ from the index's, are encoded (a file of the same size and time goes unnoticed). The
    index also holds the model's fingerprint: another model makes it anew."""
    index, key = run / "index.safetensors", fingerprint(model)
    known = {}
    if index.exists():
        try:
            tensors, info = read_safetensors(index)
            if info["model"] == key:
                known = dict(zip(map(tuple, info["images"]), tensors["features"], strict=True))
        except UserError:
            pass  # damaged: it is made anew
    images = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    new = [i for i, image in enumerate(images) if image not in known]
    if new:
        features = encode_images(model, [files[i] for i in new], device, batch_size, workers, "indexing")
        known |= {images[i]: row for i, row in zip(new, features, strict=True)}
        now = {image[0]: image for image in images}
        # Images of other galleries stay, those that are gone or have changed do not.
        kept = [image for image in known if now.get(image[0], image) == image and Path(image[0]).exists()]
        write_safetensors(index, {"features": torch.stack([known[i] for i in kept])}, {"model": key, "images": kept})
    return torch.stack([known[image] for image in images])


def embed_query(model, tokenizer, text, image, mix, device):
    """A text, an image file or both → (1, embed_dim). Both are joined on the great circle between them: mix 0 is the
    image alone, 1 the text alone."""
    texts = encode_texts(model, tokenizer, [text], device) if text else None
    images = encode_images(model, [image], device, 1, 0) if image else None
    if text and image:
        return slerp(images, texts, mix)
    return texts if text else images


def search(model, classes, samples, gallery, query, top):
    """The images most similar to the query → a dict each, best first: rank, score (the cosine), image, class and
    caption (None where unknown), predicted class."""
    scores, indices = top_k(query, gallery, top)
    found = gallery[indices[0]].to(next(model.parameters()).device)
    with torch.inference_mode():
        predicted = model.classify(found).argmax(1).tolist()
    results = []
    for score, i, p in zip(scores[0].tolist(), indices[0].tolist(), predicted, strict=True):
        sample = samples[i]
        result = {"rank": len(results) + 1, "score": round(score, 4), "image": str(sample.image)}
        results.append(result | {"class": sample.label, "predicted": classes[p], "caption": sample.caption})
    return results


def print_table(results):
    names = [r["class"] or f"{r['predicted']}?" for r in results]  # no label, but a prediction
    width = max(map(len, ["class", *names]))
    print(f"rank  score  {'class':{width}}  image")
    for r, name in zip(results, names, strict=True):
        print(f"{r['rank']:4}  {r['score']:.3f}  {name:{width}}  {r['image']}")


def parse_arguments():
    parser = Parser(__doc__)
    add_run_flags(parser)
    parser.add_argument("--text", help="what to look for, in words")
    parser.add_argument("--image", type=Path, help="what to look for, by example")
    parser.add_argument("--mix", type=float, default=0.5, help="with both: 0 is the image alone, 1 the text alone")
    parser.add_argument("--top", type=positive_int, default=10, help="how many images to show")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the results to this image file")
    args = parser.parse_args()
    if not args.text and not args.image:
        parser.error("say what to look for with --text, --image or both")
    if not 0 <= args.mix <= 1:
        parser.error(f"--mix {args.mix} is not between 0 and 1")
    if args.image and not args.image.is_file():
        raise UserError(f"there is no {args.image}")
    if args.sheet and args.sheet.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"{args.sheet} is no kind of image file; call it .png")
    if args.sheet and not args.sheet.parent.is_dir():
        raise UserError(f"there is no folder {args.sheet.parent} to write {args.sheet.name} to")
    return args


def main():
    args = parse_arguments()
    device, run = find_device(args.device), find_run(args.run)
    model, tokenizer, metadata = load_run(run, device, args.weights)
    samples = {sample.image: sample for sample in load_dataset(args.data or metadata.settings.data)}  # an image once
    if args.image:
        samples = {file: s for file, s in samples.items() if file.resolve() != args.image.resolve()}
    gallery = index_images(run, model, list(samples), device, args.batch_size, args.workers)
    query = embed_query(model, tokenizer, args.text, args.image, args.mix, device)
    results = search(model, metadata.classes, list(samples.values()), gallery, query, args.top)
    print(f"{len(samples):,} images searched by {run}", file=sys.stderr)
    if args.sheet:
        contact_sheet(results, args.text, args.image).save(args.sheet)
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        print_table(results)


if __name__ == "__main__":
    run_script(main)
