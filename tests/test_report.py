"""The page of a run: complete, one file, safe to open, and the same when made again."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from zoo.errors import ZooError
from zoo.files import write_json, write_text
from zoo.report import _logs, examples, report

NASTY = "<script>alert('title')</script> \" onerror=\"x"


def record(recall: float, **changed: Any) -> dict[str, Any]:
    plain = {"protocol": "multi", "subset": "all", "input": "both", "k": 10, "queries": 1234, "low": recall - 0.01, "high": recall + 0.01}
    return plain | {"recall": recall} | changed


def metrics() -> dict[str, Any]:
    model = [record(0.31), record(0.21, subset="short_query"), record(0.27, input="image"), record(0.51, protocol="one_target", k=100)]
    return {
        "arms": {
            "notellm2": {"records": model, "seconds": 125.0, "parameters": 1_234_567},
            "bm25": {"records": [record(0.24), record(0.2099, subset="short_query")], "seconds": 1.0, "parameters": 0},
        },
        "main": {"arm": "notellm2", "protocol": "multi", "subset": "all", "input": "both", "k": 10},
        "verdict": "VERDICT: WIN | recall@10=0.310 | baseline bm25=0.240 | difference=+0.070 [+0.055, +0.087]",
        "comparisons": [{"arm": "notellm2", "baseline": "bm25", "mean": 0.07, "low": 0.055, "high": 0.087, "outcome": "WIN"}],
        "data": {"notes": 3659, "clicks": {"users": 4334}, "broken": [f"B{i}" for i in range(25)], "name": NASTY},
        "machine": {"cpu": "two cores", "bf16": False, "memory_gb": 7.75},
    }


def png(colour: str = "red") -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my run"
    write_json(folder / "metrics.json", metrics())
    neighbours = [
        {"title": "near", "image": png(), "hit": True, "score": 0.91},
        {"title": NASTY, "image": None, "hit": False, "score": 0.5},
    ]
    write_json(folder / "examples.json", [{"query": {"title": NASTY, "text": NASTY, "image": png("blue")}, "neighbours": neighbours}])
    lines = [{"step": s, "loss": 5 / (s + 1), "lr": 1e-4} for s in range(60)] + [{"step": 60, "event": "checkpoint"}]
    write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_text(folder / "arms" / "bm25" / "log.jsonl", '{"step": 1, "loss": 2.0}\n')
    write_text(folder / "recipe.yaml", "model: notellm2  # <b>recipe</b>\n")
    return folder


class Elements(HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page(folder: Path) -> Elements:
    return Elements(report(folder).read_text(encoding="utf-8"))


def test_the_page_has_what_the_run_left(run: Path) -> None:
    text = re.sub(r"\s+", " ", page(run).text)
    for expected in ("my run", "VERDICT: WIN | recall@10=0.310", "1,234,567", "2 min 05 s", "clicks users", "4,334", "memory gb", "7.75"):
        assert expected in text
    for expected in ("0.3100.300 – 0.320", "notellm2, image only", "All (1,234 queries)", "recall@100", "+0.055 to +0.087", "0.910 ✓"):
        assert expected in text
    assert "B0, B1" in text
    assert "B19 and 5 more" in text
    assert re.search("bf16 ?no ", text)
    assert "model: notellm2 # <b>recipe</b>" in text


def test_one_file_that_loads_and_runs_nothing(run: Path) -> None:
    found = page(run)
    assert not {"script", "link", "iframe", "object", "form", "b onerror"} & {tag for tag, _ in found.tags}
    sources = [attributes["src"] or "" for _, attributes in found.tags if "src" in attributes]
    assert len(sources) == 4  # two plots, two notes
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(content, validate=True))).verify()
    assert not any("href" in attributes for _, attributes in found.tags)
    assert not re.search(r"url\(|@import|https?://", (run / "report.html").read_text(encoding="utf-8"))


def test_titles_are_text_and_never_markup(run: Path) -> None:
    found = page(run)
    assert found.text.count(NASTY) == 4  # the query's title and text, a neighbour, a statistic
    assert not any("onerror" in attributes for _, attributes in found.tags)


def test_losses_are_those_of_the_arms_that_were_measured(run: Path) -> None:
    write_text(run / "arms" / "of an earlier recipe" / "log.jsonl", '{"step": 1, "loss": 2.0}\n')
    assert list(_logs(run, metrics())) == ["notellm2", "bm25"]
    assert list(_logs(run, {})) == ["model", "bm25", "of an earlier recipe"]


def test_plots_lie_beside_the_page(run: Path) -> None:
    report(run)
    sizes = {path.name: Image.open(io.BytesIO(path.read_bytes())).size for path in (run / "plots").iterdir()}
    assert set(sizes) == {"loss.png", "recall.png"}
    assert all(width > 1000 for width, _ in sizes.values())


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    first = report(run).read_bytes()
    assert report(run).read_bytes() == first


def test_the_best_of_a_column_is_marked_with_those_that_read_the_same(run: Path) -> None:
    cells = re.findall(r'<td class="number( best)?">([\d.]+)<small>', report(run).read_text(encoding="utf-8"))
    assert [number for best, number in cells if best] == ["0.310", "0.210", "0.210", "0.510"]  # 0.2099 reads 0.210


@pytest.mark.parametrize(
    ("missing", "headings"),
    [
        ("metrics.json", ["Training", "Examples", "What was run", "How to read this"]),
        ("examples.json", ["Retrieval", "Against each baseline", "Training", "What was run", "How to read this"]),
        ("log.jsonl", ["Retrieval", "Against each baseline", "Training", "Examples", "What was run", "How to read this"]),
    ],
)
def test_what_is_missing_has_no_section(run: Path, missing: str, headings: list[str]) -> None:
    (run / missing).unlink()
    assert re.findall("<h2>(.*?)</h2>", report(run).read_text(encoding="utf-8")) == headings


def test_an_evaluation_without_baselines(run: Path) -> None:
    values = metrics()
    del values["comparisons"], values["verdict"], values["arms"]["bm25"]
    write_json(run / "metrics.json", values)
    text = page(run).text
    assert "Against each baseline" not in text
    assert "VERDICT" not in text


def test_a_run_that_has_not_ended_says_where_it_stopped(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said() -> list[str]:
        caplog.clear()
        text = page(run).text
        assert all(says in text for says in caplog.messages)
        return caplog.messages

    again = f", unless it is running still; to go on, write the same command again, or: zoo run {run}/recipe.yaml"
    assert said() == []
    (run / "metrics.json").unlink()
    assert said() == [f"training stopped at step 59{again}"]
    write_text(run / "recipe.yaml", "run: {steps: 400}")
    (run / "checkpoints/step_00000063").mkdir(parents=True)
    write_text(run / "arms/late/recipe.yaml", "run: {steps: 300}")
    assert said() == [f"training stopped at step 63 of 400{again}", f"arm late: training stopped at step 0 of 300{again}"]
    (run / "model.json").touch()
    assert len(said()) == 1


def test_a_log_may_end_in_the_middle_of_a_line(run: Path) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    report(run)
    with (run / "log.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ZooError, match=r"log.jsonl, line 62: no JSON"):
        report(run)


def test_errors(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZooError, match=r"empty holds no run: expected recipe.yaml, log.jsonl or metrics.json"):
        report(tmp_path / "empty")
    write_json(run / "metrics.json", metrics() | {"main": metrics()["main"] | {"k": 7}})
    with pytest.raises(ZooError, match=r"the main record \('notellm2', 'multi', 'all', 'both', 7\) is not among its 6 records"):
        report(run)
    (run / "metrics.json").write_text('{"arms": ')
    with pytest.raises(ZooError, match=r"metrics.json: no JSON .*; delete it and evaluate again"):
        report(run)
    assert not (run / "report.html").exists()


class Toy(NamedTuple):
    """As much of a PairData as `examples` looks at."""

    notes: list[dict[str, Any]]

    def pairs(self, split: str) -> np.ndarray:
        return np.array([[0, 2], [1, 0]])

    def pool(self, split: str) -> np.ndarray:
        return np.array([0, 1, 2, 3])


def test_examples_are_the_nearest_candidates_with_their_partners_marked(tmp_path: Path) -> None:
    Image.new("RGBA", (300, 150)).save(tmp_path / "b.png")
    data: Any = Toy(
        [
            {"title": "a", "content": "long", "image": Image.new("L", (20, 10))},
            {"title": "b", "image": tmp_path / "b.png"},
            {"image": [base64.b64decode(png())]},
            {"title": "d", "image": []},
            {"title": "outside the pool"},
        ]
    )
    vectors = np.array([[1, 0.0], [1, 0.5], [1, 0.1], [-1, 0], [1, 0]])
    (entry,) = examples(data, vectors, np.array([0]), 3)
    assert entry["query"]["title"] == "a"
    assert entry["query"]["text"] == "long"
    assert [(n["title"], n["hit"], n["image"] is None) for n in entry["neighbours"]] == [
        ("", True, False),
        ("b", False, False),
        ("d", False, True),
    ]
    assert entry["neighbours"][0]["score"] == pytest.approx(1 / 1.01**0.5)
    assert Image.open(io.BytesIO(base64.b64decode(entry["neighbours"][1]["image"]))).size == (112, 56)
    write_json(tmp_path / "examples.json", [entry])
    write_text(tmp_path / "recipe.yaml", "model: x\n")
    assert "outside the pool" not in page(tmp_path).text
