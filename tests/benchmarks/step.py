"""A training step of adapters on ViT-B/16 on a CPU, beside transformers with PEFT: seconds and memory.

    python tests/benchmarks/step.py              # --batch 16 --steps 3 --rounds 2

Each is written as its users write it. Ours: train.py's joint loss with class prompts and captions, and fused levels.
Theirs: CLIPModel's own contrastive loss with its captions. Both have adapters of rank 8 on q, k, v and out of both
towers, and AdamW. Each runs in a process of its own; the processes take turns.
"""

import argparse
import multiprocessing
import random
import resource
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CAPTION = "an endoscopic picture of case {} with a finding on the left side"


def theirs(batch):
    """→ a function that does a step."""
    import peft
    import torch
    import transformers

    config = transformers.CLIPConfig(vision_config={"patch_size": 16}, projection_dim=512)
    model = transformers.CLIPModel(config)
    adapters = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    model = peft.get_peft_model(model, adapters).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    tokens, pixels = torch.randint(1, 49405, (batch, 16)), torch.randn(batch, 3, 224, 224)
    tokens[:, -1] = 49407

    def step():
        loss = model(input_ids=tokens, pixel_values=pixels, return_loss=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(batch, precision, compiled=False):
    """→ the same."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch

    import train
    from augment import draw_view
    from build import Metadata, assemble, to_device
    from model import CLIP, CLIPConfig
    from optimization import Optimization
    from settings import Settings

    settings = Settings(data="x", weights="x", steps=100, lr=5e-4, precision=precision)
    prompts = {str(i): [f"class {i}"] for i in range(7)}
    model = assemble(CLIP(CLIPConfig()).initialize(), settings, len(prompts)).train()
    torch.nn.init.normal_(model.head)
    to_device(model, settings, torch.device("cpu"), compiled)
    optimization = Optimization(model, settings, torch.device("cpu"))
    rng, view = np.random.default_rng(0), draw_view(random.Random(0), False)
    items = [
        (rng.integers(0, 256, (280, 280, 3), dtype=np.uint8), view, str(i % 7), f"class {i % 7}", CAPTION.format(i))
        for i in range(batch)
    ]

    def tokenizer(texts, context_length):
        tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
        tokens[:, :15], tokens[:, 15] = torch.randint(1, 49405, (len(texts), 15)), 49407
        return tokens

    metadata = Metadata(settings, list(prompts), prompts, {})
    return lambda: optimization.step(train.joint_loss(model, tokenizer, items, metadata, torch.device("cpu"), 0), 0)


WAYS = {
    "transformers + PEFT, float32": theirs,
    "ours, float32": lambda batch: ours(batch, "float32"),
    "ours, float32, compiled": lambda batch: ours(batch, "float32", True),
    "ours, bfloat16": lambda batch: ours(batch, "bfloat16"),
}


def measure(name, batch, steps, answers):
    """In a process of its own: → seconds of each step, and the most memory that the process held, in GB."""
    step, times = WAYS[name](batch), []
    for number in range(steps + 1):
        start = time.perf_counter()
        step()
        if number:
            times.append(time.perf_counter() - start)
    answers.put((times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default in (("--batch", 16), ("--steps", 3), ("--rounds", 2)):
        parser.add_argument(flag, type=int, default=default)
    args = parser.parse_args()
    context, seconds, memory = multiprocessing.get_context("spawn"), {n: [] for n in WAYS}, {n: [] for n in WAYS}
    for name in list(WAYS) * args.rounds:
        answers = context.Queue()
        process = context.Process(target=measure, args=(name, args.batch, args.steps, answers))
        process.start()
        times, peak = answers.get()
        process.join()
        seconds[name] += times
        memory[name].append(peak)
    from turns import machine

    print(f"batches of {args.batch}; {machine()}")
    print("| | s a step | times as fast | GB | of theirs |\n| --- | --- | --- | --- | --- |")
    (theirs_s, theirs_gb), *_ = ((statistics.median(seconds[n]), statistics.median(memory[n])) for n in WAYS)
    for name in WAYS:
        s, gb = statistics.median(seconds[name]), statistics.median(memory[name])
        print(f"| {name} | {s:.2f} | {theirs_s / s:.2f}× | {gb:.2f} | {gb / theirs_gb:.2f}× |")


if __name__ == "__main__":
    main()
