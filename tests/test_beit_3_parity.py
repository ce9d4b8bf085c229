"""BEiT-3 against torchscale's, whose numbers lie in tests/golden, and against timm's vision tower: outputs and gradients."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn
from torch.nn import functional as F

from tests.bert_models import vocabulary
from tests.golden_files import digest, golden
from tests.hot_weights import far
from tools.named_weights import numbers
from zoo.models import _beit3_keys, beit_3
from zoo.registry import build
from zoo.types import Batch, ModalityInputs, ModelOutput

CLOSE = 2e-5  # of the largest number: ten times what float32 sums in another order differ by
STEPS = 1e-6  # of what is written word by word and at once
FILE = "beit3_torchscale"
CASES = ("retrieval", "reasoning", "answering", "captioning", "pretraining")
PLACES = 17  # of a picture in the sequence
WORDS = ["<s>", "<pad>", "</s>", "<mask>", "[UNK]", *(f"w{i}" for i in range(115))]


def words():
    return {"name": "words", "serialized": vocabulary(WORDS).portable()["serialized"]}


def inside(codes=0):
    return {"layers": 2, "codes": codes, "vocabulary": words()}


def loaded(model, state):
    """The model with weights of torchscale; whatever they lack stays as drawn."""
    mapped = _beit3_keys.from_unilm(state)
    own = model.state_dict()
    model.load_state_dict(own | {name: x for name, x in mapped.state.items() if name in own})
    return model.eval()


def texts(case, masked=False):
    ids = case["input_ids"]
    if masked:
        ids = ids.masked_fill(case["masked"].bool(), WORDS.index("<mask>"))
    return ModalityInputs(ids, case["attention_mask"].bool())


def pictures(name="image"):
    return ModalityInputs(torch.from_numpy(numbers(name, (3, 3, 32, 32))).float())


def states(model, case, image=True, text=True):
    parts = {"image": model.see(pictures())} if image else {}
    return model._states(parts | ({"text": model._worded(texts(case))} if text else {}))


def close(mine, wanted, tolerance=CLOSE):
    assert mine.shape == wanted.shape
    assert far(mine, wanted) < tolerance


def gradients_close(model, case, loss):
    """Whether the gradient of every parameter that the file knows is torchscale's, by its size and by a product."""
    loss.backward()
    own, wanted, seen = dict(model.named_parameters()), case.gradients("loss"), set()
    largest = max(size for size, _ in wanted.values())
    for entry in _beit3_keys.entries(case.state, r"beit3\.encoder\.layers"):
        (place,) = entry.theirs
        if entry.ours not in own or place[0] not in wanted:
            continue
        gradient = own[entry.ours].grad
        gradient = torch.zeros_like(own[entry.ours]) if gradient is None else gradient
        for name, part in zip(place, gradient.chunk(len(place)), strict=True):
            whole = F.pad(part, (0, 0, 2, 0)) if name in _beit3_keys.TABLES else part
            for mine, other in zip(digest(name, whole), wanted[name], strict=True):
                assert abs(mine - other) < 10 * CLOSE * max(wanted[name][0], 1e-2 * largest), name
            seen.add(name)
    return set(wanted) - seen


@pytest.fixture(scope="module")
def retrieval():
    case = golden(FILE, "retrieval")
    return case, loaded(build("beit_3", **inside()), case.state)


def test_pictures_and_texts_alone(retrieval):
    case, model = retrieval
    real = case["attention_mask"].bool()
    with torch.no_grad():
        close(states(model, case, text=False)["image"], case["image_states"])
        close(states(model, case, image=False)["text"][real], case["text_states"][real])
        out = model(Batch({"image": pictures(), "text": texts(case)})).embeddings
        for name in ("image", "text"):
            close(F.normalize(out[name], dim=-1), case[f"{name}_vectors"])
    assert far(case["image_vectors"].roll(1, 0), case["image_vectors"]) > 0.1
    assert far(case["text_vectors"].roll(1, 0), case["text_vectors"]) > 0.1


def test_gradients_of_retrieval(retrieval):
    case, _ = retrieval
    model = loaded(build("beit_3", **inside()), case.state)
    out = model(Batch({"image": pictures(), "text": texts(case)})).embeddings
    image, text = (F.normalize(out[name], dim=-1) for name in ("image", "text"))
    scores, label = case.state["logit_scale"].exp() * image @ text.T, torch.arange(3)
    loss = (F.cross_entropy(scores, label) + F.cross_entropy(scores.T, label)) / 2
    close(loss[None], case["loss"][None])
    assert gradients_close(model, case, loss) == {"logit_scale"}


def test_a_sentence_beside_two_pictures():
    case = golden(FILE, "reasoning")
    model = loaded(build("beit_3", **inside()), case.state)
    real = case["attention_mask"].bool()
    found = states(model, case)
    close(found["image"], case["states"][:, :PLACES])
    close(found["text"][real], case["states"][:, PLACES:][real])
    seen = model.see(pictures()), model.see(pictures("second image"), 1)
    compared = model.compare(texts(case), seen)
    close(compared, case["compared"])
    assert far(model.compare(texts(case), seen[::-1]), case["compared"]) > 0.1
    assert compared.shape == (3, model.compared_dim)


def test_a_question_beside_a_picture():
    """What answers are told from comes before the last norm, which that fine-tuning has not."""
    case = golden(FILE, "answering")
    assert not [name for name in case.state if "encoder.layer_norm" in name]
    model = loaded(build("beit_3", **inside()), case.state)
    for parameter in model.trunk.norm.parameters():
        nn.init.uniform_(parameter)
    with torch.no_grad():
        close(model.ask(texts(case), model.see(pictures())).pooled, case["pooled"])


def test_hidden_words_and_patches():
    case = golden(FILE, "pretraining")
    model = loaded(build("beit_3", **inside(12)), case.state)
    hidden, chosen, given = case["hidden"].bool(), case["masked"].bool(), texts(case, masked=True)
    words_alone, _ = model.fill(None, None, given, chosen)
    _, codes_alone = model.fill(pictures(), hidden, None, None)
    both = model.fill(pictures(), hidden, given, chosen)
    found = {"text_words": words_alone, "image_codes": codes_alone, "pair_words": both[0], "pair_codes": both[1]}
    for name, x in found.items():
        close(x, case[name])
    assert far(found["pair_words"], case["text_words"]) > 0.1
    right = torch.arange(hidden.numel()).reshape(hidden.shape)[hidden] % 12
    wanted = case["input_ids"][chosen]
    loss = sum(F.cross_entropy(x, right if name.endswith("codes") else wanted) for name, x in found.items())
    close(loss[None], case["loss"][None])
    assert gradients_close(model, case, loss) == set()


def test_captions(monkeypatch):
    case = golden(FILE, "captioning")
    model, chosen = loaded(build("beit_3", **inside()), case.state), case["masked"].bool()
    monkeypatch.setattr(beit_3, "choose_share", lambda *_: chosen)
    monkeypatch.setattr(beit_3, "hide", lambda ids, which, known: ids.masked_fill(which, known.roles["mask"]))
    out = ModelOutput({}, tokens={"image": model.look(pictures())})
    logits, labels = model.caption(texts(case), out)
    close(logits[chosen], case["logits"])
    assert torch.equal(labels[chosen], case["input_ids"][chosen])
    assert (labels[~chosen] == -100).all()
    rows = len(WORDS)
    share = torch.full_like(case["logits"], 0.1 / (rows - 1)).scatter(1, labels[chosen][:, None], 0.9)
    loss = (share * (share.log() - F.log_softmax(logits[chosen], 1))).sum(1).mean()
    close(loss[None], case["loss"][None])
    assert gradients_close(model, case, loss) == set()
    for attend in ("all", "causal", PLACES - 1):  # what the mask of a prefix is not
        seen = model._states({"image": out.tokens["image"], "text": model._worded(texts(case, masked=True))}, attend=attend)["text"]
        assert far(model.head(seen)[chosen], case["logits"]) > 1e-2


def test_captions_word_by_word():
    """A mask behind the words tells the next, and nothing of it is kept: as torchscale does it, and as if all were read again."""
    case = golden(FILE, "captioning")
    model, ids, cache = loaded(build("beit_3", **inside()), case.state), case["spoken_ids"], None
    with torch.no_grad():
        seen = model.see(pictures())
        for length in range(1, ids.shape[1]):
            logits, cache = model.next_words(ids[:, length - 1 : length], seen, cache)
            close(logits, case["spoken"][length - 1])
            close(logits, model.next_words(ids[:, :length], seen, None)[0], STEPS)
            assert cache.length == PLACES + length
    assert far(case["spoken"][0], case["spoken"][1]) > 0.1


def swapped(state):
    ends = {".A.": ".B.", ".B.": ".A."}
    turned = {}
    for name, x in state.items():
        other = next((name.replace(end, to) for end, to in ends.items() if end in name and "embed_positions" not in name), name)
        turned[other] = x
    return turned


def shifted(state):
    return {name: x.roll(1, 0) if name in _beit3_keys.TABLES else x for name, x in state.items()}


def without(part):
    return lambda state: {name: torch.ones_like(x) if part in name and name.endswith("weight") else x for name, x in state.items()}


@pytest.mark.parametrize(
    "wrong, name",
    [
        (swapped, "experts"),
        (shifted, "places"),
        (without("inner_attn_ln"), "norm inside attention"),
        (without("ffn_layernorm"), "norm inside the feed-forward"),
        (without("encoder.layer_norm"), "last norm"),
    ],
)
def test_a_mistake_is_seen(wrong, name):
    case = golden(FILE, "reasoning")
    real = case["attention_mask"].bool()
    with torch.no_grad():
        found = states(loaded(build("beit_3", **inside()), wrong(case.state)), case)
    assert far(found["image"], case["states"][:, :PLACES]) > 1e-2, name
    assert far(found["text"][real], case["states"][:, PLACES:][real]) > 1e-2, name


def test_vision_alone_is_timms(retrieval):
    """timm's converter leaves the last norm out; with it mapped by hand its tower is ours."""
    case, model = retrieval
    tower = VisionTransformer(
        32, 8, embed_dim=64, depth=2, num_heads=4, num_classes=0, global_pool="token", scale_attn_norm=True, scale_mlp_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )  # fmt: skip
    converted = checkpoint_filter_fn(dict(case.state), tower)
    missing, _ = tower.load_state_dict(converted, strict=False)
    assert missing == ["norm.weight", "norm.bias"]
    with torch.no_grad():
        mine = states(model, case, text=False)["image"]
        assert far(tower.eval().forward_features(pictures().values), mine) > 0.1
        for end in ("weight", "bias"):
            tower.norm.get_parameter(end).copy_(case.state[f"beit3.encoder.layer_norm.A.{end}"])
        close(mine, tower.forward_features(pictures().values))
