"""VLMo's table of relative positions against its rows written out, BEiT's index of timm, and its resizing."""

import pytest
import torch
from timm.layers import gen_relative_position_index, resize_rel_pos_bias_table

from zoo.errors import ZooError
from zoo.relative_positions import RelativePositions, offsets, resized


def filled(window=(2, 3), length=5, layers=2, heads=3):
    positions = RelativePositions(window, length, layers, heads)
    torch.nn.init.normal_(positions.table)
    return positions


def test_the_table_of_the_paper():
    positions = RelativePositions((14, 14), 196, 12, 12)
    assert positions.table.shape == (1126, 144)
    assert (int(positions.image.min()), int(positions.image.max())) == (0, 731)
    assert (int(positions.text.min()), int(positions.text.max())) == (734, 1125)
    assert (positions.text[1, 195], positions.text[195, 1], positions.text[7, 7]) == (1122, 734, 928)


@pytest.mark.parametrize("text, image", [(0, True), (4, False), (5, False), (4, True)])
def test_every_pair_of_places_by_hand(text, image):
    positions = filled()
    patches, length, n = offsets((2, 3)), 5, 7 if image else 0
    found = positions(text, image)
    assert [of.shape for of in found] == [(3, text + n, text + n)] * 2

    def row(query, key):
        if query < text and key < text:
            if query == 0 or key == 0:
                return len(positions.table) - (1 if query == key else 3 if query == 0 else 2)
            return patches + 5 + (key - query) + length - 2
        if query < text:
            return patches + 3
        if key < text:
            return patches + 4
        query, key = query - text, key - text
        if query == 0 or key == 0:
            return patches + (2 if query == key else 0 if query == 0 else 1)
        (y, x), (v, u) = divmod(query - 1, 3), divmod(key - 1, 3)
        return (y - v + 1) * 5 + (x - u + 2)

    for layer, of in enumerate(found):
        for query in range(text + n):
            for key in range(text + n):
                assert torch.equal(of[:, query, key], positions.table[row(query, key)].view(2, 3)[layer]), (query, key)


def test_a_picture_alone_is_beits():
    positions = filled()
    beit = positions.table[: offsets((2, 3)) + 3][gen_relative_position_index((2, 3), class_token=True)]
    assert torch.equal(torch.cat(positions(image=True)), beit.permute(2, 0, 1))


def test_every_row_has_a_gradient():
    positions = filled()
    sum(of.sum() for of in positions(5, True)).backward()
    assert bool((positions.table.grad != 0).all())


class TestResize:
    def test_the_same_size_is_the_same_table(self):
        positions = filled()
        assert resized(positions.table, (2, 3), (2, 3)) is positions.table

    def test_text_and_class_rows_stay(self):
        table = filled((4, 4)).table.detach()
        larger = resized(table, (4, 4), (6, 6))
        assert larger.shape == (len(table) - 49 + 121, 6)
        assert torch.equal(larger[121:], table[49:])

    def test_reads_the_old_offsets_where_they_were_moved_to(self):
        """A table that says where each old offset lies among the new ones becomes one that says where each new one lies."""
        q = (-1 + (1 + 4 * 5) ** 0.5) / 2  # 1 + q + q^2 = 6
        where = torch.tensor([-6, -1 - q, -1, 0, 1, 1 + q, 6]).double()
        table = torch.cat([(where[:, None] + 10 * where[None]).reshape(-1, 1), torch.zeros(3, 1).double()])
        larger = resized(table, (4, 4), (7, 7))[: 13 * 13].reshape(13, 13)
        at = torch.arange(-6, 7).double()
        torch.testing.assert_close(larger, at[:, None] + 10 * at[None], rtol=0, atol=1e-6)

    @pytest.mark.filterwarnings("ignore::UserWarning")  # of timm
    def test_is_near_what_timm_makes_with_straight_lines(self):
        torch.manual_seed(0)
        smooth = torch.nn.functional.interpolate(torch.randn(1, 2, 5, 5), size=(27, 27), mode="bicubic")[0].flatten(1).T
        table = torch.cat([smooth, torch.randn(3, 2)])
        ours = resized(table, (14, 14), (24, 24))
        theirs = resize_rel_pos_bias_table(table, (24, 24), (47 * 47 + 3, 2))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.15)
        assert (ours - theirs).abs().mean() < 0.02

    def test_fewer_patches_are_refused(self):
        with pytest.raises(ZooError, match="write a larger picture"):
            resized(filled((4, 4)).table, (4, 4), (3, 5))


class TestOfAnotherModel:
    def test_its_pictures_say_which_rows_are_theirs(self):
        theirs, ours = filled((4, 4), 24), filled((6, 6), 24)
        assert torch.equal(ours.of(theirs.table, (4, 4)), resized(theirs.table, (4, 4), (6, 6)))
        assert ours.of(ours.table, (6, 6)) is ours.table

    @pytest.mark.parametrize("length", [23, 36, 40])  # 49 + 2 * 24 rows are also 25 + 2 * 36, and 17 + 2 * 40
    def test_texts_of_another_length_are_refused(self, length):
        with pytest.raises(ZooError, match=f"of texts of 24 cannot be made those of texts of {length}: write length: 24"):
            filled((4, 4), length).of(filled((4, 4), 24).table, (4, 4))

    def test_as_many_rows_are_not_the_same(self):
        theirs, ours = filled((4, 4), 24), filled((5, 5), 8)
        assert theirs.table.shape == ours.table.shape
        with pytest.raises(ZooError, match="write length: 24"):
            ours.of(theirs.table, (4, 4))


def test_a_text_that_is_too_long():
    with pytest.raises(ZooError, match="a text of 6 tokens, and the table is of 5"):
        filled()(6)
    with pytest.raises(ZooError, match="write 2 or more"):
        RelativePositions((2, 2), 1, 1, 1)
