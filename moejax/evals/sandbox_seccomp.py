"""A seccomp filter for generated programs: no sockets, no signals to others, no new privileges.

Runs inside the sandbox's child only (standard library, no packages). The list is of refusals, so a
system call that is newer than this file is refused too (ENOSYS).
"""

import ctypes
import platform
import struct

_LAST_KNOWN = 462
_EPERM, _ENOSYS = 1, 38
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE_NEW_ANY = 0x7E020000  # every CLONE_NEW* that clone accepts

# name: (number on x86_64, number on aarch64); None where the call does not exist.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # the network
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # other processes
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # what outlives a process or escapes its memory limit
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    # modes, owners, times and attributes, which Landlock does not cover
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    # mounts, namespaces and the kernel's wider doors
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "setns": (308, 268),
    "unshare": (272, 97),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
}
_NEW_PROCESS: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220),
    "fork": (57, None),
    "vfork": (58, None),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_PRLIMIT64, _FCNTL, _IOCTL = (302, 261), (72, 25), (16, 29)
_FCNTL_REFUSED = (8, 15, 10, 1024, 1026)  # F_SETOWN, _SETOWN_EX, _SETSIG, _SETLEASE, _NOTIFY
_IOCTL_ALLOWED = (0x5401, 0x5413, 0x5421, 0x541B, 0x5450, 0x5451)  # isatty, size, FION*, FIOCLEX


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _argument(index: int) -> bytes:
    return _op(_LOAD, 16 + 8 * index)  # its low half: both machines are little-endian


def filter_program(machine: str, processes: bool, modes: bool = False) -> bytes:
    """Returns the BPF program for `machine` ("x86_64" or "aarch64").

    Args:
      processes: whether the program may start processes and threads.
      modes: whether it may change files' modes, as linkers do; only where all it can write is its
        own.
    """
    column = list(_AUDIT_ARCH).index(machine)
    refuse, allow = _op(_RETURN, _ERRNO | _EPERM), _op(_RETURN, _ALLOW)
    ops = [_op(_LOAD, 4), _op(_EQUAL, _AUDIT_ARCH[machine], 1, 0), _op(_RETURN, _KILL)]
    ops += [_op(_LOAD, 0), _op(_GREATER, _LAST_KNOWN, 0, 1), _op(_RETURN, _ERRNO | _ENOSYS)]
    # clone3 hides its flags behind a pointer; told that it is missing, libc uses clone.
    ops += [_op(_EQUAL, _CLONE3[column], 0, 1), _op(_RETURN, _ERRNO | _ENOSYS)]
    refused = _REFUSED if processes else _REFUSED | _NEW_PROCESS
    if modes:
        refused = {name: numbers for name, numbers in refused.items() if "chmod" not in name}
    for numbers in refused.values():
        number = numbers[column]
        if number is not None:
            ops += [_op(_EQUAL, number, 0, 1), refuse]
    flags = [_argument(0), _op(_ANY_BIT, _CLONE_NEW_ANY, 0, 1), refuse, allow]
    ops += [_op(_EQUAL, _CLONE[column], 0, len(flags)), *flags]
    own_limits = [_argument(0), _op(_EQUAL, 0, 1, 0), refuse, allow]
    ops += [_op(_EQUAL, _PRLIMIT64[column], 0, len(own_limits)), *own_limits]
    fcntl = [_argument(1)]
    for command in _FCNTL_REFUSED:
        fcntl += [_op(_EQUAL, command, 0, 1), refuse]
    ops += [_op(_EQUAL, _FCNTL[column], 0, len(fcntl) + 1), *fcntl, allow]
    ioctl = [_argument(1)]
    for command in _IOCTL_ALLOWED:
        ioctl += [_op(_EQUAL, command, 0, 1), allow]
    ops += [_op(_EQUAL, _IOCTL[column], 0, len(ioctl) + 1), *ioctl, refuse]
    return b"".join([*ops, allow])


def install(processes: bool, modes: bool = False) -> None:
    """Puts the filter on this process and all it starts; it cannot be taken off.

    Raises:
      OSError: the kernel refuses, or the machine is neither x86_64 nor aarch64.
    """
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise OSError(f"seccomp: no filter for {machine}, only for {', '.join(_AUDIT_ARCH)}")
    code = filter_program(machine, processes, modes)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    pointer = ctypes.create_string_buffer(header, len(header))
    for option, value, third in ((38, 1, None), (22, 2, pointer)):  # no new privileges, filter
        if libc.prctl(option, ctypes.c_ulong(value), third, None, None) < 0:
            raise OSError(ctypes.get_errno(), "seccomp is refused")
