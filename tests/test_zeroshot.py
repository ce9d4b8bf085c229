"""Classes by their names, against open_clip's own, and sums of what vectors mean."""

import numpy as np
import pytest
import torch

import zoo
from zoo.arithmetic import combine
from zoo.errors import ZooError
from zoo.zeroshot import classifier, told

NAMES = ["red square", "green circle", "blue bar", "yellow cross", "a"]
TEMPLATES = ["{}", "a drawing of a {}", "many of the {} here, and nothing else"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    found = zoo.build("clip", size="tiny")
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(2.0) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.3)
    found.trained = True
    return found.eval()


class TestClassifier:
    def test_it_is_open_clips(self, model):
        from open_clip import build_zero_shot_classifier

        class Texts:
            """A text tower as open_clip asks for it."""

            def encode_text(self, texts, normalize):
                assert normalize
                return torch.from_numpy(model.encode([{"text": text} for text in texts], output="text"))

        def kept(texts):
            """In the place of ids, on which ``to`` does nothing."""
            return type("Ids", (list,), {"to": lambda self, device: self})(texts)

        theirs = build_zero_shot_classifier(Texts(), kept, NAMES, [t.format for t in TEMPLATES], num_classes_per_batch=2)
        mine = classifier(model, NAMES, TEMPLATES)
        assert np.abs(mine - mine[:1]).max() > 0.05, "a test of constants"
        np.testing.assert_allclose(mine, theirs.T.numpy(), atol=1e-6)

    def test_each_sentence_has_length_one_before_the_mean(self):
        class Table:
            def encode(self, rows, batch_size, show_progress, *, output):
                assert output == "text"
                given = {"x": [3.0, 4.0], "not x": [5.0, 0.0]}
                return np.array([given[row["text"]] for row in rows], np.float32) / 5

        assert classifier(Table(), ["x"], ["{}", "not {}"])[0] == pytest.approx(np.array([1.6, 0.8]) / np.hypot(1.6, 0.8))

    def test_one_template_gives_the_vector_of_its_sentence(self, model):
        np.testing.assert_allclose(
            classifier(model, NAMES, ["a {}!"]), model.encode([{"text": f"a {n}!"} for n in NAMES], output="text"), atol=1e-6
        )

    def test_batches_change_nothing(self, model):
        np.testing.assert_allclose(classifier(model, NAMES, TEMPLATES, batch_size=4), classifier(model, NAMES, TEMPLATES), atol=1e-5)

    @pytest.mark.parametrize(
        "names, templates, says",
        [
            (["a"], ["a drawing"], "template 'a drawing' has no place for the name: write {} in it, once"),
            (["a"], ["{} and {}"], "template '{} and {}' has no place for the name"),
            (["a", " "], ["{}"], "class 1 has no name"),
            ([], ["{}"], "a classifier needs a class and a template at least"),
            (["a"], [], "a classifier needs a class and a template at least"),
        ],
    )
    def test_refusals(self, model, names, templates, says):
        with pytest.raises(ZooError) as caught:
            classifier(model, names, templates)
        assert says in str(caught.value)


class TestTold:
    def test_the_nearest(self):
        classes = np.eye(3, dtype=np.float32)
        assert told(np.array([[0.1, 0.9, 0.2], [2.0, 0.0, 1.0], [0.0, 0.1, 0.2]]), classes).tolist() == [1, 0, 2]

    def test_other_widths(self):
        with pytest.raises(ZooError, match="pictures of width 2 and classes of width 3 come from different models"):
            told(np.zeros((1, 2)), np.zeros((4, 3)))


class TestArithmetic:
    def test_by_hand(self):
        # (1, 0) + (0, 1) - (1, 1) / sqrt(2) = (0.29, 0.29): lengths given do not count
        assert combine([np.array([5.0, 0.0]), np.array([0.0, 0.1])], [np.array([3.0, 3.0])]) == pytest.approx([2**-0.5] * 2)
        assert combine([np.array([2.0, 0.0])], [np.array([0.0, 9.0])]) == pytest.approx([2**-0.5, -(2**-0.5)])

    def test_weights(self):
        found = combine([np.array([1.0, 0.0]), np.array([0.0, 1.0])], weights=[3.0, 4.0])
        assert found == pytest.approx([0.6, 0.8])
        assert found.dtype == np.float32

    def test_a_picture_plus_a_text_lies_between_them(self, model):
        vectors = model.encode([{"text": name} for name in NAMES], output="text")
        cosine = vectors @ combine([vectors[0], vectors[1]])
        assert set(np.argsort(-cosine)[:2].tolist()) == {0, 1}
        assert cosine[0] == pytest.approx(cosine[1], abs=1e-5)

    @pytest.mark.parametrize(
        "given, says",
        [
            (([], []), "there is nothing to add: give one vector at least"),
            (([np.ones(2), np.ones(3)],), r"vectors of shapes \(2,\) and \(3,\) cannot be added"),
            (([np.ones((2, 2))],), "cannot be added: each is"),
            (([np.ones(2), np.zeros(2)],), r"vector 1 has no direction \(its length is 0\): leave it out"),
            (([np.array([1.0, np.nan])],), r"vector 0 has no direction \(its length is nan\)"),
            (([np.ones(2)], [np.ones(2) * 7]), "nothing is left: what is added and what is taken away are the same"),
        ],
    )
    def test_refusals(self, given, says):
        with pytest.raises(ZooError, match=says):
            combine(*given)

    def test_too_few_weights(self):
        with pytest.raises(ZooError, match="weights: 1 of them for 2 vectors: write one for each"):
            combine([np.ones(2), np.ones(2)], weights=[1.0])
