"""A document's session on disk, as the worker saves and loads it between requests."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from longrun.errors import LongrunError
from longrun.session.store import SavedSession, is_session

if TYPE_CHECKING:
    from longrun.session.manifest import SessionIdentity
    from longrun.session.session import Session


class KeptSession:
    """The session of one document.

    Args:
        name: of the document, for messages.
        folder: the session's.
        lock: held while anything of the document's is written, read or removed.

    Attributes:
        lock: as given.
        retired: the document was deleted or changed; nothing is saved or loaded any more. Set with the lock held.
    """

    def __init__(self, name: str, folder: Path, lock: threading.Lock) -> None:
        self._name, self._folder, self.lock = name, folder, lock
        self.retired = False

    def open(self, identity: SessionIdentity) -> SavedSession | None:
        """What is saved, or None where nothing is. The caller holds the lock.

        Raises:
            SessionError: see `SavedSession.open`.
        """
        if self.retired or not is_session(self._folder):
            return None
        return SavedSession.open(self._folder, identity)

    def restore(self, saved: SavedSession, session: Session) -> None:
        """Fill an empty session. The caller holds the lock.

        Raises:
            LongrunError: its files are damaged or gone.
        """
        try:
            session.adopt_store(saved.restore(session))
        except LongrunError as error:
            raise LongrunError(f"document {self._name}: {error}, or delete the document and put it again") from error

    def save(self, session: Session) -> bool:
        """Write what is new of the session; false where the document is not wanted any more.

        Raises:
            SessionError: see `Session.save`.
        """
        with self.lock:
            if self.retired:
                return False
            session.save(self._folder)
            session.detach()
            return True
