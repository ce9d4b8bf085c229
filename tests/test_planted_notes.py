"""Planted notes hold what was planted: mining finds it again, and only the picture tells where the text is short."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from zoo.data.planted_notes import SPLITS, plant
from zoo.errors import ZooError
from zoo.registry import make

SETTINGS: dict[str, Any] = {"notes": 1200, "users": 1500, "seed": 3, "short_share": 0.17, "image_size": 24}


def planted(**keywords: Any) -> Any:
    return make("data", {"name": "planted_notes", **SETTINGS, **keywords}, None)


def test_mining_finds_topic_and_style_again():
    truth, data = plant(language="english", **SETTINGS | {"notes": 2000, "users": 3000}), planted(notes=2000, users=3000)
    for split in SPLITS:
        a, b = data.pairs(split).T
        assert ((truth.topic[a] == truth.topic[b]) & (truth.style[a] == truth.style[b])).mean() > 0.85  # by chance 1 / 40


def test_no_note_of_a_later_split_is_seen_in_training():
    data = planted()
    seen = [set(data.pairs(s).ravel().tolist()) for s in SPLITS]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_shares_of_short_texts_and_of_missing_modalities(language):
    data = planted(language=language)
    rows = list(data.notes)
    short = np.array(["content" not in r for r in rows])
    assert short.mean() == pytest.approx(0.17, abs=0.002)
    assert sum("title" not in r for r in rows) == sum("image" not in r for r in rows) == pytest.approx(36, abs=2)
    assert all("image" in r for r, s in zip(rows, short, strict=True) if s)  # only the picture tells
    assert data.lengths()[short].max() < data.lengths()[~short].min()
    assert data.short().mean() == pytest.approx(1 / 6, abs=0.05)
    assert not data.short()[~short].any()
    assert any("一" <= c <= "鿿" for c in data.texts()[int(np.flatnonzero(~short)[0])]) == (language == "chinese")


def test_pictures_show_the_style_by_colour_and_the_topic_by_shape():
    truth, data = plant(language="english", **SETTINGS), planted()
    colours: dict[int, set[tuple[int, ...]]] = {}
    inks: dict[int, list[float]] = {}
    for row, topic, style in zip(data.notes, truth.topic.tolist(), truth.style.tolist(), strict=True):
        if "image" in row:
            pixels = np.asarray(row["image"]).reshape(-1, 3)
            ink = pixels.min(1) < 215  # paper is lighter
            colours.setdefault(style, set()).update(map(tuple, pixels[ink].tolist()))
            inks.setdefault(topic, []).append(ink.mean())
    assert [len(c) for c in colours.values()] == [1] * 5
    assert len(set.union(*colours.values())) == 5
    assert np.mean(inks[1]) > np.mean(inks[0]) > np.mean(inks[2]) > np.mean(inks[5])  # square, disc, triangle, cross


def test_the_same_seed_gives_the_same_bytes():
    one, other = plant(language="english", **SETTINGS), plant(language="english", **SETTINGS)
    assert one.notes.equals(other.notes)
    assert one.clicks.equals(other.clicks)
    marks = [planted(notes=200, users=200, **k).fingerprint for k in ({}, {}, {"seed": 4}, {"inputs": ["image"]})]
    assert marks[0] == marks[1]
    assert len({*marks}) == 3


def test_settings_are_checked():
    with pytest.raises(ZooError, match=r"(?s)notes: 10: .*greater than or equal to 100"):
        planted(notes=10)
    with pytest.raises(ZooError, match=r"language: 'german'"):
        planted(language="german")
