"""A bounded number of threads that share the work of many files, and of the parts of large ones.

Rule 1: work is a step, called again and again in any thread until it returns False.
Rule 2: the newest work comes first: parts of a begun file before another file.
Rule 3: who offers work does it too, so nothing waits for a free thread.
Rule 4: the first error ends the work it came from, and is raised where that work was offered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from shim.s3.errors import S3ClientError

MOST_HELPERS = 11  # of one large object, beside the thread that has it: see shim.s3.pace
STACK_BYTES = 512 << 10  # RLIMIT_DATA counts stacks, and the default is 8 MiB

_stack_size = threading.Lock()


def start_thread(target: Callable[[], None]) -> None:
    """Start a thread of a transfer; RuntimeError where the system gives none."""
    with _stack_size:
        previous = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=target, name="s3-transfer", daemon=True).start()
        finally:
            threading.stack_size(previous)


class Abandoned(S3ClientError):
    """Another thread of the same work has failed: its error is the one to raise."""


class Work:
    """A step, with what is known of its calls."""

    def __init__(self, step: Callable[[], bool], *, most: int) -> None:
        """most: how many threads may be in it at once."""
        self.step, self.most = step, most
        self.is_open, self.calls = True, 0
        self.error: BaseException | None = None


class Crew:
    """Up to `concurrency` threads, started as work comes and ended with it.

    run() offers the outermost step, "take the next file": a thread that is free calls it. In that
    call a large file may offer a step of its own, "fetch the next part", to which threads that are
    free come first, while the one that offered it calls it too, by finish(). A call that is under
    way counts in `calls`; work is over when it is closed and nobody is in it. The one lock is held
    only to look and to count, never while a step runs.
    """

    def __init__(self, *, concurrency: int, check: Callable[[], None]) -> None:
        """check(): raises what ends all work."""
        self._concurrency, self._check = concurrency, check
        self._works: list[Work] = []
        self._threads = self._waiting = 0
        self._is_done = self._has_failed = False
        lock = threading.Lock()
        self._came, self._ended = threading.Condition(lock), threading.Condition(lock)

    def check(self) -> None:
        """Raise what ends the work that is under way."""
        self._check()
        if self._has_failed:
            raise Abandoned

    def run(self, step: Callable[[], bool]) -> None:
        """Call step in all threads until it returns False; raise the first error."""

        def guarded() -> bool:
            try:
                return step()
            except BaseException:
                self._has_failed = True
                raise

        try:
            work = self.offer(guarded, most=self._concurrency)
            if not self._threads:
                self.finish(work)
            with self._ended:
                self._ended.wait_for(lambda: not (work.is_open or work.calls))
        except BaseException:
            self._has_failed = True
            raise
        finally:
            with self._ended:
                self._is_done = True
                self._came.notify_all()
                self._ended.wait_for(lambda: not self._threads)
        if work.error:
            raise work.error

    def offer(self, step: Callable[[], bool], *, most: int) -> Work:
        """Let up to `most` threads that are free call step; finish() must follow."""
        with self._came:
            work = Work(step, most=most)
            self._works.append(work)
            self._call_for_help()
        return work

    def widen(self, work: Work, *, most: int) -> None:
        """Let one more thread call the step, up to `most`."""
        with self._came:
            if work.is_open and work.most < most:
                work.most += 1
                self._call_for_help()

    def finish(self, work: Work) -> None:
        """Take part until all of the work is done; raise its first error."""
        while work.is_open:
            with self._came:
                work.calls += 1
            self._call(work)
        self.abandon(work)
        if work.error:
            raise work.error

    def abandon(self, work: Work) -> None:
        """Begin no further call, and wait for those under way."""
        with self._ended:
            self._close(work)
            self._ended.wait_for(lambda: not work.calls)

    def _call(self, work: Work) -> None:
        try:
            has_more = work.step()
        except BaseException as error:  # noqa: B036 - finish() raises it
            has_more = False
            if work.error is None or isinstance(work.error, Abandoned):
                work.error = error
        with self._ended:
            work.calls -= 1
            if not has_more:
                self._close(work)
            if not work.calls:
                self._ended.notify_all()

    def _close(self, work: Work) -> None:
        work.is_open = False
        if work in self._works:
            self._works.remove(work)

    def _call_for_help(self) -> None:
        if self._waiting:
            self._came.notify()
        elif self._threads < self._concurrency:
            self._start_thread()

    def _start_thread(self) -> None:
        try:
            start_thread(self._help)
            self._threads += 1
        except RuntimeError:
            self._concurrency = self._threads  # the system gives no more

    def _help(self) -> None:
        while work := self._next():
            self._call(work)

    def _next(self) -> Work | None:
        with self._came:
            while not self._is_done:
                for work in reversed(self._works):
                    if work.calls < work.most:
                        work.calls += 1
                        if work.calls < work.most:
                            self._call_for_help()
                        return work
                self._waiting += 1
                self._came.wait()
                self._waiting -= 1
            self._threads -= 1
            self._ended.notify_all()
            return None
