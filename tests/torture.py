"""Breaks the program on purpose and counts what that costs.

    python -m tests.torture --kills N --faults N --damage N --fuzz N --chats N --seed S

A case is made of its seed and number alone; one that fails is told with a command that does it
again, a few times if need be: where a kill or a fault meets the program is the clock's matter too.
"""
import argparse
import builtins
import collections
import concurrent.futures
import contextlib
import functools
import itertools
import json
import marshal
import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, TESTS)  # as `discover` does
import macrogpt
import support

MARK, PATIENCE = "MACROGPT_TORTURE", 90.0  # in the environment of all that a case starts; seconds
RESTLESS = (*support.TINY, *(  # bursts, births and commits all the time
    "--set=commit_seconds=0.1 --set=min_new_chars_to_train=1 --set=delta_seal_chars=60 "
    "--set=rebirth_chars=300 --set=rebirth_bound=9 --set=min_merge_chars=300 --set=max_merges=20 "
    "--set=warmup_epochs=9999").split())
# What asks for all of the machine's memory is to fail, and not the machine.
START = "import resource as r; r.setrlimit(r.RLIMIT_AS, (4 << 30,) * 2); " + support.START
FAULTY = START.replace("macrogpt.main()", "__import__('torture').faulty_main()")
DISK, FULL, MEMORY = OSError(28, "No space left on device"), "disk is full", MemoryError()
FAULTS = {  # the errors of each kind, somewhat more calls than a session has, and where they are
    "execute": ([*map(sqlite3.OperationalError, ("disk I/O error", FULL, "locked")), MEMORY], 1500),
    "full": ("?", 1500),  # SQLite itself finds no room for a while
    "write": ((DISK, OSError(5, "Input/output error")), 20, (os, "write"), (os, "fsync")),
    "open": ((DISK,), 8, (os, "open"), (builtins, "open")), "unlink": ((DISK,), 1, (os, "unlink")),
    "spawn": ((OSError(12, "Cannot allocate memory"),), 2, (subprocess.Popen, "__init__")),
    "thread": ((RuntimeError("can't start new thread"),), 6, (threading.Thread, "start")),
    "memory": ((MEMORY,), 800, *itertools.product((json, marshal), ("loads", "dumps")))}
TURNS = sorted((at, kind) for kind in FAULTS for at in range(FAULTS[kind][1]))
WRONG = re.compile("Traceback|unexpected|never retrieved|ignored in")
BIDI = [*map(chr, (*range(0x202a, 0x202f), *range(0x2066, 0x206a), 0x200e, 0x200f, 0x61c, 0xe0041))]
ODD = {*map(chr, (*range(32), *range(127, 160), *range(0xd800, 0xe000))), *BIDI}
ODD_VALUES = "|0|-1|1|2|0.5|1e9|99999999999999999999|1e-300|nan|inf|None|ü|\u202e1|1 2".split("|")
FIELDS = [*macrogpt.Config.__dataclass_fields__]
ODD_SQL = "NULL|x'fffe00ff'|'{'|'[]'|'7'|-1|9e300|'\u202eodd\x1b[2J'|''".split("|")
FAILURES = "lost|unsound|orphans|begun anew|replies|controls|tracebacks|hangs".split("|")


class Case(support.Folder):
    """One attempt: a folder, what chance has in store for it, and what came of it."""

    def __init__(self, part, number, seed, counts):
        super().__init__()
        self.part, self.number, self.seed, self.counts, self.told = part, number, seed, counts, []
        self.rng = random.Random(f"{seed} {part} {number}")
        self.env = {MARK: f"{os.getpid()} {part} {number}", "PYTHONPATH": TESTS}
        self.setUp()

    def count(self, what, number=1):
        self.counts[self.part, what] += int(number)

    def bad(self, kind, what):
        self.count(kind)
        print(f"{self.part}, {kind}: {what}\n    python -m tests.torture --{self.part} 1 "
              f"--case {self.number} --seed {self.seed}", flush=True)

    def begin(self, raw=None):
        os.chmod(self.write("memory.sqlite3", raw or grown(self.seed)), 0o600)

    def sentence(self):
        return b"Kettle %d has %d scratches." % (len(self.told), self.rng.getrandbits(40))

    def start(self, *words):
        words = support.command([*RESTLESS, *map(os.fsdecode, words)], self.folder)
        words[3], env = FAULTY if "FAULT" in self.env else START, self.env
        return subprocess.Popen(words, env=support.environment(self.folder, env), cwd=self.folder,
                                **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE))

    def go(self, *words, said=(), process=None):
        """See the program to its end; return its exit code and the lines that it said."""
        with process or self.start(*words) as process:
            watch = threading.Timer(PATIENCE, lambda: process.send_signal(14))
            watch.start()
            out, err = process.communicate(b"".join(b"%s\n" % line for line in said))
            watch.cancel()
        out, err, code = out.split(b"\n")[:-1], err.decode("utf-8", "replace"), process.returncode
        if code < 0 and code != -9 or WRONG.search(err):
            self.bad("hangs" if code == -14 else "tracebacks", f"{words} {code} {err[-1500:]}")
        gave_up = code in (1, 2) and len(out) < len(said) and "macrogpt: " in err
        self.count("gave up in one line", gave_up)
        least = 0 if gave_up else sum(not line.startswith(b"/") for line in said)
        if said and not least <= len(out) <= len(said):  # a command may say nothing
            self.bad("replies", f"{len(out)} for {len(said)}, code {code}: {out[-2:]} {err[-900:]}")
        self.told += [line for line, reply in zip(said, out) if reply]
        return code, out

    def rows(self, sql):
        with contextlib.suppress(sqlite3.Error, ValueError), contextlib.closing(sqlite3.connect(
                f"file:{self.db}?mode=rw", uri=True, isolation_level=None)) as db:
            db.execute("PRAGMA ignore_check_constraints = ON")
            db.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
            return [row[0] for row in db.execute(sql)]
        return []  # it is not there, or cannot be read

    def living(self, but=0, kill=False):
        found, mark = [], f"{MARK}={self.env[MARK]}".encode()
        for pid in filter(str.isdigit, os.listdir("/proc") if sys.platform == "linux" else ()):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
                if int(pid) != but and mark in file.read().split(b"\0"):
                    found.append(pid)
                    os.kill(int(pid), 9 * kill)
        return found

    def judge(self):
        """Find orphans, acknowledged messages that are lost, and what is wrong with the store."""
        until = time.monotonic() + 2.0
        while self.living() and time.monotonic() < until:
            time.sleep(0.02)
        for pid in self.living(kill=True):
            self.bad("orphans", f"process {pid} lives 2 s later")
        if self.part in ("kills", "faults", "chats"):
            code, out = self.go("doctor")
            kept = [*map(str.encode, self.rows("SELECT text FROM messages WHERE role = 'owner'"))]
            lost, twice = {*self.told} - {*kept}, len(kept) - len({*kept})
            if code or lost or twice:
                self.bad("lost" if lost else "unsound", lost or f"{out}, {twice} stand twice")

    def kills(self):
        """Kill chat, trainer or both in three sittings of a life; each goes on from the last."""
        if self.rng.random() < 0.3:
            self.begin()
        if self.rng.random() < 0.15:
            self.env["XDG_CACHE_HOME"] = self.path("cache")  # the kernels are compiled, too
        then = [0, 0]
        for _ in range(3):
            self.sitting(f"--set=warmup_steps={self.rng.choice((6, 200, 3000))}")
            self.judge()
            now = [self.setting("growth").get(name, 0) for name in ("generation", "step")]
            if now < then:
                self.bad("begun anew", f"generation, step {then}, then {now}")
            then = now

    def sitting(self, *words):
        """Talk and write into the corpus until the kill, at an instant that nobody chose."""
        rng, chat = self.rng, self.start(*words)
        victim, patience = rng.choice(("chat", "chat", "trainer", "both")), rng.choice((0, 0.5))

        def kill():
            until = time.monotonic() + patience  # perhaps a transaction begins to write
            while time.monotonic() < until and not os.path.exists(self.db + "-journal"):
                pass
            if victim != "chat" and self.living(but=chat.pid, kill=True) and victim == "trainer":
                time.sleep(0.4)  # the chat goes on without it
            chat.kill()
        killer = threading.Timer(rng.choice((0.3, 1, 4)) * rng.random(), kill)
        killer.start()
        with contextlib.suppress(BrokenPipeError), open(self.corpus, "ab", 0) as corpus:
            while killer.is_alive():
                said = self.sentence()
                corpus.write(b"%s It is so.\n" % said * (rng.random() < 0.3))
                os.write(chat.stdin.fileno(), said + b"\n")
                reply = chat.stdout.readline()
                self.told += [said] * reply.endswith(b"\n")
                if reply == b"\n":
                    self.bad("replies", f"none to {said}")
                time.sleep(rng.choice((0, 0.02, 0.3)) * rng.random())
        killer.join()
        if self.go(process=chat)[0] != -9:
            self.bad("replies", "the chat ended by itself")
        self.count("killed")

    def faults(self):
        """Live a birth, five lines, bursts, rebirths in which a call fails, or some in a row."""
        at, kind = TURNS[self.number]  # the first cases are spread over all calls of each kind
        errors, calls, *_ = FAULTS[kind]
        turn, run = at * 1103 % calls, self.rng.choice((1, 1, 4) if kind != "full" else (1, 50))
        self.env["FAULT"] = json.dumps((kind, turn, turn + run, self.rng.randrange(len(errors))))
        self.go("--wait-trained", said=[b"%s %d" % (self.sentence(), n) for n in range(5)])
        del self.env["FAULT"]
        self.count(f"struck at {kind}", os.path.exists(self.path("struck")))

    def damage(self):
        """Spoil a store; see whether `doctor` finds it, and whether a chat goes on."""
        rng, raw = self.rng, bytearray(grown(self.seed))
        way = rng.choice(("flips", "flips", "cut", "pages", "rows", "rows"))
        for at in [rng.randrange(1, len(raw)) for _ in range(rng.choice((1, 1, 8, 100)))]:
            if way == "flips":
                raw[at] ^= 1 << rng.randrange(8)
            elif way == "pages":
                raw[at & ~4095:(at & ~4095) + 4096] = bytes(4096)
        self.begin(bytes(raw[:at] if way == "cut" else raw))
        for _ in range(rng.choice((1, 3)) if way == "rows" else 0):
            self.spoil()
        readable, found = self.rows("SELECT text FROM messages"), self.go("doctor")[0]
        goes_on = all(self.go(said=[b"Hello.", b"My cat is Tom.", b"Who is my cat?"])[1] or [0])
        for what, so in (("in all", 1), ("found by doctor", found), ("chat goes on", goes_on),
                         ("messages readable, no chat", readable and not goes_on)):
            self.count(f"{way}: {what}", bool(so))

    def spoil(self):
        """Put what does not belong there into rows of some table, or take the table away."""
        table = self.rng.choice(sorted(self.rows(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE '%VIRTUAL%'")))
        column = self.rng.choice(self.rows(f"SELECT name FROM pragma_table_info('{table}')"))
        self.rows(self.rng.choice([f"DROP TABLE {table}"] + [  # a sealed layer refuses
            f"UPDATE {table} SET {column} = {self.rng.choice(ODD_SQL)} WHERE rowid % 3 = 1 OR "
            f"{self.rng.randrange(2)}"] * 9))

    def chats(self, messages=50):
        """Let several chats talk at once on one store."""
        with concurrent.futures.ThreadPoolExecutor(self.number) as pool:
            for _, out in pool.map(lambda n: self.go(f"--session=chat {n % 3}", said=[
                    b"%s %d %d" % (self.sentence(), n, i) for i in range(messages)]),
                    range(self.number)):
                for _ in range(messages - sum(map(bool, out))):
                    self.bad("replies", "one is missing")

    def odd_text(self, most=120):
        """Return bytes: plain letters, all of Unicode, controls, marks of direction, halves."""
        rng = self.rng
        used = rng.sample(("aeion tr.?!'\"/{}[]:,-019H", [*map(chr, range(0xa0))], BIDI,
                           ("What is ", "my cat ", "Forget ", "İ", "A: ", "H: ", "ﬃ", "\u0301"),
                           [chr(rng.randrange(0x110000)) for _ in range(50)]), rng.randrange(1, 4))
        text = "".join(rng.choice(rng.choice(used)) for _ in range(rng.randrange(most)))
        return text.encode("utf-8", "surrogatepass").replace(b"\n", b" ")[rng.randrange(2):]

    def fuzz(self, count=60):
        """Give odd lines, settings, names, corpora and files; nothing odd may come out of it."""
        rng, known = self.rng, sorted({*macrogpt.REPL_COMMANDS} - {"exit", "quit", "save"})
        if rng.random() < 0.5:
            self.begin()
        settings = list(map(" ".join, itertools.product(FIELDS, ODD_VALUES)))
        lines = [b"x" + self.odd_text(5000 if n == 7 else 120) for n in range(count)]
        orders = [f"/{rng.choice(known)} ".encode() + self.odd_text() if rng.random() < 0.7 else
                  f"/set {rng.choice(settings)}".encode() for _ in range(count // 2)]
        file, name = self.odd_text(9999), self.odd_text(40).replace(b"\0", b"")
        self.write("odd.txt", file.replace(b" ", b"\n"))
        for words, said in (
                (["--no-train"], lines), (["--no-train"], orders), (["--no-train"], lines[:9]),
                (["--no-train", "--set", rng.choice(settings).replace(" ", "=", 1)], [b"Hello."]),
                (["--corpus=odd.txt"], [b"Hello.", b"Who are you?"]),
                ([b"--session=" + name], [b"Hello."]), (["ask", b"What is " + name], [file])):
            self.count("inputs", len(said))
            out = b"".join(self.go(*words, said=said)[1]).decode("utf-8", "surrogateescape")
            if ODD & {*out}:
                self.bad("controls", f"{ascii(sorted(ODD & {*out}))} of {words}")


def faulty_main():
    """Be the program, in which some calls of a kind fail."""
    (kind, first, last, error), seen = json.loads(os.environ["FAULT"]), collections.Counter()

    def strikes(name):
        seen[name] += 1
        hit = first < seen[name] <= last and name == kind
        if hit:
            os.makedirs("struck", exist_ok=True)
        if hit and name != "full":
            raise FAULTS[name][0][error]
        return hit

    class Connection(sqlite3.Connection):
        def execute(self, *words):
            strikes("execute")
            super().execute(f"PRAGMA max_page_count = {1 if strikes('full') else 1 << 30}")
            return super().execute(*words)
    sqlite3.connect = functools.partial(sqlite3.connect, factory=Connection)
    for name, (_, _, *calls) in FAULTS.items():
        for place, call in calls:
            setattr(place, call, lambda *words, name=name, call=getattr(place, call), **options: (
                strikes(name), call(*words, **options))[1])
    return macrogpt.main()


@functools.lru_cache(None)
def grown(seed):
    """Return the bytes of a small store with deltas, talks and generations behind it."""
    case = Case("grown", 0, seed, collections.Counter())
    case.go("--wait-trained", said=[case.sentence() for _ in range(8)])
    raw = case.content(case.db)
    case.doCleanups()
    return raw


def attempt(part, number, seed, counts, *sizes):
    """Do one case, and count what came of it."""
    case = Case(part, number, seed, counts)
    getattr(case, part)(*sizes)
    case.judge()
    case.count("acknowledged", len(case.told))
    if part in ("kills", "faults", "chats") and not any(case.go(said=[b"Hello."])[1]):
        case.bad("unsound", "the next chat says nothing")
    case.doCleanups()
    case.count("cases")


def main(argv=None):
    """Do what was asked for, and print one table; the exit code is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("kills", "faults", "damage", "fuzz", "chats", "seed", "case"):
        parser.add_argument("--" + name, type=int, default=-1 if name == "case" else 0, metavar="N")
    options, counts = vars(parser.parse_args(argv)), collections.Counter()
    seed, one = options.pop("seed"), options.pop("case")
    for part, wanted in options.items():
        numbers = [wanted] if part == "chats" else range(  # a case is three kills, 104 odd inputs
            -(-wanted // {"kills": 3, "fuzz": 104}.get(part, 1)))
        for number in (numbers if one < 0 else [one]) if wanted else ():
            attempt(part, number, seed, counts)
        counts.update({(part, kind): 0 for kind in FAILURES if wanted})
    for (part, what), number in sorted(counts.items()):
        print(f"{part:8}{what:36}{number:>8}")
    return int(any(number for (_, what), number in counts.items() if what in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
