"""The project's numerical kernels: contrastive loss, slerp and top-k search.

    contrastive_loss(image_features, text_features, scale, image_labels=None, text_labels=None)   → scalar
    slerp(a, b, t)                                                                                → (N, D), unit length
    top_k(queries, gallery, k, unit_rows=False)                                                   → values, indices

`reference.py` and `search.py` have the plain PyTorch version of each, whose docstrings are the definitions. On NVIDIA
GPUs of compute capability 8.0 and up, whose tensor cores Triton uses, all three run in Triton: `triton_contrastive.py`,
`triton_slerp.py` and `triton_search.py`. These are imported only then, so everything works without Triton, which exists
for Linux only and needs a C compiler. README.md says what to read first.
"""

from importlib.util import find_spec

import torch

from kernels import reference, search

__all__ = ["contrastive_loss", "slerp", "top_k"]


HAS_TRITON = find_spec("triton") is not None  # on Windows and macOS there is none


def on_triton(*tensors):
    """Whether the Triton kernels take tensors of these types on these devices."""
    one_gpu = all(tensor.is_cuda and tensor.device == tensors[0].device for tensor in tensors)
    if not (HAS_TRITON and one_gpu and torch.version.hip is None):  # AMD's GPUs were not tried
        return False
    fits = all(tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) for tensor in tensors)
    return fits and torch.cuda.get_device_capability(tensors[0].device) >= (8, 0)


def contrastive_loss(image_features, text_features, scale, image_labels=None, text_labels=None):
    if on_triton(image_features, text_features):
        from kernels.triton_contrastive import contrastive_loss as run
    else:
        run = reference.contrastive_loss
    return run(image_features, text_features, scale, image_labels, text_labels)


def slerp(a, b, t):
    if on_triton(a, b):
        from kernels.triton_slerp import slerp as run
    else:
        run = reference.slerp
    return run(a, b, t)


def top_k(queries, gallery, k, unit_rows=False):
    if on_triton(queries, gallery):
        from kernels.triton_search import top_k as run
    else:
        run = search.top_k
    return run(queries, gallery, k, unit_rows)


contrastive_loss.__doc__, slerp.__doc__ = reference.contrastive_loss.__doc__, reference.slerp.__doc__
top_k.__doc__ = search.top_k.__doc__
