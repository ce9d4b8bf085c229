"""VLMo and BEiT-3 of the zoo as files of Microsoft's programs, which are read back; and models of which there are none."""

import pytest
import torch

import zoo
from zoo.convert import convert
from zoo.errors import ZooError


@pytest.mark.parametrize("name, settings", [("vlmo", {}), ("vlmo", {"length": 36}), ("beit_3", {"codes": 12})])
def test_it_goes_to_unilm_and_back(tmp_path, name, settings):
    torch.manual_seed(0)
    model = zoo.build(name, layers=2, **settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    zoo.save(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="unilm")
    (file,) = (tmp_path / "theirs").glob("*.pth")
    assert file.stem == name.replace("_", "")
    done = convert(tmp_path / "theirs", tmp_path / "again")
    assert (done.model, done.drawn) == (name, ["vision.mask"] if name == "vlmo" else [])
    again = zoo.load(tmp_path / "again").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in again.items() if key not in done.drawn)


def test_a_folder_of_several_files(tmp_path):
    for name in ("one.pth", "two.pth"):
        torch.save({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ZooError, match=r"holds one\.pth, two\.pth: name the file of weights, such as .*one\.pth"):
        convert(tmp_path, tmp_path / "ours")


def test_models_that_unilm_does_not_have(tmp_path):
    for name, settings, says in (
        ("vlmo", {"codes": 12}, "a VLMo of unilm has nothing like codes_head.weight, codes_head.bias, which this model has"),
        ("beit_3", {"fusion": "mome"}, "a BEiT-3 of unilm has nothing like trunk.blocks.0"),
        ("clip", {}, "unilm takes a VLMo or a BEiT-3, and this is a Clip"),
    ):
        zoo.save(zoo.build(name, layers=2, **settings) if settings else zoo.build(name), tmp_path / name)
        with pytest.raises(ZooError) as fault:
            convert(tmp_path / name, tmp_path / "theirs", to="unilm")
        assert says in str(fault.value)
    assert not (tmp_path / "theirs").exists()
