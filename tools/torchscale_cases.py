"""What tools/torchscale_reference.py runs in the environment of torchscale: its BEiT-3 at a tiny size, on weights drawn by name.

    PYTHONPATH=. <python of the environment> tools/torchscale_cases.py --out tests/golden

torchscale has the encoder. The heads of the fine-tunings, which Microsoft released apart from it, are a few layers each and are written
here after what is known of them; those of pre-training, whose code is not released, after the names in its files. What is stored, and
how, is in tools/golden_cases.py.
"""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.golden_cases import Arrays, Case, fill, gradients, write
from tools.named_weights import numbers

VERSIONS = ("torchscale", "timm", "torch", "numpy")
PICTURE = {"img_size": 32, "patch_size": 8}
SIZE: dict[str, Any] = {"encoder_embed_dim": 64, "encoder_attention_heads": 4, "encoder_ffn_embed_dim": 256, "encoder_layers": 2}
ROWS, CODES, ANSWERS = 120, 12, 7  # words, visual tokens, answers
START, PAD, END, MASK = 0, 1, 2, 3
LENGTHS = (10, 6, 3)  # of the texts, with their special ids
PLACES = 1 + 16  # of a picture in the sequence
LONGEST = 66  # rows of the table of positions of texts, of which the first two are not used
ABOUT = {"vision": PICTURE, "size": SIZE, "words": ROWS, "codes": CODES, "answers": ANSWERS}
WHOLE = ("beit3.encoder.layers.1.self_attn.k_proj.A.bias", "beit3.vision_embed.mask_token", "beit3.vision_embed.cls_token", "logit_scale")


def open_torchscale() -> None:
    """Make torchscale's BEiT-3 importable without fairscale, two functions of which it imports and does not call here."""
    for name in ("fairscale", "fairscale.nn"):
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules["fairscale.nn"]).update(checkpoint_wrapper=None, wrap=None)


def encoder(*, final_norm: bool = True) -> Any:
    """BEiT-3's encoder."""
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    config = EncoderConfig(
        **PICTURE,
        **SIZE,
        vocab_size=ROWS,
        multiway=True,
        layernorm_embedding=False,
        normalize_output=final_norm,
        no_output_layer=True,
        max_source_positions=LONGEST,
    )
    return BEiT3(config)


class Retrieval(nn.Module):
    """Both modalities alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.beit3 = encoder()
        self.language_head, self.vision_head = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor, ids: Tensor, pads: Tensor) -> Arrays:
        seen = self.beit3(visual_tokens=image)["encoder_out"]
        read = self.beit3(textual_tokens=ids, text_padding_position=pads)["encoder_out"]
        vectors = F.normalize(self.vision_head(seen[:, 0]), dim=-1), F.normalize(self.language_head(read[:, 0]), dim=-1)
        scores, label = self.logit_scale.exp() * vectors[0] @ vectors[1].T, torch.arange(len(ids))
        loss = (F.cross_entropy(scores, label) + F.cross_entropy(scores.T, label)) / 2
        return {"image_states": seen, "text_states": read, "image_vectors": vectors[0], "text_vectors": vectors[1], "loss": loss}


class Reasoning(nn.Module):
    """A sentence about two pictures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.beit3, self.head = encoder(), nn.Module()
        for name, layer in (("norm1", nn.LayerNorm(4 * width)), ("dense1", nn.Linear(4 * width, 2 * width))):
            self.head.add_module(name, layer)
        for name, layer in (("norm2", nn.LayerNorm(2 * width)), ("dense2", nn.Linear(2 * width, 2))):
            self.head.add_module(name, layer)

    def forward(self, image: Tensor, other: Tensor, ids: Tensor, pads: Tensor) -> Arrays:
        states = [self.beit3(textual_tokens=ids, visual_tokens=x, text_padding_position=pads)["encoder_out"] for x in (image, other)]
        compared = torch.cat([part for x in states for part in (x[:, 0], x[:, PLACES])], 1)
        head: Any = self.head
        logits = head.dense2(F.gelu(head.norm2(head.dense1(head.norm1(compared)))))
        loss = F.cross_entropy(logits, torch.tensor([1, 0, 1]))
        return {"states": states[0], "compared": compared, "logits": logits, "loss": loss}


class Answering(nn.Module):
    """A question about a picture; this encoder has no norm at its end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.beit3, self.pooler = encoder(final_norm=False), nn.Module()
        self.pooler.add_module("norm", nn.LayerNorm(width))
        self.pooler.add_module("dense", nn.Linear(width, width))
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, ANSWERS))

    def forward(self, image: Tensor, ids: Tensor, pads: Tensor) -> Arrays:
        states, pooler = self.beit3(textual_tokens=ids, visual_tokens=image, text_padding_position=pads)["encoder_out"], self.pooler
        pooled = torch.tanh(pooler.dense(pooler.norm(states[:, 0])))  # type: ignore[operator]
        logits = self.head(pooled)
        loss = F.binary_cross_entropy_with_logits(logits, torch.eye(ANSWERS)[[0, 3, 6]].to(logits)) * ANSWERS
        return {"pooled": pooled, "logits": logits, "loss": loss}


class Captioning(nn.Module):
    """A picture, and words that see it and those before them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.beit3, self.mlm_head = encoder(), nn.Linear(width, ROWS)

    def hidden(self, text: int) -> Tensor:
        """(17 + text, 17 + text), 1 where a place is not seen: pictures see themselves, words the picture and what stands before."""
        seen = torch.ones(PLACES + text, PLACES + text, dtype=torch.long).tril()
        seen[:PLACES, :PLACES] = 1
        return 1 - seen

    def forward(self, image: Tensor, ids: Tensor, masked: Tensor, pads: Tensor) -> Arrays:
        given = torch.where(masked, MASK, ids)
        mask = self.hidden(ids.shape[1])
        states = self.beit3(textual_tokens=given, visual_tokens=image, text_padding_position=pads, attn_mask=mask)["encoder_out"]
        logits, wanted = self.mlm_head(states[:, PLACES:][masked]), ids[masked]
        share = torch.full_like(logits, 0.1 / (ROWS - 1)).scatter(1, wanted[:, None], 0.9)
        loss = (share * (share.log() - F.log_softmax(logits, 1))).sum(1).mean()
        return {"states": states, "logits": logits, "loss": loss}

    def speak(self, image: Tensor, ids: Tensor) -> Tensor:
        """(words, B, V) logits of each next word: a mask at its place predicts it, and what is kept of the mask is thrown away."""
        kept: dict[int, dict[str, Tensor]] = {number: {} for number in range(SIZE["encoder_layers"])}
        said = []
        for length in range(2, ids.shape[1] + 1):
            first = length == 2
            given = torch.cat([ids[:, length - 2 : length - 1], torch.full((len(ids), 1), MASK)], 1)
            mask, places = self.hidden(length), None if first else torch.arange(length, length + 2)[None]  # of a word at i: i + 2
            states = self.beit3(
                textual_tokens=given,
                visual_tokens=image if first else None,
                attn_mask=mask if first else mask[-2:],
                incremental_state=kept,
                positions=places,
            )["encoder_out"]
            said.append(self.mlm_head(states[:, -1]))
            for of in kept.values():
                of.update({name: value[:, :, :-1] for name, value in of.items()})
        return torch.stack(said)


class Masked(nn.Module):
    """Pre-training: words and visual tokens are told from what is around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.beit3, self.mlm_head, self.mim_head = encoder(), nn.Linear(width, ROWS), nn.Linear(width, CODES)

    def forward(self, image: Tensor, hidden: Tensor, ids: Tensor, masked: Tensor, pads: Tensor) -> Arrays:
        given, there = torch.where(masked, MASK, ids), {"text_padding_position": pads}
        seen = self.beit3(visual_tokens=image, vision_masked_position=hidden)["encoder_out"]
        read = self.beit3(textual_tokens=given, **there)["encoder_out"]
        both = self.beit3(textual_tokens=given, visual_tokens=image, vision_masked_position=hidden, **there)["encoder_out"]
        codes = {"image_codes": self.mim_head(seen[:, 1:][hidden]), "pair_codes": self.mim_head(both[:, 1:PLACES][hidden])}
        words = {"text_words": self.mlm_head(read[masked]), "pair_words": self.mlm_head(both[:, PLACES:][masked])}
        right = torch.arange(hidden.numel()).reshape(hidden.shape)[hidden] % CODES
        loss = sum(F.cross_entropy(x, right) for x in codes.values()) + sum(F.cross_entropy(x, ids[masked]) for x in words.values())
        return {**codes, **words, "loss": loss}


def pictures(name: str, precision: torch.dtype) -> Tensor:
    """(3, 3, 32, 32)."""
    return torch.from_numpy(numbers(name, (len(LENGTHS), 3, PICTURE["img_size"], PICTURE["img_size"])).astype(np.float32)).to(precision)


def texts() -> tuple[Tensor, Tensor]:
    """Ids (3, 10), and where they are padding."""
    ids = torch.full((len(LENGTHS), max(LENGTHS)), PAD)
    for row, length in enumerate(LENGTHS):
        drawn = torch.from_numpy(numbers(f"text {row}", (length - 2,)))
        ids[row, :length] = torch.tensor([START, *(62 + (drawn * 30).long()).tolist(), END])
    return ids, ids == PAD


def masked_words(ids: Tensor) -> Tensor:
    """Which words are hidden: every second, and where the text ends."""
    return ((torch.arange(ids.shape[1]) % 2 == 1) & (ids != PAD)) | (ids == END)


def case(
    model: type[nn.Module], title: str, precision: torch.dtype, *given: Any, more: Arrays | None = None
) -> tuple[dict[str, Any], Arrays]:
    """One class, its weights, what it tells, and the gradients of its loss."""
    ids, _ = texts()
    made = model(SIZE["encoder_embed_dim"])
    described = fill(made, precision)
    arrays = made(*given)
    arrays |= gradients(made, {"loss": arrays["loss"]}, WHOLE.__contains__)
    if isinstance(made, Captioning):
        with torch.no_grad():
            arrays["spoken_ids"] = torch.where(ids == PAD, 70, ids)
            arrays["spoken"] = made.speak(given[0], arrays["spoken_ids"])
    arrays |= {"input_ids": ids, "attention_mask": (ids != PAD).long(), **(more or {})}
    return {"class": title, "settings": {}, **described}, arrays


def retrieval(precision: torch.dtype) -> tuple[dict[str, Any], Arrays]:
    return case(Retrieval, "BEiT3ForRetrieval", precision, pictures("image", precision), *texts())


def reasoning(precision: torch.dtype) -> tuple[dict[str, Any], Arrays]:
    both = pictures("image", precision), pictures("second image", precision)
    return case(Reasoning, "BEiT3ForVisualReasoning", precision, *both, *texts())


def answering(precision: torch.dtype) -> tuple[dict[str, Any], Arrays]:
    return case(Answering, "BEiT3ForVisualQuestionAnswering", precision, pictures("image", precision), *texts())


def captioning(precision: torch.dtype) -> tuple[dict[str, Any], Arrays]:
    ids, pads = texts()
    masked = masked_words(ids)
    given = pictures("image", precision), ids, masked, pads
    return case(Captioning, "BEiT3ForCaptioning", precision, *given, more={"masked": masked.long()})


def pretraining(precision: torch.dtype) -> tuple[dict[str, Any], Arrays]:
    ids, pads = texts()
    hidden = torch.from_numpy(numbers("hidden patches", (len(LENGTHS), PLACES - 1))) > 0.4
    masked = masked_words(ids)
    given = pictures("image", precision), hidden, ids, masked, pads
    return case(Masked, "pre-training", precision, *given, more={"masked": masked.long(), "hidden": hidden.long()})


CASES: dict[str, Case] = {
    "retrieval": retrieval, "reasoning": reasoning, "answering": answering, "captioning": captioning, "pretraining": pretraining,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    open_torchscale()
    write("beit3_torchscale", CASES, ABOUT, VERSIONS, out)


if __name__ == "__main__":
    main()
