"""The command line of raftfs-mount: classic mfsmount options in, a `MountOptions` out."""

import argparse
import getpass
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import raftfs
from raftfs.client.meta import parse_masters
from raftfs.const import MIB, PORT_CLIENTS
from raftfs.errors import UserError

DEFAULT_MASTER = "mfsmaster"
WRITE_CACHE_MIB_MIN, WRITE_CACHE_MIB_MAX = 16, 16_384

# Given to the kernel as they are.
_KERNEL_FLAGS = {
    "allow_other", "ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "atime",
    "noatime", "dirsync", "sync",
}  # fmt: skip
# Words of fstab that concern others.
_IGNORED_FLAGS = {"_netdev", "auto", "noauto", "user", "nouser", "users", "nofail", "defaults"}


@dataclass
class MountOptions:
    """Everything that the command line says, checked as far as that is possible without I/O."""

    mountpoint: str
    masters: list[tuple[str, int]]
    subfolder: str = "/"
    password: str = ""
    attr_s: float = 1.0
    entry_s: float = 0.0
    dir_entry_s: float = 1.0
    write_cache_bytes: int = 128 * MIB
    timeout_s: float = 60.0
    close_sync: bool = False
    foreground: bool = False
    standard_options: bool = True
    logfile: str | None = None
    kernel_flags: set[str] = field(default_factory=set)

    @property
    def fsname(self) -> str:
        """The first word in /proc/mounts."""
        host, port = self.masters[0]
        return f"mfs#{host}:{port}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse found a mistake: UserError instead of usage and status 2."""
        raise UserError(f"{message} (see --help)")


def parse(argv: Sequence[str]) -> MountOptions:
    """The options. UserError with one sentence for whatever is wrong; asks for a password (-p)."""
    args = _parser().parse_args(list(argv))
    words = _split(args.o)
    text = args.host or words.pop("mfsmaster", None) or DEFAULT_MASTER
    words.pop("mfsmaster", None)
    port = _number("mfsport", str(args.port or words.pop("mfsport", PORT_CLIENTS)), 1, 65_535)
    words.pop("mfsport", None)
    options = MountOptions(
        mountpoint=os.path.abspath(args.mountpoint),
        masters=parse_masters(text, int(port)),
        foreground=args.foreground,
        standard_options=not args.nostdopts,
    )
    options.subfolder = "/" + (args.subfolder or words.pop("mfssubfolder", "/")).strip("/")
    words.pop("mfssubfolder", None)
    for name, value in words.items():
        _apply(options, name, value)
    if args.password:
        options.password = getpass.getpass("MFS Password: ")
    return options


def _parser() -> _Parser:
    parser = _Parser(
        prog="raftfs-mount",
        description="Mount a raftfs file system.",
        epilog="mount options (-o): mfsmaster=HOST[:PORT][,..] mfsport=N mfssubfolder=PATH "
        "mfspassword=WORD mfsattrcacheto=SEC mfsentrycacheto=SEC mfsdirentrycacheto=SEC "
        "mfswritecachesize=MIB mfstimeout=SEC mfsclosesync logfile=PATH, and those of mount(8)",
    )
    parser.add_argument("mountpoint", help="an existing directory")
    parser.add_argument("-H", "--host", metavar="A[,B..]", help="masters, host or host:port")
    parser.add_argument("-P", "--port", type=int, help=f"their port (default {PORT_CLIENTS})")
    parser.add_argument("-S", "--subfolder", metavar="PATH", help="mount only this folder")
    parser.add_argument("-p", "--password", action="store_true", help="ask for the password")
    parser.add_argument("-o", action="append", default=[], metavar="OPT[,OPT..]")
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground")
    parser.add_argument(
        "-n", "--nostdopts", action="store_true",
        help="do not add allow_other and default_permissions",
    )  # fmt: skip
    parser.add_argument("-V", "--version", action="version", version=raftfs.__version__)
    return parser


def _split(groups: list[str]) -> dict[str, str]:
    """`a,b=c` -> words. mfsmaster may itself be a list: what follows without `=` and unknown."""
    words: dict[str, str] = {}
    last = ""
    for group in groups:
        for word in filter(None, group.split(",")):
            name, equals, value = word.partition("=")
            known = equals or name in _FLAGS or name.startswith("x-")
            if not known and last == "mfsmaster":
                words[last] += "," + word
                continue
            words[name] = value
            last = name
    return words


def _apply(options: MountOptions, name: str, value: str) -> None:
    if name in _SETTERS:
        _SETTERS[name](options, value)
    elif name in _KERNEL_FLAGS and not value:
        options.kernel_flags.add(name)
    elif name not in _IGNORED_FLAGS and not name.startswith("x-"):
        raise UserError(f"mount option {name!r} is not known (see --help)")


def _number(name: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"mount option {name}={text}: not a number") from None
    if not low <= value <= high:
        raise UserError(f"mount option {name}={text}: must be between {low:g} and {high:g}")
    return value


def _seconds(attribute: str, name: str, low: float = 0.0) -> Callable[[MountOptions, str], None]:
    def apply(options: MountOptions, text: str) -> None:
        setattr(options, attribute, _number(name, text, low, 86_400.0))

    return apply


def _write_cache(options: MountOptions, text: str) -> None:
    mib = _number("mfswritecachesize", text, WRITE_CACHE_MIB_MIN, WRITE_CACHE_MIB_MAX)
    options.write_cache_bytes = int(mib * MIB)


def _text(attribute: str) -> Callable[[MountOptions, str], None]:
    return lambda options, text: setattr(options, attribute, text)


def _flag(attribute: str) -> Callable[[MountOptions, str], None]:
    return lambda options, _text: setattr(options, attribute, True)


_SETTERS: dict[str, Callable[[MountOptions, str], Any]] = {
    "mfspassword": _text("password"),
    "logfile": _text("logfile"),
    "mfsattrcacheto": _seconds("attr_s", "mfsattrcacheto"),
    "mfsentrycacheto": _seconds("entry_s", "mfsentrycacheto"),
    "mfsdirentrycacheto": _seconds("dir_entry_s", "mfsdirentrycacheto"),
    "mfstimeout": _seconds("timeout_s", "mfstimeout", 1.0),
    "mfswritecachesize": _write_cache,
    "mfsclosesync": _flag("close_sync"),
}
_FLAGS = _KERNEL_FLAGS | _IGNORED_FLAGS | set(_SETTERS)
