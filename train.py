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
This is promised on a CPU only, without --compile, with the same PyTorch and number of threads, as a sum depends on its
order: in float32 (1e8 + 1) − 1e8 is 0, and (1e8 − 1e8) + 1 is 1. Our kernels add in a fixed order. Some GPU operations,
such as the backward of fused attention, may add in whatever order their threads arrive.

Source: arXiv 2509.00752 for the components and the joint objective; how they are composed is this project's choice.
"""

import math
import os
import time

import torch
import torch.nn.functional as F

from augment import augment
from build import check_model, load_trained, new_model, to_device, trained_parameters
from cache import open_cache
from calibration import CALIBRATION
from checkpoint import read_safetensors
from cli import Parser, Progress, add_machine_flags, file_path, find_device, name_of, set_threads
from data import batch_of, captions_of, class_names, training_batches
from encoding import describe_cut
from errors import UserError, counted, run_script, shown
from evaluate import evaluate, finish, see, selection_score
from figures import summary
from fusion import slerp_mix
from images import normalize
from kernels import contrastive_loss
from optimization import Optimization
from parallel import copy_from_first, from_first, gather, rank, share
from prompts import class_prompts
from runs import State, check_unused, claimed, keep, log, new_folder, read_saved, record, resume, unfinished_run
from settings import Settings, add_settings, given_settings, refuse_idle
from sides import describe_flips, mirror_classes
from split_file import describe_seen, hash_of
from splits import make_splits, scored_split

ROUNDS = 10  # of a training


def parse_arguments():
    parser = Parser(__doc__.splitlines()[0])
    where = "folder to train into, by default a new one in runs/; with --resume to go on with, by default the newest"
    parser.add_argument("--run", type=file_path, help=where)
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run, or with more --steps a finished one"
    )
    parser.add_argument("--prompts", type=file_path, help='JSON file of your own prompts, {"class": ["prompt", …], …}')
    compiled = "compile both towers first: takes a minute, saves memory; the speed on GPUs is not yet measured"
    parser.add_argument("--compile", action="store_true", help=compiled)
    add_machine_flags(parser, trains=True)
    add_settings(parser)
    args = parser.parse_args()
    args.given = given_settings(parser)
    if args.resume and args.prompts:
        raise UserError("--resume goes on with the prompts that the run was begun with; leave --prompts out")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# A training step


def joint_loss(model, tokenizer, items, metadata, device, seed):
    """A batch of `training_batches` → the loss, a scalar, the same on every process (parallel.py). seed: for slerp."""
    images, views, labels, prompts, captions = zip(*items, strict=True)
    number, config = {name: i for i, name in enumerate(metadata.classes)}, model.clip.config

    # Each distinct text is encoded once, cut to the longest one. A prompt belongs to all images of its class.
    drawn = list(dict.fromkeys(zip(labels, prompts, strict=True)))  # (class name, prompt) pairs
    captioned = [row for row, caption in enumerate(captions) if caption]
    distinct = list(dict.fromkeys(captions[row] for row in captioned))  # captions
    tokens = tokenizer([text for _, text in drawn] + distinct, config.context_length)
    tokens = tokens[:, : tokens.argmax(1).max() + 1].to(device)

    z = nothing = model.head[:0]  # (0, D): what a process has to show whose share is empty
    if mine := [(image, view) for image, view in zip(images, views, strict=True) if image is not None]:
        pixels = augment(*zip(*mine, strict=True), config.image_size, device)  # (B, H, W, 3)
        z = model.encode_image(normalize(pixels, config.preprocessing))
    z = gather(z, len(items))  # (B, D)
    targets = torch.tensor([number[label] for label in labels], device=device)  # (B,) class numbers
    mixed = slerp_mix(z, targets, metadata.settings.slerp, torch.Generator().manual_seed(seed))  # (B, D)
    loss = F.cross_entropy(model.classify(mixed), targets)

    if metadata.settings.contrastive:
        some = share(tokens)
        texts = gather(model.encode_text(some) if len(some) else nothing, len(tokens))  # (prompts + captions, D)
        of_prompts, of_captions = texts.split([len(drawn), len(distinct)])
        prompt_classes = torch.tensor([number[label] for label, _ in drawn], device=device)
        terms = [contrastive_loss(mixed, of_prompts, model.scale, targets, prompt_classes)]
        if captioned:  # positives have the same caption; z is not mixed, as a point between two findings is neither
            caption_numbers = torch.arange(len(distinct), device=device)
            own_caption = torch.tensor([distinct.index(captions[row]) for row in captioned], device=device)
            terms.append(contrastive_loss(z[captioned], of_captions, model.scale, own_caption, caption_numbers))
        loss = loss + metadata.settings.contrastive * torch.stack(terms).mean()
    return loss


def train_round(model, tokenizer, samples, metadata, steps, optimization, device, workers, cache):
    """The updates of a range of steps → mean loss. Raises UserError where the loss or a weight is not finite."""
    seed = 1_000_003 * metadata.settings.seed  # the factor keeps the steps of one seed apart from those of another
    torch.manual_seed(seed + steps.start + 2**32 * rank())  # for dropout
    model.train()
    progress = Progress(metadata.settings.steps, unit="steps", first=steps.start)
    losses, config = [], model.clip.config
    how = config.image_size, workers, config.preprocessing, cache
    batches = training_batches(samples, metadata.prompts, metadata.settings, steps, *how)
    for step, items in zip(steps, batches, strict=True):
        loss = joint_loss(model, tokenizer, items, metadata, device, seed + step)
        optimization.step(loss, step)
        losses.append(loss.detach())
        progress(step + 1, f"step {step + 1} of {metadata.settings.steps}", losses[-1])
    losses = torch.stack(losses).cpu()  # looked at once a round, as a GPU would have to wait for it at every step
    wrong = [step for step, loss in zip(steps, losses.tolist(), strict=True) if not math.isfinite(loss)]
    if wrong or not all(p.isfinite().all() for p in optimization.parameters.values()):
        step = wrong[0] if wrong else steps.stop - 1
        _, batch = batch_of(step, len(samples), metadata.settings)
        raise UserError(
            f"loss or weights are not finite after step {step + 1}, learning rate {optimization.rate(step):.1e}; train "
            "a new run with a smaller --lr; if that does not help, look at the images of this step: "
            + ", ".join(str(samples[i].image) for i in batch)
        )
    return losses.mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# A training


def train(
    run, settings, splits, prompts, device, workers, cache, compiled=False, saved=None, rounds=ROUNDS, known=None
):
    """Train a model into the run's folder, or go on with what was Saved there → what `finish` takes: the
    best model, its tokenizer, its Metadata, State. compiled: by torch.compile; rounds: how often val is scored;
    known: the untrained model's figures, if they are."""
    model, tokenizer, metadata = new_model(settings, prompts, splits["train"], run)
    to_device(model, settings, device, compiled)
    optimization = Optimization(model, settings, device)
    trained, total = (sum(p.numel() for p in ps) for ps in (trained_parameters(model).values(), model.parameters()))
    where = f"{device}, {counted(torch.get_num_threads(), 'thread')}, {name_of(model.precision)}"
    print(f"{settings.weights} on {where}: training {trained:,} of {total:,} parameters into {shown(run)}")
    texts = [text for of_class in prompts.values() for text in of_class] + captions_of(splits["train"])
    print(describe_cut(tokenizer, texts, model.clip.config.context_length), end="")

    def figures(split):
        seen = see(model, splits[split], metadata.classes, device, settings.batch_size, workers, cache=cache)
        return evaluate(model, tokenizer, seen, metadata, device)

    if saved:
        state = resume(run, saved, metadata, model, optimization, device)
    else:
        scored = scored_split(splits)
        state = State(known or figures(scored), hash_of(splits), threads=torch.get_num_threads())
        print(f"before training, on {scored}:  {summary(state.zero_shot)}", flush=True)
    copy_from_first(trained_parameters(model).values())
    keep(run, metadata, state, optimization)
    log(run, state.step)
    for name in ("metrics.json", "report.html", CALIBRATION):  # of a finished training that is prolonged
        (run / name).unlink(missing_ok=True)
    ends = {math.ceil(settings.steps * part / rounds) for part in range(1, rounds + 1)}
    for end in sorted(end for end in ends if end > state.step):
        start, steps = time.monotonic(), range(state.step, end)
        loss = train_round(model, tokenizer, splits["train"], metadata, steps, optimization, device, workers, cache)
        results = figures("val")
        state.step, state.seconds = end, state.seconds + time.monotonic() - start
        print(f"step {end:4}/{settings.steps}  loss {loss:.3f}  {summary(results)}", flush=True)
        log(run, end, {"step": end, "loss": loss, **results})
        best = selection_score(results) >= state.best_score
        if best:
            state.best_score, state.best_step = selection_score(results), end
        keep(run, metadata, state, optimization, best)

    from_first(lambda: None)  # it has written the best model
    load_trained(model, read_safetensors(run / "adapter.safetensors")[0], run)
    return model, tokenizer, metadata, state


def begin(args, device):
    """A new training."""
    settings = Settings.from_flags(args, device)
    refuse_idle(args.given, settings)
    set_threads(args.threads)
    if args.run:
        from_first(lambda: check_unused(args.run))
    check_model(settings)
    splits, overview, bad = from_first(lambda: make_splits(settings, args.workers))
    prompts = class_prompts(class_names(splits["train"]), args.prompts)
    print(overview)
    if settings.flip == "swap":
        print("\n".join(map(shown, describe_flips(mirror_classes(prompts), captions_of(splits["train"])))))
    print(describe_seen(settings.weights, splits), end="")
    run = args.run or from_first(lambda: new_folder(settings))
    with claimed(run, new=True):
        from_first(lambda: record(run, settings, splits, bad, overview))
        how = device, args.workers, open_cache(run, args.cache_gb)
        finish(run, splits, *train(run, settings, splits, prompts, *how, args.compile), *how)


def go_on(args, device):
    """An interrupted training."""
    run = unfinished_run(args.run, longer="steps" in args.given)
    with claimed(run):
        saved, splits = from_first(lambda: read_saved(run, args.given))
        settings = saved.metadata.settings
        set_threads(args.threads or min(saved.state.threads, os.cpu_count() or 1))
        how = device, args.workers, open_cache(run, args.cache_gb)
        finish(run, splits, *train(run, settings, splits, saved.metadata.prompts, *how, args.compile, saved), *how)


def main():
    args = parse_arguments()
    (go_on if args.resume else begin)(args, find_device(args.device))


if __name__ == "__main__":
    run_script(main)
