"""Power cuts without a power switch: record what a program does to a folder, then build every disk that a cut could leave.

    with Recorder(root) as recorder:
        save()
        recorder.mark("returned")
    for state in states(recorder.base, recorder.log): ...      # each a tree of names and bytes

The disk that is assumed promises nothing but this: what was fsynced stays. Bytes are safe after an fsync of the file, names
(created, renamed, removed) after an fsync of their folder. All else may have happened or not, one change without the other; of
a write also half, or its length with zeros for bytes; a rename may survive without the bytes of the file that it names. Changes
of the same thing keep their order. Real filesystems promise more (ext4 puts many of these in order); not all promise it.
"""

from __future__ import annotations

import builtins
import io
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

Tree = dict[str, bytes | None]  # names below the root; None for a folder


@dataclass(frozen=True)
class Op:
    """One change, as the program made it. handle: of the open file, for what goes through one. at: when, in nanoseconds."""

    kind: str  # open, write, resize, fsync, fsync folder, rename, unlink, mkdir, rmdir, mark
    path: str = ""
    handle: tuple[int, int] | None = None
    target: str = ""
    offset: int = 0
    data: bytes = b""
    at: int = field(default_factory=time.monotonic_ns, compare=False)

    def __str__(self) -> str:
        more = f" -> {self.target}" if self.target else f" ({len(self.data)} bytes)" if self.data else ""
        return f"{self.kind} {self.path}{more}"


class Recorder:
    """Notes every change below `root` that this process makes through Python: os, io, pathlib, shutil; all threads.

    That nothing was missed is checked at the end: the record, replayed, must give what is on the disk. alone=False: other
    processes write there, too, so the caller has to check that, of the merged record.
    """

    def __init__(self, root: Path, alone: bool = True):
        self.alone = alone
        self.root = root.resolve()
        self.base = read_tree(self.root)
        self.log: list[Op] = []
        self._lock = threading.RLock()  # a change and its note are one
        self._open: dict[int, tuple[str, tuple[int, int] | None]] = {}  # descriptor -> path, handle (None of a folder)
        self._handles = itertools.count()
        self._patches: list[Any] = []

    def mark(self, name: str) -> None:
        """Notes that the program has come to a place of that name."""
        self._note("mark", name)

    def _note(self, kind: str, path: str = "", **more: Any) -> None:
        self.log.append(Op(kind, path, **more))

    def _below(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The name below the root; None for a path elsewhere."""
        if isinstance(path, int):
            return None
        text = os.fsdecode(path)
        if dir_fd is not None and dir_fd in self._open:
            text = str(self.root / self._open[dir_fd][0] / text)
        relative = os.path.relpath(os.path.abspath(text), self.root)  # noqa: PTH100
        return None if relative.startswith("..") else relative

    def __enter__(self) -> Recorder:
        replaced = {
            (os, "open"): self._os_open,
            (os, "close"): self._close,
            (os, "write"): self._write,
            (os, "pwrite"): self._pwrite,
            (os, "ftruncate"): self._ftruncate,
            (os, "posix_fallocate"): self._fallocate,
            (os, "fsync"): self._fsync,
            (os, "fdatasync"): self._fsync,
            (os, "rename"): self._renaming("rename"),
            (os, "replace"): self._renaming("replace"),
            (os, "unlink"): self._naming("unlink", "unlink"),
            (os, "remove"): self._naming("remove", "unlink"),
            (os, "rmdir"): self._naming("rmdir", "rmdir"),
            (os, "mkdir"): self._naming("mkdir", "mkdir"),
            (io, "open"): self._io_open,
            (builtins, "open"): self._io_open,
        }
        self._real = {name: getattr(module, name) for module, name in replaced if module is not builtins}
        self._real["io.open"] = io.open
        self._real["open"] = os.open
        self._patches = [mock.patch.object(module, name, new) for (module, name), new in replaced.items()]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for patch in self._patches:
            patch.stop()
        if kind is None and self.alone:
            again = last_tree(self.base, self.log)
            assert again == read_tree(self.root), "something was changed in a way that the recorder does not see"

    # ------------------------------------------------------------------------------------------- what is recorded

    def _os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        with self._lock:
            name = self._below(path, dir_fd)
            descriptor: int = self._real["open"](path, flags, mode, dir_fd=dir_fd)
            self._open.pop(descriptor, None)  # a number of a file that was closed out of our sight
            if name is not None:
                if os.path.isdir(self.root / name):  # noqa: PTH112
                    self._open[descriptor] = (name, None)
                else:
                    handle = (os.getpid(), next(self._handles))
                    self._open[descriptor] = (name, handle)
                    if flags & (os.O_WRONLY | os.O_RDWR):
                        self._note("open", name, handle=handle)
                        if flags & os.O_TRUNC:
                            self._note("resize", name, handle=handle)
            return descriptor

    def _io_open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        if not set(mode) & set("wxa+") or self._below(file) is None:
            return self._real["io.open"](file, mode, buffering, *rest, **named)
        raw = _Raw(self, os.fspath(file), mode.replace("t", "").replace("b", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)  # type: ignore[arg-type]
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **named)

    def _close(self, descriptor: int) -> None:
        with self._lock:
            self._open.pop(descriptor, None)
            self._real["close"](descriptor)

    def _write(self, descriptor: int, data: Any) -> int:
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        return self._written(descriptor, data, at, lambda: self._real["write"](descriptor, data))

    def _pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        return self._written(descriptor, data, offset, lambda: self._real["pwrite"](descriptor, data, offset))

    def _written(self, descriptor: int, data: Any, offset: int, write: Callable[[], int]) -> int:
        with self._lock:
            count = write()
            if descriptor in self._open:
                name, handle = self._open[descriptor]
                self._note("write", name, handle=handle, offset=offset, data=bytes(memoryview(data).cast("B")[:count]))
            return count

    def _ftruncate(self, descriptor: int, length: int) -> None:
        with self._lock:
            self._real["ftruncate"](descriptor, length)
            if descriptor in self._open:
                name, handle = self._open[descriptor]
                self._note("resize", name, handle=handle, offset=length)

    def _fallocate(self, descriptor: int, offset: int, length: int) -> None:
        with self._lock:
            self._real["posix_fallocate"](descriptor, offset, length)
            if descriptor in self._open:
                name, handle = self._open[descriptor]
                self._note("resize", name, handle=handle, offset=max(os.fstat(descriptor).st_size, offset + length))

    def _fsync(self, file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        with self._lock:
            self._real["fsync"](descriptor)
            if descriptor in self._open:
                name, handle = self._open[descriptor]
                self._note("fsync folder" if handle is None else "fsync", name, handle=handle)

    def _renaming(self, function: str) -> Callable[..., None]:
        def rename(source: Any, target: Any, **named: Any) -> None:
            with self._lock:
                self._real[function](source, target, **named)
                names = self._below(source, named.get("src_dir_fd")), self._below(target, named.get("dst_dir_fd"))
                if names != (None, None):
                    assert names[0] is not None and names[1] is not None, "a rename into or out of the recorded folder"
                    self._note("rename", names[0], target=names[1])

        return rename

    def _naming(self, function: str, kind: str) -> Callable[..., None]:
        def change(path: Any, *rest: Any, dir_fd: int | None = None) -> None:
            with self._lock:
                name = self._below(path, dir_fd)
                self._real[function](path, *rest, dir_fd=dir_fd)
                if name is not None:
                    self._note(kind, name)

        return change


class _Raw(io.FileIO):
    """A file opened by io.open, whose bytes go through os.write."""

    def __init__(self, recorder: Recorder, path: str, mode: str):
        super().__init__(path, mode, opener=lambda name, flags: os.open(name, flags, 0o666))
        self._recorder = recorder

    def write(self, data: Any) -> int:
        return os.write(self.fileno(), data)

    def close(self) -> None:
        if not self.closed:
            self._recorder._open.pop(self.fileno(), None)
        super().close()


def merged(*logs: list[Op]) -> list[Op]:
    """The record of several processes on one machine, in the order in which things happened."""
    return sorted(itertools.chain(*logs), key=lambda op: op.at)


def read_tree(root: Path) -> Tree:
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))
    }


def write_tree(root: Path, tree: Tree) -> None:
    """Makes a tree real, in a new folder."""
    root.mkdir()
    for name, data in sorted(tree.items()):
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)


# ------------------------------------------------------------------------------------------------------ the disk


@dataclass(frozen=True)
class _Names:
    """Entries of one folder that change together: name -> what it leads to from now on, None for nothing."""

    folder: int
    entries: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class _Bytes:
    """A write, or (data None) a new length."""

    file: int
    offset: int
    data: bytes | None


class Disk:
    """Numbered files (bytes) and folders (name -> number). Number 0 is the root."""

    def __init__(self, tree: Tree):
        self.folders: dict[int, dict[str, int]] = {0: {}}
        self.files: dict[int, bytearray] = {}
        self._numbers = itertools.count(1)
        for name, data in sorted(tree.items()):
            number = next(self._numbers)
            folder, last = self.parent(name)
            self.folders[folder][last] = number
            if data is None:
                self.folders[number] = {}
            else:
                self.files[number] = bytearray(data)

    def find(self, path: str) -> int | None:
        number: int | None = 0
        for part in [] if path == "." else path.split("/"):
            number = self.folders[number].get(part) if number in self.folders else None  # type: ignore[index]
        return number

    def parent(self, path: str) -> tuple[int, str]:
        folder, _, last = path.rpartition("/")
        number = self.find(folder or ".")
        assert number is not None and number in self.folders, path
        return number, last

    def new(self, folder: bool) -> int:
        number = next(self._numbers)
        if folder:
            self.folders[number] = {}
        else:
            self.files[number] = bytearray()
        return number

    def apply(self, change: _Names | _Bytes, how: str = "done") -> None:
        """how: done; half or zeros, of a write."""
        if isinstance(change, _Names):
            for name, number in change.entries:
                if number is None:
                    self.folders[change.folder].pop(name, None)
                else:
                    self.folders[change.folder][name] = number
            return
        file = self.files[change.file]
        if change.data is None:
            del file[change.offset :]
            file.extend(bytes(change.offset - len(file)))
            return
        data = change.data
        if how == "half":
            data = data[: len(data) // 2]
        elif how == "zeros":
            data = bytes(len(data))
        file.extend(bytes(max(0, change.offset + len(data) - len(file))))
        file[change.offset : change.offset + len(data)] = data

    def tree(self) -> Tree:
        found: Tree = {}

        def walk(folder: int, prefix: str) -> None:
            for name, number in self.folders[folder].items():
                if number in self.folders:
                    found[prefix + name] = None
                    walk(number, f"{prefix}{name}/")
                else:
                    found[prefix + name] = bytes(self.files[number])

        walk(0, "")
        return found

    def copy(self) -> Disk:
        other = Disk({})
        other.folders = {number: dict(names) for number, names in self.folders.items()}
        other.files = {number: bytearray(data) for number, data in self.files.items()}
        return other


def _changes(base: Tree, log: list[Op]) -> tuple[Disk, list[_Names | _Bytes | None], list[int | None]]:
    """(the disk as the program sees it at the end; of each op the change it makes; and the number of what it fsyncs)."""
    live = Disk(base)
    handles: dict[tuple[int, int], int] = {}
    changes: list[_Names | _Bytes | None] = []
    synced: list[int | None] = []
    for op in log:
        change: _Names | _Bytes | None = None
        sync: int | None = None
        if op.kind == "open":
            assert op.handle is not None
            number = live.find(op.path)
            if number is None:
                number = live.new(folder=False)
                folder, name = live.parent(op.path)
                change = _Names(folder, ((name, number),))
            handles[op.handle] = number
        elif op.kind == "mkdir":
            folder, name = live.parent(op.path)
            change = _Names(folder, ((name, live.new(folder=True)),))
        elif op.kind in ("unlink", "rmdir"):
            folder, name = live.parent(op.path)
            change = _Names(folder, ((name, None),))
        elif op.kind == "rename":
            (folder, name), (other, last) = live.parent(op.path), live.parent(op.target)
            assert folder == other, f"{op}: from folder to folder, which is no single change"
            change = _Names(folder, ((name, None), (last, live.find(op.path))))
        elif op.kind in ("write", "resize"):
            assert op.handle is not None
            change = _Bytes(handles[op.handle], op.offset, op.data if op.kind == "write" else None)
        elif op.kind == "fsync folder":
            sync = live.find(op.path)
        elif op.kind == "fsync":
            assert op.handle is not None
            sync = handles.get(op.handle)
        if change is not None:
            live.apply(change)
        changes.append(change)
        synced.append(sync)
    return live, changes, synced


def last_tree(base: Tree, log: list[Op]) -> Tree:
    """What is there after everything has happened."""
    return _changes(base, log)[0].tree()


@dataclass(frozen=True)
class State:
    """A disk after a power cut. phase: the last mark that the program had passed, "" before the first."""

    tree: Tree
    phase: str
    story: str


def states(base: Tree, log: list[Op], most: int = 400) -> Iterator[State]:
    """Every disk that a cut after each op could leave; where they are more than `most`, that many drawn at random.

    The same tree in the same phase comes once. `base` was safe on disk before.
    """
    _, changes, synced = _changes(base, log)
    blank = Disk(base)
    # Files and folders that come into being get their numbers as they did in the program.
    final = _changes(base, log)[0]
    for number in final.folders.keys() - blank.folders.keys():
        blank.folders[number] = {}
    for number in final.files.keys() - blank.files.keys():
        blank.files[number] = bytearray()
    seen: set[tuple[str, frozenset[tuple[str, bytes | None]]]] = set()
    generator = random.Random(0)
    phase = ""
    for count in range(len(log) + 1):
        if count and log[count - 1].kind == "mark":
            phase = log[count - 1].path
        pending = [i for i in range(count) if changes[i] is not None and not _is_safe(i, count, changes[i], synced)]
        choices = [_outcomes(changes[i]) for i in pending]
        total = 1
        for options in choices:
            total *= len(options)
        picks: Any = itertools.product(*choices)
        if total > most:
            corners = [tuple(options[0] for options in choices), tuple(options[-1] for options in choices)]
            picks = [*corners, *(tuple(generator.choice(o) for o in choices) for _ in range(most))]
        for pick in picks:
            fate = dict(zip(pending, pick, strict=True))
            disk = blank.copy()
            for i in range(count):
                how = fate.get(i, "done")
                change = changes[i]
                if change is not None and how != "lost":
                    disk.apply(change, how)
            tree = disk.tree()
            key = (phase, frozenset(tree.items()))
            if key not in seen:
                seen.add(key)
                last = f"after {log[count - 1]}" if count else "before everything"
                yield State(tree, phase, "; ".join([last, *(f"{how}: {log[i]}" for i, how in fate.items())]))


def _is_safe(index: int, count: int, change: _Names | _Bytes | None, synced: list[int | None]) -> bool:
    of = change.folder if isinstance(change, _Names) else change.file if change is not None else None
    return any(synced[j] == of for j in range(index + 1, count))


def _outcomes(change: _Names | _Bytes | None) -> tuple[str, ...]:
    if isinstance(change, _Bytes) and change.data:
        return ("lost", "half", "zeros", "done")
    return ("lost", "done")
