"""VLMo once more, in plain sums: each token goes through its own expert, each pair of tokens looks up its own row of the table.

    from tests.vlmo_plain import Plain, Sizes, hot

    sizes = Sizes()
    state = hot(sizes)                                    # by the names of Microsoft's files
    Plain(state, sizes).pair(ids, mask, pixels)           # (B, text + 1 + patches, D)

From the paper (Bao et al., 2021, https://arxiv.org/abs/2111.02358) and what is known of its released code; nothing of the zoo is in it.
Slow, and differentiable to every weight.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tools.named_weights import numbers

EXPERT = {"text": "text", "image": "imag"}  # of tokens of one kind, in the names of the files


class Sizes(NamedTuple):
    """Of a model."""

    side: int = 4  # patches of a side
    patch: int = 8  # pixels of a patch's side
    width: int = 64
    layers: int = 4
    heads: int = 4
    first: int = 3  # the first block with the expert of pairs
    length: int = 12  # of the longest text
    rows: int = 120  # words
    kinds: int = 2  # of tokens: text, picture, and perhaps a second picture
    plus: bool = False  # base_plus: learned places, no factors of the sub-layers, no relative positions


class Token(NamedTuple):
    """One place of a sequence."""

    kind: str  # "text" or "image"
    at: int  # among those of its kind; 0 is the class token


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every entry of a file of pre-training."""
    D, offsets = sizes.width, (2 * sizes.side - 1) ** 2
    found: dict[str, tuple[int, ...]] = {"transformer.cls_token": (1, 1, D)}
    found |= {"transformer.patch_embed.proj.weight": (D, 3, sizes.patch, sizes.patch), "transformer.patch_embed.proj.bias": (D,)}
    for i in range(sizes.layers):
        found |= _block(sizes, i)
    found |= _norm("transformer.norm", D)
    if sizes.plus:
        found |= {"transformer.pos_embed": (1, sizes.side**2 + 1, D)}
    else:
        found |= {"relative_position_bias_table": (offsets + 3 + 2 + 2 * sizes.length, sizes.layers * sizes.heads)}
    texts = "text_embeddings."
    found |= {f"{texts}word_embeddings.weight": (sizes.rows, D), f"{texts}position_embeddings.weight": (sizes.length, D)}
    found |= {f"{texts}token_type_embeddings.weight": (2, D), f"{texts}position_ids": (1, sizes.length), **_norm(f"{texts}LayerNorm", D)}
    found |= {"token_type_embeddings.weight": (sizes.kinds, D), **_linear("pooler.dense", D, D), **_linear("itm_score.fc", D, 2)}
    found |= {**_linear("mlm_score.transform.dense", D, D), **_norm("mlm_score.transform.LayerNorm", D)}
    found |= {"mlm_score.decoder.weight": (sizes.rows, D), "mlm_score.bias": (sizes.rows,), "logit_scale": (), "logit_vl_scale": ()}
    return found | {f"itc_{each}_proj.fc.weight": (D, D) for each in ("text", "image", "vl_text", "vl_image")}


def _block(sizes: Sizes, number: int) -> dict[str, tuple[int, ...]]:
    D, stem = sizes.width, f"transformer.blocks.{number}."
    found = {**_norm(f"{stem}norm1", D), f"{stem}attn.qkv.weight": (3 * D, D), f"{stem}attn.q_bias": (D,), f"{stem}attn.v_bias": (D,)}
    found |= _linear(f"{stem}attn.proj", D, D)
    found |= {} if sizes.plus else {f"{stem}gamma_1": (D,), f"{stem}gamma_2": (D,)}
    for expert in ("text", "imag", "vl") if number >= sizes.first else ("text", "imag"):
        found |= _norm(f"{stem}norm2_{expert}", D)
        found |= {**_linear(f"{stem}mlp_{expert}.fc1", D, 4 * D), **_linear(f"{stem}mlp_{expert}.fc2", 4 * D, D)}
    return found


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inward: int, outward: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outward, inward), f"{name}.bias": (outward,)}


def hot(sizes: Sizes) -> dict[str, Tensor]:
    """Weights at which every sub-layer matters: norms, biases, factors and the table drawn too, each by its name; float32."""
    return {name: _drawn(name, shape) for name, shape in shapes(sizes).items()}


def _drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("position_ids"):
        return torch.arange(shape[1])[None]
    drawn = torch.from_numpy(numbers(name, shape))
    if "gamma" in name or name.endswith("scale"):
        return (0.7 + 0.3 * drawn).float()
    if name.endswith("_table"):
        return drawn.float()
    if len(shape) == 1:
        return ((1 if name.endswith("weight") else 0) + 0.3 * drawn).float()
    if ("embed" in name and "patch" not in name) or name.endswith("cls_token"):
        return (0.5 * drawn).float()
    return (1.5 * drawn / math.sqrt(math.prod(shape[1:]))).float()


class Plain:
    """The model.

    Args:
        state: Its weights, in whatever precision it shall compute.
        sizes: Of it.
        first: From which block on pairs have an expert of their own; None: as the sizes say. Another one is wrong.
        biased: Which of query, key and value the two biases are added to; any but these are wrong.
    """

    def __init__(self, state: dict[str, Tensor], sizes: Sizes, *, first: int | None = None, biased: str = "qv") -> None:
        self.state, self.sizes, self.biased = state, sizes, biased
        self.first = sizes.first if first is None else first

    def text(self, ids: Tensor, mask: Tensor, *, paired: bool = False) -> Tensor:
        """(B, N, D) of texts alone; ``paired``: through the experts of pairs where there are some."""
        return self._run(self._words(ids), self._places("text", ids.shape[1]), mask, paired)

    def image(self, pixels: Tensor, *, kind: int = 1, paired: bool = False) -> Tensor:
        """(B, 1 + patches, D) of pictures alone."""
        x = self._patches(pixels, kind)
        return self._run(x, self._places("image", x.shape[1]), torch.ones(x.shape[:2], dtype=torch.bool), paired)

    def pair(self, ids: Tensor, mask: Tensor, pixels: Tensor, *, kind: int = 1) -> Tensor:
        """(B, N + 1 + patches, D) of texts and pictures in one sequence, the text first."""
        words, seen = self._words(ids), self._patches(pixels, kind)
        places = self._places("text", words.shape[1]) + self._places("image", seen.shape[1])
        there = torch.cat([mask, torch.ones(seen.shape[:2], dtype=torch.bool)], 1)
        return self._run(torch.cat([words, seen], 1), places, there, True)

    def pooled(self, states: Tensor, at: int = 0) -> Tensor:
        """(B, D) of the first token; at another one it is wrong."""
        return torch.tanh(self._line("pooler.dense", states[:, at]))

    def matches(self, states: Tensor, at: int = 0) -> Tensor:
        """(B, 2) logits of a pair."""
        return self._line("itm_score.fc", self.pooled(states, at))

    def words(self, states: Tensor) -> Tensor:
        """(..., V) logits of words."""
        x = self._line("mlm_score.transform.dense", states)
        x = self._norm("mlm_score.transform.LayerNorm", 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), 1e-12)
        return x @ self.state["mlm_score.decoder.weight"].T + self.state["mlm_score.bias"]

    def vector(self, states: Tensor, which: str) -> Tensor:
        """(B, D) of length 1; ``which``: text, image, vl_text or vl_image."""
        x = states[:, 0] @ self.state[f"itc_{which}_proj.fc.weight"].T
        return x / (x * x).sum(-1, keepdim=True).sqrt()

    def row(self, query: Token, key: Token) -> int:
        """Which row of the table is added where ``query`` looks at ``key``."""
        side, length = self.sizes.side, self.sizes.length
        offsets = (2 * side - 1) ** 2
        between = offsets + 3  # behind the three rows of the picture's class token: a text that asks, a picture that asks
        words = between + 2
        if query.kind != key.kind:
            return between if query.kind == "text" else between + 1
        ends = offsets if query.kind == "image" else words + 2 * length - 3
        if query.at == 0 or key.at == 0:
            return ends + (2 if query.at == key.at else 0 if query.at == 0 else 1)
        if query.kind == "text":
            return words + key.at - query.at + length - 2
        down, across = ((query.at - 1) // side - (key.at - 1) // side, (query.at - 1) % side - (key.at - 1) % side)
        return (down + side - 1) * (2 * side - 1) + across + side - 1

    @staticmethod
    def _places(kind: str, count: int) -> list[Token]:
        return [Token(kind, at) for at in range(count)]

    def _words(self, ids: Tensor) -> Tensor:
        x = self.state["text_embeddings.word_embeddings.weight"][ids] + self.state["text_embeddings.token_type_embeddings.weight"][0]
        if self.sizes.plus:
            x = x + self.state["text_embeddings.position_embeddings.weight"][: ids.shape[1]]
        return self._norm("text_embeddings.LayerNorm", x, 1e-12) + self.state["token_type_embeddings.weight"][0]

    def _patches(self, pixels: Tensor, kind: int) -> Tensor:
        """The class token and the patches of (B, 3, H, W), row by row; each patch is its pixels times a matrix."""
        side, patch, D = self.sizes.side, self.sizes.patch, self.sizes.width
        weight = self.state["transformer.patch_embed.proj.weight"].reshape(D, -1)
        found = [self.state["transformer.cls_token"][:, 0].expand(len(pixels), -1)]
        for at in range(side * side):
            down, across = at // side * patch, at % side * patch
            cut = pixels[:, :, down : down + patch, across : across + patch].reshape(len(pixels), -1)
            found.append(cut @ weight.T + self.state["transformer.patch_embed.proj.bias"])
        x = torch.stack(found, 1)
        x = x + self.state["transformer.pos_embed"] if self.sizes.plus else x
        return x + self.state["token_type_embeddings.weight"][kind]

    def _run(self, x: Tensor, places: list[Token], mask: Tensor, paired: bool) -> Tensor:
        rows = torch.tensor([[self.row(query, key) for key in places] for query in places])
        for number in range(self.sizes.layers):
            stem = f"transformer.blocks.{number}."
            x = x + self._factor(f"{stem}gamma_1") * self._attend(number, self._norm(f"{stem}norm1", x), rows, mask)
            fed = []
            for at, place in enumerate(places):
                expert = "vl" if paired and number >= self.first else EXPERT[place.kind]
                inside = self._line(f"{stem}mlp_{expert}.fc1", self._norm(f"{stem}norm2_{expert}", x[:, at]))
                fed.append(self._line(f"{stem}mlp_{expert}.fc2", 0.5 * inside * (1 + torch.erf(inside / math.sqrt(2)))))
            x = x + self._factor(f"{stem}gamma_2") * torch.stack(fed, 1)
        return self._norm("transformer.norm", x)

    def _attend(self, number: int, x: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        """Head by head: softmax of scaled products and of the bias of each pair, over the keys that are there."""
        stem, D, d = f"transformer.blocks.{number}.attn.", self.sizes.width, self.sizes.width // self.sizes.heads
        weight, biases = self.state[f"{stem}qkv.weight"], dict(zip(self.biased, ("q_bias", "v_bias"), strict=True))
        query, key, value = (
            x @ weight[i * D : (i + 1) * D].T + (self.state[f"{stem}{biases[part]}"] if part in biases else 0)
            for i, part in enumerate("qkv")
        )
        read = []
        for head in range(self.sizes.heads):
            own = slice(head * d, (head + 1) * d)
            scores = query[..., own] @ key[..., own].transpose(1, 2) / math.sqrt(d)  # (B, N, N)
            if not self.sizes.plus:
                scores = scores + self.state["relative_position_bias_table"][:, number * self.sizes.heads + head][rows]
            raised = scores.exp() * mask[:, None, :]
            read.append(raised / raised.sum(-1, keepdim=True) @ value[..., own])
        return self._line(f"{stem}proj", torch.cat(read, -1))

    def _line(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def _factor(self, name: str) -> Tensor | float:
        return 1.0 if self.sizes.plus else self.state[name]
