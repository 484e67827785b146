"""Fine-tune CLIP on your images: python train.py --data path

Without --data it adapts the small model of weights/phantom to synthetic images (phantom.py).
Multi-level CLS fusion and low-rank adapters are trained by classification and contrastive learning together:

    z  = fused embedding of an augmented image
    z' = z, or a point on the arc from z to another image of its class (slerp)
    loss = cross-entropy(z', class) + λ · mean of  contrastive(z', prompts of the classes)
                                                   contrastive(z, captions), where there are captions

After each epoch the held-out images are classified and searched (evaluate.py). The best epoch, by the mean of macro-F1,
image→image MRR and text→image MRR on the validation images, is kept in the run's folder (runs.py).

With --resume an interrupted training ends with the same bits as an uninterrupted one. It begins the interrupted epoch
again, whose randomness follows from seed and epoch alone. The learning rate follows from the step's number. The weights
that are trained, AdamW's running means, GradScaler's factor and the best score so far are kept in last.safetensors.
This is promised on a CPU only, with the same PyTorch and number of threads, as a sum depends on its order: in float32
(1e8 + 1) − 1e8 is 0, and (1e8 − 1e8) + 1 is 1. Our kernels add in a fixed order. Some GPU operations,
such as the backward of fused attention, may add in whatever order their threads arrive.

Source: arXiv 2509.00752 for the components and the joint objective; how they are composed is this project's choice.
"""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import read_safetensors, write_safetensors
from cli import Parser, Progress, add_machine_flags, autocast, find_device, mixed_precision
from data import class_names, training_batches
from errors import UserError, run_script
from evaluate import evaluate, selection_score, summary, table
from fusion import slerp_mix
from images import normalize
from kernels import contrastive_loss
from prompts import class_prompts
from runs import State, load_trained, new_model, new_run, resumed_run, trained_parameters
from settings import add_settings
from splits import make_splits, scored_split


def parse_arguments():
    parser = Parser(__doc__.splitlines()[0])
    run_help = "folder to train into, by default a new one in runs/; with --resume the newest there"
    parser.add_argument("--run", type=Path, help=run_help)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run; its settings are kept")
    parser.add_argument("--prompts", type=Path, help='JSON file of your own prompts, {"class": ["prompt", …], …}')
    add_machine_flags(parser)
    add_settings(parser)
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# A training step


def joint_loss(model, tokenizer, items, metadata, device):
    """A batch of `training_batches` → the loss, a scalar."""
    pixels, labels, prompts, captions = zip(*items, strict=True)
    number, weight = {name: i for i, name in enumerate(metadata.classes)}, metadata.settings.contrastive

    # Each distinct text is encoded once, cut to the longest one. A prompt belongs to all images of its class.
    drawn = list(dict.fromkeys(zip(labels, prompts, strict=True)))  # (class name, prompt) pairs
    captioned = [row for row, caption in enumerate(captions) if caption]
    distinct = list(dict.fromkeys(captions[row] for row in captioned))  # captions
    tokens = tokenizer([text for _, text in drawn] + distinct, model.clip.config.context_length)
    tokens = tokens[:, : tokens.argmax(1).max() + 1].to(device)

    with autocast(device):
        z = model.encode_image(normalize(torch.from_numpy(np.stack(pixels)).to(device))).float()  # (B, D)
        texts = model.encode_text(tokens).float() if weight else None  # (prompts + distinct captions, D)
    targets = torch.tensor([number[label] for label in labels], device=device)  # (B,) class numbers
    mixed = slerp_mix(z, targets, metadata.settings.slerp)  # (B, D)
    loss = F.cross_entropy(model.classify(mixed), targets)

    if weight:
        of_prompts, of_captions = texts.split([len(drawn), len(distinct)])
        prompt_classes = torch.tensor([number[label] for label, _ in drawn], device=device)
        terms = [contrastive_loss(mixed, of_prompts, model.scale, targets, prompt_classes)]
        if captioned:  # positives have the same caption; z is not mixed, as a point between two findings is neither
            caption_numbers = torch.arange(len(distinct), device=device)
            own_caption = torch.tensor([distinct.index(captions[row]) for row in captioned], device=device)
            terms.append(contrastive_loss(z[captioned], of_captions, model.scale, own_caption, caption_numbers))
        loss = loss + weight * torch.stack(terms).mean()
    return loss


class Optimization:
    """AdamW with warm-up and cosine decay, and its state by parameter name, so that it can be kept in safetensors.

    In float16 small gradients would be rounded to zero. GradScaler multiplies the loss by a large factor before the
    backward pass, and divides the gradients by it afterwards (`unscale_`, before they are clipped, so that the limit
    means the true gradients). If one has overflowed, `step` skips the update, and `update` lowers the factor; otherwise
    it raises it now and then. Where the towers use another type, all this does nothing.
    """

    def __init__(self, model, settings, images, device):
        """images: how many there are in an epoch."""
        self.parameters = trained_parameters(model)
        matrices = [p for p in self.parameters.values() if p.dim() >= 2]  # gates and class vectors are among them
        others = [p for p in self.parameters.values() if p.dim() < 2]  # biases, gains, the scale: no decay
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=mixed_precision(device) == torch.float16)
        self.peak = settings.lr
        self.steps_per_epoch = math.ceil(images / settings.batch_size)
        self.total = settings.epochs * self.steps_per_epoch
        self.warmup = max(1, round(settings.warmup * self.total))

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

    def tensors(self):
        """The weights that are trained and AdamW's state, by name."""
        tensors = {f"model.{name}": p for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{key}.{name}": value for key, value in self.adamw.state[p].items()}
        return tensors

    def restore(self, tensors, device):
        """Take over AdamW's state as `tensors` gave it."""
        for name, p in self.parameters.items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            self.adamw.state[p] = {key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else device) for key in keys}


def train_epoch(model, tokenizer, samples, metadata, epoch, optimization, device, workers):
    """One pass over the training images → mean loss."""
    # Dropout and slerp: every epoch on its own. The factor keeps the epochs of one seed apart from those of another.
    torch.manual_seed(1_000_003 * metadata.settings.seed + epoch)
    model.train()
    progress, seen, total_loss = Progress(len(samples)), 0, 0.0
    size = model.clip.config.image_size
    batches = training_batches(samples, metadata.prompts, metadata.settings, epoch, size, workers)
    for step, items in enumerate(batches, start=(epoch - 1) * optimization.steps_per_epoch):
        loss = joint_loss(model, tokenizer, items, metadata, device)
        optimization.step(loss, step)
        seen, total_loss = seen + len(items), total_loss + loss.detach() * len(items)
        progress(seen, f"epoch {epoch}/{metadata.settings.epochs}", loss.detach())
    mean_loss = float(total_loss / seen)
    if not math.isfinite(mean_loss):
        raise UserError(f"the loss is {mean_loss} in epoch {epoch}; train again with a smaller --lr")
    return mean_loss


# ---------------------------------------------------------------------------------------------------------------------
# A training


def begin(run, split, zero_shot):
    """A new training, after the untrained model's figures on a split → State."""
    (run / "metrics.jsonl").write_text("")
    print(f"untrained, on {split}:  {summary(zero_shot)}", flush=True)
    return State(zero_shot)


def resume(run, saved, metadata, classes, model, optimization, device):
    """Set model and optimizer back to where the run was interrupted → State."""
    if classes != saved.metadata.classes:
        raise UserError(f"{metadata.settings.data} has other classes than when {run} was begun; train a new run")
    if metadata.base != saved.metadata.base:
        raise UserError(f"{metadata.settings.weights} has other weights than when {run} was begun; train a new run")
    prefix = "model."
    trained = {name.removeprefix(prefix): t for name, t in saved.tensors.items() if name.startswith(prefix)}
    load_trained(model, trained, run / "last.safetensors")
    optimization.restore(saved.tensors, device)
    optimization.scaler.load_state_dict(saved.state.scaler)
    log = run / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[: saved.state.epoch]))
    print(f"resuming after epoch {saved.state.epoch}", flush=True)
    return saved.state


def keep(run, metadata, state, optimization, loss, results):
    """After an epoch: its line in the log, the model if it is the best so far, and all that resuming needs."""
    print(f"epoch {state.epoch:2}/{metadata.settings.epochs}  loss {loss:.3f}  {summary(results)}", flush=True)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": state.epoch, "loss": loss, **results}) + "\n")
    if selection_score(results) >= state.best_score:
        state.best_score, state.best = selection_score(results), {"epoch": state.epoch, **results}
        write_safetensors(run / "adapter.safetensors", optimization.parameters, asdict(metadata))
    state.scaler = optimization.scaler.state_dict()
    write_safetensors(run / "last.safetensors", optimization.tensors(), {**asdict(metadata), "state": asdict(state)})


def finish(run, state, split, results):
    """The figures of the best epoch, on the split that counts: kept and shown."""
    untrained = {f"zero_shot_{key}": value for key, value in state.zero_shot.items()}
    metrics = {"split": split, **state.best, **results, **untrained, "train_seconds": round(state.seconds, 1)}
    (run / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"best epoch {metrics['epoch']}, on {split}:\n{table(metrics)}")
    print(f"{state.seconds:.0f} s of training; the model is in {run}")


def main():
    args = parse_arguments()
    device = find_device(args.device)
    run, settings, saved = resumed_run(args.run) if args.resume else new_run(args)

    splits, overview = make_splits(run, settings, resumed=bool(saved), workers=args.workers)
    classes, scored = class_names(splits["train"]), scored_split(splits)
    prompts = saved.metadata.prompts if saved else class_prompts(classes, args.prompts)
    model, tokenizer, metadata = new_model(settings, prompts, splits["train"], run)
    model.to(device)
    optimization = Optimization(model, settings, len(splits["train"]), device)
    trained, total = (sum(p.numel() for p in ps) for ps in (trained_parameters(model).values(), model.parameters()))
    print(overview)
    print(f"{settings.weights} on {device}: training {trained:,} of {total:,} parameters into {run}")

    def figures(split):
        return evaluate(model, tokenizer, splits[split], metadata, device, settings.batch_size, args.workers)

    if saved:
        state = resume(run, saved, metadata, classes, model, optimization, device)
    else:
        state = begin(run, scored, figures(scored))
    for epoch in range(state.epoch + 1, settings.epochs + 1):
        start = time.monotonic()
        loss = train_epoch(model, tokenizer, splits["train"], metadata, epoch, optimization, device, args.workers)
        results = figures("val")
        state.epoch, state.seconds = epoch, state.seconds + time.monotonic() - start
        keep(run, metadata, state, optimization, loss, results)

    # The best epoch was chosen by val, whose figures are therefore a little too good. Nothing was chosen by test.
    results = {}
    if scored == "test":
        load_trained(model, read_safetensors(run / "adapter.safetensors")[0], run)
        results = figures("test")
    finish(run, state, scored, results)


if __name__ == "__main__":
    run_script(main)
