"""A container without an engine: a read-only root with mounts of its own, and an ordinary user.

Linux' namespaces are what containers are made of; `unshare` makes them without an engine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.conftest import ROOT

USER = 1000  # as the image's

# $1: an empty folder, for the root. Then mounts, as SOURCE TARGET ro|rw, then `--` and a command.
# /root is left out: an ordinary user cannot read it.
_SETUP = """
set -eu
root=$1
shift
mount --make-rprivate /
mount -t tmpfs none "$root"
for path in /*; do
    case $path in /tmp | /root | /models | /cache) continue ;; esac
    if [ -L "$path" ]; then
        cp -P "$path" "$root$path"
    elif [ -d "$path" ]; then
        mkdir "$root$path"
        mount --rbind "$path" "$root$path"
    fi
done
mkdir "$root/tmp"
mount -t tmpfs -o mode=1777 none "$root/tmp"
while [ "$1" != -- ]; do
    mkdir -p "$root$2"
    mount --bind "$1" "$root$2"
    [ "$3" = rw ] || mount -o remount,bind,ro "$root$2"
    shift 3
done
mount -o remount,ro "$root"
shift
cd /
exec chroot "$root" "$@"
"""


def contained(
    root: Path, mounts: Mapping[str, Path], *command: object, readable: Sequence[Path] = ()
) -> list[str]:
    """Return a command that runs another as `docker run --read-only --tmpfs /tmp -v … ` would.

    As `USER`; or as the only user there is, where the caller is not root.

    Args:
        root: an empty folder, which stays empty.
        mounts: what is writable, by where it is mounted.
        command: an interpreter of this environment, or what it runs.
        readable: further folders, mounted where they are; the checkout is one, /tmp is not.
    """
    ours = [Path(sys.base_prefix), Path(sys.prefix).resolve(), ROOT, *readable]
    arguments: list[object] = []
    for path in ours:
        arguments += [path, path, "ro"]
    for target, path in mounts.items():
        arguments += [path, target, "rw"]
    user = f"--reuid={USER} --regid={USER} --clear-groups --".split()
    as_user = [] if os.getuid() else ["setpriv", *user]
    setup = [*_unshare(), "/bin/sh", "-c", _SETUP, "sh", root, *arguments]
    return [*map(str, [*setup, "--", *as_user, *command])]


def missing() -> str:
    """Return why this machine cannot do that, or nothing."""
    probe = [*_unshare(), "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, text=True).stderr.strip()


def _unshare() -> list[str]:
    return ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else [])]
