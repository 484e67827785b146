"""Which score tells a text that an archive can answer from one that it cannot? As AUROC: the chance that a text of the
first kind scores higher than one of the second.

    python tests/benchmarks/nonsense.py RUN [RUN …]

The texts are below. Those of the first kind are written in other words than a run's captions and prompts.

    nearest             cosine of the nearest image
    spread              the same, in standard deviations over all images
    percentile          the same, among those of the archive's own captions and prompts
    above mean          cosine of the nearest image, less the mean of all
    known text          cosine of the nearest caption or prompt
    known words         share of the text's words that are among those of captions, prompts and classes
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from archive import Vocabulary, stem, words
from build import load_run
from encoding import encode_texts
from index import index_images
from split_file import trained_captions
from trust import find_samples

CPU = torch.device("cpu")
ENT = """an eardrum with a hole
hole in the left eardrum
right ear drum perforation
wax in the right ear
ear canal with wax
left ear, red and inflamed
fluid behind the right eardrum
a normal left ear
a healthy right ear
polyp in the nose
left nostril with a polyp
nasal polyp, right side
a deviated septum with a spur
mucus in the left nasal cavity
normal nasal cavity
red swollen nose on the right
open vocal cords
closed vocal cords
vocal folds with nodules
a polyp on the vocal cord
larynx with red vocal folds
mucus on the vocal folds
healthy larynx
throat with large tonsils
white spots on the tonsils
swollen uvula in the throat
red throat
normal throat
picture of the left ear
picture of the right nose
eardrums with perforations
adhesions of the eardrum"""
LARYNX = """tumor on the vocal fold
a vocal fold with a tumor before the operation
instruments on the vocal folds
surgical instruments in the larynx
laser wound on the vocal fold
the vocal fold after the laser
a healthy vocal fold
healthy vocal folds without instruments
a tube between the vocal folds
operation with forceps at the larynx
wound after the removal of a tumor
a clear view of the vocal folds
laryngeal cancer before surgery
vocal fold, tumor, no tube
vocal folds, instruments and a tube"""
NONSENSE = """a photo of a cat
a red car
the annual report of a bank
mountains in the snow
a bowl of soup
two people on a beach
a dog with a ball
the left wing of an airplane
a house with a red roof
green apples
an old map of europe
x-ray of a broken leg
a fractured wrist
ultrasound of a kidney
skin with a mole
retina with bleeding
a tooth with caries
colon polyp
chess board
football match
a screenshot of a program
handwritten letters
a violin on a table
the number seven
asdf qwer zxcv
lorem ipsum dolor
a bicycle
a train at the station
flowers in a vase
a night sky with stars"""


def texts_of(metadata, samples):
    captions = [caption for sample in samples for caption in sample.captions]
    return list(dict.fromkeys([*captions, *(text for of_class in metadata.prompts.values() for text in of_class)]))


def scores(run, texts):
    """→ {score: (texts,)}"""
    model, tokenizer, metadata = load_run(run, CPU)
    samples = find_samples(None, metadata, run)
    _, gallery, _ = index_images(run, model, [sample.image for sample in samples], CPU, 32, 2)
    gallery = gallery.float()

    def unit(some):
        return F.normalize(encode_texts(model, tokenizer, some, CPU), dim=1)

    known = unit(texts_of(metadata, samples))
    queries = unit(texts)
    cosines, nearest = queries @ gallery.T, (queries @ gallery.T).amax(1)
    trained = Vocabulary(metadata, trained_captions(run)).words
    share = torch.tensor([sum(stem(word) in trained for word in words(t)) / max(1, len(words(t))) for t in texts])
    own = (known @ gallery.T).amax(1).sort().values
    return {
        "nearest": nearest,
        "spread": (nearest - cosines.mean(1)) / cosines.std(1),
        "above mean": nearest - cosines.mean(1),
        "percentile": torch.searchsorted(own, nearest, right=True) / len(own),
        "known text": (queries @ known.T).amax(1),
        "known words": share,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    for run in parser.parse_args().runs:
        metadata = load_run(run, CPU)[2]
        real, nonsense = (ENT if "throat" in metadata.classes else LARYNX).splitlines(), NONSENSE.splitlines()
        labels = [1] * len(real) + [0] * len(nonsense)
        print(f"{run}: {len(real)} texts that have an answer, {len(nonsense)} that have none")
        for name, values in scores(run, real + nonsense).items():
            print(f"  {name:22} {roc_auc_score(labels, values.tolist()):.3f}")


if __name__ == "__main__":
    main()
