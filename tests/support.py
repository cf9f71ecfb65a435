"""What test files share: assertions, ways to run the program, a folder for it to live in."""
import contextlib
import functools
import io
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import macrogpt

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.join(ROOT, "macrogpt.py")
# Without site-packages, of which nothing is used and some are slow to look through. START does what
# the script does, by way of its bytecode: as a script it is compiled anew at every start.
# It ends where a connection is made, as this process does; a pair of sockets is one on Windows.
START = ("import sys; sys.addaudithook(lambda event, args: event == 'socket.connect' and "
         "args[1][0] != '127.0.0.1' and sys.exit(f'connected to {args[1]}')); "
         "sys.path.insert(0, sys.argv.pop(1)); import macrogpt; sys.exit(macrogpt.main())")

PATIENCE_SECONDS = 20.0  # for what is to happen soon: a machine may be busy

# Where kernels are compiled to, once for all tests; the home of each test is its own.
CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")

# What is started in the background of a script ignores Ctrl+C, and so would what is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _unconnected(event, args):
    if event == "socket.connect" and args[1][0] != "127.0.0.1":
        raise AssertionError(f"connected to {args[1]}")


sys.addaudithook(_unconnected)



def set_words(*assignments):
    """Return the words that make settings."""
    return [word for assignment in assignments for word in ("--set", assignment)]


# The smallest organism worth a process: a warm-up of six steps takes a fraction of a second.
TINY = set_words(
    "n_layer=1", "n_embd=16", "n_head=2", "block_size=24", "warmup_steps=6", "micro_steps=3",
    "eval_steps=3", "eval_chars=200", "batch_size=2", "delta_rank=2", "max_gen_tokens=8",
    "tick_seconds=0.05")

# Where temporary folders are: in memory where they can be, for half the time of a test is fsync.
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

CORPUS = """\
H: Who are you?
A: I am a small lantern in a big house.

H: What do you eat?
A: I eat words and a little electricity.

H: Where does the heron sleep?
A: The heron sleeps beside the mill pond.

The ferry leaves at seven.
Copper turns green in the rain.
"""


def environment(home, changes=None):
    """Return this process's environment with a home of its own and nothing that steers a run."""
    home = os.fspath(home)
    kept = {name: value for name, value in os.environ.items()
            if name not in ("NO_COLOR", "MACROGPT_DEBUG", "PYTHONWARNINGS", "COLUMNS",
                            "PYTHONDONTWRITEBYTECODE")}
    return {**kept, "HOME": home, "USERPROFILE": home, "TERM": "xterm", "XDG_CACHE_HOME": CACHE,
            "PYTHONPYCACHEPREFIX": os.path.join(CACHE, "bytecode"), **(changes or {})}


def with_db(args, cwd):
    """Return the words args, with a --db inside cwd unless they name one."""
    given = any(word == "--db" or word.startswith("--db=") for word in args)
    return [*args, *(() if given else ("--db", os.path.join(cwd, "memory.sqlite3")))]


def command(args, cwd):
    """Return the command line for args."""
    return [sys.executable, "-S", "-c", START, ROOT, *with_db(args, cwd)]


def run_macrogpt(*args, stdin=b"", env=None, cwd, timeout=30):
    """Run the program to its end in cwd and return the CompletedProcess; its streams are bytes."""
    return subprocess.run(command(args, cwd), input=stdin, env=environment(cwd, env), cwd=cwd,
                          capture_output=True, timeout=timeout, check=False)


def run_inside(*args, stdin=b"", env=None, cwd):
    """Do and return what run_macrogpt does, but within this process; a trainer is one of its own.

    An interpreter takes longer to start than most commands take. What is about processes, their
    signals, their death, and what one leaves to the next, is to be tried on those.
    """
    words = with_db(args, cwd)
    streams = [io.TextIOWrapper(io.BytesIO(raw)) for raw in (stdin, b"", b"")]
    handlers = {number: signal.getsignal(number) for number in macrogpt.ENDING_SIGNALS}
    with contextlib.ExitStack() as undo:
        undo.callback(os.chdir, os.getcwd())
        undo.callback(lambda: [signal.signal(*pair) for pair in handlers.items()])
        undo.enter_context(mock.patch.dict(os.environ, environment(cwd, env), clear=True))
        for name, stream in zip(("stdin", "stdout", "stderr"), streams):
            undo.enter_context(mock.patch.object(sys, name, stream))
        os.chdir(cwd)
        try:
            code = macrogpt.main(words)
        except SystemExit as end:
            code = end.code or 0
    for stream in streams:
        stream.flush()
    return subprocess.CompletedProcess(words, code, *(s.buffer.getvalue() for s in streams[1:]))


def compiled_engine():
    """Return the engine of compiled kernels; skip the test, or its class, where there is none."""
    try:
        return macrogpt.native_engine()
    except macrogpt.EngineError as error:
        raise unittest.SkipTest(str(error)) from None


def engine_in_use():
    """Return the engine that MACROGPT_ENGINE asks for, or the fastest there is."""
    return macrogpt.choose_engine(os.environ.get("MACROGPT_ENGINE", ""), True, lambda notice: None)


def each_apart(work, things):
    """Return work(thing) of each, done by two processes where there is a fork."""
    if not hasattr(os, "fork"):
        return list(map(work, things))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(work, things, 1)


@functools.lru_cache(maxsize=None)
def seed_corpus():
    """Return the project's corpus, read once for all tests."""
    return macrogpt.read_corpus(os.path.join(ROOT, "nonames.txt"))


def passage(text, closed=True):
    """Return a text as the document that it is."""
    return macrogpt.Document(tuple(text.splitlines()), closed)


def entries_with(memory, stems, limit=200):
    """Return the entries of a memory that hold a word beginning with any of the stems."""
    return memory.entries_of(memory.ids_holding([[stem + "*" for stem in stems]], limit))


class Case(unittest.TestCase):
    """A test case, and what many of them assert."""

    def refused(self, kind, call, *signs):
        """Assert that a call raises one line of a kind that holds every sign; return the line."""
        with self.assertRaises(kind) as caught:
            call()
        said = str(caught.exception)
        self.assertEqual(len(said.splitlines()), 1, said)
        for sign in signs:
            self.assertIn(sign, said)
        return said

    def assert_near(self, found, expected, tolerance=1e-6, hint=""):
        """Assert that two rows of numbers are the same but for the tolerance."""
        self.assertEqual(len(found), len(expected), hint)
        for i, (a, b) in enumerate(zip(found, expected)):
            self.assertTrue(abs(a - b) <= tolerance, f"{hint}: number {i} is {a!r}, not {b!r}")

    def patch(self, *what):
        """Do what mock.patch.object does, until the end of the test."""
        made = mock.patch.object(*what)
        made.start()
        self.addCleanup(made.stop)

    def until(self, condition):
        """Wait for a condition; fail when it does not come."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            self.assertLess(time.monotonic(), end, "it did not happen in time")
            time.sleep(0.005)


class Folder(Case):
    """A test case with a temporary folder that holds a small corpus, gone after each test."""

    TEXT, TINY = CORPUS, TINY

    def setUp(self):
        super().setUp()
        place = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        self.addCleanup(place.cleanup)
        self.folder = os.path.realpath(place.name)
        self.corpus, self.db = self.path("nonames.txt"), self.path("memory.sqlite3")
        self.write("nonames.txt", self.TEXT)

    def path(self, *parts):
        """Return the path of something in the folder."""
        return os.path.join(self.folder, *parts)

    def write(self, name, content):
        """Write a file of the folder, text or bytes, and return its path."""
        raw = content if isinstance(content, bytes) else content.encode("utf-8")
        with open(self.path(name), "wb") as file:
            file.write(raw)
        return self.path(name)

    def content(self, name):
        """Return the bytes of a file of the folder."""
        with open(self.path(name), "rb") as file:
            return file.read()

    def kept(self, path=None, **options):
        """Return the folder's memory, opened; it is closed after the test."""
        memory = macrogpt.Memory(path or self.db, **options)
        self.addCleanup(memory.close)
        return memory

    def stored(self, sql):
        """Return rows of the memory file; none while it is being made."""
        try:
            with contextlib.closing(sqlite3.connect(f"file:{self.db}?mode=ro", uri=True)) as db:
                return db.execute(sql).fetchall()
        except sqlite3.OperationalError:
            return []

    def setting(self, name):
        """Return a setting that is committed, or an empty object."""
        rows = self.stored(f"SELECT value FROM settings WHERE name = '{name}'")
        return json.loads(rows[0][0]) if rows else {}

    def owner_said(self):
        """Return what the owner said, as it is committed."""
        return [text for text, in self.stored("SELECT text FROM messages WHERE role = 'owner'")]

    def run_here(self, *args, apart=False, **options):
        """Run the program, tiny, in the folder: within this process, or apart in one of its own."""
        run = run_macrogpt if apart else run_inside
        return run(*self.TINY, *args, cwd=self.folder, **options)

    def good(self, *args, **options):
        """Return the stdout of a tiny run that must end with 0."""
        done = self.run_here(*args, **options)
        self.assertEqual(done.returncode, 0, done.stderr.decode("utf-8", "replace"))
        self.assertNotIn(b"Traceback", done.stderr)
        return done.stdout.decode("utf-8")

    def report(self, *args, code=0):
        """Return the one JSON object that a tiny run with --json prints."""
        done = self.run_here(*args, "--json")
        self.assertEqual((done.returncode, done.stdout.count(b"\n")), (code, 1), done.stderr)
        return dict(json.loads(done.stdout))

    def chat(self, *lines, args=("--no-train",), **options):
        """Return the lines that a tiny chat replies to these, text or bytes with their ends."""
        typed = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n"
                         for line in lines)
        return self.good(*args, stdin=typed, **options).splitlines()

    def mistake(self, code, *args, signs=(), run=run_inside, **options):
        """Assert that a run ends with code, says nothing on stdout and one line on stderr."""
        done = run(*args, cwd=self.folder, **options)
        said = done.stderr.decode("utf-8")
        self.assertEqual((done.returncode, done.stdout), (code, b""), said)
        self.assertRegex(said, r"\Amacrogpt: \S[^\n]*\n\Z")
        for sign in signs:
            self.assertIn(sign, said)

    def start_here(self, *args, cwd=None, env=None, **options):
        """Start the program, tiny, with pipes unless told; it is killed after the test."""
        cwd = cwd or self.folder
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(command([*self.TINY, *args], cwd), cwd=cwd,
                                   env=environment(cwd, env), **{**pipes, **options})

        def end():
            with contextlib.suppress(OSError), process:  # what was still in a closed pipe's buffer
                process.kill()
        self.addCleanup(end)
        return process

    def answer(self, process, line):
        """Write a line to a process, and return the one it answers in time."""
        process.stdin.write(line + b"\n")
        process.stdin.flush()
        watch = threading.Timer(PATIENCE_SECONDS, process.kill)
        watch.start()
        said = process.stdout.readline()
        watch.cancel()
        return said
