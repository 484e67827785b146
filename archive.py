"""The images that a search answers from, and the model that answers."""

import torch

from calibration import Calibration
from encoding import encode_images, encode_texts
from errors import UserError
from kernels import slerp, top_k


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
        self.samples, self.gallery = samples, gallery

    def of_text(self, text):
        """→ (1, D)"""
        return encode_texts(self.model, self.tokenizer, [text], self.device)

    def of_image(self, file):
        """An image file, also an open one → (1, D)"""
        return encode_images(self.model, [file], self.device, 1, 0, None)

    def search(self, query, top, rows=None):
        """The images most similar to the query, (1, D) → a dict each, best first: rank, score (the cosine), image,
        class (None where unknown), predicted class and its probability, captions, group, and row, that of the gallery.
        rows: (M,), which of them are searched; without it all are."""
        gallery = self.gallery if rows is None else self.gallery[rows]
        scores, indices = nearest(query, gallery, top)
        indices = indices[0] if rows is None else rows[indices[0]]
        found = self.gallery[indices].float().to(self.device)
        with torch.inference_mode():
            sure, predicted = self.calibration.probabilities(self.model.classify(found).cpu()).max(1)
        results = []
        for score, i, p, c in zip(scores[0].tolist(), indices.tolist(), sure.tolist(), predicted.tolist(), strict=True):
            sample = self.samples[i]
            result = {"rank": len(results) + 1, "score": round(score, 4), "image": str(sample.image)}
            result |= {"class": sample.label, "predicted": self.metadata.classes[c], "probability": round(p, 4)}
            results.append(result | {"captions": sample.captions, "group": sample.group, "row": i})
        return results


def mixed(text, image, mix):
    """(1, D) of a text, of an image, or None for either → (1, D), on the great circle between them: mix 0 is the image
    alone, 1 the text alone."""
    if text is None or image is None:
        return image if text is None else text
    return slerp(image, text, mix)
