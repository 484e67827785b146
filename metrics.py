"""The figures the paper reports: accuracy and macro-F1 for classification, Recall@K and MRR for retrieval.

    accuracy     share of images that got their class
    recall       of a class: share of its images that were recognized
    precision    of a class: share of the images called so that are
    F1           the harmonic mean of the two; macro-F1 averages it over classes, so a rare class counts as much as any
    Recall@K     share of queries with a relevant image among the first K answers (one is enough); short R@K
    MRR          mean reciprocal rank: the mean of 1 / rank of the first relevant answer

How far can a figure be trusted? Another set of test images would give another figure. The *bootstrap* imitates other
sets: it draws as many images from the set, with replacement, computes the figure, and repeats that a thousand times.
The middle 95 % of the results are the figure's interval. Images of one group resemble each other, and are drawn
together; of fewer than ten groups there is no interval. In image→image search only the queries are drawn, as drawing
the searched images, too, would take a thousand searches.

Try changing this: let ties count for the model (`scores > best + TIE` in `first_relevant_ranks`): a model that gives
every image the same embedding then has an MRR of 1 instead of the worst possible.
"""

import torch
import torch.nn.functional as F


def confusion_matrix(labels, predictions, num_classes):
    """(N,) true and (N,) predicted class numbers → (num_classes, num_classes) counts, a row for each true class."""
    # Each pair (label, prediction) is one number, and bincount counts how often each number occurs.
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def accuracy(confusion):
    """(num_classes, num_classes) → share of images on the diagonal."""
    return confusion.diagonal().sum().item() / confusion.sum().item()


def macro_f1(confusion):
    """The mean F1 over the classes that occur among labels or predictions, as scikit-learn defines it."""
    correct, labelled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    occurs = labelled + predicted > 0
    return (2 * correct.double() / (labelled + predicted))[occurs].mean().item()


def by_class(confusion, classes):
    """→ {class: {"images": how many there are, "recall": share of them recognized, "precision": share of those called
    so that are}}; None where there is nothing to share."""
    rows = zip(
        classes, confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist(), strict=True
    )
    return {
        name: {"images": n, "recall": hit / n if n else None, "precision": hit / called if called else None}
        for name, hit, n, called in rows
    }


STRIP = 2**20  # cosines held at once, 4 MB
TIE = 1e-6  # of float32's cosines: what is nearer than that may differ by rounding alone


class Shared:
    """Who has a name in common with whom: a (Q, N) table of bool whose rows are made when they are asked for, as all of
    them may not fit into memory. queries, gallery: for each of Q and N items a collection of hashable names."""

    def __init__(self, queries, gallery):
        self.queries, self.size, places = list(queries), len(gallery), {}
        for place, names in enumerate(gallery):
            for name in names:
                places.setdefault(name, []).append(place)
        self.places = {name: torch.tensor(of_name) for name, of_name in places.items()}

    def __getitem__(self, rows):
        """rows: a slice → (n, N) bool"""
        table = torch.zeros(len(self.queries[rows]), self.size, dtype=torch.bool)
        for row, names in zip(table, self.queries[rows], strict=True):
            for name in names:
                if name in self.places:
                    row[self.places[name]] = True
        return table


def first_relevant_ranks(queries, gallery, relevant, exclude=None):
    """The rank, from 1 on, of the best-placed relevant gallery item for each query → (Q,) float32, NaN where it has
    none.

    queries: (Q, D), gallery: (N, D) features, ranked by cosine; relevant: (Q, N) bool or `Shared`; exclude: likewise,
    items not to be ranked (a query image itself). Ties count against us: an irrelevant item with the same score ranks
    first, so that a model that maps everything to one point scores as badly as it should. Only a strip of the (Q, N)
    cosines is held at once.
    """
    queries, gallery = F.normalize(queries, dim=1), F.normalize(gallery, dim=1)
    step, ranks = max(1, STRIP // max(1, len(gallery))), [torch.empty(0)]
    for rows in (slice(first, first + step) for first in range(0, len(queries), step)):
        scores, wanted = queries[rows] @ gallery.T, relevant[rows]
        irrelevant = ~wanted
        if exclude is not None:
            searched = ~exclude[rows]
            wanted, irrelevant = wanted & searched, irrelevant & searched
        best = scores.masked_fill(~wanted, -torch.inf).amax(1, keepdim=True)
        # What is not clearly behind counts as ahead. Any comparison with NaN is false, so a NaN counts against us, too.
        ahead = irrelevant & ~(scores < best - TIE)
        ranks.append(torch.where(wanted.any(1), 1 + ahead.sum(1), torch.nan))
    return torch.cat(ranks)


def retrieval_metrics(ranks, ks=(1, 5, 10)):
    """(Q,) ranks of the first relevant answers, NaN without one → {"recall@K": …, "mrr": …} over those that have one;
    None for each if none has."""
    ranks = ranks[~ranks.isnan()]
    if len(ranks) == 0:
        return {**{f"recall@{k}": None for k in ks}, "mrr": None}
    ranks = ranks.double()
    return {**{f"recall@{k}": (ranks <= k).double().mean().item() for k in ks}, "mrr": (1 / ranks).mean().item()}


# ---------------------------------------------------------------------------------------------------------------------
# The bootstrap


FEWEST_GROUPS = 10  # with fewer, the resamples are too much alike to tell anything


def resample(groups, times=1000):
    """(N,) group numbers from 0 on → (times, N) float32: how often each image was drawn, whole groups at a time."""
    count, generator = int(groups.max()) + 1, torch.Generator().manual_seed(0)
    drawn = torch.randint(count, (times, count), generator=generator)
    times_drawn = torch.zeros(times, count).scatter_add_(1, drawn, torch.ones(times, count))
    return times_drawn[:, groups]


def interval(samples):
    """(times,) figures of the resamples, NaN where there was none → [low, high], the middle 95 %."""
    return torch.nanquantile(samples.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def classification_intervals(labels, predictions, num_classes, weights):
    """(N,), (N,) class numbers; weights: as `resample` gives → {"accuracy": [low, high], "macro_f1": …}"""
    weights = weights.double()
    labelled, predicted = (F.one_hot(x, num_classes).double() for x in (labels, predictions))
    correct = weights @ (labelled * predicted)  # (times, classes)
    f1 = 2 * correct / (weights @ labelled + weights @ predicted)  # NaN where a class was not drawn
    return {"accuracy": interval(correct.sum(1) / weights.sum(1)), "macro_f1": interval(f1.nanmean(1))}


def retrieval_intervals(ranks, weights):
    """(times, Q) or (Q,) ranks of the first relevant answers, NaN without one; weights: (times, Q), how often each
    query was drawn → {"recall@1": [low, high], "mrr": …}"""
    weights = weights.double() * ~ranks.isnan()
    first, reciprocal = ranks == 1, (1 / ranks.double()).nan_to_num()
    first, reciprocal = ((values * weights).sum(1) / weights.sum(1) for values in (first, reciprocal))
    return {"recall@1": interval(first), "mrr": interval(reciprocal)}


def ranks_in_resamples(queries, gallery, relevant, weights):
    """The rank of each query's first relevant item in resampled galleries → (times, Q), NaN where none was drawn."""
    scores = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T - TIE * relevant  # ties count against us
    order = scores.argsort(1, descending=True)
    ranks = []
    for its_order, its_relevant in zip(order, relevant, strict=True):
        for some in (its_order[:200], its_order):  # best first; mostly a relevant one is drawn among the first few
            drawn, hit = weights[:, some], its_relevant[some]
            found = (drawn > 0) & hit
            if found.any(1).all():
                break
        ahead = (drawn * ~hit).cumsum(1)  # irrelevant items so far
        rank = 1 + ahead.gather(1, found.int().argmax(1, keepdim=True))[:, 0]
        ranks.append(rank.masked_fill(~found.any(1), torch.nan))
    return torch.stack(ranks, dim=1)


def main():
    labels, predictions = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0])
    confusion = confusion_matrix(labels, predictions, 3)
    print("confusion (row: true class)", confusion.tolist())
    for name, row in by_class(confusion, "abc").items():
        print(f"class {name}: {row}")
    print(f"accuracy {accuracy(confusion):.3f}, macro-F1 {macro_f1(confusion):.3f} (the rare class drags it down)")
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    relevant = torch.tensor([[False, True, False], [False, False, True]])
    ranks = first_relevant_ranks(torch.tensor([[1.0, 0.0], [0.1, 1.0]]), gallery, relevant)
    print(f"first relevant answers at rank {ranks.tolist()}: {retrieval_metrics(ranks, ks=(1, 2))}")
    ranks = first_relevant_ranks(torch.ones(2, 2), torch.ones(3, 2), relevant)
    print(f"if all embeddings are the same, at rank {ranks.tolist()}: {retrieval_metrics(ranks, ks=(1, 2))}")


if __name__ == "__main__":
    main()
