"""The real mount: the daemon, the kernel, a fake cluster. Needs root and /dev/fuse."""

import contextlib
import ctypes
import errno
import mmap
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]

pytestmark = [
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"
    ),
    pytest.mark.timeout(60),
]


@contextlib.contextmanager
def fake_cluster(password: str = "") -> Iterator[str]:
    """A fake cluster in a process of its own: the masters as for -H."""
    words = [sys.executable, "-m", "tests.unit.mount.fake_cluster", "2", password]
    process = subprocess.Popen(
        words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def mount(where: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run raftfs-mount; it returns when the mount works or cannot be."""
    return subprocess.run(
        [sys.executable, "-m", "raftfs.mount.main", str(where), *words],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def mount_line(where: Path) -> list[str]:
    """The words about this mountpoint in /proc/mounts; StopIteration if it is none."""
    lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    return next(words for words in map(str.split, lines) if words[1] == str(where))


def device_of(where: Path) -> str:
    """`MAJ:MIN` of the mount."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return next(words[2] for words in map(str.split, lines) if words[4] == str(where))


def is_mounted(where: Path) -> bool:
    """Without touching it."""
    with contextlib.suppress(StopIteration):
        return bool(mount_line(where))
    return False


def daemon_of(where: Path) -> list[int]:
    """Processes whose command line names this mountpoint."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if b"raftfs.mount.main" in words and os.fsencode(where) in words:
                found.append(int(entry.name))
    return found


def abort(where: Path) -> None:
    """End a mount whatever state it is in."""
    with contextlib.suppress(OSError, StopIteration):
        number = device_of(where).split(":")[1]
        Path(f"/sys/fs/fuse/connections/{number}/abort").write_text("1")
    subprocess.run(["umount", "-l", str(where)], capture_output=True, timeout=10, check=False)
    for pid in daemon_of(where):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system."""
    where = tmp_path / "mnt"
    where.mkdir()
    with fake_cluster() as masters:
        try:
            done = mount(where, "-H", masters, "-o", f"logfile={tmp_path}/log")
            assert done.returncode == 0, done.stderr
            yield where
            subprocess.run(["umount", str(where)], timeout=20, check=True)
            deadline = time.monotonic() + 10
            while daemon_of(where) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not daemon_of(where)
            log = (tmp_path / "log").read_text()
            assert "mounted" in log
            for bad in ("Traceback", "failed", "lost", '"level": "error"'):
                assert bad not in log, log
        finally:
            if daemon_of(where):
                abort(where)


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    """The operation must fail with this errno."""
    with pytest.raises(OSError) as error:
        yield
    assert error.value.errno == number


def test_mounting_and_its_signs(mounted: Path, tmp_path: Path) -> None:
    source, _, kind, flags = mount_line(mounted)[:4]
    assert source.replace("\\043", "#").startswith("mfs#127.0.0.1:")
    assert kind == "fuse.mfs"
    assert "allow_other" in flags
    assert b'"masters"' in (mounted / ".masterinfo").read_bytes()
    assert os.listdir(mounted) == []
    again = mount(mounted, "-H", "127.0.0.1:1")
    assert again.returncode == 1
    assert "already mounted" in again.stderr
    assert Path(f"/sys/class/bdi/{device_of(mounted)}/read_ahead_kb").read_text().strip() == "1024"
    assert os.statvfs(mounted).f_namemax == 255


def test_files(mounted: Path) -> None:
    os.chdir("/")
    data = os.urandom(3_333_333)
    a, b = mounted / "a", mounted / "b"
    a.write_bytes(data)
    assert a.read_bytes() == data
    assert a.stat().st_size == len(data)
    a.rename(b)
    with refused(errno.ENOENT):
        a.stat()
    with open(b, "rb") as held:
        b.unlink()
        assert held.read() == data
    fd = os.open(b, os.O_RDWR | os.O_CREAT)
    os.write(fd, b"hello")
    os.unlink(b)
    os.pwrite(fd, b"J", 0)
    assert os.pread(fd, 10, 0) == b"Jello"
    os.close(fd)
    for n in range(50):
        with open(a, "ab" if n else "wb") as file:
            file.write(b"%d\n" % n)
    assert a.read_text() == "".join(f"{n}\n" for n in range(50))
    a.write_bytes(b"short")  # O_TRUNC
    assert a.read_bytes() == b"short"


def test_sparse_and_truncated_files(mounted: Path) -> None:
    path = mounted / "s"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"end", 200 << 20)
    assert os.fstat(fd).st_size == (200 << 20) + 3
    assert os.pread(fd, 10, 100 << 20) == bytes(10)
    assert os.pread(fd, 10, 200 << 20) == b"end"
    os.ftruncate(fd, 3)
    os.lseek(fd, 0, os.SEEK_END)
    os.write(fd, b"z")
    os.close(fd)
    assert path.read_bytes() == b"\0\0\0z"
    path.write_bytes(b"g" * 200_000)
    os.truncate(path, 5)
    with open(path, "r+b") as file:
        file.seek(1000)
        file.write(b"q")
    assert path.read_bytes() == b"ggggg" + bytes(995) + b"q"
    with open(path, "w+b") as file:
        file.truncate(100_000)
        with mmap.mmap(file.fileno(), 100_000) as view:
            view[5000:5005] = b"mmaps"
    assert path.read_bytes() == bytes(5000) + b"mmaps" + bytes(94_995)


def test_attributes_and_kinds(mounted: Path) -> None:
    path, other = mounted / "t", mounted / "t2"
    path.write_bytes(b"x")
    os.link(path, other)
    assert path.stat().st_nlink == 2
    os.symlink("t", mounted / "l")
    assert os.readlink(mounted / "l") == "t"
    os.chmod(path, 0o4755)
    assert stat.S_IMODE(other.stat().st_mode) == 0o4755
    os.chown(path, 5, 6)
    assert (path.stat().st_uid, path.stat().st_gid) == (5, 6)
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, b"1")
    os.utime(path, ns=(5, 7_000_000_001))
    os.close(fd)
    assert path.stat().st_mtime_ns == 7_000_000_001
    os.mkfifo(mounted / "fifo")
    os.mknod(mounted / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    (mounted / "null").write_bytes(b"gone")
    assert (mounted / "null").stat().st_rdev == os.makedev(1, 3)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        fd = os.open(mounted, os.O_PATH)
        listener.bind(f"/proc/self/fd/{fd}/sock")
        os.close(fd)
    assert stat.S_ISSOCK((mounted / "sock").stat().st_mode)
    old = os.umask(0o027)
    try:
        (mounted / "um").touch()
        (mounted / "dir").mkdir()
    finally:
        os.umask(old)
    assert stat.S_IMODE((mounted / "um").stat().st_mode) == 0o640
    assert stat.S_IMODE((mounted / "dir").stat().st_mode) == 0o750
    with refused(errno.ENOTSUP):
        os.setxattr(path, "user.a", b"b")
    with refused(errno.ENOTSUP):
        os.getxattr(path, "security.capability")
    with refused(errno.EPERM):
        os.unlink(mounted / ".masterinfo")
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    code = "import os, sys; os.listdir(sys.argv[1])"
    tried = subprocess.run(
        ["python3", "-c", code, str(mounted / "dir")],
        **nobody, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert "PermissionError" in tried.stderr  # default_permissions: the kernel checks the mode


def test_directories(mounted: Path) -> None:
    many = mounted / "many"
    many.mkdir()
    names = [f"{n:05d}" for n in range(1500)]
    for name in names:
        os.mknod(many / name)
    seen = []
    with os.scandir(many) as entries:
        for n, entry in enumerate(entries):
            seen.append(entry.name)
            if n % 2 == 0:
                os.unlink(entry.path)
    assert sorted(seen) == names
    assert len(os.listdir(many)) == 750
    with refused(errno.ENOTEMPTY):
        many.rmdir()
    with refused(errno.EEXIST):
        many.mkdir()
    shutil.rmtree(many)
    libc = ctypes.CDLL(None, use_errno=True)
    one, two = mounted / "one", mounted / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    assert libc.renameat2(-100, bytes(one), -100, bytes(two), 1) == -1
    assert ctypes.get_errno() == errno.EEXIST
    assert libc.renameat2(-100, bytes(one), -100, bytes(two), 2) == 0
    assert (one.read_bytes(), two.read_bytes()) == (b"2", b"1")


def test_a_tree_and_a_large_file_are_copied_whole(mounted: Path, tmp_path: Path) -> None:
    source = REPOSITORY / "raftfs" / "mount"
    subprocess.run(["cp", "-a", source, mounted / "tree"], check=True, timeout=30)
    subprocess.run(["diff", "-r", source, mounted / "tree"], check=True, timeout=30)
    same = source / "main.py"
    assert (mounted / "tree" / "main.py").stat().st_mtime_ns == same.stat().st_mtime_ns
    large = tmp_path / "large"
    with open(large, "wb") as file:
        for _ in range(100):
            file.write(os.urandom(1 << 20))
    subprocess.run(["cp", large, mounted / "large"], check=True, timeout=40)
    subprocess.run(["cmp", large, mounted / "large"], check=True, timeout=40)
    with open(mounted / "large", "r+b") as synced:
        synced.write(b"!")
        os.fsync(synced.fileno())
    shutil.rmtree(mounted / "tree")


def test_sigterm_unmounts_and_a_subfolder_is_a_root(tmp_path: Path) -> None:
    where = tmp_path / "mnt"
    where.mkdir()
    with fake_cluster("word") as masters:
        try:
            wrong = mount(where, "-H", masters, "-o", "mfspassword=other")
            assert (wrong.returncode, wrong.stdout) == (1, "")
            assert "password" in wrong.stderr
            assert wrong.stderr.count("\n") == 1
            secret = ("-H", masters, "-o", "mfspassword=word")
            assert "sub" in mount(where, *secret, "-S", "sub").stderr
            done = mount(where, *secret)
            assert done.stdout == (
                "mfsmaster accepted connection with parameters: read-write,restricted_ip ; "
                "root mapped to root:root\n"
            )
            (where / "sub").mkdir()
            (where / "sub" / "f").write_bytes(b"kept")
            (pid,) = daemon_of(where)
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while is_mounted(where) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not is_mounted(where)
            assert mount(where, *secret, "-S", "sub").returncode == 0
            assert (where / "f").read_bytes() == b"kept"
            assert where.stat().st_ino == 1
            assert (where / ".." / "mnt" / "f").read_bytes() == b"kept"
            subprocess.run(["umount", str(where)], timeout=20, check=True)
        finally:
            if daemon_of(where) or is_mounted(where):
                abort(where)


def test_without_the_compiled_module_the_mount_works_and_says_what_is_missing(
    tmp_path: Path,
) -> None:
    where = tmp_path / "mnt"
    where.mkdir()
    code = (
        "import sys; sys.modules['raftfs.mount._fusehook'] = None\n"
        "from raftfs.mount.main import main; sys.exit(main(sys.argv[2:]))"
    )
    with fake_cluster() as masters:
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, "raftfs.mount.main", str(where), "-H", masters],
                cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False,
            )  # fmt: skip
            assert done.returncode == 0
            assert done.stderr.count("\n") == 1
            assert "_fusehook" in done.stderr
            data = os.urandom(2_000_000)
            (where / "f").write_bytes(data)
            assert (where / "f").read_bytes() == data
            subprocess.run(["umount", str(where)], timeout=20, check=True)
        finally:
            if is_mounted(where):
                abort(where)


def test_nobody_to_mount_from_is_one_sentence(tmp_path: Path) -> None:
    done = mount(tmp_path, "-H", "127.0.0.1:1", "-o", "mfstimeout=1")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "127.0.0.1:1" in done.stderr
