"""The contrastive loss in Triton as an operator of PyTorch: `triton_tiny.py` where it fits, else `triton_tiles.py`.

`custom_op` makes a function an operator like any other: autograd and torch.compile take it as one step and do not look
inside. For autograd an autograd.Function is one step, too; but torch.compile traces into its forward and backward, and
must understand every launch in them, or break its graph in two there. `mutates_args=()` promises that the function
writes to none of its arguments, so the compiler may reorder and merge calls. `register_fake` gives results of the right
shape, type and strides without computing them. The compiler plans a whole step with such results; without them it
cannot trace the call. Backward is named by `register_autograd`; its `setup_context` is called after forward and keeps
what backward needs. train.py does not compile, so an autograd.Function as in reference.py would do for it.

The gradients are computed in forward, those that are asked for, and backward multiplies them by the incoming one.

    python kernels/triton_contrastive.py       # without a GPU it runs in Triton's interpreter
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # to be set before Triton is imported

from kernels import reference
from kernels.triton_tiles import tiled
from kernels.triton_tiny import TINY, tiny


@torch.library.custom_op("kernels::contrastive_loss", mutates_args=())
def loss_and_gradients(
    x: Tensor, y: Tensor, scale: Tensor, x_labels: Tensor | None, y_labels: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ loss () and its gradients by x (N, D), y (M, D) and scale (), those that are wanted."""
    results = empty_results(x, y, scale, x_labels, y_labels, wanted)
    if not len(x) or not len(y):
        return tuple(result.zero_() for result in results)
    x, y, x_labels, y_labels = (v if v is None else v.contiguous() for v in (x, y, x_labels, y_labels))
    # Triton launches on the current GPU, which need not be the tensors'. Backward may run within the user's autocast.
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        if max(len(x), len(y)) <= TINY:
            tiny(x, y, scale, x_labels, y_labels, *results)
        else:
            tiled(x, y, scale, x_labels, y_labels, *results, wanted)
    return results


@loss_and_gradients.register_fake
def empty_results(x, y, scale, x_labels, y_labels, wanted):
    # Gradients wait for the incoming one in float32: 16 bits would round them twice, and float16 lose the small ones.
    return scale.new_empty(()), *(x.new_empty(v.shape, dtype=torch.float32) for v in (x, y)), scale.new_empty(())


def save_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else autograd makes zeros for the incoming gradients of dx, dy and dscale
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*output[1:])


def backward(ctx, grad, *_):
    if torch.is_grad_enabled():  # create_graph=True; autograd would take our gradients for constants
        raise RuntimeError("contrastive_loss can't be differentiated twice; do not pass create_graph=True")
    gradients, types = ctx.saved_tensors, (ctx.dtype, ctx.dtype, torch.float32)
    found = [
        torch.mul(gradient, grad, out=torch.empty_like(gradient, dtype=dtype)) if needed else None
        for gradient, dtype, needed in zip(gradients, types, ctx.needs_input_grad[:3], strict=True)
    ]
    return *found, None, None, None


loss_and_gradients.register_autograd(backward, setup_context=save_for_backward)


def contrastive_loss(image_features, text_features, scale, image_labels=None, text_labels=None):
    """As `kernels.reference.contrastive_loss`, on the GPU. Both features are float32, float16 or bfloat16.

    It holds K for a strip of rows, at most STRIP entries or 128 rows, a 64th (float32: a 32nd) of the matrix in
    logsumexps, and the gradients from forward on. What else the inputs cost: features of two types are copied to a type
    that holds both; those that are not contiguous are copied. float16 features are copied to bfloat16, which keeps 7 of
    their 10 binary digits, for gradients of more than 64 rows or columns. float32 gradients come from PyTorch's matrix
    product, which is in full precision unless you have allowed it TF32. Triton compiles once for each type, size of
    block and D, with and without labels."""
    reference.check_pairs(image_features, text_features, image_labels, text_labels)
    x, y = image_features, text_features
    scale = reference.as_tensor(scale, torch.float32, x.device).reshape(())
    dtype = torch.promote_types(x.dtype, y.dtype)
    if dtype == torch.bfloat16 and not x.is_cuda:
        dtype = torch.float32  # Triton's interpreter (3.7) multiplies bfloat16's bit patterns as if they were integers
    wanted = [torch.is_grad_enabled() and v.requires_grad for v in (x, y, scale)]
    return loss_and_gradients(x.to(dtype), y.to(dtype), scale, image_labels, text_labels, wanted)[0]


def main():
    print(torch.ops.kernels.contrastive_loss.default._schema)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (torch.randn(n, 64, device=device, requires_grad=True) for n in (32, 7))
    labels = torch.arange(32, device=device) % 7, torch.arange(7, device=device)
    for times in (1, 3):  # the incoming gradient
        (gradient,) = torch.autograd.grad(times * contrastive_loss(x, y, 20.0, *labels), x)
        (plain,) = torch.autograd.grad(times * reference.contrastive_loss(x, y, 20.0, *labels), x)
        print(f"{times} × the loss: |∂/∂x| = {gradient.norm():.6f}, in plain PyTorch {plain.norm():.6f}")
    with torch._subclasses.FakeTensorMode() as mode:
        loss = contrastive_loss(mode.from_tensor(x), mode.from_tensor(y), 20.0, *map(mode.from_tensor, labels))
    print(f"for the compiler, without computing anything: {loss}")


if __name__ == "__main__":
    main()
