"""AdamW with warm-up, cosine decay and scaled gradients, and its state in tensors that have names."""

import math

import torch

from build import trained_parameters
from errors import UserError
from parallel import average_gradients


class Optimization:
    """AdamW with warm-up and cosine decay, and its state by parameter name, so that it can be kept in safetensors.

    In float16 small gradients would be rounded to zero. GradScaler multiplies the loss by a large factor before the
    backward pass, and divides the gradients by it afterwards (`unscale_`, before they are clipped, so that the limit
    means the true gradients). If one has overflowed, `step` skips the update, and `update` lowers the factor; otherwise
    it raises it now and then. Where the towers use another type, all this does nothing.
    """

    def __init__(self, model, settings, device):
        self.parameters = trained_parameters(model)
        matrices = [p for p in self.parameters.values() if p.dim() >= 2]  # the class vectors are among them
        others = [p for p in self.parameters.values() if p.dim() < 2]  # biases, gains, the scale: no decay
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=model.precision == torch.float16)
        self.peak, self.total = settings.lr, settings.steps
        self.warmup = max(1, round(settings.warmup * self.total))

    def rate(self, number):
        """→ the learning rate of a step; number: in the whole training, from 0 on."""
        ramp = min(1.0, (number + 1) / self.warmup)
        done = max(0, number - self.warmup) / max(1, self.total - self.warmup)
        return self.peak * ramp * 0.5 * (1 + math.cos(math.pi * done))

    def step(self, loss, number):
        """One update."""
        for group in self.adamw.param_groups:
            group["lr"] = self.rate(number)
        self.scaler.scale(loss).backward()
        average_gradients(list(self.parameters.values()))
        self.scaler.unscale_(self.adamw)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad()

    def tensors(self):
        """The weights that are trained and AdamW's state, by name."""
        tensors = {f"model.{name}": p for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{key}.{name}": value for key, value in self.adamw.state[p].items()}
        return tensors

    def restore(self, tensors, device):
        """Take over AdamW's state as `tensors` gave it."""
        for name, p in self.parameters.items():
            shapes = {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}
            keys = [key for key in shapes if f"{key}.{name}" in tensors]
            kept = [tensors[f"{key}.{name}"] for key in keys]
            fit = [t.shape == shapes[key] and t.dtype == torch.float32 for key, t in zip(keys, kept, strict=True)]
            if len(keys) not in (0, 3) or not all(fit) or (keys and kept[0] < 0):
                raise UserError(f"the saved training does not fit its own settings in {name}; train again")
            self.adamw.state[p] = {key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else device) for key in keys}
