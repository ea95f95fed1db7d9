"""mfsrgetgoal: the old name of `mfsgetgoal -r`."""

from raftfs.cli import goal


def main(argv: list[str] | None = None) -> int:
    """Run the tool. Returns the exit status."""
    goal.deprecated("mfsrgetgoal", "mfsgetgoal")
    return goal.get_main("mfsrgetgoal", argv, recursive=True)


if __name__ == "__main__":
    raise SystemExit(main())
