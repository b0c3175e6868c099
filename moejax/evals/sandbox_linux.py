"""The Linux calls that the sandbox is made of, by ctypes: namespaces, Landlock, seccomp, uids.

Runs inside the sandbox's child only (standard library, no packages). Every function raises OSError
when the kernel refuses, so that a program never starts with less than it was promised.
"""

import ctypes
import os
import platform
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)
_NUM_MOUNT_SETATTR, _NUM_CAPSET = 442, {"x86_64": 126, "aarch64": 91}
_NUM_LANDLOCK_CREATE, _NUM_LANDLOCK_ADD, _NUM_LANDLOCK_RESTRICT = 444, 445, 446
_NUM_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

_MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x1000, 0x4000, 1 << 18, 2
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _AT_RECURSIVE = 1, 2, 4, 0x8000
_O_PATH = 0o10000000

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38

SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/nix")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(number: int, *args: object, what: str) -> int:
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return _check(_LIBC.syscall(ctypes.c_long(number), *words), what)


def _prctl(option: int, value: int, third: object = None, what: str = "prctl") -> None:
    _check(_LIBC.prctl(option, ctypes.c_ulong(value), third, None, None), what)


def die_with_parent() -> None:
    """Asks for SIGKILL when the parent ends."""
    _prctl(_PR_SET_PDEATHSIG, 9, what="parent death signal")


def enter_namespaces(flags: int) -> None:
    """Leaves the host's namespaces named by `flags`; a plain user maps only itself."""
    uid, gid = os.geteuid(), os.getegid()
    _check(_LIBC.unshare(flags), "unshare")
    if flags & CLONE_NEWUSER:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind)]
    what = f"mount {target}"
    _check(_LIBC.mount(*texts, ctypes.c_ulong(flags), data.encode() or None), what)


def _set_mount(target: str, attributes: int, recursive: bool = True) -> None:
    request = struct.pack("=4Q", attributes, 0, 0, 0)
    path, flags = ctypes.c_char_p(target.encode()), _AT_RECURSIVE if recursive else 0
    buffer = ctypes.create_string_buffer(request, len(request))
    _syscall(_NUM_MOUNT_SETATTR, -100, path, flags, buffer, len(request), what="mount_setattr")


def outermost(paths: list[str]) -> list[str]:
    """Those of `paths` that exist and lie in no other of them."""
    kept: list[str] = []
    for path in sorted({os.path.normpath(path) for path in paths if os.path.exists(path)}):
        if not any(path.startswith(outer + "/") for outer in kept):
            kept.append(path)
    return kept


def enter_root(read_only: list[str], disk_bytes: int) -> None:
    """Moves into a root of its own: `read_only` paths, five devices, an empty /tmp of `disk_bytes`.

    Needs `enter_namespaces` with CLONE_NEWNS first, and Linux 5.12 for recursive read-only mounts.
    """
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    # Opened first: the new root is mounted over a folder that may hide some of them.
    sources = {
        path: os.open(path, _O_PATH)
        for path in outermost(read_only) + list(DEVICES)
        if not os.path.islink(path)
    }
    links = {path: os.readlink(path) for path in outermost(read_only) if os.path.islink(path)}
    root = next(path for path in ("/mnt", "/tmp", "/run", "/var") if os.path.isdir(path))
    _mount("none", root, "tmpfs", 0, "mode=755,size=1m")
    os.mkdir(root + "/tmp")  # before the rest: Python itself may live in it
    _mount("none", root + "/tmp", "tmpfs", 6, f"mode=1777,size={disk_bytes},nr_inodes=4096")
    for path, source in sources.items():
        is_folder = os.path.isdir(f"/proc/self/fd/{source}")
        _make_target(root + path, is_folder)
        _mount(f"/proc/self/fd/{source}", root + path, None, _MS_BIND | _MS_REC)
        nodev = 0 if path in DEVICES else _ATTR_NODEV
        _set_mount(root + path, _ATTR_RDONLY | _ATTR_NOSUID | nodev)
        os.close(source)
    for path, target in links.items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(target, root + path)
    _set_mount(root, _ATTR_RDONLY | _ATTR_NOSUID, recursive=False)
    os.chdir(root)
    number = _NUM_PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(f"pivot_root: its number on {platform.machine()} is not known here")
    dot = ctypes.c_char_p(b".")
    _syscall(number, dot, dot, what="pivot_root")  # the old root now lies over the new one
    _check(_LIBC.umount2(b".", _MNT_DETACH), "umount of the old root")
    os.chdir("/tmp")


def _make_target(path: str, is_folder: bool) -> None:
    os.makedirs(path if is_folder else os.path.dirname(path), exist_ok=True)
    if not is_folder:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


def become(uid: int) -> None:
    """Gives up root for good: uid, gid and groups."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def own_process_count() -> None:
    """Enters a user namespace, where (Linux 5.14) RLIMIT_NPROC counts this sandbox alone."""
    _check(_LIBC.unshare(CLONE_NEWUSER), "unshare a user namespace")


def drop_capabilities() -> None:
    """Empties every capability set; nothing executed later can bring one back."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, what="no new privileges")
    for capability in range(64):
        if _LIBC.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), None, None, None) < 0:
            break  # past the last one, or without the right to drop: capset below is what counts
    number = _NUM_CAPSET.get(platform.machine())
    if number is None:
        raise OSError(f"capset: its number on {platform.machine()} is not known here")
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    _syscall(number, header, ctypes.create_string_buffer(24), what="capset")


def landlock_version() -> int:
    """The kernel's Landlock version, 0 where there is none."""
    number = ctypes.c_long(_NUM_LANDLOCK_CREATE)
    return max(0, _LIBC.syscall(number, None, ctypes.c_long(0), ctypes.c_long(1)))


def restrict_files(read_only: list[str], writable: list[str]) -> None:
    """Landlock: files outside of these paths can be neither opened, made, moved nor removed."""
    version = landlock_version()
    if version < 3:  # before 3, truncating any file one may write to was not covered
        raise OSError(f"Landlock version 3 (Linux 6.2) is needed, the kernel has {version}")
    everything = (1 << 15) - 1 if version < 5 else (1 << 16) - 1
    of_files = 1 | 2 | 4 | 1 << 14 | 1 << 15  # execute, write, read, truncate, ioctl
    buffer = ctypes.create_string_buffer(struct.pack("=Q", everything), 8)
    ruleset = _syscall(_NUM_LANDLOCK_CREATE, buffer, 8, 0, what="landlock")
    reading = 1 | 4 | 8  # execute, read file, read folder
    wanted = [(path, reading) for path in outermost(read_only)]
    wanted += [(path, reading | 2) for path in DEVICES]
    wanted += [(path, everything) for path in writable]
    for path, access in wanted:
        folder = os.open(path, _O_PATH)
        allowed = access & (everything if os.path.isdir(path) else of_files & everything)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, folder), 12)
        _syscall(_NUM_LANDLOCK_ADD, ruleset, 1, rule, 0, what=f"landlock rule for {path}")
        os.close(folder)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, what="no new privileges")  # Landlock asks for it
    _syscall(_NUM_LANDLOCK_RESTRICT, ruleset, 0, what="landlock")
    os.close(ruleset)
