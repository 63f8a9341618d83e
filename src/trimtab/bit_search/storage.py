"""Where a study lies: a journal file, or a database that Optuna knows by url. With `ledger`, all that imports optuna.

a journal    its lock is the system's, which goes with its holder: nobody waits for the dead. A file system that has
             none (Lustre without `-o flock`, some network mounts) gets Optuna's own, a file that only one can
             create, and breaks it when it has not moved for half a minute. A line that was cut off by a death is
             taken away before the next is written.
a database   may be away for a moment: it is restarted, or moved. Its calls are made again until it answers. All that
             is ever asked of it may be asked twice: attributes are set to values, and what cannot be repeated (a
             trial that is created, or ended) is looked for by `ledger` first.
"""

import io
import os
import re
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)
from sqlalchemy.pool import NullPool

from trimtab.errors import UserError
from trimtab.formats.holding import NO_LOCKS, waiting

OPENING_SECONDS = 60.0
"""A database that is away when a search begins is waited for so long."""
AWAY_SECONDS = 300.0
"""The same while it runs: a trial that is finished took hours."""
ERRORS = (OSError, StorageInternalError, SQLAlchemyError)
"""What a storage that is away raises."""
_Value = TypeVar("_Value")


class Away(UserError):
    """A storage that did not come back, or refuses."""


def opened(url: str) -> BaseStorage:
    """The storage of a url, or of a journal's path.

    Raises:
        UserError: saying in one line why it cannot be opened.
    """
    if "://" in url:
        return _database(url)
    path = Path(url)
    _check_journal(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_Lock(path)))  # type: ignore[arg-type]


def shown(url: str) -> str:
    """A storage's url without its password."""
    return re.sub(r"(password=)[^&]*", r"\1***", re.sub(r"(://[^/@:]*):[^@/]*@", r"\1:***@", url))


# ---- a database ---------------------------------------------------------------------------------------------------------


def _database(url: str) -> BaseStorage:
    def connect() -> BaseStorage:
        # A connection for each call, of which there are few an hour: none is left that a restart has cut, and a hundred
        # workers do not hold a hundred of them, which is all that PostgreSQL gives.
        return get_storage(RDBStorage(url, engine_kwargs={"poolclass": NullPool}))

    try:
        if url.startswith("redis"):
            raise ArgumentError("Optuna has no storage in Redis")
        made = Patient(url, connect)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"search.storage: {shown(url)}: needs its driver installed ({error.__cause__ or error}): pip install "
            "'psycopg[binary]' for postgresql://, pymysql for mysql+pymysql://"
        ) from error
    except (ArgumentError, ValueError, LookupError) as error:
        raise UserError(
            f"search.storage: {shown(url)}: is not the URL of a database ({_line(error)}); write "
            "postgresql://user:password@host/name, mysql+pymysql://.. or sqlite:///file"
        ) from error
    except RuntimeError as error:  # tables of another version of Optuna
        raise UserError(f"search.storage: {shown(url)}: {_line(error)}") from error
    return made  # type: ignore[return-value]


class Patient:
    """A storage in a database; a call that finds the server away is made again until it is back.

    Args:
        url: of the database, for messages.
        connect: opens it, creating its tables: when several processes do so at once, all but one may fail, and try again.
    """

    def __init__(self, url: str, connect: Callable[[], BaseStorage]) -> None:
        self._url, self._given_up = url, False
        self.outages = 0
        """How many calls found it away."""
        self.impatient = self._call(connect, OPENING_SECONDS, opening=True)
        """The same storage, whose calls fail at once."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.impatient, name)
        if not callable(found):
            return found
        return lambda *args, **kwargs: self._call(lambda: found(*args, **kwargs), AWAY_SECONDS)

    def _call(self, ask: Callable[[], _Value], patience: float, *, opening: bool = False) -> _Value:
        began, said = time.monotonic(), False
        while True:
            try:
                answer = ask()
            except ArgumentError:
                raise
            except (StorageInternalError, SQLAlchemyError) as error:
                cause = error if isinstance(error, SQLAlchemyError) else error.__cause__ or error
                what, waited = f"search.storage: {shown(self._url)}: {_line(cause)}", time.monotonic() - began
                if not _passes(cause, opening):
                    raise Away(what) from error
                if waited > patience or self._given_up:
                    self._given_up = True  # what is asked while a search ends does not wait again
                    raise Away(
                        f"{what}; away for {waited:.0f} s, and the same command continues when it is back"
                    ) from error
                if waited > 1 and not said:
                    warnings.warn(f"{what}; waiting for it, {patience:.0f} s at most", stacklevel=2)
                    said = True
            else:
                self._given_up = False
                return answer
            self.outages += 1
            if not opening:
                with suppress(SQLAlchemyError):  # a session that was cut off in the middle is of no more use
                    self.impatient.remove_session()
            time.sleep(min(0.1 + waited, 2.0))


def _line(error: BaseException) -> str:
    """What a server or a library says, in one line."""
    said = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return " ".join(str(said).split()) or type(said).__name__


_PASSING = ("08", "40", "53300", "55P03", "57P", "25006")
"""Beginnings of SQLSTATEs that pass: no connection, a deadlock, too many clients, a lock, a stop or start, a standby."""
_RACES = ("23505", "42P07", "42710")
"""Of two that create the same table."""
_STARTING = ("the database system is", "too many clients", "remaining connection slots", "terminating connection")
"""Of PostgreSQL: starting up, in recovery, not yet accepting connections ..; the driver tells no SQLSTATE then."""
_NOBODY = ("resolve host", "translate host", "Name or service not known")


def _passes(error: BaseException | None, opening: bool) -> bool:
    """Whether an error goes away by waiting: the server does, or two have created the same."""
    if isinstance(error, PendingRollbackError):  # what follows an error that was passed over: the next call says which
        return True
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    text = str(error.orig)
    if isinstance(error.orig, sqlite3.Error):
        return "locked" in text or (opening and "already exists" in text)
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    if state:
        return state.startswith(_PASSING + (_RACES if opening else ()))
    if opening and isinstance(error, IntegrityError):
        return True
    if not isinstance(error, OperationalError | InterfaceError) or any(nobody in text for nobody in _NOBODY):
        return False
    return "FATAL:" not in text or any(reason in text for reason in _STARTING)


# ---- a journal ----------------------------------------------------------------------------------------------------------


class _Lock:
    """A journal's lock; taking it repairs a last line that was cut off."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._lock: Any = waiting(Path(f"{journal}.lock"))
        try:
            self._lock.acquire()
            self._lock.release()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(
                    f"search.storage: the journal {journal} cannot be locked ({error.strerror}); set search.storage to a "
                    "file on another file system"
                ) from error
            warnings.warn(
                f"search.storage: the file system of {journal} has no flock ({error.strerror}); who writes there creates "
                f"{journal.name}.open.lock, and one that is killed meanwhile holds up the others for 30 s",
                stacklevel=2,
            )
            self._lock = JournalFileOpenLock(f"{journal}.open")

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._lock.acquire()
        if self._journal.exists():
            _mend(self._journal)
        return True

    def release(self) -> None:
        """Let go."""
        self._lock.release()


def _mend(journal: Path) -> None:
    """Take away what follows the last end of a line."""
    with journal.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _check_journal(path: Path) -> None:
    """Refuse a journal that cannot be written, and a file that is none: `_mend` would cut it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in (path, path.with_name(f"{path.name}.lock")):
            if file.exists():
                with file.open("ab"):  # to learn whether it can be written
                    pass
        with tempfile.TemporaryFile(dir=path.parent):  # or made; another machine may make them at this moment
            pass
        with path.open("rb") if path.exists() else io.BytesIO() as journal:
            first = journal.readline()
    except OSError as error:
        raise UserError(
            f"search.storage: the journal {path} cannot be written ({error.strerror or error}); set search.storage (or "
            "`output`) to a place where it can"
        ) from error
    if first and not first.startswith(b'{"op_code":'):
        raise UserError(f"search.storage: {path} is not a journal of Optuna; name another file")
