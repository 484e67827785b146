"""The images that a search answers from, and the model that answers."""

import re
import time
import unicodedata
from dataclasses import replace

import torch

from calibration import Calibration
from encoding import encode_images, encode_texts
from errors import UserError
from kernels import slerp, top_k
from prompts import plain_name


def nearest(queries, gallery, count):
    """As kernels.top_k. What is not a number ranks first, so that it cannot hide."""
    scores, found = top_k(queries, gallery, count, unit_rows=True)
    if not scores.isfinite().all():
        raise UserError(
            "an embedding is not a number, the index is damaged; delete the index files in the run's folder"
        )
    return scores, found


class Archive:
    """A run's model, and samples with their (N, D) unit embeddings, rows of the same order."""

    def __init__(self, model, tokenizer, metadata, samples, gallery, device, calibration=None):
        self.model, self.tokenizer, self.metadata, self.device = model, tokenizer, metadata, device
        self.calibration = calibration or Calibration()
        self.samples, self.gallery = [_known_label(sample, metadata.classes) for sample in samples], gallery
        self.groups = {}  # group: its rows
        for row, sample in enumerate(self.samples):
            if sample.group:
                self.groups.setdefault(sample.group, []).append(row)

    def of_text(self, text):
        """→ (1, D)"""
        return encode_texts(self.model, self.tokenizer, [text], self.device)

    def of_image(self, file):
        """An image file, also an open one → (1, D)"""
        return encode_images(self.model, [file], self.device, 1, 0, None)

    def search(self, query, top, rows=None, per_group=False, without=None):
        """The images most similar to the query, (1, D) → a dict each, best first: rank, score (the cosine), image,
        class (None where unknown), predicted class and its probability, captions, group, row, that of the gallery, and
        of_group, how many images its group has here.

        rows: (M,), which of them are searched; without it all are. per_group: only the nearest of each group, as the
        frames of a video are nearly the same picture. without: a row; it and its group are left out, as the evaluation
        does it."""
        rows = torch.arange(len(self.gallery)) if rows is None else rows
        if without is not None:
            own = self.groups.get(self.samples[without].group, [without])
            rows = rows[~torch.isin(rows, torch.tensor(own))]
        count, chosen = top, []
        while len(rows):
            scores, found = nearest(
                query, self.gallery if len(rows) == len(self.gallery) else self.gallery[rows], count
            )
            chosen = list(zip(rows[found[0]].tolist(), scores[0].tolist(), strict=True))
            if per_group:
                first = {}
                for row, score in chosen:
                    first.setdefault(self.samples[row].group or row, (row, score))
                chosen = list(first.values())
            if len(chosen) >= top or count >= len(rows):
                break
            count *= 4  # they were of few groups
        return self._describe(chosen[:top])

    def _describe(self, chosen):
        with torch.inference_mode():
            found = self.gallery[[i for i, _ in chosen]].float().to(self.device)
            sure, predicted = self.calibration.probabilities(self.model.classify(found).cpu()).max(1)
        results = []
        for (i, score), p, c in zip(chosen, sure.tolist(), predicted.tolist(), strict=True):
            sample = self.samples[i]
            result = {"rank": len(results) + 1, "score": round(score, 4), "image": str(sample.image)}
            result |= {"class": sample.label, "predicted": self.metadata.classes[c], "probability": round(p, 4)}
            result |= {"captions": sample.captions, "group": sample.group, "row": i}
            results.append(result | {"of_group": len(self.groups.get(sample.group, [i]))})
        return results


def _known_label(sample, classes):
    """A folder's name is a label only if the run knows such a class, however it is spelled."""
    same = [name for name in classes if plain_name(name) == plain_name(sample.label or "")]
    return replace(sample, label=sample.label if sample.label in classes else same[0] if len(same) == 1 else None)


def mixed(text, image, mix):
    """(1, D) of a text, of an image, or None for either → (1, D), on the great circle between them: mix 0 is the image
    alone, 1 the text alone."""
    if text is None or image is None:
        return image if text is None else text
    return slerp(image, text, mix)


# ---------------------------------------------------------------------------------------------------------------------
# What a user should know of an answer

STOP = {"a", "an", "the", "of", "in", "on", "at", "with", "and", "or", "to", "for", "from", "by", "is", "are", "be"}
STOP |= {"no", "not", "without", "before", "after", "both", "between", "some"}


def vocabulary(metadata, captions):
    """→ all words that a run was trained with."""
    texts = [*captions, *metadata.classes, *(prompt for of_class in metadata.prompts.values() for prompt in of_class)]
    return {word for text in texts for word in words(text)}


def words(text):
    """→ its words, in lower case, but for those that any text has."""
    found = re.findall(r"[^\W\d_]+", unicodedata.normalize("NFC", text).lower())
    return [word for word in dict.fromkeys(found) if word not in STOP]


def unknown_words(text, known):
    """→ a note about the words of a text that training never saw, or nothing. A text always finds something, and its
    cosines do not tell whether it makes sense here (tests/benchmarks/nonsense.py); its words do."""
    asked = words(text)
    new = [word for word in asked if word not in known]
    if not new:
        return ""
    most = len(new) > len(asked) / 2
    return f"training never saw: {', '.join(new)}" + ("; probably nothing here matches" if most else "")


def about(run, metadata, count, metrics):
    """What stands above every answer: the run, its classes, the number of images, figures, its date."""
    figures = {}
    if metrics:
        names = {"accuracy": "accuracy", "i2i_mrr": "image→image MRR", "t2i_mrr": "text→image MRR"}
        figures = {name: round(metrics[key], 3) for key, name in names.items() if metrics.get(key) is not None}
    date = time.strftime("%Y-%m-%d", time.localtime((run / "adapter.safetensors").stat().st_mtime))
    held_out = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
    line = f"{run}, {date}: {count:,} images, {len(metadata.classes)} classes"
    line += f"; held out: {held_out}" if held_out else ""
    return {"line": f"{line}; not a medical device", "classes": metadata.classes}
