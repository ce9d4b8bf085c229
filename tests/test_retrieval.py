"""Recall@K against a slow version that ranks by hand, against ranx, and by its own invariances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.evaluate import retrieval
from zoo.evaluate._bootstrap import interval
from zoo.evaluate.retrieval import Task, embedding_scorer, measure, multi, one_target, paired_difference, recalls, topk
from zoo.evaluate.verdict import compare, verdict
from zoo.metric import Metric


class Toy(NamedTuple):
    """As much of a PairData as evaluation looks at."""

    found: np.ndarray
    count: int
    little: np.ndarray

    def pairs(self, split: str) -> np.ndarray:
        return self.found

    def pool(self, split: str) -> np.ndarray:
        return np.arange(self.count)

    def short(self) -> np.ndarray:
        return self.little


def toy(pairs: Sequence[Sequence[int]], count: int, short: Sequence[int] = ()) -> Any:
    return Toy(np.array(pairs, np.int64).reshape(-1, 2), count, np.isin(np.arange(count), short))


def random_toy(count: int, pairs: int, seed: int = 0) -> Any:
    generator = np.random.default_rng(seed)
    drawn = generator.integers(count, size=(pairs, 2))
    drawn = drawn[drawn[:, 0] != drawn[:, 1]]
    return toy(drawn.tolist(), count, np.flatnonzero(generator.random(count) < 0.3).tolist())


def matrix_scorer(scores: np.ndarray) -> retrieval.Scorer:
    return lambda queries: scores[queries]


def by_hand(scores: np.ndarray, data: Any, protocol: str, k: int, denominator: str) -> dict[int, float]:
    """The definition, one pair at a time."""
    pairs = [tuple(p) for p in data.pairs("test").tolist()]
    if protocol == "one_target":
        seen: list[int] = []
        kept = []
        for query, target in pairs:
            if query not in seen and target not in seen:
                kept.append((query, target))
                seen += [query, target]
        pairs, gone = kept, [q for q, _ in kept]
    else:
        pairs, gone = sorted(set(pairs)), []
    result = {}
    for query in sorted({q for q, _ in pairs}):
        partners = [t for q, t in pairs if q == query]
        others = [c for c in data.pool("test") if c != query and c not in gone]
        hits = sum(sum(scores[query, c] >= scores[query, t] for c in others if c != t) < k for t in partners)
        result[query] = hits / (min(k, len(partners)) if denominator == "reachable" else len(partners))
    return result


@pytest.mark.parametrize("protocol", ["one_target", "multi"])
@pytest.mark.parametrize("denominator", ["partners", "reachable"])
@pytest.mark.parametrize("cells", [1, 1 << 23])
def test_equals_the_definition_with_ties(monkeypatch: pytest.MonkeyPatch, protocol: Any, denominator: Any, cells: int) -> None:
    monkeypatch.setattr(retrieval, "_CELLS", cells)  # 1: every query a chunk of its own
    data = random_toy(25, 60)
    scores = np.random.default_rng(1).integers(0, 4, size=(25, 25)).astype(np.float32)  # many ties
    metrics = measure(matrix_scorer(scores), data, protocol=protocol, ks=(5, 1, 9), denominator=denominator, resamples=10)
    for metric in [m for m in metrics if m.subset == "all"]:
        expected = by_hand(scores, data, protocol, metric.k, denominator)
        assert dict(zip(metric.queries.tolist(), metric.hits.tolist(), strict=True)) == pytest.approx(expected)
        assert metric.recall == pytest.approx(np.mean(list(expected.values())))


@pytest.mark.parametrize("protocol", ["one_target", "multi"])
def test_a_subset_is_an_evaluation_of_its_own_pairs(protocol: Any) -> None:
    data = random_toy(25, 60)
    scores = np.random.default_rng(1).random((25, 25))
    metrics = {m.subset: m for m in measure(matrix_scorer(scores), data, protocol=protocol, ks=(3,), resamples=10)}
    assert list(metrics) == ["all", "short_query", "short_target"]
    for subset, role in (("short_query", 0), ("short_target", 1)):
        alone = data._replace(found=data.found[data.little[data.found[:, role]]])
        expected = by_hand(scores, alone, protocol, 3, "partners")
        metric = metrics[subset]
        assert dict(zip(metric.queries.tolist(), metric.hits.tolist(), strict=True)) == pytest.approx(expected)


def test_one_target_keeps_a_pair_only_if_both_notes_are_new() -> None:
    pairs = np.array([[5, 1], [1, 2], [2, 3], [5, 4], [4, 3], [0, 6]])
    task = one_target(pairs, np.arange(8))
    assert task.pairs.tolist() == [[0, 6], [2, 3], [5, 1]]  # by query; [4, 3] is gone because 3 was a target
    assert task.candidates.tolist() == [1, 3, 4, 6, 7]


def test_multi_counts_a_pair_once() -> None:
    task = multi(np.array([[3, 1], [0, 2], [3, 1], [3, 0]]), np.array([2, 1, 0, 3]))
    assert task.pairs.tolist() == [[0, 2], [3, 0], [3, 1]]
    assert task.candidates.tolist() == [0, 1, 2, 3]


def test_denominators() -> None:
    data = toy([[0, 1], [0, 2], [0, 3]], 6)
    scores = -np.arange(36.0).reshape(6, 6)
    hits = {d: measure(matrix_scorer(scores), data, ks=(2,), denominator=d)[0].recall for d in ("partners", "reachable")}
    assert hits == {"partners": pytest.approx(2 / 3), "reachable": 1.0}


@pytest.mark.parametrize("protocol", ["one_target", "multi"])
def test_a_constant_scorer_earns_nothing_below_the_whole_pool(protocol: Any) -> None:
    data = toy([[0, 1], [2, 3]], 10)
    candidates = {"one_target": 8, "multi": 9}[protocol]
    ks = (candidates - 1, candidates)
    metrics = [m for m in measure(matrix_scorer(np.zeros((10, 10))), data, protocol=protocol, ks=ks) if m.subset == "all"]
    assert [m.recall for m in metrics] == [0.0, 1.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_the_notes_does_not_matter(seed: int) -> None:
    generator = np.random.default_rng(seed)
    data = random_toy(12, 20, seed % 1000)
    if len(data.found) == 0:
        return
    scores = generator.integers(0, 5, size=(12, 12)).astype(np.float64)
    order = generator.permutation(12)
    new = np.argsort(order)  # old note i is now note new[i]
    moved = toy(new[data.found].tolist(), 12, new[np.flatnonzero(data.little)].tolist())
    for protocol in ("one_target", "multi"):
        before = measure(matrix_scorer(scores), data, protocol=protocol, ks=(1, 4), resamples=2)  # type: ignore[arg-type]
        after = measure(matrix_scorer(scores[order][:, order]), moved, protocol=protocol, ks=(1, 4), resamples=2)  # type: ignore[arg-type]
        assert [(m.subset, m.k, pytest.approx(m.recall)) for m in before] == [(m.subset, m.k, m.recall) for m in after]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_ties_are_the_worst_case_of_breaking_them(seed: int) -> None:
    generator = np.random.default_rng(seed)
    pairs = np.array([[0, 1], [2, 3]])
    tied = generator.integers(0, 3, size=(9, 9)).astype(np.float64)
    broken = tied + 0.5 * generator.random((9, 9))
    task = one_target(pairs, np.arange(9))
    (worst,), (some,) = (recalls(matrix_scorer(s), [task], (1, 3, 7)) for s in (tied, broken))
    assert (worst <= some).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_equals_ranx() -> None:
    from ranx import Qrels, Run, evaluate

    data = random_toy(60, 200)
    scores = np.random.default_rng(2).random((60, 60))
    (metric,) = [m for m in measure(matrix_scorer(scores), data, ks=(10,), resamples=10) if m.subset == "all"]
    relevant: dict[str, dict[str, int]] = {}
    for query, target in data.found.tolist():
        relevant.setdefault(str(query), {})[str(target)] = 1
    run = {q: {str(c): float(scores[int(q), c]) for c in range(60) if c != int(q)} for q in relevant}
    assert metric.recall == pytest.approx(float(evaluate(Qrels(relevant), Run(run), "recall@10")))


def test_cosine_ignores_length_and_equal_vectors_tie_wherever_they_lie() -> None:
    vectors = np.random.default_rng(0).normal(size=(101, 257)).astype(np.float32)
    vectors[20:] = vectors[20]  # 81 copies
    scores = embedding_scorer(torch.from_numpy(vectors))(np.arange(20))
    assert scores.shape == (20, 101)
    assert (scores[:, 20:] == scores[:, 20:21]).all()
    scores = embedding_scorer(vectors)(np.array([0, 5]))
    np.testing.assert_allclose(embedding_scorer(3 * vectors)(np.array([0, 5])), scores, rtol=1e-6)
    assert scores[1, 5] == pytest.approx(1.0)
    vectors[7] = 0
    assert (embedding_scorer(vectors)(np.array([7])) == 0).all()


def test_topk_is_exact_and_keeps_the_order_of_notes_on_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_CELLS", 1)
    vectors = np.array([[1.0, 0], [0, 1], [2, 0], [1, 1], [-1, 0]])
    places, scores = topk(vectors, np.array([[3.0, 0], [0, 0.5]]), 3)
    assert places.tolist() == [[0, 2, 3], [1, 3, 0]]
    np.testing.assert_allclose(scores, [[1, 1, 0.5**0.5], [1, 0.5**0.5, 0]], rtol=1e-6)


def test_intervals_hold_the_mean_and_are_seeded() -> None:
    values = np.random.default_rng(0).random((400, 2))
    low, high = interval(values)
    width = 2 * 1.96 * values.std(0) / 20  # the normal approximation
    assert ((low < values.mean(0)) & (values.mean(0) < high)).all()
    np.testing.assert_allclose(high - low, width, rtol=0.1)
    np.testing.assert_allclose(interval(values[:, 0])[0], low[0], rtol=1e-12)  # columns share the draws
    assert interval(values, seed=1)[0][0] != low[0]
    with pytest.raises(ZooError, match="at least one query"):
        interval(np.zeros((0, 2)))


def test_paired_difference_is_of_the_same_queries() -> None:
    hard = np.random.default_rng(0).random(300)
    difference = paired_difference(hard + 0.01, hard)
    assert difference == pytest.approx((0.01, 0.01, 0.01))  # no query differs by anything else
    with pytest.raises(ZooError, match=r"the same queries twice, got shapes \(300,\) and \(3,\)"):
        paired_difference(hard, hard[:3])


def test_verdict_against_the_best_baseline() -> None:
    generator = np.random.default_rng(0)
    base = (generator.random(2000) < 0.2).astype(float)
    hits = {"popularity": np.zeros(2000), "bm25": base, "model": np.maximum(base, generator.random(2000) < 0.1)}
    comparisons = compare("model", ["popularity", "bm25"], hits)
    assert [c.baseline for c in comparisons] == ["bm25", "popularity"]
    line = verdict("recall@10", comparisons)
    best = comparisons[0]
    assert line == (
        f"VERDICT: WIN | recall@10={hits['model'].mean():.3f} | baseline bm25={base.mean():.3f}"
        f" | difference={best.mean:+.3f} [{best.low:+.3f}, {best.high:+.3f}]"
    )
    assert compare("popularity", ["bm25"], hits)[0].outcome == "REGRESSION"
    assert compare("bm25", ["bm25"], hits)[0].outcome == "MARGINAL"
    for queries, outcome in ((19, "UNDECIDED"), (20, "WIN")):
        assert compare("model", ["none"], {"model": np.ones(queries), "none": np.zeros(queries)})[0].outcome == outcome
    with pytest.raises(ZooError, match="a verdict needs a baseline"):
        verdict("recall@10", [])
    with pytest.raises(ZooError, match="no system with hits named 'bm52'; did you mean 'bm25'"):
        compare("model", ["bm52"], hits)


def test_record_is_plain() -> None:
    metric = Metric("multi", "all", "both", 10, 0.5, 0.4, 0.6, np.arange(7), np.zeros(7))
    assert metric.record() == {
        "protocol": "multi",
        "subset": "all",
        "input": "both",
        "k": 10,
        "recall": 0.5,
        "low": 0.4,
        "high": 0.6,
        "queries": 7,
    }


@pytest.mark.parametrize(
    ("data", "scores", "ks", "says"),
    [
        (toy([[0, 1]], 4), np.full((4, 4), np.nan), (1,), r"scores of 1 of 1 queries are not finite \(queries 0\)"),
        (toy([[0, 1]], 4), np.zeros((4, 3, 1)), (1,), r"the scorer gave shape \(1, 3, 1\) for 1 queries over at least 4 notes"),
        (toy([[0, 1]], 4), np.zeros((4, 3)), (1,), r"the scorer gave shape \(1, 3\)"),
        (toy([[0, 1]], 4), np.zeros((4, 4)), (3, 4, 9), "k = 4, but a query of multi/all has 3 candidates; k = 9, but"),
        (toy([[0, 1]], 4), np.zeros((4, 4)), (0,), "k = 0 is no cut-off"),
        (toy([[0, 1]], 4), np.zeros((4, 4)), (), "no k was given"),
        (toy([], 4), np.zeros((4, 4)), (1,), "split 'test' has no pairs"),
        (toy([[1, 1], [0, 7]], 4), np.zeros((4, 4)), (1,), r"1 pairs join a note to itself; 1 partners are not in the pool .*\(notes 7\)"),
    ],
)
def test_errors(data: Any, scores: np.ndarray, ks: tuple[int, ...], says: str) -> None:
    with pytest.raises(ZooError, match=says):
        measure(matrix_scorer(scores), data, ks=ks)


def test_errors_of_vectors() -> None:
    bad = np.ones((5, 2))
    bad[3, 1] = np.nan
    with pytest.raises(ZooError, match=r"1 of 5 vectors are not finite \(rows 3\)"):
        embedding_scorer(bad)
    with pytest.raises(ZooError, match=r"vectors of shape \(5,\)"):
        embedding_scorer(np.ones(5))
    with pytest.raises(ZooError, match="k = 6 neighbours of 5 notes"):
        topk(np.ones((5, 2)), np.ones((1, 2)), 6)
    with pytest.raises(ZooError, match="queries of width 3 do not fit vectors of width 2"):
        topk(np.ones((5, 2)), np.ones((1, 3)), 1)


def test_a_query_outside_the_pool_is_no_candidate() -> None:
    task = Task(np.array([[4, 0]]), np.array([0, 1, 2]))
    assert recalls(matrix_scorer(np.zeros((5, 5))), [task], (2, 3))[0].tolist() == [[0.0, 1.0]]
