"""`raftfs-master`: options and start-up of one master replica."""

import argparse
import socket
from pathlib import Path

from raftfs import daemon
from raftfs.cli.monitor import web
from raftfs.conf import exports
from raftfs.const import KEPT_LOG_BYTES, MIB, TICKET_LIFETIME_S
from raftfs.errors import UserError
from raftfs.meta.bootstrap import bootstrap
from raftfs.meta.healer import HealingConfig
from raftfs.meta.master import Master, MasterConfig, checkpoint_limits, parse_peer
from raftfs.wire.auth import ClusterKey

WEB = 7  # the web monitor's port, counted from the Raft port


def parser() -> argparse.ArgumentParser:
    """The command line of `raftfs-master`."""
    p = argparse.ArgumentParser(
        prog="raftfs-master",
        description="One replica of the raftfs metadata master.",
        epilog="Ports, counted from this replica's port P in --peers (default 9418): P Raft, "
        "P+2 chunkservers, P+3 clients, P+7 web monitor.",
    )
    p.add_argument("--peers", required=True, metavar="A,B,C",
                   help="all replicas, this one included, as host[:port]; one or at least three")
    p.add_argument("--name", help="which of --peers this replica is (default: found by host name)")
    p.add_argument("--data", type=Path, default=Path("/var/lib/raftfs/master"), metavar="DIR",
                   help="folder of journal and state (default: %(default)s)")
    p.add_argument("--key", type=Path, default=Path("/etc/raftfs/cluster.key"), metavar="FILE",
                   help="the cluster key (default: %(default)s)")
    p.add_argument("--exports", type=Path, metavar="FILE",
                   help="mfsexports.cfg (default: everybody may mount read-write)")
    p.add_argument("--listen", default="0.0.0.0", metavar="ADDRESS",
                   help="address of the chunkservers' and clients' ports (default: %(default)s)")
    p.add_argument("--keep-log-mib", type=int, default=KEPT_LOG_BYTES // MIB, metavar="MIB",
                   help="log kept on the disk for metaloggers that were away: one that was away "
                   "for longer has a hole in its changelogs (default: %(default)s)")
    joining = p.add_mutually_exclusive_group()
    joining.add_argument("--replace", action="store_true",
                         help="this replica lost its data: join with a new identity as a learner, "
                         "and vote again once it has caught up")
    joining.add_argument("--join", action="store_true",
                         help="a new replica: come as a learner, and vote after `raftfs member "
                         "add`")
    joining.add_argument("--bootstrap", type=Path, metavar="IMAGE",
                         help="on empty folders of all masters: begin a new cluster with the "
                         "metadata of an image (of mfsmetarestore or a metalogger)")
    healing = HealingConfig()
    p.add_argument("--disconnect-delay", type=float, default=healing.disconnect_delay_s,
                   metavar="S", help="seconds to wait for a lost chunkserver before chunks with "
                   "several copies left are replicated (default: %(default)s)")
    p.add_argument("--orphan-delay", type=float, default=healing.orphan_delay_s, metavar="S",
                   help="seconds that copies which no file owns are kept (default: %(default)s)")
    p.add_argument("--ticket-lifetime", type=float, default=TICKET_LIFETIME_S, metavar="S",
                   help="seconds that a client may use a chunk before it asks again (default: "
                   "%(default)s)")
    p.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return p  # fmt: skip


def configure(args: argparse.Namespace) -> MasterConfig:
    """Check the options against one another. UserError names what is wrong."""
    peers = tuple(parse_peer(item) for item in args.peers.split(",") if item.strip())
    if not peers:
        raise UserError("--peers names no replica: give host[:port] of each, separated by commas")
    if len(set(peers)) != len(peers):
        raise UserError(f"--peers names a replica twice: {args.peers}")
    name = parse_peer(args.name) if args.name else _find_myself(peers)
    if name not in peers:
        raise UserError(f"--name {name} is not among --peers {','.join(peers)}")
    lines = exports.parse_file(args.exports) if args.exports else exports.default_lines()
    if args.keep_log_mib < 1:
        raise UserError(f"--keep-log-mib {args.keep_log_mib}: must be at least 1")
    if not 1.0 <= args.ticket_lifetime <= 86_400.0:
        raise UserError(f"--ticket-lifetime {args.ticket_lifetime:g}: must be from 1 to 86400")
    healing = HealingConfig(
        disconnect_delay_s=args.disconnect_delay, orphan_delay_s=args.orphan_delay
    )
    return MasterConfig(
        name, peers, args.data, args.listen, args.replace or args.join, tuple(lines),
        healing, checkpoint_limits(args.keep_log_mib * MIB), args.bootstrap is not None,
        args.ticket_lifetime,
    )


def _find_myself(peers: tuple[str, ...]) -> str:
    """The only peer, or the one whose host is this machine's name."""
    if len(peers) == 1:
        return peers[0]
    mine = {socket.gethostname(), socket.getfqdn()}
    found = [p for p in peers if p.rpartition(":")[0] in mine]
    if len(found) != 1:
        raise UserError(
            f"cannot tell which of --peers {','.join(peers)} this replica is: add --name host:port"
        )
    return found[0]


def main(argv: list[str] | None = None) -> int:
    """Run a master until it is stopped. Returns the exit status."""
    args = parser().parse_args(argv)

    async def serve(stop: daemon.Stop) -> None:
        config = configure(args)
        key = ClusterKey.load(args.key)
        with daemon.data_folder(config.data_dir):
            if args.bootstrap is not None:
                bootstrap(args.bootstrap, config.data_dir, config.name)
            master = Master(config, key)
            async with web.serving(
                master.status, config.listen, config.port + WEB, master.figures
            ):
                await master.run(stop)

    return daemon.run("raftfs-master", serve, level=args.log_level)


if __name__ == "__main__":
    raise SystemExit(main())
