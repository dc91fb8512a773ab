"Near pairs are those of comparing all with all, for any words, radius and cluster"
import numpy as np
import pytest

from phoenix.data import search
from phoenix.data.hashes import hamming_search
from phoenix.data.search import SearchError, near_pairs, near_queries, plan_chunks
from phoenix.keys import rng


def uniform(n, seed=0): return rng(seed, "test.search").integers(0, 2**64, n, dtype=np.uint64)


def clustered(n, flips=5, seed=1):
    "Words up to `flips` bits away from one of n/10 centres, some of them equal"
    g = rng(seed, "test.search")
    words = np.repeat(uniform(max(1, n//10), seed), 10)[:n]
    for _ in range(flips):
        bit = np.uint64(1) << g.integers(0, 64, len(words), dtype=np.uint64)
        words = words ^ np.where(g.random(len(words)) < .3, bit, np.uint64(0))
    return words


def balanced(n, seed=2):
    "Words with 32 set bits, as pHash gives them, in pairs two or four bits apart"
    g = rng(seed, "test.search")
    order = np.argsort(g.random((n//2, 64)), axis=1)
    bits = (order < 32).astype(np.uint8)
    twin = bits.copy()
    for row, k in zip(twin, g.integers(1, 3, len(twin))):
        row[np.flatnonzero(row)[:k]], row[np.flatnonzero(row == 0)[-k:]] = 0, 1
    return np.packbits(np.concatenate([bits, twin]), axis=1).view(">u8").ravel().astype(np.uint64)


def lopsided(n): return clustered(n) & np.uint64(0x00ff0000ffff0f0f)


def oracle(words, radius):
    "Pairs of rows by the plain search"
    parts = [np.stack([i, j, bits]) for i, j, _, bits in hamming_search(words[:, None], words, hamming=radius)]
    i, j, bits = np.concatenate(parts, axis=1)
    return sorted(zip(i[i < j].tolist(), j[i < j].tolist(), bits[i < j].tolist()))


def listed(words, radius, **options):
    "Pairs of rows as near_pairs gives them"
    return list(zip(*(x.tolist() for x in near_pairs(words, radius, **options).rows())))


@pytest.mark.parametrize("kind", [uniform, clustered, balanced, lopsided])
@pytest.mark.parametrize("radius", range(9))
def test_every_plan_finds_what_the_plain_search_finds(monkeypatch, kind, radius):
    words = kind(1200)
    wanted = oracle(words, radius)
    for chunks in (0, radius + 1, radius + 2, radius + 3):
        if chunks > radius + 2 and radius > 4: continue # thousands of tables
        monkeypatch.setattr(search, "plan_chunks", lambda *a, chunks=chunks: chunks and chunks - radius + a[2])
        assert listed(words, radius) == wanted, chunks
    assert kind is uniform or len(wanted) > 10 or radius < 4


def test_no_plan_is_forced_and_two_blocks_meet(monkeypatch):
    words = clustered(30_000, flips=3)
    wanted = oracle(words, 5)
    assert plan_chunks(np.unique(words), np.unique(words), 5) > 0
    assert listed(words, 5) == listed(words, 5, workers=1) == wanted
    monkeypatch.setattr(search, "_BLOCK", 97)
    assert listed(words[:3000], 5) == [p for p in wanted if p[1] < 3000]


@pytest.mark.parametrize("radius", [0, 1, 4, 5, 8])
def test_views_of_queries_against_targets(monkeypatch, radius):
    targets = np.concatenate([clustered(900), balanced(100)])
    queries = np.stack([targets[::2], targets[1::2] ^ np.uint64(3), uniform(500, 9)], axis=1)
    wanted = sorted((i, j, v, b) for a, c, v, d in hamming_search(queries, targets, hamming=radius)
                    for i, j, b in zip(a.tolist(), c.tolist(), d.tolist()))
    for chunks in (0, radius + 1, radius + 2):
        monkeypatch.setattr(search, "plan_chunks", lambda *a, chunks=chunks: chunks)
        assert list(zip(*(x.tolist() for x in near_queries(queries, targets, radius)))) == [
            (i, j, v, b) for i, j, v, b in wanted], chunks


def test_a_hundred_thousand_equal_hashes_are_one_word():
    words = np.concatenate([np.zeros(100_000, np.uint64), np.full(1000, 3, np.uint64), uniform(2000)])
    found = near_pairs(words, 5)
    assert len(found.i) == 1 and found.distance.tolist() == [2]
    assert found.count == 100_000*99_999//2 + 1000*999//2 + 100_000*1000
    with pytest.raises(SearchError, match="the most frequent hash has 100000 rows"): found.rows()


def test_a_ball_of_near_words_is_refused_by_count_not_by_memory():
    ball = np.arange(1 << 13, dtype=np.uint64) # 13 free bits: millions of pairs
    with pytest.raises(SearchError, match="raise most"): near_pairs(ball, 6, most=100_000)
    assert len(near_pairs(ball, 1).i) == 13*(1 << 12)


def test_edges():
    none = near_pairs(np.zeros(0, np.uint64), 5)
    assert (none.count, len(none.words), len(none.rows()[0])) == (0, 0, 0)
    assert near_pairs(np.array([7], np.uint64), 64).count == 0
    assert near_pairs(np.array([0, 2**64 - 1], np.uint64), 64).count == 1
    assert near_pairs(np.array([0, 2**64 - 1], np.uint64), 63).count == 0
    assert [len(x) for x in near_queries(np.zeros((0, 16), np.uint64), uniform(9))] == [0]*4
    for radius in (-1, 65):
        with pytest.raises(SearchError, match="0 to 64"): near_pairs(uniform(3), radius)
    with pytest.raises(SearchError, match="uint64"): near_queries(np.zeros((2, 1)), uniform(3))


@pytest.mark.parametrize("n", [2_000, 20_000])
def test_plans_are_made_by_counting(n):
    "Few words or many bits: all with all; else tables; a burst of alike words asks for longer keys"
    words = uniform(n)
    assert plan_chunks(words, words, 20) == 0
    assert (plan_chunks(words, words, 2) > 2)
    assert plan_chunks(words[:50], words[:50], 5) == 0
