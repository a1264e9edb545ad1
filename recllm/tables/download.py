"""Downloads one file: checked, resumed where it broke off, and under its name only when it is whole.

Written on `requests`, as pooch throws away what it has got when a connection breaks.
"""

import hashlib
import shutil
import time
from pathlib import Path

import requests
import urllib3

from recllm.console import Progress, say

ATTEMPTS = 5
"""Tries in a row that bring no byte before a download is given up."""
TIMEOUT = (10, 60)
"""Seconds to connect, and to wait for the next byte."""
BLOCK = 1 << 20
"""Bytes read at a time."""
MB = 1_000_000
BUSY = (408, 429, 500, 502, 503, 504)
"""HTTP statuses that may be gone in a while."""
BROKEN = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)


def fetch(url: str, folder: Path, checksum: str = "", wait: float = 1.0) -> Path:
    """A file from the network, or as an earlier call left it in `folder`.

    What has come before a break stays as `<name>.part` and is continued, in the same call or a later one,
    unless the server says by its ETag or date that the file has changed. Without a known checksum, the
    SHA-256 of the first download is kept in `<name>.sha256` (as `sha256sum -c` reads it) and holds from then
    on.

    Args:
        url: of the file; its last part is the name.
        folder: where it is kept; made if absent.
        checksum: `md5:...` or `sha256:...` as published; empty where none is.
        wait: seconds before the second try; doubled from try to try, anew once a byte has come.

    Returns:
        `folder/<name>`, complete and verified.

    Raises:
        ValueError: one line: no network, no such file, no room, or another checksum than the known one.
            Nothing wrong stays behind.
    """
    name = url.rsplit("/", 1)[1]
    target = folder / name
    own_checksum = folder / f"{name}.sha256"
    wanted = checksum
    if not checksum and own_checksum.is_file():
        wanted = f"sha256:{own_checksum.read_text().split()[0]}"
    if target.is_file():
        if wanted and (got := digest(target, wanted)) != wanted:
            raise ValueError(
                f"{target} has {got}, wanted {wanted}; remove it, and run the same command again"
            )
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.part"
    _receive(url, part, wanted, wait)
    part.with_suffix(".tag").unlink(missing_ok=True)
    got = digest(part, wanted or "sha256:")
    if wanted and got != wanted:
        part.unlink()
        source = "" if checksum else f", as {own_checksum} has it of an earlier download"
        raise ValueError(
            f"{url} came with {got}, wanted {wanted}{source}; run the same command again, "
            "or download it by hand and give RAW=<folder or zip>"
        )
    if not wanted:
        note = folder / f"{name}.sha256.part"
        note.write_text(f"{got.partition(':')[2]}  {name}\n")
        note.replace(own_checksum)
        say(
            f"no checksum of {name} is published: its own, {got}, is kept in {own_checksum} and checked "
            "from now on"
        )
    part.replace(target)
    return target


def digest(path: Path, like: str) -> str:
    """Checksum of a file, in the kind of `like`: `md5:...` or `sha256:...`."""
    kind = like.partition(":")[0]
    with path.open("rb") as file:
        return f"{kind}:{hashlib.file_digest(file, kind).hexdigest()}"


def _receive(url: str, part: Path, wanted: str, wait: float) -> None:
    """Bring `part` to the length that the server tells, over as many connections as it takes."""
    failures = 0
    while True:
        before = _size(part)
        try:
            return _continue(url, part, wanted)
        except BROKEN as error:
            reason = _reason(error)
            hopeless = False
        except requests.HTTPError as error:
            status = getattr(error.response, "status_code", 0)
            reason = f"status {status}"
            hopeless = status not in BUSY
        have = _size(part)
        failures = 1 if have > before else failures + 1
        if hopeless or failures >= ATTEMPTS:
            raise ValueError(
                f"{url} cannot be had ({reason}; {have:,} bytes so far); run the same command again to "
                "go on, or download it by hand and give RAW=<folder or zip>"
            )
        pause = wait * 2 ** (failures - 1)
        say(f"{part.stem}: {reason} after {have:,} bytes; going on in {pause:g} s")
        time.sleep(pause)


def _continue(url: str, part: Path, wanted: str) -> None:
    """One connection: from where `part` ends, if the server still has the same file, else from the start."""
    tag = part.with_suffix(".tag")  # what the server calls the version that `part` is of
    version = tag.read_text() if tag.is_file() else ""
    have = _size(part) if version or wanted else 0  # else nothing would tell a mixture of two versions
    headers = {"Accept-Encoding": "identity"}  # the bytes as they are stored: a .gz must stay one
    if have:
        headers["Range"] = f"bytes={have}-"
    if have and version:
        headers["If-Range"] = version
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        span, _, size = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if response.status_code == 416 and size == str(have):  # nothing is left to send
            return
        if response.status_code == 416 or (response.status_code == 206 and not span.startswith(f"{have}-")):
            part.unlink()
            raise requests.ConnectionError(f"the server has no bytes from {have:,} on")
        response.raise_for_status()
        if response.status_code != 206:
            have = 0
        rest = int(response.headers.get("Content-Length", 0))
        if rest > (free := shutil.disk_usage(part.parent).free):
            raise ValueError(
                f"{url} needs {rest:,} bytes more, {part.parent} has {free:,} free; give another disk: "
                "RECLLM_ARTIFACTS=<folder>"
            )
        whence = f" from {have:,} on" if have else ""
        say(f"downloading {url}{whence}" + (f", {rest:,} bytes" if rest else ""))
        progress = Progress(f"MB of {part.stem}", (have + rest) // MB, have // MB)
        with part.open("r+b" if have else "wb") as file:
            file.seek(have)
            tag.write_text(_version(response))  # not before what is of another version is gone
            for block in response.raw.stream(BLOCK, decode_content=False):
                file.write(block)
                if rest:
                    progress.reached(file.tell() // MB)


def _version(response: requests.Response) -> str:
    """What `If-Range` takes: a strong ETag, else the date of the last change; empty if there is neither."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _reason(error: BaseException) -> str:
    """What happened at the bottom of the layers: connection refused, name not known, bytes missing."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {error}".strip(": ")
