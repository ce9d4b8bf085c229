"""What MLA claims, on real recordings and pictures: the modality that joint training leaves behind is learned."""

from pathlib import Path

import pytest

import zoo

DATA = Path(__file__).parents[2] / "shared/data"


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(not (DATA / "av_digits").is_dir(), reason="the folder av_digits is not beside the repository")
@pytest.mark.parametrize("seed", [1, 2])
def test_the_picture_is_learned_beside_the_sound(seed, tmp_path):
    """Speakers of test and train differ, and so do those of the seeds. Margins as wide as reproductions elsewhere found them."""
    found = {}
    for name in ("mla_free_equal", "concat"):  # equal optimizer steps and encoder passes
        run = zoo.run(
            f"mla/av_digits/{name}",
            "classify.missing=[]",
            "classify.bootstrap=0",
            f"seed={seed}",
            data_root=DATA,
            out=tmp_path / name,
        )
        records = run.metrics["arms"][name]["records"]
        found[name] = {r["input"]: r["recall"] for r in records}
        assert run.recall == found[name]["all"]
    assert found["mla_free_equal"]["image"] - found["concat"]["image"] >= 0.25
    assert found["mla_free_equal"]["all"] > found["concat"]["all"]
