#!/usr/bin/env bash
# Makes .venv with raftfs and its tools in it; installs what the system lacks through apt (as root) or
# says in one sentence what to install. Harmless when run again: does nothing if nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(fuse3 libfuse3-dev pkg-config gcc make)
# Only tests and stories with network partitions need these, and root besides: without, they say so.
for_root=(iproute2 nftables)
venv=.venv
stamp=$venv/.installed

[ "$(id -u)" -ne 0 ] || packages+=("${for_root[@]}")
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done

# A Python that is new enough, can make virtual environments and has its headers.
choose_python() {
    local candidate
    for candidate in python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import ensurepip, os, sys, sysconfig
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
sys.exit(sys.version_info < (3, 11) or not os.path.exists(header))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}
python=$(choose_python)
[ -n "$python" ] || missing+=(python3 python3-venv python3-dev)

if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "raftfs needs packages that only root can install; run: apt-get install ${missing[*]}" >&2
        exit 1
    fi
    echo "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    python=$(choose_python)
    if [ -z "$python" ]; then
        echo "raftfs needs Python 3.11 or newer, which this release of the system does not have" >&2
        exit 1
    fi
fi

wanted=$(cat pyproject.toml setup.py constraints.txt raftfs/mount/_fusehook.c | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing raftfs into $venv"
    [ -x $venv/bin/python ] || "$python" -m venv $venv
    $venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
        --editable '.[dev]'
    echo "$wanted" >"$stamp"
fi
