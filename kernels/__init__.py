"""The project's numerical kernels: contrastive loss, slerp and top-k search.

    contrastive_loss(image_features, text_features, scale, image_labels=None, text_labels=None)   → scalar
    slerp(a, b, t)                                                                                → (N, D), unit length
    top_k(queries, gallery, k)                                                                    → values, indices

`reference.py` is the plain PyTorch version of each, and its docstrings are the definitions.
"""

from kernels.reference import contrastive_loss, slerp, top_k

__all__ = ["contrastive_loss", "slerp", "top_k"]
