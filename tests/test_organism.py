"""The organism: learning, its supervision, and what survives; with real trainer processes."""

import dataclasses
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import macrogpt as m  # noqa: E402

TINY = ("n_embd=16", "n_head=2", "block_size=24", "warmup_steps=12", "eval_steps=4", "micro_steps=3",
        "eval_chars=300", "min_merge_chars=1000000", "tick_seconds=0.05", "commit_seconds=0.3")
LINES = """H: Hello there.
A: Hello, and welcome.

H: What is the sea?
A: The sea is wide and blue.

H: Do you like rain?
A: I have never felt the rain.

The garden is green in spring.
A bird sits in the old tree.

H: Where is the river?
A: The river is behind the hill.
"""


class Home(unittest.TestCase):
    """A temporary folder with a corpus, a memory and a tiny configuration."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.corpus = self.folder / "corpus.txt"
        self.corpus.write_text(LINES, encoding="utf-8")
        self.config = self.configured()

    def configured(self, *more):
        return m.Config().replace([*TINY, f"corpus_path={self.corpus}",
                                   f"db_path={self.folder / 'm.sqlite3'}", *more])

    def organism(self, *more):
        config = self.configured(*more)
        memory = m.Memory(config.db_path)
        being = m.Organism(config, memory, m.interpreted_engine())
        self.addCleanup(memory.close)
        self.addCleanup(being.sleep)
        return being

    def grown(self, *more):
        being = self.organism(*more)
        being.awake()
        being.wait_trained()
        return being

    def until(self, condition, seconds=20.0):
        """Wait for a condition; fail when it does not come."""
        end = time.monotonic() + seconds
        while not condition():
            self.assertLess(time.monotonic(), end, "it did not happen in time")
            time.sleep(0.02)

    def append(self, text):
        with open(self.corpus, "a", encoding="utf-8") as file:
            file.write(text)


class Frames(unittest.TestCase):
    def test_a_frame_comes_back_as_it_was_sent(self):
        message, blobs = {"do": "x", "n": [1, None, "ü"]}, {"a": b"\0\1", "b": b""}
        stream = io.BytesIO(m.pack_frame(dict(message), blobs) * 2)
        self.assertEqual(m.read_frame(stream), (message, blobs))
        self.assertEqual(m.read_frame(stream), (message, blobs))
        self.assertIsNone(m.read_frame(stream))

    def test_a_frame_that_was_cut_off_is_the_end(self):
        whole = m.pack_frame({"do": "x"}, {"a": b"12345"})
        for size in range(len(whole)):
            self.assertIsNone(m.read_frame(io.BytesIO(whole[:size])))


class StudentTest(unittest.TestCase):
    def student(self, *more, growth=None, layers=None):
        config = m.Config().replace([*TINY, *more])
        return m.Student(config, growth or m.Growth(), layers or {}, m.interpreted_engine())

    @staticmethod
    def text(count, word="sea", fresh=True):
        rng = random.Random(word)
        words = [word, "tree", "bird", "rain", "hill", "green", "old", "and"]
        return [[i, " ".join(rng.choices(words, k=8)) + "\n", True, fresh] for i in range(count)]

    def finish(self, student, steps=None):
        job = m.Job(student, steps, None, time.monotonic)
        job.advance()
        while not job.finished():
            job.advance()
        return job.close()

    def test_a_warm_up_lowers_the_loss_and_freezes_the_base(self):
        student = self.student()
        student.take_text(self.text(30), "sea and tree and bird\n")
        before = student.evaluate()
        learned = self.finish(student)
        self.assertLess(student.growth.bpc, before)
        self.assertEqual(student.growth.phase, "grown")
        self.assertEqual(set(learned), set(range(30)))
        self.assertEqual(student.model.trainable(), [])

    def test_a_burst_changes_the_active_delta_and_nothing_else(self):
        student = self.student()
        student.take_text(self.text(30), "")
        self.finish(student)
        base = [p.data[:] for p in student.model.params.values()]
        student.take_text(self.text(30, fresh=False) + [[99, "a new word: quartz\n", True, True]], "")
        self.assertEqual(self.finish(student), [99])
        self.assertEqual([p.data for p in student.model.params.values()], base)
        self.assertTrue(any(any(p.data) for p in student.model.delta_params() if ".b" in p.name))

    def test_a_snapshot_holds_only_what_changed(self):
        student = self.student()
        student.take_text(self.text(30), "")
        self.finish(student)
        self.assertIn("base", student.snapshot()[1])
        student.take_text(self.text(3), "")
        self.finish(student)
        layers = student.snapshot()[1]
        self.assertEqual(set(layers), {"delta0", "optimizer", "router"})
        self.assertEqual(set(student.snapshot()[1]), {"optimizer"})

    def test_a_student_made_from_a_snapshot_goes_on_to_the_same_bits(self):
        one = self.student("dropout=0.0")
        one.take_text(self.text(30), "")
        for _ in range(5):
            one.step(0.005, 0)
        growth, layers = one.snapshot()
        two = self.student("dropout=0.0", growth=growth, layers=layers)
        two.take_text(self.text(30), "")
        two.model.freeze(False)
        windows = [[1, 2, 3, 4, 5], [9, 8, 7]]
        for student in (one, two):
            m.train_step(student.model, student.optimizer, windows, 0.01, 0.0, random.Random(0))
        for name in one.model.params:
            self.assertEqual(one.model.params[name].data, two.model.params[name].data)

    def test_full_deltas_are_sealed_and_the_oldest_folds_into_the_base(self):
        student = self.student("delta_seal_chars=10", "max_delta_modules=2")
        student.take_text(self.text(30), "")
        self.finish(student)
        student.snapshot()
        names = []
        for i in range(4):
            student.take_text([[1000 + i, f"sentence number {i} is new\n", True, True]], "")
            self.finish(student)
            layers = student.snapshot()[1]
            names.append([(n, layers[n].sealed) for n in m.delta_names(layers)])
        self.assertEqual(names[0], [("delta0", False)])
        self.assertEqual(names[1], [("delta0", True), ("delta1", False)])
        self.assertEqual(names[3], [("delta2", True), ("delta3", False)])
        self.assertEqual(student.layer_names()[3:], ["delta2", "delta3", "fold1", "router"])
        self.assertIn("base", layers)

    def test_folding_leaves_what_it_says_unchanged(self):
        student = self.student("delta_seal_chars=1", "max_delta_modules=1")
        student.take_text(self.text(30), "")
        self.finish(student)
        student.take_text([[77, "quartz and amber\n", True, True]], "")
        self.finish(student)
        before = student.model.logits([1, 50, 60, 70]).data[:]
        student._fold_oldest()
        after = student.model.logits([1, 50, 60, 70]).data
        self.assertLess(max(abs(a - b) for a, b in zip(before, after)), 1e-4)

    def test_much_more_text_begins_a_second_warm_up_with_more_merges(self):
        student = self.student("min_merge_chars=500", "max_merges=40", "min_pair_count=3")
        student.take_text(self.text(20), "")
        self.finish(student)
        old = student.tokenizer.merges
        sample = student.tokenizer.encode("sea and tree", merge_limit=len(old))
        student.config = dataclasses.replace(student.config, max_merges=80)
        student.take_text(self.text(20) + [[500 + i, f"{t} lantern window\n", True, True]
                                           for i, (_, t, _, _) in enumerate(self.text(80, "lamp"))], "")
        self.assertEqual(student.growth.phase, "warmup")
        self.assertEqual(student.growth.warmup_step, 0)
        self.assertGreater(len(student.tokenizer.merges), len(old))
        self.assertEqual(student.tokenizer.merges[:len(old)], old)
        self.assertEqual(student.tokenizer.encode("sea and tree", merge_limit=len(old)), sample)
        self.assertEqual(student.model.vocab_size, student.tokenizer.vocab_size)
        self.finish(student)

    def test_a_snapshot_taken_while_merges_are_learned_can_be_loaded(self):
        student = self.student("min_merge_chars=500", "max_merges=40", "min_pair_count=3")
        student.take_text(self.text(20), "")
        self.finish(student)
        student.config = dataclasses.replace(student.config, max_merges=80)
        append, taken = m.EvolvingTokenizer._append_merge, []

        def watched(tokenizer, pair):
            append(tokenizer, pair)
            student.dirty.add("base")  # as the folding of a delta does just before
            taken.append(student.snapshot())
        with mock.patch.object(m.EvolvingTokenizer, "_append_merge", watched):
            student.take_text(self.text(20) + [
                [500 + i, f"{t} lantern window\n", True, True]
                for i, (_, t, _, _) in enumerate(self.text(80, "lamp"))], "")
        self.assertGreater(len(taken), 20)
        for growth, layers in taken:
            tokenizer, model = m.build_model(student.config, layers, m.interpreted_engine())
            self.assertEqual(tokenizer.vocab_size, model.vocab_size)

    def test_the_best_weights_of_a_warm_up_are_the_ones_kept(self):
        student = self.student()
        student.take_text(self.text(30), "sea and tree and bird\n" * 5)
        self.finish(student, steps=8)
        self.assertEqual(student.growth.phase, "warmup")
        best = student.best
        student.growth.best_bpc, student.growth.bpc = 0.5, 4.0
        student.end_warmup()
        self.assertEqual(m.pack_params(list(student.model.params.values())).data, best.data)

    def test_new_text_in_a_warm_up_is_dealt_at_once_but_not_for_ever(self):
        student = self.student("warmup_steps=50", "micro_steps=3")
        student.take_text(self.text(30), "")
        job = m.Job(student, 20, None, time.monotonic)
        self.assertEqual(job.fresh_count(), 0)
        student.take_text(self.text(30) + [[99, "quartz\n", True, True]], "")
        self.assertGreater(job.fresh_count(), 0)
        for _ in range(3):
            job.advance()
        self.assertEqual(job.fresh_count(), 0)


class Life(Home):
    def test_it_warms_up_once_and_never_again_for_the_same_text(self):
        being = self.grown()
        self.assertEqual(being.growth.phase, "grown")
        step = being.growth.step
        being.sleep()
        again = self.grown()
        self.assertEqual((again.growth.phase, again.growth.step), ("grown", step))

    def test_a_line_added_to_the_corpus_is_being_trained_on_within_two_seconds(self):
        being = self.grown()
        events = len(being.memory.life())
        began = time.monotonic()
        self.append("\nThe quartz lamp stands in the window.\n")
        self.until(lambda: any(e["event"] == "learning" for e in being.memory.life()[events:]), 10)
        took = time.monotonic() - began
        self.until(lambda: not being.memory.entries("learned = 0 AND NOT held_out"))
        self.assertTrue(being.memory.entries("text LIKE '%quartz%' AND learned"))
        self.assertLess(took, 5.0)  # two seconds are promised for a machine that is not loaded

    def test_a_corpus_saved_by_rename_is_noticed_and_removed_lines_leave_the_memory(self):
        being = self.grown()
        other = self.folder / "other.txt"
        other.write_text(LINES.replace("A bird sits in the old tree.", "A cat lies on the wall."),
                         encoding="utf-8")
        os.replace(other, self.corpus)
        self.until(lambda: being.memory.entries("text LIKE '%cat lies%'"))
        self.assertFalse(being.memory.entries("text LIKE '%bird sits%'"))

    def test_a_corpus_that_vanishes_takes_nothing_with_it(self):
        being = self.grown()
        count = being.memory.entry_count()
        self.corpus.unlink()
        time.sleep(0.4)
        self.assertEqual(being.memory.entry_count(), count)
        self.assertFalse(self.corpus.exists())

    def test_a_memory_that_was_locked_for_a_while_is_learned_into_again(self):
        being = self.grown()
        locked = sqlite3.connect(being.memory.path, isolation_level=None)
        self.addCleanup(locked.close)
        being.memory._db.execute("PRAGMA busy_timeout = 50")
        locked.execute("BEGIN EXCLUSIVE")
        self.append("\nThe quartz lamp stands in the window.\n")
        self.until(lambda: any("locked" in notice for notice in being.notices))
        locked.execute("ROLLBACK")
        self.until(lambda: being.memory.entries("text LIKE '%quartz%' AND learned"))

    def test_the_corpus_file_is_never_written(self):
        before = (self.corpus.read_bytes(), self.corpus.stat().st_mtime_ns)
        being = self.grown()
        "".join(being.reply("My lamp is made of quartz, and it stands in the window."))
        being.wait_trained()
        self.assertEqual((self.corpus.read_bytes(), self.corpus.stat().st_mtime_ns), before)

    def test_what_is_said_adds_up_until_it_is_enough_and_is_never_dropped(self):
        being = self.grown("min_new_chars_to_train=60")
        step = being.growth.step
        "".join(being.reply("The lamp is old."))
        time.sleep(0.3)
        self.assertEqual(being.growth.step, step)
        self.assertEqual(being.memory.unlearned_chars()[1], len("The lamp is old.\n"))
        "".join(being.reply("It stands in the window beside the garden door."))
        self.until(lambda: being.memory.unlearned_chars()[1] == 0)
        self.assertGreater(being.growth.step, step)

    def test_one_who_talks_on_and_on_does_not_keep_it_from_learning(self):
        being = self.grown("micro_steps=40")
        self.append("\nThe quartz lamp stands in the window.\n")
        for number in range(200):
            "".join(being.reply(f"I like the number {number} and the letter after it."))
            if being.memory.entries("text LIKE '%quartz%' AND learned"):
                break
            time.sleep(0.1)
        self.assertLess(number, 199)

    def test_waiting_learns_what_is_there_however_little(self):
        being = self.grown("min_new_chars_to_train=10000")
        "".join(being.reply("The lamp is old."))
        being.wait_trained()
        self.assertEqual(being.memory.unlearned_chars(), (0, 0))

    def test_own_replies_are_not_trained_on_until_they_are_approved(self):
        being = self.grown()
        "".join(being.reply("What is the sea?"))
        self.assertFalse(being.memory.entries("source = 'approved'"))
        self.assertTrue(being.judge(True))
        texts = [e.text for e in being.memory.entries("source = 'approved'")]
        self.assertEqual(texts, ["H: What is the sea?\nA: The sea is wide and blue.\n"])

    def test_a_killed_trainer_is_started_again_and_loses_nothing_committed(self):
        being = self.organism("warmup_steps=2000", "warmup_epochs=1000.0", "commit_seconds=0.1")
        being.awake()
        self.until(lambda: being.growth.step > 2)
        step = being.growth.step
        os.kill(self.children()[0], signal.SIGKILL)
        self.until(lambda: any(e["event"] == "trainer died" for e in being.memory.life()))
        self.until(lambda: being.growth.step > step + 2)
        self.assertTrue(any("starts again" in notice for notice in being.notices))

    def children(self):
        """Return the process ids of trainers that this process started."""
        if shutil.which("ps") is None:
            self.skipTest("there is no ps to list child processes")
        found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())],
                               capture_output=True, text=True).stdout
        pids = [int(line.split()[0]) for line in found.splitlines() if "trainer" in line]
        if not pids:
            self.skipTest("ps does not list child processes here")
        return pids

    def test_only_one_of_two_organisms_trains_one_memory(self):
        one = self.grown()
        memory = m.Memory(self.config.db_path)
        self.addCleanup(memory.close)
        two = m.Organism(self.config, memory, m.interpreted_engine())
        two._owner = m.socket.gethostname() + ":1"
        self.addCleanup(two.sleep)
        self.assertFalse(memory.take_lease(two._owner, 10.0, lambda owner: True))
        one.sleep()
        self.assertTrue(memory.take_lease(two._owner, 10.0, lambda owner: True))

    def test_a_held_out_document_is_never_sent_to_the_trainer(self):
        being = self.organism()
        lines = "".join(f"The number {i} stands alone in its line.\n\n" for i in range(200))
        self.corpus.write_text(lines, encoding="utf-8")
        being.take_in_corpus()
        held = being.memory.entries("held_out")
        self.assertTrue(8 <= len(held) <= 35, len(held))
        sent = []
        being._send = lambda child, message, blobs: sent.append(message)
        being._instruct(None)
        trained = {text for _, text, *_ in sent[0]["documents"]}
        self.assertEqual(len(trained), 200 - len(held))
        self.assertFalse(trained & {e.text for e in held})
        self.append("\nOne more line.\n")
        being.take_in_corpus()
        self.assertEqual(len(being.memory.entries("held_out")), len(held))

    def test_a_loss_that_is_not_finite_is_told_and_changes_nothing(self):
        being = self.organism()
        being._on_trouble({}, step=3, loss="nan")
        self.assertIn("was skipped", being.notices[0])
        self.assertEqual(being.memory.life()[-1]["event"], "step skipped")


class Processes(Home):
    def run_macrogpt(self, *words, text="", kill_after=None):
        sets = [part for setting in TINY for part in ("--set", setting)]
        command = [sys.executable, str(ROOT / "macrogpt.py"), "--corpus", str(self.corpus), "--db",
                   self.config.db_path, *sets, *words]
        if kill_after is None:
            return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60,
                                  cwd=self.folder)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, cwd=self.folder)
        with process:
            self.until(kill_after)
            process.kill()
        return process

    def stats(self):
        return json.loads(self.run_macrogpt("--json", "stats").stdout)

    def stored_step(self):
        """Return the step that is committed, read from beside the program."""
        import sqlite3
        try:
            db = sqlite3.connect(f"file:{self.config.db_path}?mode=ro", uri=True)
            try:
                rows = db.execute("SELECT value FROM settings WHERE name = 'growth'").fetchall()
            finally:
                db.close()
        except sqlite3.Error:
            return 0
        return json.loads(rows[0][0])["step"] if rows else 0

    def test_killed_in_its_warm_up_it_goes_on_from_the_last_commit(self):
        long = ("--set", "warmup_steps=5000", "--set", "warmup_epochs=1000")
        self.run_macrogpt("train", *long, kill_after=lambda: self.stored_step() > 2)
        step = self.stored_step()
        facts = self.run_macrogpt("--json", "train", "--steps", "2", *long)
        self.assertEqual(facts.returncode, 0, facts.stderr)
        growth = json.loads(facts.stdout)
        self.assertGreaterEqual(growth["step"], step + 2)
        self.assertEqual(growth["steps_now"], growth["step"] - step)

    def test_train_with_steps_does_exactly_so_many(self):
        first = json.loads(self.run_macrogpt("--json", "train", "--steps", "3").stdout)
        second = json.loads(self.run_macrogpt("--json", "train", "--steps", "4").stdout)
        self.assertEqual((first["step"], second["step"]), (3, 7))

    def test_told_closed_opened_asked_it_answers(self):
        told = self.run_macrogpt("--no-train", text="My lamp is called Quartz.\n")
        self.assertEqual((told.returncode, told.stdout.count("\n")), (0, 1))
        asked = self.run_macrogpt("--no-train", text="What is my lamp called?\n")
        self.assertIn("Quartz", asked.stdout)

    def test_asked_for_what_was_never_told_it_says_so_however_well_it_speaks(self):
        self.run_macrogpt("train")
        grown = ("--set", "trust_bpc=100", "--no-train")
        self.run_macrogpt(*grown, text="My lamp is called Quartz.\n")
        asked = self.run_macrogpt(*grown, text="What is my boat called?\nWhat is my river?\n")
        self.assertEqual(asked.stdout, (m.UNKNOWN_REPLY + "\n") * 2)

    def test_another_shape_is_refused_with_the_way_out(self):
        self.run_macrogpt("train", "--steps", "1")
        refused = self.run_macrogpt("--set", "n_layer=3", "ask", "hello")
        self.assertEqual(refused.returncode, 2)
        self.assertIn("--db", refused.stderr)
        self.assertEqual(refused.stderr.count("\n"), 1)


if __name__ == "__main__":
    unittest.main()
