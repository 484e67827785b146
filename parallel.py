"""Several processes compute together, on one machine or on many: torchrun --nproc-per-node 2 train.py …

Each process is called a *rank*; they all know each step's batch, which is the same as that of one process alone. Every
rank encodes its share of the images and texts. The embeddings, a few kilobytes, are then gathered on every rank, and
every rank computes the loss of the whole batch: the contrastive loss needs all of the texts beside each image.

Backward, each rank therefore has the gradient of all embeddings, and follows that of its own share into the towers. A
tower's gradient is the sum over the ranks. But what comes after the gathering, such as the class vectors, has its whole
gradient on each rank already. So that one average serves both, shares are multiplied by the number of ranks first:

    towers         mean over R ranks of (R · own share)  =  sum of the shares
    class vectors  mean over R ranks of the same         =  the same

Without torchrun there is one rank, and all of this does nothing. The first rank alone prints results, and writes the
run's files.

Source: Li et al., "PyTorch Distributed" (arXiv 2006.15704) averages gradients likewise; gathering embeddings for the
loss is what open_clip does.
"""

import atexit
import contextlib
import os
import sys
from datetime import timedelta

import torch

from errors import UserError


def world():
    """How many ranks there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    return int(os.environ.get("RANK", 0))


def local_rank():
    """Among the ranks on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world():
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def start():
    """Meet the other ranks, which torchrun has started."""
    if world() > 1 and not torch.distributed.is_initialized():
        if rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, for good
        with _together():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            # The others wait while the first one looks at all images. A rank that is gone is noticed at once.
            torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
        atexit.register(torch.distributed.destroy_process_group)  # else its threads outlive it, and that is an abort


@contextlib.contextmanager
def _together():
    """What PyTorch says where a rank is gone is of no use to anyone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as problem:  # also DistBackendError
        said = str(problem).strip().splitlines()[0][:200]
        raise UserError(
            f"rank {rank()} has lost another one, which may have said why ({said}); start again, a training with "
            "--resume"
        ) from None


def share(items):
    """→ this rank's part of a list."""
    return items[rank() :: world()]


def from_first(make):
    """→ make(), called on the first rank alone, on all of them."""
    if world() == 1:
        return make()
    made = [make() if rank() == 0 else None]
    with _together():
        torch.distributed.broadcast_object_list(made)
    return made[0]


def gather_objects(value):
    """→ the values of all ranks, in order, on every rank."""
    if world() == 1:
        return [value]
    values = [None] * world()
    with _together():
        torch.distributed.all_gather_object(values, value)
    return values


def gather(x, count):
    """The rows of this rank's share, (n, D) → those of all `count` items, in order, on every rank."""
    return _Gather.apply(x, count) if world() > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):
        most = -(-count // world())  # a rank's rows, or one less
        padded = x.new_zeros(most, x.shape[1])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(world())]
        with _together():
            torch.distributed.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:count]  # item i is row i // R of rank i % R

    @staticmethod
    def backward(ctx, grad):
        return share(grad) * world(), None


def average_gradients(parameters):
    """Give every rank the mean of all ranks' gradients, in one message."""
    if world() == 1:
        return
    # A rank without a share of the batch has no gradients. What has none on any rank keeps none: AdamW passes it over.
    has_some = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    message = torch.cat([has_some, *(grad.flatten() for grad in grads)])
    with _together():
        torch.distributed.all_reduce(message)
    has_some, *means = message.split([len(parameters), *(p.numel() for p in parameters)])
    for p, mean, some in zip(parameters, means, has_some.tolist(), strict=True):
        p.grad = (mean / world()).view_as(p) if some else None


def copy_from_first(tensors):
    """Overwrite the tensors with the first rank's."""
    if world() > 1:
        with torch.no_grad(), _together():
            for tensor in tensors:
                torch.distributed.broadcast(tensor, 0)
