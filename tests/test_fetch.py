"""What a recipe reads from a hub: listed, found in a cache, fetched, bundled, and put into place on another machine."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import CLIPVisionConfig, CLIPVisionModel

import zoo.bundle
from tests.test_cli import TINY
from zoo.bundle import pack, unpack
from zoo.errors import Failure, ZooError
from zoo.fetch import bundle, fetch, located, remotes_of
from zoo.recipe import load_recipe, recipes
from zoo.registry import make
from zoo.types import Remote

REVISION = "0123456789abcdef0123456789abcdef01234567"
EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


def recipe(vision="hf:someone/eyes", **sections):
    return load_recipe(TINY | {"model": TINY["model"] | {"vision": vision}} | sections)


def repository(cache, name="someone/eyes", files=None, revision=REVISION):
    """A repository in the layout of the hub's cache: links to blobs, as on Linux."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(revision)
    (home / "blobs").mkdir()
    snapshot = home / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for i, (file, content) in enumerate(
        (files or {"config.json": b"{}", "model.safetensors": b"w", "preprocessor_config.json": b"{}"}).items()
    ):
        (home / f"blobs/{i}").write_bytes(content)
        (snapshot / file).symlink_to(f"../../blobs/{i}")
    return snapshot


@pytest.fixture
def eyes(tmp_path):
    """A cache with a real, tiny vision transformer."""
    model = CLIPVisionModel(CLIPVisionConfig(**EYES))
    own = tmp_path / "written"
    model.save_pretrained(own)
    about = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    (own / "preprocessor_config.json").write_text(json.dumps(about | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}))
    cache = tmp_path / "here"
    repository(cache, files={p.name: p.read_bytes() for p in own.iterdir()} | {"tf_model.h5": b"not wanted"})
    return cache, model


class TestList:
    def test_of_the_paper(self):
        assert remotes_of(load_recipe("notellm2/mqwen_bigg")) == [
            Remote("weights", "Qwen/Qwen-7B-Chat", ("*.safetensors",)),
            Remote("tokenizer", "Qwen/Qwen1.5-7B-Chat", ("tokenizer.json", "zoo_tokenizer.json")),
            Remote("weights", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")),
        ]
        assert [(r.role, r.repo) for r in remotes_of(load_recipe("notellm2/mtomato_base"))] == [
            ("weights", "meta-llama/Llama-2-7b-hf"),
            ("config", "meta-llama/Llama-2-7b-hf"),
            ("tokenizer", "meta-llama/Llama-2-7b-hf"),
            ("weights", "openai/clip-vit-base-patch16"),
        ]

    def test_of_papers_of_pictures_and_texts(self):
        assert remotes_of(load_recipe("albef/pretrain")) == [
            Remote("tokenizer", "google-bert/bert-base-uncased", ("tokenizer.json",)),
            Remote("weights", "timm/deit_base_patch16_224.fb_in1k", ("model.safetensors", "pytorch_model.bin")),
        ]

    @pytest.mark.parametrize(
        "name",
        [
            n
            for n in recipes()
            if not n.startswith(("notellm2/m", "albef/", "beit_3/", "blip/", "visual_tokenizer/base", "vlmo/")) or "emoji" in n
        ],
    )
    def test_the_small_recipes_read_nothing(self, name):
        assert remotes_of(load_recipe(name)) == []

    @pytest.mark.parametrize(
        "vision, found",
        [
            ("clip_vit_b16", []),
            ({"name": "clip_vit_b16", "pretrained": "my/clip"}, [("weights", "my/clip")]),
            ("timm:vit_base_patch16_clip_224.openai", []),
            ({"name": "timm:vit_base_patch16_clip_224.openai", "pretrained": True}, [("weights", "timm/vit_base_patch16_clip_224.openai")]),
            ("open_clip:ViT-B-32", []),
            ("open_clip:ViT-B-32/laion2b_s34b_b79k", [("weights", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K")]),
            ({"name": "open_clip:ViT-B-32/laion2b_s34b_b79k", "pretrained": False}, []),
            ("hf:a/b", [("weights", "a/b"), ("config", "a/b"), ("processor", "a/b")]),
            ({"name": "hf:a/b", "pretrained": False, "tokenizer": "c/d"}, [("config", "a/b"), ("tokenizer", "c/d")]),
            ({"name": "hf:a/b", "pretrained": False, "config": {"model_type": "vit"}}, []),
        ],
    )
    def test_of_every_kind_of_encoder(self, vision, found):
        assert [(r.role, r.repo) for r in remotes_of(recipe(vision))] == found

    def test_of_backbones(self):
        def of(**backbone):
            model = TINY["model"] | {"backbone": backbone}
            return [(r.role, r.repo) for r in remotes_of(load_recipe(TINY | {"model": model}))]

        assert of(name="qwen") == []
        assert of(name="qwen", tokenizer="bytes") == []
        assert of(name="qwen", pretrained=True, tokenizer="bytes") == [("weights", "Qwen/Qwen2.5-0.5B"), ("config", "Qwen/Qwen2.5-0.5B")]
        assert of(name="llama", tokenizer="a/b") == [("tokenizer", "a/b")]
        assert of(name="qwen", size="qwen1_7b_chat", tokenizer="a/b") == [("tokenizer", "a/b")]

    def test_arms_are_looked_at_and_nothing_comes_twice(self):
        found = remotes_of(recipe(baselines={"other": {"model.vision": "hf:c/d"}, "same": {"model.fusion": "early"}}))
        assert [r.repo for r in found] == ["someone/eyes"] * 3 + ["c/d"] * 3

    @pytest.mark.parametrize(
        "vision, says",
        [
            ("open_clip:ViT-B-32/laion9b", "no weights of open_clip:ViT-B-32 named 'laion9b'"),
            ({"name": "timm:resnet18x", "pretrained": True}, "no timm model named 'resnet18x'"),
        ],
    )
    def test_names_that_are_none(self, vision, says):
        with pytest.raises(ZooError, match=says):
            remotes_of(recipe(vision))


class TestFind:
    def test_in_a_cache_and_in_a_folder(self, tmp_path):
        remote = Remote("weights", "someone/eyes", ("model*.safetensors", "pytorch_model*.bin"))
        assert located(remote, tmp_path) is None
        snapshot = repository(tmp_path)
        assert located(remote, tmp_path) == snapshot
        assert located(remote._replace(files=("*.bin",)), tmp_path) is None
        assert located(remote._replace(repo=str(snapshot)), tmp_path / "elsewhere") == snapshot

    def test_weights_in_parts_are_all_there_or_not_there(self, tmp_path):
        index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
        snapshot = repository(
            tmp_path, files={"model.safetensors.index.json": json.dumps(index).encode(), "model-1-of-2.safetensors": b"a"}
        )
        remote = Remote("weights", "someone/eyes", ("model*.safetensors",))
        assert located(remote, tmp_path) is None
        (snapshot / "model-2-of-2.safetensors").write_bytes(b"b")
        assert located(remote, tmp_path) == snapshot

    def test_a_link_into_nothing_is_no_file(self, tmp_path):
        snapshot = repository(tmp_path)
        (snapshot / "model.safetensors").resolve().unlink()
        assert located(Remote("weights", "someone/eyes", ("*.safetensors",)), tmp_path) is None


class TestFetch:
    def test_offline_everything_that_is_missing_is_named(self, tmp_path):
        repository(tmp_path, files={"config.json": b"{}"})
        with pytest.raises(Failure) as e:
            fetch(recipe(), tmp_path)
        assert str(e.value).splitlines() == [
            "2 of 3 things that this recipe reads are not here and could not be fetched",
            "  weights of someone/eyes: the hub's library is told to stay offline (HF_HUB_OFFLINE)",
            "  processor of someone/eyes: the hub's library is told to stay offline (HF_HUB_OFFLINE)",
            "fetch them on a machine with a network: zoo fetch RECIPE --bundle bundle.tar, and here: zoo fetch --unpack bundle.tar",
        ]

    def test_what_is_here_is_not_fetched(self, tmp_path):
        snapshot = repository(tmp_path)
        assert [f.folder for f in fetch(recipe(), tmp_path)] == [snapshot] * 3

    @pytest.fixture
    def network(self, tmp_path, monkeypatch):
        """A hub with one repository, and what was asked of it."""
        asked = []

        def snapshot_download(repo, *, cache_dir, allow_patterns, ignore_patterns):
            asked.append((repo, allow_patterns[0]))
            assert ignore_patterns == ["*/*"]
            if repo != "someone/eyes":
                raise LocalEntryNotFoundError("Cannot find the requested files\nmore")
            if not (cache_dir / "models--someone--eyes").exists():
                repository(cache_dir, files={"config.json": b"{}", "pytorch_model.bin": b"w", "preprocessor_config.json": b"{}"})

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    def test_the_second_best_files_are_taken_where_the_best_are_not_there(self, tmp_path, network):
        found = fetch(recipe(), tmp_path)
        assert [f.folder.name for f in found] == [REVISION] * 3
        assert network == [("someone/eyes", "model*.safetensors")]  # the one call brought the other kind along

    @pytest.mark.parametrize(
        "vision, says",
        [
            ("hf:no/such", "weights of no/such: Cannot find the requested files\n"),
            ({"name": "clip_vit_b16", "pretrained": "someone/text"}, "weights of someone/text: Cannot find"),
            ({"name": "hf:someone/eyes", "tokenizer": "someone/eyes"}, "tokenizer of someone/eyes: its repository has no tokenizer.json"),
            ({"name": "timm:gcvit_tiny.in1k", "pretrained": True}, "it lies at an address of its own, not in the hub"),
        ],
    )
    def test_what_cannot_be_had_says_why(self, tmp_path, network, vision, says):
        with pytest.raises(Failure) as e:
            fetch(recipe(vision), tmp_path)
        assert says in str(e.value)


class TestBundle:
    def test_a_model_moves_to_a_machine_without_a_network(self, eyes, tmp_path, monkeypatch):
        here, model = eyes
        there = tmp_path / "there"
        wanted = recipe()
        packed = bundle(wanted, "mine", fetch(wanted, here), here, tmp_path / "b.tar")
        place = unpack(packed, there / "hub", there)
        assert load_recipe(place.recipe) == wanted
        assert sorted(p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()) == [
            "hub/models--someone--eyes/refs/main",
            *(
                f"hub/models--someone--eyes/snapshots/{REVISION}/{name}"
                for name in ("config.json", "model.safetensors", "preprocessor_config.json")
            ),
            "mine.yaml",
        ]
        assert not any(p.is_symlink() for p in there.rglob("*"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(there / "hub"))
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(there / "hub"))
        encoder = make("encoder", "hf:someone/eyes")
        torch.testing.assert_close(next(encoder.model.parameters()), next(model.parameters()))

    def test_the_same_content_gives_the_same_bytes(self, eyes, tmp_path):
        here, _ = eyes
        wanted = recipe()
        tars = [bundle(wanted, "mine", fetch(wanted, here), here, tmp_path / name) for name in ("a.tar", "b.tar")]
        assert tars[0].read_bytes() == tars[1].read_bytes()
        with tarfile.open(tars[0]) as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}
            assert all(m.isreg() for m in tar)

    def test_folders_of_the_users_own_stay_where_they_are(self, eyes, tmp_path):
        here, _ = eyes
        folder = next((here / "models--someone--eyes/snapshots").iterdir())
        wanted = recipe(f"hf:{folder}")
        with tarfile.open(bundle(wanted, "mine", fetch(wanted, tmp_path / "empty"), tmp_path / "empty", tmp_path / "b.tar")) as tar:
            assert tar.getnames() == ["manifest.json", "recipe/mine.yaml"]

    def test_killed_while_it_is_put_into_place(self, packed, tmp_path, monkeypatch):
        """Files are whole, and the repository is not seen before all of it is there."""
        place, calls = zoo.bundle._place, []

        def killed(staged, target):
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(target)
            place(staged, target)

        monkeypatch.setattr(zoo.bundle, "_place", killed)
        with pytest.raises(KeyboardInterrupt):
            unpack(packed, tmp_path / "there", tmp_path / "there")
        assert len(calls) == 2
        assert not (tmp_path / "there/models--a--b/refs").exists()
        assert not list((tmp_path / "there").glob(".unpack*"))
        monkeypatch.undo()
        assert len(unpack(packed, tmp_path / "there", tmp_path / "there").files) == 3
        unpack(packed, tmp_path / "there", tmp_path / "there")  # again, over itself

    def test_a_write_that_fails_leaves_no_tar(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            pack(tmp_path / "b.tar", ("r.yaml", "x"), {"models--a--b/refs/main": tmp_path / "gone"})
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def packed(tmp_path):
    files = {}
    for name in ("refs/main", "snapshots/1/config.json", "snapshots/1/model.safetensors"):
        files[f"models--a--b/{name}"] = tmp_path / name.replace("/", "_")
        files[f"models--a--b/{name}"].write_text(name)
    return pack(tmp_path / "b.tar", ("r.yaml", "recipe"), files)


def forged(path, members, manifest=None):
    """A tar by somebody else: its manifest names ``members`` unless another is given."""
    sizes = {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in members.items()}
    said = {"format": 1, "files": sizes} if manifest is None else manifest
    with tarfile.open(path, "w") as tar:
        for name, content in {"manifest.json": json.dumps(said).encode(), **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


class TestUnpackTrustsNobody:
    @pytest.mark.parametrize(
        "name",
        [
            "../evil",
            "hub/../../evil/x/y",
            "/etc/evil",
            "hub/models--a--b/snapshots/../../../evil",
            "hub/models--a--b/snapshots/..",
            "hub/models--a--b/snapshots//x",
            "hub/models--a--b/blobs/x",
            "hub/evil",
            "hub/models--a--b\\..\\..\\x/snapshots/1/x",
            "C:/evil/x/y",
            "recipe/../evil.yaml",
            "recipe/evil.sh",
            "recipe/.evil.yaml",
        ],
    )
    def test_names_that_lead_elsewhere(self, tmp_path, name):
        bad = forged(tmp_path / "b.tar", {"recipe/r.yaml": b"r", name: b"evil"})
        with pytest.raises(ZooError, match=r"is refused: it wants to write|holds no recipe, or several"):
            unpack(bad, tmp_path / "in/hub", tmp_path / "in")
        assert not [p for p in tmp_path.rglob("*") if "evil" in p.name]

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
    def test_what_is_no_plain_file(self, tmp_path, packed, kind):
        with tarfile.open(packed, "a") as tar:
            info = tarfile.TarInfo("hub/models--a--b/refs/main")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        with pytest.raises(ZooError, match="is no plain file"):
            unpack(packed, tmp_path / "in/hub", tmp_path / "in")

    def test_a_link_that_lies_there_leads_nowhere(self, tmp_path, packed):
        (tmp_path / "in/hub").mkdir(parents=True)
        (tmp_path / "outside").mkdir()
        (tmp_path / "in/hub/models--a--b").symlink_to(tmp_path / "outside")
        with pytest.raises(ZooError, match=r"models--a--b/\S+ leads out of"):
            unpack(packed, tmp_path / "in/hub", tmp_path / "in")
        assert list((tmp_path / "outside").iterdir()) == []

    def test_content_that_differs_from_its_hash(self, tmp_path, packed):
        content = packed.read_bytes()
        at = content.index(b"refs/main", content.index(b"hub/models--a--b/refs/main\0") + 100)  # the content is the name again
        packed.write_bytes(content[:at] + b"REFS" + content[at + 4 :])
        with pytest.raises(Failure, match="is damaged: hub/models--a--b/refs/main differs from what was packed"):
            unpack(packed, tmp_path / "in/hub", tmp_path / "in")
        assert [p for p in (tmp_path / "in").rglob("*") if p.is_file()] == []

    def test_half_a_tar(self, tmp_path, packed):
        packed.write_bytes(packed.read_bytes()[: packed.read_bytes().index(b"hub/models--a--b/snapshots/1/model")])
        with pytest.raises(Failure, match=r"is damaged: it lacks hub/models--a--b/snapshots/1/model\.safetensors|is damaged or no tar"):
            unpack(packed, tmp_path / "in/hub", tmp_path / "in")

    def test_a_file_that_the_manifest_does_not_name(self, tmp_path):
        said = {"format": 1, "files": {"recipe/r.yaml": {"size": 1, "sha256": "x"}}}
        bad = forged(tmp_path / "b.tar", {"hub/models--a--b/refs/main": b"x"}, said)
        with pytest.raises(ZooError, match=r"does not stand in its manifest\.json"):
            unpack(bad, tmp_path / "in/hub", tmp_path / "in")

    def test_a_file_twice(self, tmp_path, packed):
        with tarfile.open(packed, "a") as tar:
            info = tarfile.TarInfo("recipe/r.yaml")
            info.size = 6
            tar.addfile(info, io.BytesIO(b"recipe"))
        with pytest.raises(Failure, match="has a file twice"):
            unpack(packed, tmp_path / "in/hub", tmp_path / "in")

    @pytest.mark.parametrize(
        "manifest, says",
        [
            ({"format": 2, "files": {}}, "has format 2, and this version of the zoo reads 1"),
            ({"format": 1}, "cannot be read"),
            ([], "cannot be read"),
            ({"format": 1, "files": {"recipe/r.yaml": {"size": "many"}}}, "cannot be read"),
            ({"format": 1, "files": {}}, "holds no recipe"),
        ],
    )
    def test_manifests(self, tmp_path, manifest, says):
        with pytest.raises(ZooError, match=says):
            unpack(forged(tmp_path / "b.tar", {}, manifest), tmp_path / "in/hub", tmp_path / "in")

    def test_what_is_no_bundle(self, tmp_path):
        with pytest.raises(ZooError, match=r"no bundle \S+gone\.tar"):
            unpack(tmp_path / "gone.tar", tmp_path, tmp_path)
        (tmp_path / "x.tar").write_bytes(b"not a tar" * 100)
        with pytest.raises(Failure, match="damaged or no tar"):
            unpack(tmp_path / "x.tar", tmp_path, tmp_path)
        with tarfile.open(tmp_path / "y.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("x"))
        with pytest.raises(ZooError, match=r"its first file is no manifest\.json"):
            unpack(tmp_path / "y.tar", tmp_path, tmp_path)

    def test_another_recipe_is_not_overwritten(self, tmp_path, packed):
        (tmp_path / "r.yaml").write_text("mine")
        with pytest.raises(ZooError, match=r"r\.yaml is there and is another recipe"):
            unpack(packed, tmp_path / "hub", tmp_path)
        assert (tmp_path / "r.yaml").read_text() == "mine"
        assert list((tmp_path / "hub").iterdir()) == []


class TestCommand:
    def test_there_and_back(self, command, eyes, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(eyes[0]))
        model = TINY["model"] | {"vision": "hf:someone/eyes"}
        Path("mine.yaml").write_text(yaml.safe_dump(TINY | {"model": model}))
        code, out, _ = command("fetch", "mine.yaml", "--bundle", "all.tar")
        assert code == 0
        assert [line.split()[:2] for line in out.splitlines()] == [
            ["weights", "someone/eyes"],
            ["config", "someone/eyes"],
            ["processor", "someone/eyes"],
            ["all.tar"],
        ]
        code, out, _ = command("fetch", "--unpack", "all.tar", "--into", "there")
        assert (code, out) == (0, "4 files\ntrain with: HF_HUB_CACHE=there/hub HF_HUB_OFFLINE=1 zoo train there/mine.yaml\n")

    def test_nothing_to_fetch(self, command):
        assert command("fetch", "demo") == (0, "this recipe reads nothing from a hub\n", "")

    def test_missing_is_a_failure(self, command, tmp_path, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
        code, out, err = command("fetch", "notellm2/mqwen_base")
        assert (code, out) == (1, "")
        assert "3 of 3 things that this recipe reads are not here" in err

    @pytest.mark.parametrize("arguments", [[], ["demo", "--unpack", "x.tar"], ["demo", "--into", "x"], ["--unpack", "x", "--bundle", "y"]])
    def test_one_thing_at_a_time(self, command, arguments):
        code, _, err = command("fetch", *arguments)
        assert code == 2
        assert "write either zoo fetch RECIPE [--bundle TAR], or zoo fetch --unpack TAR [--into DIR]" in err
