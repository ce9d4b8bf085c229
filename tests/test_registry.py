"""Names to parts: the folder, the decorator, the entry points."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from zoo import registry
from zoo.errors import ZooError
from zoo.registry import HOMES, entry, lookup, make, names, register

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("own_registry")


def python(code, *paths):
    """Run ``code`` with these folders in front of what is installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=paths[0], capture_output=True, text=True, check=False)


class TestFolder:
    @pytest.mark.parametrize("kind", HOMES)
    def test_every_file_is_a_name(self, kind):
        folder = ROOT / (f"{kind}s" if kind == "fusion" else HOMES[kind].replace(".", "/"))
        files = {f.stem for f in folder.glob("[!_]*.py")}
        assert files, folder
        assert files <= set(names(kind))
        assert names(kind) == sorted(names(kind))

    @pytest.mark.parametrize("kind, name", [(k, n) for k in HOMES for n in names(k)])
    def test_every_file_registers_its_own_name_with_a_summary(self, kind, name):
        known = entry(kind, name)
        assert known.maker.__module__ == f"{HOMES[kind]}.{name}"
        assert known.summary.endswith((".", ":")), (kind, name)

    def test_listing_imports_nothing(self):
        code = "import sys, zoo; [zoo.names(k) for k in ('model', 'fusion', 'encoder')]; zoo.list_models(); print('torch' in sys.modules)"
        done = python(code, ROOT)
        assert done.stdout.strip() == "False", done.stderr

    def test_private_files_are_no_parts(self):
        assert not [n for k in HOMES for n in names(k) if n.startswith("_")]

    def test_list_models(self):
        assert zoo.list_models("*note*") == ["notellm2"]
        assert zoo.list_models("nothing*") == []
        assert zoo.list_models() == names("model")


class TestDecorator:
    def test_registers(self):
        @register("fusion", "fake_gate", joints=("combine",), paper="A. Author 2020, https://example.org")
        def fake_gate(names, dim, *, bias: bool = False):
            """Gate: one sentence.

            More.
            """
            return (names, dim, bias)

        assert "fake_gate" in names("fusion")
        assert make("fusion", {"name": "fake_gate", "bias": "true"}, ["a"], 4) == (["a"], 4, True)
        assert make("fusion", "fake_gate", ["a"], 4, bias=True) == (["a"], 4, True)
        info = zoo.info("fake_gate")
        assert info == {
            "name": "fake_gate",
            "kind": "fusion",
            "summary": "Gate: one sentence.",
            "paper": "A. Author 2020, https://example.org",
            "licence": "",
            "joints": {"combine": None},
            "settings": {"bias": False},
            "module": __name__,
            "parameters": None,
        }

    @pytest.mark.parametrize(
        "name, count",
        [
            ("notellm2", 633_307_264),
            ("qwen", 494_032_768),
            ("clip_vit_b16", 85_797_888),
            ("tiny_lm", 1_475_200),
            ("timm", None),
            ("sum", None),
        ],
    )
    def test_parameters_of_the_defaults(self, name, count, caplog):
        assert zoo.info(name)["parameters"] == count
        assert not [r for r in caplog.records if r.name == "zoo"]

    def test_the_licence_of_weights_is_not_that_of_the_zoo(self):
        assert zoo.info("timm")["licence"] == "of the weights that are loaded: see their card"
        assert "Tongyi Qianwen" in zoo.info("qwen")["licence"]

    def test_the_same_cell_may_run_twice(self):
        for _ in range(2):
            register("encoder", "fake_cell")(lambda: None)

    def test_two_makers_for_one_name(self):
        def other(): ...

        register("encoder", "fake_twice")(other)

        def again(): ...

        again.__module__ = "somewhere.else"
        with pytest.raises(ZooError, match=r"encoder 'fake_twice' is made by .*test_registry and again by somewhere\.else"):
            register("encoder", "fake_twice")(again)

    def test_a_file_of_the_zoo_is_not_shadowed_even_before_it_is_imported(self):
        code = (
            "from zoo.registry import register\n"
            "try: register('fusion', 'gated_late', joints=('combine',))(lambda: None)\n"
            "except ValueError as e: print(e)"
        )
        assert "fusion 'gated_late' is made by zoo.fusions.gated_late and again by __main__" in python(code, ROOT).stdout

    @pytest.mark.parametrize(
        "kind, joints, message",
        [
            ("fussion", ("combine",), "no kind named 'fussion'; did you mean 'fusion'"),
            ("fusion", ("combin",), "no joint named 'combin'; did you mean 'combine'"),
            ("fusion", (), r"fusion 'x' declares no joint: write joints=\(...\), of arrange, trunk, combine, schedule"),
        ],
    )
    def test_wrong_declarations(self, kind, joints, message):
        with pytest.raises(ZooError, match=message):
            register(kind, "x", joints=joints)


class TestLookup:
    def test_unknown_names(self):
        with pytest.raises(ZooError, match="no fusion named 'gated_lat'; did you mean 'gated_late'"):
            entry("fusion", "gated_lat")
        with pytest.raises(ZooError, match="no kind named 'fusions'; did you mean 'fusion'"):
            names("fusions")
        with pytest.raises(ZooError, match="no model named 'notelm2'; did you mean 'notellm2'"):
            zoo.build("notelm2")
        with pytest.raises(ZooError, match="no part named 'notelm2'; did you mean 'notellm2'"):
            zoo.info("notelm2")

    def test_a_name_with_a_prefix_carries_a_keyword(self):
        maker, carried = lookup("encoder", "timm:vit_tiny_patch16_224")
        assert maker is entry("encoder", "timm").maker
        assert carried == {"arch": "vit_tiny_patch16_224"}
        assert zoo.info("timm:vit_tiny_patch16_224")["name"] == "timm"

    def test_a_colon_where_none_belongs(self):
        with pytest.raises(ZooError, match="connector 'mlp' takes nothing after a colon: write 'mlp', not 'mlp:2'"):
            make("connector", "mlp:2", 4, 4)

    def test_nothing_after_a_colon(self):
        with pytest.raises(ZooError, match="encoder 'timm:' names nothing after its colon: write 'timm:<name>'"):
            make("encoder", "timm:")

    def test_a_name_of_two_kinds(self):
        register("connector", "fake_both")(lambda: None)
        register("encoder", "fake_both")(lambda: None)
        with pytest.raises(ZooError, match="'fake_both' is the name of a encoder and of a connector: say which, as kind="):
            zoo.info("fake_both")
        assert zoo.info("fake_both", kind="encoder")["kind"] == "encoder"

    def test_a_file_that_does_not_register_its_name(self, monkeypatch):
        monkeypatch.setattr(registry, "_files", lambda kind: {"fake_silent": "json"})
        with pytest.raises(ZooError, match="json does not register the connector 'fake_silent': a file registers its own name"):
            entry("connector", "fake_silent")


class TestMake:
    def test_keywords_are_checked(self):
        with pytest.raises(ZooError, match=r"connector 'mlp': layerss: no keyword named 'layerss'"):
            make("connector", {"name": "mlp", "layerss": 1}, 4, 4)

    def test_what_the_code_around_hands_over_is_no_setting(self):
        register("connector", "fake_linear")(lambda dim_in, dim_out, *, bias=True: (dim_in, dim_out, bias))
        with pytest.raises(ZooError, match="connector 'fake_linear': 'dim_in': not a setting: the model gives it"):
            make("connector", {"name": "fake_linear", "dim_in": 9}, 4, 8)
        assert make("connector", {"name": "fake_linear", "dim_in": 9}, dim_out=3) == (9, 3, True)

    def test_a_model_remembers_how_it_was_built(self):
        class Fake:
            pass

        def fake_model(*, dim: int = 3):
            return Fake()

        register("model", "fake_model")(fake_model)
        assert zoo.build("fake_model", dim=4).spec == {"name": "fake_model", "dim": 4}


PLUG_IN = '''
from zoo.registry import register

@register("fusion", "{name}", joints=("combine",))
def make(names, dim, *, bias: bool = False):
    """Made elsewhere."""
    return "made elsewhere"
'''


def install(folder, name, module="zoo_plug_in", distribution="zoo-plug-in"):
    """A distribution as pip leaves it behind: the module, and its entry points."""
    (folder / f"{module}.py").write_text(PLUG_IN.format(name=name))
    metadata = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[zoo.fusion]\n{name} = {module}:make\n")


class TestPlugIns:
    def test_an_installed_package_adds_a_part(self, tmp_path):
        install(tmp_path, "elsewhere")
        code = (
            "import sys, zoo; assert 'elsewhere' in zoo.names('fusion'); assert 'zoo_plug_in' not in sys.modules\n"
            "print(zoo.make('fusion', 'elsewhere', ['a'], 4), zoo.info('elsewhere')['module'])"
        )
        done = python(code, ROOT, tmp_path)
        assert done.stdout.strip() == "made elsewhere zoo_plug_in", done.stderr

    def test_a_name_that_the_zoo_has_is_refused(self, tmp_path):
        install(tmp_path, "gated_late")
        done = python("import zoo; zoo.names('fusion')", ROOT, tmp_path)
        assert "fusion 'gated_late' is made by zoo.fusions.gated_late and again by zoo_plug_in: uninstall one, or rename" in done.stderr

    def test_two_packages_with_one_name(self, tmp_path):
        install(tmp_path, "elsewhere")
        install(tmp_path, "elsewhere", "zoo_other", "zoo-other")
        assert "fusion 'elsewhere' is made by zoo_" in python("import zoo; zoo.names('fusion')", ROOT, tmp_path).stderr

    @pytest.mark.slow
    def test_a_package_installed_by_pip(self, tmp_path):
        source = tmp_path / "source"
        source.mkdir()
        (source / "zoo_plug_in.py").write_text(PLUG_IN.format(name="elsewhere"))
        (source / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
            '[project]\nname = "zoo-plug-in"\nversion = "1.0"\n[project.entry-points."zoo.fusion"]\nelsewhere = "zoo_plug_in:make"\n'
            '[tool.setuptools]\npy-modules = ["zoo_plug_in"]\n'
        )
        target = tmp_path / "target"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*pip, "--target", str(target), str(source)], check=True)
        done = python("import zoo; print(zoo.make('fusion', 'elsewhere', ['a'], 4))", ROOT, target)
        assert done.stdout.strip() == "made elsewhere", done.stderr
