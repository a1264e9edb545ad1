"""Wheels that tests put on an index: a folder that pip is told to read."""

import hashlib
import zipfile

NOT_RUN = "raise RuntimeError('this is never run')"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(index, members):
    """The wheel of some-lm==1.0: files by their names in it. Returns its SHA-256."""
    index.mkdir()
    path = index / "some_lm-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: some-lm\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_lm/__init__.py", NOT_RUN)
        for name, file in members.items():
            archive.write(file, name)
        for name, text in (("METADATA", metadata), ("WHEEL", WHEEL), ("RECORD", "")):
            archive.writestr(f"some_lm-1.0.dist-info/{name}", text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_only_from(index, monkeypatch):
    """Have pip look there and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
