"""Class-specific prompts: what a clinician would say to describe a class, in several ways.

CLIP compares images with sentences (a *prompt* is a sentence that stands for a class), so a class is as good as its
prompts: `python prompts.py` classifies phantoms zero-shot with several wordings. The seven classes of the ENTRep
challenge have prompts by hand; any other class name is put into templates; a JSON file overrides both:

    {"polyp": ["a smooth pale polyp on the vocal fold", "…"], …}

Source: arXiv 2509.00752 (the idea; the wording is ours), CLIP's prompt ensembles (arXiv 2103.00020, section 3.1.4).

Try changing this: in `main`, put CLIP's own template, "a photo of a {}", in place of ours: 0.757 instead of 0.643, so
measure which words a model understands. Give each ear the prompts of the other: 0.857 falls to 0.657.
"""

import re
import unicodedata

from errors import UserError
from files import read_json

TEMPLATES = (
    "an endoscopic image of {}",
    "endoscopy showing {}",
    "a view of {} through an endoscope",
    "an ENT examination with {}",
    "a close-up endoscopic photograph of {}",
)

# What separates words in a name; signs stay, as HPV+ and HPV- are different classes.
NO_WORD = r"[^\w+<>≤≥=#-]+|_+|(?<=\w)-(?=\w)"

# The patient's right side is on the left of the picture: the septum of the right nasal cavity lies on the picture's
# right. The eardrum's cone of light points forwards and down: to 5 o'clock in a right ear, to 7 in a left one. The
# classes are in the order of the challenge's numbers, 0 to 6.
ENTREP_PROMPTS = {
    "nose-right": (
        "nasal endoscopy of the right nasal cavity",
        "the right nostril from inside, with the septum on the right of the picture",
        "the right nasal cavity with the inferior and middle turbinates on the left of the picture",
        "an endoscopic image of the right side of the nose",
        "pink nasal mucosa and turbinates of the right nasal passage",
    ),
    "nose-left": (
        "nasal endoscopy of the left nasal cavity",
        "the left nostril from inside, with the septum on the left of the picture",
        "the left nasal cavity with the inferior and middle turbinates on the right of the picture",
        "an endoscopic image of the left side of the nose",
        "pink nasal mucosa and turbinates of the left nasal passage",
    ),
    "ear-right": (
        "otoscopy of the right ear",
        "the right eardrum with the cone of light at 5 o'clock",
        "the right tympanic membrane and the handle of the malleus",
        "an endoscopic image of the right ear canal and eardrum",
        "a right ear examined with an otoendoscope",
    ),
    "ear-left": (
        "otoscopy of the left ear",
        "the left eardrum with the cone of light at 7 o'clock",
        "the left tympanic membrane and the handle of the malleus",
        "an endoscopic image of the left ear canal and eardrum",
        "a left ear examined with an otoendoscope",
    ),
    "vc-open": (
        "laryngoscopy with open vocal cords",
        "abducted vocal folds during breathing, the glottis a dark V",
        "the larynx in inspiration with the vocal cords apart",
        "an endoscopic image of the open glottis with the trachea below",
        "vocal folds wide open",
    ),
    "vc-closed": (
        "laryngoscopy with closed vocal cords",
        "adducted vocal folds during phonation, the glottis a thin line",
        "the larynx while speaking, with the vocal cords together",
        "an endoscopic image of the closed glottis",
        "vocal folds touching in the midline",
    ),
    "throat": (
        "an endoscopic image of the throat",
        "the oropharynx with the uvula and the palatine tonsils",
        "the soft palate, uvula and posterior pharyngeal wall",
        "a view into the mouth to the back of the throat",
        "pharyngoscopy of the oropharynx",
    ),
}


def class_prompts(classes, file=None):
    """Class names → {class: [prompt, …]}, in the order of `classes`.

    file: a JSON file of the user's own prompts; classes it leaves out keep theirs. Raises UserError where the file is
    not such a JSON object or names a class that is not among `classes`.
    """
    own = _read(file) if file else {}
    unknown = sorted(own.keys() - set(classes))
    if unknown:
        known = ", ".join(classes)
        raise UserError(f"{file} has prompts for {', '.join(unknown)}; rename them to classes of the data, {known}")
    return {name: list(own.get(name) or _default(name)) for name in classes}


def _default(name):
    words = re.sub(NO_WORD, " ", name).strip() or name
    return ENTREP_PROMPTS.get(words.lower().replace(" ", "-")) or [template.format(words) for template in TEMPLATES]


def _read(file):
    own = read_json(file)
    ok = isinstance(own, dict) and all(
        isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
        for texts in own.values()
    )
    if not ok:
        raise UserError(f'{file} should be a JSON object like {{"class": ["a prompt", "another"], …}}')
    return {unicodedata.normalize("NFC", name.strip()): texts for name, texts in own.items()}


def plain_name(name):
    """A class's name as it is compared: ear_left and Ear Left are the same."""
    return re.sub(NO_WORD, "-", name.casefold())


def main():
    """Zero-shot classification of phantoms with the small CLIP, by several wordings of the same classes."""
    import torch
    import torch.nn.functional as F

    from build import load_base
    from images import preprocess
    from phantom import phantom

    for name, prompts in class_prompts(["ear-left", "vocal_fold_polyp"]).items():
        print(f"{name}: {prompts[0]!r}, {prompts[1]!r}, …")
    clip, tokenizer = load_base("phantom")
    images, labels, _ = zip(*(phantom(i, scope="B", seed=5) for i in range(140)), strict=True)
    classes = torch.tensor([list(ENTREP_PROMPTS).index(label) for label in labels])
    words = [name.replace("-", " ") for name in ENTREP_PROMPTS]
    wordings = {
        "the class name": [[word] for word in words],
        # The templates are meant for CLIP, which knows many words; the small one has read ours by hand and few others.
        "templates": [[template.format(word) for template in TEMPLATES] for word in words],
        "one prompt by hand": [prompts[:1] for prompts in ENTREP_PROMPTS.values()],
        "five prompts by hand": ENTREP_PROMPTS.values(),  # no gain here: the small CLIP was trained on each of them
    }
    with torch.no_grad():
        embeddings = clip.encode_image(torch.stack([preprocess(image, clip.config.image_size) for image in images]))
        for name, texts in wordings.items():
            of_class = [F.normalize(clip.encode_text(tokenizer(list(t))), dim=1).mean(0) for t in texts]
            cosines = F.normalize(embeddings, dim=1) @ F.normalize(torch.stack(of_class), dim=1).T
            accuracy = (cosines.argmax(1) == classes).double().mean()
            print(f"{name:20}  zero-shot accuracy on 140 phantoms of scope B: {accuracy:.3f}")


if __name__ == "__main__":
    main()
