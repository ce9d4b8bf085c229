"""Known data sets: a copy is checked by its hashes; what is not there cannot be made, and the message says why and where from."""

import hashlib
from pathlib import Path

import pytest

from zoo.data._labelled import SETS
from zoo.data._prepare import ORIGINS, PICTURES, Origin, prepare
from zoo.errors import Absent, Failure, ZooError
from zoo.registry import names

DATA = Path(__file__).parents[2] / "shared/data"


@pytest.fixture
def known(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.parquet").write_bytes(b"a")
    origin = Origin({"a.parquet": hashlib.sha256(b"a").hexdigest()}, ("https://example.org/a",), "it was drawn by hand")
    monkeypatch.setitem(ORIGINS, "set", origin)
    return tmp_path


def test_a_whole_copy(known):
    assert prepare("set", known) == known / "set"


def test_another_or_a_missing_file(known):
    (known / "set/a.parquet").write_bytes(b"b")
    with pytest.raises(Failure, match=rf"a.parquet is not the published file: its sha256 is {hashlib.sha256(b'b').hexdigest()}, not "):
        prepare("set", known)
    (known / "set/a.parquet").unlink()
    with pytest.raises(Failure, match=r"a.parquet is missing\nset cannot be made again from its sources: it was drawn by hand"):
        prepare("set", known)


@pytest.mark.parametrize("name", ["retail_notes", "emoji_zh_en", "av_digits"])
def test_what_is_not_there_cannot_be_made(name, tmp_path):
    for root, says in ((None, "and none is given: --data DIR or ZOO_DATA"), (tmp_path, f"no folder {tmp_path / name}")):
        with pytest.raises(Absent) as error:
            prepare(name, root)
        assert says in str(error.value)
        assert f"{name} cannot be made again from its sources: " in str(error.value)
        assert "https://" in str(error.value)


def test_an_unknown_set():
    with pytest.raises(ZooError, match="no data set with a public source named 'retail_note'; did you mean 'retail_notes'"):
        prepare("retail_note", None)


@pytest.mark.parametrize("name", SETS)
def test_a_set_without_published_hashes_says_where_it_comes_from(name, tmp_path):
    for root in (None, tmp_path):
        with pytest.raises(
            ZooError, match=rf"{name} is fetched by you, from .*https://.*no copy can be checked .* zoo data split {name} --out"
        ):
            prepare(name, root)


@pytest.mark.parametrize("name", PICTURES)
def test_a_set_of_pictures_says_where_it_comes_from(name, tmp_path):
    assert name in names("data")
    with pytest.raises(ZooError, match=rf"{name} is fetched by you, from .*https://.*without a folder, data\.name: {name} says"):
        prepare(name, tmp_path)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["retail_notes", "emoji_zh_en", "av_digits"])
def test_the_copies_here_are_the_published_ones(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not there")
    assert prepare(name, DATA) == DATA / name


def test_the_command(command, known):
    assert command("data", "prepare", "set", "--data", known) == (0, f"{known / 'set'} holds the published files\n", "")
    code, out, err = command("data", "prepare", "av_digits", "--data", known)
    assert (code, out) == (2, "")
    assert err.startswith(f"zoo: no folder {known / 'av_digits'}\nav_digits cannot be made again")
