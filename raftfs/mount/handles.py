"""What is open: files by inode, handles by number, directories being listed.

The cluster knows per session which files are held (so that an unlinked file lives on). A file is
acquired at its first open and released some seconds after its last close: opening it again within
that time costs no round trip.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import msgspec
import structlog

from raftfs.errors import RaftfsError
from raftfs.mount.cache import Recent
from raftfs.mount.reader import FileReader, ReadContext
from raftfs.mount.writecontext import WriteContext
from raftfs.mount.writer import FileWriter
from raftfs.wire import messages as m
from raftfs.wire import ops

log = structlog.get_logger("raftfs.mount")

LINGER_S = 5.0
LINGER_MAX = 1024  # files kept acquired without an open handle
CACHE_KEYS_MAX = 65_536
DIR_PAGE = 1_000
_REAP_S = 1.0

CacheKey = tuple[int, int, int]


class OpenFile:
    """A file that this mount holds. `attr`: as last heard from a master, at `seen_at`."""

    def __init__(self, attr: ops.Attr, files: "Files") -> None:
        self.inode = attr.inode
        self.attr = attr
        self.seen_at = time.monotonic()
        self.handles = 0
        self.acquired = False
        self.unlinked = False
        self.synced = False  # every chunk that we did not write ourselves is known to be on disk
        self.busy = asyncio.Lock()  # acquiring and releasing
        self.writer: FileWriter | None = None
        self._files = files
        self.reader = FileReader(self.inode, files.read_context, self._granted)

    @property
    def length(self) -> int:
        """The end of the file as its local users see it."""
        if self.writer is not None and self.writer.pending:
            return max(self.attr.length, self.writer.length)
        return self.attr.length

    def writable(self) -> FileWriter:
        """Its writer, made when first needed."""
        if self.writer is None:
            self.writer = FileWriter(
                self.inode, self._files.write_context, self.attr.length, self.committed
            )
        return self.writer

    def _granted(self, index: int) -> m.ChunkMap | None:
        chunk = self.writer.chunks.get(index) if self.writer is not None else None
        return chunk.map() if chunk is not None else None

    def adopt(self, attr: ops.Attr) -> ops.Attr:
        """A master told of these attributes; gives what local users should see.

        Answers may overtake one another: the change time tells which is newer.
        """
        if attr.ctime >= self.attr.ctime:
            if (attr.mtime, attr.length) != (self.attr.mtime, self.attr.length):
                self.reader.forget_all()  # somebody else wrote
                self._files.cache_keys.drop(self.inode)
            self._take(attr)
        return self.view()

    def committed(self, attr: ops.Attr) -> None:
        """A commit of our own returned these attributes."""
        self.reader.forget_all()  # chunks that were holes are no more
        self._files.cache_keys.drop(self.inode)
        if attr.ctime >= self.attr.ctime:
            self._take(attr)

    def _take(self, attr: ops.Attr) -> None:
        self.attr = attr
        self.seen_at = time.monotonic()
        self.unlinked = attr.nlink == 0
        if self.writer is not None:
            self.writer.set_length(attr.length)

    def view(self) -> ops.Attr:
        """The attributes with what is written here and not committed yet."""
        writer = self.writer
        if writer is None or not writer.pending:
            return self.attr
        newest = max(self.attr.mtime, writer.mtime)
        return msgspec.structs.replace(
            self.attr, length=self.length, mtime=newest, ctime=max(self.attr.ctime, newest)
        )

    def cache_key(self) -> CacheKey:
        """Equal keys at two opens: the pages that the kernel kept between them are still right."""
        return self.attr.mtime, self.attr.ctime, self.attr.length


class Handle:
    """An open file descriptor of the kernel. `seen`: failures that were there before it."""

    def __init__(self, file: OpenFile, writes: bool) -> None:
        self.file = file
        self.writes = writes
        self.seen = file.writer.failures if file.writer is not None else 0

    def check(self) -> None:
        """WriteError, once and for ever, if bytes written through this handle may be lost."""
        writer = self.file.writer
        if self.writes and writer is not None:
            error = writer.failed_since(self.seen)
            if error is not None:
                raise error


class Files:
    """All files held by this mount."""

    def __init__(self, meta: Any, write_context: WriteContext, read_context: ReadContext) -> None:
        self.meta = meta
        self.write_context = write_context
        self.read_context = read_context
        self.cache_keys: Recent[int, CacheKey] = Recent(CACHE_KEYS_MAX)
        self._files: dict[int, OpenFile] = {}
        self._lingering: OrderedDict[int, float] = OrderedDict()  # inode -> last close
        self._opening: dict[int, int] = {}  # inode -> first opens under way
        self._reaper: asyncio.Task[Any] | None = None

    def get(self, inode: int) -> OpenFile | None:
        """The file, if it is held."""
        return self._files.get(inode)

    def __iter__(self) -> Iterator[OpenFile]:
        return iter(list(self._files.values()))

    def saw(self, attr: ops.Attr) -> ops.Attr:
        """A master told of a node: what local users should see of it."""
        file = self._files.get(attr.inode)
        return attr if file is None else file.adopt(attr)

    def created(self, attr: ops.Attr) -> OpenFile:
        """`Create(opened=True)` made and acquired this file; it counts as opened once."""
        file = self._files[attr.inode] = OpenFile(attr, self)
        file.acquired = file.synced = True
        file.handles = 1
        return file

    async def open(self, inode: int, fresh_s: float) -> OpenFile:
        """Hold the file, with attributes not older than `fresh_s`. ReplyError, LinkError."""
        file = self._files.get(inode)
        if file is None:
            file = await self._first_open(inode)
        file.handles += 1
        self._lingering.pop(inode, None)
        try:
            async with file.busy:  # a release under way ends first
                if not file.acquired:
                    file.adopt(await self.meta.mutate(ops.Acquire(inode)))
                    file.acquired = True
                elif time.monotonic() - file.seen_at > fresh_s:
                    file.adopt(await self.meta.call(m.GetAttr(inode)))
        except BaseException:
            self.close(file)
            raise
        return file

    async def _first_open(self, inode: int) -> OpenFile:
        self._opening[inode] = self._opening.get(inode, 0) + 1
        try:
            attr = await self.meta.mutate(ops.Acquire(inode))
        finally:
            self._opening[inode] -= 1
            if not self._opening[inode]:
                del self._opening[inode]
        file = self._files.get(inode)  # two may have opened it at the same time
        if file is None:
            file = self._files[inode] = OpenFile(attr, self)
        file.acquired = True
        file.adopt(attr)
        return file

    def close(self, file: OpenFile) -> None:
        """One handle less; the last one lets the file go, soon."""
        file.handles -= 1
        if file.handles > 0:
            return
        self._lingering[file.inode] = time.monotonic()
        self._lingering.move_to_end(file.inode)
        if self._reaper is None or self._reaper.done():
            self._reaper = self.write_context.spawn(self._reap())
        if file.unlinked:
            self._let_go(file)

    def freed(self, inode: int) -> None:
        """The file's last link is gone: hold it no longer than it is open."""
        file = self._files.get(inode)
        self.cache_keys.drop(inode)
        if file is not None:
            file.unlinked = True
            if file.handles <= 0:
                self._let_go(file)

    def session_lost(self) -> None:
        """The cluster forgot our session: hold everything that is open anew."""
        for file in self:
            file.acquired = False
            if file.handles > 0:
                self.write_context.spawn(self._acquire_again(file))

    async def _acquire_again(self, file: OpenFile) -> None:
        async with file.busy:
            if not file.acquired:
                file.adopt(await self.meta.mutate(ops.Acquire(file.inode)))
                file.acquired = True

    async def _reap(self) -> None:
        while self._lingering:
            inode, since = next(iter(self._lingering.items()))
            surplus = len(self._lingering) > LINGER_MAX
            if not surplus and time.monotonic() - since < LINGER_S:
                await asyncio.sleep(_REAP_S)
                continue
            self._lingering.pop(inode)
            file = self._files.get(inode)
            if file is not None and file.handles <= 0:
                self._let_go(file)
            if surplus:
                await asyncio.sleep(0)

    def _let_go(self, file: OpenFile) -> None:
        self._lingering.pop(file.inode, None)
        self.write_context.spawn(self._release(file))

    async def _release(self, file: OpenFile) -> None:
        try:
            if file.writer is not None and not file.writer.quiet:
                await file.writer.flush()
        except RaftfsError as e:
            log.error("written data lost", inode=file.inode, reason=str(e))
        async with file.busy:
            if file.handles > 0 or self._files.get(file.inode) is not file:
                return  # opened again meanwhile
            if file.inode in self._opening:  # about to be: its Acquire may be sent already
                self._lingering[file.inode] = time.monotonic()
                return
            file.reader.forget_all()
            if file.acquired:
                file.acquired = False
                try:
                    await self.meta.mutate(ops.Release(file.inode))
                except RaftfsError as e:
                    log.warning("release failed", inode=file.inode, reason=str(e))
            if file.handles <= 0:
                self._files.pop(file.inode, None)


class Directory:
    """A directory being listed. Positions are counted; pages are found again by name."""

    def __init__(self, inode: int, meta: Any) -> None:
        self.inode = inode
        self._meta = meta
        self._starts: list[bytes] = [b""]  # the name after which each page begins
        self._pages: dict[int, m.DirPage] = {}

    async def page(self, position: int) -> tuple[m.DirPage, int]:
        """The page that holds entry number `position`, and the entry's place in it.

        Pages follow one another without gap or double, whatever is created or removed meanwhile.
        Positions must have been reached once before they can be sought.
        """
        number, place = divmod(position, DIR_PAGE)
        if position == 0:
            self._starts, self._pages = [b""], {}  # rewound: a new look
        while len(self._starts) <= number:
            last = await self._load(len(self._starts) - 1)
            if not last.more:
                return m.DirPage(last.parent, [], False), 0
        return await self._load(number), place

    async def _load(self, number: int) -> m.DirPage:
        page = self._pages.get(number)
        if page is None:
            ask = m.ReadDir(self.inode, self._starts[number], DIR_PAGE)
            page = await self._meta.call(ask)
            assert page is not None
            if len(self._pages) >= 2:
                del self._pages[min(self._pages)]
            self._pages[number] = page
            if page.more and len(self._starts) == number + 1:
                self._starts.append(page.entries[-1][0])
        return page
