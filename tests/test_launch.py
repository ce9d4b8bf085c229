"""The files for `accelerate launch`: Accelerate reads them, and they say how they were tried."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

FILES = sorted((Path(__file__).parents[1] / "examples/launch").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it(file):
    settings = load_config_from_file(str(file))
    assert settings.distributed_type == DistributedType.MULTI_GPU
    assert settings.num_processes == 8 * settings.num_machines
    assert settings.mixed_precision == "no"  # else it would overrule the recipe


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_launcher_takes_it(file):
    given = launch_command_parser().parse_args(["--config_file", str(file), "-m", "zoo", "train", "demo"])
    given, settings, _ = _validate_launch_command(given)
    assert (given.module, given.training_script, given.training_script_args) == (True, "zoo", ["train", "demo"])
    assert given.num_machines == settings.num_machines


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_says_that_it_was_not_run(file):
    assert "not run on several GPUs yet" in file.read_text(encoding="utf-8")


def test_there_is_one_for_each_kind():
    assert [file.stem for file in FILES] == ["one_node", "several_nodes"]
