"""pyfuse3's requests -> `Volume`'s operations -> replies. Nothing is decided here.

Every handler is wrapped: a RaftfsError becomes its errno; anything else is a bug, is logged with
its traceback and becomes EIO. (An exception that pyfuse3 does not expect would end one of its
workers.) Bound by the kernel's view: inode 1 is the root of the mount, whatever its real number.
"""

import functools
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from errno import EIO, ENOSYS, EPERM
from typing import Any

import pyfuse3
import structlog
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from raftfs.const import NAME_MAX
from raftfs.errors import RaftfsError
from raftfs.mount.handles import DIR_PAGE, Directory, Handle
from raftfs.mount.volume import MASTERINFO_INODE, Volume
from raftfs.wire import ops
from raftfs.wire.ops import Attr, NodeType

log = structlog.get_logger("raftfs.fuse")

_TYPE_BITS = {
    NodeType.FILE: stat.S_IFREG,
    NodeType.DIR: stat.S_IFDIR,
    NodeType.SYMLINK: stat.S_IFLNK,
    NodeType.FIFO: stat.S_IFIFO,
    NodeType.BLOCKDEV: stat.S_IFBLK,
    NodeType.CHARDEV: stat.S_IFCHR,
    NodeType.SOCKET: stat.S_IFSOCK,
}
_NODE_TYPES = {bits: kind for kind, bits in _TYPE_BITS.items()}
_IO_SIZE = 65_536  # st_blksize: what programs take as a hint for their buffers
_SPACE_UNIT = 4_096


@dataclass
class Timeouts:
    """How long the kernel may use what it was told, in seconds."""

    attr_s: float = 1.0
    entry_s: float = 0.0
    dir_entry_s: float = 1.0


def _guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(handler)
    async def guarded(*args: Any) -> Any:
        try:
            return await handler(*args)
        except FUSEError:
            raise
        except RaftfsError as e:
            raise FUSEError(e.errno) from None
        except Exception:
            log.exception("request failed", request=handler.__name__)
            raise FUSEError(EIO) from None

    return guarded


class _Translation(pyfuse3.Operations):
    """What all handlers use: inode numbers, attributes, handles."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, volume: Volume, timeouts: Timeouts, on_init: Callable[[], None]) -> None:
        super().__init__()
        self._volume = volume
        self._contents = volume.contents
        self._timeouts = timeouts
        self._on_init = on_init
        self._root = volume.root
        self._handles: dict[int, Any] = {}
        self._next_handle = 0

    def init(self) -> None:
        """The kernel's first request."""
        self._on_init()

    # --- translation

    def _inode(self, inode: int) -> int:
        return self._root if inode == pyfuse3.ROOT_INODE else inode

    def _entry(self, attr: Attr) -> EntryAttributes:
        entry = EntryAttributes()
        is_dir = attr.type == NodeType.DIR
        entry.st_ino = pyfuse3.ROOT_INODE if attr.inode == self._root else attr.inode
        entry.generation = 0  # inodes are never reused
        entry.attr_timeout = self._timeouts.attr_s
        entry.entry_timeout = self._timeouts.dir_entry_s if is_dir else self._timeouts.entry_s
        entry.st_mode = _TYPE_BITS[attr.type] | attr.mode
        entry.st_nlink = attr.nlink
        entry.st_uid = attr.uid
        entry.st_gid = attr.gid
        entry.st_rdev = attr.rdev
        entry.st_size = attr.length
        entry.st_blksize = _IO_SIZE
        entry.st_blocks = (attr.length + 511) >> 9
        entry.st_atime_ns = attr.atime
        entry.st_mtime_ns = attr.mtime
        entry.st_ctime_ns = attr.ctime
        return entry

    def _keep(self, what: Any) -> int:
        self._next_handle += 1
        self._handles[self._next_handle] = what
        return self._next_handle

    def _dot(self, inode: int) -> EntryAttributes:
        """`.` and `..`: the kernel takes only the number and the type."""
        entry = EntryAttributes()
        entry.st_ino = pyfuse3.ROOT_INODE if inode == self._root else inode
        entry.st_mode = stat.S_IFDIR
        entry.attr_timeout = entry.entry_timeout = 0.0
        return entry


class _Names(_Translation):
    """Requests about names and attributes."""

    @_guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> EntryAttributes:
        """LOOKUP."""
        return self._entry(await self._volume.lookup(self._inode(parent_inode), name))

    @_guarded
    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """FORGET: nothing is kept per lookup."""

    @_guarded
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: Any
    ) -> EntryAttributes:
        """MKDIR."""
        made = await self._volume.make(
            self._inode(parent_inode), name, NodeType.DIR, mode & 0o7777, ctx.umask, ctx.uid,
            ctx.gid,
        )  # fmt: skip
        return self._entry(made)

    @_guarded
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any
    ) -> EntryAttributes:
        """MKNOD, of every type."""
        kind = _NODE_TYPES.get(stat.S_IFMT(mode), NodeType.FILE)
        made = await self._volume.make(
            self._inode(parent_inode), name, kind, mode & 0o7777, ctx.umask, ctx.uid, ctx.gid,
            rdev,
        )  # fmt: skip
        return self._entry(made)

    @_guarded
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: Any
    ) -> EntryAttributes:
        """SYMLINK."""
        parent = self._inode(parent_inode)
        return self._entry(await self._volume.symlink(parent, name, target, ctx.uid, ctx.gid))

    @_guarded
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any
    ) -> EntryAttributes:
        """LINK."""
        return self._entry(
            await self._volume.link(inode, self._inode(new_parent_inode), new_name)
        )

    @_guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """UNLINK."""
        await self._volume.unlink(self._inode(parent_inode), name)

    @_guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """RMDIR."""
        await self._volume.rmdir(self._inode(parent_inode), name)

    @_guarded
    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes,
        flags: int, ctx: Any,
    ) -> None:  # fmt: skip
        """RENAME2."""
        old, new = self._inode(parent_inode_old), self._inode(parent_inode_new)
        await self._volume.rename(old, name_old, new, name_new, flags)

    @_guarded
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        """READLINK."""
        return await self._volume.readlink(inode)

    @_guarded
    async def getattr(self, inode: int, ctx: Any) -> EntryAttributes:
        """GETATTR."""
        return self._entry(await self._volume.getattr(self._inode(inode)))

    @_guarded
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: Any, fh: int | None, ctx: Any
    ) -> EntryAttributes:
        """SETATTR: the size first, for it changes the times."""
        inode = self._inode(inode)
        if inode == MASTERINFO_INODE:
            raise FUSEError(EPERM)
        result = None
        if fields.update_size:
            result = await self._contents.truncate(inode, attr.st_size)
        op = ops.SetAttr(
            inode,
            mode=attr.st_mode & 0o7777 if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime=attr.st_atime_ns if fields.update_atime else None,
            mtime=attr.st_mtime_ns if fields.update_mtime else None,
        )
        if op != ops.SetAttr(inode):
            result = await self._volume.setattr(op)
        return self._entry(result or await self._volume.getattr(inode))

    @_guarded
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        """STATFS."""
        found = await self._volume.statfs()
        stats = pyfuse3.StatvfsData()
        stats.f_bsize = stats.f_frsize = _SPACE_UNIT
        stats.f_blocks = found.total // _SPACE_UNIT
        stats.f_bfree = stats.f_bavail = found.available // _SPACE_UNIT
        stats.f_files = found.inodes + (1 << 32)  # there is no limit
        stats.f_ffree = stats.f_favail = 1 << 32
        stats.f_namemax = NAME_MAX
        return stats


class _Files(_Translation):
    """Requests about contents."""

    @_guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any
    ) -> tuple[FileInfo, EntryAttributes]:
        """CREATE."""
        handle = await self._volume.create(
            self._inode(parent_inode), name, mode & 0o7777, ctx.umask, ctx.uid, ctx.gid,
            exclusive=bool(flags & os.O_EXCL),
        )  # fmt: skip
        info = FileInfo(fh=self._keep(handle), keep_cache=False)
        return info, self._entry(handle.file.view())

    @_guarded
    async def open(self, inode: int, flags: int, ctx: Any) -> FileInfo:
        """OPEN. O_TRUNC is ours to do (FUSE_ATOMIC_O_TRUNC is on)."""
        if inode == MASTERINFO_INODE:
            return FileInfo(fh=self._keep(self._volume.masterinfo()), direct_io=True)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        truncate = bool(flags & os.O_TRUNC)
        handle, keep = await self._contents.open(inode, writes=writes, truncate=truncate)
        return FileInfo(fh=self._keep(handle), keep_cache=keep)

    @_guarded
    async def read(self, fh: int, offset: int, size: int) -> bytes | bytearray | memoryview:
        """READ."""
        handle = self._handles[fh]
        if isinstance(handle, Handle):
            return await self._contents.read(handle, offset, size)
        content: bytes = handle[offset : offset + size]
        return content

    @_guarded
    async def write(self, fh: int, offset: int, buf: bytes) -> int:
        """WRITE."""
        return await self._contents.write(self._handles[fh], offset, buf)

    @_guarded
    async def flush(self, fh: int) -> None:
        """FLUSH: close(2) of any descriptor of the handle."""
        handle = self._handles[fh]
        if isinstance(handle, Handle):
            await self._contents.flush(handle)

    @_guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        """FSYNC."""
        handle = self._handles[fh]
        if isinstance(handle, Handle):
            await self._contents.fsync(handle)

    @_guarded
    async def release(self, fh: int) -> None:
        """RELEASE."""
        handle = self._handles.pop(fh)
        if isinstance(handle, Handle):
            await self._contents.release(handle)


class _Directories(_Translation):
    """Requests that list directories."""

    @_guarded
    async def opendir(self, inode: int, ctx: Any) -> int:
        """OPENDIR."""
        return self._keep(self._volume.opendir(self._inode(inode)))

    @_guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """READDIRPLUS. Cookies: 1 after `.`, 2 after `..`, then 2 + the entries before."""
        directory: Directory = self._handles[fh]
        cookie = start_id
        page, place = await directory.page(max(0, cookie - 2))
        while cookie < 2:
            inode = directory.inode if cookie == 0 or directory.inode == self._root else page.parent
            if not pyfuse3.readdir_reply(
                token, (b".", b"..")[cookie], self._dot(inode), cookie + 1
            ):
                return
            cookie += 1
        saw = self._volume.files.saw
        while True:
            for name, attr in page.entries[place:]:
                cookie += 1
                if not pyfuse3.readdir_reply(token, name, self._entry(saw(attr)), cookie):
                    return
            if not page.more or not page.entries:
                return
            cookie += -(cookie - 2) % DIR_PAGE
            page, place = await directory.page(cookie - 2)

    @_guarded
    async def releasedir(self, fh: int) -> None:
        """RELEASEDIR."""
        del self._handles[fh]

    @_guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """FSYNCDIR: metadata is on a majority's disks before anything is answered."""


class Operations(_Names, _Files, _Directories):
    """One mount. `on_init` is called when the kernel has accepted the mount."""

    # ENOSYS makes the kernel answer ENOTSUP by itself from then on: extended attributes (and the
    # security.capability that it wants to see before writes) never cost a request again.

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        """GETXATTR: not supported."""
        raise FUSEError(ENOSYS)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        """SETXATTR: not supported."""
        raise FUSEError(ENOSYS)

    async def listxattr(self, inode: int, ctx: Any) -> Sequence[bytes]:
        """LISTXATTR: not supported."""
        raise FUSEError(ENOSYS)

    async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
        """REMOVEXATTR: not supported."""
        raise FUSEError(ENOSYS)
