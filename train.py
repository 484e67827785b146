"""Fine-tune CLIP on your images: python train.py --data path

Without --data it adapts the small model of weights/phantom to synthetic images (phantom.py).
Multi-level CLS fusion and low-rank adapters are trained by classification and contrastive learning together:

    z  = fused embedding of an augmented image
    z' = z, or a point on the arc from z to another image of its class (slerp)
    loss = cross-entropy of z' + λ · contrastive loss of (z', its class's prompts) and of (z, its caption)

After each epoch the held-out images are classified and searched; the best epoch is kept in the run's folder
(`runs.py`).

Source: arXiv 2509.00752 for the components and the joint objective; how they are composed is this project's choice.
"""

import argparse
import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import base_folder, fingerprint, load_base, read_safetensors, write_safetensors
from cli import Parser, Progress, autocast, find_device, mixed_precision, positive_int
from data import load_dataset, split_dataset
from errors import UserError, run_script
from evaluate import evaluate, summary
from fusion import MODES, slerp_mix
from images import augment, load_image, mirror_text, normalize, prefetch
from kernels import contrastive_loss
from lora import PROJECTIONS, TOWERS
from prompts import class_prompts
from runs import (
    RUNS,
    assemble,
    find_run,
    load_trained,
    start_from_scratch,
    trained_parameters,
)

# Peak learning rate and epochs by what is trained: adapters on good features, all of a good model, all of a new one;
# adapters of the small model on phantoms.
DEFAULTS = {"adapters": (5e-4, 20), "full": (1e-5, 20), "scratch": (1e-3, 120), "phantom": (2e-3, 7)}


def parse_arguments():
    parser = Parser(
        __doc__.splitlines()[0],
        data_help="a folder with a sub-folder for each class, a manifest, ENTRep, or phantom (the default)",
        run_help="the folder to train into (default: a new one in runs/)",
    )

    def listed(*allowed):
        def parse(text):
            items = text.split(",") if allowed else [positive_int(item) for item in text.split(",")]
            if allowed and not set(items) <= set(allowed):
                raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(allowed)}, like {allowed[0]}")
            return items

        parse.__name__ = "list"  # as argparse's messages call it
        return parse

    flip_help = (
        "mirror images and swap left and right in their texts; don't; or mirror and swap nothing, which is wrong"
    )
    add = parser.add_argument_group("training").add_argument
    add("--resume", action="store_true", help="go on with --run, by default the newest run; its settings are kept")
    add("--epochs", type=positive_int, help="default: 20, from scratch 120")
    add("--lr", type=float, help="peak learning rate; default: 5e-4 for adapters, 1e-5 with --full, 1e-3 from scratch")
    add("--weight-decay", type=float, default=0.05, help="AdamW's, on matrices")
    add("--warmup", type=float, default=0.1, help="share of the steps in which the learning rate grows")
    add("--split", choices=("auto", "random", "group", "manifest"), default="auto", help="how to hold out, see data.py")
    add("--prompts", type=Path, help='JSON file of your own prompts, {"class": ["prompt", …], …}')
    add("--flip", choices=("swap", "none", "naive"), default="swap", help=flip_help)
    add = parser.add_argument_group("method").add_argument
    add("--full", action="store_true", help="train every weight instead of adapters")
    add("--lora-rank", type=int, default=8, help="0: no adapters")
    add("--lora-alpha", type=float, default=16.0, help="the adapters' output is scaled by alpha / rank")
    add("--lora-dropout", type=float, default=0.0, help="on the adapters' input")
    projections = ["q", "k", "v", "out"]
    add("--lora-projections", type=listed(*PROJECTIONS), default=projections, help=f"of {','.join(PROJECTIONS)}")
    add("--lora-blocks", type=listed(), help="block numbers from 1 on, like 9,10,11,12; default: all")
    add("--lora-towers", type=listed(*TOWERS), default=list(TOWERS), help=f"of {','.join(TOWERS)}")
    add("--fusion", choices=(*MODES, "none"), default="gate", help="how levels are fused, see fusion.py")
    add("--levels", type=listed(), help="blocks whose CLS tokens are fused; default: at the quarters of the depth")
    add("--slerp", type=float, default=0.5, help="probability of mixing an embedding with another of its class")
    add("--contrastive", type=float, default=0.5, help="weight λ of the contrastive loss")
    args = parser.parse_args()

    args.data = "phantom" if args.data in (None, "phantom") else str(Path(args.data).resolve())
    args.weights = args.weights or ("phantom" if args.data == "phantom" else "clip-vit-b-16")
    scratch = args.weights == "scratch"
    args.full = args.full or scratch
    small = args.data == args.weights == "phantom"
    lr, epochs = DEFAULTS["scratch" if scratch else "full" if args.full else "phantom" if small else "adapters"]
    args.lr, args.epochs = args.lr or lr, args.epochs or epochs
    if not scratch and base_folder(args.weights) == Path(args.weights):  # a path, not a name
        args.weights = str(Path(args.weights).resolve())
    return args


# ---------------------------------------------------------------------------------------------------------------------
# A training step


def training_items(samples, info, epoch, size, workers):
    """Yield the epoch's batches, lists of (pixels (size, size, 3) uint8, class name, prompt, caption or None).

    All randomness comes from seed, epoch and index, so an epoch is the same whether or not training was interrupted
    before it, and whatever the number of workers.
    """
    settings, prompts = info["settings"], info["prompts"]
    naive = settings["flip"] == "naive"

    def item(index):
        rng = random.Random(f"{settings['seed']} {epoch} {index}")
        sample = samples[index]
        label, caption = sample.label, sample.caption
        # Left and right are classes: the mirror image of a left ear is a right one. Where it has no class, don't flip.
        flip = settings["flip"] != "none" and (naive or mirror_text(label) in prompts) and rng.random() < 0.5
        if flip and not naive:
            label, caption = mirror_text(label), caption and mirror_text(caption)
        pixels = augment(load_image(sample.image), size, rng, flip)
        return pixels, label, rng.choice(prompts[label]), caption

    order = random.Random(f"{settings['seed']} {epoch}").sample(range(len(samples)), len(samples))
    steps = math.ceil(len(order) / settings["batch_size"])
    yield from prefetch(item, [order[step::steps] for step in range(steps)], workers)  # batches of nearly equal size


def joint_loss(model, tokenizer, items, info, device):
    """Items of `training_items` → the loss, a scalar."""
    pixels, labels, prompts, captions = zip(*items, strict=True)
    numbers = {name: number for number, name in enumerate(info["classes"])}

    # Each distinct text is encoded once, cut to the longest one. A prompt belongs to all images of its class.
    class_texts = list(dict.fromkeys(zip(labels, prompts, strict=True)))
    captioned = [row for row, caption in enumerate(captions) if caption]
    caption_texts = list(dict.fromkeys(captions[row] for row in captioned))
    tokens = tokenizer([text for _, text in class_texts] + caption_texts, model.clip.config.context_length)
    tokens = tokens[:, : tokens.argmax(1).max() + 1].to(device)

    with autocast(device):
        z = model.encode_image(normalize(torch.from_numpy(np.stack(pixels)).to(device))).float()  # (B, D)
        texts = model.encode_text(tokens).float()  # (class texts + caption texts, D)
    labels = torch.tensor([numbers[label] for label in labels], device=device)
    mixed = slerp_mix(z, labels, info["settings"]["slerp"])
    loss = F.cross_entropy(model.classify(mixed), labels)

    weight = info["settings"]["contrastive"]
    if weight:
        of_class, of_caption = texts.split([len(class_texts), len(caption_texts)])
        text_labels = torch.tensor([numbers[label] for label, _ in class_texts], device=device)
        terms = [contrastive_loss(mixed, of_class, model.scale, labels, text_labels)]
        if captioned:  # unmixed: an embedding between two findings is neither
            caption_labels = torch.tensor([caption_texts.index(captions[row]) for row in captioned], device=device)
            every = torch.arange(len(caption_texts), device=device)
            terms.append(contrastive_loss(z[captioned], of_caption, model.scale, caption_labels, every))
        loss = loss + weight * torch.stack(terms).mean()
    return loss


class Optimization:
    """AdamW with warm-up and cosine decay, and its state by parameter name, so that it can be kept in safetensors."""

    def __init__(self, model, settings, steps_per_epoch, device):
        self.parameters = trained_parameters(model)
        matrices = [p for p in self.parameters.values() if p.dim() >= 2]
        vectors = [p for p in self.parameters.values() if p.dim() < 2]  # biases, gains, the scale: no decay
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=settings["lr"], weight_decay=settings["weight_decay"])
        self.scaler = torch.amp.GradScaler(device.type, enabled=mixed_precision(device) == torch.float16)
        self.peak, total = settings["lr"], settings["epochs"] * steps_per_epoch
        self.total, self.warmup = total, max(1, round(settings["warmup"] * total))

    def step(self, loss, number):
        """One update; number: of the step in the whole training, from 0 on."""
        ramp = min(1.0, (number + 1) / self.warmup)
        decay = 0.5 * (1 + math.cos(math.pi * max(0, number - self.warmup) / max(1, self.total - self.warmup)))
        for group in self.adamw.param_groups:
            group["lr"] = self.peak * ramp * decay
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.adamw)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad()

    def state(self):
        tensors = {f"model.{name}": p for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{key}.{name}": value for key, value in self.adamw.state[p].items()}
        return tensors

    def restore(self, tensors, device):
        for name, p in self.parameters.items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            self.adamw.state[p] = {key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else device) for key in keys}


def selection_score(result):
    """What the best epoch is best in: the mean of the three tasks' figures, as far as the split has them."""
    values = [result[key] for key in ("macro_f1", "i2i_mrr", "t2i_mrr") if result[key] is not None]
    return sum(values) / len(values)


# ---------------------------------------------------------------------------------------------------------------------


def main():
    args = parse_arguments()
    device = find_device(args.device)
    last = None
    if args.resume:
        run = find_run(args.run, "last.safetensors")
        last, info = read_safetensors(run / "last.safetensors")
        settings = info["settings"]
        if (run / "metrics.json").exists():
            raise UserError(f"{run} is finished, there is nothing to resume; train a new one without --resume")
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run = args.run or RUNS / f"{Path(args.data).stem}-{Path(args.weights).stem}-{stamp}"
        if (run / "adapter.safetensors").exists():
            raise UserError(f"{run} holds a model already; choose another --run, or go on with it by --resume")
        keep_out = ("run", "device", "workers", "resume", "prompts")
        settings = {key: value for key, value in vars(args).items() if key not in keep_out}
        info = {"settings": settings, "epoch": 0, "seconds": 0.0, "best": {"score": -1.0}}

    # The data.
    samples = load_dataset(settings["data"])
    splits = split_dataset(samples, settings["split"], settings["seed"])
    classes = sorted({sample.label for sample in splits["train"]})
    if last is None:
        info |= {"classes": classes, "prompts": class_prompts(classes, args.prompts)}
    elif classes != info["classes"]:
        raise UserError(f"{settings['data']} has other classes than when {run} was begun; train a new run")

    # The model.
    torch.manual_seed(settings["seed"])
    prompts = info["prompts"].values()
    if settings["weights"] == "scratch":
        captions = [text for s in splits["train"] if s.caption for text in (s.caption, mirror_text(s.caption))]
        clip, tokenizer = start_from_scratch([text for texts in prompts for text in texts] + captions, run)
        info["base"] = {"weights": "scratch", "config": asdict(clip.config)}
    else:
        clip, tokenizer = load_base(settings["weights"])
        info["base"] = {"weights": settings["weights"], "fingerprint": fingerprint(clip)}
    model = assemble(clip, settings, len(classes))
    if settings["weights"] == "scratch":  # an untrained text tower sees no difference between classes: start at random
        torch.nn.init.normal_(model.head)
    else:
        model.set_head([tokenizer(texts, clip.config.context_length) for texts in prompts])
    model.to(device)
    steps = math.ceil(len(splits["train"]) / settings["batch_size"])
    optimization = Optimization(model, settings, steps, device)

    trained, total = (sum(p.numel() for p in ps) for ps in (optimization.parameters.values(), model.parameters()))
    counts = ", ".join(f"{len(part):,} {name}" for name, part in splits.items() if part)
    print(f"{len(samples):,} images of {len(classes)} classes: {counts}")
    print(f"{settings['weights']} on {device}: training {trained:,} of {total:,} parameters into {run}")
    for name in ("val", "test"):
        lacking = set(classes) - {sample.label for sample in splits[name]}
        if splits[name] and lacking:
            print(f"note: {name} has no image of {', '.join(sorted(lacking))}")

    def test(name):
        return evaluate(model, tokenizer, splits[name], info, device, args.workers)

    # The loop.
    final_split = "test" if splits["test"] else "val"
    log = run / "metrics.jsonl"
    run.mkdir(parents=True, exist_ok=True)
    if last is None:
        zero_shot = test(final_split)
        info["zero_shot"] = {f"zero_shot_{key}": value for key, value in zero_shot.items()}
        print(f"untrained    {summary(zero_shot)}", flush=True)
        log.write_text("")
    else:
        load_trained(model, {n.removeprefix("model."): t for n, t in last.items() if n.startswith("model.")}, run)
        optimization.restore(last, device)
        optimization.scaler.load_state_dict(info["scaler"])
        log.write_text("".join(log.read_text().splitlines(keepends=True)[: info["epoch"]]))
        print(f"resuming after epoch {info['epoch']}", flush=True)

    for epoch in range(info["epoch"] + 1, settings["epochs"] + 1):
        start = time.monotonic()
        torch.manual_seed(1_000_003 * settings["seed"] + epoch)  # dropout and slerp: every epoch on its own
        model.train()
        progress, seen, total_loss = Progress(len(splits["train"])), 0, 0.0
        batches = training_items(splits["train"], info, epoch, clip.config.image_size, args.workers)
        for step, items in enumerate(batches, start=(epoch - 1) * steps):
            loss = joint_loss(model, tokenizer, items, info, device)
            optimization.step(loss, step)
            seen, total_loss = seen + len(items), total_loss + loss.detach() * len(items)
            progress(seen, f"epoch {epoch}/{settings['epochs']}", loss.detach())
        mean_loss = float(total_loss / seen)
        if not math.isfinite(mean_loss):
            raise UserError(f"the loss is {mean_loss} in epoch {epoch}; train again with a smaller --lr")
        result = test("val")
        info |= {"epoch": epoch, "seconds": info["seconds"] + time.monotonic() - start}
        info["scaler"] = optimization.scaler.state_dict()
        print(f"epoch {epoch:2}/{settings['epochs']}  loss {mean_loss:.3f}  {summary(result)}", flush=True)
        with open(log, "a") as file:
            file.write(json.dumps({"epoch": epoch, "loss": mean_loss, **result}) + "\n")
        if selection_score(result) >= info["best"]["score"]:
            info["best"] = {"score": selection_score(result), "epoch": epoch, **result}
            write_safetensors(run / "adapter.safetensors", optimization.parameters, info)
        write_safetensors(run / "last.safetensors", optimization.state(), info)

    # The figures of the best epoch. It was chosen by val, which flatters; a test split has not been looked at before.
    final = {key: value for key, value in info["best"].items() if key != "score"}
    if final_split == "test":
        load_trained(model, read_safetensors(run / "adapter.safetensors")[0], run)
        final |= test("test")
    final |= {**info["zero_shot"], "train_seconds": round(info["seconds"], 1)}
    (run / "metrics.json").write_text(json.dumps({"split": final_split, **final}, indent=2) + "\n")
    print(f"best epoch {final['epoch']}, on {final_split}: {summary(final)}")
    print(f"{info['seconds']:.0f} s of training; the model is in {run}")


if __name__ == "__main__":
    run_script(main)
