"""Adapters used by several threads at once: noticed and refused.

What is prompted and the factors of the present step belong to the denoiser, not to a thread. So while one
thread draws, no other may draw with the same adapter or change it, and a prompt that another thread replaced
before it was drawn is an error in the thread that set it. Threads that take turns (under a lock) may share.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, Thread, current_thread
from weakref import WeakSet, ref

from imprompt.errors import UsageError

_ADVICE = (
    "give each thread a pipeline and an adapter of its own, or hold one lock while prompting and drawing"
)


class Drawing:
    """Which thread called a denoiser last, and within which call."""

    def __init__(self) -> None:
        self._last: tuple[ref[Thread], ref[object]] | None = None
        self._lock = RLock()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """While open, no other thread begins to draw. Raises :class:`UsageError` while one does."""
        with self._lock:
            self._check()
            yield

    def _check(self) -> None:
        if self._last is None:
            return
        thread, owner = self._last[0](), self._last[1]()
        if thread is None or owner is None or thread is current_thread() or thread.ident is None:
            return
        frame = sys._current_frames().get(thread.ident)
        while frame is not None:
            code = frame.f_code
            if code.co_argcount and code.co_varnames[0] == "self" and frame.f_locals.get("self") is owner:
                raise UsageError(f"another thread is drawing with this adapter; {_ADVICE}.")
            frame = frame.f_back

    def note(self, owner: object) -> None:
        """This thread calls the denoiser now, inside a method of ``owner`` (a pipeline, or the denoiser)."""
        self._last = ref(current_thread()), ref(owner)


class Prompter:
    """Which thread set an adapter's prompt, until it is drawn."""

    def __init__(self) -> None:
        self._waiting: ref[Thread] | None = None
        self._replaced: WeakSet[Thread] = WeakSet()

    def set(self) -> None:
        """This thread sets the prompt."""
        before = None if self._waiting is None else self._waiting()
        if before is not None:
            self._replaced.add(before)
        self._replaced.discard(current_thread())
        self._waiting = ref(current_thread())

    def clear(self) -> None:
        """This thread clears the prompt."""
        self.set()
        self._waiting = None

    def drawn(self) -> None:
        """This thread draws. Raises :class:`UsageError` when its own prompt was replaced before."""
        if current_thread() in self._replaced:
            raise UsageError(
                f"another thread replaced the prompt that this one set, before it was drawn; {_ADVICE}."
            )
        self._waiting = None
