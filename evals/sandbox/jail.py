"""The inside of evals/sandbox/sandbox.py: a process that runs one program and says how it went.

  python -s -S -P jail.py MODE TIMEOUT MEMORY FOLDER      the program, marshalled, on stdin; reason and detail on stdout

Three processes in a row: this one makes the walls, its child (the supervisor, process 1 of a new world where the system
allows one) keeps the time and ends everything, its grandchild runs the program. Nothing but a few light modules is
imported, as this file starts once per program.
"""
import builtins
import marshal
import os
import resource
import select
import sys
import time

__builtins__ = vars(builtins).copy()  # what a program does to builtins does not reach the functions below

PROCESSES, FILES, FILE_SIZE, DISK = 32, 128, 16 * 2**20, 64 * 2**20  # what a program may have: processes and threads, open files, bytes
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000  # from linux/sched.h
NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 2, 4, 32, 4096, 16384, 1 << 18  # from linux/mount.h; read-only is 1
PDEATHSIG, DUMPABLE, CHILD_SUBREAPER, NO_NEW_PRIVS = 1, 4, 36, 38  # from linux/prctl.h
FAILURES = b"wrong\n", b"error\n", b"memory\n"  # what a program may say of itself
LINUX = sys.platform == "linux"

# Events of sys.audit that a program may not cause: they lead to objects it has no name for, or to raw memory.
CLOSED = ("ctypes.", "gc.get_", "sys.settrace", "sys.setprofile", "sys._current_", "code.__new__")
# Without namespaces, what reaches other processes is closed too, and changes outside the program's folder.
CLOSED_ELSEWHERE = ("os.fork", "os.kill", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.", "pty.", "socket.",
                    "signal.pthread_kill", "resource.prlimit", "os.link", "os.symlink")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr")
RAW = ("ctypes", "_ctypes", "_xxsubinterpreters", "_interpreters", "_testcapi", "_testinternalcapi")


def call(name, *args):
    """A function of the C library; OSError if it fails. No name of ctypes is left where a program could find it."""
    import ctypes
    args = [arg.encode() if isinstance(arg, str) else ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args]
    if ctypes.CDLL(None, use_errno=True)[name](*args) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def drop_capabilities():
    import ctypes
    call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


# ---------------------------------------------------------------------------------------------------------------------
# Walls


def enter_namespaces():
    """Leave the network, the process table, the mounts; a normal user gets a user namespace to be allowed to."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", NEWNS | NEWPID | NEWNET | NEWIPC | (NEWUSER if uid else 0))
    if uid:
        for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)


def build_root(uid):
    """A file tree in memory instead of the machine's: system and Python libraries, read-only, and an empty /tmp.

    No home, no /proc, no /sys; it needs no cleaning up, as it goes when its last process goes.
    """
    call("mount", None, "/", None, REC | PRIVATE, None)
    call("mount", "tmpfs", "/proc", "tmpfs", NOSUID | NODEV, f"size={DISK},nr_inodes=4000,mode=755")
    os.chdir("/proc")  # it has to be mounted somewhere; nobody needs the processes any more
    for path in ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc", "/nix/store", sys.base_prefix, sys.base_exec_prefix,
                 "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        inside = "." + path
        if not os.path.exists(path) or os.path.exists(inside):
            continue
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
            continue
        os.mkdir(inside) if os.path.isdir(path) else os.close(os.open(inside, os.O_CREAT))
        call("mount", path, inside, None, BIND | REC, None)
        if os.path.isdir(path):  # flags that the mount has already must be kept
            call("mount", None, inside, None, REMOUNT | BIND | os.ST_RDONLY | NOSUID | NODEV | os.statvfs(path).f_flag & 15, None)
    os.mkdir("tmp", 0o700)
    os.chown("tmp", uid, -1)
    call("pivot_root", ".", ".")
    call("umount2", ".", 2)  # 2: detach, the old root lies on top of the new one
    os.chdir("/tmp")


def tasks_of_user():
    """Processes and threads of this user: what the kernel counts, together with ours, where there is no namespace."""
    tasks = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            tasks += len(os.listdir(f"/proc/{pid}/task")) if os.stat(f"/proc/{pid}").st_uid == os.getuid() else 0
        except OSError:
            pass  # it has ended meanwhile
    return tasks


def set_limits(timeout, memory, processes):
    limits = {"CPU": int(timeout) + 2, "AS": memory, "FSIZE": FILE_SIZE, "NOFILE": FILES, "CORE": 0, "NPROC": processes}
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        if LINUX or name not in ("AS", "NPROC"):  # macOS refuses the first and counts the second for the whole user
            resource.setrlimit(number, (value, value))


def watch_events(mode, folder):
    """Close the doors of sys.audit. A hook cannot be taken away from within Python; its names are bound here, out of reach."""
    closed, raw, changes = CLOSED, RAW, CHANGES
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    stat, cwd, normal, null = os.stat, os.getcwd, os.path.normpath, os.devnull
    if mode != "namespace":
        closed, raw = CLOSED + CLOSED_ELSEWHERE, RAW + ("_posixsubprocess",)
        sys.modules["_posixsubprocess"] = stub = type(sys)("_posixsubprocess")  # so that subprocess can be imported
        stub.fork_exec = None

    def is_folder(path):
        try:
            return stat(path).st_mode & 0o170000 == 0o040000
        except OSError:
            return False

    def outside(path):
        if isinstance(path, int):
            return False  # an open file
        path = path.decode("utf-8", "surrogateescape") if isinstance(path, bytes) else path
        whole = normal(path if path.startswith("/") else f"{cwd()}/{path}")
        return ".." in path or not whole.startswith(f"{folder}/") and path != null

    def hook(event, args):
        if event == "import" and args[0] in raw:
            raise ImportError(f"{args[0]} is closed")
        bad = event.startswith(closed)
        if mode != "namespace" and not bad:
            if event == "open":
                bad = (args[2] & writing or is_folder(args[0])) and outside(args[0])
            elif event in changes:
                bad = outside(args[0]) or event == "os.rename" and outside(args[1])
        if bad:
            raise RuntimeError(f"{event} is closed")

    sys.addaudithook(hook)


# ---------------------------------------------------------------------------------------------------------------------
# The program


def steps(report, go, mode, folder):
    """The things to do, in order, as (function, arguments); the last one reports success.

    The tests see what the program defined, but builtins and modules of their own, so that it cannot patch those for them.
    """
    program, tests, entry_point, imports = marshal.loads(os.fdopen(0, "rb", closefd=False).read())
    before = set(sys.modules)
    for name in imports:
        __import__(name)
    own = dict(sys.modules)
    for name in (own.keys() - before) | {name for name in own if name.partition(".")[0] in RAW}:
        del sys.modules[name]
    general = builtins.__import__

    def importer(name, globals=None, locals=None, fromlist=(), level=0):
        bound = name if fromlist else name.partition(".")[0]
        return own[bound] if name in own and name not in before else general(name, globals, locals, fromlist, level)

    main = sys.modules["__main__"] = type(sys)("__main__")
    names, test_names = vars(main), {}
    clean = {**vars(builtins), "__import__": importer}
    kept = {name: value for name, value in clean.items() if name != entry_point} | {"__builtins__": clean, "__name__": "tests"}
    doing = [(exec, (compile(program, "<program>", "exec"), names)), (test_names.update, (names,)), (test_names.update, (kept,)),
             (exec, (compile(tests, "<tests>", "exec"), test_names)), (os.write, (report, os.read(go, 32)))]
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.close(go)
    sys.argv = ["program"]
    watch_events(mode, folder)
    return doing


def run(report, *settings):
    """Do the steps in this process, then end it. What went wrong is written to `report`: reason, newline, detail."""
    try:
        # The steps lie in an iterator on the evaluation stack: with gc's searches closed, the program finds no way from
        # any frame or name to them, nor to the token that the last one writes.
        for act, arguments in steps(report, *settings):
            act(*arguments)
    except MemoryError:
        os.write(report, b"memory\n")
    except AssertionError as error:
        os.write(report, f"wrong\n{str(error)[:200]}".encode("utf-8", "replace"))
    except BaseException as error:
        os.write(report, f"error\n{type(error).__name__}: {str(error)[:200]}".encode("utf-8", "replace"))
    finally:
        os._exit(0)  # no atexit, no threads to wait for


def supervise(mode, timeout, memory, folder, uid, processes):
    """Run the program in a child, for at most `timeout` seconds; returns its verdict when all of its processes are gone
    (in a namespace: they go when this process goes)."""
    heard, report = os.pipe()
    go, say_go = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setsid()
            os.close(heard)
            os.close(say_go)
            set_limits(timeout, memory, processes)
            if os.getuid() == 0 and mode != "plain":
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            if LINUX:
                drop_capabilities()
                call("prctl", PDEATHSIG, 9, 0, 0, 0)
                call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
                call("prctl", DUMPABLE, 0, 0, 0, 0)  # its own children cannot read its memory
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        run(report, go, mode, folder)
    os.close(report)
    os.close(go)
    token = os.urandom(32)
    os.write(say_go, token)
    verdict, end = None, time.monotonic() + timeout
    while verdict is None:
        left = end - time.monotonic()
        # Asked before listening: what a program said before it ended lies in the pipe by then. (A child of its own may hold the pipe open.)
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if left <= 0:
            verdict = b"timeout\n"
        elif select.select([heard], [], [], 0 if ended else min(left, 0.05))[0]:
            said = os.read(heard, 1000)
            verdict = b"passed\n" if said == token else said if said.startswith(FAILURES) else b"killed\n" + said[:100]
        elif ended:
            verdict = b"killed\n"
    if mode != "namespace":
        end_children(child)
    return verdict


def end_children(child):
    """Kill the child's group and every process that descends from us: orphans become our children (CHILD_SUBREAPER)."""
    groups = [child]
    while True:
        for pid in groups + ([int(pid) for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split()] if LINUX else []):
            for kill in (os.killpg, os.kill):
                try:
                    kill(pid, 9)
                except OSError:
                    pass
        try:
            pid = os.waitpid(-1, 0)[0]
            groups = [child] if pid != child else []
        except ChildProcessError:
            return


def main():
    mode, timeout, memory, folder = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), os.path.realpath(sys.argv[4])
    os.umask(0o022)
    user = os.getuid()
    uid = user or 61184 + os.getpid() % 4000  # one of its own, which no real user has, for each program that root runs
    known = LINUX and user and (mode != "namespace" or tuple(map(int, os.uname().release.split(".")[:2])) < (5, 14))
    processes = PROCESSES + (tasks_of_user() if known else 0)
    if LINUX:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if memory runs out, the program goes first
    if mode == "namespace":
        enter_namespaces()
        supervisor = os.fork()
        if supervisor:
            os.waitpid(supervisor, 0)
            os._exit(0)
        call("prctl", PDEATHSIG, 9, 0, 0, 0)
        build_root(uid)
        folder = "/tmp"
    else:
        os.chdir(folder)
        if user == 0:
            os.chown(folder, uid if mode == "user" else 0, -1)
        if LINUX:
            call("prctl", CHILD_SUBREAPER, 1, 0, 0, 0)
    os.write(1, supervise(mode, timeout, memory, folder, uid, processes))
    os._exit(0)


if __name__ == "__main__":
    main()
