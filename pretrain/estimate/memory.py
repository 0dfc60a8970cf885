"""Counting the memory of tensors while code runs: an allocator's bytes without an allocator, for real and for fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
Answer = Callable[[tuple[Any, ...], dict[str, Any]], Any]


class Memory(TorchDispatchMode):
    """Within it, `live` is the bytes of all storages that operators have made and that are still there, `peak` the most so far.
    `aside`: bytes that are there besides, by the caller's account; `most`: the most of both together.

    What was there before does not count; see `ignore` for what is made within. answers: operators whose result depends on values,
    which fake tensors have not, and what to say in their place. watch: called with every operator, its arguments and its result.
    """

    def __init__(
        self,
        answers: dict[Any, Answer] | None = None,
        watch: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    ):
        super().__init__()
        self.live = self.peak = self.aside = self.most = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._ignored: dict[int, weakref.ref[Any]] = {}
        self._answers, self._watch = answers or {}, watch
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = self._answers.get(func)
        result = NotImplemented if answer is None else answer(args, kwargs or {})
        if result is NotImplemented:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if self._watch is not None:
            self._watch(func, args, result)
        return result

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """These count no longer, nor do their views."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._gone(storage._cdata)
            self._ignored[storage._cdata] = weakref.ref(storage, partial(self._forget, storage._cdata))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is made within does not count."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def held(self, tensor: Tensor) -> tuple[int, int]:
        """(a name of the tensor's storage for `alive`, its bytes)."""
        storage = tensor.untyped_storage()
        return storage._cdata, storage.nbytes()

    def alive(self, key: int) -> bool:
        return key in self._sizes

    def begin(self) -> None:
        """The peak is from here on."""
        self.peak, self.most = self.live, self.live + self.aside

    def _see(self, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse tensors and wrappers have none
            return
        key = storage._cdata
        if key in self._sizes or key in self._ignored:
            return
        if self._paused:
            self._ignored[key] = weakref.ref(storage, partial(self._forget, key))
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self._references[key] = weakref.ref(storage, partial(self._freed, key))
        self.live += size
        self.peak, self.most = max(self.peak, self.live), max(self.most, self.live + self.aside)

    def _forget(self, key: int, _: Any) -> None:
        self._ignored.pop(key, None)

    def _freed(self, key: int, _: Any) -> None:
        self._gone(key)

    def _gone(self, key: int) -> None:
        self._references.pop(key, None)
        self.live -= self._sizes.pop(key, 0)


def outside(work: Callable[[], T]) -> T:
    """What `work` returns, done with real tensors and unseen, wherever it is called from: modes, autocast and the hooks of saved
    tensors are a thread's own, so another one has none of them."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()
