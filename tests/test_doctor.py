"""What ``zoo doctor`` sees of a machine, and what it says to do: every check, whole and broken."""

import json
import shutil
import sys
import tomllib
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from zoo import doctor
from zoo.doctor import Check

ROOT = Path(__file__).parents[1]


def installed(monkeypatch, **versions):
    """Only these distributions are there."""

    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor, "version", version)


class TestPackages:
    def test_every_extra_has_a_purpose(self):
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(doctor.EXTRAS) == set(declared)

    def test_missing_and_old(self, monkeypatch):
        installed(monkeypatch, torch="2.9.0", timm="1.0.20")
        required = ["torch>=2.10", "timm>=1.0.15", "peft>=0.18", 'triton>=3.4; platform_system == "Plan9"', 'faiss-cpu; extra == "faiss"']
        assert list(doctor.requirements(required)) == [
            Check("torch", "bad", "version 2.9.0, wanted is torch>=2.10", "pip install 'torch>=2.10'"),
            Check("peft", "bad", "not installed, wanted is peft>=0.18", "pip install 'peft>=0.18'"),
        ]

    def test_extras(self, monkeypatch):
        installed(monkeypatch, **{"faiss-cpu": "1.15.1"})
        found = {c.name: c for c in doctor.extras(['faiss-cpu>=1.10; extra == "faiss"', 'onnx; extra == "onnx"', "torch"])}
        assert found["extra faiss"].says == "installed; for approximate search over many vectors"
        assert found["extra onnx"] == Check(
            "extra onnx",
            "ok",
            "not installed (onnx missing); for export of the item encoder to ONNX",
            "pip install 'multimodal-zoo[onnx]' if you want it",
        )

    def test_a_copy_that_is_not_installed(self, monkeypatch):
        def requires(name):
            raise PackageNotFoundError(name)

        monkeypatch.setattr(doctor, "requires", requires)
        (found,) = doctor.examine(data_root=None, environment={})
        assert (found.status, found.remedy) == ("bad", "pip install -e .")

    def test_versions_name_what_is_missing(self, monkeypatch):
        installed(monkeypatch, torch="2.14.1")
        (found,) = doctor.versions()
        assert found.says.startswith("torch 2.14.1, no torchvision, ")


class TestDevices:
    @pytest.fixture
    def gpu(self, monkeypatch):
        def of(capability):
            about = SimpleNamespace(name="a GPU", total_memory=80 << 30, major=capability[0], minor=capability[1])
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: about)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
            monkeypatch.setattr(torch.version, "cuda", "13.0")

        return of

    def test_none(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        found = list(doctor.devices())
        assert found[0].says.startswith("no GPU; CPU with ")
        assert found[1].says == "cannot run without a CUDA device: the contrastive loss runs in its chunked form, which is as exact"
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        assert next(doctor.devices()).says.startswith("an Apple GPU (mps)")

    @pytest.mark.parametrize("capability, status, says", [((8, 0), "ok", "can run"), ((7, 5), "warn", "cannot run: they need a device of")])
    def test_of_capability(self, gpu, capability, status, says):
        gpu(capability)
        device, kernels = doctor.devices()
        assert device.says == f"a GPU, 80 GiB, capability {capability[0]}.{capability[1]}"
        assert kernels.status == status
        assert kernels.says.startswith(says)

    def test_without_triton(self, gpu, monkeypatch):
        gpu((9, 0))
        monkeypatch.setattr(doctor, "find_spec", lambda name: None)
        assert [c.status for c in doctor.devices()] == ["ok", "warn"]

    def test_threads(self, monkeypatch):
        cores = 4
        monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda process: range(cores), raising=False)
        monkeypatch.setattr(doctor.sys, "platform", "linux")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        assert doctor.threads({"OMP_NUM_THREADS": "4"}, 8) == Check("threads", "ok", "torch uses 4 threads on 4 cores, OMP_NUM_THREADS=4")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
        found = doctor.threads({}, 8)
        assert (found.status, found.remedy) == ("warn", "set OMP_NUM_THREADS=4, or run.threads: 4 in the recipe")


class TestClashes:
    @pytest.fixture
    def there(self, monkeypatch):
        """Which packages are found, and what a process that imports them prints."""

        def of(names, code=0, error=""):
            monkeypatch.setattr(doctor, "find_spec", lambda name: ModuleSpec(name, None, origin=f"/x/{name}.py") if name in names else None)
            monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=code, stderr=error))

        return of

    def test_none(self, there):
        there(["torchvision", "peft"])
        assert [(c.name, c.status) for c in doctor.clashes()] == [("torchvision", "ok"), ("package kernels", "ok")]

    def test_torchaudio_that_breaks_peft(self, there):
        there(["torchvision", "peft", "torchaudio"], 1, "Traceback\nOSError: libcudart.so.13.2")
        found = next(doctor.clashes())
        assert found == Check(
            "torchaudio beside peft",
            "bad",
            "torchaudio does not fit this torch, and its mere presence breaks import peft (OSError: libcudart.so.13.2)",
            "pip uninstall torchaudio: the zoo does not use it",
        )

    def test_torchaudio_that_fits(self, there):
        there(["torchvision", "peft", "torchaudio"])
        assert next(doctor.clashes()).status == "ok"

    def test_torchvision_of_another_torch(self, there):
        there(["torchvision"], 1, "RuntimeError: operator torchvision::nms does not exist")
        found = next(doctor.clashes())
        assert (found.name, found.status) == ("torchvision", "bad")
        assert "operator torchvision::nms does not exist" in found.says
        assert "--index-url https://download.pytorch.org/whl/cpu" in found.remedy

    def test_no_torchvision(self, there):
        there([])
        assert next(doctor.clashes()).says == "not installed: timm and open_clip cannot be imported"

    def test_a_process_that_dies_without_a_word(self, there):
        there(["torchvision"], -11)
        assert "(exit code -11)" in next(doctor.clashes()).says

    def test_a_process_that_hangs(self, there, monkeypatch):
        there(["torchvision"])

        def hang(*arguments, timeout, **keywords):
            raise doctor.subprocess.TimeoutExpired("python", timeout)

        monkeypatch.setattr(doctor.subprocess, "run", hang)
        assert next(doctor.clashes()).says == "could not be imported within 120 s"

    def test_the_process_is_real(self):
        assert doctor._tried("x", "import json", "broken", "mend").status == "ok"
        assert doctor._tried("x", "import no_such", "broken", "mend") == Check(
            "x", "bad", "broken (ModuleNotFoundError: No module named 'no_such')", "mend"
        )

    @pytest.mark.parametrize(
        "spec, versions, status, says",
        [
            (None, {}, "ok", "none, and none is needed"),
            (ModuleSpec("kernels", None), {}, "ok", "a folder of that name lies on the path; it is no package and hides nothing"),
            (ModuleSpec("kernels", None, origin="/x"), {"kernels": "0.17"}, "ok", "Hugging Face's, version 0.17, beside the zoo's own"),
            (ModuleSpec("kernels", None, origin="/x"), {}, "bad", "/x hides the package that transformers looks for"),
        ],
    )
    def test_kernels(self, monkeypatch, spec, versions, status, says):
        installed(monkeypatch, **versions)
        monkeypatch.setattr(doctor, "find_spec", lambda name: spec)
        found = doctor.kernels()
        assert found.status == status
        assert found.says.startswith(says)

    def test_a_foreign_package_in_the_folder(self, tmp_path, monkeypatch):
        (tmp_path / "kernels.py").write_text("")
        monkeypatch.delitem(sys.modules, "kernels", raising=False)  # another test may have imported the folder
        monkeypatch.syspath_prepend(str(tmp_path))
        assert doctor.kernels().status == "bad"


class TestPlaces:
    def test_room_and_permission(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20 << 30))
        (found,) = doctor.places({"runs": tmp_path / "not/yet"})
        assert (found.status, found.says) == ("ok", f"{tmp_path / 'not/yet'}, 20 GiB free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
        (found,) = doctor.places({"runs": tmp_path})
        assert (found.status, found.remedy) == ("warn", "make room: a run with weights of a hub needs more than 8 GiB")
        monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
        (found,) = doctor.places({"runs": tmp_path})
        assert found.status == "bad"
        assert f"{tmp_path} may not be written to" in found.says

    def test_hub(self, tmp_path, monkeypatch):
        (tmp_path / "models--a--b").mkdir()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        (found,) = doctor.hub({"HF_HUB_OFFLINE": "1"})
        assert found.says == f"stays offline: only what was fetched before is found; 1 repositories in {tmp_path}; HF_HUB_OFFLINE=1"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        (found,) = doctor.hub({})
        assert found.says == f"may use the network; 1 repositories in {tmp_path}"

    def test_data(self, tmp_path):
        assert doctor.data(None).remedy == "zoo ... --data DIR, or ZOO_DATA=DIR, for recipes that read one"
        assert doctor.data(tmp_path / "gone") == Check("data", "bad", f"{tmp_path / 'gone'} is no folder", "correct --data or ZOO_DATA")
        assert doctor.data(tmp_path).says == f"{tmp_path} holds no data set of the zoo"
        (tmp_path / "shop").mkdir()
        (tmp_path / "shop/notes.csv").write_text("note_id\n")
        assert doctor.data(tmp_path).says == f"{tmp_path} holds shop"


class TestCommand:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        """The imports in processes of their own are tested above."""
        monkeypatch.setattr(doctor, "_tried", lambda name, code, broken, remedy: Check(name, "ok", "fit this torch"))
        monkeypatch.delenv("ZOO_DATA", raising=False)

    def test_this_machine(self, command):
        code, out, err = command("doctor")
        assert (code, err) == (0, "")
        assert out.startswith(f"ok    python: {sys.version.split()[0]} on ")
        assert "\nok    torchvision: fit this torch\n" in out

    def test_json(self, command):
        found = json.loads(command("doctor", "--json")[1])
        assert {"name", "status", "says", "remedy"} == set(found[0])
        assert len({c["name"] for c in found}) == len(found)

    def test_something_bad_is_one(self, command, tmp_path):
        code, out, _ = command("doctor", "--data", tmp_path / "gone")
        assert code == 1
        assert out.splitlines()[-2:] == [f"bad   data: {tmp_path / 'gone'} is no folder", "      -> correct --data or ZOO_DATA"]
