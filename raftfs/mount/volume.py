"""The file system's operations, without FUSE: what `operations.py` translates to and from.

Inodes are the cluster's; attributes are `ops.Attr`, with what this mount has written and not yet
committed laid over them. Everything raises RaftfsError with the errno for the caller.
"""

import json
import time
from dataclasses import dataclass
from errno import EEXIST, EPERM

import structlog

from raftfs.client.meta import MetaClient
from raftfs.const import MIB
from raftfs.errors import RaftfsError, ReplyError
from raftfs.mount.cache import Budget
from raftfs.mount.contents import FRESH_S, Contents
from raftfs.mount.datalink import DataLinks
from raftfs.mount.handles import Directory, Files, Handle
from raftfs.mount.reader import ReadContext
from raftfs.mount.writecontext import WriteContext
from raftfs.wire import messages as m
from raftfs.wire import ops
from raftfs.wire.ops import Attr, NodeType

log = structlog.get_logger("raftfs.mount")

READ_AHEAD_BYTES = 64 * MIB  # of all files together
MASTERINFO = b".masterinfo"
MASTERINFO_INODE = 2**63 - 2  # the top of the range is for files that exist only in the mount


class DeniedError(RaftfsError):
    """Refused by the mount itself."""

    def __init__(self, errno: int, why: str) -> None:
        self.errno = errno
        super().__init__(why)


@dataclass
class VolumeSettings:
    """What the mount's options decide here."""

    masters: list[tuple[str, int]]
    mountpoint: str
    write_cache_bytes: int = 128 * MIB
    timeout_s: float = 60.0
    close_sync: bool = False


class Volume:
    """A mounted (sub)tree of the cluster."""

    def __init__(
        self, meta: MetaClient, registered: m.Registered, settings: VolumeSettings
    ) -> None:
        self.meta = meta
        self.root = registered.root
        self.registered = registered
        self.settings = settings
        self.links = DataLinks()
        self._writes = WriteContext(
            meta, self.links, Budget(settings.write_cache_bytes), settings.timeout_s
        )
        reads = ReadContext(meta, self.links, Budget(READ_AHEAD_BYTES), settings.timeout_s)
        self.files = Files(meta, self._writes, reads)
        self.contents = Contents(meta, self.files, self._writes, close_sync=settings.close_sync)
        meta.on_new_session.append(self.files.session_lost)

    async def flush_all(self) -> None:
        """Everything written goes out and is committed; losses are logged."""
        await self._writes.close()

    async def close(self) -> None:
        """Write everything out and end the session."""
        await self.flush_all()
        try:
            await self.meta.call(m.EndMySession(), 5.0)
        except RaftfsError as e:
            log.warning("session not ended", reason=str(e))
        self.links.close()
        await self.meta.close()

    # --- names

    async def lookup(self, parent: int, name: bytes) -> Attr:
        """The node of that name."""
        if name == MASTERINFO and parent == self.root:
            return self._masterinfo_attr()
        return self.files.saw(await self.meta.call(m.Lookup(parent, name)))

    async def create(
        self,
        parent: int,
        name: bytes,
        mode: int,
        umask: int,
        uid: int,
        gid: int,
        *,
        exclusive: bool,
    ) -> Handle:
        """Create and open for writing. If somebody was faster, open that (unless `exclusive`)."""
        self._not_ours(parent, name)
        op = ops.Create(parent, name, NodeType.FILE, mode, umask, uid, gid, opened=True)
        try:
            file = self.files.created(await self.meta.mutate(op))
        except ReplyError as e:
            if e.status != EEXIST or exclusive:
                raise
            found = await self.lookup(parent, name)
            file = await self.files.open(found.inode, FRESH_S)
        return Handle(file, writes=True)

    async def make(
        self,
        parent: int,
        name: bytes,
        kind: int,
        mode: int,
        umask: int,
        uid: int,
        gid: int,
        rdev: int = 0,
    ) -> Attr:
        """mkdir and mknod: `kind` is a NodeType."""
        self._not_ours(parent, name)
        op = ops.Create(parent, name, kind, mode, umask, uid, gid, rdev)
        made: Attr = await self.meta.mutate(op)
        return made

    async def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Attr:
        """Make a symbolic link."""
        self._not_ours(parent, name)
        made: Attr = await self.meta.mutate(ops.Symlink(parent, name, target, uid, gid))
        return made

    async def link(self, inode: int, parent: int, name: bytes) -> Attr:
        """Make a hard link."""
        self._not_ours(parent, name)
        if inode == MASTERINFO_INODE:
            raise DeniedError(EPERM, ".masterinfo is not a file of the cluster")
        return self.files.saw(await self.meta.mutate(ops.Link(inode, parent, name)))

    async def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name; the file lives on while it is open."""
        self._not_ours(parent, name)
        removed: ops.Removed = await self.meta.mutate(ops.Unlink(parent, name))
        if removed.freed:
            self.files.freed(removed.inode)

    async def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        await self.meta.mutate(ops.Rmdir(parent, name))

    async def rename(
        self, src_parent: int, src_name: bytes, dst_parent: int, dst_name: bytes, flags: int
    ) -> None:
        """Rename. A file that replaces another one is on disk before it does."""
        self._not_ours(src_parent, src_name)
        self._not_ours(dst_parent, dst_name)
        await self._sync_before_replacing(src_parent, src_name, dst_parent, dst_name)
        op = ops.Rename(src_parent, src_name, dst_parent, dst_name, flags)
        await self.meta.mutate(op)

    async def _sync_before_replacing(
        self, src_parent: int, src_name: bytes, dst_parent: int, dst_name: bytes
    ) -> None:
        """Replacing a file by a new one must not leave an empty file after a crash."""
        if not any(f.writer is not None and f.writer.unsynced for f in self.files):
            return
        try:
            source: Attr = await self.meta.call(m.Lookup(src_parent, src_name))
            file = self.files.get(source.inode)
            if file is None or file.writer is None or not file.writer.unsynced:
                return
            await self.meta.call(m.Lookup(dst_parent, dst_name))
        except ReplyError:
            return  # nothing is replaced
        await file.writer.fsync()

    async def readlink(self, inode: int) -> bytes:
        """A symbolic link's target."""
        target: bytes = await self.meta.call(m.ReadLink(inode))
        return target

    def opendir(self, inode: int) -> Directory:
        """Begin to list a directory."""
        return Directory(inode, self.meta)

    # --- attributes

    async def getattr(self, inode: int) -> Attr:
        """The node's attributes."""
        if inode == MASTERINFO_INODE:
            return self._masterinfo_attr()
        return self.files.saw(await self.meta.call(m.GetAttr(inode)))

    async def setattr(self, op: ops.SetAttr) -> Attr:
        """Change mode, owner, times. What was written before is committed before."""
        await self.contents.settle(op.inode)
        return self.files.saw(await self.meta.mutate(op))

    async def statfs(self) -> m.FsStat:
        """Space and nodes of the whole cluster."""
        found: m.FsStat = await self.meta.call(m.StatFs())
        return found

    # --- the file that tells tools about this mount

    def masterinfo(self) -> bytes:
        """One line of JSON: how the mfs* tools reach the masters of the path they are given."""
        info = {
            "masters": [f"{host}:{port}" for host, port in self.settings.masters],
            "cluster": self.registered.cluster.hex(),
            "session": self.meta.session.number,
            "root": self.root,
            "mountpoint": self.settings.mountpoint,
        }
        return json.dumps(info).encode() + b"\n"

    def _masterinfo_attr(self) -> Attr:
        now = time.time_ns()
        length = len(self.masterinfo())
        return Attr(MASTERINFO_INODE, NodeType.FILE, 0o444, 0, 0, now, now, now, 1, length, 0, 1)

    def _not_ours(self, parent: int, name: bytes) -> None:
        if name == MASTERINFO and parent == self.root:
            raise DeniedError(EPERM, ".masterinfo cannot be changed")
