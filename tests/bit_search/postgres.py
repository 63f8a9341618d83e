"""A throwaway PostgreSQL server: in a folder of its own, on a free port, without trust in anybody but one password."""

import os
import pwd
import shutil
import socket
import subprocess
from pathlib import Path

PASSWORD = "secret-7"
_PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin")


def binary(name: str) -> str | None:
    """The path of a program of PostgreSQL's, if there is one."""
    found = shutil.which(name)
    if found:
        return os.path.realpath(found)  # it looks for its files beside itself
    inside = [file for place in _PLACES for file in Path("/").glob(f"{place[1:]}/{name}")]
    return str(max(inside)) if inside else None


def lacking() -> str:
    """Why there can be no server here; "" if there can."""
    if not all(binary(name) for name in ("initdb", "pg_ctl")):
        return "no PostgreSQL (initdb, pg_ctl) is installed"
    if os.geteuid() == 0 and not _user():
        return "PostgreSQL does not run as root, and there is no user `postgres` or `nobody`"
    return ""


def _user() -> str | None:
    """Whom the server runs as, if not as us."""
    if os.geteuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


class Server:
    """One server, begun and stopped at will; its data stay.

    Args:
        folder: of its own, empty, where the user that it runs as may come.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._as = folder, _user()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"postgresql+psycopg://me:{PASSWORD}@127.0.0.1:{self.port}/postgres"
        password = folder / "password"
        password.write_text(PASSWORD)
        if self._as:
            shutil.chown(folder, self._as)
            shutil.chown(password, self._as)
        self._call("initdb", "-D", str(self._data), "-U", "me", "-A", "scram-sha-256", f"--pwfile={password}", "-N")
        self.start()

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _call(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.txt").open("a") as said:
            subprocess.run(
                [str(binary(name)), *arguments],
                check=True,
                cwd="/",
                user=self._as,
                stdout=said,
                stderr=said,
                timeout=120,
            )

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        self._call("pg_ctl", "-D", str(self._data), "-o", options, "-l", str(self.folder / "log.txt"), "-w", "start")

    def stop(self, how: str = "fast") -> None:
        """Stop it: fast (connections are cut), or immediate (as if it were killed)."""
        self._call("pg_ctl", "-D", str(self._data), "-m", how, "-w", "stop")
