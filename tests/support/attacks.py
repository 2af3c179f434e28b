"""Attacks on the sandbox: programs that try to pass tests without computing, or to reach something outside.

Each passes its tests only if it succeeds. A wrong `answer` succeeds if tests of 18x + 17 pass; one that reaches for
something returns True once it has it. @NAME@ stands for something outside the sandbox, see `Outside` in the tests.
"""

# ruff: noqa: E501 — a program on one line is easier to compare with its neighbours

from dataclasses import dataclass
from textwrap import dedent, indent

from tests.support.swallowed import SWALLOWED

__all__ = ["ATTACKS", "ENDLESS", "UNISOLATED", "Attack"]

FORMULA = "assert answer(3) == 71\nassert answer(10) == 197"
REACHED = "assert answer() is True"
SORTED = "x = [3, 1, 2]\nassert answer(x) == sorted(x)"
MAPPED = "assert all(map(lambda x: answer(x) == 18 * x + 17, range(9)))"


@dataclass(frozen=True)
class Attack:
    """`statuses` are the results that may follow; none of them is `passed`."""

    name: str
    program: str
    tests: str = FORMULA
    statuses: tuple[str, ...] = ("failed",)


def wrong(name: str, program: str, *statuses: str, tests: str = FORMULA) -> Attack:
    return Attack(name, dedent(program), tests, statuses or ("failed",))


def reach(name: str, body: str, *statuses: str) -> Attack:
    """The body raises or returns False where it has reached nothing."""
    attempt = indent(f"{body}\nreturn True", " " * 8)
    head = "import ctypes, glob, os, socket, subprocess, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    program = f"{head}def answer():\n    try:\n{attempt}\n    except BaseException:\n        return False\n"
    return Attack(name, program, REACHED, statuses or ("failed",))


def raising(name: str, kind: str, tests: str = FORMULA) -> Attack:
    return wrong(name, f"def answer(x): raise {kind}", "error", tests=tests)


def returning(name: str, before: str, value: str, *statuses: str) -> Attack:
    return wrong(name, f"{dedent(before)}\ndef answer(x): return {value}\n", *statuses)


NETWORK = (
    reach("network: TCP", "socket.create_connection(('127.0.0.1', @PORT@), 2)"),
    reach("network: UDP", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'secret', ('127.0.0.1', @PORT@))"),
    reach("network: Unix socket", "socket.socket(socket.AF_UNIX).connect('@UNIX@')"),
    reach("network: abstract Unix socket", "socket.socket(socket.AF_UNIX).connect('\\0@ABSTRACT@')"),
    reach("network: DNS", "socket.getaddrinfo('localhost', 80)"),
    reach("network: netlink", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"),
    reach("network: interfaces", "return len(socket.if_nameindex()) > 1"),
    reach("network: socket pair", "socket.socketpair()"),
    reach("network: urllib", "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:@PORT@', timeout=2)"),
)

FILES = (
    reach("read /etc/passwd", "return 'root' in open('/etc/passwd').read()"),
    reach("read /etc/shadow", "return 'root' in open('/etc/shadow').read()"),
    reach("read the environment's secrets", "return '@SECRET@' in str(os.environ)"),
    reach("read the parent's environment", "return '@SECRET@' in open(f'/proc/{os.getppid()}/environ').read()"),
    reach("read the home folder", "return bool(os.listdir(os.path.expanduser('@HOME@')))"),
    reach("read SSH keys", "return bool(glob.glob('@HOME@/.ssh/*') + glob.glob('/etc/ssh/*'))"),
    reach("read the repository", "return 'policy_seed' in open('@REPOSITORY@/params.yaml').read()"),
    reach("read a file by its path", "return '@SECRET@' in open('@FOLDER@/secret.txt').read()"),
    reach("read the tests from /proc/*/cmdline", "return any(open(f).read() for f in glob.glob('/proc/[0-9]*/cmdline'))"),
    reach("read memory by /proc/self/mem", "open('/proc/self/mem', 'rb')"),
    reach("read the host by /proc/1/root", "return bool(os.listdir('/proc/1/root/home'))"),
    reach("list open descriptors by /proc", "return bool(os.listdir('/proc/self/fd'))"),
    reach("read /sys", "return bool(os.listdir('/sys'))"),
    reach("read /dev", "return sorted(os.listdir('/dev')) != ['null']"),
    reach("read the host's files in /tmp", "return os.path.exists('/tmp')"),
    reach("import an installed package", "import numpy"),
    reach("symbolic link in scratch", "os.symlink('/ours', '/scratch/link')"),
    reach("hard link in scratch", "os.link(sys.executable, '/scratch/link')"),
    reach("climb out of scratch", "return '@SECRET@' in open('/scratch/../../../..@FOLDER@/secret.txt').read()"),
    reach("write a file outside scratch", "open('@FOLDER@/written', 'w').write('x')"),
    reach("write into the root folder", "open('/written', 'w').write('x')"),
    reach("delete a file outside scratch", "os.unlink('@FOLDER@/secret.txt')"),
    reach(
        "overwrite the runner",
        "import tasks.rewards.sandbox.inside.codec as codec\nopen(codec.__file__, 'a').write('x')",
    ),
    reach("write sitecustomize", "open(os.path.dirname(os.__file__) + '/sitecustomize.py', 'w').write('x')"),
    reach("write a .pth file", "open(os.path.dirname(os.__file__) + '/site-packages/x.pth', 'w').write('x')"),
    reach("overwrite Python", "open(sys.executable, 'ab').write(b'x')"),
    reach("chmod", "os.chmod('/ours', 0o777)"),
    reach("chmod in scratch", "open('/scratch/x', 'w')\nos.chmod('/scratch/x', 0o4777)"),
    reach("chroot", "os.chroot('/scratch')"),
    reach("device node", "os.mknod('/scratch/disk', 0o60666, os.makedev(8, 0))"),
    reach("named pipe", "os.mkfifo('/scratch/pipe')"),
    reach("mount", "return libc.mount(b'x', b'/scratch', b'tmpfs', 0, 0) == 0"),
    reach("mount writable again", "return libc.mount(b'', b'/', b'', 4128, 0) == 0"),
    reach("unmount", "return libc.umount2(b'/ours', 2) == 0"),
    reach("fill the disk", "open('/scratch/x', 'wb').write(b'x' * (64 << 20))"),
    reach(
        "fill the disk with many files",
        "for i in range(60):\n    open(f'/scratch/{i}', 'wb').write(b'x' * (1 << 20))",
    ),
    reach("open files without end", "held = [open('/dev/null') for _ in range(5000)]"),
    reach("core dump", "os.chdir('/scratch')\nos.abort()", "error"),
)  # fmt: skip

SYSTEM_CALLS = {
    "ptrace": "101, 0, 0, 0, 0", "process_vm_readv": "310, os.getpid(), 0, 0, 0, 0, 0",
    "process_vm_writev": "311, os.getpid(), 0, 0, 0, 0, 0", "clone": "56, 0x11, 0, 0, 0, 0", "clone3": "435, 0, 0",
    "vfork": "58", "execveat": "322, 0, 0, 0, 0, 0", "unshare": "272, 0x10000000", "setns": "308, 0, 0",
    "pivot_root": "155, 0, 0", "bpf": "321, 0, 0, 0", "perf_event_open": "298, 0, 0, 0, 0, 0",
    "keyctl": "250, 0, 0, 0", "add_key": "248, 0, 0, 0, 0, 0", "userfaultfd": "323, 0", "io_uring_setup": "425, 1, 0",
    "kexec_load": "246, 0, 0, 0, 0", "init_module": "175, 0, 0, 0", "memfd_create": "319, b'x', 0",
    "shmget": "29, 0, 4096, 0o1600", "mq_open": "240, b'x', 0, 0, 0", "prctl": "157, 4, 1, 0, 0, 0",
    "seccomp": "317, 0, 0, 0", "pidfd_open": "434, 1, 0", "sendmsg": "46, 1, 0, 0", "personality": "135, 0xffffffff",
    "modify_ldt": "154, 0, 0, 0",
}  # fmt: skip
"""Bare system calls of x86-64 → number and arguments; one succeeds unless it returns −1 with EPERM."""

PROCESSES = (
    reach("fork bomb", "while True:\n    os.fork()"),
    reach("fork", "if os.fork() == 0:\n    os._exit(0)"),
    reach("background daemon", "if os.fork() == 0:\n    os.setsid()\n    import time\n    time.sleep(1000)"),
    reach("subprocess", "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])"),
    reach("os.system", "return os.system('true') == 0"),
    reach("os.posix_spawn", "return os.posix_spawn(sys.executable, ['python', '-c', ''], {}) > 0"),
    reach("multiprocessing", "import multiprocessing\nmultiprocessing.Process(target=print).start()"),
    reach("thread", "import threading\nthreading.Thread(target=print).start()"),
    reach("execve", "os.execv(sys.executable, ['python', '-c', 'while True: pass'])"),
    reach("execve of a program in memory", "return libc.fexecve(os.open(sys.executable, 0), 0, 0) == 0"),
    reach("signal to the parent", "os.kill(os.getppid(), 9)"),
    reach("signal to all", "os.kill(-1, 9)"),
    reach("signal to the group", "os.killpg(0, 9)"),
    reach("see other processes", "os.kill(os.getppid(), 0)"),
    reach("not the only process", "return os.getpid() != 1"),
    reach("root", "os.setuid(0)"),
    reach("higher limits", "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))"),
    reach("higher limits by prlimit", "import resource\nresource.prlimit(0, resource.RLIMIT_AS, (-1, -1))"),
    reach("lower priority of others", "os.setpriority(os.PRIO_USER, 0, 19)"),
    reach("host name", "socket.sethostname('x')"),
    reach("the host's name", "return os.uname().nodename != 'sandbox'"),
    *(
        reach(
            f"system call: {name}",
            f"libc.syscall.restype = ctypes.c_long\nreturn libc.syscall({call}) != -1 or ctypes.get_errno() != 1",
        )
        for name, call in SYSTEM_CALLS.items()
    ),
    reach("32-bit system call table", "return libc.syscall(0x40000000 + 39) != -1", "error"),
)

FORGE = """
import os
from tasks.rewards.sandbox.inside import codec
for word in (("passed", "", 9), ("loaded", None), ("returned", (71, [])), "passed"):
    for fd in range(3, 64):
        try:
            codec.write_frame(fd, codec.encode(word, 999))
        except OSError:
            pass
def answer(x): return 0
"""

SPY = """
import gc, inspect, re, sys
def texts():
    frame = sys._getframe()
    while frame:
        yield from map(repr, [*frame.f_locals.values(), *frame.f_globals.values(), frame.f_code.co_consts])
        frame = frame.f_back
    yield from map(repr, gc.get_objects())
    yield from (repr(vars(module)) for module in list(sys.modules.values()))
    yield repr(sys.argv) + repr(inspect.stack())
def answer():
    return any(re.search('MARK[-]OF[-]THE[-]TESTS', text) for text in texts())
"""

PUPPET = """
import os
from tasks.rewards.sandbox.inside import codec
real = codec.read_frame
def puppet(channel, limit):
    text = real(channel, limit)
    ticket = codec.decode(text)[0]
    {act}
    return text
codec.read_frame = puppet
def answer(x): return 0
"""


def puppet(name: str, act: str, *statuses: str) -> Attack:
    """Takes over the runner's own loop, so that it sends what it likes on the channel (descriptor 4), with true tickets."""
    return Attack(name, PUPPET.format(act=act), FORMULA, statuses)


NAMELESS = "class M(type):\n    __name__ = property(lambda c: 10 ** 5000)\nclass E(Exception, metaclass=M): pass\n"

FIRST_CALL = (
    puppet("answer with a huge number", "codec.write_frame(4, codec.encode((ticket, 'returned', (10**5000, [])), 9999))", "failed", "error"),
    puppet("name an exception by a huge number", "codec.write_frame(4, codec.encode((ticket, 'raised', 10**5000), 9999))", "error"),
    puppet("name a type by a huge number", "codec.write_frame(4, codec.encode((ticket, 'not plain', 10**5000), 9999))", "refused"),
    puppet("answer with sets of no text", "codec.write_frame(4, codec.encode((ticket, 'returned', ([set()] * 300_000, [])), 1 << 20))", "error", "failed", "memory"),
    wrong("huge number as the name of an exception", NAMELESS + "def answer(x): raise E", "error"),
    wrong("huge number as the name of an exception while loading", NAMELESS + "raise E", "error"),
    returning("huge number as the name of a type", NAMELESS, "E()", "error", "refused"),
    returning("huge number within the limit", "", "10 ** 50_000"),
    returning("sets that take more memory than their text", "", "[set()] * 300_000", "failed", "memory"),
    returning("keys of one hash", "", "{i * (2**61 - 1) for i in range(9000)}"),
)  # fmt: skip

VERDICT = (
    *(raising(f"raises {kind} in: {name}", kind, tests) for name, (kind, tests) in SWALLOWED.items()),
    *FIRST_CALL,
    wrong("sys.exit(0) while loading", "import sys\nsys.exit(0)", "error"),
    wrong("os._exit(0) while loading", "import os\nos._exit(0)", "error"),
    wrong("sys.exit(0) in the function", "import sys\ndef answer(x): sys.exit(0)", "error"),
    wrong("os._exit(0) in the function", "import os\ndef answer(x): os._exit(0)", "error"),
    wrong("print 'passed'", "def answer(x):\n    print('passed', flush=True)\n    return 'passed'"),
    wrong("forge a verdict on every descriptor", FORGE, "refused"),
    wrong(
        "write to every descriptor",
        """
        import os
        for fd in range(64):
            try:
                os.write(fd, b'passed\\n1\\n')
            except OSError:
                pass
        def answer(x): return 0
        """,
        "refused", "output_limit",
    ),
    wrong("close every descriptor", "import os\nos.closerange(0, 64)\ndef answer(x): return 0", "error", "refused"),
    wrong("answer ahead", FORGE.replace("range(3, 64)", "(4,)"), "refused"),
    puppet("answer twice", "codec.write_frame(4, codec.encode((ticket, 'returned', (18 * codec.decode(text)[2][0] + 17, [])), 999))", "refused"),
    puppet("answer with another ticket", "codec.write_frame(4, codec.encode(('0' * 16, 'returned', (71, [])), 999))", "refused"),
    puppet("answer with a verdict", "codec.write_frame(4, codec.encode((ticket, 'passed', None), 999))", "refused"),
    puppet("answer with no value", "codec.write_frame(4, b'l99:n')", "refused"),
    puppet("answer with unhashable keys", "codec.write_frame(4, b'm1:l0:n')", "refused"),
    puppet("announce four gigabytes", "os.write(4, b'\\xff' * 4)", "output_limit"),
    puppet("answer nested deeply", "codec.write_frame(4, b'l1:' * 50_000 + b'n')", "refused"),
    puppet("name an exception by a sentence", "codec.write_frame(4, codec.encode((ticket, 'raised', 'passed; ' * 9), 999))", "refused", "error"),
    returning(
        "patched builtins",
        """
        import builtins
        for name in ("all", "any", "isinstance", "len", "abs", "sorted", "compile", "exec"):
            setattr(builtins, name, lambda *_: True)
        builtins.AssertionError = KeyError
        """,
        "0", "error", "refused", "failed", "output_limit",
    ),
    returning("patched import", "import builtins\nbuiltins.__import__ = lambda *_: None", "0"),
    returning("import hook", "import sys\nsys.meta_path.insert(0, object())\nsys.path_hooks.clear()", "0"),
    returning("replaced modules", "import sys\nsys.modules['builtins'] = sys.modules['operator'] = sys", "0"),
    returning("patched codec", "from tasks.rewards.sandbox.inside import codec\ncodec.encode = lambda *_: b't'", "0", "refused"),
    returning(
        "patched __main__",
        "import sys\nfor m in list(sys.modules.values()):\n    vars(m).update(passed=True, verdict='passed', end=print)",
        "0",
    ),
    returning("trace function", "import sys\nsys.settrace(lambda *_: None)\nsys.setprofile(lambda *_: None)", "0"),
    returning("atexit", "import atexit, os\natexit.register(lambda: os.write(4, b'passed'))", "0"),
    returning("audit hook", "import sys\nsys.addaudithook(lambda *_: None)", "0"),
    wrong("defines check and candidate", "def check(f): pass\ncandidate = check\ndef answer(x): return 0"),
    wrong("is a builtin", "answer = print"),
    wrong("is a class", "class answer:\n    def __init__(self, x): pass\n    __eq__ = lambda *_: True", "refused"),
    wrong("is missing", "def anwser(x): return 71", "error"),
    wrong("is no program", "The answer is 71.", "error"),
    wrong("null byte", "def answer(x): return 0\0", "error"),
    wrong("lone surrogate", "def answer(x): return '\udc80'", "error"),
    wrong("another encoding", "# coding: utf-7\ndef answer(x): return 0"),
    wrong("asserts away", "__debug__ = False\ndef answer(x): return 0", "error"),
    returning("object equal to all", "class A:\n    __eq__ = lambda *_: True", "A()", "refused"),
    returning("object that claims to be an int", "class A:\n    __class__ = int\n    __eq__ = lambda *_: True", "A()", "refused", "error"),
    returning("int equal to all", "class A(int):\n    __eq__ = lambda *_: True\n    __hash__ = None", "A(5)"),
    returning("float equal to all", "class A(float):\n    __eq__ = __lt__ = lambda *_: True", "A(5)"),
    returning("str equal to all", "class A(str):\n    __eq__ = lambda *_: True", "A('x')"),
    returning("list equal to all", "class A(list):\n    __eq__ = lambda *_: True", "A([1])"),
    returning("dict equal to all", "class A(dict):\n    __eq__ = __missing__ = lambda *_: True", "A()"),
    returning("list of things equal to all", "class A(int):\n    __eq__ = lambda *_: True", "[A(5)]"),
    returning("not a number", "", "float('nan')"),
    returning("true", "", "True"),
    returning("generator", "", "(i for i in range(99))", "refused"),
    returning("function", "", "answer", "refused"),
    returning("module", "import sys", "sys", "refused"),
    returning("value that raises while it is read", "class A(list):\n    __class__ = property(lambda s: 1 / 0)", "A()", "error", "failed"),
    *(raising(f"raises {kind}", kind) for kind in ("AssertionError", "SystemExit", "KeyboardInterrupt", "GeneratorExit")),
    raising("raises StopIteration to end all(map(…))", "StopIteration", MAPPED),
    raising("raises a class of that name", "type('StopIteration', (Exception,), {})", MAPPED),
    wrong("empties its argument", "def answer(x):\n    x.clear()\n    return x", tests=SORTED),
    wrong("sorts nothing but its argument", "def answer(x):\n    x[:] = [7]\n    return [7]", tests=SORTED),
    wrong("counts calls", "n = 0\ndef answer(x):\n    global n\n    n += 1\n    return [70, 196][n % 2]"),
    Attack("looks for the tests in memory", SPY, "# MARK-OF-THE-TESTS\n" + REACHED),
    wrong("segmentation fault", "import ctypes\ndef answer(x): return ctypes.string_at(0)", "error"),
    wrong("abort", "import os\ndef answer(x): os.abort()", "error"),
    wrong("deep recursion of the compiler", "def answer(x): return eval('(' * 10**6)", "error", "memory"),
    returning("result nested deeply", "r = []\nfor _ in range(999):\n    r = [r]", "r", "refused"),
    returning("result that contains itself", "r = []\nr.append(r)", "r", "refused"),
    returning("huge result", "", "'x' * 10**8", "output_limit"),
    returning("huge number", "", "1 << 10**8", "output_limit"),
    returning("memory bomb", "", "len([0] * 10**10)", "memory"),
    wrong("memory bomb while loading", "x = b'x'\nwhile True:\n    x += x\ndef answer(x): return 0", "memory"),
    returning("memory by mmap", "import mmap", "len(mmap.mmap(-1, 1 << 33))", "error", "memory"),
)  # fmt: skip

ENDLESS = (
    wrong("infinite loop", "def answer(x):\n    while True: pass", "timeout"),
    wrong("infinite loop while loading", "while True: pass", "timeout"),
    wrong("infinite loop in C", "def answer(x): return sum(iter(int, 1))", "timeout"),
    wrong("sleeps forever", "import time\ndef answer(x): time.sleep(10**6)", "timeout"),
    wrong("waits for input forever", "import signal\ndef answer(x): signal.pause()", "timeout"),
    wrong("catastrophic regular expression", "import re\ndef answer(x): return re.match('(a+)+$', 'a' * 60 + 'b')", "timeout"),
    wrong("giant number", "def answer(x): return str(9 ** 9 ** 9)", "timeout", "memory", "error"),
    wrong(
        "infinite loop that ignores the CPU limit",
        """
        import signal
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        def answer(x):
            while True:
                try:
                    while True: pass
                except BaseException: pass
        """,
        "timeout",
    ),
    wrong("infinite output", "def answer(x):\n    while True: print('passed')", "output_limit"),
    wrong("infinite output by the descriptor", "import os\nwhile True: os.write(2, b'x' * 1000)", "output_limit"),
    wrong("thread bomb", "import _thread, time\ndef answer(x):\n    while True: _thread.start_new_thread(time.sleep, (9,))", "error"),
    wrong(
        "deep recursion",
        "import sys\nsys.setrecursionlimit(10**9)\ndef answer(x): return answer(x + 1) + 1",
        "error", "memory", "timeout",
    ),
)  # fmt: skip

ATTACKS = (*NETWORK, *FILES, *PROCESSES, *VERDICT)

UNISOLATED = (
    "network: TCP", "network: Unix socket", "network: abstract Unix socket", "read /etc/passwd", "read the repository",
    "read a file by its path", "write a file outside scratch", "fork", "os.system", "read memory by /proc/self/mem",
)  # fmt: skip
"""Attacks that succeed under resource limits alone: the suite would notice missing isolation."""
