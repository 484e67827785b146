"""The project's numerical kernels: contrastive loss, slerp and top-k search.

    contrastive_loss(image_features, text_features, scale, image_labels=None, text_labels=None)   → scalar
    slerp(a, b, t)                                                                                → (N, D), unit length
    top_k(queries, gallery, k)                                                                    → values, indices

`reference.py` has the plain PyTorch version of each, whose docstrings are the definitions. On NVIDIA GPUs of compute
capability 8.0 and up, whose tensor cores Triton uses, the first two run in Triton: `triton_contrastive.py` and
`triton_slerp.py`. These are imported only then, so everything works without Triton. README.md says what to read first.
"""

from importlib.util import find_spec

import torch

from kernels import reference
from kernels.reference import top_k

__all__ = ["contrastive_loss", "slerp", "top_k"]


HAS_TRITON = find_spec("triton") is not None  # on Windows and macOS there is none


def on_triton(features):
    """Whether the Triton kernels take features of this type on this device."""
    if not (HAS_TRITON and features.is_cuda):
        return False
    fits = features.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return fits and torch.cuda.get_device_capability(features.device) >= (8, 0)


def contrastive_loss(image_features, text_features, scale, image_labels=None, text_labels=None):
    if on_triton(image_features):
        from kernels.triton_contrastive import contrastive_loss as run
    else:
        run = reference.contrastive_loss
    return run(image_features, text_features, scale, image_labels, text_labels)


def slerp(a, b, t):
    if on_triton(a):
        from kernels.triton_slerp import slerp as run
    else:
        run = reference.slerp
    return run(a, b, t)


contrastive_loss.__doc__, slerp.__doc__ = reference.contrastive_loss.__doc__, reference.slerp.__doc__
