"""Claims about the INTERFACE: streams, codes, options; in real processes: pipes and signals."""
import contextlib
import html.parser
import importlib.util
import io
import json
import os
import random
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import unittest
from unittest import mock

if sys.platform != "win32":
    import fcntl
    import pty
    import struct
    import termios

import macrogpt as m
from support import (CORPUS, PATIENCE_SECONDS, PROGRAM, ROOT, TINY, Folder, command, environment,
                     run_inside, run_macrogpt)


class Window(unittest.TestCase):
    """What is shown in a narrow terminal."""

    def shown(self, pieces, columns):
        out = io.StringIO()
        out.isatty = lambda: True
        size = os.terminal_size((columns, 24))
        with mock.patch.object(shutil, "get_terminal_size", lambda: size):
            terminal = m.Terminal(out, io.StringIO(), color="never")
            terminal.say("  »", " ")
            for piece in pieces:
                terminal.say(piece, "")
            terminal.say("")
        return out.getvalue()

    def test_a_line_fits_the_window_and_breaks_at_the_same_words_said_whole_or_in_pieces(self):
        rng = random.Random(5)
        for _ in range(300):
            words = ["".join(rng.choices("aé\u732b", k=rng.randint(1, 6)))
                     for _ in range(rng.randint(1, 30))]
            columns, text = rng.randint(20, 60), " ".join(words)
            whole = self.shown([text], columns)
            self.assertEqual(self.shown(re.findall(r"\s*\S+", text), columns), whole)
            self.assertEqual(whole.split(), ["»", *words])
            lines = whole.splitlines()
            self.assertLessEqual(max(map(m.width_of, lines)), columns)
            for line, after in zip(lines, lines[1:]):
                self.assertGreater(m.width_of(f"{line} {after.split()[0]}"), columns)


class CommandLine(Folder):
    def test_a_mistake_is_one_line_with_a_remedy_and_the_code_2_and_what_cannot_be_had_is_1(self):
        self.mistake(2, "trian", signs=["trian", "train"], run=run_macrogpt)
        with self.assertRaises(m.UsageError):  # its traceback is shown only with --debug
            run_inside("--debug", "trian", cwd=self.folder)
        self.write("empty.txt", "")
        with contextlib.closing(sqlite3.connect(self.path("other.sqlite3"))) as other:
            other.execute("CREATE TABLE birds (name)")
        before = self.content("other.sqlite3")
        for code, args, *signs in (
                (2, ("stats", "--set", "top_kk=3"), "top_kk", "top_k"),
                (2, ("--set", "n_embd=many"), "n_embd", "int"),
                (2, ("--set", "samplers=top_k,nonsense", "chat"), "nonsense"),
                (2, ("",), "no command ''"),  # of an empty variable of a script
                (2, ("--nonsense",), "--nonsense"),
                (2, ("stats", "--tokens", "3"), "--tokens"),
                (2, ("train", "--steps", "0"), "--steps"),
                (2, ("train", "--no-train"), "--no-train"),
                (2, ("ask", "  "), "ask"),
                (2, ("chat", "hello", "you"), "ask hello you"),
                (2, ("stats", "main"), "stats takes no words", "main"),
                (2, ("sessions", "lost"), "sessions takes", "list", "lost"),
                (2, ("memory", "forget"), "memory takes", "forget TEXT-or-ID"),
                (2, ("eval", "one", "two"), "one file"),
                (2, ("--session", "a\nb", "sessions")),
                (1, ("eval", "nowhere.txt"), "nowhere.txt"),
                (1, ("eval", "empty.txt"), "empty.txt"),
                (1, ("--corpus", "mine.txt", "ask", "hello"), "mine.txt", "--corpus"),
                (1, ("--db", self.folder, "stats"), self.folder),
                (1, ("--db", self.corpus, "ask", "hello"), "nonames.txt"),
                (1, ("--db", self.path("no", "m.db"), "stats"), "folder"),
                (1, ("export", "there", "--format", "gguf"), "export", "run `train` first"),
                (1, ("--db", "other.sqlite3", "stats"), "another program's file"),
                (1, ("--db", "other.sqlite3", "ask", "hello"), "another program's file")):
            with self.subTest(args=args):
                self.mistake(code, *args, signs=signs)
        self.assertFalse(os.path.exists(self.path("mine.txt")))
        self.assertEqual(self.run_here("--db", "other.sqlite3", "doctor").returncode, 1)
        self.assertEqual(self.content("other.sqlite3"), before)
        env = {"MACROGPT_ENGINE": "native", "CC": "no-such-compiler"}
        self.mistake(1, "stats", env=env, signs=[*env, "use auto or python"])
        for wish in ("steam", "Python", " "):
            self.mistake(2, "stats", env={"MACROGPT_ENGINE": wish}, signs=[wish, "use auto"])

    def test_as_a_script_it_keeps_the_options_of_python_and_its_own_and_tells_its_version(self):
        runs = [subprocess.Popen(
            [sys.executable, *options, PROGRAM, word], stdout=subprocess.PIPE, encoding="utf-8",
            stderr=subprocess.PIPE, env=environment(self.folder), cwd=self.folder)
            for *options, word in (("--version",), "-I -O -W error -X importtime nosuch".split())]
        version, (out, told, code) = [(*run.communicate(timeout=30), run.returncode)
                                      for run in runs]
        self.assertEqual(version, (f"macrogpt {m.__version__}\n", "", 0))
        self.assertEqual((out, code), ("", 2))
        self.assertRegex(told, r"\nmacrogpt: there is no command 'nosuch'.*\n\Z")
        self.assertRegex(told, r"import time: .* sqlite3\n")  # which is no early import
        self.assertEqual(os.listdir(self.folder), ["nonames.txt"], "it makes nothing")

    def test_help_names_every_command_and_option_and_shells_complete_them(self):
        said = self.good("--help")
        for name in (*m.COMMANDS, "--db", "--corpus", "--session", "--set", "--seed", "--no-train",
                     "--wait-trained", "--json", "--quiet", "--debug", "--color", "--version"):
            self.assertRegex(said, rf"(?m)(^|\s){re.escape(name)}\b")
        self.assertIn("example: macrogpt log --last 20", self.good("log", "--help"))
        for name in m.COMMANDS:
            said = m.help_of(name)
            self.assertTrue(said.startswith(f"usage: macrogpt {name}") and "SUPPRESS" not in said)
        for shell in ("bash", "zsh", "fish"):
            said = self.good("completion", shell)
            self.assertTrue("sessions" in said and "wait-trained" in said, said)

    def test_options_may_stand_before_and_after_the_command(self):
        one = self.path("one.db")
        for words in (("--db", one, "--session", "north", "--no-train", "ask", "who are you"),
                      ("ask", "--session", "north", "who are you", "--no-train", "--db", one)):
            self.assertIn("lantern", self.good(*words))
        (session,) = self.report("sessions", "--db", one)["sessions"]
        self.assertEqual((session["name"], session["messages"]), ("north", 4))

    def test_generate_says_its_prompt_and_tokens_and_notices_are_colored_or_quiet_as_wished(self):
        said = set()
        for wish, colored in (("--color=always", 1), ("--color=never", 0), ("--quiet", None)):
            done = self.run_here("generate", "the heron", "--tokens", "5", "--seed", "3", wish)
            said.add(done.stdout.decode("utf-8"))
            self.assertEqual(b"nothing has been learned yet" in done.stderr, colored is not None)
            self.assertEqual(b"\033[" in done.stderr, bool(colored), wish)
        (text,) = said
        self.assertTrue(text.startswith("the heron") and text.endswith("\n"))
        self.assertLessEqual(len(text), len("the heron") + 5 + 1)

    def test_the_same_seed_gives_the_same_replies_on_copies_of_one_memory(self):
        self.write("nonames.txt", "".join(f"H: hello\nA: answer {word}\n\n" for word in
                                          ("north", "east", "south", "west", "up", "down")))
        self.good("ask", "hello", "--no-train")
        twin = self.path("twin.db")
        shutil.copy(self.db, twin)
        said = [self.chat(*["hello"] * 4, args=("--no-train", "--seed", "7", "--db", path))
                for path in (self.db, twin)]
        self.assertEqual(said[0], said[1])
        self.assertGreater(len(set(said[0])), 1, "the seed does not freeze the die")


class Reports(Folder):
    def test_a_page_of_stats_can_be_read_and_has_its_curve(self):
        self.good("stats", "--html", self.path("page.html"))
        page = self.content("page.html").decode("utf-8")
        self.assertIn("parameters", page)
        html.parser.HTMLParser().feed(page)
        points = [(0, 3.0), (50, 2.0), (90, 2.5)]
        self.assertIn('points="50.0,35.0 241.7,150.0 395.0,92.5"', m.chart(points))

    def test_every_report_is_one_object_with_its_keys_or_lines_for_people(self):
        for words, said in ((("sessions", "list"), "no session"), (("doctor",), "ok  python"),
                            (("memory", "list"), "nothing found"), (("stats",), "parameters")):
            self.assertIn(said, self.good(*words))
        self.assertEqual(len(self.chat("the lighthouse keeper is called Ambrose", "hello")), 2)
        facts = self.report("stats")
        self.assertLess(set("version engine parameters vocabulary shape layers phase step tokens "
                            "bpc memory progress life".split()), set(facts))
        self.assertEqual((facts["memory"]["messages"], facts["shape"]["n_embd"]), (4, 16))
        (session,) = self.report("sessions")["sessions"]
        self.assertEqual((session["name"], session["messages"]), ("main", 4))
        (entry,) = self.report("memory", "search", "lighthouse keeper")["entries"]
        self.assertIn(entry, self.report("memory", "list")["entries"])
        self.assertIn("Ambrose", self.report("memory", "forget", str(entry["id"]))["said"])
        self.assertEqual(self.report("memory", "search", "Ambrose")["entries"], [])
        self.assertIn("said", self.report("memory", "forget", "Ambrose", code=1))

    def test_the_doctor_finds_a_sound_organism_healthy_and_a_damaged_one_not(self):
        self.good("ask", "hello", "--no-train")
        facts = self.report("doctor")
        self.assertTrue(facts["healthy"])
        self.assertLessEqual({"python", "engine", "compiler", "corpus", "store", "privacy"},
                             {check["name"] for check in facts["checks"]})
        os.chmod(self.db, 0o644)
        for bad in ("privacy",) * (os.name == "posix") + ("store",):
            facts = self.report("doctor", code=1)
            self.assertIn(bad, [c["name"] for c in facts["checks"] if not c["ok"]])
            self.write("memory.sqlite3", "something else " * 99)

    def test_bench_tells_the_speeds_of_each_engine(self):
        with mock.patch.multiple(
                m, bench_search=lambda: 1.0, _timed=lambda work, seconds: (work(), [0.01])[1],
                bench_process=lambda config: {"startup_s": 0.1, "first_reply_s": 0.2}):
            facts = self.report("bench")
        self.assertLess({"config", "peak_gflops", "first_reply_s"}, set(facts))
        self.assertIn("python", facts["engines"])
        for speeds in facts["engines"].values():
            self.assertGreater(min(speeds[f"{work}_tokens_per_s{end}"] for work in
                                   ("train", "generate") for end in ("", "_median")), 0.0)


class Piped(Folder):
    def test_a_chat_goes_on_where_the_last_one_was_in_a_session_made_renamed_or_deleted(self):
        self.assertEqual(self.chat("Who are you?", "/new boats", "/new boats", "/session"), [
            "I am a small lantern in a big house.", "session boats",
            "there is a session 'boats' already; /session boats goes on with it", "session boats"])
        self.assertEqual(self.chat("/session", "/session ma"), ["session boats", "session main"])
        self.chat("/session boats", "My oar is red.")
        self.good("sessions", "rename", "boats", "ships")
        self.assertEqual(self.chat("/session"), ["session ships"])
        self.assertEqual(self.run_here("sessions", "show", "boats").returncode, 2)
        self.good("sessions", "delete", "ships")
        self.assertEqual(self.chat("/session"), ["session main"])
        self.assertEqual([each["name"] for each in self.report("sessions")["sessions"]], ["main"])
        self.assertIn("My oar is red.", self.good("memory", "list"))

    def test_each_line_gives_exactly_one_line_in_order_whatever_it_is(self):
        said = self.chat("Who are you?", "", "What do you eat?", "   ", "zzz?",
                         b"Where does the heron sleep?\r\n", b"\xff\xfe caf\xe9 \x80\x00\x1b[2J\n",
                         b"heron " * 45_000 + b"\n", b"Who are you?")
        self.assertEqual(len(said), 9, "a last line without its end is a line")
        self.assertEqual({said[0], said[8]}, {"I am a small lantern in a big house."})
        self.assertEqual(said[2], "I eat words and a little electricity.")
        self.assertIn(said[4], m.SILENCE["guess"] + m.UNKNOWN_REPLIES)
        self.assertEqual(said[5], "The heron sleeps beside the mill pond.")
        self.assertTrue(all(line.strip() for line in said))
        self.assertEqual(self.chat(), [])

    def test_commands_and_mistaken_ones_give_one_line_and_are_never_speech(self):
        lines = ("/help", "/stats", "/sessions", "/show temperature", "/set temperature 0.5",
                 "/staats here", "/", "/memory", "/memory heron", "/why", "/good",
                 "/session other", "/new", "/compact", "/save", "/set", "/teach", "/forget",
                 "/teach the moon is a lamp", "/forget 12345", "/session", "/set temperature nan",
                 "/set topk 3", "/set samplers=top_q", "Who are you?", "/exit", "never read")
        done = self.run_here("--no-train", stdin="\n".join(lines).encode())
        self.assertEqual(done.returncode, 0, "the end of input is a good end")
        *said, nan, topk, nothing, last = done.stdout.decode().split("\n")[:-1]
        self.assertEqual((len(said), nan, topk, nothing), (21, "", "", ""))
        self.assertEqual(done.stderr.decode().count("macrogpt: "), 3)
        self.assertEqual(last, "I am a small lantern in a big house.")
        self.assertIn("/help", said[0])
        self.assertIn("no command /staats; did you mean stats", said[5])
        self.assertIn("/teach TEXT", said[16])
        self.assertEqual(self.owner_said(), ["Who are you?"])

    @unittest.skipUnless(os.name == "posix", "pipes break otherwise on Windows")
    def test_a_block_is_one_message_and_gets_one_line_of_reply(self):
        self.assertEqual(len(self.chat('"""\nMy boat is blue.\n/exit\n"""', "Who are you?",
                                       '"""My oar is red."""', '"""It is old.')), 4)
        self.assertEqual(self.owner_said(), ["My boat is blue.\n/exit", "Who are you?",
                                             "My oar is red.", "It is old."])
        self.assertEqual(self.report("sessions")["sessions"][0]["title"], "My boat is blue.\n/exit")

    def test_a_reply_comes_before_the_next_line_is_read_and_a_closed_pipe_ends_quietly(self):
        process = self.start_here("--no-train")
        for asked, answered in ((b"Who are you?", b"I am a small lantern in a big house.\n"),
                                (b"/save", b"every word is saved as it is said;"),
                                (b"Who are you?", b"I ")):
            line = self.answer(process, asked)
            self.assertTrue(line.startswith(answered), line)
        self.assertEqual(select.select([process.stdout], [], [], 0.05)[0], [], "nothing else")
        process.stdout.close()
        process.stdin.write(b"Who are you?\n" * 5)
        process.stdin.close()
        self.assertEqual(process.wait(PATIENCE_SECONDS), 0)
        self.assertEqual(process.stderr.read(), b"")

    def test_sessions_are_made_and_picked_by_name_and_a_name_is_only_a_name(self):
        outer, self.folder = self.folder, self.path("deep", "inner")
        os.makedirs(self.folder)
        self.db = self.path("memory.sqlite3")
        self.write("nonames.txt", CORPUS)
        for name, count in (("../../x", 1), ("main", 2), ("../../x", 1), ("ü 'quoted\"; --", 1)):
            self.chat(*["hello"] * count, args=("--no-train", "--session", name))
        self.assertEqual({s["name"]: s["messages"] for s in self.report("sessions")["sessions"]},
                         {"../../x": 4, "main": 4, "ü 'quoted\"; --": 2})
        self.assertEqual([set(files) for _, _, files in os.walk(outer)],
                         [{"nonames.txt"}, set(), {"nonames.txt", "memory.sqlite3"}])

    def test_without_a_corpus_the_one_that_comes_with_the_program_is_written_and_said(self):
        os.unlink(self.corpus)
        done = self.run_here("--no-train", "--set", "max_corpus_lines=500", stdin=b"Who are you?\n")
        self.assertEqual((done.returncode, len(done.stdout.splitlines())), (0, 1))
        self.assertIn(b"nonames.txt", done.stderr)
        self.assertEqual(m.read_text(self.corpus), m.read_text(os.path.join(ROOT, "nonames.txt")))
        with mock.patch.object(m, "__file__", self.corpus), mock.patch.object(
                m.sys, "prefix", self.folder):
            os.unlink(self.corpus)
            self.assertEqual(m.first_corpus(), m.FIRST_CORPUS)

    def test_a_chat_goes_on_with_what_can_be_read_of_a_damaged_store(self):
        self.chat("My cat is called Biscuit.")
        for damage in ("DROP TABLE layers", "DROP TABLE entries_fts_config"):
            with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                db.execute(damage)
            done = self.run_here("--no-train", stdin=b"What is my cat called?\nWho are you?\n")
            said = done.stdout.decode("utf-8").splitlines()
            self.assertEqual((done.returncode, said[0], len(said)),
                             (0, "Your cat is called Biscuit.", 2), done.stderr)
            self.assertRegex(done.stderr.decode("utf-8"), "was damaged.*messages.*damaged-[12]\n")
            self.assertTrue(self.report("doctor")["healthy"])
        self.assertEqual(sorted(name[-2:] for name in os.listdir(self.folder) if "-" in name),
                         ["-1", "-2"])

    def test_what_is_forgotten_leaves_the_history_and_nothing_else_does(self):
        self.chat("My gnu is called Xerxes.")
        for words, env in ((("memory", "forget", "gnu"), {}), ((), {"MACROGPT_NOHISTORY": "1"})):
            if importlib.util.find_spec("readline"):  # which knows nothing of that file here
                importlib.import_module("readline")
            self.write(".macrogpt_history", "Hello.\nMy gnu is called Xerxes.\n/forget gnu\n")
            self.chat("My gnu is called Xerxes.", "/forget gnu", args=("--no-train", *words),
                      env=env)
            self.assertEqual(self.content(".macrogpt_history"), b"Hello.\n")

    def test_a_report_makes_no_file(self):
        before = sorted(os.listdir(self.folder))
        for command in (("stats",), ("log",), ("sessions",), ("memory", "list"), ("doctor",)):
            done = self.run_here("--db", "typo.sqlite3", *command)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(sorted(os.listdir(self.folder)), before)
            self.assertEqual(b"no memory in typo.sqlite3" in done.stderr, command != ("doctor",))

    def test_a_kept_setting_out_of_its_bounds_is_left_out_and_a_full_disk_is_said(self):
        self.good("--no-train", "ask", "hello")
        with contextlib.closing(sqlite3.connect(self.db)) as store, store:
            store.execute("INSERT INTO settings VALUES ('config.top_p', '7.0')")
        self.good("--no-train", "ask", "hello")
        if os.path.exists("/dev/full"):
            with open("/dev/full", "wb") as full:
                process = self.start_here("--no-train", "ask", "hello", stdout=full)
                _, told = process.communicate(timeout=PATIENCE_SECONDS)
            self.assertEqual((process.returncode, told.count(b"\n")), (1, 2), told)
            self.assertIn(b"left out: top_p=7.0", told)
            self.assertIn(b"cannot be written", told)

    def test_a_setting_that_only_another_version_knows_is_told_until_it_is_set_to_default(self):
        self.good("--no-train", "ask", "hello")
        with contextlib.closing(sqlite3.connect(self.db)) as store, store:
            store.execute("INSERT INTO settings VALUES ('config.sprouting', '3')")
        self.assertIn(b"/set sprouting default forgets it", self.run_here("doctor").stdout)
        done = self.run_here("--no-train", stdin=b"/set top_k 3\n/set sprouting default\n"
                             b"/set top_k default\n")
        self.assertEqual(done.stdout.splitlines(), [
            b"top_k = 3, kept", b"sprouting is kept no more", b"top_k is kept no more"])
        self.assertNotIn("sprouting", self.good("doctor"))

    def test_two_slashes_say_one_and_a_talk_is_shown_and_saved(self):
        done = self.run_here("--no-train", "--session", "one", stdin=b"//tmp is full\n/again\n"
                             b"/save talk.txt\n/save talk.txt\n")
        self.assertEqual(len(done.stdout.splitlines()), 4)
        self.assertIn(b"name a new file", done.stderr)
        self.assertIn("you: /tmp is full", m.read_text(self.path("talk.txt")))
        self.assertIn("you: /tmp is full", self.good("sessions", "show", "one"))

    def test_ask_answers_from_what_is_piped_into_it_and_keeps_nothing_of_that(self):
        lines = [b"Shopping is on Friday.\n", b"The gate code is 4711.\n"]
        for most in (999, 1):  # of more its beginning
            said = self.good("--no-train", "--set", f"max_corpus_lines={most}", "ask",
                             "what is the gate code?", stdin=b"".join(lines), apart=True)
            self.assertEqual(said, "The gate code is 4711.\n")
            self.assertNotIn("4711", self.good("memory", "search", "gate code"))
            lines.reverse()


class Training(Folder):
    def test_train_learns_commits_and_goes_on_where_it_was_also_in_a_long_corpus(self):
        facts = self.report("train")
        self.assertEqual(facts["phase"], "grown")
        self.assertGreater(facts["steps_now"], 0)
        stats = self.report("stats")
        self.assertEqual((stats["step"], list(stats["probe_curves"])), (facts["step"], ["0"]))
        self.assertIn("probe      0", self.good("stats"))
        rng = random.Random(8)
        self.write("nonames.txt", "".join(
            " ".join("%x" % rng.randrange(9 ** 7) for _ in range(7)) + ".\n" for _ in range(300)))
        more = self.report("train", "--steps", "2")  # it outlives the reading of that
        self.assertEqual((more["steps_now"], more["step"]), (2, facts["step"] + 2))

    @unittest.skipUnless(os.name == "posix", "compiled kernels are a thing of POSIX")
    def test_a_compiler_that_hangs_keeps_nobody_and_one_that_fails_is_told_and_done_without(self):
        env = {"CC": f"{sys.executable} {self.path('compiler')}", "XDG_CACHE_HOME": self.folder,
               "MACROGPT_ENGINE": "auto"}  # no shell is needed, where there is no compiler either
        self.write("compiler", "import time; time.sleep(30)\n")
        began = time.monotonic()
        self.assertEqual(len(self.chat("hello", args=(), env=env)), 1)
        self.assertLess(time.monotonic() - began, PATIENCE_SECONDS)  # of its 30
        self.write("compiler", "raise SystemExit(1)\n")
        done = self.run_here("train", "--steps", "1", env=env)
        self.assertEqual((done.returncode, done.stderr.count(b"interpreted")), (0, 1))
        self.assertIn(b"1 steps", done.stdout)

    def test_an_organism_keeps_its_size_until_it_is_told_to_grow_and_only_what_lives_grows(self):
        def shape():
            done = run_inside("stats", "--json", cwd=self.folder)
            return tuple(json.loads(done.stdout)["shape"][x] for x in ("n_layer", "n_embd", "n_ff"))
        self.assertEqual(shape()[0], 2)
        self.report("train", "--steps", "1")
        self.assertEqual(shape()[:2], (1, 16))
        self.mistake(2, "stats", "--set", "n_layer=3", signs=[
            "n_layer=3", "has n_layer=1", "with chat, ask or train"])
        self.mistake(2, "ask", "hello", *TINY, "--set", "n_embd=8",
                     signs=["n_embd=8 is less than the 16"])
        run_inside("train", *TINY, "--set", "n_layer=3", "--set", "n_embd=24", cwd=self.folder)
        self.assertEqual(shape(), (3, 24, 64))

    def test_the_owners_corpus_is_never_written_to(self):
        before = m.file_stamp(self.corpus)
        self.chat("hello", "The boat is called Plover.", args=("--wait-trained",))
        self.assertEqual(m.file_stamp(self.corpus), before)
        self.assertEqual(self.stored("SELECT count(*) FROM entries WHERE source = 'corpus' "
                                     "AND layer IS NULL AND NOT held_out"), [(0,)])


@unittest.skipUnless(os.name == "posix", "signals are a thing of POSIX")
class Signals(Folder):
    def end(self, process, number, code):
        """Send a signal; assert the exit code, and that stderr holds no traceback."""
        process.send_signal(number)
        ended, said = process.wait(PATIENCE_SECONDS), process.stderr.read().decode("utf-8")
        self.assertNotIn("Traceback", said)
        self.assertEqual(ended, code, said)
        self.assertEqual(self.stored("PRAGMA integrity_check"), [("ok",)])

    def test_a_signal_that_is_noted_while_a_line_is_waited_for_is_seen_to(self):
        read, write = os.pipe()
        for end in (read, write):
            self.addCleanup(os.close, end)
        before = signal.signal(signal.SIGUSR1, m._raise_terminated)
        self.addCleanup(signal.signal, signal.SIGUSR1, before)
        late = threading.Timer(PATIENCE_SECONDS, os.write, (write, b"late"))
        self.addCleanup(late.cancel)
        late.start()
        # Taken by another thread, it breaks no wait of this one, as if it had come just before.
        threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
                        ).start()
        with mock.patch.object(sys, "stdin", None), m.knocking(0.05), self.assertRaises(
                m.Terminated):
            os.read(read, 4)
        self.assertTrue(late.is_alive())

    def test_talk_and_training_end_with_everything_committed_and_the_next_goes_on(self):
        slow = ("--set", "commit_seconds=0.1", "--set", "eval_steps=1000000")  # no end of its own
        ends = {143: signal.SIGTERM, 130: signal.SIGINT}
        chats, trainings = ([self.start_here(*words, "--db", self.path(f"{words[0]}{code}"))
                             for code in ends] for words in (
                                 ("--no-train",), ("train", "--seconds", "60", *slow)))
        for (code, number), chat, training in zip(ends.items(), chats, trainings):
            self.db = self.path(f"--no-train{code}")
            self.assertTrue(self.answer(chat, b"The boat is called Plover."))
            self.end(chat, number, code)
            self.assertEqual(chat.stdout.read(), b"")
            self.assertEqual(self.owner_said(), ["The boat is called Plover."])
            self.db = self.path(f"train{code}")
            self.until(lambda: self.setting("growth").get("step", 0) >= 12)
            self.end(training, number, code)
            facts = self.report("stats", "--db", self.db)
            self.assertEqual(facts["step"], self.setting("growth").get("step", 0))
            self.assertTrue(facts["layers"]["base"])
        more = self.report("train", "--steps", "3", "--db", self.db)
        self.assertEqual((more["steps_now"], more["step"]), (3, facts["step"] + 3))


@unittest.skipIf(sys.platform == "win32", "there are no pseudo-terminals here")
class InATerminal(Folder):
    def start(self, *words, sign="you> ", shell=()):
        """Start a chat; return what is shown until the sign."""
        self.master, slave = pty.openpty()
        self.addCleanup(os.close, self.master)
        self.seen = ""
        # a session of its own makes the terminal the controlling one, so that ^C is a signal
        self.process = subprocess.Popen(
            [*shell, *command([*TINY, *(words or ("--no-train",))], self.folder)], cwd=self.folder,
            env=environment(self.folder), stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0))
        os.close(slave)
        self.addCleanup(self.process.wait)
        self.addCleanup(self.process.kill)
        return self.expect(sign)

    def read(self):
        """Take in what the terminal shows now; return whether there may be more."""
        try:
            ready = select.select([self.master], [], [], 0.1)[0]
            chunk = os.read(self.master, 65536) if ready else b""
        except OSError:  # Linux says so when the last writer has gone
            return False
        self.seen += chunk.decode("utf-8", "replace")
        return bool(chunk) or self.process.poll() is None

    def expect(self, sign):
        """Wait until sign appears; return what came before it, and forget both."""
        self.until(lambda: sign in self.seen or not self.read())
        self.assertIn(sign, self.seen)
        before, _, self.seen = self.seen.partition(sign)
        return before

    def type(self, text, sign=None):
        """Type a text; return what is shown until a sign appears, if there is one."""
        os.write(self.master, text.encode("utf-8"))
        return sign and self.expect(sign)

    def enter(self, line="", sign="you> "):
        """Type a line, and return what is shown until the sign."""
        return self.type(line + "\r", sign)

    def interrupt(self, sign=None):
        """Press Ctrl+C once the prompt has come to rest: before that input() does not see it."""
        time.sleep(0.15)
        return self.type("\x03", sign)

    def widen(self, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def leave(self, code):
        """Assert that the process ends with code and without a traceback."""
        self.until(lambda: not self.read())
        self.assertEqual(self.process.wait(PATIENCE_SECONDS), code, self.seen)
        self.assertNotIn("Traceback", self.seen)

    def test_words_fit_a_narrow_window_and_a_pasted_block_is_one_message(self):
        self.start()
        self.widen(20)
        shown = self.enter("Who are you?", "house.").split("»")[1].replace("\x1b[0m", "")
        self.assertEqual(shown.split(), "I am a small lantern in a big".split())
        self.assertLessEqual(max(map(len, f"{shown}house.".split("\r\n"))), 20)
        self.expect("you> ")
        self.widen(80)
        if importlib.util.find_spec("readline"):
            self.type("/sess\t", "ion")
            self.enter("s", "main   ")
            self.expect("you> ")
            self.type("\x1b[200~The boat is blue.\nIt is old.\x1b[201~", "old.")
            self.enter()
            self.assertEqual(self.owner_said()[1:], ["The boat is blue.\nIt is old."])
            self.assertIn(b"Who are you?", self.content(".macrogpt_history"), "kept as it grows")
        self.type("\x04")
        self.leave(0)

    def test_a_chat_with_banner_prompt_block_and_history_that_ctrl_d_ends(self):
        self.assertIn(f"macrogpt {m.__version__}", self.start())
        self.assertIn("I am a small lantern in a big house.", self.enter("Who are you?"))
        self.assertIn("session main", self.enter("/session"))
        self.enter()
        for line in ('"""', "The boat is called Plover.", "/exit", "", "It is blue."):
            self.enter(line, "...> ")
        self.enter('"""')
        self.enter('"""/exit is a word"""')
        for answer in "ny":  # the end of the input within a block: the owner is asked
            self.enter('"""It is', "...> ")
            self.type("\x04", "[y/N] ")
            self.enter(answer)
        self.type("\x04")
        self.leave(0)
        self.assertEqual(self.owner_said(), ["Who are you?", "The boat is called Plover.\n/exit\n\n"
                                             "It is blue.", "/exit is a word", "It is"])
        if importlib.util.find_spec("readline"):
            mode = os.stat(self.path(".macrogpt_history")).st_mode
            self.assertEqual(mode & 0o777, 0o600, "its owner's alone")
            self.assertIn(b"Who are you?\n", self.content(".macrogpt_history"))

    def test_what_is_longer_than_the_screen_is_paged_and_what_is_forgotten_is_asked_for(self):
        self.start()
        self.enter("/show", "n_layer")
        self.type(" q", "you> ")  # a key for the pager, which leaves the rest unread
        self.enter("My locker number is 4711.")
        for answer, kept in (("n", 1), ("y", 0)):
            self.assertIn("4711", self.enter("/forget my locker number", "[y/N] "))
            self.enter(answer)
            told = self.stored("SELECT 1 FROM entries WHERE source != 'corpus'")
            self.assertEqual(len(told), kept)

    def test_ctrl_c_at_the_prompt_says_how_to_leave_and_twice_leaves(self):
        self.start()
        self.type("half a li", "half a li")
        self.assertIn("/exit", self.interrupt("you> "))
        self.assertIn("lantern", self.enter("Who are you?"))
        self.assertIn("/exit", self.interrupt("you> "))
        self.type("half a li")
        self.assertIn("/exit", self.interrupt("you> "), "something was typed in between")
        self.interrupt()
        self.leave(130)
        self.assertEqual(self.owner_said(), ["Who are you?"])

    @unittest.skipUnless(importlib.util.find_spec("readline") and shutil.which("sh"),
                         "nothing tells here what is typed, or there is no shell")
    def test_the_prompt_and_what_was_typed_come_back_with_fg(self):
        self.start(shell=("sh", "-c", 'set -m; "$@"; echo stopped; fg', "sh"))
        self.type("Who is", "Who is")
        self.type("\x1a", "stopped")
        self.expect("you> Who is")
        self.type(" the miller?\r\x04")
        self.leave(0)
        self.assertEqual(self.owner_said(), ["Who is the miller?"])

    @unittest.skipUnless(importlib.util.find_spec("readline"), "no line above is redrawn here")
    def test_the_line_above_the_prompt_is_redrawn_while_one_types(self):
        self.start("--set=warmup_epochs=99999", "--set=warmup_steps=2000000",
                   "--set=eval_steps=2000000", sign="being born ")  # though nobody has typed
        for typed in ("Who is", " the m", "iller?"):  # saved, a row up, and back where it was
            self.type(typed, "\x1b7\x1b[A\r")
            self.expect("\x1b8")
        self.enter()
        self.until(lambda: "Who is the miller?" in self.owner_said())

