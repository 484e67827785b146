"""Run by torchrun: a batch's loss and its gradients, the same on every process; the first one writes them to a file.

torchrun … parallel_worker.py FOLDER-OF-CLASSES FILE SLERP CONTRASTIVE
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file

import parallel
from build import Metadata, assemble, load_base, trained_parameters
from cli import find_device
from data import Sample, training_batches
from settings import Settings
from train import joint_loss

images, file, slerp, contrastive = sys.argv[1:]
device = find_device("cpu")
torch.set_num_threads(1)
files = sorted(Path(images).rglob("*.png"))[::2][:7]  # an odd number: shares differ
samples = [Sample(path, path.parent.name, (f"image {i % 5}",)[: i % 3]) for i, path in enumerate(files)]
prompts = {sample.label: [f"a picture of {sample.label}", "another"] for sample in samples}
how = {"steps": 10, "lr": 1e-3, "batch_size": 7, "flip": "none", "slerp": float(slerp)}
settings = Settings(data="x", weights="phantom", contrastive=float(contrastive), **how)
torch.manual_seed(0)
clip, tokenizer = load_base("phantom")
model = assemble(clip, settings, len(prompts)).train()
trained = trained_parameters(model)
with torch.no_grad():
    for parameter in trained.values():
        parameter.add_(0.02 * torch.randn_like(parameter))
(items,) = training_batches(samples, prompts, settings, range(1), clip.config.image_size, 0)
loss = joint_loss(model, tokenizer, items, Metadata(settings, list(prompts), prompts, {}), device, 0)
loss.backward()
parallel.average_gradients(list(trained.values()))
gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
sums = [loss.item(), *(grad.sum().item() for grad in gradients.values())]
assert all(of_rank == sums for of_rank in parallel.gather_objects(sums))
if parallel.rank() == 0:
    save_file({"loss": loss.detach(), **gradients}, file)
