"""The inside of the sandbox: confines a child process and runs a program in it. Started by `judges.verify.sandbox`.

    run_python --(stdin: the request, then a lifeline)--> launcher --> init, PID 1 of its namespaces --> program

`bubblewrap`: the program has its own processes, network, and file system. It sees the Python installation,
/usr and /lib, read-only, and a folder in memory; there is no other process, no interface, and no other file. When the
program ends, or the lifeline does, init is killed, and the kernel kills whatever is left below it.

`namespaces`: the same without bubblewrap, by this file alone.

`landlock`: for containers that forbid namespaces. Landlock gives the program the same files, and a system call filter
denies it sockets, processes, and signals to others, so that it stays one process, which is killed.

`none`: resource limits alone.

The launcher looks at the memory, the files and the processes of the whole sandbox, and kills it if it has too many.
docs/sandbox.md has the threat model.

Run as `python -s -P -S jail.py STATUS REPORT [READING WRITING]`, descriptors; imports only what starts fast.

Written by hand, at the kernel's interface, because the Landlock and seccomp packages on PyPI are unmaintained, and the
launcher must not need any package that the confined interpreter does not see.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import marshal
import os
import resource
import select
import signal
import stat
import sys
from types import ModuleType
from typing import Any, NoReturn

REPORT = 3  # the program's descriptor for `Outcome.report`
READABLE = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")  # memory of /dev/zero shows in no process
FILE_BYTES = 64 << 20  # the largest file; with namespaces, all files together
FILES = 10_000
SCRATCH = "scratch"  # the program's folder, in the root that is made for it
LOOK_SECONDS = 0.05  # between looks at the memory, files and processes of the whole sandbox

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/capability.h>
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWCGROUP, CLONE_THREAD = 0x20000000, 0x40000000, 0x2000000, 0x10000
OWN = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = -100, 0x8000, 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
CAPABILITY_VERSION_3, SECCOMP_MODE_FILTER, EPERM, ENOSYS = 0x20080522, 2, 1, 38

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    inside = sys.argv[1] == "inside"  # of bubblewrap
    status, *ends = map(int, sys.argv[2:] if inside else sys.argv[1:])
    with open(ends.pop(0) if inside else 0, "rb", closefd=False) as file:
        request: dict[str, Any] = marshal.load(file)  # both ends are the same interpreter
    try:
        if inside:
            _become_init(request, status)
        else:
            _enter(request, status, ends)
        _confine(request, status, ends)
    except Exception as error:
        _say(status, f"problem {error}")
        os._exit(1)
    _run(request["code"])


def _enter(request: dict[str, Any], status: int, ends: list[int]) -> None:
    """Returns in the confined program's process alone; the launcher and init watch, and end in here."""
    mode = request["mode"]
    request["user"] = os.getpid()  # before there is a PID namespace
    request["proc"] = os.open("/proc", os.O_RDONLY)  # before there is a new root, which has none
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, this goes first
    if mode == "namespaces":
        _unshare()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    if child := os.fork():
        code = _watch(child, request, status)
        if mode in ("landlock", "none"):
            _kill_children()
            remove = ["rm", "-rf", "--", request["scratch"]]
            if os.spawnv(os.P_WAIT, "/bin/rm", remove) != 0:  # of any depth, but for folders that may not be read
                os.spawnv(os.P_WAIT, "/bin/chmod", ["chmod", "-R", "u+rwX", "--", request["scratch"]])
                os.spawnv(os.P_WAIT, "/bin/rm", remove)
            _say(status, f"exit {code}")
        elif mode == "bubblewrap" and code:
            _say(status, f"problem bwrap: exit status {code}")  # nothing, if the program has started
        os._exit(0)
    if mode == "bubblewrap":
        _exec_bubblewrap(request, status, ends)
    if mode == "namespaces":
        _build_root(request["readable"])
        _become_init(request, status)


def _become_init(request: dict[str, Any], status: int) -> None:
    """Become a user without rights, as PID 1; returns in the program's process alone."""
    _become_nobody(request["user"])
    libc.prctl(PR_SET_DUMPABLE, 0)  # init is the program's user, and none of its business
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # PID 1 ignores what it does not handle
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
    if program := os.fork():
        _reap(program, status)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _exec_bubblewrap(request: dict[str, Any], status: int, ends: list[int]) -> NoReturn:
    """Become bubblewrap, which makes the same namespaces and root, and runs this file in them as PID 1."""
    message = os.memfd_create("request", 0)
    with open(message, "wb", closefd=False) as file:
        marshal.dump(request, file)
    os.lseek(message, 0, os.SEEK_SET)
    for end in (status, message, *ends):
        os.set_inheritable(end, True)
    unshare = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    # As root, it stays root until `_become_nobody`: a user namespace of root's would have no limit on processes.
    who = (
        ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        if os.geteuid() == 0
        else ["--unshare-user", "--uid", "1000", "--gid", "1000"]
    )
    root: list[str] = []
    for path in (*READABLE, *DEVICES, *request["readable"]):  # bubblewrap copies modes, and others cannot enter /root
        names = path.split("/")[1:-1]
        for depth in range(len(names)):
            root += ["--perms", "0755", "--dir", "/" + "/".join(names[: depth + 1])]
    for path in (*READABLE, *request["readable"]):
        if os.path.islink(path):
            root += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            root += ["--ro-bind", path, path]
    for path in DEVICES:
        root += ["--dev-bind-try", path, path]
    root += ["--symlink", f"/{SCRATCH}", "/dev/shm", "--ro-bind", os.path.abspath(__file__), "/jail.py"]
    root += ["--perms", "0777", "--size", str(FILE_BYTES), "--tmpfs", f"/{SCRATCH}", "--remount-ro", "/"]
    inner = [sys.executable, "-s", "-P", "-S", "-X", "utf8", "/jail.py", "inside", *map(str, (status, message, *ends))]
    command = [
        request["bubblewrap"],
        "--die-with-parent",
        "--as-pid-1",
        *unshare,
        *who,
        *root,
        "--chdir",
        "/",
        "--",
        *inner,
    ]
    os.execve(command[0], command, {"PYTHONHASHSEED": "0"})


def _watch(child: int, request: dict[str, Any], status: int) -> int:
    """Wait for `child`. The end of the lifeline ends it, and so does use of more than the whole sandbox may have.

    Returns:
        its exit status, negative for a signal.
    """
    ended = os.pidfd_open(child)
    while not (ready := select.select([0, ended], [], [], LOOK_SECONDS)[0]):
        if excess := _excess(child, request):
            _say(status, f"limit {excess}")
            break
    if ended not in ready:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _excess(child: int, request: dict[str, Any]) -> str | None:
    """Which limit `child`, the processes below it, and their files exceed together, if they do."""
    tree, used, count, proc = [child], 0, 0, request["proc"]
    for pid in tree:  # which grows meanwhile
        with contextlib.suppress(OSError):  # it has ended
            for line in _contents(f"{pid}/status", proc).split("\n"):  # a process's name may have other ends of lines
                if line.startswith(("VmRSS:", "VmSwap:")):
                    used += int(line.split()[1]) << 10
            folder = os.open(f"{pid}/task", os.O_RDONLY, dir_fd=proc)
            try:
                tasks = os.listdir(folder)
            finally:
                os.close(folder)
            count += len(tasks)
            for task in tasks:
                tree += map(int, _contents(f"{pid}/task/{task}/children", proc).split())
    if count > request["processes"] + 3:  # bubblewrap, and init
        return f"more than {request['processes']} processes and threads"
    if request["scratch"]:
        files, count = _size_of(request["scratch"], child)
    else:
        files = count = 0
        with contextlib.suppress(OSError):
            folder = os.open(os.path.join(str(tree[-1]), "root", SCRATCH), os.O_RDONLY, dir_fd=proc)
            scratch = os.fstatvfs(folder)
            os.close(folder)
            files, count = (scratch.f_blocks - scratch.f_bfree) * scratch.f_frsize, scratch.f_files - scratch.f_ffree
    if count > FILES:
        return f"more than {FILES} files"
    if used + files > request["memory"]:
        return f"more than {request['memory'] >> 20} MB of memory and files"
    return None


def _contents(path: str, folder: int) -> str:
    with open(os.open(path, os.O_RDONLY, dir_fd=folder), errors="replace") as file:  # a process has any name
        return file.read()


def _size_of(scratch: str, pid: int) -> tuple[int, int]:
    """The bytes and the number of the files in a folder, and of those that `pid` has open and has removed."""
    size = count = 0
    unseen: list[OSError] = []
    try:
        for folder, folders, names in os.walk(scratch, onerror=unseen.append):
            for name in (*folders, *names):
                with contextlib.suppress(FileNotFoundError):
                    size += os.lstat(os.path.join(folder, name)).st_blocks * 512
                count += 1
            if count > FILES:
                break
    except (OSError, RecursionError):  # too deep
        count = FILES + 1
    if any(not isinstance(error, FileNotFoundError) for error in unseen):  # closed to this process
        count = FILES + 1
    with contextlib.suppress(OSError):  # it has ended, or is not to be looked at: the launcher must go on
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found = os.stat(f"/proc/{pid}/fd/{name}")
                size += found.st_blocks * 512 if stat.S_ISREG(found.st_mode) and not found.st_nlink else 0
    return size, count


def _reap(program: int, status: int) -> NoReturn:
    """PID 1: bury the orphans until the program ends; ending itself kills what is left."""
    while True:
        pid, code = os.wait()
        if pid == program:
            _say(status, f"exit {os.waitstatus_to_exitcode(code)}")
            os._exit(0)


def _kill_children() -> None:
    """Kill what the program left behind; with each generation killed, the next becomes this process's own."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = [int(pid) for pid in file.read().split()]
        if not children:
            return
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _unshare() -> None:
    """Leave the namespaces of this machine; as an ordinary user, by way of a user namespace."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", libc.unshare(OWN))
        return
    _call("unshare", libc.unshare(OWN | CLONE_NEWUSER))
    for name, line in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _build_root(readable: list[str]) -> None:
    """A new root in memory: read-only system files, some devices, and /scratch."""
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    os.mkdir("/tmp/old")
    _syscall("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    for path in (*READABLE, *DEVICES, *readable):
        _show(path)
    os.symlink(f"/{SCRATCH}", "/dev/shm")  # for multiprocessing's semaphores
    os.mkdir(f"/{SCRATCH}")
    _call("umount2", libc.umount2(b"/old", MNT_DETACH))
    os.rmdir("/old")
    # Recursively, and whatever flags of the originals are locked: that is beyond mount(2).
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    _syscall("mount_setattr", AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    _mount("tmpfs", f"/{SCRATCH}", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=777,size={FILE_BYTES},nr_inodes={FILES}")


def _show(path: str) -> None:
    """Bind a file or folder of the old root to the same place of the new one."""
    old = "/old" + path
    if os.path.lexists(path) or not os.path.lexists(old):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(old):  # /lib -> usr/lib
        os.symlink(os.readlink(old), path)
        return
    if os.path.isdir(old):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    _mount(old, path, None, MS_BIND | MS_REC)


def _become_nobody(number: int) -> None:
    """As root, become a user that no one else is: the limit on processes does not bind root, and counts by user."""
    if os.geteuid() != 0:
        return
    os.setgroups([])
    for user in (0x7000_0000 | number, 60_000 + number % 5_000):  # containers may map the low ones alone
        if libc.setresgid(user, user, user) == 0 and libc.setresuid(user, user, user) == 0:
            return
    raise OSError("root cannot change to another user here")


def _confine(request: dict[str, Any], status: int, ends: list[int]) -> None:
    """The program's own process: limits, an environment, its descriptors, and no way back.

    `ends` become the descriptors from REPORT on.
    """
    os.setsid()
    scratch = request["scratch"] or f"/{SCRATCH}"
    os.chdir(scratch)
    os.environ.clear()
    os.environ.update({"HOME": scratch, "TMPDIR": scratch, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    stdin = os.memfd_create("stdin", os.MFD_ALLOW_SEALING)
    with open(stdin, "wb", closefd=False) as file:
        file.write(request["stdin"])
    fcntl.fcntl(stdin, fcntl.F_ADD_SEALS, SEALS)  # or it would be memory that no process shows
    os.lseek(stdin, 0, os.SEEK_SET)
    os.dup2(stdin, 0)
    status, *ends = (fcntl.fcntl(end, fcntl.F_DUPFD, 64) for end in (status, *ends))  # out of the way
    for number, end in enumerate(ends):
        os.dup2(end, REPORT + number)
    limits = {
        resource.RLIMIT_AS: request["memory"],
        resource.RLIMIT_CPU: int(request["timeout"]) + 2,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: 128,
        resource.RLIMIT_CORE: 0,
    }
    if request["scratch"] is None:  # elsewhere it would count the user's other processes
        limits[resource.RLIMIT_NPROC] = request["processes"] + 1  # init counts
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    if request["mode"] != "none":
        _call("capset", libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()))
        _call("prctl", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        if request["mode"] == "landlock":
            _landlock((*READABLE, *request["readable"]), scratch)
        _filter_calls(alone=request["mode"] == "landlock")
    _say(status, "started")
    os.closerange(REPORT + len(ends), 1 << 20)


def _landlock(readable: tuple[str, ...], scratch: str) -> None:
    """No file but these, no TCP, and no signals or abstract sockets out of here, as far as the kernel knows them."""
    version = libc.syscall(444, None, 0, 1)
    if version < 3:
        raise OSError("Landlock needs Linux 6.2, or is not enabled" if version > 0 else "Landlock is not available")
    everything = (1 << (16 if version >= 5 else 15)) - 1  # LANDLOCK_ACCESS_FS_*
    read, of_files = 0b1101, 0b110 | 1 | everything & 0b11 << 14  # execute, read; write, truncate, ioctl
    ruleset = (ctypes.c_uint64 * 3)(everything, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    descriptor = _call("landlock_create_ruleset", libc.syscall(444, ruleset, ctypes.sizeof(ruleset), 0))
    for path, access in [(scratch, everything), *((p, read) for p in readable), *((p, 0b110) for p in DEVICES)]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not on this machine
            continue
        if not os.path.isdir(path):
            access &= of_files
        rule = access.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
        _call("landlock_add_rule", libc.syscall(445, descriptor, 1, rule, 0))
    _call("landlock_restrict_self", libc.syscall(446, descriptor, 0))


Call = tuple[int | None, int | None]  # its numbers on x86_64 and on aarch64; None if it does not exist
KERNEL: dict[str, Call] = {  # ways to more of the kernel than a program needs, and to memory that no process shows
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsmount": (432, 432), "fspick": (433, 433), "open_tree_attr": (467, 467), "mount_setattr": (442, 442), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "bpf": (321, 280), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "open_by_handle_at": (304, 265), "pidfd_send_signal": (424, 424), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
    "io_setup": (206, 0),
}  # fmt: skip
ALONE: dict[str, Call] = {  # ways to other processes, to a network, and to what Landlock leaves open: owners, modes, times of files
    "socket": (41, 198), "fork": (57, None), "vfork": (58, None), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "process_madvise": (440, 440),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469), "inotify_init": (253, None),
    "inotify_init1": (294, 26), "fanotify_init": (300, 262), "shmat": (30, 196), "shmctl": (31, 195),
    "semop": (65, 193), "semtimedop": (220, 192), "semctl": (66, 191), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187),
}  # fmt: skip
NEWEST = 469
"""The last system call, in Linux 6.17, that has been looked at. Later ones do not exist for a program."""
KILL, TGKILL, PRLIMIT, CLONE, CLONE3 = (62, 129), (234, 131), (302, 261), (56, 220), (435, 435)
PRCTL, FCNTL, IOCTL, SOCKETPAIR, MMAP = (157, 167), (72, 25), (16, 29), (53, 199), (9, 222)
SOCKET = (41, 198)
FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: what a network namespace holds
SEALS = 0b1111  # no more seals, no smaller, no larger, no other content
MAP_SHARED, MAP_ANONYMOUS = 0x01, 0x20
F_SETOWN, F_SETSIG, F_SETOWN_EX, FIOSETOWN, SIOCSPGRP = 8, 10, 15, 0x8901, 0x8902


def _filter_calls(*, alone: bool) -> None:
    """Deny system calls, with EPERM. `alone`: the program is, and stays, one process among the user's others."""
    column = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)
    if column is None:
        if alone:
            raise OSError(f"no system call filter for {os.uname().machine}")
        return  # the namespaces stand without it
    deny, allow = (0x06, 0, 0, 0x50000 | EPERM), (0x06, 0, 0, 0x7FFF0000)
    load_number, load_argument, load_second = (
        (0x20, 0, 0, 0),
        (0x20, 0, 0, 16),
        (0x20, 0, 0, 24),
    )  # seccomp_data, low halves
    JEQ, JGT, JGE, JSET = 0x15, 0x25, 0x35, 0x45

    def between(call: tuple[int, int], low: int, high: int) -> list[tuple[int, int, int, int]]:
        tests = [(JGE, 0, 2, low), (JGT, 1, 0, high), allow, deny]
        return [(JEQ, 0, 5, call[column]), load_argument, *tests]

    def flags(call: tuple[int, int], mask: int, *, wanted: bool) -> list[tuple[int, int, int, int]]:
        return [(JEQ, 0, 4, call[column]), load_argument, (JSET, *((0, 1) if wanted else (1, 0)), mask), allow, deny]

    def none_of(
        call: tuple[int, int], load: tuple[int, int, int, int], *values: int
    ) -> list[tuple[int, int, int, int]]:
        tests = [line for value in values for line in ((JEQ, 0, 1, value), deny)]
        return [(JEQ, 0, len(tests) + 2, call[column]), load, *tests, allow]

    program = [(0x20, 0, 0, 4), (JEQ, 1, 0, (0xC000003E, 0xC00000B7)[column]), deny, load_number]
    if column == 0:
        program += [(JGE, 0, 1, 0x4000_0000), deny]  # the x32 calls
    program += [(JGT, 0, 1, NEWEST), (0x06, 0, 0, 0x50000 | ENOSYS)]
    for numbers in (KERNEL | ALONE if alone else KERNEL).values():
        if (number := numbers[column]) is not None:
            program += [(JEQ, 0, 1, number), deny]
    program += [(JEQ, 0, 1, CLONE3[column]), (0x06, 0, 0, 0x50000 | ENOSYS)]  # its flags cannot be read; C falls back
    # Shared memory without a file stays while a page of it is mapped, and shows in no process once they let it go.
    shared = [(JSET, 0, 2, MAP_ANONYMOUS), (JSET, 0, 1, MAP_SHARED), deny, allow]
    program += [(JEQ, 0, 5, MMAP[column]), (0x20, 0, 0, 40), *shared]
    # It stays visible to the launcher, and ends with it.
    program += none_of(PRCTL, load_argument, PR_SET_PDEATHSIG, PR_SET_DUMPABLE)
    if alone:
        me = os.getpid()
        # A file's owner gets a signal, any that is chosen; a datagram's sender chooses who gets it.
        program += none_of(FCNTL, load_second, F_SETOWN, F_SETSIG, F_SETOWN_EX)
        program += none_of(IOCTL, load_second, FIOSETOWN, SIOCSPGRP)
        program += [
            (JEQ, 0, 4, SOCKETPAIR[column]),
            load_second,
            (JSET, 0, 1, 0b10),
            deny,
            allow,
        ]  # SOCK_DGRAM, SOCK_RAW
        program += [*between(KILL, me, me), *between(TGKILL, me, me), *between(PRLIMIT, 0, 0)]
        program += flags(CLONE, CLONE_THREAD, wanted=True)
    else:
        # Not init, nor everybody at once: the kernel would ignore it, and the program should learn that it failed.
        program += between(KILL, 2, 0x7FFF_FFFF)
        program += between(PRLIMIT, 0, 0)
        program += flags(CLONE, OWN | CLONE_NEWUSER | CLONE_NEWCGROUP, wanted=False)
        known = [line for family in FAMILIES for line in ((JEQ, 0, 1, family), allow)]
        program += [(JEQ, 0, len(known) + 2, SOCKET[column]), load_argument, *known, deny]
    program.append(allow)

    class Filter(ctypes.Structure):
        _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))

    class Program(ctypes.Structure):
        _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.POINTER(Filter)))

    code = Program(len(program), (Filter * len(program))(*(Filter(*line) for line in program)))
    _call("seccomp", libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(code), 0, 0))


def _run(code: str) -> NoReturn:
    """Run the program as `python program.py` would."""
    import _sitebuiltins
    import builtins

    builtins.exit = builtins.quit = _sitebuiltins.Quitter("exit", "end-of-file")
    module = ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv[:] = ["program.py"]
    sys.path.insert(0, os.getcwd())
    sys.executable = os.path.realpath(sys.executable)
    try:
        exec(compile(code, "program.py", "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        if error.__traceback__:
            error.__traceback__ = error.__traceback__.tb_next  # without this frame
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    sys.exit(0)


def _say(status: int, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the caller has its answer, or is gone
        os.write(status, f"{line}\n".encode())


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    names = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _call(f"mount of {target}", libc.mount(*names[:3], ctypes.c_ulong(flags), names[3]))


def _syscall(name: str, *arguments: Any) -> int:
    return _call(name, libc.syscall(KERNEL[name][os.uname().machine == "aarch64"], *arguments))


def _call(name: str, result: int) -> int:
    if result == -1:
        raise OSError(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


if __name__ == "__main__":
    main()
