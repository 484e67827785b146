"""How long a search by text takes from the command line to its answer, and how much memory, beside the shortest script
that does the same with transformers.

    python tests/benchmarks/startup.py           # --repeats 5 for other than three

Both load a ViT-B/16 with random weights (ours with adapters), encode one text and search 40 images whose embeddings are
kept on disk. They are whole processes, which take turns; the median counts, and the most memory that one held.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice, product
from pathlib import Path

ROOT = Path(__file__).parents[2]
PEER = """
import sys, numpy as np, torch
from transformers import CLIPModel, CLIPTokenizer
folder, text = sys.argv[1:]
model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
stored = np.load(folder + "/images.npz")
with torch.inference_mode():
    query = model.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output[0]
query = torch.nn.functional.normalize(query, dim=0).numpy()
scores = stored["embeddings"] @ query
for place in scores.argsort()[::-1][:10]:
    print(scores[place], stored["paths"][place])
"""


def prepare(folder):
    """A base model as transformers saves it, a run with adapters of it, and images. In a process of its own: on Linux
    one that is started counts the memory of the one that starts it as its own."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    from build import new_model, trained_parameters
    from checkpoint import write_safetensors
    from settings import Settings
    from tokenizer import BYTE_SYMBOLS, CLIP_MERGES, Tokenizer, save_merges
    from weights.export import export_tokenizer

    torch.manual_seed(0)
    base, run, images = folder / "base", folder / "run", folder / "images"
    base.mkdir()
    save_merges(islice(product(BYTE_SYMBOLS.values(), repeat=2), CLIP_MERGES), base / "merges.txt")
    tokenizer = Tokenizer(base)
    config = transformers.CLIPConfig(
        text_config={"vocab_size": len(tokenizer), "eos_token_id": len(tokenizer) - 1},
        vision_config={"patch_size": 16},
        projection_dim=512,
    )
    transformers.CLIPModel(config).save_pretrained(base)
    export_tokenizer(tokenizer, 77, base)
    rng = np.random.default_rng(0)
    for i in range(40):
        (images / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (240, 320, 3), dtype=np.uint8)).save(images / "ab"[i % 2] / f"{i}.png")
    run.mkdir()
    settings = Settings(data=str(images), weights=str(base), steps=1, lr=1e-3)
    model, _, metadata = new_model(settings, {"a": ["one kind"], "b": ["another kind"]}, [], run)
    for name, parameter in trained_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    write_safetensors(run / "adapter.safetensors", trained_parameters(model), asdict(metadata))


def measure(command, folder):
    """→ seconds, GB of the whole process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        preparation = multiprocessing.get_context("spawn").Process(target=prepare, args=(folder,))
        preparation.start()
        preparation.join()
        ours = [sys.executable, ROOT / "retrieve.py", "--run", "run", "--data", "images", "--weights", "base"]
        ours += ["--text", "something"]
        measure([*ours, "--embeddings", "base/images.npz"], folder)  # encodes the images
        peer = [sys.executable, "-c", PEER, "base", "something"]
        seen = {"retrieve.py": [], "transformers": []}
        for _ in range(args.repeats + 1):
            for name, command in zip(seen, (ours, peer), strict=True):
                seen[name].append(measure(command, folder))
    print(f"PyTorch {version('torch')}, transformers {version('transformers')}, {os.cpu_count()} cores")
    seconds, memory = ({name: statistics.median(m[k] for m in seen[name][1:]) for name in seen} for k in (0, 1))
    print("| | seconds | of transformers | GB | of transformers |\n| --- | --- | --- | --- | --- |")
    for name in seen:
        ratios = (of[name] / of["transformers"] for of in (seconds, memory))
        cells = zip((seconds[name], memory[name]), ratios, strict=True)
        print(f"| {name} | " + " | ".join(f"{value:.2f} | {ratio:.2f}×" for value, ratio in cells) + " |")


if __name__ == "__main__":
    main()
