"""Files of VLMo, BEiT and BEiT-3 as models of the zoo: names, sizes, heads, positions, what is dropped, and what is wrong with a file."""

import json

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.beit import Beit
from torch.nn.functional import gelu, layer_norm
from transformers import PreTrainedTokenizerFast

import zoo
from tests.bert_models import vocabulary
from tests.golden_files import golden
from tests.hot_weights import far
from tests.test_visual_tokenizer import published
from tests.vlmo_plain import Plain, Sizes, hot, shapes
from tools.named_weights import numbers
from zoo.convert import CONVERTED, convert
from zoo.errors import ZooError
from zoo.models import _beit3_keys, _vlmo_keys, vlmo
from zoo.relative_positions import resized
from zoo.types import Batch, ModalityInputs

SIZES = Sizes(length=24, rows=5000)  # the rows of the vocabulary that ships with the zoo
WORDS = ["<s>", "<pad>", "</s>", "<mask>", "[UNK]", *(f"w{i}" for i in range(115))]
LAYER = "beit3.encoder.layers.0.self_attn"
IDS = torch.tensor([[2, 30, 40, 3, 0, 0], [2, 50, 60, 70, 80, 3]])
PIXELS = torch.from_numpy(numbers("image", (2, 3, 32, 32))).float()


@pytest.fixture(scope="module")
def state():
    return hot(SIZES)


@pytest.fixture(scope="module")
def beit3():
    torch.manual_seed(0)
    return {name: x.clone() for name, x in _beit3_keys.to_unilm(zoo.build("beit_3", codes=12).state_dict()).items()}


def saved(tmp_path, state, container="model"):
    file = tmp_path / "theirs.pth"
    torch.save({container: state} if container else state, file)
    return file


def same(model, state, maker=_vlmo_keys.from_unilm):
    """Whether all that the file has is in the model."""
    own = model.state_dict()
    mapped = maker(state).state
    assert mapped
    return all(torch.equal(own[name], x) for name, x in mapped.items())


@pytest.mark.parametrize("container", ["state_dict", "module", "model", ""])
def test_vlmo(tmp_path, state, container):
    given = {**state, "relative_position_index": torch.zeros(17, 17), "text_relative_position_index": torch.zeros(24, 24)}
    given["text_imag_relative_position_index"] = torch.zeros(41, 41)
    prefix = "module." if container == "module" else ""
    done = convert(saved(tmp_path, {prefix + name: x for name, x in given.items()}, container), tmp_path / "ours")
    assert (done.model, done.program, done.drawn, done.resized) == ("vlmo", "vlmo", ["vision.mask"], "")
    assert done.settings == {
        "size": "tiny", "patch": 8, "layers": 4, "length": 24, "image_size": 32, "vocab_size": 5000, "two_scale": True,
    }  # fmt: skip
    assert sorted(done.dropped) == [
        "logit_scale", "logit_vl_scale", "relative_position_index", "text_embeddings.position_embeddings.weight",
        "text_embeddings.position_ids", "text_imag_relative_position_index", "text_relative_position_index",
    ]  # fmt: skip
    assert "attention knows how far apart" in done.dropped["text_embeddings.position_embeddings.weight"]
    model = zoo.load(tmp_path / "ours")
    assert same(model, state)
    assert torch.equal(model.kinds.weight[2], state["token_type_embeddings.weight"][1])  # as its authors begin NLVR2
    told = json.loads((tmp_path / "ours" / CONVERTED).read_text())
    assert told["left"].keys() == {"logit_scale", "logit_vl_scale"}


def test_vlmo_goes_back(state):
    model = zoo.build("vlmo")
    mapped = _vlmo_keys.from_unilm(state)
    model.load_state_dict(model.state_dict() | mapped.state)
    back = _vlmo_keys.to_unilm(model.state_dict())
    kinds = "token_type_embeddings.weight"
    assert {name for name in state if name not in back} == set(mapped.dropped)
    assert all(torch.equal(x, state[name]) for name, x in back.items() if name != kinds)
    assert torch.equal(back[kinds][:2], state[kinds])


def test_a_text_stage_of_vlmo(tmp_path, state):
    """No experts of pairs, no vectors, no matching: its file has nothing for them, and that is told."""
    few = {name: x for name, x in state.items() if "_vl" not in name and not name.startswith(("itc_", "itm_", "logit"))}
    done = convert(saved(tmp_path, few), tmp_path / "ours")
    assert done.settings["fusion"] == {"name": "mome", "from_layer": 4}
    assert not done.settings["two_scale"]
    assert done.drawn == ["vision.mask", "image_projection.weight", "text_projection.weight", "matches.weight", "matches.bias"]
    assert same(zoo.load(tmp_path / "ours"), few)
    with pytest.raises(ZooError, match=r"the file that it was converted from had nothing for text_projection\.weight"):
        zoo.load(tmp_path / "ours").encode([{"text": "a red ball"}])


def test_pictures_of_another_size(tmp_path, state):
    done = convert(saved(tmp_path, state), tmp_path / "ours", image_size=48)
    model, table = zoo.load(tmp_path / "ours"), state["relative_position_bias_table"]
    assert torch.equal(model.positions.table, resized(table, (4, 4), (6, 6)))
    assert torch.equal(model.positions.table[-len(table) + 49 :], table[49:])
    assert done.resized == f"{tuple(table.shape)} to {tuple(model.positions.table.shape)}"
    assert model.look(ModalityInputs(torch.zeros(1, 3, 48, 48))).pooled.isfinite().all()
    with pytest.raises(ZooError, match="write a larger picture"):
        convert(saved(tmp_path, state), tmp_path / "smaller", image_size=24)


def test_texts_of_another_length(tmp_path, state):
    """Rows of texts are none of pictures, however many there are: 36 more or less are those of a square."""
    file = saved(tmp_path, state)
    for length in (30, 36, 40):
        with pytest.raises(ZooError, match=f"of texts of 24 cannot be made those of texts of {length}: write length: 24"):
            convert(file, tmp_path / "ours", f"length={length}")
    convert(file, tmp_path / "ours", "length=20", image_size=40)  # its table is as long as before
    assert torch.equal(zoo.load(tmp_path / "ours").positions.table, resized(state["relative_position_bias_table"], (4, 4), (5, 5)))


def test_absolute_positions_of_vlmo(tmp_path, monkeypatch):
    monkeypatch.setitem(vlmo.SIZES, "tiny", vlmo.SIZES["tiny"]._replace(relative=None, layer_scale=None))
    plus = SIZES._replace(plus=True)
    state = hot(plus)
    done = convert(saved(tmp_path, state), tmp_path / "ours", image_size=48)
    places = zoo.load(tmp_path / "ours").vision.places.weight
    wanted = resample_abs_pos_embed(state["transformer.pos_embed"], [6, 6], antialias=False)[0]  # as its authors do it
    torch.testing.assert_close(places, wanted, rtol=0, atol=1e-5)
    assert done.resized == "(17, 64) to (37, 64)"


@pytest.mark.parametrize("pictures", [1, 2])
def test_answers_of_vlmo(tmp_path, state, pictures):
    stem, classes = ("vqa_classifier", 7) if pictures == 1 else ("nlvr2_classifier", 2)
    head = {f"{stem}.0.weight": (128, 64 * pictures), f"{stem}.0.bias": (128,), f"{stem}.1.weight": (128,), f"{stem}.1.bias": (128,)}
    head |= {f"{stem}.3.weight": (classes, 128), f"{stem}.3.bias": (classes,)}
    drawn = {name: 0.3 * torch.from_numpy(numbers(name, shape)).float() for name, shape in head.items()}
    three = {**state, "token_type_embeddings.weight": hot(SIZES._replace(kinds=3))["token_type_embeddings.weight"]}
    given = {name: x for name, x in three.items() if not name.startswith(("itc_", "itm_", "mlm_", "logit"))} | drawn
    done = convert(saved(tmp_path, given), tmp_path / "ours")
    assert (done.model, done.drawn) == ("vqa" if pictures == 1 else "nlvr2", ["vision.mask"])
    text, mask = ModalityInputs(IDS, IDS != 0), IDS != 0
    images = {"image": ModalityInputs(PIXELS), "image_2": ModalityInputs(PIXELS.flip(0))}
    model = zoo.load(tmp_path / "ours")
    with torch.no_grad():
        found = model(Batch({**dict(list(images.items())[:pictures]), "text": text})).logits["fused"]
        plain = Plain({name: x.double() for name, x in given.items()}, SIZES)
        seen = [images[key].values.double() for key in list(images)[:pictures]]
        read = torch.cat([plain.pooled(plain.pair(IDS, mask, x, kind=1 + i)) for i, x in enumerate(seen)], 1)
        weights = {name.removeprefix(f"{stem}."): x.double() for name, x in drawn.items()}
        inner = gelu(layer_norm(read @ weights["0.weight"].T + weights["0.bias"], (128,), weights["1.weight"], weights["1.bias"]))
        assert far(found.double(), inner @ weights["3.weight"].T + weights["3.bias"]) < 2e-5


def test_heads_that_answers_do_not_read_are_told(tmp_path, state):
    head = {"vqa_classifier.0.weight": (128, 64), "vqa_classifier.0.bias": (128,), "vqa_classifier.1.weight": (128,)}
    head |= {"vqa_classifier.1.bias": (128,), "vqa_classifier.3.weight": (7, 128), "vqa_classifier.3.bias": (7,)}
    done = convert(saved(tmp_path, {**state, **{name: torch.zeros(shape) for name, shape in head.items()}}), tmp_path / "vlmo")
    given = {name for name in state if name.startswith(("itc_", "itm_", "mlm_"))}
    assert len(given) == 4 + 2 + 6
    assert {name for name, why in done.dropped.items() if "answers do not read" in why} == given
    case = golden("beit3_torchscale", "answering").state
    tokenizer(tmp_path)
    done = convert(
        saved(tmp_path, {**case, "mlm_head.weight": torch.zeros(120, 64), "mlm_head.bias": torch.zeros(120)}), tmp_path / "beit3"
    )
    assert done.dropped.keys() >= {"mlm_head.weight", "mlm_head.bias"}


def test_a_visual_tokenizer_of_pictures_of_another_size(tmp_path):
    state = published()
    done = convert(saved(tmp_path, state), tmp_path / "ours", image_size=48)
    model = zoo.load(tmp_path / "ours")
    assert tuple(model.grid) == (6, 6)
    for tower in ("encoder", "decoder"):
        wanted = resample_abs_pos_embed(state[f"{tower}.pos_embed"], [6, 6])
        torch.testing.assert_close(model.get_parameter(f"{tower}.pos_embed"), wanted, rtol=0, atol=1e-5)
    assert done.resized == f"{tuple(state['decoder.pos_embed'].shape)} to {tuple(wanted.shape)}"


def test_a_beit_is_a_first_stage(tmp_path):
    torch.manual_seed(0)
    theirs = Beit(32, 8, num_classes=5, embed_dim=64, depth=4, num_heads=4, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    done = convert(saved(tmp_path, theirs.state_dict()), tmp_path / "ours")
    assert (done.model, done.program, done.settings["two_scale"]) == ("vlmo", "beit", False)
    assert set(done.dropped.values()) == {"a head that VLMo has not"}
    assert {"embed.words.weight", "kinds.weight", "trunk.norm.weight", "trunk.blocks.3.ffn.text.fc1.weight"} < set(done.drawn)
    assert not [name for name in done.drawn if ".image." in name or "qkv" in name or name.startswith("positions")]
    model = zoo.load(tmp_path / "ours")
    assert same(model, theirs.state_dict(), lambda state: _vlmo_keys.from_beit(state, 2 + 2 * 24))
    assert torch.equal(model.trunk.blocks[2].ffn["image"].fc1.weight, theirs.blocks[2].mlp.fc1.weight)


def test_beit_3(tmp_path, beit3, caplog):
    given = {**beit3, "logit_scale": torch.tensor(2.0)}
    done = convert(saved(tmp_path, given), tmp_path / "ours")
    assert (done.model, done.program, done.drawn, list(done.dropped)) == ("beit_3", "beit3", [], ["logit_scale"])
    assert done.settings == {"size": "tiny", "patch": 8, "image_size": 32, "layers": 4, "vocab_size": 5000, "codes": 12}
    model = zoo.load(tmp_path / "ours")
    assert same(model, beit3, _beit3_keys.from_unilm)
    assert "those of beit3.spm" in caplog.text
    back = _beit3_keys.to_unilm(model.state_dict())
    assert back.keys() == beit3.keys()
    assert all(
        torch.equal(back[name][2:] if name in _beit3_keys.TABLES else back[name], x[2:] if name in _beit3_keys.TABLES else x)
        for name, x in beit3.items()
    )


def test_a_retrieval_of_beit_3(tmp_path, beit3):
    few = {name: x for name, x in beit3.items() if not name.startswith(("pooler.", "mlm_head.", "mim_head."))}
    done = convert(saved(tmp_path, few), tmp_path / "ours")
    assert "codes" not in done.settings
    assert done.drawn == ["pooler.norm.weight", "pooler.norm.bias", "pooler.dense.weight", "pooler.dense.bias", "head.weight", "head.bias"]


def test_pictures_of_another_size_of_beit_3(tmp_path, beit3):
    done = convert(saved(tmp_path, beit3), tmp_path / "ours", image_size=48)
    before = beit3["beit3.encoder.embed_positions.A.weight"]
    places = zoo.load(tmp_path / "ours").vision.places.weight
    torch.testing.assert_close(places, resample_abs_pos_embed(before[None, 2:], [6, 6], antialias=False)[0], rtol=0, atol=1e-5)
    assert torch.equal(places[0], before[2])
    assert done.resized == "(17, 64) to (37, 64)"


def tokenizer(folder):
    inner = PreTrainedTokenizerFast(tokenizer_object=vocabulary(WORDS)._pieces._inner, pad_token="<pad>", unk_token="[UNK]")
    inner.save_pretrained(folder)


@pytest.mark.parametrize("name, model", [("answering", "vqa"), ("reasoning", "nlvr2")])
def test_answers_of_beit_3(tmp_path, name, model):
    """torchscale's encoder under the heads of both fine-tunings."""
    case = golden("beit3_torchscale", name)
    tokenizer(tmp_path)
    done = convert(saved(tmp_path, case.state), tmp_path / "ours")
    assert done.model == model
    assert done.settings["base"]["vocabulary"] == str(tmp_path)
    assert {entry.split(".")[0] for entry in done.drawn} == {"trunk" if model == "vqa" else "pooler"}
    assert all(entry.startswith(("trunk.norm.", "pooler.")) for entry in done.drawn)
    inputs = {"image": case.inputs["image"]} | ({"image_2": torch.from_numpy(numbers("second image", (3, 3, 32, 32))).float()})
    given = {key: ModalityInputs(x) for key, x in inputs.items() if key == "image" or model == "nlvr2"}
    given["text"] = ModalityInputs(case["input_ids"], case["attention_mask"].bool())
    with torch.no_grad():
        assert far(zoo.load(tmp_path / "ours")(Batch(given)).logits["fused"], case["logits"]) < 2e-5


def wrong(state, beit3, what):
    if what == "missing":
        return {name: x for name, x in state.items() if name != "transformer.blocks.2.attn.proj.weight"}
    if what == "unknown":
        return {**state, "transformer.adapter.weight": torch.zeros(2)}
    if what == "width":
        return {**state, "transformer.patch_embed.proj.weight": torch.zeros(80, 3, 8, 8)}
    if what == "heads":
        return {**state, "relative_position_bias_table": torch.zeros(102, 12)}
    if what == "rows":
        return {**state, "relative_position_bias_table": torch.zeros(103, 16)}
    if what == "no table":
        return {name: x for name, x in state.items() if name != "relative_position_bias_table"}
    if what == "a part of beit_3":
        return {name: x for name, x in beit3.items() if name != "beit3.encoder.layers.1.self_attn.k_proj.B.bias"}
    if what == "a layer of beit_3":
        return {name: x for name, x in beit3.items() if "layers.1.ffn.B" not in name}
    if what == "the last norm of beit_3":
        return {name: x for name, x in beit3.items() if not name.startswith("beit3.encoder.layer_norm.")}
    if what == "classes of pictures":
        return {**beit3, "head.weight": torch.zeros(5, 64), "fc_norm.weight": torch.zeros(64)}
    return {**beit3, "beit3.encoder.embed_positions.A.weight": torch.zeros(13, 64)}


@pytest.mark.parametrize(
    "what, says",
    [
        ("missing", "has nothing for trunk.blocks.2.out.weight of the model vlmo: the file is not whole"),
        ("unknown", "has transformer.adapter.weight, which the model vlmo does not"),
        ("width", "it is 80 wide, and vlmo has no such size (has: tiny 64, base 768, large 1024, base_plus 544)"),
        ("heads", "its table of relative positions is of 12 heads, not 4 times 4"),
        ("rows", "the table of relative positions of 103 rows, for texts of up to 24, is of no square of patches"),
        ("no table", "vlmo of this width has relative positions, and these weights have others, or none"),
        ("a part of beit_3", "have no beit3.encoder.layers.1.self_attn.k_proj.B.bias, and others of its layer"),
        ("a layer of beit_3", "has nothing for trunk.blocks.1.ffn.text.fc1.weight"),
        ("the last norm of beit_3", "has nothing for trunk.norm.image.weight, trunk.norm.image.bias, trunk.norm.text.weight"),
        ("classes of pictures", "has head.weight, fc_norm.weight, which the model beit_3 does not"),
        ("no square", "10 positions of patches make no square"),
    ],
)
def test_files_that_do_not_fit(tmp_path, state, beit3, what, says):
    with pytest.raises(ZooError) as fault:
        convert(saved(tmp_path, wrong(state, beit3, what)), tmp_path / "ours")
    assert says in str(fault.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "name, shape, says",
    [
        (f"{LAYER}.q_proj.A.weight", (3, 3), f"{LAYER}.q_proj.A.weight (3, 3), {LAYER}.k_proj.A.weight (64, 64), "),
        (f"{LAYER}.k_proj.A.weight", (32, 64), "are read as one weight, and should be of one shape"),
        (_beit3_keys.TABLES[0], (2, 64), f"{_beit3_keys.TABLES[0]}: 0 positions of patches make no square"),
        (_beit3_keys.TABLES[1], (), f"{_beit3_keys.TABLES[1]} is of shape (), and should have 2 axes"),
        ("beit3.vision_embed.proj.weight", (64,), "beit3.vision_embed.proj.weight is of shape (64,), and should have 4 axes"),
        ("transformer.patch_embed.proj.weight", (64, 192), "patch_embed.proj.weight is of shape (64, 192), and should have 4 axes"),
        ("relative_position_bias_table", (102,), "relative_position_bias_table is of shape (102,), and should have 2 axes"),
        ("token_type_embeddings.weight", (), "kinds.weight (), not (3, 64)"),
        ("vqa_classifier.3.weight", (), "vqa_classifier.3.weight is of shape (), and should have 2 axes"),
    ],
)
def test_weights_of_another_shape(tmp_path, state, beit3, name, shape, says):
    head = {f"vqa_classifier.{i}.{end}": torch.zeros(1) for i in (0, 1, 3) for end in ("weight", "bias")} if "vqa" in name else {}
    given = {**(beit3 if name.startswith("beit3.") else state), **head, name: torch.zeros(shape)}
    with pytest.raises(ZooError) as fault:
        convert(saved(tmp_path, given), tmp_path / "ours")
    assert says in str(fault.value)
    assert not (tmp_path / "ours").exists()


def test_tables_of_a_beit_of_several_shapes(tmp_path):
    theirs = Beit(32, 8, embed_dim=64, depth=2, num_heads=4, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1).state_dict()
    name = "blocks.1.attn.relative_position_bias_table"
    with pytest.raises(ZooError, match=rf"{name} is of shape \(3, 4\), and should be \(52, 4\)"):
        convert(saved(tmp_path, {**theirs, name: torch.zeros(3, 4)}), tmp_path / "ours")


@pytest.mark.parametrize(
    "name, says",
    [
        ("beit3.text_embed.weight", "has no beit3.text_embed.weight, and others of its model: the file is not whole"),
        ("text_embeddings.word_embeddings.weight", "has no text_embeddings.word_embeddings.weight, and others of its model"),
        ("transformer.blocks.0.norm2_imag.weight", "has nothing for trunk.blocks.0.norm2.image.weight of the model vlmo"),
    ],
)
def test_files_that_are_not_whole_are_known(tmp_path, state, beit3, name, says):
    given = {key: x for key, x in (beit3 if name.startswith("beit3.") else state).items() if key != name}
    with pytest.raises(ZooError) as fault:
        convert(saved(tmp_path, given), tmp_path / "ours")
    assert says in str(fault.value)


@pytest.mark.parametrize(
    "size, like",
    [
        ("base", Sizes(14, 16, 768, 12, 12, 10, 196, 30522, kinds=3)),
        ("large", Sizes(14, 16, 1024, 24, 16, 21, 196, 30522, kinds=3)),
        ("base_plus", Sizes(14, 16, 544, 24, 16, 21, 40, 30522, kinds=3, plus=True)),
    ],
)
def test_names_and_shapes_of_published_sizes(size, like):
    with torch.device("meta"):
        model = zoo.build("vlmo", size=size, vocabulary="small", vocab_size=30522)
    back = {name: tuple(x.shape) for name, x in _vlmo_keys.to_unilm(model.state_dict()).items()}
    unread = {"logit_scale", "logit_vl_scale", "text_embeddings.position_ids"}
    unread |= set() if like.plus else {"text_embeddings.position_embeddings.weight"}
    assert back == {name: shape for name, shape in shapes(like).items() if name not in unread}
    if size == "base":
        assert round(sum(x.numel() for x in model.parameters()) / 1e6, 1) == 202.4  # as counted of unilm's


@pytest.mark.parametrize("side, wanted, heads", [(224, 222.2, ("image_projection", "text_projection")), (480, 270.8, ("head",))])
def test_beit_3_is_as_large_as_published(side, wanted, heads):
    """For retrieval and for captions; the temperature is one more."""
    with torch.device("meta"):
        model = zoo.build("beit_3", size="base", image_size=side, vocabulary="small")
    others = {"image_projection", "text_projection", "head", "pooler"} - set(heads)
    count = sum(
        x.numel() + 2 * 768 * name.endswith("places.weight") for name, x in model.named_parameters() if name.split(".")[0] not in others
    )
    assert round(count / 1e6, 1) == wanted
