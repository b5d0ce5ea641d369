"""The embedded S3 server keeps its data, guards its key, and lives exactly as long as the command beside it."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import find_processes

from job.errors import AccessDenied, NotFound, ResourceExhausted
from job.store import open_store
from job.store.server import DEFAULT_BUCKET, _free_ports, _read_access, run_beside_server, serve

BESIDE = """
import sys
from pathlib import Path
from job.store.server import run_beside_server
sys.exit(run_beside_server(sys.argv[2:], Path(sys.argv[1]), "127.0.0.1", ["finetune-job"]))
"""


def use(variables: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        patch.setenv(name, value)


def server_of(folder: Path) -> int:
    """Pid of the server on `folder`."""
    for pid in find_processes(f"-dir={folder}"):
        return pid
    raise LookupError(folder)


def test_data_and_key_survive_a_restart_and_only_their_owner_can_read_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s3"
    with serve(folder) as first:
        use(first, monkeypatch)
        open_store(f"s3://{DEFAULT_BUCKET}/a").write("b", b"kept")
        with pytest.raises(ResourceExhausted, match="another `job s3` serves this folder") as caught, serve(folder):
            pass
        assert caught.value.exit_code == 78
        with pytest.raises(NotFound, match="bucket 'never-made' does not exist"):
            open_store("s3://never-made/a").write("b", b"x")
        assert first["AWS_ENDPOINT_URL_S3"].startswith("http://127.0.0.1:")
        assert (folder / "s3.json").stat().st_mode & 0o777 == 0o600
        assert first["AWS_SECRET_ACCESS_KEY"] not in (folder / "server.log").read_text(errors="replace")
    with serve(folder) as second:
        use(second, monkeypatch)
        found = open_store(f"s3://{DEFAULT_BUCKET}/a").read("b")
        assert found is not None
        assert found.data == b"kept"
        assert second["AWS_SECRET_ACCESS_KEY"] == first["AWS_SECRET_ACCESS_KEY"]


@pytest.mark.parametrize("name", ["master", "volume", "filer", "s3"])
def test_a_port_that_somebody_takes_meanwhile_costs_that_start_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        free = iter([_free_ports("127.0.0.1") | {name: somebody.getsockname()[1]}, _free_ports("127.0.0.1")])
        monkeypatch.setattr("job.store.server._free_ports", lambda bind: next(free))
        with serve(tmp_path) as variables:
            use(variables, monkeypatch)
            assert open_store(f"s3://{DEFAULT_BUCKET}/a").read("b") is None


def test_a_disk_that_is_full_while_the_key_is_made_costs_that_start_alone(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from job.store.server import _read_access; "
    program += "_read_access(Path(sys.argv[1]))"
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))}
    command = [sys.executable, "-B", "-c", program, str(tmp_path)]  # -B: a compiled module would be cut short, too
    failed = subprocess.run(command, capture_output=True, text=True, **limit)  # type: ignore[call-overload]
    assert "File too large" in failed.stderr
    assert not (tmp_path / "s3.json").exists()
    first = _read_access(tmp_path)
    assert len(first["secretKey"]) == 40
    assert _read_access(tmp_path) == first
    assert [(path.name, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == [("s3.json", 0o600)]


def test_an_empty_key_file_that_an_older_version_left_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "s3.json").touch()
    assert _read_access(tmp_path) == _read_access(tmp_path)


def test_a_key_that_may_only_read_is_told_so_on_every_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, key = tmp_path / "s3", {"accessKey": "readonlyreadonly", "secretKey": "0123456789abcdef0123456789abcdef"}
    with serve(folder) as variables:
        use(variables, monkeypatch)
        open_store(f"s3://{DEFAULT_BUCKET}").write("a", b"x")
    identities = json.loads((folder / "s3.json").read_text())["identities"]
    identities.append({"name": "reader", "credentials": [key], "actions": ["Read", "List"]})
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (tmp_path / "source").write_bytes(b"x")
    with serve(folder) as variables:
        use(variables | {"AWS_ACCESS_KEY_ID": key["accessKey"], "AWS_SECRET_ACCESS_KEY": key["secretKey"]}, monkeypatch)
        store = open_store(f"s3://{DEFAULT_BUCKET}")
        assert store.read("a") is not None
        for call in (
            lambda: store.write("a", b"y"),
            lambda: store.upload(tmp_path / "source", "a"),
            lambda: store.delete(["a"]),
        ):
            with pytest.raises(AccessDenied) as caught:
                call()
            assert caught.value.exit_code == 12
        assert [item.key for item in store.list("")] == ["a"]


def test_the_code_of_the_command_passes_through_and_no_server_stays(tmp_path: Path) -> None:
    program = "import os, sys; sys.exit(42 if os.environ['AWS_ENDPOINT_URL_S3'] else 0)"
    command = [sys.executable, "-c", BESIDE, str(tmp_path), sys.executable, "-c", program]
    assert subprocess.run(command).returncode == 42
    with pytest.raises(LookupError):
        server_of(tmp_path)


def test_who_is_logged_in_at_aws_is_let_in_all_the_same(tmp_path: Path) -> None:
    program = "from job.store import open_store; open_store('s3://finetune-job/x').write('key', b'value')"
    command = [sys.executable, "-c", BESIDE, str(tmp_path), sys.executable, "-c", program]
    logged_in = {
        "AWS_SESSION_TOKEN": "of-single-sign-on", "AWS_PROFILE": "no-such-profile",
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
    }  # fmt: skip
    done = subprocess.run(command, env=os.environ | logged_in, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_goes_to_the_command_which_decides_the_code(tmp_path: Path, number: int, code: int) -> None:
    program = (
        "import signal, sys\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit({code}))\n"
        "print('ready', flush=True)\n"
        "signal.pause()\n"
    )
    command = [sys.executable, "-c", BESIDE, str(tmp_path), sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as beside:
        assert beside.stdout is not None
        assert beside.stdout.readline() == "ready\n"
        beside.send_signal(number)
        assert beside.wait(60) == code


def test_the_server_dies_with_a_killed_command_line(tmp_path: Path) -> None:
    program = "import sys; print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", BESIDE, str(tmp_path), sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as beside:
        assert beside.stdout is not None
        assert beside.stdout.readline() == "ready\n"
        server = os.pidfd_open(server_of(tmp_path))
        beside.kill()
        beside.wait()
        ended, _, _ = select.select([server], [], [], 30)
        os.close(server)
    assert ended, "a pidfd is readable once its process has ended"


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="command 'no-such-command'"):
        run_beside_server(["no-such-command"], tmp_path, "127.0.0.1", [])
