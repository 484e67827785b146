"""How far a model's probabilities can be trusted, and whether an image is like those that it was trained on.

A network that calls a hundred images “ear, 0.9” should be right ninety times; then it is *calibrated*. Most are too
sure of themselves. *Temperature scaling* divides the logits by one number T before the softmax: the order of the
classes stays, so that accuracy does, and T > 1 makes all probabilities less extreme. T is chosen on the validation
images, by the likelihood of their labels (Guo et al. 2017, arXiv 1706.04599).

The *expected calibration error* (ECE) sorts the images into bins by the probability of the class they were given, and
averages over them how far that probability is from the share of right answers.

A classifier has to choose one of its classes, even for a photograph of a cat. What tells such an image: how near it is
to the training images. `familiarity` compares the cosine of the nearest one with those of the validation images, which
the model has not seen either.

Exercise: multiply the logits of `main` by 3. The line “before” gets much worse. T becomes almost three times as large,
and so the line “after” hardly changes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from checkpoint import read_safetensors, write_safetensors
from errors import UserError, reason
from kernels import top_k

CALIBRATION = "calibration.safetensors"  # in a run's folder
BINS = 15  # of equal width
SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)  # of the images, the surest ones
UNLIKE = 0.05  # an image is unlike the training images if fewer of the validation images are as far from them
MOST = 1000  # training images that are kept to compare with


def fit_temperature(logits, labels):
    """(N, C), (N,) → T.

    The negative log-likelihood of N labels has, by u = −log T, the derivative N/T · (E[Σ p·z] − E[z of the label]) with
    logits z and probabilities p. Where every label is right it would fall for ever. So a weak prior is added: that u is
    normally distributed with a standard deviation of 1. The zero of the sum is found by halving.
    """
    z, low, high = logits.double(), -3.0, 3.0
    wanted = z.gather(1, labels[:, None]).mean()
    for _ in range(60):
        u = (low + high) / 2
        beta = math.exp(u)
        slope = len(z) * beta * (((beta * z).softmax(1) * z).sum(1).mean() - wanted) + u
        low, high = (low, u) if slope > 0 else (u, high)
    return math.exp(-u)


def reliability(probabilities, labels, bins=BINS):
    """(N, C), (N,) → a dict for each bin of equal width that has images: "images", "probability", its mean, and
    "accuracy"."""
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # (0, 1/15] is the first
    rows = []
    for bin in place.unique().tolist():
        here = place == bin
        row = confidence[here].mean().item(), right[here].mean().item()
        rows.append({"images": int(here.sum()), "probability": row[0], "accuracy": row[1]})
    return rows


def calibration_error(rows):
    """What `reliability` gives → the expected calibration error, from 0 to 1."""
    count = sum(row["images"] for row in rows)
    return sum(row["images"] * abs(row["accuracy"] - row["probability"]) for row in rows) / count


def coverage(probabilities, labels, shares=SHARES):
    """(N, C), (N,) → a dict for each share of the surest images: "share", "accuracy" among them, and "at_least", the
    lowest probability among them."""
    confidence, predicted = probabilities.double().max(1)
    order = confidence.argsort(descending=True)
    right = (predicted == labels)[order].double()
    rows = []
    for share in shares:
        count = max(1, round(share * len(order)))
        rows.append(
            {"share": share, "accuracy": right[:count].mean().item(), "at_least": confidence[order[count - 1]].item()}
        )
    return rows


@dataclass
class Calibration:
    """A run's temperature, and what its images look like: (n, D) float16 unit embeddings of training images, and (m,)
    cosines of each validation image with the nearest of them."""

    temperature: float = 1.0
    known: torch.Tensor | None = None
    held_out: torch.Tensor | None = None

    @classmethod
    def fit(cls, logits, labels, embeddings, known):
        """(N, C), (N,), (N, D) of the validation images; (n, D): embeddings of training images."""
        known = F.normalize(known.float(), dim=1).half()
        return cls(fit_temperature(logits, labels), known, _nearest(embeddings, known).sort().values)

    def probabilities(self, logits):
        """(N, C) → (N, C) float64, each row sums to 1."""
        return (logits.double() / self.temperature).softmax(1)

    def familiarity(self, embeddings):
        """(N, D) → (N,): the share of the validation images that are no nearer to a training image. None where the run
        has nothing to compare with."""
        if self.known is None:
            return None
        nearest = _nearest(embeddings, self.known)
        return torch.searchsorted(self.held_out, nearest, right=True).double() / len(self.held_out)

    def figures(self, logits, labels):
        """(N, C), (N,) of the images that are scored → the figures by the names of metrics.json; none without a fit."""
        if self.known is None:
            return {}
        calibrated = self.probabilities(logits)
        before, after = reliability(logits.double().softmax(1), labels), reliability(calibrated, labels)
        return {
            "temperature": self.temperature,
            "ece_uncalibrated": calibration_error(before),
            "ece": calibration_error(after),
            "reliability": after,
            "coverage": coverage(calibrated, labels),
        }

    def save(self, file):
        write_safetensors(file, {"known": self.known, "held_out": self.held_out}, {"temperature": self.temperature})

    @classmethod
    def load(cls, file, width):
        """width: of the run's embeddings. A run without the file, as an interrupted one is, has a temperature of 1.
        Raises UserError where the file is damaged."""
        if not file.is_file():
            return cls()
        tensors, info = read_safetensors(file)
        try:
            known, held_out, temperature = tensors["known"], tensors["held_out"], float(info["temperature"])
            shapes = known.dim() == 2 and known.shape[1] == width and held_out.dim() == 1
            if not (shapes and len(known) and len(held_out) and 0.01 < temperature < 100):
                raise ValueError("its shapes are others")
            if not (known.isfinite().all() and held_out.isfinite().all()):
                raise ValueError("it has values that are no numbers")
        except (KeyError, TypeError, ValueError) as problem:
            raise UserError(f"{file} is damaged ({reason(problem)}); delete it to go on without it") from None
        return cls(temperature, known.half(), held_out.float().sort().values)


def _nearest(embeddings, known):
    """(N, D), (n, D) unit rows → (N,) the cosine with the nearest."""
    return top_k(F.normalize(embeddings.float(), dim=1), known, 1, unit_rows=True)[0][:, 0].cpu()


def main():
    """A model that is too sure of itself, before and after."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (2000,), generator=generator)
    logits = torch.randn(2000, 4, generator=generator)
    logits[torch.arange(2000), labels] += 1.5  # that much it knows
    logits *= 2.5  # but it says so as if it knew more
    T = fit_temperature(logits[:1000], labels[:1000])
    print(f"T = {T:.2f}, chosen on 1,000 images; of another 1,000:")
    for name, probabilities in (("before", logits.softmax(1)), ("after", (logits / T).softmax(1))):
        rows = reliability(probabilities[1000:], labels[1000:], bins=5)
        bins = "  ".join(f"{row['probability']:.2f} → {row['accuracy']:.2f}" for row in rows)
        print(f"{name:6} ECE {calibration_error(rows):.3f}; said → was right: {bins}")
    for row in coverage((logits / T).softmax(1)[1000:], labels[1000:]):
        print(f"the surest {row['share']:4.0%}, at least {row['at_least']:.2f}: accuracy {row['accuracy']:.3f}")


if __name__ == "__main__":
    main()
