"""Which way of fusing levels brings most, where images are few and the backbone is frozen?

    python phantom.py runs/development --seed 5
    python tests/benchmarks/fusion_forms.py --data runs/development --shots 4
    python tests/benchmarks/fusion_forms.py --data manifest.csv --split random --shots 8

Each form is trained with the class head on CLS tokens that are computed once, of augmented views of the training
images. It is scored on the test images, else the validation images, paired by seed with the head alone: the mean
difference and its 95 % interval. "last" means the control: the last level's token in place of each earlier one's, so
that there are as many new weights and nothing new to be seen. A last line compares the two of a form directly.
"""

import argparse
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from ablate import mean_and_interval
from augment import ROOM, augment, draw_view
from build import load_base
from data import class_names, load_dataset
from fusion import default_levels
from images import load_image, normalize, prefetch, to_square
from kernels import slerp
from metrics import first_relevant_ranks
from prompts import class_prompts
from sides import mirror_label
from splits import few, scored_split, split_dataset

VIEWS, STEPS, BATCH = 12, 300, 32


class Fusion(nn.Module):
    """cls: (B, layers, width) → (B, embed_dim); every form but mean starts as CLIP."""

    def __init__(self, visual, form, levels, rank=8):
        super().__init__()
        self.form, self.levels, self.proj = form, levels, visual.proj
        width, dim, k = visual.proj.in_features, visual.proj.out_features, len(levels)

        def norm():
            copy = nn.LayerNorm(width)
            copy.load_state_dict(visual.ln_post.state_dict())
            return copy

        def zeros(*shape):
            return nn.Parameter(torch.zeros(*shape))

        self.last, self.norms = norm(), nn.ModuleList(norm() for _ in levels)
        if form == "gate":
            self.gates = zeros(k, dim)
        elif form == "slerp":
            self.fractions = zeros(k)
        elif form == "concat":
            self.V = zeros(dim, k * width)
        elif form == "low rank":  # as LoRA: B A, B zero at first
            self.A, self.B = nn.Parameter(torch.randn(rank, k * width) / math.sqrt(k * width)), zeros(dim, rank)
        elif form == "own projection":
            self.gates, self.W = zeros(k, dim), nn.Parameter(visual.proj.weight.detach().repeat(k, 1, 1))
        elif form == "attention":  # a learned query over the levels' tokens
            self.query, self.key = nn.Parameter(0.02 * torch.randn(dim)), nn.Linear(width, dim)
            self.V = zeros(dim, width)

    def forward(self, cls):
        e = self.proj(self.last(cls[:, -1]))
        if self.form == "head alone":
            return e
        tokens = torch.stack([n(cls[:, level - 1]) for n, level in zip(self.norms, self.levels, strict=True)], dim=1)
        if self.form == "gate":
            return e + (self.gates * self.proj(tokens)).sum(1)
        if self.form == "slerp":
            for fraction, token in zip(self.fractions, tokens.unbind(1), strict=True):
                e = slerp(e, self.proj(token), fraction)
            return e
        if self.form == "concat":
            return e + tokens.flatten(1) @ self.V.T
        if self.form == "low rank":
            return e + 2 * tokens.flatten(1) @ self.A.T @ self.B.T
        if self.form == "own projection":
            return e + (self.gates * torch.einsum("bkw,kdw->bkd", tokens, self.W)).sum(1)
        if self.form == "attention":
            weights = (self.key(tokens) @ self.query / math.sqrt(len(self.query))).softmax(1)
            return e + (weights[..., None] * tokens).sum(1) @ self.V.T
        return F.normalize(torch.cat([self.proj(tokens), e[:, None]], dim=1), dim=2).mean(1)  # mean


def encode(clip, samples, prompts, views):
    """→ (N, views, layers, width) CLS tokens, (N, views) class numbers, (N,) group numbers. views 0: the images as they
    are, once."""
    classes, size = list(prompts), clip.config.image_size

    def pixels(index):
        image = load_image(samples[index].image)
        label = samples[index].label
        if not views:
            return [(to_square(image, size), label)]
        rng, found, square = random.Random(index), [], to_square(image, round(ROOM * size))
        for view in range(views):
            other = mirror_label(label, prompts)
            flip = view % 2 == 1 and other is not None
            (view,) = augment([square], [draw_view(rng, flip)], size)
            found.append((view, other if flip else label))
        return found

    tokens, labels = [], []
    for batch in prefetch(pixels, [[i] for i in range(len(samples))], 1):
        arrays, names = zip(*batch[0], strict=True)
        with torch.no_grad():
            tokens.append(clip.visual(normalize(torch.stack([torch.as_tensor(array) for array in arrays]))))
        labels.append([classes.index(name) for name in names])
    groups = [sample.group or str(sample.image) for sample in samples]
    return torch.stack(tokens), torch.tensor(labels), torch.tensor([groups.index(group) for group in groups])


def train(form, levels, clip, head, train_set, test_set, seed, lr):
    """→ accuracy and image→image MRR."""
    torch.manual_seed(seed)
    (tokens, labels, _), (test, truth, groups) = train_set, test_set
    same_group = groups[:, None] == groups  # as in evaluate.py, an image is not searched among those of its own group
    fusion, head = Fusion(clip.visual, form, levels), nn.Parameter(head.clone())
    scale = nn.Parameter(clip.logit_scale.detach().clone())
    own = [p for name, p in fusion.named_parameters() if not name.startswith("proj")]
    parameters = [*own, head, scale]
    groups = [{"params": [p for p in parameters if p.dim() >= 2]}]
    groups.append({"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.05)

    def classify(z):
        return scale.exp().clamp(max=100) * F.normalize(z, dim=1) @ F.normalize(head, dim=1).T

    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, 10 * (step + 1) / STEPS) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        rows = torch.randperm(len(tokens))[:BATCH]
        views = torch.randint(tokens.shape[1], (len(rows),))
        loss = F.cross_entropy(classify(fusion(tokens[rows, views])), labels[rows, views])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        z = fusion(test[:, 0])
        right = classify(z).argmax(1) == truth[:, 0]
    ranks = first_relevant_ranks(z, z, truth == truth.T, same_group).double()  # NaN without an answer
    return right.double().mean().item(), (1 / ranks).nanmean().item()


def compare(own, other):
    """(accuracy, MRR) of each seed → of both the mean, and in brackets the mean difference and its interval."""
    cells = []
    for values, others in zip(zip(*own, strict=True), zip(*other, strict=True), strict=True):
        differences = [a - b for a, b in zip(values, others, strict=True)]
        mean, interval = mean_and_interval(differences, [1] * len(differences))
        cells.append(f"{sum(values) / len(values):.3f} ({mean:+.3f} ± {interval or 0:.3f})")
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="auto")
    parser.add_argument("--weights", default="phantom")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-4, 2e-3])
    args = parser.parse_args()

    clip, tokenizer = load_base(args.weights)
    clip.requires_grad_(False)
    layers = len(clip.visual.blocks)
    *earlier, last = default_levels(layers)
    every, control, middle = tuple(range(1, last)), (last,) * len(earlier), (earlier[len(earlier) // 2],)
    forms = [("gate", earlier), ("slerp", earlier), ("mean", earlier)]
    forms += [("concat", levels) for levels in (earlier, control, middle, every)]
    forms += [(form, levels) for form in ("low rank", "own projection") for levels in (earlier, control)]
    forms.append(("attention", earlier))

    samples, data = load_dataset(args.data), {}
    for seed in args.seeds:
        splits = split_dataset(samples, args.split, seed)
        chosen, held_out = few(splits["train"], args.shots, seed), splits[scored_split(splits)]
        prompts = class_prompts(class_names(splits["train"]))
        if seed == args.seeds[0] or scored_split(splits) == "val":
            test_set = encode(clip, held_out, prompts, 0)
        data[seed] = encode(clip, chosen, prompts, VIEWS), test_set
    with torch.no_grad():
        embeddings = [clip.encode_text(tokenizer(texts, clip.config.context_length)) for texts in prompts.values()]
        head = torch.stack([F.normalize(e, dim=1).mean(0) for e in embeddings])

    names = ("accuracy", "image→image MRR")
    print("| lr | form | levels | weights |", " | ".join(names), "|\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for lr in args.lr:
        results = {}
        for form, levels in [("head alone", ()), *forms]:
            results[form, tuple(levels)] = [
                train(form, levels, clip, head, *data[seed], seed, lr) for seed in args.seeds
            ]
            weights = sum(p.numel() for n, p in Fusion(clip.visual, form, levels).named_parameters() if n[:4] != "proj")
            shown = "last" if tuple(levels) == control else ", ".join(map(str, levels))
            cells = compare(results[form, tuple(levels)], results["head alone", ()])
            print(f"| {lr:g} | {form} | {shown} | {weights:,} | {' | '.join(cells)} |", flush=True)
            if tuple(levels) == control:
                cells = compare(results[form, tuple(earlier)], results[form, control])
                print(f"| {lr:g} | {form} | levels against last | | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
