"""Fine-tune CLIP on your images: python train.py --data path

Without --data it adapts the small model of weights/phantom to synthetic images (phantom.py).
Multi-level CLS fusion and low-rank adapters are trained by classification and contrastive learning together:

    z  = fused embedding of an augmented image
    z' = z, or a point on the arc from z to another image of its class (slerp)
    loss = cross-entropy(z', class) + λ · mean of  contrastive(z', prompts of the classes)
                                                   contrastive(z, captions), where there are captions

A *step* is an update of the weights by one batch. After each tenth of the steps, a *round*, the held-out images are
classified and searched (evaluate.py). The best model, by the mean of macro-F1, image→image MRR and text→image MRR on
the validation images, is kept in the run's folder (runs.py).

Steps are counted, not epochs, which show every image once: ten epochs of a hundred images are a tenth of the updates
that ten epochs of a thousand are, and what is to be learned takes about as many in either case.

With --resume an interrupted training ends with the same bits as an uninterrupted one. It begins the interrupted round
again, whose randomness follows from seed and step alone. The learning rate follows from the step's number. The weights
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
from runs import State, load_trained, new_model, new_run, resume, resumed_run, trained_parameters
from settings import add_settings
from splits import make_splits, scored_split

ROUNDS = 10  # of a training


def parse_arguments():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--run", type=Path, help="folder to train into; default: a new one in runs/, or the last to resume"
    )
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

    def __init__(self, model, settings, device):
        self.parameters = trained_parameters(model)
        matrices = [p for p in self.parameters.values() if p.dim() >= 2]  # the class vectors are among them
        others = [p for p in self.parameters.values() if p.dim() < 2]  # biases, gains, the scale: no decay
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=mixed_precision(device) == torch.float16)
        self.peak, self.total = settings.lr, settings.steps
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


def train_round(model, tokenizer, samples, metadata, steps, optimization, device, workers):
    """The updates of a range of steps → mean loss."""
    # Dropout and slerp: every round on its own. The factor keeps the rounds of one seed apart from those of another.
    torch.manual_seed(1_000_003 * metadata.settings.seed + steps.start)
    model.train()
    progress, total_loss, size = Progress(len(steps), unit="steps"), 0.0, model.clip.config.image_size
    batches = training_batches(samples, metadata.prompts, metadata.settings, steps, size, workers)
    for done, (step, items) in enumerate(zip(steps, batches, strict=True), start=1):
        loss = joint_loss(model, tokenizer, items, metadata, device)
        optimization.step(loss, step)
        total_loss = total_loss + loss.detach()
        progress(done, f"to step {steps.stop} of {metadata.settings.steps}", loss.detach())
    mean_loss = float(total_loss / len(steps))
    if not math.isfinite(mean_loss):
        raise UserError(f"the loss is {mean_loss} by step {steps.stop}; train again with a smaller --lr")
    return mean_loss


# ---------------------------------------------------------------------------------------------------------------------
# A training


def keep(run, metadata, state, optimization, loss, results):
    """After a round: its line in the log, the model if it is the best so far, and all that resuming needs."""
    print(f"step {state.step:4}/{metadata.settings.steps}  loss {loss:.3f}  {summary(results)}", flush=True)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": state.step, "loss": loss, **results}) + "\n")
    if selection_score(results) >= state.best_score:
        state.best_score, state.best_step = selection_score(results), state.step
        write_safetensors(run / "adapter.safetensors", optimization.parameters, asdict(metadata))
    state.scaler = optimization.scaler.state_dict()
    write_safetensors(run / "last.safetensors", optimization.tensors(), {**asdict(metadata), "state": asdict(state)})


def finish(run, state, split, results):
    """The figures of the best model, on the split that counts → metrics, kept and shown."""
    untrained = {f"zero_shot_{key}": value for key, value in state.zero_shot.items()}
    metrics = {
        "split": split,
        "step": state.best_step,
        **results,
        **untrained,
        "train_seconds": round(state.seconds, 1),
    }
    (run / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"best after step {state.best_step}, on {split}:\n{table(metrics)}")
    print(f"{state.seconds:.0f} s of training; the model is in {run}", flush=True)
    return metrics


def train(run, settings, splits, prompts, device, workers, saved=None, rounds=ROUNDS, zero_shot=None):
    """Train a model into the run's folder, or go on with what was Saved there → its metrics. rounds: how often
    val is scored; zero_shot: the untrained model's figures, if they are known."""
    scored = scored_split(splits)
    model, tokenizer, metadata = new_model(settings, prompts, splits["train"], run)
    model.to(device)
    optimization = Optimization(model, settings, device)
    trained, total = (sum(p.numel() for p in ps) for ps in (trained_parameters(model).values(), model.parameters()))
    print(f"{settings.weights} on {device}: training {trained:,} of {total:,} parameters into {run}")

    def figures(split, **more):
        return evaluate(model, tokenizer, splits[split], metadata, device, settings.batch_size, workers, **more)

    if saved:
        state = resume(run, saved, splits["train"], metadata, model, optimization, device)
    else:
        (run / "metrics.jsonl").write_text("")
        state = State(zero_shot or figures(scored))
        print(f"untrained, on {scored}:  {summary(state.zero_shot)}", flush=True)
    ends = {math.ceil(settings.steps * part / rounds) for part in range(1, rounds + 1)}
    for end in sorted(end for end in ends if end > state.step):
        start, steps = time.monotonic(), range(state.step, end)
        loss = train_round(model, tokenizer, splits["train"], metadata, steps, optimization, device, workers)
        results = figures("val")
        state.step, state.seconds = end, state.seconds + time.monotonic() - start
        keep(run, metadata, state, optimization, loss, results)

    # The best round was chosen by val, whose figures are therefore a little too good. Nothing was chosen by test.
    load_trained(model, read_safetensors(run / "adapter.safetensors")[0], run)
    return finish(run, state, scored, figures(scored, intervals=True))


def main():
    args = parse_arguments()
    device = find_device(args.device)
    run, settings, saved = resumed_run(args.run) if args.resume else new_run(args)
    splits, overview = make_splits(run, settings, resumed=bool(saved), workers=args.workers)
    print(overview)
    prompts = saved.metadata.prompts if saved else class_prompts(class_names(splits["train"]), args.prompts)
    train(run, settings, splits, prompts, device, args.workers, saved)


if __name__ == "__main__":
    run_script(main)
