"""A real PostgreSQL server for tests, in a folder of its own; asks for a password, as servers do."""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest


@dataclass(frozen=True)
class Server:
    """Where it listens; every test makes a database of its own."""

    port: int
    password: str

    def new_database(self) -> str:
        """URL of an empty database."""
        name = f"d{secrets.token_hex(6)}"
        with psycopg.connect(f"{self.url}/postgres", autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return f"{self.url}/{name}"

    @property
    def url(self) -> str:
        return f"postgresql://tuner@127.0.0.1:{self.port}"


@contextmanager
def running_server() -> Iterator[Server]:
    """Start a server and tell libpq its password by the environment; skip where there is none."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("needs a PostgreSQL server: apt-get install postgresql")
    user = "postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name  # it refuses to run as root
    password, folder = secrets.token_hex(8), Path(tempfile.mkdtemp(prefix="pg"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "password").write_text(password)
    for path in (folder, folder / "password"):
        shutil.chown(path, user)

    def call(program: str, *arguments: str) -> None:
        words = [str(programs[-1] / program), "-D", str(folder / "data"), *arguments]
        who = user if os.getuid() == 0 else None
        done = subprocess.run(words, check=False, user=who, cwd=folder, capture_output=True)
        assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()

    access = ["-U", "tuner", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync"]
    settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=30"
    try:
        call("initdb", *access)
        call("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PGPASSWORD", password)
            yield Server(port, password)
        call("pg_ctl", "stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder)
