"""Splice against a row-by-row loop that knows nothing of sorting."""

import pytest
import torch

from zoo.splice import IGNORE, Layout, splice
from zoo.types import Tokens

D = 3


def rows_of(layout, media, max_length=None):
    """Each row as a list of (source, index, kind, label, shares its position): the plain reading of `Layout`."""
    rows = []
    for b in range(len(layout.mask)):
        row = []
        for n in range(layout.mask.shape[1]):
            if not layout.mask[b, n]:
                continue
            k = int(layout.slots[b, n])
            if k == 0:
                label = IGNORE if layout.labels is None else int(layout.labels[b, n])
                row.append(("text", n, 0, label, False))
                continue
            x = list(media.values())[k - 1]
            shared = layout.shared is not None and bool(layout.shared[b, n])
            row += [(k, i, k, IGNORE, shared) for i in range(x.tokens.shape[1]) if x.mask[b, i]]
        while max_length is not None and len(row) > max_length:
            loose = [i for i, t in enumerate(row) if t[0] == "text" and (layout.keep is None or not layout.keep[b, t[1]])]
            if not loose:
                break
            row.pop(loose[-1])
        rows.append(row)
    return rows


def positions_of(row):
    out, before = [], None
    for token in row:
        same = token[4] and before is not None and before[2] == token[2]
        out.append((out[-1] if same else out[-1] + 1) if out else 0)
        before = token
    return out


def check(layout, media, padding, max_length=None):
    got = splice(layout, media, padding=padding, max_length=max_length)
    rows = rows_of(layout, media, max_length)
    S = max(map(len, rows), default=0)
    assert got.inputs_embeds.shape == (len(rows), S, D)
    for b, row in enumerate(rows):
        first = 0 if padding == "right" else S - len(row)
        real = slice(first, first + len(row))
        mask = torch.zeros(S, dtype=torch.bool)
        mask[real] = True
        assert torch.equal(got.attention_mask[b], mask)
        values = [layout.embeds[b, i] if s == "text" else list(media.values())[s - 1].tokens[b, i] for s, i, *_ in row]
        assert torch.equal(got.inputs_embeds[b, real], torch.stack(values) if values else torch.zeros(0, D, dtype=torch.float64))
        assert (got.inputs_embeds[b, ~mask] == 0).all()
        assert got.position_ids[b, real].tolist() == positions_of(row)
        assert (got.position_ids[b, ~mask] == 0).all()
        assert got.kind[b, real].tolist() == [t[2] for t in row]
        assert (got.kind[b, ~mask] == -1).all()
        assert torch.equal(got.expert[b], got.kind[b] > 0)
        assert got.labels[b, real].tolist() == [t[3] for t in row]
        assert (got.labels[b, ~mask] == IGNORE).all()
        texts = {t[1]: first + i for i, t in enumerate(row) if t[0] == "text"}
        for name, anchor in layout.anchors.items():
            assert int(got.anchors[name][b]) == texts.get(int(anchor[b]), -1), name
    return got


def random_case(seed, *, media_count=2, absent=0.3, masked=True):
    """Rows of random length, a random place for each medium, which may be absent."""
    g = torch.Generator().manual_seed(seed)
    B, N = 5, 9
    length = torch.randint(media_count + 1, N + 1, (B,), generator=g)
    mask = torch.arange(N) < length[:, None]
    slots = torch.zeros(B, N, dtype=torch.int64)
    for b in range(B):
        places = torch.randperm(int(length[b]), generator=g)[:media_count]
        for k, place in enumerate(places, start=1):
            if torch.rand((), generator=g) > absent:
                slots[b, place] = k
    media = {}
    for k in range(1, media_count + 1):
        L = k + 1
        real = torch.rand(B, L, generator=g) > 0.4 if masked else torch.ones(B, L, dtype=torch.bool)
        tokens = torch.randn(B, L, D, generator=g, dtype=torch.float64)
        media[f"medium{k}"] = Tokens(tokens, real, None, (slots == k).any(1))
    embeds = torch.randn(B, N, D, generator=g, dtype=torch.float64).masked_fill((slots > 0)[..., None], torch.nan)
    labels = torch.randint(0, 50, (B, N), generator=g)
    keep = torch.rand(B, N, generator=g) > 0.7
    shared = torch.rand(B, N, generator=g) > 0.5
    anchors = {"a": torch.randint(-1, N, (B,), generator=g), "b": torch.randint(-1, N, (B,), generator=g)}
    return Layout(embeds, mask, slots, anchors, labels, keep, shared), media


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("max_length", [None, 7, 3])
@pytest.mark.parametrize("seed", range(15))
def test_equals_the_plain_loop(seed, max_length, padding):
    check(*random_case(seed), padding, max_length)


@pytest.mark.parametrize("max_length", [None, 6])
@pytest.mark.parametrize("seed", range(5))
def test_both_paddings_give_the_same_rows_and_read_the_same_tokens(seed, max_length):
    layout, media = random_case(seed)
    right, left = (splice(layout, media, padding=p, max_length=max_length) for p in ("right", "left"))
    for field in ("inputs_embeds", "position_ids", "labels", "kind", "expert"):
        r, l_ = getattr(right, field), getattr(left, field)
        assert torch.equal(r[right.attention_mask], l_[left.attention_mask]), field  # row by row, in order
    for name in layout.anchors:
        r, l_ = right.anchors[name], left.anchors[name]
        assert torch.equal(r < 0, l_ < 0)
        rows = (r >= 0).nonzero()[:, 0]
        assert torch.equal(right.inputs_embeds[rows, r[rows]], left.inputs_embeds[rows, l_[rows]])


def tiny(text, slots, *, anchors=None, **more):
    """One row whose text embeddings are their own positions."""
    N = len(slots)
    embeds = torch.arange(N, dtype=torch.float64)[None, :, None].expand(1, N, D)
    mask = torch.tensor([text], dtype=torch.bool)
    return Layout(embeds, mask, torch.tensor([slots]), {k: torch.tensor([v]) for k, v in (anchors or {}).items()}, **more)


def image(tokens, real=None):
    """A medium whose tokens are 100, 101, ..."""
    values = 100 + torch.arange(tokens, dtype=torch.float64)[None, :, None].expand(1, tokens, D)
    mask = torch.ones(1, tokens, dtype=torch.bool) if real is None else torch.tensor([real], dtype=torch.bool)
    return {"image": Tokens(values, mask, None, torch.tensor([True]))}


def test_a_case_by_hand():
    got = splice(tiny([1, 1, 1, 1], [0, 0, 1, 0], anchors={"note": 3, "visual": 0, "none": -1}), image(2), padding="right")
    assert got.inputs_embeds[0, :, 0].tolist() == [0, 1, 100, 101, 3]
    assert got.position_ids[0].tolist() == [0, 1, 2, 3, 4]
    assert {k: int(v) for k, v in got.anchors.items()} == {"note": 4, "visual": 0, "none": -1}


def test_masked_tokens_of_a_medium_take_no_position():
    got = splice(tiny([1, 1, 1], [0, 1, 0]), image(3, [1, 0, 1]))
    assert got.inputs_embeds[0, :, 0].tolist() == [0, 100, 102, 2]
    assert got.position_ids[0].tolist() == [0, 1, 2, 3]


def test_a_shared_position_is_one_for_the_whole_medium():
    shared = torch.tensor([[False, True, False]])
    got = splice(tiny([1, 1, 1], [0, 1, 0], shared=shared), image(3))
    assert got.position_ids[0].tolist() == [0, 1, 1, 1, 2]
    assert splice(tiny([1, 1], [1, 0], shared=shared[:, 1:]), image(2)).position_ids[0].tolist() == [0, 0, 1]


def test_two_media_side_by_side_do_not_share_one_position():
    shared = torch.tensor([[True, True]])
    media = {"a": image(2)["image"], "b": image(2)["image"]}
    assert splice(tiny([1, 1], [1, 2], shared=shared), media).position_ids[0].tolist() == [0, 0, 1, 1]


def test_cutting_takes_the_last_text_that_may_go():
    keep = torch.tensor([[False, False, False, False, True]])
    layout = tiny([1, 1, 1, 1, 1], [0, 1, 0, 0, 0], anchors={"last": 4, "cut": 3}, keep=keep)
    got = splice(layout, image(2), max_length=5)
    assert got.inputs_embeds[0, :, 0].tolist() == [0, 100, 101, 2, 4]
    assert {k: int(v) for k, v in got.anchors.items()} == {"last": 4, "cut": -1}


def test_what_may_not_be_cut_stays_even_above_the_length():
    got = splice(tiny([1, 1, 1], [0, 1, 0], keep=torch.tensor([[False, False, True]])), image(3), max_length=2)
    assert got.inputs_embeds[0, :, 0].tolist() == [100, 101, 102, 2]


def test_a_medium_without_a_slot_is_left_out():
    got = splice(tiny([1, 1, 0], [0, 0, 0]), image(3), padding="left")
    assert got.inputs_embeds[0, :, 0].tolist() == [0, 1]


def test_text_alone():
    got = splice(tiny([1, 1, 0], [0, 0, 0]), {})
    assert got.attention_mask.shape == (1, 2)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_the_order_of_the_rows_and_of_their_neighbours_means_nothing(padding):
    layout, media = random_case(3)
    whole = splice(layout, media, padding=padding)
    for b in range(5):
        one = Layout(*(x[b : b + 1] if isinstance(x, torch.Tensor) else {k: v[b : b + 1] for k, v in x.items()} for x in layout))
        alone = splice(one, {k: Tokens(x.tokens[b : b + 1], x.mask[b : b + 1], None, x.present[b : b + 1]) for k, x in media.items()})
        assert torch.equal(alone.inputs_embeds[0], whole.inputs_embeds[b][whole.attention_mask[b]])


def test_gradients_reach_what_stands_in_the_sequence_and_nothing_else():
    layout, media = random_case(1)
    embeds = layout.embeds.nan_to_num().requires_grad_()
    tokens = {k: x._replace(tokens=x.tokens.clone().requires_grad_()) for k, x in media.items()}
    splice(layout._replace(embeds=embeds), tokens).inputs_embeds.sum().backward()
    assert torch.equal(embeds.grad[..., 0].bool(), layout.mask & (layout.slots == 0))
    for k, x in enumerate(tokens.values(), start=1):
        assert torch.equal(x.tokens.grad[..., 0].bool(), x.mask & (layout.slots == k).any(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_media_take_the_type_of_the_text(dtype):
    layout, media = random_case(0)
    assert splice(layout._replace(embeds=layout.embeds.to(dtype)), media).inputs_embeds.dtype == dtype


def test_no_rows():
    empty = Layout(torch.zeros(0, 4, D), torch.zeros(0, 4, dtype=torch.bool), torch.zeros(0, 4, dtype=torch.int64), {})
    assert splice(empty, {}).inputs_embeds.shape == (0, 0, D)
