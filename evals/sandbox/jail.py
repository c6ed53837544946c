"""The inside of the sandbox: evals/sandbox/sandbox.py starts this file once for each program.

  python -s -S -P jail.py MODE TIMEOUT MEMORY    (program, tests), marshalled, on stdin; the verdict on stdout

The first process builds the walls and keeps the time. Its child runs the program, and is killed when it has
reported or its time is over. In the mode "sandbox" the child is alone in a process namespace, where no other
process has a number, and the kernel refuses it the calls that would start one. "unsafe" only sets limits.
"""
import ctypes
import marshal
import os
import resource
import select
import struct
import sys

DISK, FILES, FILE_SIZE = 64 * 2**20, 4000, 16 * 2**20  # bytes in all files together, files, bytes in one file
OPEN_FILES, THREADS = 64, 64
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", f"{sys.base_prefix}/lib",
             os.path.dirname(os.__file__))  # what a program sees of the machine, with two devices

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000  # sched.h
NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 2, 4, 8, 4096, 16384, 2**18  # mount.h
READ_ONLY = 1 | NOSUID | NODEV | 32 | BIND  # 32: of what is mounted already
PDEATHSIG, DUMPABLE, SECCOMP, NO_NEW_PRIVS = 1, 4, 22, 38  # prctl.h

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # audit.h, and a column of the next table
CLOSED = {  # system calls that are refused, by their numbers on these machines
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),  # more processes
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "vmsplice": (278, 75),  # uncounted memory
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    "socket": (41, 198),  # networks that have no namespace, such as vsock
    "unshare": (272, 97), "prctl": (157, 167), "ptrace": (101, 117), "io_uring_setup": (425, 425),  # walls
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "syslog": (103, 116),  # secrets
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282)}  # the kernel's weak spots
CLONE, CLONE_THREAD, CLONE3, SOCKETPAIR, AF_UNIX = (56, 220), 0x10000, (435, 435), (53, 199), 1


def call(name, *args):
    """Call a function of the C library. OSError if it fails."""
    args = [ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args]
    if ctypes.CDLL(None, use_errno=True)[name](*args) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def enter_namespaces(uid, gid):
    """Leave the machine's mounts, network, shared memory and, for the child, its processes. An ordinary user
    may do so inside a user namespace, where the user's ids stay as they are. Root needs none."""
    call("unshare", NEWNS | NEWNET | NEWIPC | NEWPID | (NEWUSER if uid else 0))
    ids = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
    for name, text in ids.items() if uid else ():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def build_root(uid):
    """Replace the machine's files by a tree in memory: libraries, read-only, and a folder /tmp for `uid`.
    There is no /home, /etc, /proc or /sys. The tree vanishes with the last process that sees it."""
    call("mount", None, b"/", None, REC | PRIVATE, None)  # so that the machine sees none of what follows
    call("mount", b"tmpfs", b"/proc", b"tmpfs", NOSUID | NODEV, b"mode=755")
    os.chdir("/proc")  # the tree has to be mounted somewhere, and nothing else is needed from this folder
    os.mkdir("tmp")
    room = b"size=%d,nr_inodes=%d,mode=700,uid=%d" % (DISK, FILES, uid)
    call("mount", b"tmpfs", b"tmp", b"tmpfs", NOSUID | NODEV, room)
    for path in (*LIBRARIES, "/dev/null", "/dev/urandom"):
        inside = f".{path}"
        if os.path.exists(path) and not os.path.exists(inside):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.mkdir(inside) if os.path.isdir(path) else os.close(os.open(inside, os.O_CREAT))
            call("mount", os.fsencode(path), os.fsencode(inside), None, BIND | REC, None)
            if not path.startswith("/dev/"):
                noexec = os.statvfs(path).f_flag & NOEXEC  # where it is set it has to stay
                call("mount", None, os.fsencode(inside), None, READ_ONLY | noexec, None)
    call("pivot_root", b".", b".")
    call("umount2", b".", 2)  # 2: detach. The old root lies on top of the new one.
    call("mount", None, b"/", None, READ_ONLY, None)
    os.chdir("/tmp")


def close_system_calls():
    """Let the kernel answer "not permitted" to the calls in CLOSED, to clone unless it makes a thread, and to
    socketpair unless the two are of this process."""
    architecture, column = MACHINES[os.uname().machine]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06  # bpf_common.h
    allow, refuse, absent = 0x7FFF0000, 0x50001, 0x50026  # seccomp.h, the latter two with EPERM and ENOSYS
    # (operation, rules to skip if true, if false, value). A call's number lies at 0, its architecture at 4,
    # its first argument at 16. From 2^30 on x86 has all calls once more.
    rules = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, refuse),
             (load, 0, 0, 0), (at_least, 0, 1, 2**30), (answer, 0, 0, refuse)]
    for number in (numbers[column] for numbers in CLOSED.values() if numbers[column]):
        rules += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    for number, test, value in (CLONE, any_bit, CLONE_THREAD), (SOCKETPAIR, equal, AF_UNIX):
        rules += [(equal, 0, 4, number[column]), (load, 0, 0, 16), (test, 0, 1, value),
                  (answer, 0, 0, allow), (answer, 0, 0, refuse)]
    rules += [(equal, 0, 1, CLONE3[column]), (answer, 0, 0, absent),  # the C library then takes clone
              (answer, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    call("prctl", SECCOMP, 2, struct.pack("HP", len(rules), ctypes.addressof(code)), 0, 0)


def confine(mode, uid, timeout, memory):
    """Set the limits. In the sandbox also give up all rights, and close system calls."""
    limits = {"CPU": int(timeout) + 2, "FSIZE": FILE_SIZE, "NOFILE": OPEN_FILES, "CORE": 0}
    limits |= {"AS": memory} if sys.platform == "linux" else {}
    limits |= {"NPROC": THREADS} if mode == "sandbox" else {}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if mode == "sandbox":
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        call("capset", struct.pack("II", 0x20080522, 0), bytes(24))
        call("prctl", PDEATHSIG, 9, 0, 0, 0)  # the child dies with the process that keeps its time
        call("prctl", DUMPABLE, 0, 0, 0, 0)  # no core dump, which programs outside would read
        call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
        close_system_calls()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def run(program, tests):
    """Run the program, then its tests with a copy of the names that it defined. Returns how it went."""
    main = sys.modules["__main__"] = type(sys)("__main__")
    try:
        exec(compile(program, "<program>", "exec"), vars(main))
        exec(compile(tests, "<tests>", "exec"), dict(vars(main)))
        return "passed\n"
    except MemoryError:
        return "memory\n"
    except AssertionError as error:
        return f"wrong\n{str(error)[:200]}"
    except BaseException as error:
        return f"error\n{type(error).__name__}: {str(error)[:200]}"


def main():
    mode, timeout, memory = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    program, tests = marshal.load(sys.stdin.buffer)
    uid = os.getuid() or 61184 + os.getpid() % 4000  # root's programs get ids that no user has
    os.umask(0o022)
    if mode == "sandbox":
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if the machine's memory runs out, the program goes first
        enter_namespaces(os.getuid(), os.getgid())
        build_root(uid)
    heard, report = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        os.setsid()
        confine(mode, uid, timeout, memory)
        os.write(report, b"!")
        try:
            os.write(report, run(program, tests).encode("utf-8", "replace"))
        finally:
            os._exit(0)  # without atexit, and without waiting for threads
    os.close(report)
    if not os.read(heard, 1):
        sys.exit(1)  # the walls could not be built, and the child has said why on stderr
    verdict = os.read(heard, 1000) if select.select([heard], [], [], timeout)[0] else b"timeout\n"
    os.killpg(child, 9)
    os.waitpid(child, 0)
    os.write(1, verdict)


if __name__ == "__main__":
    main()
