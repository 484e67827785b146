"""The images that a search answers from, and the model that answers."""

import re
import string
import time
import unicodedata
from dataclasses import replace

import torch

from calibration import Calibration
from encoding import encode_images, encode_texts
from errors import UserError
from images import find_duplicates, look_at
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
        self.groups, self.looks = {}, {}  # group: its rows; image: what tells copies of it
        for row, sample in enumerate(self.samples):
            if sample.group:
                self.groups.setdefault(sample.group, []).append(row)

    def group_of(self, row):
        """→ the rows of an image's group, only its own where it has none."""
        return self.groups.get(self.samples[row].group, [row])

    def of_text(self, text):
        """→ (1, D)"""
        return encode_texts(self.model, self.tokenizer, [text], self.device)

    def of_image(self, file):
        """An image file, also an open one → (1, D)"""
        return encode_images(self.model, [file], self.device, 1, 0, None)

    def search(self, query, top, rows=None, per_group=False, without=None):
        """The images most similar to the query, (1, D) → a dict each, best first: rank, score (the cosine), image,
        class (None where unknown), predicted class and its probability, captions, group, row, that of the gallery,
        of_group, how many images its group has here, and copies, how many that were found are copies of it.

        rows: (M,), which of them are searched; without it all are. per_group: only the nearest of each group, as the
        frames of a video are nearly the same picture, and of copies. without: a row; it and its group are left out, as
        the evaluation does it."""
        own = [] if without is None else self.group_of(without)
        searched = self.gallery if rows is None else self.gallery[rows]
        count, chosen, copies, left_out = 2 * top + len(own), [], {}, set(own)
        while len(searched):
            scores, found = nearest(query, searched, count)
            found = found[0] if rows is None else rows[found[0]]
            pairs = zip(found.tolist(), scores[0].tolist(), strict=True)
            chosen = [pair for pair in pairs if pair[0] not in left_out]
            if per_group:
                first = {}
                for row, score in chosen:
                    first.setdefault(self.samples[row].group or row, (row, score))
                chosen, copies = self._without_copies(list(first.values()))
            if len(chosen) >= top or count >= len(searched):
                break
            count *= 4  # they were of few groups, or copies
        return self._describe(chosen[:top], copies) if chosen else []

    def _without_copies(self, chosen):
        """(row, score) pairs, best first → the same without copies of better ones, and {row: how many there were}. An
        embedding does not tell copies from images that are alike; what they look like does (images.py)."""
        files = [self.samples[row].image for row, _ in chosen]
        self.looks |= look_at([file for file in files if file not in self.looks], workers=0)[0]
        same = find_duplicates({file: self.looks[file] for file in files if file in self.looks})
        number = {image: i for i, images in enumerate(same) for image in images}
        first, copies = {}, {}
        for row, score in chosen:
            key = number.get(self.samples[row].image, self.samples[row].image)
            best, _ = first.setdefault(key, (row, score))
            copies[best] = copies.get(best, -1) + 1
        return list(first.values()), copies

    def _describe(self, chosen, copies):
        with torch.inference_mode():
            found = self.gallery[[i for i, _ in chosen]].float().to(self.device)
            sure, predicted = self.calibration.probabilities(self.model.classify(found).cpu()).max(1)
        results = []
        for (i, score), p, c in zip(chosen, sure.tolist(), predicted.tolist(), strict=True):
            sample = self.samples[i]
            result = {"rank": len(results) + 1, "score": round(score, 4), "image": str(sample.image)}
            result |= {"class": sample.label, "predicted": self.metadata.classes[c], "probability": round(p, 4)}
            result |= {"captions": sample.captions, "group": sample.group, "row": i}
            results.append(result | {"of_group": len(self.group_of(i)), "copies": copies.get(i, 0)})
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

PUNCTUATION = string.punctuation + "“”„‘’…–—«»"


class Vocabulary:
    """All words that a run was trained with. captions: its own, None where nobody knows them any more."""

    def __init__(self, metadata, captions):
        prompts = [prompt for of_class in metadata.prompts.values() for prompt in of_class]
        texts = [*(captions or ()), *metadata.classes, *prompts]
        self.words = None if captions is None else {stem(word) for text in texts for word in words(text)}
        self.only = metadata.settings.weights in ("phantom", "scratch")  # their base models have read nothing else

    def note(self, text):
        """→ a note about the words of a text that training never saw, or nothing. A text always finds something, and
        its cosines do not tell whether it makes sense here (tests/benchmarks/nonsense.py); its words do, where the base
        model knows no others."""
        asked = words(text)
        new = [word for word in asked if stem(word) not in self.words] if self.words is not None else []
        if not new:
            return ""
        never = f"training never saw: {', '.join(new)}"
        if not self.only:
            return f"{never}; the base model may know {'it' if len(new) == 1 else 'them'}"
        return never + "; probably nothing here matches" * (len(new) > len(asked) / 2)


def words(text):
    """→ its words, in lower case, but for those that any text has; none in scripts without spaces between words."""
    found = [word.strip(PUNCTUATION) for word in unicodedata.normalize("NFC", text).lower().split()]
    found = [part for word in found for part in re.split("[-/,;:]+", word) if part]
    return [word for word in dict.fromkeys(found) if word not in STOP and not any(map(_joined, word))]


def stem(word):
    """eardrums → eardrum: a plural is no new word."""
    return word.removesuffix("s") if len(word) > 3 else word


def _joined(letter):
    return unicodedata.name(letter, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"))


def about(run, metadata, count, metrics):
    """What stands above every answer: the run, its classes, the number of images, figures, its date."""
    names = {"accuracy": "accuracy", "i2i_mrr": "image→image MRR", "t2i_mrr": "text→image MRR"}
    known = {name: (metrics or {}).get(key) for key, name in names.items()}
    held_out = ", ".join(f"{name} {value:.3f}" for name, value in known.items() if isinstance(value, float))
    date = time.strftime("%Y-%m-%d", time.localtime((run / "adapter.safetensors").stat().st_mtime))
    line = f"{run}, {date}: {count:,} images, {len(metadata.classes)} classes"
    line += f"; held out: {held_out}" if held_out else ""
    return {"line": f"{line}; not a medical device", "classes": metadata.classes}
