"""Bad networks between masters, and between clients and masters: nothing is lost, nothing is stale.

    python -m chaos.partition                        # toxiproxy: slow, thin, cut up, broken links
    python -m chaos.partition --namespaces           # nftables: partitions of every shape; pauses
    python -m chaos.partition --faults followers,pause,mix --seconds 5 --seed 7

Masters, chunkservers and two mounts are machines of their own (network namespaces; needs root). On
both mounts clients work on the same few names and writers write files, while the faults come one
after the other (`chaos.linkfaults` says what each is). Afterwards no client may have seen an error,
everything acknowledged as fsynced or closed must be there and equal, all masters must have the same
digest, and the history of operations must be linearizable (`chaos.linear`). Exit status 2: this
machine cannot do it.
"""

import argparse
import os
import random
import shlex
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from chaos import network, toxics
from chaos.history import DIRECTORIES, Clients, done_between, longest_stall_s, strange
from chaos.linear import Operation, check
from chaos.linkfaults import DEPOSING, NAMESPACE_FAULTS, TOXIC_FAULTS, Stage, fault
from chaos.netcluster import CHUNKSERVERS, MASTERS, MOUNTS, NetCluster
from chaos.network import Network
from chaos.toxics import Toxics
from chaos.writers import Writers, acknowledged, errors, longest_pause_s, verify

READERS = {"r"}  # the mount on which nobody changes anything
_CALM_S = 1.5  # after each fault
_DIGEST_S = 30.0


class Row(NamedTuple):
    """What one fault did."""

    name: str
    said: str
    since: float
    until: float
    elections: int
    met: int  # packets lost, or bytes sent to poisoned links


def parser() -> argparse.ArgumentParser:
    """Options of the story."""
    p = argparse.ArgumentParser(prog="partition", description=__doc__.splitlines()[0])
    p.add_argument("--dir", type=Path, help="where to work (default: a new temporary folder)")
    p.add_argument("--seconds", type=float, default=3.0, help="that each fault lasts")
    p.add_argument("--rounds", type=int, default=1, help="of all faults, in another order each")
    p.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    p.add_argument("--namespaces", action="store_true", help=f"of {','.join(NAMESPACE_FAULTS)}")
    p.add_argument("--faults", help=f"some of these, or of {','.join(TOXIC_FAULTS)}")
    p.add_argument("--clients", type=int, default=3, help="per mount (default: %(default)s)")
    p.add_argument("--master", type=shlex.split, metavar="'-m MODULE ...'",
                   help="let Python run this as masters: does the story find broken ones?")
    p.add_argument("--keep", action="store_true", help="keep data, records and logs")
    return p  # fmt: skip


def chosen(args: argparse.Namespace) -> list[str]:
    """The faults that are asked for. ValueError with a sentence."""
    if not args.faults:
        return list(NAMESPACE_FAULTS if args.namespaces else TOXIC_FAULTS)
    faults: list[str] = args.faults.split(",")
    unknown = set(faults) - {*NAMESPACE_FAULTS, *TOXIC_FAULTS}
    if unknown:
        raise ValueError(
            f"--faults: {','.join(sorted(unknown))} is none of "
            f"{','.join([*NAMESPACE_FAULTS, *TOXIC_FAULTS])}"
        )
    return faults


def story(args: argparse.Namespace, faults: list[str], folder: Path) -> int:
    """Tell it; gives the exit status."""
    print(f"seed {args.seed}")
    chance = random.Random(args.seed)
    with ExitStack() as stack:
        net = stack.enter_context(Network([*MASTERS, *CHUNKSERVERS, *MOUNTS]))
        poison = None
        if set(faults) & set(TOXIC_FAULTS):
            poison = stack.enter_context(Toxics(net, folder / "toxiproxy.log"))
        cluster = stack.enter_context(NetCluster(folder, net, args.master))
        for name in (*DIRECTORIES, *MOUNTS):
            (cluster.root("a") / name).mkdir()
        clients = Clients(
            {m: cluster.root(m) for m in MOUNTS}, READERS, folder / "records", args.clients,
            args.seed,
        )  # fmt: skip
        writers = [Writers(cluster.root(m) / m, folder / "records" / m, 1, args.seed + n)
                   for n, m in enumerate(MOUNTS) if m not in READERS]  # fmt: skip
        rows = work(Stage(cluster, poison, chance), args, faults, clients, writers)
        problems = [*clients.crashes(), *(c for w in writers for c in w.crashes())]
        problems += same_digests(cluster)
        for mount in MOUNTS:
            cluster.remount(mount)
        return judge(rows, clients.history(), [one for w in writers for one in w.lines()], problems)


def work(
    stage: Stage, args: argparse.Namespace, faults: list[str], clients: Clients,
    writers: list[Writers],
) -> list[Row]:  # fmt: skip
    """All faults under load."""
    rows = []
    for group in (clients, *writers):
        group.start()
    time.sleep(2.0)
    for number in range(args.rounds):
        if number:
            stage.chance.shuffle(faults)
        rows += [suffer(name, stage, args.seconds) for name in faults]
    for group in (clients, *writers):
        group.stop()
    return rows


def suffer(name: str, stage: Stage, seconds: float) -> Row:
    """One fault, and the calm after it."""
    leader, term = stage.cluster.leader()
    lost, since = stage.cluster.network.lost(), time.monotonic()
    with fault(name, stage, leader) as said:
        time.sleep(max(0.0, seconds - (time.monotonic() - since)))
        met = stage.toxics.met() if stage.toxics is not None else 0
    until = time.monotonic()
    met += stage.cluster.network.lost() - lost
    time.sleep(_CALM_S)
    return Row(name, said, since, until, stage.cluster.leader()[1] - term, met)


def same_digests(cluster: NetCluster) -> list[str]:
    """After the last operation all masters make a checkpoint at one entry: the same state?"""
    until = time.monotonic() + _DIGEST_S
    while True:
        views = [cluster.view(name) for name in MASTERS]
        found = {(v["digest_index"], v["digest"], v["applied"]) if v else None for v in views}
        if len(found) == 1 and None not in found and views[0] and views[0]["digest_index"]:
            print(f"digests equal at entry {views[0]['digest_index']}")
            return []
        if time.monotonic() > until:
            return [f"the masters do not come to the same state: {found}"]
        time.sleep(0.2)


def judge(
    rows: list[Row], history: list[Operation], files: list[list[dict]], problems: list[str]
) -> int:
    """Print what happened; 0 only if nothing was lost or stale, nobody saw an error, and every
    fault hit.
    """
    print(f"{'fault':28} {'operations':>10} {'stall ms':>9} {'elections':>9} {'met':>10}  of")
    for row in rows:
        done = done_between(history, row.since, row.until + _CALM_S)
        stall_s = longest_stall_s(history, row.since, row.until)
        stall_s = max(stall_s, *(longest_pause_s(one, row.since, row.until) for one in files))
        print(f"{row.name:28} {done:10} {1000 * stall_s:9.0f} {row.elections:9} {row.met:10}  "
              f"{row.said}")  # fmt: skip
        if not done_between(history, row.since - 1.0, row.since) or not done:
            problems.append(f"{row.name}: nobody was working, it proves nothing")
        if row.name != "pause" and not row.met:
            problems.append(f"{row.name}: the fault met no packet, it proves nothing")
        if row.name in DEPOSING and not row.elections:
            problems.append(f"{row.name}: the leader stayed the leader")
    problems += strange(history)
    problems += [e for one in files for e in errors(one)]
    problems += [p for one in files for p in verify(one)]
    violation = check(history, DIRECTORIES)
    if violation is not None:
        problems.append(str(violation))
    unknown = sum(op.unknown for op in history)
    print(f"{len(history)} operations in the history, {unknown} without an answer: "
          f"{'NOT linearizable' if violation else 'linearizable'}")  # fmt: skip
    print(f"{sum(len(acknowledged(one)) for one in files)} files acknowledged")
    for line in problems[:20]:
        print(f"PROBLEM {line}", file=sys.stderr)
    print("LOST OR WRONG" if problems else "nothing lost, nothing stale, no error seen")
    return 1 if problems else 0


def main() -> int:
    """Run the story in a folder of its own."""
    args = parser().parse_args()
    try:
        faults = chosen(args)
    except ValueError as e:
        print(f"partition: {e}", file=sys.stderr)
        return 2
    why = network.missing()
    if not why and set(faults) & set(TOXIC_FAULTS):
        why = toxics.missing()
    if why:
        print(f"partition: this machine cannot do it: {why}", file=sys.stderr)
        return 2
    if args.dir is not None or args.keep:
        folder = args.dir or Path(tempfile.mkdtemp(prefix="raftfs-partition-"))
        folder.mkdir(parents=True, exist_ok=True)
        print(f"in {folder}")
        return story(args, faults, folder.absolute())
    with tempfile.TemporaryDirectory(prefix="raftfs-partition-") as temporary:
        return story(args, faults, Path(temporary))


if __name__ == "__main__":
    raise SystemExit(main())
