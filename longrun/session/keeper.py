"""Where a session is saved: the folder it owns, and whether that is kept up to date."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longrun.errors import SessionError
from longrun.interrupts import deferred_signals

if TYPE_CHECKING:
    from longrun.session.savable import Savable
    from longrun.session.store import SessionStore
    from longrun.specs.cache_spec import CacheSpec


class SessionKeeper:
    """One session's folder; see `Session.attach`, `detach` and `save`.

    Attributes:
        attached: the folder is kept up to date.
    """

    def __init__(self) -> None:
        self._store: SessionStore | None = None
        self._forbidden: str | None = None
        self.attached = False

    def attach(self, path: str | Path) -> None:
        store = self._store_at(path)
        store.claim()
        self._keep(store, attached=True)

    def detach(self) -> None:
        if self._store is not None:
            self._store.release()
        self.attached = False

    def save(self, session: Savable, path: str | Path) -> None:
        store = self._store_at(path)
        try:
            with deferred_signals():
                store.save(session)
        except BaseException:
            if store is not self._store:
                store.release()
            raise
        if store is self._store or not self.attached:
            self._keep(store, self.attached)
        else:
            store.release()

    def update(self, session: Savable) -> None:
        """Save into the folder that is kept up to date."""
        assert self.attached and self._store is not None
        with deferred_signals():
            self._store.save(session)

    def adopt(self, store: SessionStore) -> None:
        """The session was loaded from this store: saving there again writes only what is new."""
        self._store = store

    def rewound(self, spec: CacheSpec, seq_len: int) -> None:
        """The session was rewound to `seq_len` tokens: files with later pages no longer describe it."""
        if self._store is not None:
            self._store.rewound(spec, seq_len)

    def forbid(self, why: str) -> None:
        """From now on `save` and `attach` raise SessionError with `why`, a clause; what was attached is detached."""
        self.detach()
        self._forbidden, self._store = why, None

    def _store_at(self, path: str | Path) -> SessionStore:
        from longrun.session.store import SessionStore

        if self._forbidden is not None:
            raise SessionError(f"this session cannot be saved: {self._forbidden}")
        store = SessionStore(path)
        return self._store if self._store is not None and self._store.folder == store.folder else store

    def _keep(self, store: SessionStore, attached: bool) -> None:
        if self._store is not None and self._store is not store:
            self._store.release()
        self._store, self.attached = store, attached
