"""Against a server of this machine that can break off, forget ranges, change the file, or be busy."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from recllm.tables import download
from recllm.tables.download import fetch

CONTENT = bytes(range(256)) * 12_000  # 3 MB: three blocks
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves `server.content`; `server.script` has one word a request: `ok`, `cut`, `busy`, `gone`."""

    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        word = server.script.pop(0) if server.script else "ok"
        if word in ("busy", "gone"):
            return self.send_error({"busy": 503, "gone": 404}[word])
        start = 0
        asked = self.headers.get("Range") if server.ranges else None
        if asked and self.headers.get("If-Range", server.tag) == server.tag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        body = server.content[start:]
        if start and not body:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.end_headers()
            return None
        self.send_response(206 if start else 200)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            )
        if server.tag:
            self.send_header("ETag", server.tag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if word == "cut" else body)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.script, server.asked = CONTENT, [], []
        server.ranges, server.tag = True, '"v1"'
        server.url = f"http://127.0.0.1:{server.server_port}/some/where/file.zip"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_download_is_checked_and_kept(server, tmp_path):
    path = fetch(server.url, tmp_path / "raw", MD5)
    assert path == tmp_path / "raw" / "file.zip"
    assert path.read_bytes() == CONTENT
    assert fetch(server.url, tmp_path / "raw", MD5) == path
    assert server.asked == [None]  # the second call asked nobody
    assert names(tmp_path / "raw") == ["file.zip"]


def test_a_broken_connection_is_resumed(server, tmp_path, capsys):
    server.script = ["cut", "cut", "busy", "ok"]
    fetch(server.url, tmp_path, MD5, wait=0.01)
    half = len(CONTENT) // 2
    # 1/2, then half of the rest, a refusal, then the last quarter
    assert server.asked == [
        None,
        f"bytes={half}-",
        f"bytes={half + half // 2}-",
        f"bytes={half + half // 2}-",
    ]
    assert (tmp_path / "file.zip").read_bytes() == CONTENT
    assert names(tmp_path) == ["file.zip"]
    assert f"after {half:,} bytes; going on in 0.01 s" in capsys.readouterr().out


def test_a_later_call_goes_on_too(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.script = ["cut"]
    with pytest.raises(
        ValueError, match=r"cannot be had .*1,536,000 bytes so far.*run the same command again"
    ):
        fetch(server.url, tmp_path, wait=0)
    assert names(tmp_path) == ["file.zip.part", "file.zip.tag"]
    assert fetch(server.url, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1536000-"]


def test_a_file_that_has_changed_meanwhile_starts_anew(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.script = ["cut"]
    with pytest.raises(ValueError, match="cannot be had"):
        fetch(server.url, tmp_path, wait=0)
    server.content, server.tag = CONTENT[::-1], '"v2"'
    assert fetch(server.url, tmp_path).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize(("ranges", "tag"), [(False, '"v1"'), (True, "")])
def test_without_ranges_or_a_version_it_starts_anew(server, tmp_path, ranges, tag):
    server.ranges, server.tag = ranges, tag
    server.script = ["cut", "ok"]
    assert fetch(server.url, tmp_path, wait=0.01).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1536000-" if tag else None]


def test_a_part_that_is_whole_already_is_taken(server, tmp_path):
    (tmp_path / "file.zip.part").write_bytes(CONTENT)  # as a call leaves it that is killed before the check
    assert fetch(server.url, tmp_path, MD5).read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(ValueError, match=rf"came with md5:\w+, wanted {MD5}; run the same command again"):
        fetch(server.url, tmp_path, MD5)
    assert names(tmp_path) == []


def test_a_kept_file_that_was_spoilt_is_refused(server, tmp_path):
    fetch(server.url, tmp_path, MD5)
    (tmp_path / "file.zip").write_bytes(CONTENT[1:])
    with pytest.raises(ValueError, match=rf"file.zip has md5:\w+, wanted {MD5}; remove it"):
        fetch(server.url, tmp_path, MD5)


def test_without_a_published_checksum_the_first_one_holds(server, tmp_path, capsys):
    path = fetch(server.url, tmp_path)
    sha = hashlib.sha256(CONTENT).hexdigest()
    assert (tmp_path / "file.zip.sha256").read_text() == f"{sha}  file.zip\n"
    assert f"its own, sha256:{sha}, is kept in" in capsys.readouterr().out
    path.unlink()
    server.content = CONTENT[::-1]
    with pytest.raises(ValueError, match=rf"wanted sha256:{sha}, as .*file.zip.sha256 has it"):
        fetch(server.url, tmp_path)
    server.content = CONTENT
    assert fetch(server.url, tmp_path).read_bytes() == CONTENT


def test_what_is_not_there_is_not_asked_for_again(server, tmp_path):
    server.script = ["gone"]
    with pytest.raises(
        ValueError, match=r"cannot be had \(status 404; 0 bytes so far\).*RAW=<folder or zip>"
    ):
        fetch(server.url, tmp_path)
    assert len(server.asked) == 1


def test_a_server_that_stays_busy_is_given_up(server, tmp_path):
    server.script = ["busy"] * 9
    with pytest.raises(ValueError, match=r"cannot be had \(status 503"):
        fetch(server.url, tmp_path, wait=0.001)
    assert len(server.asked) == download.ATTEMPTS


def test_nobody_answers(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be had \(ConnectionRefusedError: .*RAW=<folder or zip>"):
        fetch("http://127.0.0.1:9/file.zip", tmp_path, wait=0.001)
    assert names(tmp_path) == []


def test_no_room_is_said_before_it_is_filled(server, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"needs 3,072,000 bytes more, .* has 1,000 free.*RECLLM_ARTIFACTS"):
        fetch(server.url, tmp_path)
