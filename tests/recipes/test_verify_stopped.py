"""``truetune verify`` that is stopped with Ctrl-C: what was compared is shown, and what was kept is as it was."""

import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from proof_runs import trained
from truetune.cli.main import main


class _Stopping(BaseHTTPRequestHandler):
    """The user loses patience while the server is asked, which comes last."""

    patience = threading.Event()

    def do_GET(self) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        self.patience.wait(60)  # an answer, be it none, might be there before the interruption

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def stopping() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Stopping)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts without one
    yield f"http://127.0.0.1:{server.server_port}"
    signal.signal(signal.SIGINT, before)
    _Stopping.patience.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_was_compared_before_it_was_stopped_is_shown(
    stopping: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tiny_model, tmp_path)
    command = ["verify", str(run), str(tmp_path / "merged"), "--prompts", "1", "--max-new-tokens", "2"]
    assert main(command) == 0
    before = (run / "verify.json").read_bytes()
    capsys.readouterr()
    assert main([*command, "--url", stopping]) == 130
    said = capsys.readouterr()
    assert "stopped before the rest was" in said.out
    assert [line.split()[0] for line in said.out.splitlines() if "the same" in line] == ["adapter", "merged"]
    assert "2 comparisons done; verify.json is as it was" in said.err
    assert (run / "verify.json").read_bytes() == before
    assert not [path for path in run.iterdir() if "tmp" in path.name]
