"""The code of the documentation runs: its parts are imported, trained, installed as a plug-in, and held to the contract."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zoo

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
KERNELS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/kernels.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
FILES = dict(re.findall(r"^`([\w/]+\.\w+)`\n\n```\w+\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
(SCRIPT,) = re.findall(r"^```python\n(import zoo\n.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
PARTS = {"fusion": "weighted_sum", "encoder": "colour_grid", "data": "question_pairs"}


def write(folder):
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (folder / "my_parts/__init__.py").write_text("")
    (folder / "data").mkdir()
    pairs = [{"question": f"what is {i}", "answer": f"{i} is a number"} for i in range(60)]
    (folder / "data/questions.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.fixture
def parts(tmp_path, monkeypatch, own_registry):
    """The files of the page in the current folder, their parts registered as a notebook would."""
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield [importlib.import_module(f"my_parts.{stem}") for stem in PARTS.values()]
    for name in [m for m in sys.modules if m.partition(".")[0] == "my_parts"]:
        del sys.modules[name]


def test_the_files_were_found():
    assert set(FILES) == {"pyproject.toml", "questions.yaml", *(f"my_parts/{stem}.py" for stem in PARTS.values())}


def test_the_parts_are_known(parts):
    for kind, stem in PARTS.items():
        assert stem in zoo.names(kind)
        assert zoo.info(stem)["summary"].endswith(".")


def test_fusion_and_encoder_train(parts, capsys):
    exec(SCRIPT, {})
    assert capsys.readouterr().out == f"{torch.Size([2])}\n"


def test_the_data_set_trains(parts):
    outcome = zoo.run("questions.yaml", data_root="data")
    assert outcome.metrics["data"] == {"pairs": 60, "broken_images": []}
    assert 0 <= outcome.recall <= 1


@pytest.mark.parametrize("change, says", [(Path.unlink, "no file data"), (lambda p: p.write_text('{"question": ""}\n'), "line 1 lacks")])
def test_the_data_set_says_what_is_wrong(parts, change, says):
    change(Path("data/questions.jsonl"))
    with pytest.raises(zoo.ZooError, match=says):
        zoo.run("questions.yaml", data_root="data")


def test_the_page_of_the_kernels_runs(own_registry, capsys):
    """From top to bottom: a block may use what an earlier one made. Every loss is a number with a gradient."""
    assert len(KERNELS) > 5
    made = {}
    for block in KERNELS:
        exec(block, made)
    assert capsys.readouterr().out == f"{torch.Size([])} ['log_scale']\n10.0\n"
    named = ("clip", "siglip", "unicl", "moco", "brivl", "albef", "nt_xent", "notellm2", "supcon")
    assert all(made[name].isfinite() and made[name].requires_grad for name in named)
    assert made["log_scale"].grad != 0
    assert made["one_after_the_other"].shape == (2, 10, 32)


def test_the_objective_of_the_kernels_page_is_a_file_of_its_own(own_registry):
    (block,) = [block for block in KERNELS if "@zoo.register" in block]
    made = {"__name__": "queries_first"}
    exec(block, made)
    embeddings = torch.eye(4)

    def model(batch):
        return SimpleNamespace(embeddings={"note": embeddings})

    model.outputs = ("note",)
    assert zoo.make("objective", "queries_first")(model, None).total > 0


def test_the_figures_of_the_kernels_page_are_the_stored_ones():
    """Rounded, not cut: MiB to whole ones, seconds to three digits."""
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    shown = [re.findall(r"([\d.]+) s, (\d+) MiB", row) for row in re.findall(r"^\| (?:8192|16384) \|.*$", page, re.MULTILINE)]
    records = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores.json").read_text(encoding="utf-8"))["records"]
    stored = {(r["name"].split(" fp32")[0], r["contender"]): r for r in records if "timing" in r}
    both = [("open_clip", "both"), ("open_clip compiled", "both"), ("torch linear_cross_entropy", "both")]
    columns = {8192: [("ours", "both"), *both, ("ours", "self")], 16384: [("ours", "both"), both[0], both[2]]}
    for found, (rows, names) in zip(shown, columns.items(), strict=True):
        expected = [stored[f"{sides} {rows}x512", contender] for contender, sides in names]
        assert [mib for _, mib in found] == [f"{r['memory'] / 2**20:.0f}" for r in expected]
        assert [float(seconds) for seconds, _ in found] == [float(f"{r['timing']['seconds']:.3g}") for r in expected]


@pytest.mark.slow
def test_installed_as_a_plug_in_they_are_found_and_fulfil_the_contract(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    write(source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    call([*pip, "--target", str(site), str(source)], cwd=tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    listed = call([sys.executable, "-m", "zoo", "list", "fusions"], cwd=ROOT, env=environment)
    assert "weighted_sum" in listed.split()
    for file, part in (("test_contracts_fusion", "weighted_sum"), ("test_encoders", "colour_grid")):
        said = call(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{file}.py", "-k", part], cwd=ROOT, env=environment
        )
        assert int(re.search(r"(\d+) passed", said)[1]) > 5


def call(command, **keywords):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **keywords)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "page", ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "docs/diagnose.md", "docs/extending.md", "docs/kernels.md", "docs/scale.md"]
)
def test_every_link_leads_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if "://" not in link and not (path.parent / link).exists()]
