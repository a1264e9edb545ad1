"""The service as a process of its own: its start, SIGHUP, SIGTERM under load."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import pytest

from recllm.serving.bundle import write_bundle
from tests.serving.live import until


@pytest.fixture(scope="module")
def bundles(cascades, tmp_path_factory):
    """Two bundles that are alike but for their names."""
    folder = tmp_path_factory.mktemp("bundles")
    for name in ("reclora", "s-dpo-pointwise"):
        write_bundle(cascades[name], folder / name)
    return folder


class Process:
    """A running service and what it has logged so far."""

    def __init__(self, process):
        self.process = process
        self.lines = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(json.loads(line) if line.startswith("{") else {"event": line})

    def events(self, name):
        return [line for line in list(self.lines) if line["event"] == name]


@contextmanager
def serving(folder, *flags):
    command = [sys.executable, "-m", "recllm.serving", str(folder), "--port", "0", *flags]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "EVENTS_URL": ""}
    )
    it = Process(process)
    try:
        until(lambda: it.events("listening") or process.poll() is not None)
        yield it
    finally:
        process.kill()
        process.wait()
        it.reader.join()
        process.stderr.close()


def test_a_process_reloads_at_sighup_and_answers_all_it_accepted_at_sigterm(bundles, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles / "reclora", folder)
    with serving(folder) as it:
        url = f"http://127.0.0.1:{it.events('listening')[0]['port']}"
        until(lambda: it.events("bundle ready"))
        assert httpx.get(f"{url}/health").json() == {"status": "ready"}
        first = httpx.get(f"{url}/info").json()["bundle"]

        shutil.rmtree(folder)
        shutil.copytree(bundles / "s-dpo-pointwise", folder)
        it.process.send_signal(signal.SIGHUP)
        until(lambda: len(it.events("bundle ready")) == 2)
        second = httpx.get(f"{url}/info").json()["bundle"]
        assert second != first

        (folder / "log" / "item.npy").unlink()
        it.process.send_signal(signal.SIGHUP)
        until(lambda: it.events("bundle refused"))
        assert "is missing" in it.events("bundle refused")[0]["reason"]
        assert httpx.get(f"{url}/info").json()["bundle"] == second

        answered, broken = [], []

        def ask_on(user):
            with httpx.Client(base_url=url, timeout=60) as client:
                while True:
                    try:
                        answered.append(client.post("/recommend", json={"users": [{"user": user}], "k": 3}))
                    except httpx.TransportError as error:
                        broken.append(error)
                        return

        threads = [threading.Thread(target=ask_on, args=(user,)) for user in range(1, 9)]
        for thread in threads:
            thread.start()
        until(lambda: len(answered) > 40)
        it.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert it.process.wait(60) == 0
        it.reader.join()
        # A connection ends between two requests, never within an answer.
        assert {type(error) for error in broken} <= {
            httpx.ConnectError,
            httpx.ReadError,
            httpx.RemoteProtocolError,
            httpx.WriteError,
        }
        assert {response.status_code for response in answered} == {200}
        # Whatever the service read of a request, a client has the answer of.
        logged = [line["status"] for line in it.events("request") if line["route"] == "/recommend"]
        assert logged == [200] * len(answered)
        assert it.events("stopping") == [{**it.events("stopping")[0], "signal": "SIGTERM"}]


def test_a_bad_bundle_at_the_start_is_one_line_and_status_2(bundles, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles / "reclora", folder)
    (folder / "log" / "item.npy").unlink()
    with serving(folder) as it:
        assert it.process.wait(120) == 2
        it.reader.join()
        last = it.lines[-1]["event"]
        assert last.startswith("error: ")
        assert "log/item.npy is missing" in last


def test_what_is_no_bundle_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "recllm.serving", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} is no bundle; wanted a folder that `make bundle` wrote\n"
