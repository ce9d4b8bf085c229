"""What tools/lavis_reference.py runs in the environment of salesforce-lavis: LAVIS' classes at tiny sizes, on weights drawn by name.

    PYTHONPATH=. <python of the environment> tools/lavis_cases.py --out tests/golden

What is stored of it, and how, is in tools/golden_cases.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tools.golden_cases import Arrays, Case, fill, gradients, write
from tools.named_weights import numbers

PACKAGES = ("lavis", "lavis.common", "lavis.models")  # their __init__ import every data set and model, hence spacy, opencv, decord, ...
VERSIONS = ("salesforce-lavis", "transformers", "tokenizers", "timm", "torch", "numpy")

WORDS = ["a", "the", "red", "blue", "green", "cat", "dog", "bird", "run", "sits", "on", "grass", "roof", "two", "picture", "of"]
LETTERS = [chr(code) for code in range(ord("b"), ord("z") + 1)]  # "a" is a word
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, "##a", *(f"##{letter}" for letter in LETTERS)]
CAPTIONS = ["a red cat sits on the roof", "two dogs", "the blue bird", "a picture of two green birds on the grass of the roof"]
PICTURES = [7, 7, 3, 5]  # the ids of the pictures: the first two captions are of one
WORD_COUNT = 12  # of a text with its special tokens; the last caption is cut
PICTURE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 4.0}
TEXT: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 128, "max_position_embeddings": 40,
    "encoder_width": 48, "add_cross_attention": True, "add_type_embeddings": False, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0, "type_vocab_size": 2,
}  # fmt: skip
SHARE = {"embed_dim": 32, "queue_size": 64, "momentum": 0.995, "alpha": 0.4}
ABOUT = {"vision": PICTURE, "text": TEXT, "captions": CAPTIONS, "vocabulary": VOCABULARY}
WHOLE = ("temp", "itm_head.weight", "itm_head.bias", "vision_proj.bias", "text_proj.bias", "visual_encoder.norm.weight")


def open_lavis() -> None:
    """Make ``lavis.models.<one>`` importable without importing all of LAVIS."""
    root = Path(str(distribution("salesforce-lavis").locate_file("lavis")))
    for name in PACKAGES:
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    np.Inf = np.inf  # type: ignore[attr-defined]  # gone since NumPy 2
    sys.modules["lavis.models"].BaseModel = importlib.import_module("lavis.models.base_model").BaseModel  # type: ignore[attr-defined]


def found(path: str) -> Any:
    """The class ``module:Class`` of lavis.models."""
    module, name = path.split(":")
    return vars(importlib.import_module(f"lavis.models.{module}"))[name]


@contextlib.contextmanager
def local_tokenizer() -> Iterator[None]:
    """Inside, the vocabulary that LAVIS asks a hub for is VOCABULARY; its own code adds [DEC] and [ENC]."""
    from transformers import BertTokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.txt")
        path.write_text("\n".join(VOCABULARY) + "\n")
        with mock.patch.object(BertTokenizer, "from_pretrained", side_effect=lambda _: BertTokenizer(str(path))):
            yield


@contextlib.contextmanager
def drawn() -> Iterator[list[tuple[Any, int]]]:
    """Inside, `torch.multinomial` draws the same in any precision; each draw is kept with the weights that it was from."""
    kept: list[tuple[Any, int]] = []

    def draw(weights: Any, count: int) -> Any:
        assert count == 1, count
        share = float(numbers(f"draw {len(kept)}", ())) / 12**0.5 + 0.5
        steps = (weights / weights.sum()).cumsum(0)
        index = int((steps <= share).sum())
        kept.append((weights, index))
        return torch.tensor([index])

    with mock.patch.object(torch, "multinomial", draw):
        yield kept


def whole(name: str) -> bool:
    """Whether the gradient of a parameter is kept as it is, or its corner."""
    return name in WHOLE or name.endswith("word_embeddings.weight")


def vision() -> Any:
    made = found("vit:VisionTransformerEncoder")(**PICTURE)
    made.vision_width = PICTURE["embed_dim"]
    return made


def text_config(**settings: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(**TEXT, **settings)


def pretrained(model: Any, output: Any, draws: list[tuple[Any, int]]) -> Arrays:
    """What the training classes of both families tell."""
    between, similar, rows = output.intermediate_output, output.sims, len(CAPTIONS)
    weights = torch.stack([weights for weights, _ in draws]).reshape(2, rows, rows)
    indices = np.array([index for _, index in draws]).reshape(2, rows)
    return {
        "image_embeds": between.image_embeds, "text_embeds": between.text_embeds, "fused": between.encoder_output.last_hidden_state,
        "image_embeds_m": between.image_embeds_m[:, 0], "text_embeds_m": between.text_embeds_m[:, 0],
        "itm_logits": between.itm_logits, "negative_images": indices[0], "negative_texts": indices[1],
        "weights_of_images": weights[0], "weights_of_texts": weights[1],
        "sim_i2t": similar.sim_i2t, "sim_t2i": similar.sim_t2i,
        "targets_i2t": similar.sim_i2t_targets, "targets_t2i": similar.sim_t2i_targets,
        "image_queue_after": model.image_queue[:, :rows].clone(), "text_queue_after": model.text_queue[:, :rows].clone(),
        "queue_ptr_after": model.queue_ptr.clone(),
    }  # fmt: skip


def samples(precision: torch.dtype, **more: Any) -> dict[str, Any]:
    """The batch of every case: B = 4; epoch 2 is after the ramp of the soft targets' share."""
    image = torch.from_numpy(numbers("image", (len(CAPTIONS), 3, PICTURE["img_size"], PICTURE["img_size"])).astype(np.float32))
    return {"image": image.to(precision), "text_input": CAPTIONS, "epoch": 2, "iters": 0, "num_iters_per_epoch": 10, **more}


def words(model: Any) -> Arrays:
    made = model.tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=WORD_COUNT, return_tensors="pt")
    return {"input_ids": made.input_ids, "attention_mask": made.attention_mask}


class Pool:
    """All that LAVIS' evaluation of retrieval reads of a data loader: each text once, each picture once."""

    def __init__(self, image: Any) -> None:
        self.dataset = types.SimpleNamespace(text=CAPTIONS, image=list(range(len(image))))
        self.image = image

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {"image": self.image}


def reranked(model: Any, batch: Mapping[str, Any]) -> Arrays:
    """LAVIS' scores of the two best by cosine: the logit of a match plus the cosine; the others stay at -100."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(batch["image"].dtype)  # that of the matrix which LAVIS makes
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        i2t, t2i = model.compute_sim_matrix(Pool(batch["image"]), types.SimpleNamespace(k_test=2))
    torch.set_default_dtype(before)
    return {"reranked_i2t": i2t, "reranked_t2i": t2i}


def step(model: Any, batch: Mapping[str, Any]) -> Arrays:
    """One forward of a training class: what it tells, its losses, and their gradients."""
    torch.manual_seed(0)
    with drawn() as draws:
        output = model(batch)
    losses = {name: output[name] for name in ("loss", "loss_itc", "loss_itm", "loss_mlm", "loss_lm") if output.get(name) is not None}
    return {**pretrained(model, output, draws), **losses, **gradients(model, losses, whole)}


def albef_pretrain(precision: torch.dtype) -> tuple[dict[str, Any], Arrays]:
    settings = {**SHARE, "mlm_mask_prob": 0.3, "max_txt_len": WORD_COUNT}
    config = text_config(vocab_size=len(VOCABULARY), fusion_layer=2)
    model = found("albef_models.albef_pretrain:AlbefPretrain")(vision(), found("med:BertForMaskedLM")(config), **settings)
    made = fill(model, precision)
    masked: Arrays = {}
    plain, student, teacher = model.mask, model.text_encoder.forward, model.text_encoder_m.forward

    def mask(*given: Any, **more: Any) -> Any:
        masked["mlm_ids"], masked["mlm_labels"] = plain(*given, **more)
        return masked["mlm_ids"], masked["mlm_labels"]

    def unmask(*given: Any, **more: Any) -> Any:
        output = student(*given, **more)
        masked["mlm_logits"] = output.logits
        return output

    def teach(*given: Any, **more: Any) -> Any:
        logits = teacher(*given, **more)
        masked["mlm_logits_m"] = logits[masked["mlm_labels"] != -100]
        return logits

    model.mask, model.text_encoder.forward, model.text_encoder_m.forward = mask, unmask, teach
    arrays = step(model, samples(precision))
    return {"class": "AlbefPretrain", "settings": settings, **made}, {**words(model), **arrays, **masked}


def retrieval(path: str, precision: torch.dtype, **config: Any) -> tuple[dict[str, Any], Arrays]:
    """Fine-tuning and evaluation of retrieval; pictures may have several texts. A second step meets the ids of the first in the queue."""
    settings = {**SHARE, "max_txt_len": WORD_COUNT}
    model = found(path)(vision(), found("med:XBertEncoder")(text_config(**config), add_pooling_layer=False), **settings)
    made = fill(model, precision)
    batch = samples(precision, image_id=torch.tensor(PICTURES))
    scores = reranked(model, batch)
    arrays = step(model, batch)
    with drawn():
        again = model(batch)
    kept = {name: value for name, value in arrays.items() if name not in ("image_embeds", "text_embeds", "fused")}
    more = {"image_ids": torch.tensor(PICTURES), "again_loss_itc": again.loss_itc, "again_targets_i2t": again.sims.sim_i2t_targets}
    return {"class": path.split(":")[1], "settings": settings, **made}, {**words(model), **kept, **scores, **more}


def albef_retrieval(precision: torch.dtype) -> tuple[dict[str, Any], Arrays]:
    return retrieval("albef_models.albef_retrieval:AlbefRetrieval", precision, vocab_size=len(VOCABULARY), fusion_layer=2)


def blip_retrieval(precision: torch.dtype) -> tuple[dict[str, Any], Arrays]:
    return retrieval("blip_models.blip_retrieval:BlipRetrieval", precision, vocab_size=len(VOCABULARY) + 2)


def blip_pretrain(precision: torch.dtype) -> tuple[dict[str, Any], Arrays]:
    settings, config = {**SHARE, "max_txt_len": WORD_COUNT}, text_config(vocab_size=len(VOCABULARY) + 2)
    encoder, decoder = found("med:XBertEncoder")(config, add_pooling_layer=False), found("med:XBertLMHeadDecoder")(config)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every pair that it ties
        model = found("blip_models.blip_pretrain:BlipPretrain")(vision(), encoder, decoder, **settings)
    made = fill(model, precision)
    told: Arrays = {}
    plain = model.text_decoder.forward

    def speak(ids: Any, *given: Any, **more: Any) -> Any:
        output = plain(ids, *given, **more)
        told.update(lm_ids=ids, lm_labels=more["labels"], lm_logits=output.logits)
        return output

    model.text_decoder.forward = speak
    arrays = step(model, samples(precision))
    return {"class": "BlipPretrain", "settings": settings, **made}, {**words(model), **arrays, **told}


def blip_caption(precision: torch.dtype) -> tuple[dict[str, Any], Arrays]:
    settings: dict[str, Any] = {"prompt": "a picture of ", "max_txt_len": WORD_COUNT}
    decoder = found("med:XBertLMHeadDecoder")(text_config(vocab_size=len(VOCABULARY) + 2))
    model = found("blip_models.blip_caption:BlipCaption")(vision(), decoder, **settings)
    made, batch = fill(model, precision), samples(precision)
    batch["text_input"] = [settings["prompt"] + caption for caption in CAPTIONS]
    ids = model.tokenizer(batch["text_input"], padding="longest", truncation=True, max_length=WORD_COUNT, return_tensors="pt")
    heard = {"input_ids": ids.input_ids, "attention_mask": ids.attention_mask}
    output = model(batch)
    between = output.intermediate_output
    arrays = gradients(model, {"loss": output.loss}, whole)
    spoken: Arrays = {}
    plain = model.text_decoder.generate_from_encoder
    for title, beams in (("greedy", 1), ("beam", 3)):
        model.text_decoder.generate_from_encoder = lambda title=title, **more: spoken.setdefault(title, plain(**more))
        with torch.no_grad():
            model.generate(batch, num_beams=beams, min_length=6, max_length=12)
    told = {"lm_labels": between.decoder_labels, "lm_logits": between.decoder_output.logits, "loss": output.loss}
    return {"class": "BlipCaption", "settings": settings, **made}, {**heard, **told, **arrays, **spoken}


CASES: dict[str, dict[str, Case]] = {
    "albef_lavis": {"pretrain": albef_pretrain, "retrieval": albef_retrieval},
    "blip_lavis": {"pretrain": blip_pretrain, "retrieval": blip_retrieval, "caption": blip_caption},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    open_lavis()
    with local_tokenizer():
        for family in CASES:
            write(family, CASES[family], ABOUT, VERSIONS, out)


if __name__ == "__main__":
    main()
