"""Hostile programs, sorted by the wall that has to stop them; test_sandbox.py runs them. What each one tries
stands above it. It comes to its end only if that succeeds, except those that make a mess to be cleaned up."""
import os
import re

from evals.sandbox import jail

# What all programs know: PLANTED, a file that everyone may write to; CALLER, the caller's process id; PORT, a
# server's; syscall, which raises OSError if the kernel refuses; some, which tries one thing in several ways.
PRELUDE = """
import ctypes, os, resource, sys
PLANTED, CALLER, PORT = {planted!r}, {caller}, {port}
def syscall(*args):
    if ctypes.CDLL(None, use_errno=True).syscall(*map(ctypes.c_long, args)) < 0:
        raise OSError(ctypes.get_errno(), "refused")
def some(attempt, arguments):
    for argument in arguments:
        try:
            return attempt(argument)
        except OSError:
            pass
    raise OSError("none of them")
"""

TEXTS = {"files": """
# reads a file of the caller
open(PLANTED).read()
# reads a file of the caller by a path that only looks harmless
class Path(str):
    def startswith(self, *args): return True
open(Path(PLANTED)).read()
# reads a file of the caller from the folder above
open("../" * 30 + PLANTED).read()
# reads a file of the caller through a link
os.symlink("/", "root")
open("root" + PLANTED).read()
# reads a file of the caller through the process table
open(f"/proc/{CALLER}/root{PLANTED}").read()
# reads a file of the caller through its own entry there
open(f"/proc/self/root{PLANTED}").read()
# reads a file of the caller as an sqlite database
import sqlite3
sqlite3.connect(f"file:{PLANTED}?mode=rw", uri=True).execute("create table x (y)")
# writes to a file of the caller
open(PLANTED, "w").write("broken")
# removes a file of the caller
os.remove(PLANTED)
# replaces a file of the caller
open("mine", "w").write("broken")
os.replace("mine", PLANTED)
# makes a pipe beside a file of the caller
os.mkfifo(PLANTED + ".fifo")
# turns its folder into a link and removes what lies behind it
here = os.getcwd()
os.rmdir(here)
os.symlink("/", here)
os.remove(here + PLANTED)
# lists the users
open("/etc/passwd").read()
# lists home folders
os.listdir("/home"), os.listdir("/root")
# adds a module to the library
import json
open(os.path.join(os.path.dirname(json.__file__), "planted.py"), "w").write("x = 1")
# changes a module of the library
open(os.__file__, "r+").write("#")
# makes a module of the library writable
os.chmod(os.__file__, 0o666)
# removes a folder of the library
import shutil
shutil.rmtree(os.path.dirname(os.__file__))
# leaves a file in shared memory
open(f"/dev/shm/hostile-{CALLER}", "w").write("x")
# opens the terminal
open("/dev/tty", "w")
# opens the machine's memory or its messages
some(open, ["/dev/mem", "/dev/kmsg", "/dev/kcore", "/proc/kcore"])
# opens a disk
some(open, ["/dev/" + name for name in ("sda", "vda", "nvme0n1", "xvda", "loop0", "fuse")])
# makes a device of its own
os.mknod("memory", 0o20666, os.makedev(1, 1))
# finds an open folder of the machine
some(os.fchdir, range(64))
""", "walls themselves": """
# mounts the machine's file system again
if ctypes.CDLL(None).mount(b"/", b"/tmp", None, 4096, None) < 0: raise OSError
# makes the library writable again
if ctypes.CDLL(None).mount(None, b"/usr/lib", None, 32 | 4096, None) < 0: raise OSError
# takes its file tree away
if ctypes.CDLL(None).umount2(b"/", 2) < 0: raise OSError
# changes its root folder
os.chroot("/tmp")
# becomes root
os.setuid(0)
# becomes root of a namespace of its own
if ctypes.CDLL(None).unshare(0x10000000) < 0: raise OSError
# takes capabilities back
header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[2**32 - 1] * 6)
if ctypes.CDLL(None).capset(header, rights) < 0: raise OSError
# sets the clock
import time
time.clock_settime(time.CLOCK_REALTIME, 0)
# renames the machine
import socket
socket.sethostname("hostile")
# runs before all others
os.nice(-20)
# runs in real time
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
# gives itself more memory
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
# gives itself more time
resource.setrlimit(resource.RLIMIT_CPU, (10**6,) * 2)
# calls the kernel in the way of 32-bit programs, to fork
import mmap
if os.uname().machine != "x86_64": raise OSError
memory = mmap.mmap(-1, 4096, prot=7)
memory.write(b"\\xb8\\x02\\0\\0\\0\\xcd\\x80\\xc3")
if ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))() < 0: raise OSError
# calls the kernel by x86's third table of calls, to fork
syscall(2**30 + 57)
# makes a process by clone, without a thread
syscall({"x86_64": 56, "aarch64": 220}[os.uname().machine], 17, 0, 0, 0, 0)
""", "processes": """
# forks
os.fork()
# starts a program
import subprocess
subprocess.run(["/bin/true"])
# starts a program in the other way
os.posix_spawn("/bin/true", ["true"], {})
# starts a shell
if os.system("true"): raise OSError
# becomes another program
os.execv(sys.executable, [sys.executable, "-c", "pass"])
# starts workers
import multiprocessing
multiprocessing.Process(target=print).start()
# starts a terminal of its own
import pty
pty.fork()
# sees the caller
os.kill(CALLER, 0)
# kills the caller
os.kill(CALLER, 9)
# kills everyone
os.kill(-1, 9)
# sees any other process
some(lambda pid: os.kill(pid, 0), range(2, 5000))
# sees the process that started it
assert os.getppid()
# opens the caller for signals
os.pidfd_open(CALLER)
# changes the caller's limits
resource.prlimit(CALLER, resource.RLIMIT_NOFILE, (64, 64))
# changes the caller's priority
os.setpriority(os.PRIO_PROCESS, CALLER, 19)
# binds the caller to one core
os.sched_setaffinity(CALLER, {0})
# reads the caller's memory
open(f"/proc/{CALLER}/mem", "rb")
# reads the caller's environment
open(f"/proc/{CALLER}/environ").read()
# traces the caller
if ctypes.CDLL(None).ptrace(16, CALLER, None, None) < 0: raise OSError
""", "supervisor": """
# changes limits of any other process
some(lambda pid: resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1)), range(2, 5000))
# kills any other process
some(lambda pid: os.kill(pid, 9), range(2, 5000))
# stops any other process
some(lambda pid: os.kill(pid, 19), range(2, 5000))
# outlives the supervisor
if ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) < 0: raise OSError
# finds the end of a pipe at which the supervisor listens
import fcntl, stat
def listens(file):
    if not stat.S_ISFIFO(os.fstat(file).st_mode) or fcntl.fcntl(file, fcntl.F_GETFL) & 3: raise OSError
some(listens, range(3, 64))
# closes every file, so that there is no report
os.closerange(0, 64)
# ends in good order before its tests
os._exit(0)
# ends by an exception that means the end
raise SystemExit(0)
# ends itself by a signal
import signal
signal.signal(6, signal.SIG_DFL)
os.abort()
# breaks the interpreter
ctypes.string_at(0)
# breaks the interpreter by depth
sys.setrecursionlimit(10**9)
class A:
    def __getattr__(self, name): return getattr(self, name)
A().x
# says that it has passed where people read
print("passed\\n" * 100)
raise SystemExit
# leaves a text open, so that it takes in its tests
x = \"\"\"
""", "network": """
# reaches a server on this machine
import socket
socket.create_connection(("127.0.0.1", PORT)).send(b"hello")
# sends a datagram
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9))
# asks for an address
import socket
socket.getaddrinfo("example.com", 80)
# listens
import socket
socket.create_server(("127.0.0.1", 0))
# reaches the host of a virtual machine
import socket
socket.socket(40, socket.SOCK_STREAM).connect((2, 1024))
# reaches a service by a socket without a file
import socket
socket.socket(socket.AF_UNIX).connect("\\0/tmp/.X11-unix/X0")
# reads the network's tables
import socket
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
# uses the kernel's ciphers
import socket
socket.socket(38, socket.SOCK_SEQPACKET)
# makes the kernel load another network
import socket
try: socket.socketpair(30)
except PermissionError: raise
except OSError: pass
# reads packets
import socket
socket.socket(17, socket.SOCK_RAW)
""", "memory": """
# takes 800 MB in one piece
x = [0] * 10**8
# takes 700 MB in pieces
x = [bytes(2**20) for _ in range(700)]
# maps 700 MB that are shared
import mmap
x = mmap.mmap(-1, 700 * 2**20)
# takes 750 MB in files in memory
files = [os.memfd_create(str(i)) for i in range(50)]
for file in files: os.write(file, bytes(15 * 2**20))
# takes shared memory that no process holds
segment = ctypes.CDLL(None).shmget(0, 100 * 2**20, 0o1600)
if segment < 0: raise OSError
# takes 100 MB in pipes
import fcntl
for _ in range(100):
    _, end = os.pipe()
    fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 2**20), os.write(end, bytes(2**20))
# takes 400 MB in pipes that are under way between two sockets
import array, fcntl, socket
a, b = socket.socketpair()
for _ in range(400):
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 2**20), os.write(ends[1], bytes(2**20))
    a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", ends))])
    os.close(ends[0]), os.close(ends[1])
# pins large pages by their first bytes, in a pipe, so that they stay when their memory is given back
assert os.uname().machine == "x86_64"
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
for _ in range(20):
    _, end = os.pipe()
    start = libc.mmap(None, ctypes.c_long(2**26), 3, 0x22, -1, ctypes.c_long(0))
    libc.madvise(ctypes.c_void_p(start), ctypes.c_long(2**26), 14)
    places = range(start + -start % 2**21, start + 2**26 - 2**21, 2**21)[:15]
    pieces = (ctypes.c_long * 30)()
    for i, place in enumerate(places):
        ctypes.memset(place, 1, 1)
        pieces[2 * i], pieces[2 * i + 1] = place, 1
    syscall(278, end, ctypes.addressof(pieces), 15, 0)
    libc.munmap(ctypes.c_void_p(start), ctypes.c_long(2**26))
# makes a thousand threads
import threading, time
for _ in range(1000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
# makes threads with large stacks
import threading, time
threading.stack_size(100 * 2**20)
for _ in range(9): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
# opens a hundred files
files = [open(str(i), "w") for i in range(100)]
# opens a hundred ends
ends = [os.eventfd(0) for _ in range(100)]
""", "disk": """
# writes 200 MB to one file
with open("big", "wb") as file: file.writelines(bytes(2**20) for _ in range(200))
# writes 90 MB to six files
for i in range(6): open(str(i), "wb").write(bytes(15 * 2**20))
# writes beside its folder
for i in range(6): open(f"/{i}", "wb").write(bytes(15 * 2**20))
# makes a file of a terabyte
os.truncate(os.open("large", os.O_CREAT | os.O_WRONLY), 2**40)
# reserves 90 MB
for i in range(6): os.posix_fallocate(os.open(str(i), os.O_CREAT | os.O_WRONLY), 0, 15 * 2**20)
# makes 5,000 files
for i in range(5000): open(str(i), "w").close()
# makes 5,000 folders
for i in range(5000): os.mkdir(str(i))
# makes 5,000 links
for i in range(5000): os.symlink("x" * 4000, str(i))
# hides 90 MB in files without names
files = [os.open(".", os.O_TMPFILE | os.O_RDWR) for i in range(6)]
for file in files: os.write(file, bytes(15 * 2**20))
""", "output": """
# reports in place of its tests, and at length
for fd in range(3, 64):
    try: os.write(fd, b"x" * 10000)
    except OSError: pass
# fails with a very long text
raise ValueError("x" * 10**8)
# fails with a text that moves a terminal
raise ValueError("\\033[2J\\033]0;title\\a\\r\\n\\u202e")
# fails with a text that is none
raise ValueError("\\ud800\\0")
# fails with a text that fails
class Error(Exception):
    def __str__(self): raise self
raise Error
# fails without memory to say so
x = []
while True: x.append(bytes(2**16))
""", "time": """
# never ends
while True: pass
# never wakes
import time
time.sleep(1e6)
# computes for ever where Python cannot be interrupted
7 ** 10 ** 8
# searches for ever
import re
re.match("(a+)+$", "a" * 50 + "b")
# waits for itself
import threading
lock = threading.Lock()
lock.acquire(), lock.acquire()
# ignores all signals
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.pause()
# computes in many threads
import threading
def forever():
    while True: pass
for _ in range(20): threading.Thread(target=forever).start()
forever()
# prints for ever
while True: print("x" * 10000)
# complains for ever
while True: sys.stderr.write("x" * 10000)
""", "clean-up": """
# 1,200 folders in one another
for _ in range(1200): os.mkdir("d"), os.chdir("d")
# 60 folders with names of 200 letters in one another
for _ in range(60): os.mkdir("d" * 200), os.chdir("d" * 200)
# folders that nobody may open
os.makedirs("a/b/c")
for path in ("a/b/c", "a/b", "a", "."): os.chmod(path, 0)
# 3,000 files
for i in range(3000): open(str(i), "w").close()
# names that are no text
open(b"\\xff\\n\\033[2J", "w"), os.mkdir(b"-rf *")
# links, pipes and sockets
os.symlink("/", "link"), os.symlink("link", "dangling"), os.mkfifo("pipe"), os.mkdir("-")
# no folder, where it may be removed
try: os.rmdir(os.getcwd())
except OSError: pass
# a thread that goes on
import threading, time
threading.Thread(target=time.sleep, args=(100,)).start()
"""}


def programs(text):
    """{what it tries: code} of a list of programs."""
    parts = re.split(r"^# (.*)\n", text.strip("\n"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


WALLS = {wall: programs(text) for wall, text in TEXTS.items()}
WALLS["system calls"] = {  # these come to their end unless the kernel says "not permitted"
    f"calls {name}": f"try: syscall({numbers[os.uname().machine == 'aarch64']}, 0, 0, 0, 0, 0)\n"
                     "except PermissionError: raise\nexcept OSError: pass"
    for name, numbers in jail.CLOSED.items() if numbers[os.uname().machine == "aarch64"]}
