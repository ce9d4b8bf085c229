"""Files are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from zoo.files import write_bytes, write_json, write_text


def test_text_is_utf8_and_its_folder_is_made(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a" / "b.txt", "笔记\r\nend\n")
    assert path.read_bytes() == "笔记\r\nend\n".encode()
    assert os.listdir(path.parent) == ["b.txt"]


def test_an_interrupted_write_keeps_the_old_file_and_no_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_bytes(tmp_path / "model.bin", b"old")

    def crash(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.bin"]


def test_json_takes_what_our_records_hold(tmp_path: Path) -> None:
    value = {"hits": np.array([1.0, 0.5]), "n": np.int64(3), "from": Path("a/b"), "counts": MappingProxyType({"broken": 2}), "zh": "图"}
    path = write_json(tmp_path / "metrics.json", value)
    assert json.loads(path.read_text(encoding="utf-8")) == {"hits": [1.0, 0.5], "n": 3, "from": "a/b", "counts": {"broken": 2}, "zh": "图"}
    assert "图" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("bad", [float("nan"), np.array([np.inf])])
def test_json_refuses_nan(tmp_path: Path, bad: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "metrics.json", {"recall": bad})
    assert not (tmp_path / "metrics.json").exists()


def test_json_refuses_other_objects(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="of type object is no JSON value"):
        write_json(tmp_path / "metrics.json", {"what": object()})
