"""One tar with everything that a recipe reads from a hub, made where there is a network and put into place where there is none."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

from zoo.errors import Failure, ZooError

MANIFEST = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 20
_PART = re.compile(r"[\w][\w.@+=-]*")  # of a name: no empty part, no "..", no drive, nothing that begins with a dot or a dash
_MOST_MANIFEST = 1 << 26  # bytes: more is no list of files


class Member(NamedTuple):
    """One file of a bundle, as its manifest has it."""

    size: int  # bytes
    sha256: str


class Unpacked(NamedTuple):
    """Where the content of a bundle lies now."""

    recipe: Path
    files: list[Path]  # in the hub's cache


def pack(bundle: Path, recipe: tuple[str, str], files: Mapping[str, Path]) -> Path:
    """Write a bundle; the same content gives the same bytes. ``bundle`` is whole or not there at any moment.

    Args:
        bundle: The tar to write.
        recipe: Its file name and its text.
        files: Names below the hub's cache, with slashes, to the files.
    """
    named: dict[str, Path | bytes] = {f"recipe/{recipe[0]}": recipe[1].encode()}
    named |= {f"hub/{name}": path.resolve() for name, path in files.items()}  # the hub's cache holds links to its blobs
    members = {name: Member(*_measured(named[name])) for name in sorted(named)}
    said = {"format": FORMAT, "files": {name: member._asdict() for name, member in members.items()}}
    bundle.parent.mkdir(parents=True, exist_ok=True)
    beside = bundle.with_name(f"{bundle.name}.{os.getpid()}.tmp")
    try:
        with tarfile.open(beside, "w", format=tarfile.PAX_FORMAT) as tar:
            _add(tar, MANIFEST, json.dumps(said, indent=1).encode())
            for name in members:
                _add(tar, name, named[name])
        beside.replace(bundle)
    finally:
        beside.unlink(missing_ok=True)
    return bundle


def unpack(bundle: Path, hub: Path, recipes: Path) -> Unpacked:
    """Put the content of a bundle into place, when all of it was read and its hashes are right.

    A file takes its place by a rename, and the one that makes a repository visible to the hub's library comes last, so that a process
    that is killed leaves whole files, and at worst some that nobody sees.

    Args:
        bundle: A tar that `pack` wrote. It is not trusted: it may hold plain files with plain names, and nothing else.
        hub: The hub's cache folder.
        recipes: The folder for the recipe.

    Raises:
        Failure: If it is damaged.
        ZooError: If it is no bundle, wants to write elsewhere, or another recipe of this name is there.
    """
    hub.mkdir(parents=True, exist_ok=True)
    stage = hub / f".unpack-{os.getpid()}"  # the same file system: else a rename would be a copy
    try:
        names = _stage(bundle, stage)
        recipe = next(name for name in names if name.startswith("recipe/"))
        target = recipes / recipe.removeprefix("recipe/")
        if target.exists() and target.read_bytes() != (stage / recipe).read_bytes():
            raise ZooError(f"{target} is there and is another recipe: move it away, or unpack into another folder (--into DIR)")
        inside = sorted((n.removeprefix("hub/") for n in names if n.startswith("hub/")), key=lambda n: ("/refs/" in n, n))
        for name in inside:
            _check_inside(hub, hub / name)
        for name in inside:
            _place(stage / "hub" / name, hub / name)
        recipes.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        shutil.copyfile(stage / recipe, beside)  # perhaps another file system
        beside.replace(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return Unpacked(target, [hub / name for name in inside])


def _add(tar: tarfile.TarFile, name: str, content: Path | bytes) -> None:
    """Without owner, date or mode of this machine."""
    member = tarfile.TarInfo(name)
    member.size = len(content) if isinstance(content, bytes) else content.stat().st_size
    member.mode = 0o644
    with BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        tar.addfile(member, file)


def _measured(content: Path | bytes) -> tuple[int, str]:
    if isinstance(content, bytes):
        return len(content), hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return content.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _stage(bundle: Path, stage: Path) -> list[str]:
    """Read the whole bundle into ``stage`` and check it; the names of its files."""
    if not bundle.is_file():
        raise ZooError(f"no bundle {bundle}: write one where there is a network, with zoo fetch RECIPE --bundle {bundle.name}")
    try:
        with tarfile.open(bundle, "r:") as tar:
            entries = iter(tar)
            members = _manifest(bundle, tar, next(entries, None))
            seen = [_extract(bundle, tar, entry, members, stage) for entry in entries]
    except tarfile.TarError as e:
        raise Failure(f"{bundle} is damaged or no tar ({e}): copy it again") from e
    lacks = sorted(members.keys() - set(seen))
    if lacks or len(seen) != len(members):
        raise Failure(f"{bundle} is damaged: it lacks {', '.join(lacks[:3]) or 'nothing, and has a file twice'}: copy it again")
    return seen


def _manifest(bundle: Path, tar: tarfile.TarFile, entry: tarfile.TarInfo | None) -> dict[str, Member]:
    """What the bundle says that it holds; every name is one that stays where it is put."""
    if entry is None or entry.name != MANIFEST or not entry.isreg() or entry.size > _MOST_MANIFEST:
        raise ZooError(f"{bundle} is no bundle of zoo fetch: its first file is no {MANIFEST}")
    file = tar.extractfile(entry)
    assert file is not None, "a regular file"
    try:
        said: dict[str, Any] = json.loads(file.read())
        members = {name: Member(int(about["size"]), str(about["sha256"])) for name, about in said["files"].items()}
        version = said["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ZooError(f"{bundle} is no bundle of zoo fetch: its {MANIFEST} cannot be read ({e!r})") from e
    if version != FORMAT:
        raise ZooError(f"{bundle} has format {version!r}, and this version of the zoo reads {FORMAT}: install the one that wrote it")
    if unsafe := [name for name in members if not _is_safe(name)]:
        raise ZooError(f"{bundle} is refused: it wants to write {', '.join(map(repr, unsafe[:3]))}")
    if sum(name.startswith("recipe/") for name in members) != 1:
        raise ZooError(f"{bundle} is no bundle of zoo fetch: it holds no recipe, or several")
    return members


def _is_safe(name: str) -> bool:
    """``recipe/<file>.yaml``, or a file of a repository in the layout of the hub's cache."""
    parts = name.split("/")
    if not all(_PART.fullmatch(part) for part in parts):
        return False
    if parts[0] == "recipe":
        return len(parts) == 2 and name.endswith(".yaml")
    return parts[0] == "hub" and len(parts) >= 4 and parts[1].startswith("models--") and parts[2] in ("refs", "snapshots")


def _extract(bundle: Path, tar: tarfile.TarFile, entry: tarfile.TarInfo, members: Mapping[str, Member], stage: Path) -> str:
    if entry.name not in members:
        raise ZooError(f"{bundle} is refused: {entry.name!r} does not stand in its {MANIFEST}")
    if not entry.isreg():
        raise ZooError(f"{bundle} is refused: {entry.name!r} is no plain file")
    source, target, expected = tar.extractfile(entry), stage / entry.name, members[entry.name]
    assert source is not None, "a regular file"
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for chunk in _chunks(source):
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    if (entry.size, digest.hexdigest()) != expected:
        raise Failure(f"{bundle} is damaged: {entry.name} differs from what was packed: copy it again")
    return entry.name


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _check_inside(hub: Path, target: Path) -> None:
    """A link that lies in the cache already must not lead the file out of it."""
    if not target.parent.resolve().is_relative_to(hub.resolve()):
        raise ZooError(f"{target.parent} leads out of {hub}, to {target.parent.resolve()}: unpack into another folder (--into DIR)")


def _place(staged: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    staged.replace(target)
