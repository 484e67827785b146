"""metrics: classification against scikit-learn, retrieval against counts by hand and a brute-force sort."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from torch.nn.functional import normalize, one_hot

import metrics
from metrics import (
    Shared,
    accuracy,
    by_class,
    classification_intervals,
    confusion_matrix,
    first_relevant_ranks,
    interval,
    macro_f1,
    ranks_in_resamples,
    resample,
    retrieval_intervals,
    retrieval_metrics,
)

examples = settings(deadline=None, max_examples=100, derandomize=True)
pytestmark = pytest.mark.filterwarnings("ignore:A single label was found")  # scikit-learn, of one class


# --- classification --------------------------------------------------------------------------------------------------


def assert_as_in_scikit_learn(labels, predictions, num_classes):
    confusion = confusion_matrix(torch.tensor(labels), torch.tensor(predictions), num_classes)
    expected = sklearn_metrics.confusion_matrix(labels, predictions, labels=range(num_classes))
    assert confusion.tolist() == expected.tolist()
    assert accuracy(confusion) == pytest.approx(sklearn_metrics.accuracy_score(labels, predictions), rel=1e-6)
    expected = sklearn_metrics.f1_score(labels, predictions, average="macro", zero_division=0)
    assert macro_f1(confusion) == pytest.approx(expected, rel=1e-6)
    precision, recall, _, support = sklearn_metrics.precision_recall_fscore_support(
        labels, predictions, labels=range(num_classes), zero_division=math.nan
    )
    rows = by_class(confusion, range(num_classes))
    assert [row["images"] for row in rows.values()] == support.tolist()
    for name, theirs in (("precision", precision), ("recall", recall)):
        ours = [math.nan if row[name] is None else row[name] for row in rows.values()]
        assert ours == pytest.approx(theirs.tolist(), nan_ok=True)


@given(st.integers(1, 8), st.data())
@examples
def test_classification_figures_are_scikit_learns(num_classes, data):
    classes = st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=60)
    labels = data.draw(classes)
    predictions = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=len(labels), max_size=len(labels)))
    assert_as_in_scikit_learn(labels, predictions, num_classes)


DEGENERATE = [
    ([0, 1, 2], [0, 1, 2], 3),  # all right
    ([0, 1, 2], [1, 2, 0], 3),  # all wrong
    ([0, 0, 2, 2], [0, 2, 2, 2], 3),  # class 1 occurs nowhere
    ([0, 0, 2, 2], [0, 1, 2, 1], 3),  # class 1 is only predicted
    ([0, 1, 1, 2], [0, 0, 2, 2], 3),  # class 1 is never predicted
    ([0, 1, 2, 3], [3, 3, 3, 3], 7),  # one answer for everything, three classes absent
    ([0], [0], 1),
]


@pytest.mark.parametrize("labels, predictions, num_classes", DEGENERATE)
def test_classification_figures_with_absent_and_never_predicted_classes(labels, predictions, num_classes):
    assert_as_in_scikit_learn(labels, predictions, num_classes)


def test_a_confusion_matrix_has_a_row_for_each_true_class():
    confusion = confusion_matrix(torch.tensor([0, 0, 2]), torch.tensor([1, 1, 0]), 3)
    assert confusion.tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]


def test_figures_are_not_rounded_to_float32():
    confusion = confusion_matrix(torch.zeros(10).long(), torch.tensor([0] * 9 + [1]), 2)
    figures = retrieval_metrics(torch.tensor([3]))
    assert (accuracy(confusion), macro_f1(confusion), figures["mrr"]) == pytest.approx(
        (9 / 10, 9 / 19, 1 / 3), rel=1e-12
    )


# --- retrieval -------------------------------------------------------------------------------------------------------


def at_angles(degrees):
    """Plane vectors, for which a cosine is easily ranked by hand."""
    radians = torch.tensor(degrees).double().deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1)


def ranks_by_sorting(queries, gallery, relevant, exclude):
    """Sort each query's items, irrelevant ones first among equals, and look for the first relevant one."""
    ranks = []
    for query, is_relevant, is_excluded in zip(queries.tolist(), relevant.tolist(), exclude.tolist(), strict=True):
        items = []
        for item, r, e in zip(gallery.tolist(), is_relevant, is_excluded, strict=True):
            lengths = math.hypot(*query) * math.hypot(*item) or 1
            cosine = sum(q * g for q, g in zip(query, item, strict=True)) / lengths
            items += [] if e else [(-round(cosine, 9), r)]
        found = [rank for rank, (_, r) in enumerate(sorted(items), 1) if r]
        ranks += found[:1]
    return ranks


def test_ranks_counted_by_hand():
    gallery = at_angles([0, 10, 20, 30, 180])
    queries = at_angles([0, 16, 29])  # from the nearest on: 0 1 2 3 4; 2 1 3 0 4; 3 2 1 0 4
    relevant = torch.zeros(3, 5, dtype=torch.bool)
    relevant[0, 0] = relevant[1, 3] = relevant[1, 0] = relevant[2, 4] = True
    ranks = first_relevant_ranks(queries, gallery, relevant)
    assert ranks.tolist() == [1, 3, 5]
    assert first_relevant_ranks(7 * queries, 0.1 * gallery, relevant).tolist() == [1, 3, 5]  # lengths do not matter
    expected = {"recall@1": 1 / 3, "recall@2": 1 / 3, "recall@3": 2 / 3, "recall@5": 1, "mrr": (1 + 1 / 3 + 1 / 5) / 3}
    assert retrieval_metrics(ranks, ks=(1, 2, 3, 5)) == pytest.approx(expected)


def test_an_irrelevant_item_of_the_same_score_ranks_first():
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    relevant = torch.tensor([[True, False, False, False], [True, True, False, False], [False, False, False, True]])
    assert first_relevant_ranks(torch.tensor([[1.0, 0.0]] * 3), gallery, relevant).tolist() == [3, 2, 4]


@pytest.mark.parametrize("longer", [1.0, 3.0])
def test_a_model_that_maps_everything_to_one_direction_ranks_last(longer):
    """Equal cosines come out of a matrix product a rounding apart; they are ties all the same."""
    for N, D in ((5, 17), (5, 64), (33, 64), (64, 512)):
        features = torch.randn(D, generator=torch.Generator().manual_seed(0)).repeat(N, 1)
        features[::2] *= longer
        ranks = first_relevant_ranks(features, features, torch.eye(N, dtype=torch.bool))
        assert ranks.tolist() == [N] * N, (N, D)


def test_features_that_are_not_numbers_rank_last():
    features = torch.full((4, 3), torch.nan)
    assert first_relevant_ranks(features, features, torch.eye(4, dtype=torch.bool)).tolist() == [4] * 4


def test_a_query_image_itself_is_not_ranked():
    features = at_angles([0, 5, 90, 100])
    itself = torch.eye(4, dtype=torch.bool)
    same_class = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]).bool()
    assert first_relevant_ranks(features, features, same_class).tolist() == [1, 1, 1, 1]
    assert first_relevant_ranks(features, features, same_class, exclude=itself).tolist() == [2, 3, 3, 2]
    assert first_relevant_ranks(features, features, itself, exclude=itself).isnan().all()  # nothing else is relevant


def test_queries_without_a_relevant_item_are_left_out():
    gallery = at_angles([0, 10, 20])
    relevant = torch.tensor([[False, False, False], [False, False, True], [False, False, False]])
    ranks = first_relevant_ranks(at_angles([0, 0, 20]), gallery, relevant)
    assert ranks.isnan().tolist() == [True, False, True] and ranks[1] == 3
    assert retrieval_metrics(ranks)["recall@5"] == 1


def test_without_any_query_the_figures_are_none():
    ranks = first_relevant_ranks(at_angles([0, 1]), at_angles([0]), torch.zeros(2, 1, dtype=torch.bool))
    assert retrieval_metrics(ranks) == {"recall@1": None, "recall@5": None, "recall@10": None, "mrr": None}
    assert retrieval_metrics(ranks, ks=(3,)) == {"recall@3": None, "mrr": None}


@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 6), st.booleans(), st.floats(0, 1), st.integers(0, 9999))
@examples
def test_ranks_equal_those_of_a_sort(Q, N, D, ties, share, seed):
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = (torch.randn(size, D, generator=generator) for size in (Q, N))
    if ties:  # few distinct vectors, zeros among them
        queries, gallery = queries.round().clamp(-1, 1), gallery.round().clamp(-1, 1)
    relevant, exclude = (torch.rand(Q, N, generator=generator) < p for p in (share, 0.2))
    ranks = first_relevant_ranks(queries, gallery, relevant, exclude)
    expected = ranks_by_sorting(queries, gallery, relevant, exclude)
    assert ranks[~ranks.isnan()].tolist() == expected
    figures = retrieval_metrics(ranks, ks=(1, 4))
    if expected:
        assert figures["recall@1"] == pytest.approx(sum(r <= 1 for r in expected) / len(expected))
        assert figures["recall@4"] == pytest.approx(sum(r <= 4 for r in expected) / len(expected))
        assert figures["mrr"] == pytest.approx(sum(1 / r for r in expected) / len(expected), rel=1e-6)
    else:
        assert figures == {"recall@1": None, "recall@4": None, "mrr": None}


def test_mrr_with_one_relevant_item_each_is_scikit_learns_label_ranking_precision():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (normalize(torch.randn(n, 5, generator=generator).double(), dim=1) for n in (50, 30))
    relevant = one_hot(torch.randint(30, (50,), generator=generator), 30).bool()
    ranks = first_relevant_ranks(queries, gallery, relevant)
    expected = sklearn_metrics.label_ranking_average_precision_score(relevant.numpy(), (queries @ gallery.T).numpy())
    assert retrieval_metrics(ranks)["mrr"] == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.frozensets(st.integers(0, 3)), max_size=9), st.lists(st.frozensets(st.integers(0, 3)), max_size=9))
@examples
def test_a_table_of_who_shares_a_name_is_made_row_by_row(queries, gallery):
    table = Shared(queries, gallery)
    for rows in (slice(0, 2), slice(2, 99), slice(None)):
        assert table[rows].tolist() == [[bool(q & g) for g in gallery] for q in queries[rows]]


@pytest.mark.parametrize("strip", [1, 60, 10**6])
def test_ranks_do_not_depend_on_the_strips(strip, monkeypatch):
    features, labels = torch.randn(30, 4), [(i % 4,) for i in range(30)]
    table, itself = torch.tensor([[a == b for b in labels] for a in labels]), torch.eye(30, dtype=torch.bool)
    expected = first_relevant_ranks(features, features, table, itself)
    monkeypatch.setattr(metrics, "STRIP", strip)
    alone = Shared([(i,) for i in range(30)], [(i,) for i in range(30)])
    assert torch.equal(first_relevant_ranks(features, features, Shared(labels, labels), alone), expected)


# --- the bootstrap ---------------------------------------------------------------------------------------------------


def test_whole_groups_are_drawn_as_many_as_there_are():
    groups = torch.tensor([0, 0, 1, 2, 2, 2])
    weights = resample(groups, times=2000)
    assert torch.equal(weights[:, 0], weights[:, 1]) and torch.equal(weights[:, 3], weights[:, 5])
    drawn = weights[:, [0, 2, 3]]
    assert (drawn.sum(1) == 3).all() and ((drawn.mean(0) - 1).abs() < 0.06).all()
    assert torch.equal(weights, resample(groups, times=2000))


@given(st.integers(2, 5), st.data())
@examples
def test_a_resamples_classification_figures_are_scikit_learns(num_classes, data):
    pairs = data.draw(st.lists(st.tuples(*[st.integers(0, num_classes - 1)] * 2), min_size=1, max_size=30))
    labels, predictions = torch.tensor(pairs).T
    weights = resample(torch.arange(len(pairs)), times=1)
    drawn = weights[0].long()
    found = classification_intervals(labels, predictions, num_classes, weights)
    true, called = labels.repeat_interleave(drawn), predictions.repeat_interleave(drawn)
    assert found["accuracy"] == pytest.approx([sklearn_metrics.accuracy_score(true, called)] * 2)
    expected = sklearn_metrics.f1_score(true, called, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx([expected] * 2)


def test_ranks_in_a_resample_are_those_of_the_gallery_so_drawn():
    queries, gallery = torch.randn(6, 4), torch.randn(20, 4)
    gallery[7] = gallery[3]  # a tie
    relevant = torch.rand(6, 20) < 0.2
    relevant[:, 3], relevant[:, 7] = True, False
    weights = resample(torch.arange(20) // 2, times=40)
    ranks = ranks_in_resamples(queries, gallery, relevant, weights)
    for drawn, of_resample in zip(weights.long(), ranks, strict=True):
        rows = torch.arange(20).repeat_interleave(drawn)
        expected = [
            first_relevant_ranks(q[None], gallery[rows], r[None, rows]) for q, r in zip(queries, relevant, strict=True)
        ]
        for found, rank in zip(of_resample, expected, strict=True):
            assert found == rank or (found.isnan() and rank.isnan())


def test_retrieval_intervals_weigh_the_queries_and_pass_over_those_without_an_answer():
    ranks, weights = torch.tensor([1.0, 2.0, torch.nan, 4.0]), torch.tensor([[2.0, 1.0, 5.0, 0.0]])
    found = retrieval_intervals(ranks, weights)
    assert found["recall@1"] == pytest.approx([2 / 3] * 2) and found["mrr"] == pytest.approx([2.5 / 3] * 2)


def test_an_interval_is_the_middle_95_percent():
    assert interval(torch.arange(1001.0)) == pytest.approx([25, 975])


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Of 200 sets of 100 images that are recognized with probability 0.8."""
    truth, hits = 0.8, 0
    for _ in range(200):
        correct = (torch.rand(100) < truth).float()
        low, high = interval(resample(torch.arange(100)) @ correct / 100)
        hits += low <= truth <= high
    assert 0.88 < hits / 200 < 0.99
