"""The pointing game: does the brightest place of a map lie on what the text names?

    python tests/benchmarks/pointing.py runs/NAME …      # --count 200

Test phantoms with a finding that has a place, and a text that names it, such as “left ear, perforated eardrum”. A hit
is a map whose greatest value lies on the finding, widened by a twentieth of the picture's side, as a patch of the small
CLIP is an eighth of it. Beside explain.py's map:

    positive, chained   as Chefer et al. have it: negative products are set to zero before the mean over the heads, and
                        the blocks' matrices are multiplied
    attention           the last block's weights, without gradients
    random weights      explain.py's map of the same model with new weights
    chance              the widened finding's share of the bright field
"""

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from build import assemble, load_run, prepare
from encoding import encode_texts
from explain import kept_weights, relevance
from images import FIELD, normalize, to_square
from model import CLIP
from phantom import CLASSES, FINDINGS, SITES, TEST_START, draw

CPU = torch.device("cpu")


def questions(count, first=TEST_START):
    """Yield (image, text, where the finding is, (H, W) bool, its name) of phantoms that have one, or two of them."""
    number, left = first, count
    while left:
        label, places = CLASSES[number % len(CLASSES)], {}
        image, _ = draw(label, np.random.default_rng([0, 1, number]), places=places)
        site, number = label.split("-")[0], number + 1
        for finding, place in list(places.items())[:left]:
            name = FINDINGS[site][finding][0]
            yield image, f"{SITES[label][0]}, {name}", place, name
            left -= 1


def chained(model, pixels, direction):
    """Equations 5 and 6 of Chefer et al.: R ← R + Ā·R for each block, from R = 1 on; the last row of the CLS token."""
    with kept_weights([block.attn for block in model.clip.visual.blocks]) as kept, torch.enable_grad():
        score = F.cosine_similarity(model.encode_image(pixels), direction[None]).sum()
        gradients = torch.autograd.grad(score, kept)
    total = torch.eye(kept[0].shape[-1])
    for weights, gradient in zip(kept, gradients, strict=True):
        total = total + (weights * gradient).clamp(min=0).mean(1)[0].detach() @ total
    return total[0, 1:]


def attention(model, pixels, direction):
    with kept_weights([block.attn for block in model.clip.visual.blocks]) as kept:
        model.encode_image(pixels)
    return kept[-1].mean(1)[0, 0, 1:].detach()


def game(run, count):
    """→ {way: share of hits}, {finding: [hits of explain.py's map]}"""
    model, tokenizer, metadata = load_run(run, CPU)
    prepare(model, "visual")
    torch.manual_seed(0)
    other = assemble(CLIP(model.clip.config).initialize(), metadata.settings, len(metadata.classes)).eval()
    size = model.clip.config.image_size
    grid = size // model.clip.config.patch_size
    ways = {
        "explain.py": lambda pixels, direction: relevance(model, pixels, direction),
        "positive, chained": lambda pixels, direction: chained(model, pixels, direction),
        "attention": lambda pixels, direction: attention(model, pixels, direction),
        "random weights": lambda pixels, direction: relevance(other, pixels, direction),
    }
    hits, by_finding = defaultdict(list), defaultdict(list)
    for image, text, place, finding in questions(count):
        square = to_square(image, size, model.clip.config.preprocessing)
        mask = to_square(Image.fromarray(place).convert("RGB"), size, model.clip.config.preprocessing)[..., 0] > 127
        reach = size // 20
        wide = F.max_pool2d(torch.from_numpy(mask)[None].float(), 2 * reach + 1, 1, reach)[0] > 0
        field = torch.from_numpy(square.max(2) > FIELD)
        hits["chance"].append(((wide & field).sum() / field.sum()).item())
        pixels = normalize(torch.from_numpy(square)[None], model.clip.config.preprocessing)
        (direction,) = encode_texts(model, tokenizer, [text], CPU)
        for name, way in ways.items():
            heat = way(pixels, direction).view(1, 1, grid, grid)
            large = F.interpolate(heat, size=(size, size), mode="bilinear", align_corners=False)
            hits[name].append(wide.flatten()[large.argmax()].item())
        by_finding[finding].append(hits["explain.py"][-1])
    return {name: statistics.mean(of_way) for name, of_way in hits.items()}, by_finding


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    shares, findings = defaultdict(list), defaultdict(list)
    for run in args.runs:
        of_run, by_finding = game(run, args.count)
        for name, share in of_run.items():
            shares[name].append(share)
        for name, hits in by_finding.items():
            findings[name] += hits
    for name in ("explain.py", "positive, chained", "attention", "random weights", "chance"):
        print(f"{name:18} {statistics.mean(shares[name]):.3f}   {'  '.join(f'{s:.3f}' for s in shares[name])}")
    print("\nexplain.py's by finding:")
    for name, hits in sorted(findings.items(), key=lambda item: -statistics.mean(item[1])):
        print(f"{name:32} {statistics.mean(hits):.2f} of {len(hits)}")


if __name__ == "__main__":
    main()
