"""The documents of a server: put, read by the worker as jobs of their own, kept as sessions, deleted.

`put`, `delete` and `start` run one at a time on one thread beside the event loop; jobs report on the worker's thread.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.errors import InputError, LongrunError, quoted
from longrun.server.document_files import DocumentFiles, Record, storing
from longrun.server.document_prompts import document_ids, text_of
from longrun.server.document_state import FAILED, QUEUED, READING, READY, Document
from longrun.server.jobs import Ask, Event, Failed, Finished, Job, Loaded, Progress, ReadSparsely, StoppedError
from longrun.server.kept import KeptSession
from longrun.server.openai_errors import RequestError
from longrun.server.reading import reads_whole
from longrun.specs.prefill_spec import EXACT, PREFILL_MODES, SPARSE

if TYPE_CHECKING:
    from longrun.runtime.runtime import Runtime
    from longrun.server.worker import Worker
    from longrun.text.chat_prompt import ChatPrompts


class Documents:
    """The documents in one folder, for one runtime.

    Args:
        folder: made where there is none.
        prompts: writes the runtime's chat prompts; None where it has no chat template.
        check_room: raises RequestError for a prompt of so many tokens.
        unpacked_bytes: the most that an archive may hold.

    Raises:
        InputError: the folder cannot be used, or the model cannot keep documents.
    """

    def __init__(
        self, folder: Path, runtime: Runtime, worker: Worker, prompts: ChatPrompts | None,
        check_room: Callable[[int], object], unpacked_bytes: int,
    ) -> None:  # fmt: skip
        if prompts is None:
            raise InputError("this model has no chat template, in which a document would stand: leave --documents out")
        if reads_whole(runtime):
            raise InputError(
                "this model's dynamic RoPE reads every text in one piece, so that no document can be continued: leave "
                "--documents out, or give a --ctx within the model's own"
            )
        self._runtime, self._worker, self._prompts, self._check_room = runtime, worker, prompts, check_room
        self._unpacked_bytes = unpacked_bytes
        self._files = DocumentFiles(folder)
        self._lock = threading.Lock()  # for files and for who stands in the table
        self._table: dict[str, Document] = {}
        try:
            for name, record in self._files.found().items():
                self._table[name] = self._document(name, record)
                self._settle(self._table[name])
        except BaseException:
            self._files.close()
            raise

    def start(self) -> None:
        """Go on with what was not read when the server ended."""
        for document in [each for each in self._table.values() if each.state == QUEUED]:
            try:
                text = self._files.text(document.name, document.record)
                ids, prompt_tokens = document_ids(self._prompts, text, document.record.created)
                self._check_room(prompt_tokens)
                document.record = replace(document.record, tokens=len(ids), ready=False)
                self._submit(document, ids)
            except (LongrunError, OSError, ValueError) as error:
                document.state, document.error = FAILED, str(error)

    def close(self) -> None:
        """Other servers may own the folder."""
        self._files.close()

    def names(self) -> list[str]:
        """Of those that are ready."""
        return sorted(document.name for document in list(self._table.values()) if document.state == READY)

    def put(self, name: str, raw: bytes, kind: str, prefill: str | None = None) -> tuple[dict[str, Any], bool]:
        """Store a document and queue its reading.

        Args:
            name: a checked one.
            kind: what `raw` is, one of `KINDS`.
            prefill: how it is to be read, one of `PREFILL_MODES`; None as the document of this name was, or else as
                the server reads. What was read exactly is not read again to be read sparsely.

        Returns:
            Its status, and whether there was anything to do: the same text again changes nothing.

        Raises:
            InputError: see `text_of`.
            RequestError: it is too large, does not fit into the context, or cannot be stored; or it is to be read
                in a way that is unknown, or not this server's.
            QueueFullError, StoppedError: it was stored but not queued.
        """
        self._check_prefill(prefill)
        text, notices = text_of(raw, kind, name, self._unpacked_bytes)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        old = self._table.get(name)
        mode = prefill or (self._mode if old is None else old.record.prefill)
        again = old is not None and old.record.prefill == SPARSE and mode == EXACT
        if old is not None and old.record.sha256 == sha256 and old.state != FAILED and not again:
            return self.status(name), False
        grown = old is not None and not again and self._begins(old, text)
        created = old.record.created if old is not None and grown else int(time.time())
        ids, prompt_tokens = document_ids(self._prompts, text, created)
        self._check_room(prompt_tokens)
        counts = old.record.sparse_counts if old is not None and grown else []
        record = Record(sha256, len(raw), len(ids), created, list(notices), prefill=mode, sparse_counts=counts)
        document = self._document(name, record)
        with storing(name), self._lock:
            if old is None:
                self._files.create(name, document.record, text)
            else:
                self._retire(old)
                self._files.replace(name, document.record, text, grown)
            self._table[name] = document
        self._submit(document, ids)
        return self.status(name), True

    def delete(self, name: str) -> None:
        """Forget the document; what reads it ends.

        Raises:
            RequestError: there is none of this name, or its files cannot be removed.
        """
        document = self._find(name)
        with storing(name), self._lock:
            self._retire(document)
            self._files.remove(name)
            del self._table[name]

    def status(self, name: str) -> dict[str, Any]:
        """What a client is told of a document.

        Raises:
            RequestError: there is none of this name.
        """
        return self._find(name).told()

    def all(self) -> list[dict[str, Any]]:
        """The status of each, by name."""
        return [self.status(name) for name in sorted(self._table)]

    def disk(self) -> dict[str, int]:
        """Bytes of all files in the folder, and bytes free on its disk."""
        used, free = self._files.disk()
        return {"bytes": used, "free": free}

    def check_ready(self, name: str) -> None:
        """Raises RequestError: there is none of this name, or it has not been read."""
        state = self._find(name).state
        if state != READY:
            raise RequestError(
                f"document {name} is {state}: ask when GET /documents/{name} says ready", "document_not_ready", "model",
                409,
            )  # fmt: skip

    def taken(self, name: str) -> tuple[str, KeptSession, float]:
        """The text and the session of a document that is ready, and the time that its prompts write.

        Raises:
            RequestError: as `check_ready`, or its text cannot be read.
        """
        self.check_ready(name)
        document = self._find(name)
        with storing(name):
            return self._files.text(name, document.record), document.kept, document.record.created

    def text(self, name: str) -> str:
        """The text as it was read, or will be.

        Raises:
            RequestError: there is none of this name, or its text cannot be read.
            LongrunError: its text is damaged.
        """
        document = self._find(name)
        with storing(name), self._lock:
            return self._files.text(name, document.record)

    @property
    def _mode(self) -> str:
        """How the server reads."""
        return EXACT if self._runtime.plan.attention.prefill is None else SPARSE

    def _check_prefill(self, prefill: str | None) -> None:
        """Raises RequestError: no way to read, or sparsely where the server has no memory for that."""
        if prefill not in (None, *PREFILL_MODES):
            told = f"prefill {quoted(prefill)} is unknown: use {' or '.join(PREFILL_MODES)}"
            raise RequestError(told, "invalid_value", "prefill")
        if prefill == SPARSE != self._mode:
            raise RequestError(
                f"this server reads exactly: leave prefill={SPARSE} out, or start it with --prefill {SPARSE} and a "
                f"context that has use for it",
                "unsupported_value", "prefill",
            )  # fmt: skip

    def _find(self, name: str) -> Document:
        document = self._table.get(name)
        if document is None:
            raise RequestError(
                f"there is no document {name}: PUT /documents/{name} makes one", "document_not_found", status=404
            )
        return document

    def _document(self, name: str, record: Record) -> Document:
        return Document(name, record, KeptSession(name, self._files.session(name), self._lock))

    def _settle(self, document: Document) -> None:
        """The state of one that an earlier server has left; its own fault becomes its state."""
        record = document.record
        try:
            saved = document.kept.open(self._runtime.identity)
            self._check_room(record.tokens)
        except LongrunError as error:
            document.state, document.error = FAILED, str(error)
            return
        document.sparse = 0 if saved is None else saved.manifest.sparse_tokens
        if record.ready and saved is not None and saved.manifest.num_tokens == record.tokens:
            document.state, document.done = READY, record.tokens

    def _begins(self, old: Document, text: str) -> bool:
        """Whether the text begins with the old one, so that its session can be continued; what failed is read anew."""
        try:
            return old.state != FAILED and text.startswith(self._files.text(old.name, old.record))
        except (LongrunError, OSError, ValueError):
            return False

    def _retire(self, document: Document) -> None:
        document.kept.retired = True
        if document.job is not None:
            document.job.cancel()

    def _submit(self, document: Document, ids: list[int]) -> None:
        def emit(event: Event) -> None:
            self._heard(document, event)

        exact = document.record.prefill == EXACT
        document.job = Job(Ask(ids, 0, kept=document.kept, saves=True, sparse=not exact, exact=exact), emit)
        try:
            self._worker.submit(document.job)
        except LongrunError as error:
            document.state, document.error, document.job = FAILED, str(error), None
            raise

    def _heard(self, document: Document, event: Event) -> None:
        """On the worker's thread."""
        if isinstance(event, Progress):
            document.state, document.done = READING, event.processed
        elif isinstance(event, Loaded):
            event.report()
        elif isinstance(event, ReadSparsely):
            document.read_sparsely(event)
        elif isinstance(event, Finished):
            self._finish(document)
        elif isinstance(event, Failed) and not isinstance(event.error, StoppedError):
            told = str(event.error) if isinstance(event.error, LongrunError) else "a defect of longrun stopped it"
            document.state, document.error, document.job = FAILED, told, None

    def _finish(self, document: Document) -> None:
        with self._lock:
            if document.kept.retired:
                return
            document.job = None
            try:
                document.record = replace(document.record, ready=True)
                self._files.write_record(document.name, document.record)
            except OSError as error:
                document.state, document.error = FAILED, f"its record cannot be written ({error.strerror or error})"
                return
            document.state = READY
