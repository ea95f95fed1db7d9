"""HTTP: `/` a page for people, `/api/status` JSON, `/metrics` for Prometheus.

Every replica serves its own view, leader or not, and nothing here changes anything. The full
monitor of the classic kind (charts, operations, mounts) is a later chapter.
"""

import contextlib
import html
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from aiohttp import web

from raftfs.cli.disks import disk_object
from raftfs.errors import UserError
from raftfs.units import format_size
from raftfs.wire.messages import ReplicaStatus

Status = Callable[[], ReplicaStatus]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5">
<title>raftfs: {name}</title>
<style>
 body {{ font-family: system-ui, sans-serif; margin: 2rem; max-width: 60rem }}
 table {{ border-collapse: collapse; margin: 1rem 0 }}
 td, th {{ border: 1px solid #bbb; padding: .3rem .7rem; text-align: left }}
 th {{ background: #eee }}
</style></head><body>
<h1>raftfs master {name}</h1>
{tables}
</body></html>
"""


def status_object(status: ReplicaStatus) -> dict[str, Any]:
    """A replica's status as plain JSON values; identities and digests as hexadecimal digits."""
    return {
        "name": status.name,
        "cluster": status.cluster.hex(),
        "role": status.role,
        "leader": {
            "term": status.leader.term,
            "name": status.leader.name,
            "clients": status.leader.clients,
        },
        "applied": status.applied,
        "committed": status.committed,
        "last_index": status.last_index,
        "checkpoint": status.checkpoint,
        "digest": status.digest.hex(),
        "digest_index": status.digest_index,
        "peers": [{"name": name, "connected": up} for name, up in status.peers],
        "servers": [
            {
                "server": s.server.hex(), "address": f"{s.host}:{s.port}", "total": s.total,
                "used": s.used, "chunks": s.chunks, "connected": s.connected,
                "disks": [disk_object(d) for d in s.disks],
            }
            for s in status.servers
        ],
        "sessions": status.sessions,
        "nodes": status.nodes,
        "chunks": status.chunks,
        "undergoal": status.undergoal,
        "missing": status.missing,
    }  # fmt: skip


def metrics_text(status: ReplicaStatus, figures: Mapping[str, float]) -> str:
    """The replica's numbers in Prometheus' text format. A counter's name ends with `_total`."""
    disks = [d for s in status.servers if s.connected for d in s.disks]
    gauges = {
        "raftfs_is_leader": int(status.role == "leader"),
        "raftfs_term": status.leader.term,
        "raftfs_applied_index": status.applied,
        "raftfs_committed_index": status.committed,
        "raftfs_checkpoint_index": status.checkpoint,
        "raftfs_peers_connected": sum(up for _, up in status.peers),
        "raftfs_chunkservers_connected": sum(s.connected for s in status.servers),
        "raftfs_space_total_bytes": sum(s.total for s in status.servers if s.connected),
        "raftfs_space_used_bytes": sum(s.used for s in status.servers if s.connected),
        "raftfs_disks_damaged": sum(d.state == "damaged" for d in disks),
        "raftfs_copies_damaged": sum(d.damaged for d in disks),
        "raftfs_quarantined_files": sum(d.quarantined for d in disks),
        "raftfs_scrub_longest_cycle_seconds": max(
            (d.scrub.last_ended - d.scrub.last_began for d in disks), default=0
        ),
        "raftfs_sessions": status.sessions,
        "raftfs_nodes": status.nodes,
        "raftfs_chunks": status.chunks,
        "raftfs_chunks_undergoal": status.undergoal,
        "raftfs_chunks_missing": status.missing,
        **figures,
    }
    return "".join(
        f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}\n{name} {value}\n"
        for name, value in gauges.items()
    )


def page(status: ReplicaStatus) -> str:
    """The page for people."""
    facts = [
        ("role", status.role),
        ("leader", status.leader.name or "none known"),
        ("term", str(status.leader.term)),
        ("applied / committed index", f"{status.applied} / {status.committed}"),
        ("nodes, chunks", f"{status.nodes}, {status.chunks}"),
        ("chunks under goal, missing", f"{status.undergoal}, {status.missing}"),
        ("sessions", str(status.sessions)),
        ("digest", status.digest.hex()),
    ]
    peers = [("peer", "connected"), *((name, "yes" if up else "no") for name, up in status.peers)]
    servers = [
        ("chunkserver", "address", "used", "total", "copies", "connected"),
        *(
            (s.server.hex(), f"{s.host}:{s.port}", format_size(s.used), format_size(s.total),
             str(s.chunks), "yes" if s.connected else "no")
            for s in status.servers
        ),
    ]  # fmt: skip
    groups: list[list[tuple[str, ...]]] = [[("", ""), *facts], [*peers], [*servers]]
    tables = "".join(map(_table, groups))
    return _PAGE.format(name=html.escape(status.name), tables=tables)


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = []
    for at, row in enumerate(rows):
        cell = "td" if at else "th"
        lines.append("".join(f"<{cell}>{html.escape(c)}</{cell}>" for c in row))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


@contextlib.asynccontextmanager
async def serving(
    status: Status, host: str, port: int, figures: Callable[[], Mapping[str, float]] = dict
) -> AsyncIterator[None]:
    """Serve the monitor while the context is open; `figures` are further numbers for `/metrics`.
    UserError if the port cannot be had.
    """

    async def show(request: web.Request) -> web.Response:
        return web.Response(text=page(status()), content_type="text/html")

    async def api(request: web.Request) -> web.Response:
        return web.json_response(status_object(status()))

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text=metrics_text(status(), figures()), content_type="text/plain")

    app = web.Application()
    app.add_routes([
        web.get("/", show), web.get("/api/status", api), web.get("/metrics", metrics),
    ])  # fmt: skip
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as e:
            raise UserError(
                f"cannot listen on {host}:{port} (web monitor): {e.strerror}; "
                "is another master running?"
            ) from None
        yield
    finally:
        await runner.cleanup()
