"""Vectors of shards: those of one pass over the notes, written once, by any number of processes, here and on a cluster."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from PIL import Image

from zoo.data._shard_rows import index_shard
from zoo.embed_shards import embed_shards
from zoo.errors import Failure, ZooError
from zoo.files import write_text
from zoo.hub import load, save
from zoo.recipe import dump, load_recipe
from zoo.registry import build
from zoo.vectors import read_vectors

ROOT = Path(__file__).parents[1]
SHARDS, EACH = 3, 6
MODEL = {
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": "linear",
    "dim": 16,
    "language": "en",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*trained.*")


def png(shade: int) -> bytes:
    file = BytesIO()
    Image.new("L", (8, 8), shade).save(file, "PNG")
    return file.getvalue()


def rows(shard: int) -> list[dict[str, object]]:
    return [
        {"note_id": f"{shard}/{i}", "title": f"note {i} of {shard}" if i else None, "image": png(40 * i) if i % 2 else None}
        for i in range(EACH)
    ]


def write(place: Path, shard: int, table: list[dict[str, object]] | None = None) -> None:
    pq.write_table(pa.Table.from_pylist(table or rows(shard)), place / f"items-{shard}.parquet")


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "data/shop").mkdir(parents=True)
    for shard in range(SHARDS):
        write(tmp_path / "data/shop", shard)
    return tmp_path / "data/shop"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of random weights, as if a run on shards had left it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = build("notellm2", **MODEL)
    model.trained = True
    save(model, folder)
    data = {"name": "shards", "folder": "shop", "items": "items-*.parquet"}
    recipe = load_recipe({"model": {"name": "notellm2", **MODEL}, "data": data, "objective": "pair_infonce", "out": str(folder)})
    write_text(folder / "recipe.yaml", dump(recipe))
    return folder


def embedded(run: Path, shards: Path, **keywords: object) -> int:
    return embed_shards(run, shards.parent / "out", data_root=shards.parent, **keywords)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return sorted(m.rpartition(" (")[0] for r, m in zip(caplog.records, caplog.messages, strict=True) if r.name == "zoo.embed")


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "zoo.embed")
    return caplog


NEW = [f"items-{s}.parquet: {EACH} vectors" for s in range(SHARDS)]
OLD = [f"{line}, were there" for line in NEW]


def test_vectors_are_those_of_one_pass_over_the_notes(run, shards):
    assert embedded(run, shards, batch_size=4) == SHARDS * EACH
    ids, vectors = read_vectors(shards.parent / "out")
    everything = [row for shard in range(SHARDS) for row in rows(shard)]
    assert ids == [row["note_id"] for row in everything]
    seen = [{k: v for k, v in row.items() if v is not None} for row in everything]
    full = [i for i, row in enumerate(seen) if len(row) > 1]
    np.testing.assert_allclose(vectors[full], load(run).encode([seen[i] for i in full]), atol=1e-5)
    assert not vectors[[i for i in range(len(seen)) if i not in full]].any()
    assert sorted(p.name for p in (shards.parent / "out").iterdir()) == [f"items-{s}.parquet" for s in range(SHARDS)]


def test_again_does_what_is_missing_or_was_made_of_something_else(run, shards, log, tmp_path):
    out = shards.parent / "out"

    def again(**keywords: object) -> list[str]:
        log.clear()
        embedded(keywords.pop("run", run), shards, **keywords)
        return said(log)

    assert again() == NEW
    assert again() == OLD
    (out / "items-1.parquet").unlink()
    assert again() == [OLD[0], NEW[1], OLD[2]]
    (out / "items-2.parquet").write_bytes((out / "items-2.parquet").read_bytes()[:100])  # by another program: ours are whole
    assert again() == [*OLD[:2], NEW[2]]
    write(shards, 0, [{**row, "title": "changed"} for row in rows(0)])
    assert again() == [NEW[0], *OLD[1:]]
    other = load(run)
    torch.nn.init.normal_(next(other.parameters()))
    save(other, tmp_path / "other")
    write_text(tmp_path / "other/recipe.yaml", (run / "recipe.yaml").read_text())
    assert again(run=tmp_path / "other") == NEW


@pytest.mark.slow
def test_several_processes_give_the_same(run, shards, log):
    embedded(run, shards)
    one = read_vectors(shards.parent / "out")
    log.clear()
    assert embed_shards(run, shards.parent / "two", data_root=shards.parent, workers=2) == SHARDS * EACH
    assert said(log) == NEW
    two = read_vectors(shards.parent / "two")
    assert one.ids == two.ids
    np.testing.assert_allclose(one.vectors, two.vectors, atol=1e-6)


def test_one_bad_shard_does_not_stop_the_others(run, shards):
    path = shards / "items-1.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Failure, match=r"1 of 3 shards have no vectors, all others have:\n.*items-1.parquet: cannot be read as parquet"):
        embedded(run, shards)
    assert sorted(p.name for p in (shards.parent / "out").iterdir()) == ["items-0.parquet", "items-2.parquet"]


@pytest.mark.slow
def test_processes_that_are_killed(run, shards, log, tmp_path):
    """By SIGKILL, as a machine without memory does, while one waits for the index of the last shard, which the test keeps locked.

    Both: one that is left alone ends what it does before the fault is told, and here that would wait for the test.
    """
    held = index_shard(shards / "items-2.parquet", {}, tmp_path / "index").place
    held.unlink()
    here = {"index": tmp_path / "index", "workers": 2}

    def kill() -> list[int]:
        done = [shards.parent / f"out/items-{s}.parquet" for s in (0, 1)]
        until = time.monotonic() + 300
        while not all(file.is_file() for file in done) and time.monotonic() < until:
            time.sleep(0.05)
        killed = [process.pid for process in multiprocessing.active_children()]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        return killed

    with ThreadPoolExecutor() as pool, FileLock(f"{held}.lock"):
        killed = pool.submit(kill)
        with pytest.raises(Failure, match=r"a process that embeds shards ended by itself: .* run the same command again to go on"):
            embedded(run, shards, **here)
    assert len(killed.result()) == 2
    assert not multiprocessing.active_children()
    assert sorted(p.name for p in (shards.parent / "out").iterdir()) == ["items-0.parquet", "items-1.parquet"]
    log.clear()
    assert embedded(run, shards, index=tmp_path / "index") == SHARDS * EACH
    assert said(log) == [*OLD[:2], NEW[2]]


@pytest.mark.parametrize("keyword", ["workers", "batch_size"])
def test_no_workers_and_no_notes_at_a_time(run, shards, keyword):
    with pytest.raises(ZooError, match=f"^{keyword} = 0: write 1 or more$"):
        embedded(run, shards, **{keyword: 0})


def test_what_is_refused(run, shards, tmp_path):
    with pytest.raises(ZooError, match=r"the vectors of shards are a file for each: name a folder, --out .*/v"):
        embed_shards(run, tmp_path / "v.parquet", data_root=shards.parent)
    with pytest.raises(ZooError, match="the shards lie there, and would be overwritten"):
        embed_shards(run, shards, data_root=shards.parent)
    with pytest.raises(ZooError, match=r"no shards none-\* in"):
        embedded(run, shards, items="none-*")
    with pytest.raises(ZooError, match="no model in"):
        embedded(tmp_path, shards)
    on_notes = tmp_path / "on_notes"
    save(load(run), on_notes)
    write_text(
        on_notes / "recipe.yaml", (run / "recipe.yaml").read_text().replace("name: shards", "name: notes").replace("  items", "  mine")
    )
    recipe = {"model": {"name": "notellm2", **MODEL}, "data": "planted_notes", "objective": "pair_infonce", "out": str(on_notes)}
    write_text(on_notes / "recipe.yaml", dump(load_recipe(recipe)))
    with pytest.raises(ZooError, match=r"was trained on 'planted_notes', not on shards: name their folder, and --shards 'items-\*.tar'"):
        embedded(on_notes, shards)
    assert embed_shards(on_notes, tmp_path / "v", folder=shards, items="items-{0..1}.parquet") == 2 * EACH


def test_no_shard_is_overwritten(run, shards):
    before = {path: path.read_bytes() for path in sorted(shards.iterdir())}
    (shards / "sub").mkdir()
    with pytest.raises(ZooError, match=r"shards '../items-\*.parquet': names are below their folder, here .*/sub: name another folder"):
        embed_shards(run, shards / "out", folder=shards / "sub", items="../items-*.parquet")
    (shards / "sub/items-0.parquet").symlink_to(shards / "items-1.parquet")
    with pytest.raises(ZooError, match=r"shop/items-0.parquet: its vectors would overwrite the shard .*sub/items-0.parquet: name another"):
        embed_shards(run, shards / "sub", folder=shards, items="**/items-*.parquet")
    assert {path: path.read_bytes() for path in before} == before


def test_shards_of_two_kinds_would_share_files(run, shards):
    (shards / "items-0.tar").touch()
    with pytest.raises(ZooError, match=r"shards are .parquet, .tar: "):
        embedded(run, shards, items="items-0.*")


def test_files_of_other_shards_are_named(run, shards, caplog):
    embedded(run, shards)
    (shards / "items-2.parquet").unlink()
    assert embedded(run, shards) == 2 * EACH
    assert "1 files in " in caplog.text
    assert "are of none of these shards, such as " in caplog.text
    assert "out/items-2.parquet: remove them if they are old" in caplog.text


def test_the_command_line(run, shards, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command("embed", run, "--data", shards.parent)[:2] == (0, f"{SHARDS * EACH} vectors in embeddings\n")
    assert command("embed", run, shards, "--shards", "items-{0..1}.parquet", "--out", "v", "--index", "i")[:2] == (0, "12 vectors in v\n")
    assert list(Path("i").iterdir())
    code, out, err = command("embed", run, shards, "--workers", "2")
    assert (code, out) == (2, "")
    assert "--workers, --ray and --index are for shards: name them with --shards 'items-*.tar'" in err
    code, out, err = command("search", run, "embeddings", "--note", "1/3", "--k", "2", "--index", "faiss", "--check-recall", "--json")
    assert code == 0
    assert "recall@2 of flat against exact: 1.0000" in err
    exact = command("search", run, "embeddings", "--note", "1/3", "--k", "2", "--json")[1]
    assert [hit["note_id"] for hit in json.loads(out)] == [hit["note_id"] for hit in json.loads(exact)]
    assert "no index named 'fiass'; did you mean 'faiss'" in command("search", run, "embeddings", "--note", "1/3", "--index", "fiass")[2]


@pytest.mark.slow
def test_a_local_ray_cluster_of_two_workers(run, shards, tmp_path):
    """In a process of its own: Ray looks for the address of this machine, and its processes outlive a test that fails."""
    pytest.importorskip("ray")

    def call(out: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "zoo", "embed", run, "--data", shards.parent, "--out", out, "--ray", "local", "--workers", "2"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert f"{SHARDS * EACH} vectors in {out}\n" in done.stdout
        return done.stderr

    embedded(run, shards)
    assert "items-0.parquet: 6 vectors (" in call(tmp_path / "ray")
    one, other = read_vectors(shards.parent / "out"), read_vectors(tmp_path / "ray")
    assert one.ids == other.ids
    np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-6)
    assert "items-0.parquet: 6 vectors, were there (" in call(tmp_path / "ray")
