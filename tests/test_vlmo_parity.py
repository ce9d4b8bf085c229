"""VLMo against plain sums over its tokens, in all of its modes: outputs and gradients, on weights at which every sub-layer matters."""

import pytest
import torch
from timm.models.beit import Beit
from torch import Tensor
from torch.nn.functional import normalize

from tests.bert_models import vocabulary
from tests.hot_weights import far, heat, looks
from tests.vlmo_plain import Plain, Sizes, hot, shapes
from tools.named_weights import numbers
from zoo.models import _vlmo_keys, vlmo
from zoo.registry import build
from zoo.types import Batch, ModalityInputs

CLOSE = 2e-5  # of the largest number: ten times what float32 sums of four blocks in another order differ by
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(115))]
SIZES = Sizes(length=24, kinds=3, rows=len(WORDS))
LENGTHS = (12, 9, 4)
TEXT = max(LENGTHS)  # places of the texts, behind which the picture begins
IDS = torch.zeros(len(LENGTHS), TEXT, dtype=torch.int64)
for _row, _length in enumerate(LENGTHS):
    IDS[_row, :_length] = torch.tensor([2, *(5 + (torch.from_numpy(numbers(f"text {_row}", (_length - 2,))) + 2) * 28).long().tolist(), 3])
REAL = IDS != 0
PIXELS = torch.from_numpy(numbers("image", (len(LENGTHS), 3, 32, 32))).float()
TEXTS = ("text", "vl_text", "pair_text", "words")  # outputs of whole sequences of words, of which only the real ones count
MODES = ("image", "text", "vl_image", "vl_text", "pair_text", "pair_image", "second", "pooled", "matches", "words")
VECTORS = ("image", "text", "vl_image", "vl_text")


def ours(state, **settings):
    model = build("vlmo", vocabulary={"name": "words", "serialized": vocabulary(WORDS).portable()["serialized"]}, **settings)
    mapped = _vlmo_keys.from_unilm(state)
    model.load_state_dict(model.state_dict() | mapped.state)
    assert set(model.state_dict()) - set(mapped.state) == {"vision.mask"}
    return model.eval()


def of_ours(model) -> dict[str, Tensor]:
    """What the model makes of the texts and pictures, in every mode."""
    text, image = ModalityInputs(IDS, REAL), ModalityInputs(PIXELS)
    words, patches, second = model._worded(text), model.see(image), model.see(image, 1)
    top, found = slice(model.first, None), {}
    for kind, x in (("text", words), ("image", patches)):
        found[kind] = model._states({kind: x})[kind]
        below = x._replace(tokens=model._states({kind: x}, layers=slice(model.first))[kind])
        found[f"vl_{kind}"] = model._states({kind: below}, layers=top, fused=True)[kind]
    found |= {f"pair_{kind}": states for kind, states in model._states({"text": words, "image": patches}).items()}
    found["second"] = model._states({"text": words, "image": second})["image"]
    found |= {"pooled": model.ask(text, patches).pooled, "matches": model.match(model.hold(text, words), patches)}
    found["words"] = model.unmask(text, patches)
    vectors = model(Batch({"text": text, "image": image})).embeddings
    return found | {f"vector {name}": normalize(vectors[name.replace("vl_", "pair_")], dim=-1) for name in VECTORS}


def of_plain(plain, at=0) -> dict[str, Tensor]:
    """The same in plain sums."""
    pixels = PIXELS.double()
    found = {"image": plain.image(pixels), "text": plain.text(IDS, REAL)}
    found |= {"vl_image": plain.image(pixels, paired=True), "vl_text": plain.text(IDS, REAL, paired=True)}
    pair = plain.pair(IDS, REAL, pixels)
    found |= {"pair_text": pair[:, :TEXT], "pair_image": pair[:, TEXT:], "second": plain.pair(IDS, REAL, pixels, kind=2)[:, TEXT:]}
    found |= {"pooled": plain.pooled(pair, at), "matches": plain.matches(pair, at), "words": plain.words(pair[:, :TEXT])}
    return found | {f"vector {name}": plain.vector(found[name], name) for name in VECTORS}


def counted(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the places of padding."""
    return {name: x[REAL] if name in TEXTS else x for name, x in found.items()}


def total(found: dict[str, Tensor]) -> Tensor:
    """A loss that every number of every mode enters."""
    parts = [(x * torch.from_numpy(numbers(f"weight of {name}", x.shape)).to(x.dtype)).sum() for name, x in counted(found).items()]
    return torch.stack(parts).sum()


def double(state):
    return {name: x.double().requires_grad_() if x.is_floating_point() else x for name, x in state.items()}


@pytest.fixture(scope="module")
def state():
    return hot(SIZES)


@pytest.fixture(scope="module")
def model(state):
    return ours(state)


@pytest.fixture(scope="module")
def found(model):
    with torch.no_grad():
        return counted(of_ours(model))


@pytest.fixture(scope="module")
def wanted(state):
    with torch.no_grad():
        return counted(of_plain(Plain(double(state), SIZES)))


@pytest.mark.parametrize("mode", [*MODES, *(f"vector {name}" for name in VECTORS)])
def test_outputs(found, wanted, mode):
    assert found[mode].shape == wanted[mode].shape
    assert far(found[mode].double(), wanted[mode]) < CLOSE


def test_outputs_depend_on_the_inputs(found):
    for mode in ("pooled", "matches", "vector image", "vector text", "vector vl_image", "vector vl_text"):
        assert far(found[mode].roll(1, 0), found[mode]) > 0.1, mode
    assert far(found["vl_image"], found["image"]) > 0.1
    assert far(found["second"], found["pair_image"]) > 0.1


def gradients_close(model, plain_state, sizes):
    """Whether the gradients of both losses agree in every parameter; how many that are."""
    total(of_ours(model)).backward()
    total(of_plain(Plain(plain_state, sizes))).backward()
    own = dict(model.named_parameters())
    table = {e.ours: e.theirs[0][0] for e in _vlmo_keys.entries(shapes(sizes), "transformer.blocks", absolute=sizes.plus) if e.ours in own}
    table.pop("vision.mask")
    for name, theirs in table.items():
        mine, other = own[name].grad.double(), plain_state[theirs].grad
        assert far(mine.reshape(other.shape), other) < 5 * CLOSE, name  # sums over all modes and places
    return set(own) - set(table)


def test_gradients(state):
    assert gradients_close(ours(state), double(state), SIZES) == {"vision.mask"}


def swapped(state, one, other):
    """The same with two parts exchanged in every name."""
    names = {name: name.replace(one, "*").replace(other, one).replace("*", other) for name in state}
    return {name: state[names[name]] for name in state}


def rows_exchanged(state):
    table, first = state["relative_position_bias_table"].clone(), (2 * SIZES.side - 1) ** 2 + 3
    table[[first, first + 1]] = table[[first + 1, first]]
    return {**state, "relative_position_bias_table": table}


WRONG = {
    "experts exchanged": (lambda s: swapped(s, "mlp_text", "mlp_imag"), {}, 0, ("image", "text", "pair_text", "pair_image")),
    "norms exchanged": (lambda s: swapped(s, "norm2_text", "norm2_imag"), {}, 0, ("image", "text", "pair_text", "pair_image")),
    "factors exchanged": (lambda s: swapped(s, "gamma_1", "gamma_2"), {}, 0, MODES),
    "experts of pairs from another block on": (dict, {"first": 4}, 0, ("vl_image", "vl_text", "pair_text", "pair_image", "matches")),
    "rows of both directions exchanged": (rows_exchanged, {}, 0, ("pair_text", "pair_image", "matches")),
    "value's bias on the key": (dict, {"biased": "qk"}, 0, MODES),
    "the text behind the picture": (dict, {}, TEXT, ("pooled", "matches")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mistake_is_seen(found, state, wrong):
    change, more, at, modes = WRONG[wrong]
    with torch.no_grad():
        other = counted(of_plain(Plain(double(change(state)), SIZES, **more), at))
    for mode in modes:
        assert far(found[mode].double(), other[mode]) > 1e-2, mode


def test_a_bias_of_keys_would_change_nothing(state):
    """What it would add to the scores of a place is the same for all keys: that is why there is none, and why one put there is not seen."""
    weights = double(state)
    plain = Plain(weights, SIZES)
    with torch.no_grad():
        both = Plain({**weights, **{name: 0 * x for name, x in weights.items() if name.endswith("q_bias")}}, SIZES)
        on_keys = Plain(both.state, SIZES, biased="kv")
        assert far(on_keys.text(IDS, REAL)[REAL], both.text(IDS, REAL)[REAL]) < 1e-12
        assert far(plain.text(IDS, REAL)[REAL], both.text(IDS, REAL)[REAL]) > 1e-2


@pytest.fixture
def plus(monkeypatch):
    """Absolute positions, no factors, and no table, as of base_plus."""
    monkeypatch.setitem(vlmo.SIZES, "tiny", vlmo.SIZES["tiny"]._replace(relative=None, layer_scale=None))
    return SIZES._replace(plus=True)


def test_absolute_positions(plus):
    state = hot(plus)
    assert not [name for name in state if "gamma" in name or "table" in name]
    model = ours(state)
    with torch.no_grad():
        found, wanted = counted(of_ours(model)), counted(of_plain(Plain(double(state), plus)))
    assert set(found) == set(wanted) == {*MODES, *(f"vector {name}" for name in VECTORS)}
    for mode, x in wanted.items():
        assert far(found[mode].double(), x) < CLOSE, mode
    assert gradients_close(model, double(state), plus) == {"vision.mask"}


def test_texts_of_another_length_use_the_middle_of_the_table(state, model):
    ids = IDS[:1, :5]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        mine = model._states({"text": model._worded(ModalityInputs(ids, mask))})["text"]
        assert far(mine.double(), Plain(double(state), SIZES).text(ids, mask)) < CLOSE


def test_pictures_alone_are_a_beit_of_timm():
    """The first stage: a BEiT's tables of all blocks, joined, are the rows of pictures."""
    theirs = heat(
        Beit(
            32,
            8,
            num_classes=0,
            global_pool="token",
            embed_dim=64,
            depth=4,
            num_heads=4,
            use_abs_pos_emb=False,
            use_rel_pos_bias=True,
            init_values=0.1,
        )
    )
    mapped = _vlmo_keys.from_beit(theirs.state_dict(), 2 + 2 * 24)
    model = build("vlmo", fusion={"name": "mome", "from_layer": 4}, two_scale=False).eval()
    model.load_state_dict(model.state_dict() | mapped.state)
    assert not mapped.dropped
    torch.nn.init.zeros_(model.kinds.weight)
    with torch.no_grad():
        mine, wanted = model._states({"image": model.see(ModalityInputs(PIXELS))})["image"], theirs.forward_features(PIXELS)
        assert looks(wanted[:, 0])
        assert far(mine, wanted) < CLOSE
        assert far(model._states({"image": model.see(ModalityInputs(PIXELS))}, fused=False)["image"].roll(1, 0), wanted) > 0.1
        model.positions.table.data.zero_()
        assert far(model._states({"image": model.see(ModalityInputs(PIXELS))})["image"], wanted) > 1e-2
