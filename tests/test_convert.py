"""Weights of other programs against those programs: names, sizes, positions, what is dropped, and what is wrong with a file."""

import json
import shutil
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa, MultimodalCfg
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch.nn.functional import normalize
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
)

import zoo
from zoo.abilities import Matching
from zoo.captions import caption, check_able
from zoo.checkpoint import Position, random_state, save_checkpoint
from zoo.convert import CONVERTED, convert, resampled
from zoo.errors import Failure, ZooError
from zoo.foreign import read_foreign
from zoo.models import _bert_keys, blip, clip, coca
from zoo.models._towers import Pictures, Texts
from zoo.registry import make
from zoo.reranking import Library
from zoo.sections import Decoding
from zoo.types import Batch, ModalityInputs, ModelOutput
from zoo.update import Step
from zoo.vocabulary import make_vocabulary

TOLERANCE = 1e-6  # ten times what float32 sums in another order differ by, of outputs of size 1
SMALL = make_vocabulary("small")
START, END, DECODE, ENCODE = (SMALL.roles[name] for name in ("start", "end", "decode", "encode"))
TINY = clip.SIZES["tiny"]


def heated(model, seed=0):
    """Weights on which the output clearly depends: norms and biases drawn, too, so that two that were exchanged differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            one = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(drawn / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.3 * drawn + one)
    return model.eval()


def clip_of(**more):
    see, read = TINY.pictures, TINY.texts
    vision = CLIPVisionCfg(
        layers=see.layers, width=see.width, head_width=see.width // see.heads, patch_size=see.patch, image_size=see.image_size
    )
    text = CLIPTextCfg(context_length=TINY.length, vocab_size=SMALL.size, width=read.width, heads=read.heads, layers=read.layers)
    return heated(CLIP(TINY.dim, vision, text, **more))


def hf_clip():
    see, read = TINY.pictures, TINY.texts

    def block(of):
        return {
            "hidden_size": of.width,
            "num_hidden_layers": of.layers,
            "num_attention_heads": of.heads,
            "intermediate_size": 4 * of.width,
        }

    words = {"vocab_size": SMALL.size, "max_position_embeddings": TINY.length, "bos_token_id": START, "eos_token_id": END}
    config = CLIPConfig(
        text_config={**block(read), **words, "hidden_act": "gelu"},
        vision_config={**block(see), "image_size": see.image_size, "patch_size": see.patch, "hidden_act": "gelu"},
        projection_dim=TINY.dim,
    )
    return heated(CLIPModel(config))


def blip_config(rows=SMALL.size):
    text = {"vocab_size": rows, "hidden_size": 64, "encoder_hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": DECODE, "pad_token_id": 0}
    text |= {"eos_token_id": END, "sep_token_id": END}
    vision = {"image_size": 32, "patch_size": 16, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 3, "layer_norm_eps": 1e-6, "initializer_range": 0.02}
    return BlipConfig(text_config=text, vision_config=vision, projection_dim=32, image_text_hidden_size=32)


def pixels(size, rows=3):
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def words(length=7, rows=3):
    ids = torch.randint(10, 4000, (rows, length), generator=torch.Generator().manual_seed(2))
    ids[:, 0], ids[:, -1] = START, END
    return ids


def batch(image, ids):
    return Batch({"image": ModalityInputs(image), "text": ModalityInputs(ids, torch.ones_like(ids, dtype=torch.bool))})


def vectors(model, image, ids):
    with torch.no_grad():
        out = model(batch(image, ids))
    return out.embeddings["image"], out.embeddings["text"]


def padded(ids, length=TINY.length):
    return torch.nn.functional.pad(ids, (0, length - ids.shape[1]))


def as_open_clip(model, image, ids):
    """Of open_clip's CLIP, whose end of a text is the largest id and here is not."""
    with torch.no_grad():
        model.text_pool_type, model.text_eos_id = "eos", END
        return model.encode_image(image), model.encode_text(padded(ids))


def close(a, b, tolerance=TOLERANCE):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", ["openai", "open_clip", "folder", "training"])
def test_clip_of_open_clip(tmp_path, form, caplog):
    quick = form in ("openai", "folder")
    theirs = clip_of(quick_gelu=quick)
    state, file = theirs.state_dict(), tmp_path / "weights.pt"
    if form == "openai":  # half the precision, and three numbers
        numbers = {"input_resolution": 64, "context_length": TINY.length, "vocab_size": SMALL.size}
        torch.save(state | {name: torch.tensor(x) for name, x in numbers.items()}, file)
    elif form == "open_clip":
        torch.save(state, file)
    elif form == "training":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": x for name, x in state.items()}}, file)
    else:
        file = tmp_path / "hub"
        file.mkdir()
        save_file(state, file / "open_clip_model.safetensors")
        (file / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 64, "quick_gelu": True}}))
    done = convert(file, tmp_path / "ours", "vocabulary=small")
    assert done.settings["size"] == "tiny"
    assert done.settings["activation"] == ("quick_gelu" if quick else "gelu")
    assert ("does not say its activation: gelu is assumed" in caplog.text) == (form in ("open_clip", "training"))
    left = {"input_resolution", "context_length", "vocab_size"} if form == "openai" else set()
    assert set(done.dropped) == {"logit_scale"} | left
    image, ids = pixels(64), words()
    ours = vectors(zoo.load(tmp_path / "ours"), image, ids)
    for own, other in zip(ours, as_open_clip(theirs, image, ids), strict=True):
        assert other.std() > 0.1
        close(own, other, 2e-6)


def test_clip_of_transformers_and_back(tmp_path):
    theirs = hf_clip()
    theirs.save_pretrained(tmp_path / "theirs")
    done = convert(tmp_path / "theirs", tmp_path / "ours", "vocabulary=small")
    assert (done.program, done.drawn, done.settings["activation"]) == ("hf_clip", [], "gelu")
    image, ids = pixels(64), words()
    own = [normalize(x, dim=-1) for x in vectors(zoo.load(tmp_path / "ours"), image, ids)]
    with torch.no_grad():
        out = theirs(input_ids=padded(ids), pixel_values=image)
    close(own[0], out.image_embeds)
    close(own[1], out.text_embeds)
    convert(tmp_path / "ours", tmp_path / "again", to="hf_clip")
    same_files(tmp_path / "theirs/model.safetensors", tmp_path / "again/model.safetensors")
    with torch.no_grad():
        again = CLIPModel.from_pretrained(tmp_path / "again").eval()(input_ids=padded(ids), pixel_values=image)
    assert torch.equal(again.logits_per_image, out.logits_per_image)


def same_files(one, other, but=()):
    """Whether two files of weights hold the same, bit for bit."""
    one, other = load_file(one), load_file(other)
    assert {name for name in one if name not in but} == set(other)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_clip_goes_back_to_open_clip(tmp_path):
    theirs = clip_of()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    convert(tmp_path / "weights.safetensors", tmp_path / "ours", "vocabulary=small")
    convert(tmp_path / "ours", tmp_path / "again", to="open_clip")
    same_files(tmp_path / "weights.safetensors", tmp_path / "again/open_clip_model.safetensors")
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'again'}").eval()
    image, ids = pixels(64), words()
    for own, other in zip(as_open_clip(loaded, image, ids), as_open_clip(theirs, image, ids), strict=True):
        assert torch.equal(own, other)


def test_coca_of_open_clip_and_back(tmp_path, monkeypatch):
    monkeypatch.setitem(
        coca.SIZES, "vit_b_32", coca.Size("open_clip", Pictures(32, 8, 64, 2, 4), Texts(32, 2, 4), 2, 32, 9, 2, 11, "small")
    )
    shape = {"context_length": 11, "vocab_size": SMALL.size, "width": 32, "heads": 4, "layers": 2}
    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32, "attentional_pool": True}
    vision |= {"attn_pooler_queries": 9, "attn_pooler_heads": 2, "output_tokens": True}
    text = CLIPTextCfg(**shape, embed_cls=True, output_tokens=True, pad_id=SMALL.roles["pad"])
    theirs = heated(CoCa(32, MultimodalCfg(**shape), text, CLIPVisionCfg(**vision), pad_id=SMALL.roles["pad"]))
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    done = convert(tmp_path / "weights.safetensors", tmp_path / "ours", "vocabulary=small")
    assert done.model == "coca"
    assert (done.settings["queries"], done.settings["length"], done.settings["legacy_cls_mask"]) == (9, 11, True)
    image, ids = pixels(32), words()
    ours = zoo.load(tmp_path / "ours")
    with torch.no_grad():
        out = ours(batch(image, ids))
        logits, _ = ours.caption(batch(image, ids).inputs["text"], out)
        said = theirs(image, padded(ids, 11))
    close(normalize(out.embeddings["image"], dim=-1), said["image_features"])
    close(normalize(out.embeddings["text"], dim=-1), said["text_features"])
    close(logits, said["logits"][:, :6], 1e-5)  # 6 words have a next one; logits are of size 10
    convert(tmp_path / "ours", tmp_path / "again", to="open_clip")
    same_files(tmp_path / "weights.safetensors", tmp_path / "again/open_clip_model.safetensors")
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'again'}").eval()
    with torch.no_grad():
        assert torch.equal(loaded(image, padded(ids, 11))["logits"], said["logits"])


def matched(ours, image, ids):
    """Our logits of a match, and cosines."""
    with torch.no_grad():
        text, out = batch(image, ids).inputs["text"], ours(batch(image, ids))
        logits = ours.match(ours.hold(text, out.tokens["text"]), out.tokens["image"])
    own = [normalize(out.embeddings[name], dim=-1) for name in ("image", "text")]
    return logits, own[0] @ own[1].T


def asked(theirs, image, ids):
    """transformers' logits of a match, of texts that begin with [ENC] as in training, and cosines."""
    encoded = ids.clone()
    encoded[:, 0] = ENCODE
    given = {"pixel_values": image, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return (
            theirs(input_ids=encoded, **given, use_itm_head=True).itm_score,
            theirs(input_ids=ids, **given, use_itm_head=False).itm_score,
        )


def test_blip_of_transformers_for_retrieval_and_back(tmp_path):
    theirs = heated(BlipForImageTextRetrieval(blip_config()))
    theirs.save_pretrained(tmp_path / "theirs")
    done = convert(tmp_path / "theirs", tmp_path / "ours", "vocabulary=small")
    assert done.model == "blip"
    assert done.settings["vision"]["layer"] == 1
    assert {name.partition(".")[0] for name in done.drawn} == {"head", "trunk"}
    assert all(".decode." in name for name in done.drawn if name.startswith("trunk"))
    image, ids = pixels(32), words()
    for own, other in zip(matched(zoo.load(tmp_path / "ours"), image, ids), asked(theirs, image, ids), strict=True):
        assert other.std() > 0.01
        close(own, other)
    convert(tmp_path / "ours", tmp_path / "again", to="hf_blip_retrieval")
    same_files(tmp_path / "theirs/model.safetensors", tmp_path / "again/model.safetensors")
    again = BlipForImageTextRetrieval.from_pretrained(tmp_path / "again").eval()
    for own, other in zip(asked(again, image, ids), asked(theirs, image, ids), strict=True):
        assert torch.equal(own, other)


def test_blip_of_transformers_for_captions_and_back(tmp_path):
    theirs = heated(BlipForConditionalGeneration(blip_config()))
    theirs.save_pretrained(tmp_path / "theirs")
    done = convert(tmp_path / "theirs", tmp_path / "ours", "vocabulary=small")
    assert {name.partition(".")[0] for name in done.drawn} == {"image_projection", "text_projection", "matches", "trunk"}
    ours, image, ids = zoo.load(tmp_path / "ours"), pixels(32), words()
    begun = torch.cat([torch.full((3, 1), DECODE), ids[:, 1:]], 1)
    with torch.no_grad():
        own, _ = ours.caption(batch(image, ids).inputs["text"], ours(batch(image, ids)))
        other = theirs(pixel_values=image, input_ids=begun, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    assert other.std() > 0.1
    close(own, other, 5e-6)  # logits are of size 5
    convert(tmp_path / "ours", tmp_path / "again", to="hf_blip_captioning")
    same_files(
        tmp_path / "again/model.safetensors",
        tmp_path / "theirs/model.safetensors",
        but=("text_decoder.cls.predictions.decoder.weight", "text_decoder.cls.predictions.decoder.bias"),
    )
    again = BlipForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=image, input_ids=begun, attention_mask=torch.ones_like(ids)).logits[:, :-1], other)


SALESFORCE = (  # what transformers renamed, by the sheet of both repositories
    ("vision_model.encoder.layers.", "visual_encoder.blocks."),
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
    ("vision_model.post_layernorm", "visual_encoder.norm"),
    ("self_attn.projection", "attn.proj"),
    ("self_attn.qkv", "attn.qkv"),
    ("layer_norm", "norm"),
)


def as_salesforce(state):
    """Weights of transformers' BLIP by the names of its authors."""
    found = {}
    for name, x in state.items():
        if name.startswith("vision_model"):
            for old, new in SALESFORCE:
                name = name.replace(old, new)
        found[name] = x
    return found


def test_blip_of_salesforce(tmp_path):
    theirs = heated(BlipForImageTextRetrieval(blip_config()))
    state = as_salesforce(theirs.state_dict())
    twins = {f"{name.partition('.')[0]}_m.{name.partition('.')[2]}": x for name, x in state.items() if not name.startswith("itm_head")}
    queues = {
        "image_queue": torch.zeros(32, 8),
        "text_queue": torch.zeros(32, 8),
        "ptr_queue": torch.zeros(1).long(),
        "temp": torch.tensor(0.07),
    }
    ids_of_places = {"text_encoder.embeddings.position_ids": torch.arange(64)[None]}
    torch.save({"model": {**state, **twins, **queues, **ids_of_places}, "optimizer": {"state": {}}, "epoch": 5}, tmp_path / "model.pth")
    done = convert(tmp_path / "model.pth", tmp_path / "ours", "vocabulary=small")
    assert done.program == "blip_retrieval"
    assert set(done.dropped) == {*twins, *queues, *ids_of_places}
    assert done.dropped["image_queue"] == "a queue of training"
    image, ids = pixels(32), words()
    for own, other in zip(matched(zoo.load(tmp_path / "ours"), image, ids), asked(theirs, image, ids), strict=True):
        close(own, other)
    said = json.loads((tmp_path / "ours" / CONVERTED).read_text())
    assert said["left"]["temp"] == pytest.approx(0.07)
    assert "text_proj_m.weight" in said["dropped"]


WIDE = blip.SIZES["tiny"]._replace(width=192, heads=3)  # of transformers' questions and answers pictures are as wide as texts


def of_questions():
    """transformers' model of questions and answers, and what it says of pictures, questions and the beginnings of answers."""
    config = blip_config().to_dict()
    config["text_config"] |= {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
    theirs = heated(BlipForQuestionAnswering(BlipConfig(**{key: config[key] for key in ("text_config", "vision_config")})))

    def says(of):
        asked, begun = words(), words()[:, :4]
        asked[:, 0], begun[:, 0] = ENCODE, DECODE
        with torch.no_grad():
            states = of.text_encoder(asked, encoder_hidden_states=of.vision_model(pixels(32)).last_hidden_state)[0]
            return of.text_decoder(begun, encoder_hidden_states=states).logits[:, :-1]

    return theirs, says


def answers_of(ours):
    """The same of ours."""
    with torch.no_grad():
        asked = ours.ask(ModalityInputs(words()), ours.look(ModalityInputs(pixels(32))))
        return ours.answering.caption(ModalityInputs(words()[:, :4]), ModelOutput({}, tokens={"image": asked}))[0]


def test_blip_of_transformers_for_questions_and_back(tmp_path, monkeypatch):
    monkeypatch.setitem(blip.SIZES, "tiny", WIDE)
    theirs, says = of_questions()
    theirs.save_pretrained(tmp_path / "theirs")
    done = convert(tmp_path / "theirs", tmp_path / "ours", "vocabulary=small")
    assert (done.model, done.program, done.settings["answerer"]) == ("blip", "hf_blip_vqa", True)
    assert not done.dropped
    assert all(".decode." in n or n.split(".")[0] in ("head", "image_projection", "text_projection", "matches") for n in done.drawn)
    ours, wanted = zoo.load(tmp_path / "ours"), says(theirs)
    assert wanted.std() > 0.1
    close(answers_of(ours), wanted, 1e-5)  # logits are of size 10
    assert (ours.answerer.trunk.blocks[0].ffn.fc1.weight - ours.trunk.blocks[0].ffn.fc1.weight).abs().max() > 0.1  # two BERTs
    with pytest.raises(ZooError, match="vectors of this model would mean nothing"):
        ours.encode([{"image": Image.new("RGB", (32, 32))}])
    convert(tmp_path / "ours", tmp_path / "again", to="hf_blip_vqa")
    tied = ("text_decoder.cls.predictions.decoder.weight", "text_decoder.cls.predictions.decoder.bias")
    same_files(tmp_path / "again/model.safetensors", tmp_path / "theirs/model.safetensors", but=tied)
    assert torch.equal(says(BlipForQuestionAnswering.from_pretrained(tmp_path / "again").eval()), wanted)


def test_blip_of_salesforce_for_questions(tmp_path, monkeypatch):
    monkeypatch.setitem(blip.SIZES, "tiny", WIDE)
    theirs, says = of_questions()
    state = as_salesforce(theirs.state_dict())
    twins = {f"{name.partition('.')[0]}_m.{name.partition('.')[2]}": x for name, x in state.items()}
    torch.save({"model": state | twins}, tmp_path / "model.pth")
    done = convert(tmp_path / "model.pth", tmp_path / "ours", "vocabulary=small")
    assert (done.program, set(done.dropped)) == ("blip_vqa", set(twins))
    close(answers_of(zoo.load(tmp_path / "ours")), says(theirs), 1e-5)
    del state["text_decoder.bert.encoder.layer.1.attention.output.LayerNorm.bias"]
    torch.save(state, tmp_path / "less.pth")
    refused(
        tmp_path / "less.pth",
        "has nothing for answerer.trunk.blocks.1.norm1.bias of the model blip: the file is not whole",
        out=tmp_path / "none",
    )


def test_a_blip_without_a_decoder_of_answers_is_no_model_of_them(tmp_path):
    zoo.save(zoo.build("blip"), tmp_path / "ours")
    with pytest.raises(ZooError, match=r"hf_blip_vqa: there answers have a decoder of their own, .* this model has none, pictures"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="hf_blip_vqa")


@pytest.fixture(scope="module")
def albef_file(tmp_path_factory):
    """A file of ALBEF, and the model that it was written from."""
    vision = {
        "name": "timm",
        "arch": "vit_tiny_patch16_224",
        "image_size": 32,
        "final_norm": True,
        "colours": "clip",
        "squash": True,
        "layer": 1,
    }
    ours = heated(zoo.build("albef", vision=vision, layers=4, dim=32, ends=False))
    state = ours.state_dict()
    theirs = _bert_keys.to_theirs(state, _bert_keys.entries_of("albef", state))
    file = tmp_path_factory.mktemp("albef") / "ALBEF.pth"
    torch.save({"model": {**theirs, "visual_encoder_m.cls_token": theirs["visual_encoder.cls_token"]}, "config": {"alpha": 0.4}}, file)
    return file, ours, theirs


def test_albef_of_salesforce(tmp_path, albef_file):
    file, before, theirs = albef_file
    assert {"text_encoder.bert.encoder.layer.3.crossattention.self.key.weight", "text_encoder.cls.predictions.decoder.weight"} < set(theirs)
    done = convert(file, tmp_path / "ours", "vocabulary=small")
    assert (done.model, done.drawn, done.settings["ends"]) == ("albef", [], False)
    assert list(done.dropped) == ["visual_encoder_m.cls_token"]
    after = zoo.load(tmp_path / "ours")
    assert all(torch.equal(x, after.state_dict()[name]) for name, x in before.state_dict().items())
    image, ids = pixels(32), words()
    for own, other in zip(matched(after, image, ids), matched(before, image, ids), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("old, new", [(4, 6), (6, 4), (7, 7), (14, 24)])
def test_positions_are_resized_as_timm_does(token, old, new):
    places = torch.randn(1, old * old + token, 8, generator=torch.Generator().manual_seed(0))
    wanted = resample_abs_pos_embed(places, [new, new], num_prefix_tokens=int(token))
    close(resampled(places, new * new + token), wanted)
    close(resampled(places[0], new * new + token), wanted[0])


@pytest.mark.parametrize("name", ["albef", "clip"])
def test_pictures_of_another_size(tmp_path, albef_file, name):
    if name == "albef":
        file, key, stem = albef_file[0], "vision.model.pos_embed", "visual_encoder.pos_embed"
    else:
        file, key, stem = tmp_path / "clip.pt", "vision.model.positional_embedding", "visual.positional_embedding"
        torch.save(clip_of().state_dict(), file)
    done = convert(file, tmp_path / "ours", "vocabulary=small", image_size=96)
    ours = zoo.load(tmp_path / "ours")
    before = read_foreign(file).state[stem]
    wanted = resample_abs_pos_embed(before if before.ndim == 3 else before[None], [6, 6])
    close(ours.state_dict()[key].reshape(wanted.shape), wanted)
    assert done.resized == f"{tuple(before.shape)} to {tuple(ours.state_dict()[key].shape)}"
    assert ours.processor.image.config()["size"] == 96
    assert vectors(ours, pixels(96), words())[0].isfinite().all()


def wrong(state, what):
    if what == "missing":
        del state["text_encoder.bert.encoder.layer.2.attention.output.dense.weight"]
    elif what == "half a layer":
        del state["text_encoder.bert.encoder.layer.2.attention.self.key.bias"]
    elif what == "unexpected":
        state["text_encoder.adapter.weight"] = torch.zeros(2)
    elif what == "shape":
        state["itm_head.weight"] = torch.zeros(3, 64)
    elif what == "untied":
        state["text_encoder.cls.predictions.decoder.weight"] = state["text_encoder.cls.predictions.decoder.weight"] + 1
    elif what == "no square":
        state["visual_encoder.pos_embed"] = torch.zeros(1, 7, 192)
    elif what == "width":
        state["text_encoder.bert.embeddings.word_embeddings.weight"] = torch.zeros(5000, 80)
    elif what == "blocks":
        state["visual_encoder.patch_embed.proj.weight"] = torch.zeros(80, 3, 16, 16)
    elif what == "classes":
        state["cls_head.0.weight"] = torch.zeros(2)
    return state


@pytest.mark.parametrize(
    "what, says",
    [
        ("missing", "has nothing for trunk.blocks.2.out.weight"),
        ("half a layer", "have no text_encoder.bert.encoder.layer.2.attention.self.key.bias"),
        ("unexpected", "has text_encoder.adapter.weight, which the model albef does not"),
        ("shape", "of another shape: matches.weight (3, 64), not (2, 64)"),
        ("untied", "are one parameter in this model, and differ"),
        ("no square", "6 positions of patches make no square"),
        ("width", "texts are 80 wide, 256 inside, with 64 places, and albef has no such size (has: tiny 64 and 64, base 768 and 512)"),
        ("blocks", "is 80 wide, 768 inside, with patches of 16 and 2 blocks, and none is known that is so"),
        ("classes", "a model with a head of classes"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, albef_file, what, says):
    torch.save({"model": wrong(dict(albef_file[2]), what)}, tmp_path / "wrong.pth")
    with pytest.raises(ZooError) as fault:
        convert(tmp_path / "wrong.pth", tmp_path / "ours", "vocabulary=small")
    assert says in str(fault.value)
    assert not (tmp_path / "ours").exists()


def refused(source, says, *overrides, kind=ZooError, out=None, **more):
    out = out or Path(source).parent / "ours"
    with pytest.raises(kind) as fault:
        convert(source, out, *overrides, **more)
    assert says in str(fault.value), str(fault.value)
    return out


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_files(tmp_path, albef_file, suffix, share):
    whole = tmp_path / f"whole.{suffix}"
    (torch.save if suffix == "pth" else save_file)({name: x.clone() for name, x in albef_file[2].items()}, whole)
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    out = refused(cut, "is damaged", kind=ZooError)
    assert not out.exists()


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    refused(tmp_path / "evil.pth", "holds more than tensors and plain values, which is not run here")
    assert not Path("ran").exists()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_torchscript_archive_is_not_run(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    refused(
        tmp_path / "ViT-B-32.pt", "is a TorchScript archive, a program with weights in it, which is not run here: where you trust it, write"
    )


def test_files_that_are_no_weights(tmp_path):
    refused(tmp_path / "nothing.pt", "no file or folder")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "which holds nothing: there should be model.safetensors or")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "holds a list, not tensors by name")
    torch.save({}, tmp_path / "empty.pt")
    refused(tmp_path / "empty.pt", "holds nothing: save a state_dict() alone")
    torch.save({"epoch": 3, "net": torch.zeros(2)}, tmp_path / "odd.pt")
    refused(tmp_path / "odd.pt", "holds 'epoch', which is no tensor")
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "its names, such as fc.weight, are of no model that is known; known are CLIP")
    for name, says in {
        "visual.layer1.0.conv1.weight": "a CLIP that looks through a ResNet",
        "visual.trunk.cls_token": "looks through a tower of timm",
        "vision_model.head.probe": "holds a SigLIP",
    }.items():
        save_file({name: torch.zeros(2)}, tmp_path / "relative.safetensors")
        refused(tmp_path / "relative.safetensors", says)
    answers = {"text_encoder.embeddings.word_embeddings.weight": torch.zeros(2), "text_decoder.bert.x": torch.zeros(2)}
    save_file(answers, tmp_path / "relative.safetensors")
    refused(tmp_path / "relative.safetensors", "an ALBEF of questions and answers")


def test_files_that_are_none_of_torch(tmp_path):
    for content, says in ((b"", "no file of weights (it ends too soon)"), (b"hello", "no file of weights (of no known form)")):
        (tmp_path / "text.pt").write_bytes(content)
        refused(tmp_path / "text.pt", says, kind=Failure)
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    refused(tmp_path / "page.pt", "which is not run here (Weights only load failed): where you trust it")


@pytest.mark.parametrize("program", ["open_clip", "hf_clip"])
def test_a_clip_that_is_not_whole(tmp_path, program):
    state = dict((clip_of() if program == "open_clip" else hf_clip()).state_dict())
    lost = "ln_final.weight" if program == "open_clip" else "text_model.final_layer_norm.bias"
    torch.save({name: x for name, x in state.items() if name != lost}, tmp_path / "lost.pt")
    refused(tmp_path / "lost.pt", "has nothing for text.model.ln_final.", "vocabulary=small")
    assert not (tmp_path / "ours").exists()
    known = "image_projection.weight" if program == "open_clip" else "visual_projection.weight"
    state[known if known in state else "visual.proj"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    refused(tmp_path / "nan.pt", "holds numbers that are not finite", "vocabulary=small")


def test_it_is_whole_or_not_there(tmp_path, albef_file, monkeypatch):
    def stopped(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["zoo.convert"], "write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            convert(albef_file[0], tmp_path / "deep/ours", "vocabulary=small")
    assert list((tmp_path / "deep").iterdir()) == []
    convert(albef_file[0], tmp_path / "deep/ours", "vocabulary=small")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["ours"]


def test_a_folder_of_the_zoo_is_none_of_another_program(tmp_path, albef_file):
    convert(albef_file[0], tmp_path / "ours", "vocabulary=small")
    for source in ("ours", "ours/model.safetensors"):
        refused(tmp_path / source, "is of a model folder of the zoo, which needs no conversion; to write it", out=tmp_path / "x")
    refused(tmp_path / "ours/model.safetensors", "which is a file: a run folder has model.json", out=tmp_path / "x", to="open_clip")


def test_shards_of_a_large_model(tmp_path):
    theirs = hf_clip()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="500KB")
    shards = sorted((tmp_path / "theirs").glob("model-*.safetensors"))
    assert len(shards) > 1
    done = convert(tmp_path / "theirs", tmp_path / "ours", "vocabulary=small")
    assert done.drawn == []
    index = tmp_path / "theirs/model.safetensors.index.json"
    said = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**said["weight_map"], "more": shards[0].name}}))
    refused(tmp_path / "theirs", f"promises more, and {shards[0].name} has no such tensor", kind=Failure, out=tmp_path / "x")
    index.write_text("{")
    refused(tmp_path / "theirs", "is damaged", kind=Failure, out=tmp_path / "x")
    index.write_text(json.dumps(said))
    shards[0].unlink()
    refused(tmp_path / "theirs", f"names {shards[0].name}, which is not there", out=tmp_path / "x")


def test_a_config_that_says_something_else(tmp_path):
    theirs = hf_clip()
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "text_config": {**said["text_config"], "num_attention_heads": 8}}))
    refused(tmp_path / "theirs", "says 8 heads for texts, and models of these widths have 4 here", "vocabulary=small")
    file.write_text("{")
    refused(tmp_path / "theirs", "config.json is damaged", kind=Failure)
    file.write_text("[]")
    refused(tmp_path / "theirs", "it holds a list", kind=Failure)


def test_settings_that_are_wrong(tmp_path, albef_file):
    file = albef_file[0]
    refused(file, "write key=value", "vocabulary", out=tmp_path / "a")
    refused(file, "'lenght'", "lenght=3", out=tmp_path / "a")
    refused(file, "vocab_size", "vocabulary=small", "vocab_size=100", out=tmp_path / "a")
    refused(file, "image_size: 33 is no multiple of the 16 of a patch", "vocabulary=small", image_size=33, out=tmp_path / "a")
    refused(file, "nothing but --logit-scale can be set", image_size=32, to="open_clip", out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    refused(file, "is there already: name a new folder", out=tmp_path / "full")
    assert (tmp_path / "full/notes.txt").read_text() == "mine"
    inside = tmp_path / "full/notes.txt/clip"
    refused(file, f"the folder {inside} cannot be written (File exists): write a place that can", out=inside)


def test_models_that_other_programs_do_not_have(tmp_path, albef_file):
    convert(albef_file[0], tmp_path / "albef", "vocabulary=small")
    refused(tmp_path / "albef", "no program to write for named 'onnx'", to="onnx", out=tmp_path / "x")
    refused(tmp_path / "albef", "hf_clip takes a CLIP, and this is a Albef", to="hf_clip", out=tmp_path / "x")
    refused(tmp_path / "albef", "open_clip takes a CLIP or a CoCa", to="open_clip", out=tmp_path / "x")
    for name, to, says in (
        ("blip", "hf_blip_retrieval", "looks through a plain vision transformer of timm"),
        ("coca", "open_clip", "open_clip's CoCa has one pooler"),
    ):
        zoo.save(zoo.build(name, **({"vision": "tiny_image"} if name == "blip" else {})), tmp_path / name)
        refused(tmp_path / name, says, to=to, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_temperature_of_ones_own(tmp_path):
    zoo.save(zoo.build("clip"), tmp_path / "ours")
    for given, wanted in ((None, 2.6592600), (1.5, 1.5)):
        convert(tmp_path / "ours", tmp_path / f"theirs {given}", to="hf_clip", logit_scale=given)
        assert load_file(tmp_path / f"theirs {given}/model.safetensors")["logit_scale"].item() == pytest.approx(wanted)


def test_what_a_file_had_nothing_for_is_not_asked(tmp_path):
    picture, how = {"image": Image.new("RGB", (32, 32))}, Decoding(method="greedy")
    for name, kind in (("reads", BlipForImageTextRetrieval), ("writes", BlipForConditionalGeneration)):
        heated(kind(blip_config())).save_pretrained(tmp_path / "theirs" / name)
        convert(tmp_path / "theirs" / name, tmp_path / name, "vocabulary=small")
        zoo.save(zoo.load(tmp_path / name), tmp_path / f"{name} again")  # what was drawn goes along
    for end in ("", " again"):
        reads, writes = zoo.load(tmp_path / f"reads{end}"), zoo.load(tmp_path / f"writes{end}")
        assert len(caption(writes, [picture], how)) == len(reads.encode([picture])) == len(Library(reads, ["a dog"])) == 1
        with pytest.raises(ZooError, match=r"captions of this model would mean nothing: .* had nothing for head\.bias, head\.dense\.bias"):
            caption(reads, [picture], how)
        with pytest.raises(ZooError, match=r"vectors of this model would mean nothing: .* image_projection\.bias"):
            writes.encode([picture])
        with pytest.raises(ZooError, match=r"matches of this model would mean nothing"):
            Library(writes, ["a dog"])
        with pytest.raises(ZooError, match=r"matches of this model would mean nothing"):
            check_able(writes, Matching, "the filter")


@pytest.mark.parametrize(
    "objective, wanted",
    [
        ({"name": "infonce", "log_scale": 1.25}, 1.25),
        ({"name": "itc", "temperature": "raw", "start": 0.25}, 1.3862944),
        ({"name": "together", "of": [{"name": "itc", "temperature": "log_scale", "start": 0.5}], "momentum": 0.9}, 0.6931472),
        ({"name": "itc", "temperature": "fixed", "start": 0.125}, 2.0794415),
    ],
)
def test_the_temperature_that_a_run_learned(tmp_path, objective, wanted, caplog):
    model = zoo.build("clip")
    zoo.save(model, tmp_path / "run")
    trained = make("objective", objective)
    trained.bind(model)
    step = Step(model, trained)
    save_checkpoint(tmp_path / "run/checkpoints", step.state_dict(), {}, Position(3), {}, [random_state()], keep=1)
    convert(tmp_path / "run", tmp_path / "theirs", to="hf_clip")
    assert load_file(tmp_path / "theirs/model.safetensors")["logit_scale"].item() == pytest.approx(wanted)
    assert not caplog.records
    shutil.rmtree(tmp_path / "run/checkpoints")
    convert(tmp_path / "run", tmp_path / "again", to="hf_clip")
    assert "says the temperature: logit_scale is written as 2.6593; --logit-scale says another" in caplog.text
