"""Seconds until something is there: imports and builds, each in a process of its own. Target: `import zoo` in half of open_clip's import.

``pytest benchmarks/bench_start.py``.
"""

import subprocess
import sys

import pytest

from benchmarks.beside import beside, children_seconds, keep

TINY = "zoo.build('notellm2', backbone='tiny_lm', vision='tiny_image', connector='attention_pool')"
META = "zoo.build('notellm2', backbone={'name': 'qwen', 'size': '7b', 'device': 'meta'}, vision='tiny_image')"
STARTS = {"import": "import zoo", "build tiny": f"import zoo; {TINY}", "build 7b on meta": f"import zoo; {META}"}
RIVALS = {
    "open_clip": "import open_clip",
    "open_clip ViT-B-32": "import open_clip; open_clip.create_model('ViT-B-32')",
    "sentence_transformers": "import sentence_transformers",
}
PACKAGES = {"open_clip": "open_clip_torch", "open_clip ViT-B-32": "open_clip_torch", "sentence_transformers": "sentence-transformers"}


def start(code):
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.benchmark(timer=children_seconds, group="start")
@pytest.mark.parametrize(
    "ours, theirs, target",
    [
        ("import", "open_clip", 2.0),
        ("import", "sentence_transformers", 2.0),
        ("build tiny", "open_clip", 1.0),
        ("build 7b on meta", "open_clip ViT-B-32", 1.0),
    ],
)
def test_start(benchmark, ours, theirs, target):
    """CPU time of a whole process, Python's own start included."""
    codes = STARTS[ours], RIVALS[theirs]
    for code in codes:
        start(code)  # once, so that the files are in the system's cache
    found = beside(benchmark, lambda: start(codes[0]), lambda: start(codes[1]), rounds=3, timer=children_seconds)
    keep(benchmark, f"{ours} / {theirs}", found, target=target, packages=("torch", "transformers", PACKAGES[theirs]))
