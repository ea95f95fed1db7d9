"""What the four goal tools share: reading and changing goals of names given on the command line."""

import sys

from raftfs.cli import output
from raftfs.cli.target import for_each
from raftfs.client.meta import ToolClient
from raftfs.const import GOAL_MAX, GOAL_MIN
from raftfs.wire import messages as m
from raftfs.wire.ops import GoalCounts

_MODES = {"": 0, "+": 1, "-": 2}

GET_USAGE = f"""show the goal (wanted number of copies) of files and directories

usage: {{program}} [-nhHkmgr] [--json] name [name ...]
{output.NUMBER_HELP}
 -r - count the goals of everything below a directory"""

SET_USAGE = f"""change the goal (wanted number of copies) of files and directories

usage: {{program}} [-nhHkmgr] [--json] GOAL[-|+] name [name ...]
{output.NUMBER_HELP}
 -r - everything below a directory too
 GOAL+ - only raise goals that are lower
 GOAL- - only lower goals that are higher
 GOAL - set it, {GOAL_MIN} to {GOAL_MAX}; files made in a directory later inherit its goal"""


def parse_goal(text: str) -> tuple[int, int] | None:
    """`3`, `3+` or `3-` as goal and mode of `ops.SetGoal`; None for anything else."""
    sign = text[-1:] if text[-1:] in ("+", "-") else ""
    digits = text[: len(text) - len(sign)]
    if not (digits.isascii() and digits.isdigit() and GOAL_MIN <= int(digits) <= GOAL_MAX):
        return None
    return int(digits), _MODES[sign]


def deprecated(program: str, instead: str) -> None:
    """The notice of the old -r tools."""
    print(f'deprecated tool - use "{instead} -r"', file=sys.stderr)


def get_main(program: str, argv: list[str] | None, *, recursive: bool = False) -> int:
    """mfsgetgoal, mfsrgetgoal. Returns the exit status."""
    try:
        found, names = output.options(program, argv, output.NUMBER_OPTIONS + "r")
        if not names:
            raise output.Usage
    except output.Usage:
        return output.usage(GET_USAGE.format(program=program))
    style, deep = output.number_format(found), recursive or "-r" in found
    answers: dict[str, object] = {}

    def show(client: ToolClient, name: str, inode: int) -> None:
        table: m.GoalTable = client.call(m.GetGoal(inode, deep))
        if "--json" in found:
            answers[name] = {"files": table.files, "directories": table.dirs}
        elif deep:
            print(f"{name}:")
            for what, counts in (("files", table.files), ("directories", table.dirs)):
                for goal, count in sorted(counts.items()):
                    label = f" {what} with goal".ljust(22)
                    print(f"{label}{goal:11} : {output.number(count, style)}")
        else:
            (goal,) = (*table.files, *table.dirs)
            print(f"{name}: {goal}")

    status = for_each(names, show)
    if "--json" in found:
        output.print_json(answers)
    return status


def set_main(
    program: str, argv: list[str] | None, uid: int, *, recursive: bool = False
) -> int:
    """mfssetgoal, mfsrsetgoal, as user `uid`. Returns the exit status."""
    try:
        found, words = output.options(program, argv, output.NUMBER_OPTIONS + "r")
        if words:
            parsed = parse_goal(words[0])
            if parsed is None:
                print(f"{words[0]}: wrong goal definition", flush=True)
        if len(words) < 2 or parsed is None:
            raise output.Usage
    except output.Usage:
        return output.usage(SET_USAGE.format(program=program))
    (goal, mode), names = parsed, words[1:]
    style, deep = output.number_format(found), recursive or "-r" in found
    answers: dict[str, object] = {}
    refused = False

    def change(client: ToolClient, name: str, inode: int) -> None:
        nonlocal refused
        counts: GoalCounts = client.call(m.SetGoalTree(inode, uid, goal, mode, deep))
        if "--json" in found:
            answers[name] = {
                "changed": counts.changed, "unchanged": counts.unchanged, "denied": counts.denied,
            }  # fmt: skip
        elif deep:
            print(f"{name}:")
            for what, count in (
                ("inodes with goal changed:", counts.changed),
                ("inodes with goal not changed:", counts.unchanged),
                ("inodes with permission denied:", counts.denied),
            ):
                print(f" {what}".ljust(40) + output.number(count, style))
        elif counts.denied:
            refused = True
            print(f"{name}: Operation not permitted")
        else:
            # A plain GOAL is reported as set even where it was so already, as the classic does.
            told = counts.changed or mode == 0
            print(f"{name}: goal: {goal}" if told else f"{name}: goal not changed")

    status = for_each(names, change)
    if "--json" in found:
        output.print_json(answers)
    return 1 if refused else status
