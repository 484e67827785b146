"""The project's numerical kernels: contrastive loss, slerp and top-k search.

    contrastive_loss(image_features, text_features, scale, image_labels=None, text_labels=None)   → scalar
    slerp(a, b, t)                                                                                → (N, D), unit length
    top_k(queries, gallery, k)                                                                    → values, indices

`reference.py` has the plain PyTorch version of each, whose docstrings are the definitions. On GPUs with the tensor
cores that Triton knows (compute capability 8.0 and up) the first two run in Triton, `contrastive.py` and `slerp.py`;
it is imported only then, so everything works without it.
"""

import sys
from types import ModuleType

import torch

from kernels import reference
from kernels.reference import top_k

__all__ = ["contrastive_loss", "slerp", "top_k"]


def on_triton(features):
    fits = features.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return features.is_cuda and fits and torch.cuda.get_device_capability(features.device) >= (8, 0)


def contrastive_loss(image_features, text_features, scale, image_labels=None, text_labels=None):
    if on_triton(image_features):
        from kernels import contrastive as implementation
    else:
        implementation = reference
    return implementation.contrastive_loss(image_features, text_features, scale, image_labels, text_labels)


def slerp(a, b, t):
    if on_triton(a):
        from kernels.slerp import slerp as run
    else:
        run = reference.slerp
    return run(a, b, t)


contrastive_loss.__doc__, slerp.__doc__ = reference.contrastive_loss.__doc__, reference.slerp.__doc__


class _Package(ModuleType):
    """Importing the submodule `slerp` would put it in the place of the function of the same name."""

    def __setattr__(self, name, value):
        if name != "slerp":
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
