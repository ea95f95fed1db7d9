"""mfsrsetgoal: the old name of `mfssetgoal -r`."""

import os

from raftfs.cli import goal


def main(argv: list[str] | None = None) -> int:
    """Run the tool. Returns the exit status."""
    goal.deprecated("mfsrsetgoal", "mfssetgoal")
    return goal.set_main("mfsrsetgoal", argv, os.getuid(), recursive=True)


if __name__ == "__main__":
    raise SystemExit(main())
