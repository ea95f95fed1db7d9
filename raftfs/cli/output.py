"""Options and numbers as the classic tools have them."""

import getopt
import json
import os
import sys
from collections.abc import Callable
from typing import Any

_UNITS = {"k": (1024, "kibi"), "m": (1024**2, "mebi"), "g": (1024**3, "gibi")}
NUMBER_OPTIONS = "nhHkmg"
# MFSHRFORMAT: 0 plain, 1 or h base 2, 2 or H base 10; 3, h+, 4, H+ are taken as the same
_ENVIRONMENT = {"1": "h", "h": "h", "3": "h", "h+": "h", "2": "H", "H": "H", "4": "H", "H+": "H"}

NUMBER_HELP = """\
 -n - plain numbers
 -h - numbers for people, with prefixes of base 2 (Ki, Mi, ...)
 -H - numbers for people, with prefixes of base 10 (k, M, ...)
 -k - numbers in kibis (1024)
 -m - numbers in mebis (1024^2)
 -g - numbers in gibis (1024^3)"""


class Usage(Exception):
    """Wrong usage: the tool prints how it is used, on stderr, and exits with 1."""


def options(program: str, argv: list[str] | None, short: str) -> tuple[dict[str, str], list[str]]:
    """Options and the rest of the words. Usage if an option is not known, with a line on stderr."""
    words = sys.argv[1:] if argv is None else argv
    try:
        found, rest = getopt.gnu_getopt(words, short, ["json"])
    except getopt.GetoptError as e:
        print(f"{program}: invalid option -- '{e.opt}'", file=sys.stderr)
        raise Usage from None
    return dict(found), rest


def number_format(found: dict[str, str]) -> str:
    """Which of `NUMBER_OPTIONS` applies: the option given, else the environment, else plain."""
    for letter in NUMBER_OPTIONS:
        if f"-{letter}" in found:
            return letter
    return _ENVIRONMENT.get(os.environ.get("MFSHRFORMAT", ""), "n")


def number(value: int, style: str, width: int = 10) -> str:
    """A number right-justified in the style of one of `NUMBER_OPTIONS`."""
    if style in _UNITS:
        text = str(-(-value // _UNITS[style][0]))
    elif style in "hH":
        step, marks = (1024, "KMGTPE") if style == "h" else (1000, "kMGTPE")
        text, scaled = str(value), float(value)
        for mark in marks:
            if scaled < step:
                break
            scaled /= step
            text = f"{scaled:.1f}{mark}{'i' if style == 'h' else ''}"
    else:
        text = str(value)
    return text.rjust(width)


def counts_by_copies(counts: dict[int, int], style: str) -> list[str]:
    """` chunks with N copies:  n` for every N that occurs; ten and more are one line."""
    merged: dict[str, int] = {}
    for copies, chunks in sorted(counts.items()):
        label = str(copies) if copies < 10 else "10+"
        merged[label] = merged.get(label, 0) + chunks
    return [
        f" chunks with {label} {'copy' if label == '1' else 'copies'}:".ljust(24)
        + number(chunks, style, 11)
        for label, chunks in merged.items()
    ]


def piped(run: Callable[[], int]) -> int:
    """Run what prints much; a reader that has seen enough (`| head`) ends it quietly."""
    try:
        status = run()
        sys.stdout.flush()
    except BrokenPipeError:  # nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def print_json(value: Any) -> None:
    """One JSON document."""
    print(json.dumps(value, indent=1))


def usage(text: str) -> int:
    """Show on stderr how a tool is used; gives its exit status."""
    print(text, file=sys.stderr)
    return 1
