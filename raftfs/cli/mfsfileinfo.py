"""mfsfileinfo: the chunks of a file and where their copies are.

The checksum digest of a copy is the MD5 of its blocks' CRC32s (big-endian, up to the last written
block), the signature of a file that of all its chunks' CRC32s one after another: equal contents
give equal ones, whichever copies are asked.
"""

from raftfs.cli import output
from raftfs.cli.chunkinfo import block_crcs, chunks, copies_table, digest
from raftfs.cli.target import for_each
from raftfs.client.chunk import ChunkPool
from raftfs.client.meta import ToolClient
from raftfs.errors import LinkError, ReplyError
from raftfs.wire import messages as m

USAGE = """show the chunks of files and where their copies are

usage: mfsfileinfo [-qcs] [--json] name [name ...]
switches:
 -q - only the number of chunks by number of valid copies
 -c - ask the chunkservers for checksums of the copies
 -s - show a signature of the file, made of the checksums"""


def main(argv: list[str] | None = None) -> int:
    """Run the tool. Returns the exit status."""
    try:
        found, names = output.options("mfsfileinfo", argv, "qcs")
        if not names:
            raise output.Usage
    except output.Usage:
        return output.usage(USAGE)
    answers: dict[str, object] = {}
    pool = ChunkPool()

    def show(client: ToolClient, name: str, inode: int) -> None:
        if "--json" in found:
            answers[name] = [_as_json(chunk) for chunk in chunks(client, inode)]
        elif "-q" in found:
            counts = copies_table(client, inode)
            print("\n".join([f"{name}:", *output.counts_by_copies(counts, "n")]))
        else:
            _show(client, pool, name, inode, checksums="-c" in found, sign="-s" in found)

    status = for_each(names, show)
    pool.close()
    if "--json" in found:
        output.print_json(answers)
    return status


def _as_json(chunk: m.FileChunk) -> dict[str, object]:
    return {
        "index": chunk.index, "id": chunk.chunk, "version": chunk.version,
        "copies": [
            {"server": c.server.hex(), "address": f"{c.host}:{c.port}", "version": c.version}
            for c in chunk.copies
        ],
    }  # fmt: skip


def _show(
    client: ToolClient, pool: ChunkPool, name: str, inode: int, *, checksums: bool, sign: bool
) -> None:
    found = list(chunks(client, inode))
    print(f"{name}:")
    if not found:
        print("\tno chunks - empty file")
    signature = b""
    for chunk in found:
        if not chunk.chunk:
            print(f"\tchunk {chunk.index}: empty")
            continue
        print(f"\tchunk {chunk.index}: {chunk.chunk:016X}_{chunk.version:08X} / "
              f"(id:{chunk.chunk} ver:{chunk.version})")  # fmt: skip
        asked = chunk.copies if checksums or sign else []
        crcs = [_crcs(pool, chunk, copy) for copy in asked]
        for number, copy in enumerate(chunk.copies, 1):
            detail = _detail(crcs[number - 1]) if checksums else ""
            print(f"\t\tcopy {number}: {copy.host}:{copy.port} (status:VALID{detail})")
        if not chunk.copies:
            print("\t\tno valid copies !!!")
        signature += next((c for c in crcs if c is not None), b"")
    if sign:
        print(f"{name} signature: {digest(signature)}")


def _crcs(pool: ChunkPool, chunk: m.FileChunk, copy: m.Location) -> bytes | None:
    try:
        return block_crcs(pool, chunk, copy)
    except (LinkError, ReplyError):
        return None  # shown as such: the copy does not answer


def _detail(crcs: bytes | None) -> str:
    if crcs is None:
        return " ; no answer"
    return f" ; blocks: {len(crcs) // 4} ; checksum digest: {digest(crcs)}"


if __name__ == "__main__":
    raise SystemExit(main())
