"""A miniature set of captioned pictures, drawn on the spot: coloured shapes in three styles."""

import io

import numpy as np
from PIL import Image, ImageDraw

from zoo.data._captioned import Captioned, Pictures

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 40), "black": (20, 20, 20)}
SHAPES = ("square", "circle", "bar", "cross")
STYLES = ("plain", "grey", "small")  # the last one is held out


def drawn(colour, shape, style):
    """(64, 64) PNG bytes."""
    picture = Image.new("RGB", (64, 64), (150, 150, 150) if style == "grey" else (255, 255, 255))
    pen, edge = ImageDraw.Draw(picture), 22 if style == "small" else 10
    box, fill = (edge, edge, 64 - edge, 64 - edge), COLOURS[colour]
    if shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "circle":
        pen.ellipse(box, fill=fill)
    else:
        pen.rectangle((28, edge, 36, 64 - edge), fill=fill)
        if shape == "cross":
            pen.rectangle((edge, 28, 64 - edge, 36), fill=fill)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def shapes(held_out="small", kinds=True, renamed=""):
    """20 concepts in three styles; yellow ones are of ``test``, blue crosses of ``val``."""
    concepts = [(c, s) for c in COLOURS for s in SHAPES]
    captions = [f"a {c} {s}{' with four equal arms' if s == 'cross' else ''}{renamed}" for c, s in concepts]
    all_of = [(i, style) for i in range(len(concepts)) for style in STYLES]
    of, styles = np.array([i for i, _ in all_of]), np.array([s for _, s in all_of])
    split = np.array(["test" if c == "yellow" else "val" if (c, s) == ("blue", "cross") else "train" for c, s in concepts])[of]
    places = {name: np.flatnonzero((split == name) & ((styles != held_out) | (name == "test"))) for name in ("train", "val", "test")}
    places["style"] = np.flatnonzero((split == "train") & (styles == held_out))
    return Captioned(
        Pictures([drawn(*concepts[i], style) for i, style in all_of]),
        [f"{'_'.join(concepts[i])}_{style}" for i, style in all_of],
        captions,
        {name: np.stack([there, of[there]], 1) for name, there in places.items()},
        kinds=[concepts[i][1] for i in of] if kinds else None,
        statistics={"held_out": held_out},
        fingerprint=f"shapes {held_out} {kinds} {renamed}",
    )
