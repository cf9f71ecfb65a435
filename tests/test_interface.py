"""Claims about the INTERFACE: streams, codes, options; on real processes: pipes, signals, terminals."""
import contextlib
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

import macrogpt as m
from support import CORPUS, PROGRAM, TINY, Folder, run_inside, run_macrogpt, start_macrogpt

PATIENCE_SECONDS = 10.0
ONE_ERROR = re.compile(r"macrogpt: \S[^\n]*\n")


class ProcessCase(Folder, unittest.TestCase):
    def mistake(self, code, *args, signs=(), run=run_inside, **options):
        """Assert that a run ends with code, says nothing on stdout and one line on stderr."""
        done = run(*args, cwd=self.folder, **options)
        said = done.stderr.decode("utf-8")
        self.assertEqual(done.returncode, code, said)
        self.assertEqual(done.stdout, b"")
        self.assertRegex(said, f"\\A{ONE_ERROR.pattern}\\Z")
        for sign in signs:
            self.assertIn(sign, said)

    def good(self, *args, **options):
        """Return the stdout of a tiny run that must end with 0."""
        done = self.run_here(*args, **options)
        self.assertEqual(done.returncode, 0, done.stderr.decode("utf-8", "replace"))
        self.assertNotIn(b"Traceback", done.stderr)
        return done.stdout.decode("utf-8")

    def report(self, *args, code=0):
        """Return the one JSON object that a tiny run with --json prints."""
        done = self.run_here(*args, "--json")
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertEqual(done.stdout.count(b"\n"), 1)
        facts = json.loads(done.stdout)
        self.assertIsInstance(facts, dict)
        return facts

    def chat(self, *lines, args=("--no-train",), **options):
        """Return the lines of stdout that piped lines give."""
        typed = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n"
                         for line in lines)
        return self.good(*args, stdin=typed, **options).splitlines()

    def stored(self, sql):
        """Return rows of the closed memory file."""
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            return db.execute(sql).fetchall()


class Mistakes(ProcessCase):
    def test_an_unknown_command_is_a_usage_error_with_a_hint(self):
        self.mistake(2, "trian", signs=["trian", "train"], run=run_macrogpt)

    def test_a_wrong_setting_is_a_usage_error_with_a_hint(self):
        self.mistake(2, "stats", "--set", "top_kk=3", signs=["top_kk", "top_k"])
        self.mistake(2, "--set", "n_embd=many", signs=["n_embd", "int"])
        self.mistake(2, "--set", "samplers=top_k,nonsense", "chat", signs=["nonsense"])

    def test_a_wrong_option_is_a_usage_error(self):
        self.mistake(2, "--nonsense", signs=["--nonsense"])
        self.mistake(2, "stats", "--tokens", "3", signs=["--tokens"])
        self.mistake(2, "train", "--steps", "0", signs=["--steps"])

    def test_ask_without_a_text_is_a_usage_error(self):
        self.mistake(2, "ask", "  ", signs=["ask"])

    def test_a_session_that_cannot_be_shown_is_a_usage_error(self):
        self.mistake(2, "--session", "a\nb", "sessions")

    def test_eval_of_a_missing_or_empty_file_is_an_error(self):
        self.mistake(1, "eval", "nowhere.txt", signs=["nowhere.txt"], run=run_macrogpt)
        self.mistake(1, "eval", self.write("empty.txt", ""), signs=["empty.txt"])

    def test_a_corpus_that_was_named_and_is_missing_is_an_error(self):
        self.mistake(1, "--corpus", "mine.txt", "ask", "hello", signs=["mine.txt", "--corpus"])
        self.assertFalse(os.path.exists(self.path("mine.txt")))

    def test_a_memory_that_is_a_folder_or_another_file_is_an_error(self):
        self.mistake(1, "--db", self.folder, "stats", signs=[self.folder])
        self.mistake(1, "--db", self.corpus, "ask", "hello", signs=["nonames.txt"])
        self.mistake(1, "--db", self.path("no", "m.db"), "stats", signs=["folder"])

    def test_what_is_not_there_yet_says_so(self):
        self.mistake(1, "export", "there", "--format", "gguf", signs=["export", "not there yet"])

    def test_an_engine_that_is_not_to_be_had_is_one_line(self):
        self.mistake(1, "stats", env={"MACROGPT_ENGINE": "native", "CC": "no-such-compiler"},
                     signs=["MACROGPT_ENGINE", "CC"])
        self.mistake(2, "stats", env={"MACROGPT_ENGINE": "steam"}, signs=["steam"])

    def test_a_traceback_is_shown_only_with_debug(self):
        done = run_macrogpt("--debug", "trian", cwd=self.folder)
        self.assertIn(b"Traceback", done.stderr)
        self.assertIn(b"UsageError", done.stderr)
        self.assertNotEqual(done.returncode, 0)

    def test_only_what_lives_grows_and_only_larger(self):
        self.good("train", "--steps", "1")
        self.mistake(2, "stats", "--set", "n_embd=32", signs=["it grows with chat, ask or train"])
        self.mistake(2, "ask", "hello", *TINY, "--set", "n_embd=8",
                     signs=["n_embd=8 is less than the 16"])


class Options(ProcessCase):
    def test_the_script_tells_its_version_in_one_line(self):
        done = subprocess.run([sys.executable, PROGRAM, "--version"], capture_output=True)
        self.assertEqual((done.returncode, done.stdout), (0, f"macrogpt {m.__version__}\n".encode()))

    def test_the_help_names_every_command_and_option_and_makes_nothing(self):
        done = run_inside("--help", cwd=self.folder)
        text = done.stdout.decode("utf-8")
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        for name in (*m.COMMANDS, "--db", "--corpus", "--session", "--set", "--seed", "--no-train",
                     "--wait-trained", "--json", "--quiet", "--debug", "--color", "--version"):
            self.assertRegex(text, rf"(?m)(^|\s){re.escape(name)}\b")
        self.assertEqual(os.listdir(self.folder), ["nonames.txt"])

    def test_options_may_stand_before_and_after_the_command(self):
        one = self.path("one.db")
        for words in (("--db", one, "--session", "north", "--no-train", "ask", "who are you"),
                      ("ask", "--session", "north", "who are you", "--no-train", "--db", one)):
            self.assertIn("lantern", self.good(*words))
        facts = self.report("sessions", "--db", one)
        self.assertEqual([(s["name"], s["messages"]) for s in facts["sessions"]], [("north", 4)])

    def test_color_is_shown_when_asked_for_and_never_against_a_wish(self):
        for args, env, colored in ((("--color", "always"), {}, True), ((), {}, False),
                                   (("--color", "never"), {}, False)):
            done = self.run_here("generate", "--tokens", "1", *args, env=env)
            self.assertIn(b"nothing has been learned yet", done.stderr)
            self.assertEqual(b"\033[" in done.stderr, colored, args)
            self.assertNotIn(b"\033", done.stdout)

    def test_quiet_leaves_replies_alone(self):
        done = self.run_here("generate", "x", "--tokens", "1", "--quiet")
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertTrue(done.stdout)

    def test_the_same_seed_gives_the_same_replies_on_copies_of_one_memory(self):
        self.write("nonames.txt", "".join(f"H: hello\nA: answer {word}\n\n" for word in
                                          ("north", "east", "south", "west", "up", "down")))
        self.good("ask", "hello", "--no-train")
        twin = self.path("twin.db")
        shutil.copy(self.db, twin)
        said = [self.chat(*["hello"] * 6, args=("--no-train", "--seed", "7", "--db", path))
                for path in (self.db, twin)]
        self.assertEqual(said[0], said[1])
        self.assertGreater(len(set(said[0])), 1, "the seed does not freeze the die")

    def test_generate_begins_with_its_prompt_and_says_so_many_tokens(self):
        done = self.run_here("generate", "the heron", "--tokens", "5", "--seed", "3")
        again = self.run_here("generate", "the heron", "--tokens", "5", "--seed", "3")
        text = done.stdout.decode("utf-8")
        self.assertEqual((done.returncode, again.stdout), (0, done.stdout))
        self.assertTrue(text.startswith("the heron") and text.endswith("\n"))
        self.assertLessEqual(len(text), len("the heron") + 5 + 1)


class Reports(ProcessCase):
    def test_every_report_is_one_object_with_its_keys(self):
        self.assertEqual(len(self.chat("the lighthouse keeper is called Ambrose", "hello")), 2)
        facts = self.report("stats")
        for key in ("version", "engine", "parameters", "vocabulary", "shape", "layers", "phase",
                    "step", "tokens", "bpc", "memory", "progress", "life"):
            self.assertIn(key, facts)
        self.assertEqual(facts["memory"]["messages"], 4)
        self.assertEqual(facts["shape"]["n_embd"], 16)
        (session,) = self.report("sessions")["sessions"]
        self.assertEqual((session["name"], session["messages"]), ("main", 4))
        self.assertLess({"name", "started_at", "last_at"}, set(session))
        (entry,) = self.report("memory", "search", "lighthouse keeper")["entries"]
        self.assertIn("Ambrose", entry["text"])
        listed = self.report("memory", "list")["entries"]
        self.assertIn(entry, listed)
        gone = self.report("memory", "forget", str(entry["id"]))
        self.assertIn("Ambrose", gone["said"])
        self.assertEqual(self.report("memory", "search", "Ambrose")["entries"], [])
        self.assertIn("said", self.report("memory", "forget", "Ambrose", code=1))

    def test_the_doctor_finds_a_sound_organism_healthy_and_a_damaged_one_not(self):
        self.good("ask", "hello", "--no-train")
        facts = self.report("doctor")
        self.assertTrue(facts["healthy"])
        names = [check["name"] for check in facts["checks"]]
        for name in ("python", "engine", "compiler", "corpus", "store", "privacy"):
            self.assertIn(name, names)
        if os.name == "posix":
            os.chmod(self.db, 0o644)
            facts = self.report("doctor", code=1)
            self.assertEqual([c["name"] for c in facts["checks"] if not c["ok"]], ["privacy"])
        self.write("memory.sqlite3", "something else " * 99)
        bad = [c["name"] for c in self.report("doctor", code=1)["checks"] if not c["ok"]]
        self.assertIn("store", bad)

    def test_eval_measures_in_bits_per_character_and_learns_nothing(self):
        text = "H: Who are you?\nA: I am a small lantern — in a big house.\n"
        self.good("stats")
        before = self.stored("SELECT count(*) FROM entries")
        facts = self.report("eval", self.write("held.txt", text))
        self.assertLess({"characters", "gpt_bpc", "voice_bpc", "voice_adaptive_bpc"}, set(facts))
        self.assertEqual(facts["characters"], len(text))
        self.assertTrue(6.0 < facts["gpt_bpc"] < 12.0, "a newborn knows nothing: about 8 bits a byte")
        self.assertEqual(self.stored("SELECT count(*) FROM entries"), before)

    def test_without_json_reports_are_lines_for_people(self):
        self.assertIn("parameters", self.good("stats"))
        self.assertIn("no session", self.good("sessions"))


class Piped(ProcessCase):
    def test_each_line_gives_exactly_one_line_in_order(self):
        said = self.chat("Who are you?", "", "What do you eat?", "   ", "zzz?",
                         "Where does the heron sleep?")
        self.assertEqual(len(said), 6)
        self.assertEqual(said[0], "I am a small lantern in a big house.")
        self.assertEqual(said[2], "I eat words and a little electricity.")
        self.assertIn(said[4], m.UNKNOWN_REPLIES)
        self.assertEqual(said[5], "The heron sleeps beside the mill pond.")
        self.assertTrue(all(line.strip() for line in said))

    def test_stdout_has_replies_and_nothing_else(self):
        done = self.run_here("--no-train", stdin=b"Who are you?\n", apart=True)
        self.assertEqual(done.returncode, 0)
        self.assertEqual(done.stdout, b"I am a small lantern in a big house.\n")
        self.assertNotIn(b"you>", done.stderr)
        self.assertNotIn(b"engine", done.stderr, "no banner")
        self.assertEqual(self.chat(), [])

    def test_a_last_line_without_its_end_is_a_line(self):
        self.assertEqual(len(self.chat(b"Who are you?\r\nWhat do you eat?")), 2)

    def test_commands_give_one_line_or_none_and_are_never_speech(self):
        said = self.chat("/help", "/stats", "/sessions", "/show temperature", "/set temperature 0.5",
                         "/nonsense here", "/", "/memory", "/memory heron", "/why", "/good",
                         "/session other", "/new", "/compact", "/save", "/set", "/teach",
                         "/teach the moon is a lamp", "/forget 12345", "/session",
                         "Who are you?", "/exit", "never read")
        self.assertEqual(len(said), 21)
        self.assertEqual(said[-1], "I am a small lantern in a big house.")
        self.assertIn("/nonsense", said[5])
        self.assertIn("/help", "".join(said))
        self.assertEqual(self.stored("SELECT text FROM messages WHERE role = 'owner'"),
                         [("Who are you?",)])

    def test_a_mistaken_command_is_told_on_stderr_and_the_chat_goes_on_and_ends_well(self):
        lines = "/set temperature nan\n/set topk 3\n/show nothing\n/forget\nWho are you?\n"
        done = self.run_here("--no-train", stdin=lines.encode())
        self.assertEqual(done.stderr.decode().count("macrogpt: "), 4)
        replies = [line for line in done.stdout.decode().splitlines() if line]
        self.assertEqual(replies, ["I am a small lantern in a big house."])
        self.assertEqual(done.returncode, 0, "the end of input is a good end")

    def test_an_unknown_command_names_the_nearest_one(self):
        (said,) = self.chat("/staats")
        self.assertIn("stats", said)
        self.assertEqual(self.stored("SELECT count(*) FROM messages"), [(0,)])

    def test_bytes_that_are_no_text_and_a_line_of_a_megabyte_are_survived(self):
        word = b"heron mill copper "
        said = self.chat(b"\xff\xfe caf\xe9 \x80\x00\x1b[2J\n", word * (1_000_000 // len(word)) + b"\n",
                         b"x" * 1_000_000 + b"\n", "Who are you?")
        self.assertEqual(len(said), 4)
        self.assertEqual(said[3], "I am a small lantern in a big house.")

    def test_a_reply_comes_before_the_next_line_is_read(self):
        process = self.start_here("--no-train", "--quiet")
        for asked, answered in ((b"Who are you?", b"lantern"), (b"What do you eat?", b"words"),
                                (b"/save", b"saved"), (b"Who are you?", b"lantern")):
            process.stdin.write(asked + b"\n")
            process.stdin.flush()
            watch = threading.Timer(PATIENCE_SECONDS, process.kill)
            watch.start()
            line = process.stdout.readline()
            watch.cancel()
            self.assertIn(answered, line)
        process.stdin.close()
        self.assertEqual(process.wait(PATIENCE_SECONDS), 0)
        self.assertEqual(process.stdout.read(), b"")

    @unittest.skipUnless(os.name == "posix", "pipes break otherwise on Windows")
    def test_a_closed_pipe_ends_quietly(self):
        process = self.start_here("--no-train")
        process.stdout.close()
        process.stdin.write(b"Who are you?\n" * 5)
        process.stdin.close()
        self.assertEqual(process.wait(PATIENCE_SECONDS), 0)
        self.assertEqual(process.stderr.read(), b"")

    def test_a_fact_told_in_one_process_is_known_in_the_next(self):
        asked = ("ask", "What is the ferryman's parrot called?", "--no-train")
        self.chat("The ferryman's parrot is called Zephyrine.", apart=True)
        self.assertIn("Zephyrine", self.good(*asked, apart=True))
        self.chat("/forget The ferryman's parrot is called Zephyrine.")
        self.assertNotIn("Zephyrine", self.good(*asked, apart=True))

    def test_sessions_are_made_and_picked_by_name_and_a_name_is_only_a_name(self):
        outer, self.folder = self.folder, self.path("deep", "inner")
        os.makedirs(self.folder)
        self.db = self.path("memory.sqlite3")
        self.write("nonames.txt", CORPUS)
        before = [set(files) for _, _, files in os.walk(outer)]
        for name, count in (("../../x", 1), ("main", 2), ("../../x", 1), ("ü 'quoted\"; --", 1)):
            self.chat(*["hello"] * count, args=("--no-train", "--session", name))
        facts = self.report("sessions")
        self.assertEqual({s["name"]: s["messages"] for s in facts["sessions"]},
                         {"../../x": 4, "main": 4, "ü 'quoted\"; --": 2})
        before[-1].add("memory.sqlite3")
        self.assertEqual([set(files) for _, _, files in os.walk(outer)], before)

    def test_without_a_corpus_a_small_first_one_is_written_and_said(self):
        os.unlink(self.corpus)
        done = self.run_here("--no-train", stdin=b"Who are you?\n")
        self.assertEqual(done.returncode, 0)
        self.assertEqual(len(done.stdout.splitlines()), 1)
        self.assertIn(b"nonames.txt", done.stderr)
        with open(self.corpus, encoding="utf-8") as file:
            self.assertEqual(file.read(), m.FIRST_CORPUS)


class Training(ProcessCase):
    def test_train_learns_commits_and_goes_on_where_it_was(self):
        facts = self.report("train")
        self.assertEqual(facts["phase"], "grown")
        self.assertGreater(facts["steps_now"], 0)
        self.assertEqual(self.report("stats")["step"], facts["step"])
        more = self.report("train", "--steps", "2")
        self.assertEqual((more["steps_now"], more["step"]), (2, facts["step"] + 2))

    def test_an_order_to_train_outlives_the_reading_of_a_long_corpus(self):
        rng = random.Random(8)
        with open(self.corpus, "w", encoding="utf-8") as file:
            for _ in range(300):
                file.write(" ".join("%x" % rng.randrange(9 ** 7) for _ in range(7)) + ".\n")
        self.assertEqual(self.report("train", "--steps", "1")["steps_now"], 1)

    def test_a_second_chat_goes_on_where_the_first_was_killed(self):
        def growth():
            return self.stored("SELECT value FROM settings WHERE name = 'growth'")

        def wait_until(reached):
            deadline = time.monotonic() + 20
            while not reached():
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.05)
        self.good("stats")
        slow = ("--set", "warmup_steps=90")
        first = self.start_here("chat", *slow)
        wait_until(lambda: self.stored("SELECT 1 FROM settings WHERE name = 'lease'"))
        second = self.start_here("chat", *slow)  # it opens the memory while that is newborn
        wait_until(lambda: growth() and json.loads(growth()[0][0])["phase"] == "grown")
        before = json.loads(growth()[0][0])
        first.kill()
        first.wait()
        with open(self.corpus, "a", encoding="utf-8") as file:
            file.write("\nThe quince ripens in October.\n")
        wait_until(lambda: json.loads(growth()[0][0])["step"] > before["step"])
        after = json.loads(growth()[0][0])
        self.assertEqual((after["phase"], after["warmup_step"]), ("grown", before["warmup_step"]))
        self.assertEqual(second.communicate(b"hello\n", timeout=20)[0].count(b"\n"), 1)

    @unittest.skipUnless(os.name == "posix", "compiled kernels are a thing of POSIX")
    def test_leaving_while_kernels_are_compiled_takes_no_time(self):
        compiler = self.write("compiler", "#!/bin/sh\nexec sleep 30\n")
        os.chmod(compiler, 0o700)
        began = time.monotonic()
        said = self.chat("hello", args=(), env={"CC": compiler, "XDG_CACHE_HOME": self.folder,
                                                "MACROGPT_ENGINE": "auto"})
        self.assertEqual(len(said), 1)
        self.assertLess(time.monotonic() - began, 8.0)  # half a second where nothing else runs

    @unittest.skipUnless(os.name == "posix", "compiled kernels are a thing of POSIX")
    def test_with_a_compiler_that_fails_it_learns_interpreted_and_says_so(self):
        compiler = self.write("compiler", "#!/bin/sh\nexit 1\n")
        os.chmod(compiler, 0o700)
        done = self.run_here("train", "--steps", "1", env={
            "CC": compiler, "XDG_CACHE_HOME": self.folder, "MACROGPT_ENGINE": "auto"})
        self.assertEqual(done.returncode, 0)
        self.assertIn(b"1 steps", done.stdout)
        self.assertEqual(done.stderr.count(b"interpreted"), 1)

    def test_an_organism_keeps_its_size_until_it_is_told_to_grow(self):
        def shape():
            done = run_inside("stats", "--json", cwd=self.folder)
            return json.loads(done.stdout)["shape"]
        self.assertEqual(shape()["n_layer"], 2)
        self.report("train", "--steps", "1")
        self.assertEqual((shape()["n_layer"], shape()["n_embd"]), (1, 16))
        self.mistake(2, "stats", "--set", "n_layer=3", signs=["n_layer=3", "has n_layer=1"])
        grown = run_inside("ask", "hello", *TINY, "--set", "n_layer=3", "--set", "n_embd=24",
                           cwd=self.folder)
        self.assertEqual(grown.returncode, 0, grown.stderr)
        self.assertEqual((shape()["n_layer"], shape()["n_embd"], shape()["n_ff"]), (3, 24, 64))

    def test_the_owners_corpus_is_never_written_to(self):
        before = os.stat(self.corpus)
        self.chat("hello", "The boat is called Plover.", args=("--wait-trained",))
        after = os.stat(self.corpus)
        self.assertEqual((before.st_mtime_ns, before.st_size, before.st_ino),
                         (after.st_mtime_ns, after.st_size, after.st_ino))
        self.assertEqual(self.stored("SELECT count(*) FROM entries WHERE source = 'corpus' "
                                     "AND NOT learned AND NOT held_out"), [(0,)])


@unittest.skipUnless(os.name == "posix", "signals are a thing of POSIX")
class Signals(ProcessCase):
    def wait_for(self, condition):
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            if condition():
                return
            time.sleep(0.02)
        self.fail("it did not happen in time")

    def end(self, process, number, code):
        """Send a signal; assert the exit code, and that stderr holds no traceback."""
        process.send_signal(number)
        ended, said = process.wait(PATIENCE_SECONDS), process.stderr.read().decode("utf-8")
        self.assertNotIn("Traceback", said)
        self.assertEqual(ended, code, said)
        self.assertEqual(self.stored("PRAGMA integrity_check"), [("ok",)])

    def test_a_piped_chat_ends_with_everything_said_committed(self):
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            process = self.start_here("--no-train", "--db", self.db, "--session", str(code))
            process.stdin.write(b"The boat is called Plover.\n")
            process.stdin.flush()
            process.stdout.readline()
            self.end(process, number, code)
            self.assertEqual(process.stdout.read(), b"")
        self.assertEqual([s["messages"] for s in self.report("sessions")["sessions"]], [2, 2])

    def interrupt_training(self, number, code, least):
        """Train, send a signal once so many steps are committed; return what is committed then."""
        process = self.start_here("train", "--seconds", "60", "--db", self.db,
                                  "--set", "commit_seconds=0.1")
        self.wait_for(lambda: os.path.exists(self.db) and self.steps() >= least)
        self.end(process, number, code)
        self.assertGreaterEqual(self.steps(), least)
        return self.steps()

    def test_training_ends_with_what_was_learned_committed(self):
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            self.db = self.path(f"{code}.db")
            steps = self.interrupt_training(number, code, 1)
            facts = self.report("stats", "--db", self.db)
            self.assertEqual((facts["step"], facts["layers"]["base"]), (steps, True))

    def test_training_after_an_interrupted_one_does_the_steps_it_is_told_to(self):
        steps = self.interrupt_training(signal.SIGTERM, 143, 12)
        facts = self.report("train", "--steps", "3")
        self.assertEqual((facts["steps_now"], facts["step"]), (3, steps + 3))

    def steps(self):
        """Return the step that the memory file holds, 0 while it holds none."""
        try:
            rows = self.stored("SELECT value FROM settings WHERE name = 'growth'")
        except sqlite3.OperationalError:  # the file is being made
            return 0
        return json.loads(rows[0][0])["step"] if rows else 0


@unittest.skipIf(sys.platform == "win32", "there are no pseudo-terminals here")
class InATerminal(ProcessCase):
    def setUp(self):
        super().setUp()
        import pty
        self.master, slave = pty.openpty()
        self.addCleanup(os.close, self.master)
        self.seen = ""
        # a session of its own makes the terminal the controlling one, so that ^C is a signal
        self.process = start_macrogpt(
            "--no-train", *TINY, cwd=self.folder, stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, preexec_fn=lambda: self.take(slave))
        os.close(slave)
        self.addCleanup(self.process.wait)
        self.addCleanup(self.process.kill)

    @staticmethod
    def take(slave):
        import fcntl
        import termios
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    def read(self):
        """Take in what the terminal shows now; return whether there may be more."""
        ready, _, _ = select.select([self.master], [], [], 0.1)
        if ready:
            try:
                chunk = os.read(self.master, 65536)
            except OSError:  # Linux says so when the last writer has gone
                return False
            self.seen += chunk.decode("utf-8", "replace")
            return bool(chunk)
        return self.process.poll() is None

    def expect(self, sign):
        """Wait until sign appears; return what came before it, and forget both."""
        end = time.monotonic() + PATIENCE_SECONDS
        while sign not in self.seen:
            if time.monotonic() > end or not self.read() and sign not in self.seen:
                self.fail(f"{sign!r} did not appear in {self.seen!r}")
        before, _, self.seen = self.seen.partition(sign)
        return before

    def type(self, text):
        os.write(self.master, text.encode("utf-8"))

    def interrupt(self):
        """Press Ctrl+C once the prompt has come to rest.

        A signal between a prompt's last byte and the wait for the first key is seen only with the
        next key; that is how Python's input() is, and no owner is so quick.
        """
        time.sleep(0.15)
        self.type("\x03")

    def leave(self, code):
        """Assert that the process ends with code and without a traceback."""
        end = time.monotonic() + PATIENCE_SECONDS
        while self.read() and time.monotonic() < end:
            pass
        self.assertEqual(self.process.wait(PATIENCE_SECONDS), code, self.seen)
        self.assertNotIn("Traceback", self.seen)

    def test_banner_prompt_reply_and_ctrl_d(self):
        self.assertIn(f"macrogpt {m.__version__}", self.expect("you> "))
        self.type("Who are you?\r")
        self.assertIn("I am a small lantern in a big house.", self.expect("you> "))
        self.type("/session\r")
        self.assertIn("session main", self.expect("you> "))
        self.type("\r")
        self.expect("you> ")
        self.type("\x04")
        self.leave(0)
        self.assertEqual(self.stored("SELECT text FROM messages WHERE role = 'owner'"),
                         [("Who are you?",)])

    def test_ctrl_c_at_the_prompt_says_how_to_leave_and_twice_leaves(self):
        self.expect("you> ")
        self.type("half a li")
        self.expect("half a li")
        self.interrupt()
        self.assertIn("/exit", self.expect("you> "))
        self.type("Who are you?\r")
        self.assertIn("lantern", self.expect("you> "))
        self.interrupt()
        self.assertIn("/exit", self.expect("you> "))
        self.interrupt()
        self.leave(130)
        self.assertEqual(self.stored("SELECT text FROM messages WHERE role = 'owner'"),
                         [("Who are you?",)])

    def test_three_quotes_open_and_close_one_message(self):
        self.expect("you> ")
        self.type('"""\r')
        self.expect("...> ")
        for line in ("The boat is called Plover.", "/exit", "", "It is blue."):
            self.type(line + "\r")
            self.expect("...> ")
        self.type('"""\r')
        self.expect("you> ")
        self.type("/exit\r")
        self.leave(0)
        self.assertEqual(self.stored("SELECT text FROM messages WHERE role = 'owner'"),
                         [("The boat is called Plover.\n/exit\n\nIt is blue.",)])

    def test_the_history_is_its_owners_alone(self):
        try:
            import readline  # noqa: F401
        except ImportError:
            self.skipTest("this Python has no readline")
        self.expect("you> ")
        self.type("Who are you?\r")
        self.expect("you> ")
        self.type("/exit\r")
        self.leave(0)
        history = self.path(".macrogpt_history")
        self.assertEqual(os.stat(history).st_mode & 0o777, 0o600)
        with open(history, encoding="utf-8") as file:
            self.assertIn("Who are you?", file.read().splitlines())


if __name__ == "__main__":
    unittest.main()
