"""Gets a dataset's raw files: from a folder or zip at hand, or by download with a checksum."""

import zipfile
from pathlib import Path


def raw_files(raw: Path | None, cache: Path, names: list[str], url: str, checksum: str) -> dict[str, Path]:
    """The raw files of a dataset, unpacked.

    Args:
        raw: a folder that holds the files (itself or one level below), or a zip; None downloads.
        cache: where a download and what is unpacked from a zip are kept, e.g. `artifacts/ml-1m/raw`.
        names: file names, e.g. `["ratings.dat"]`.
        url: the official archive, a zip.
        checksum: of the archive, as pooch takes it, e.g. `md5:c4d9...`; checked for a download only.

    Returns:
        A path for each name.

    Raises:
        ValueError: `raw` does not exist or lacks a file, or the download failed.
    """
    if raw is None:
        raw = _download(url, checksum, cache)
    if raw.is_file():
        return {name: _unpack(raw, name, cache) for name in names}
    found = {}
    for name in names:
        places = [raw / name, *sorted(raw.glob(f"*/{name}"))]
        present = [place for place in places if place.is_file()]
        if not present:
            raise ValueError(
                f"RAW={raw} has no {name}, wanted {', '.join(names)}; "
                "point RAW at the folder or zip that has them"
            )
        found[name] = present[0]
    return found


def _download(url: str, checksum: str, cache: Path) -> Path:
    import pooch  # only here: a folder at hand needs no network code

    try:
        return Path(
            pooch.retrieve(
                url, known_hash=checksum, fname=url.rsplit("/", 1)[1], path=cache, progressbar=False
            )
        )
    except (OSError, ValueError) as error:  # no network; checksum differs
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{url} could not be had ({reason}); download it by hand and give RAW=<folder or zip>"
        ) from error


def _unpack(archive: Path, name: str, cache: Path) -> Path:
    with zipfile.ZipFile(archive) as content:
        members = [member for member in content.namelist() if member == name or member.endswith(f"/{name}")]
        if not members:
            raise ValueError(f"RAW={archive} has no {name}; point RAW at the dataset's zip or folder")
        cache.mkdir(parents=True, exist_ok=True)
        info = content.getinfo(members[0])
        target = cache / name
        if not target.is_file() or target.stat().st_size != info.file_size:
            with content.open(info) as source, target.open("wb") as sink:
                while block := source.read(1 << 22):
                    sink.write(block)
    return target
