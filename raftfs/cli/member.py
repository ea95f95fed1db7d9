"""`raftfs member` and `raftfs leader`: which masters there are, and who leads.

Whoever changes something proves the cluster key; looking needs none.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

from raftfs import log as logging_setup
from raftfs.cli.admin import TIMEOUT_S, act, add_options, sentence
from raftfs.cli.target import default_masters
from raftfs.client.meta import ToolClient, connect_tool, parse_masters
from raftfs.errors import RaftfsError, ReplyError, UserError
from raftfs.meta.master import parse_peer
from raftfs.wire import messages as m

_LOOK_S = 0.2


def parser() -> argparse.ArgumentParser:
    """The command line of `raftfs member`."""
    p = argparse.ArgumentParser(
        prog="raftfs member", description="The masters of a cluster: list, add, remove, replace."
    )
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_options(actions.add_parser("list", help="the masters and those that wait to become one"))
    add = actions.add_parser("add", help="let a master vote that was started with --join")
    remove = actions.add_parser("remove", help="let a master vote no more")
    replace = actions.add_parser(
        "replace", help="one master for another: NEW is added, then OLD removed; without NEW, wait "
        "until OLD, started with --replace, has its place again",
    )  # fmt: skip
    for sub in (add, remove):
        sub.add_argument("name", help="the master as host[:Raft port]")
    replace.add_argument("old", help="the master that goes")
    replace.add_argument("new", nargs="?", help="the master that was started with --join")
    for sub in (add, remove, replace):
        add_options(sub)
    return p


def leader_parser() -> argparse.ArgumentParser:
    """The command line of `raftfs leader`."""
    p = argparse.ArgumentParser(prog="raftfs leader", description="Who leads.")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_options(actions.add_parser("show", help="the leader"))
    transfer = actions.add_parser("transfer", help="let another master lead")
    transfer.add_argument("name", nargs="?", default="",
                          help="host[:Raft port] (default: the most advanced)")  # fmt: skip
    add_options(transfer)
    return p


def main(argv: list[str] | None = None) -> int:
    """`raftfs member`. Returns the exit status."""
    args = parser().parse_args(argv)
    actions: dict[str, Callable[[ToolClient, argparse.Namespace], str]] = {
        "list": lambda client, a: _listed(_members(client), a.json),
        "add": lambda client, a: act(client, a, m.AddMember(parse_peer(a.name))),
        "remove": lambda client, a: act(client, a, m.RemoveMember(parse_peer(a.name))),
        "replace": _replace,
    }
    return _run("raftfs member", args, actions[args.action])


def main_leader(argv: list[str] | None = None) -> int:
    """`raftfs leader`. Returns the exit status."""
    args = leader_parser().parse_args(argv)
    if args.action == "show":
        return _run("raftfs leader", args, lambda client, a: _leader(client))
    return _run("raftfs leader", args, _transfer)


def _run(
    program: str, args: argparse.Namespace, action: Callable[[ToolClient, argparse.Namespace], str]
) -> int:
    logging_setup.setup(program.replace(" ", "-"), level="error")
    try:
        masters = args.masters or default_masters(None)
        with connect_tool(parse_masters(masters), timeout_s=TIMEOUT_S) as client:
            print(action(client, args))
    except ReplyError as e:
        print(f"{program}: {sentence(e)}", file=sys.stderr)
        return 1
    except RaftfsError as e:
        print(f"{program}: {e}", file=sys.stderr)
        return 1
    return 0


def _members(client: ToolClient) -> list[m.MemberStatus]:
    found: list[m.MemberStatus] = client.call(m.ListMembers())
    return found


def _listed(members: list[m.MemberStatus], as_json: bool) -> str:
    if as_json:
        return json.dumps([{
            "name": x.name, "identity": x.uuid.hex(), "role": x.role, "connected": x.connected,
            "behind": x.behind if x.behind >= 0 else None,
        } for x in members], indent=1)  # fmt: skip
    width = max(len(x.name) for x in members)
    return "\n".join(
        f"{x.name:{width}}  {x.role:7}  {'up  ' if x.connected else 'down'}  "
        f"{'' if x.behind < 0 else f'{x.behind} entries behind'}".rstrip()
        for x in members
    )


def _leader(client: ToolClient) -> str:
    leading = [x.name for x in _members(client) if x.role == "leader"]
    return leading[0] if leading else "nobody"


def _transfer(client: ToolClient, args: argparse.Namespace) -> str:
    name = parse_peer(args.name) if args.name else ""
    return act(client, args, m.TransferLeader(name))


def _replace(client: ToolClient, args: argparse.Namespace) -> str:
    old, new = parse_peer(args.old), parse_peer(args.new or args.old)
    if old != new:
        first = act(client, args, m.AddMember(new))
        return f"{first}\n{act(client, args, m.RemoveMember(old))}"
    before = {x.name: x.uuid for x in _members(client) if x.role != "joining"}
    if old not in before:
        raise UserError(f"{old} is no master: they are {','.join(sorted(before))}")
    until = time.monotonic() + TIMEOUT_S
    while True:
        (now,) = [x for x in _members(client) if x.name == old and x.role != "joining"]
        if now.uuid != before[old] and now.connected:
            return f"{old} votes again, with a new identity"
        if time.monotonic() > until:
            raise UserError(
                f"{old} did not come back within {TIMEOUT_S:.0f} s: start it on an empty folder "
                "with `raftfs-master --replace`"
            )
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    raise SystemExit(main())
