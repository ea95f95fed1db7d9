"""The one thing that pyproject.toml cannot say: the optional C module of the mount.

Without fuse3's headers or a compiler the build goes on without it, and the mount says at its start
what is missing then.
"""

import shlex
import subprocess

from setuptools import Extension, setup


def fuse3(flag: str) -> list[str]:
    """What pkg-config says of fuse3; nothing if it is not there."""
    try:
        done = subprocess.run(["pkg-config", flag, "fuse3"], capture_output=True, text=True)
    except FileNotFoundError:
        return []
    return shlex.split(done.stdout) if done.returncode == 0 else []


setup(
    ext_modules=[
        Extension(
            "raftfs.mount._fusehook",
            sources=["raftfs/mount/_fusehook.c"],
            extra_compile_args=fuse3("--cflags"),
            extra_link_args=[*fuse3("--libs"), "-ldl"],
            optional=True,
        )
    ]
)
