"""Runs a module as somebody whom permissions bind: root may write anywhere, and tests may be run by root.

    python -m tests.unprivileged MODULE ARGUMENT...

Root keeps its id, so that the interpreter stays readable, and gives away what lifts permissions (Linux only).
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys

VERSION = 0x20080522
"""`_LINUX_CAPABILITY_VERSION_3`: two words of 32 capabilities each."""
WRITES_ANYWHERE, OWNS_EVERYTHING = 1, 3
"""`CAP_DAC_OVERRIDE`, `CAP_FOWNER`."""
SETS = ("effective", "permitted", "inheritable")


class Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class Word(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def obey_permissions() -> None:
    """From here on this process may do what anybody may; other users need nothing of it."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = Header(VERSION, 0)
    words = (Word * 2)()
    if libc.capget(ctypes.byref(header), words) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    kept = ~(1 << WRITES_ANYWHERE | 1 << OWNS_EVERYTHING)
    for name in SETS:
        setattr(words[0], name, getattr(words[0], name) & kept & 0xFFFFFFFF)
    if libc.capset(ctypes.byref(header), words) != 0:
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    obey_permissions()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
