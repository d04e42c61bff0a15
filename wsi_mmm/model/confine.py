"""Confine a process that runs foreign code: it opens no connection, writes no file, starts and watches no process.

Linux alone, without rights of any kind: Landlock (landlock(7), kernel 5.13 and newer) and a seccomp filter (seccomp(2))
for the calling thread and the threads and processes that it starts from then on. Reading files is not prevented.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys

_NO_NEW_PRIVILEGES, _SET_SECCOMP, _SECCOMP_FILTER = 38, 22, 2  # of linux/prctl.h, linux/seccomp.h
_CAPABILITIES = 0x20080522  # version 3 of linux/capability.h
_CREATE_RULESET, _RESTRICT_SELF = 444, 446  # the same number on every kind of processor
_READ_FILE, _READ_DIR, _IOCTL = 1 << 2, 1 << 3, 1 << 15
_FIRST_RIGHTS, _REFER, _TRUNCATE = (1 << 13) - 1, 1 << 13, 1 << 14  # version 1; 2; 3
_TCP = 0b11  # bind and connect, version 4
_SCOPES = 0b11  # abstract sockets and signals to processes outside, version 6

_LOAD, _EQUAL, _NOT_LESS, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _DENY = 0x7FFF0000, 0x00050000 | 1  # EPERM
_X32 = 0x40000000
_SYSCALLS = {
    # socket, execve, execveat, kill, ptrace, process_vm_readv, process_vm_writev, io_uring_setup, pidfd_getfd,
    # then chmod and chown in all their forms, which Landlock does not know.
    "x86_64": (0xC000003E, (41, 59, 322, 62, 101, 310, 311, 425, 438, 90, 91, 268, 452, 92, 93, 94, 260)),
    "aarch64": (0xC00000B7, (198, 221, 281, 129, 117, 270, 271, 425, 438, 52, 53, 452, 54, 55)),
}


def confine_process() -> tuple[str, ...]:
    """Confine the calling thread for good; start no other before. Return what is prevented, in words: nothing where
    the system has no such means."""
    if sys.platform != "linux":
        return ()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, *map(ctypes.c_ulong, (1, 0, 0, 0))):
        return ()
    libc.capset(struct.pack("=Ii", _CAPABILITIES, 0), bytes(24))  # root may otherwise look into other processes
    landlock, network = _restrict_files(libc), _filter_kernel_functions(libc)
    found = ("writing files", "reading the memory and environment of other processes") if landlock else ()
    return found + (("network", "starting programs") if network else ())


def _restrict_files(libc: ctypes.CDLL) -> bool:
    """Whether no file can be written, made, renamed or removed from here on (Landlock)."""
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 3:  # before it, files can be truncated
        return False
    rights = (_FIRST_RIGHTS | _REFER | _TRUNCATE) & ~(_READ_FILE | _READ_DIR)
    numbers = [rights, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0]
    count = 1 if version < 4 else 2 if version < 6 else 3
    attributes = struct.pack(f"={count}Q", *numbers[:count])
    rules = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    return bool(rules >= 0 and libc.syscall(_RESTRICT_SELF, rules, 0) == 0)


def _filter_kernel_functions(libc: ctypes.CDLL) -> bool:
    """Whether the functions of the system in `_SYSCALLS` fail from here on (seccomp)."""
    if platform.machine() not in _SYSCALLS:
        return False
    kind, numbers = _SYSCALLS[platform.machine()]
    last = len(numbers) + 1  # steps from the first comparison to the denial
    steps = [
        (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, kind), (_RETURN, 0, 0, _DENY),
        (_LOAD, 0, 0, 0), (_NOT_LESS, last, 0, _X32),
        *((_EQUAL, last - 1 - i, 0, number) for i, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _DENY),
    ]  # fmt: skip
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    whole = struct.pack("@HP", len(steps), ctypes.addressof(program))
    return bool(libc.prctl(_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_FILTER), whole, *map(ctypes.c_ulong, (0, 0))) == 0)
