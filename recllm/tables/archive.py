"""A data set's raw files: found in a folder, or unpacked from a zip; `download` brings what is not there."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from recllm.console import say
from recllm.tables.download import digest


def find(given: Path, cache: Path, names: Sequence[str]) -> dict[str, Path]:
    """The raw files, unpacked.

    Args:
        given: a folder that holds the files (itself or one level below; `x.gz` may lie there unpacked, as
            `x`), or a zip of them.
        cache: where files of a zip are unpacked to, e.g. `artifacts/ml-1m/raw`. What is there already is not
            unpacked again if its CRC is right.
        names: file names, e.g. `["ratings.dat"]`.

    Returns:
        A path for each name.

    Raises:
        ValueError: one line: `given` does not exist, lacks a file, or one is empty; the zip is truncated or
            corrupt. Nothing half unpacked stays behind.
    """
    if not given.exists():
        raise ValueError(f"RAW={given} does not exist, wanted a folder or zip with {_listed(names)}")
    if given.is_file():
        files = _unpack(given, cache, names)
    else:
        files = {name: _look_up(given, name, names) for name in names}
    for path in files.values():
        if not path.stat().st_size:
            raise ValueError(
                f"{path} is empty (0 bytes), wanted its data; get the file again, or another RAW="
            )
    return files


def show_license(folder: Path, name: str, terms: str) -> None:
    """Print a source's license when it is first used; `license.txt` in `folder` remembers that.

    Args:
        folder: e.g. `artifacts/ml-1m/raw`; made if absent.
        name: of the source.
        terms: in one line, where the full text is included.
    """
    marker = folder / "license.txt"
    line = f"{name}: {terms}"
    if marker.is_file() and marker.read_text(encoding="utf-8") == f"{line}\n":
        return
    folder.mkdir(parents=True, exist_ok=True)
    say(line)
    marker.write_text(f"{line}\n", encoding="utf-8")


def is_published(given: Path, checksum: str, counts: Mapping[str, int], published: Mapping[str, int]) -> bool:
    """Whether the counts are the published ones; where they are not, what differs is printed.

    Args:
        given: the folder or file that was read.
        checksum: of the published file, `md5:...` or `sha256:...`; empty where none is published.
        counts: of what was read.
        published: the publisher's counts, in the same keys or fewer.

    Raises:
        ValueError: the counts are others although the checksum is right.
    """
    differences = [
        f"{counts[key]:,} {key} (published: {number:,})"
        for key, number in published.items()
        if counts[key] != number
    ]
    if not differences:
        return True
    if checksum and given.is_file() and digest(given, checksum) == checksum:
        raise ValueError(
            f"{given} has the published checksum and yet {', '.join(differences)}; "
            "remove what is unpacked from it and run the same command again"
        )
    say(f"note: {given} is not the published data set: {', '.join(differences)}")
    return False


def _look_up(folder: Path, name: str, names: Sequence[str]) -> Path:
    for own in (name, name.removesuffix(".gz")):
        for place in (folder / own, *sorted(folder.glob(f"*/{own}"))):
            if place.is_file():
                return place
    raise ValueError(
        f"RAW={folder} has no {name}, wanted {_listed(names)}; point RAW at the folder or zip that has them"
    )


def _unpack(given: Path, cache: Path, names: Sequence[str]) -> dict[str, Path]:
    try:
        with zipfile.ZipFile(given) as content:
            return {name: _member(given, content, name, cache / name) for name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{given} ({given.stat().st_size:,} bytes) is no whole zip archive ({error}), wanted one with "
            f"{_listed(names)}; remove it and get it again, or give another RAW=<folder or zip>"
        ) from error


def _member(given: Path, content: zipfile.ZipFile, name: str, target: Path) -> Path:
    members = [member for member in content.namelist() if member == name or member.endswith(f"/{name}")]
    if not members:
        raise ValueError(
            f"{given} has no {name}, wanted it in there; point RAW at the data set's own zip or folder"
        )
    info = content.getinfo(members[0])
    if target.is_file() and target.stat().st_size == info.file_size and _crc(target) == info.CRC:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{name}.part")
    try:
        with content.open(info) as source, partial.open("wb") as sink:
            while block := source.read(1 << 22):  # the last one compares the CRC
                sink.write(block)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
