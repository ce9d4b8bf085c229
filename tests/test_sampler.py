"""Which pairs meet in which batch."""

from itertools import islice

import numpy as np
import pytest

from zoo.sampler import BatchOrder

LENGTHS = np.random.default_rng(0).integers(1, 200, size=1003)


def order(**given):
    return BatchOrder(**{"lengths": LENGTHS, "batch_size": 8, "seed": 0, "buckets": True, **given})


@pytest.mark.parametrize("buckets", [True, False])
def test_every_epoch_shows_each_pair_at_most_once(buckets):
    batches = [alone for (alone,) in order(buckets=buckets).epoch(0)]
    seen = np.concatenate(batches)
    assert len(batches) == len(order()) == 1003 // 8
    assert all(len(b) == 8 for b in batches)
    assert len(np.unique(seen)) == len(seen)
    assert seen.min() >= 0
    assert seen.max() < 1003


@pytest.mark.parametrize("buckets", [True, False])
def test_every_pair_has_its_turn(buckets):
    """What one epoch leaves over, long pairs too, comes in another: 19 of 99 are left out each time."""
    few = order(lengths=np.arange(99), batch_size=40, buckets=buckets)
    seen = np.concatenate([np.concatenate([alone for (alone,) in few.epoch(e)]) for e in range(12)])
    assert set(seen) == set(range(99))
    assert 40 < seen.mean() < 58  # 49 ± 3 standard errors and a margin: neither the short nor the long are preferred


def test_goes_on_where_it_stopped():
    whole = np.stack(list(order().epoch(3)))
    assert np.array_equal(np.stack(list(order().epoch(3, 17))), whole[17:])
    assert list(order().epoch(3, len(whole))) == []


def test_depends_on_seed_and_epoch_alone():
    first = next(order().epoch(0))
    assert np.array_equal(first, next(order().epoch(0)))
    assert not np.array_equal(first, next(order().epoch(1)))
    assert not np.array_equal(first, next(order(seed=1).epoch(0)))


@pytest.mark.parametrize("buckets", [True, False])
def test_processes_share_a_batch(buckets):
    """Two processes of 8 pairs see, together, what one process of 16 sees."""
    alone = order(batch_size=16, buckets=buckets).epoch(2)
    shared = order(processes=2, buckets=buckets).epoch(2)
    for (whole,), shares in islice(zip(alone, shared, strict=True), 20):
        assert shares.shape == (2, 8)
        assert np.array_equal(shares[0], whole[::2])  # a checkpoint of several processes goes on with the pairs that it would have had
        assert np.array_equal(shares[1], whole[1::2])


def test_buckets_save_padding():
    def padding(buckets):
        return sum(LENGTHS[b].max() * b.size - LENGTHS[b].sum() for b in order(buckets=buckets).epoch(0))

    assert padding(True) < 0.2 * padding(False)


def test_buckets_do_not_sort_the_batches():
    means = np.array([LENGTHS[b].mean() for b in order().epoch(0)])
    steps = np.sign(np.diff(means))
    assert abs(steps.mean()) < 0.3


def test_too_few_pairs_make_no_batch():
    assert len(order(lengths=np.arange(7))) == 0
    assert list(order(lengths=np.arange(7)).epoch(0)) == []
