"""The organism: learning, its supervision, and what survives; with real trainer processes."""

import contextlib
import dataclasses
import io
import json
import math
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
import zlib
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import macrogpt as m  # noqa: E402
from support import engine_in_use, run_inside, start_macrogpt  # noqa: E402

TINY = ("n_embd=16", "n_head=2", "block_size=24", "warmup_steps=12", "eval_steps=4", "micro_steps=3",
        "batch_size=2", "delta_rank=4", "burst_passes=1", "mix_passes=1", "eval_chars=300",
        "min_merge_chars=1000000", "tick_seconds=0.05", "commit_seconds=0.3")
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
        return m.Student(config, growth or m.Growth(), layers or {}, engine_in_use())

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

    def test_a_burst_alone_is_pushed_away_from_what_was_rejected(self):
        student = self.student()
        student.take_text(self.text(30), "")
        student.take_rejected([["hello", "sea bird"], ["and " * 50, "tree " * 50]])
        self.assertEqual(student._unwanted(), [])
        self.finish(student)
        for _ in range(8):
            [(ids, first)] = student._unwanted()
            self.assertLessEqual(len(ids), student.config.block_size + 1)
            said = student.tokenizer.decode(ids[first:])
            self.assertTrue(said.startswith((" sea bird\n", " tree tree")), said)
        with mock.patch.object(m.GPT, "aversion", autospec=True,
                                        side_effect=m.GPT.aversion) as pushed:
            student.take_text(self.text(30, fresh=False) + [[99, "a quartz\n", True, True]], "")
            self.finish(student)
        self.assertGreater(pushed.call_count, 0)

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

    def test_an_enlarged_model_ends_its_warm_up_no_worse_than_it_began(self):
        student = self.student("learning_rate=0.3", "patience=1", "warmup_steps=12")
        held_out = "sea and tree and bird\n" * 3
        student.take_text(self.text(30), held_out)
        self.finish(student)
        growth, layers = student.snapshot()
        wanted = m.Shape.of(m.Config().replace([*TINY, "n_layer=3"]))
        _, grown = m.enlarged_layers(student.config, wanted, layers, engine_in_use())
        again = self.student("learning_rate=0.3", "patience=1", "warmup_steps=12", "n_layer=3",
                             growth=m.to_warm_up(growth), layers={**layers, **grown})
        again.take_text(self.text(30), held_out)
        self.assertEqual(again.growth.phase, "warmup")
        self.assertAlmostEqual(again.growth.best_bpc, student.growth.bpc, places=4)
        self.finish(again)
        self.assertLessEqual(again.growth.bpc, student.growth.bpc + 1e-4)
        self.assertFalse(again.growth.enlarged)

    def test_the_rate_of_a_warm_up_falls_when_the_held_out_loss_no_longer_does(self):
        student = self.student("patience=2", "eval_steps=4", "warmup_steps=900", "cooling=0.5",
                               "rate_warmup=0.0", "warmup_epochs=1000", "rate_epochs=1000000000")
        student.take_text(self.text(3), "sea and tree and bird\n" * 3)
        said = iter([3.0, 2.0, 2.5, 2.0] + [1.0] * 9)  # the best after 8 steps, told after 16
        student.evaluate = lambda: setattr(student.growth, "bpc", next(said)) or student.growth.bpc
        job, rates, done = m.Job(student, None, None, lambda: 0.0), [], False
        while not done:
            rates.append(job.rate())
            job.advance()
            done = job.finished()
        job.close()
        for rate in rates[:16]:
            self.assertAlmostEqual(rate, student.config.learning_rate, places=6)
        self.assertEqual((student.growth.cooling_step, len(rates)), (16, 16 + 4))
        self.assertTrue(all(a > b for a, b in zip(rates[16:], rates[17:])))
        self.assertEqual((student.growth.phase, student.growth.bpc), ("grown", 1.0))

    def test_a_number_of_steps_asked_for_is_done_whatever_the_held_out_loss_says(self):
        student = self.student("patience=1", "eval_steps=4", "warmup_steps=900",
                               "warmup_epochs=1000")
        student.take_text(self.text(30), "sea and tree and bird\n" * 3)
        student.growth.cooling_step, student.evaluate = 1, lambda: 9.0
        job = m.Job(student, 40, None, lambda: 0.0)
        rates = [job.rate()]
        job.advance()
        while not job.finished():
            rates.append(job.rate())
            job.advance()
        job.close()
        self.assertEqual((len(rates), student.growth.cooling_step), (40, 0))
        self.assertEqual(student.growth.phase, "warmup")

    def test_a_warm_up_goes_on_until_most_of_a_reading_has_brought_no_gain(self):
        student = self.student("patience=1", "eval_steps=1", "warmup_epochs=1000")
        student.take_text(self.text(300), "sea and tree and bird\n" * 3)
        said = iter([2.0] + [3.0] * 10_000)
        student.evaluate = lambda: next(said)
        job = m.Job(student, None, None, lambda: 0.0)
        while not student.growth.cooling_step:
            job.advance()
            job.finished()
        self.assertEqual(student.growth.cooling_step, 1 + math.ceil(
            student.steps_of(m.PATIENT_SHARE)))
        self.assertGreater(student.growth.cooling_step, 4)

    def test_the_rate_of_a_warm_up_falls_from_the_best_weights_seen(self):
        student = self.student("patience=1", "eval_steps=1000", "warmup_epochs=1000")
        student.take_text(self.text(30), "sea and tree and bird\n" * 3)
        best = student.model.params["embedding"].data[:]
        student.growth.warmup_step = 4
        student.note_warmup()
        student.step(0.5, 0)
        student.evaluate = lambda: 99.0
        student.note_warmup()
        self.assertEqual(student.growth.cooling_step, 4)
        self.assertEqual(student.model.params["embedding"].data, best)

    def test_a_delta_finds_its_moments_again_when_older_ones_were_folded(self):
        student = self.student("delta_seal_chars=1", "max_delta_modules=1")
        student.take_text(self.text(30), "")
        self.finish(student)
        for key in (77, 78):
            student.take_text([[key, "quartz and amber\n", True, True]], "")
            self.finish(student)
        growth, layers = student.snapshot()
        layers["base"] = m.pack_params(list(student.model.params.values()))
        again = self.student(growth=growth, layers=layers)
        for one, two in zip(student.model.delta_params(), again.model.delta_params()):
            self.assertEqual((one.name, one.m, one.steps), (two.name, two.m, two.steps))
            self.assertTrue(one.steps)

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
        self.assertEqual(student.tokenizer.merges, old)  # those in use stay in use
        ripening = student.sprout.tokenizer
        self.assertGreater(len(ripening.merges), len(old))
        self.assertEqual(ripening.merges[:len(old)], old)
        self.assertEqual(ripening.encode("sea and tree", merge_limit=len(old)), sample)
        self.assertEqual(student.model.vocab_size, student.tokenizer.vocab_size)
        self.finish(student)
        self.assertEqual(student.model.vocab_size, student.tokenizer.vocab_size)
        self.assertEqual(student.growth.native, student.tokenizer.version)

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
            tokenizer, model = m.build_model(student.config, layers, engine_in_use())
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


class TheVocabularyGrowsWithoutAJump(unittest.TestCase):
    """New merges are learned, ripen unheard, and come into use when no text is worse off."""

    GROWING = ("min_merge_chars=1", "max_merges=12", "growth_merges=6", "growth_chars=150",
               "growth_need=9.0", "held_out_chars=600", "delta_rank=2", "batch_size=4")
    SMALLER = ("n_layer=1", "n_embd=8", "block_size=16", "warmup_steps=6", "micro_steps=2",
               "batch_size=2", "mix=0")  # kernels in Python take twenty times as long

    def setUp(self):
        small = mock.patch.object(m, "INTERPRETED_MIX_CHARS", 600)
        small.start()
        self.addCleanup(small.stop)
        self.compiled = engine_in_use().name == "native"

    @staticmethod
    def sentences(word, count, first=0, fresh=True):
        """Return documents about a word that nothing else is about."""
        rng = random.Random(f"{word}{first}")
        parts = [word, word + "s", "the old", "a green", "tree", "bird", "and"]
        return [[zlib.crc32(f"{word}{first}.{i}".encode()), " ".join(rng.choices(parts, k=6)) + "\n", True,
                 fresh] for i in range(count)]

    def grown(self, *more, held="the old tree and a green bird\n" * 3):
        """Return a student after its warm-up, and what it knows."""
        smaller = () if self.compiled else self.SMALLER
        config = m.Config().replace([*TINY, *self.GROWING, *smaller, *more])
        student, known = m.Student(config, m.Growth(), {}, engine_in_use()), []
        self.learn(student, known, self.sentences("sea", 20), held)
        student.snapshot()
        return student, known

    def learn(self, student, known, new, held=""):
        """Give the student new documents beside those known, and let it learn them to the end."""
        student.take_text([[k, t, c, False] for k, t, c, _ in known] + new, held)
        known += new
        job = m.Job(student, None, None, time.monotonic)
        job.advance()
        while not job.finished():
            job.advance()
        return job.close()

    def bits(self, student, text):
        """Return the bits of a text in the vocabulary in use."""
        return sum(m.scored_nats(student.model, m.text_ids(student.tokenizer, text), 12))

    def sprouted(self, *more):
        """Return a student whose merges ripen and are far from ripe, and what it knows."""
        student, known = self.grown("growth_bound=0.0", *more)
        with mock.patch.object(m.Student, "_is_ripe", lambda *_: False):
            self.learn(student, known, self.sentences("quartz", 12))
        self.assertIsNotNone(student.sprout)
        return student, known

    def test_merges_that_ripen_change_nothing_that_is_said_or_stored_elsewhere(self):
        student, known = self.grown()
        merges, rows = student.tokenizer.merges, student.model.params["embedding"].data[:]
        with mock.patch.object(m.Student, "_is_ripe", lambda *_: False):
            self.learn(student, known, self.sentences("quartz", 12))
        ripening = student.sprout.tokenizer
        self.assertEqual(ripening.merges[:len(merges)], merges)
        self.assertIn(b" quartz", [ripening.token_bytes(i) for i in range(257, 257 + ripening.version)])
        self.assertEqual(student.tokenizer.merges, merges)
        self.assertEqual(student.model.params["embedding"].data, rows)
        growth, layers = student.snapshot()
        self.assertEqual(set(layers), {"delta0", "optimizer", "router", "sprout"})
        self.assertEqual((growth.merges, growth.ripening), (len(merges), 6))
        self.assertIn("sprout", student.layer_names())

    def test_rows_that_ripen_learn_from_shadow_copies_while_the_base_is_frozen(self):
        student, known = self.sprouted()
        base = {n: p.data[:] for n, p in student.model.params.items()}
        rows, delta = student.model.sprout.data[:], student.model.deltas[0]["0.qkv"].b.data[:]
        with mock.patch.object(m.Student, "_is_ripe", lambda *_: False):
            self.learn(student, known, self.sentences("quartz", 3, first=1))
        self.assertEqual({n: p.data for n, p in student.model.params.items()}, base)
        self.assertNotEqual(student.model.sprout.data, rows)
        self.assertNotEqual(student.model.deltas[0]["0.qkv"].b.data, delta)

    def test_what_ripens_survives_a_restart_to_the_bit(self):
        one, known = self.grown("growth_bound=0.0")
        with mock.patch.object(m.Student, "_is_ripe", lambda *_: False):
            self.learn(one, known, self.sentences("quartz", 12))
        layers = {name: None for name in one.layer_names()}
        one.dirty |= {"base", "sprout", "delta0"}
        growth, layers = one.snapshot()
        two = m.Student(one.config, growth, layers, engine_in_use())
        self.assertEqual(two.sprout.tokenizer.merges, one.sprout.tokenizer.merges)
        self.assertEqual(two.tokenizer.merges, one.tokenizer.merges)
        self.assertEqual(two.model.sprout.data, one.model.sprout.data)
        self.assertEqual(two.model.sprout.m, one.model.sprout.m)
        for student in (one, two):
            student.rng = random.Random(7)
            student.take_text([[k, t, c, False] for k, t, c, _ in known], "")
            student.begin_burst()
            for _ in range(4):
                student.step(0.003, 0)
        self.assertEqual(two.model.sprout.data, one.model.sprout.data)

    def test_merges_that_are_not_ripe_stay_out_of_use(self):
        student, known = self.sprouted("growth_bound=0.01")
        loud = student.engine.buffer_of([3.0] * len(student.model.sprout.data))
        student.model.sprout.load(loud)
        student.ripen()
        self.assertIsNotNone(student.sprout)
        self.assertGreater(student.growth.ripeness, 0.01)

    def test_merges_that_were_tried_in_vain_too_often_wither(self):
        student, known = self.sprouted()
        merges = student.tokenizer.merges
        with mock.patch.object(m.Student, "_is_ripe", lambda *_: False):
            for i in range(m.WITHERING - 1):
                self.assertIsNotNone(student.sprout)
                self.learn(student, known, self.sentences("quartz", 1, first=i + 1))
        self.assertEqual((student.sprout, student.model.sprout), (None, None))
        self.assertEqual((student.tokenizer.merges, student.growth.ripening), (merges, 0))
        self.assertNotIn("sprout", student.layer_names())
        self.assertIn("merges withered", [note["kind"] for note in student.notes])
        self.learn(student, known, self.sentences("quartz", 12, first=9))

    def test_ripe_merges_become_the_tokenizer_and_their_rows_the_embeddings(self):
        student, known = self.sprouted("growth_bound=1.0", "delta_seal_chars=1")
        tokenizer, rows = student.sprout.tokenizer, student.model.sprout.data[:]
        ids = tokenizer.encode("quartz and the old sea quartzs\n")
        with student.model.sprouted():
            expected = student.model.logits(ids).data
        self.learn(student, known, self.sentences("quartz", 3, first=1))  # delta0 is sealed
        self.assertIsNone(student.sprout)
        self.assertEqual(student.tokenizer.merges, tokenizer.merges)
        self.assertEqual(student._ids[known[-1][0]],
                         m.document_ids(tokenizer, known[-1][1]))
        growth, layers = student.snapshot()
        self.assertNotIn("sprout", student.layer_names())
        self.assertEqual((growth.merges, growth.ripening), (tokenizer.version, 0))
        self.assertEqual(len(expected) // len(ids), student.model.vocab_size)

    def test_layers_sealed_before_a_growth_are_read_after_it(self):
        student, known = self.grown("growth_bound=1.0", "delta_seal_chars=1")
        stored = {}
        for word in ("quartz", "amber", "copper"):
            with contextlib.ExitStack() as unripe:
                if word != "copper":
                    unripe.enter_context(mock.patch.object(m.Student, "_is_ripe", lambda *_: False))
                self.learn(student, known, self.sentences(word, 12))
            growth, layers = student.snapshot()
            stored.update({n: l for n, l in layers.items() if not stored.get(n, l).sealed
                           or n not in stored})
        self.assertGreater(student.tokenizer.version, 12)
        self.assertLess(stored["delta0"].manifest[1][1], student.tokenizer.vocab_size)
        kept = {n: l for n, l in stored.items() if n in student.layer_names()}
        tokenizer, model = m.build_model(student.config, kept, engine_in_use())
        self.assertEqual(tokenizer.merges, student.tokenizer.merges)
        ids = tokenizer.encode("quartz and amber and copper and the sea\n")
        found, expected = model.logits(ids).data, student.model.logits(ids).data
        self.assertLess(max(abs(a - b) for a, b in zip(found, expected)), 1e-5)

    def test_text_that_is_compressed_as_well_as_all_other_grows_nothing(self):
        student, known = self.grown("growth_need=0.5")
        self.learn(student, known, self.sentences("sea", 12, first=1))
        self.assertIsNone(student.sprout)
        self.assertEqual(student.growth.unmerged_chars, 0)

    def test_little_new_text_adds_up_until_it_is_enough_to_learn_merges_from(self):
        student, known = self.grown()
        for i in range(9):
            self.assertIsNone(student.sprout)
            self.learn(student, known, self.sentences("quartz", 1, first=i))
            if student.growth.ripening or student.tokenizer.version > 12:
                break
        self.assertTrue(2 <= i < 9, i)

    def test_each_of_ten_growths_in_a_row_leaves_every_text_within_one_percent(self):
        student, known = self.grown()
        words = ["quartz", "amber", "copper", "marble", "linen", "velvet", "saffron", "pepper",
                 "walnut", "juniper", "thistle", "bramble", "heather", "lichen"]
        texts = {word: "".join(t for _, t, _, _ in self.sentences(word, 4, first=99))
                 for word in ["sea", *words]}
        grew, adopt, growths = [], m.Student._adopt, 10 if self.compiled else 2

        def watched(student, sprout):
            old, version = student.tokenizer, student.tokenizer.version
            read = [word for word in texts if any(word in t for _, t, _, _ in known)]
            before = [self.bits(student, texts[word]) for word in read]
            adopt(student, sprout)
            after = [self.bits(student, texts[word]) for word in read]
            grew.append(max(b / a for a, b in zip(before, after)))
            for text in texts.values():
                self.assertEqual(student.tokenizer.encode(text, version), old.encode(text))
                self.assertEqual(student.tokenizer.decode(student.tokenizer.encode(text)), text)
        with mock.patch.object(m.Student, "_adopt", watched):
            for word in words * 3:
                self.learn(student, known, self.sentences(word, 8, first=len(known)))
                if len(grew) == growths:
                    break
        self.assertEqual(len(grew), growths)
        self.assertLessEqual(max(grew), 1.01)


class AGrownVocabularyReachesTheVoice(Home):
    def commit(self, being, student):
        """Let the organism commit what the student has, as if its trainer had sent it."""
        growth, layers = student.snapshot()
        being._on_snapshot({n: layer.data for n, layer in layers.items()},
                           growth=dataclasses.asdict(growth), learned=[],
                           names=student.layer_names(),
                           layers={n: [layer.manifest, layer.sealed]
                                   for n, layer in layers.items()})

    def being(self):
        """Return an organism and a student, grown up, with merges that ripen."""
        sizes = ("n_layer=1", "min_merge_chars=1", "min_pair_count=2", "max_merges=5",
                 "growth_merges=5", "growth_bound=1.0", "trust_bpc=100.0", "warmup_steps=4")
        being = self.organism(*sizes)
        being.take_in_corpus()
        documents = [[e.key, e.text, e.closed, True] for e in being.memory.entries()]
        student = m.Student(being.config, m.Growth(), {}, engine_in_use())
        student.take_text(documents, "")
        student.growth.phase, student.growth.bpc = "grown", 3.0
        student.growth.native = student.tokenizer.version
        student.model.freeze()
        student._sprout(documents, 100)
        self.commit(being, student)
        return being, student

    def test_model_tokenizer_and_counts_change_in_one_moment_and_no_reply_waits_for_it(self):
        being, student = self.being()
        old, model = being.voice()
        counts = being.counts()
        self.assertEqual(being.memory.life()[-1]["event"], "merges sprout")
        being._thread = mock.Mock()
        being._thread.is_alive.return_value = True
        self.addCleanup(setattr, being, "_thread", None)
        student.ripen()
        student.growth.bpc = 3.0
        self.commit(being, student)
        self.assertEqual(being.memory.life()[-1]["event"], "vocabulary grew")
        self.assertIs(being.voice()[1], model)
        self.assertIs(being.counts(), counts)
        self.assertTrue("".join(being.reply("Hm, well then.")))
        self.assertIs(being.voice()[1], model)
        being._count_ahead()
        self.assertEqual(being.voice()[0].version, old.version + 5)
        anew = m.EntryCounts().follow(being.memory, being.voice()[0], being.config)
        self.assertEqual(being.counts().tables, anew.tables)
        self.assertEqual(being.voice()[1].vocab_size, being.voice()[0].vocab_size)

    def costs(self, being, text):
        """Return the nats of a text in the best of tongues, by the model and by the whole voice."""
        found = []
        for way in being.tongues():
            ids = m.text_ids(way.tokenizer, text)
            mixture = m.Mixture(being.engine, way.counts, being.mixer())
            found.append((sum(m.scored_nats(way.model, ids, 12)),
                          m.voice_nats(way.model, ids, mixture)))
        return [min(nats) for nats in zip(*found)]

    def test_no_text_at_all_costs_more_after_growths_however_bad_their_rows(self):
        being, student = self.being()
        texts = ["H: What is the sea?\nA: The sea is wide.\n", "\t\tzq == {1: 'ü'}  # 你好\n",
                 "".join(random.Random(1).choices("etaoin shrdlu\n", k=90))]
        versions, costs = [student.growth.native], [self.costs(being, text) for text in texts]
        for numbers in ((0.0,), (3.0,), (3.0,)):
            if student.sprout is None:
                student._sprout(student._documents, 100)
            size = len(student.model.sprout.data)
            student.model.sprout.load(student.engine.buffer_of(list(numbers) * size))
            student._adopt(student.sprout)
            self.commit(being, student)
            versions.append(student.tokenizer.version)
            found = [way.tokenizer.version for way in being.tongues()]
            self.assertEqual(sorted(found), versions)
            before, costs = costs, [self.costs(being, text) for text in texts]
            for text, old, new in zip(texts, before, costs):
                for a, b in zip(old, new):
                    self.assertLessEqual(b, a * 1.0001)
        self.assertEqual(being.tongue_for(texts[0]).tokenizer.version, student.growth.native)

    def test_replies_do_not_wait_for_the_counts_of_the_native_tongue(self):
        being, student = self.being()
        student._adopt(student.sprout)
        self.commit(being, student)
        self.assertEqual(being.tongue_for("the sea").tokenizer.version, student.tokenizer.version)
        self.assertEqual(len(list(being._first_tongues(patient=False))), 1)
        being._count_ahead()
        self.assertEqual(len(list(being._first_tongues(patient=False))), 2)

    def test_where_nothing_counts_in_the_background_it_counts_when_it_is_asked(self):
        being, student = self.being()
        old, _ = being.voice()
        student._adopt(student.sprout)
        self.commit(being, student)
        self.assertEqual(being.voice()[0].version, old.version + 5)
        anew = m.EntryCounts().follow(being.memory, being.voice()[0], being.config)
        self.assertEqual(being.counts().tables, anew.tables)


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

    def test_while_it_speaks_the_trainer_rests_and_then_goes_on(self):
        being = self.organism("warmup_steps=100000", "warmup_epochs=100000.0", "patience=100000",
                              "commit_seconds=0.1")
        being.awake()
        self.until(lambda: being.growth.step > 2)
        pieces = being.reply("What is the sea?")
        next(pieces)
        before = -1
        while before != being.growth.step:  # what was on its way arrives
            before = being.growth.step
            time.sleep(0.4)
        "".join(pieces)
        self.until(lambda: being.growth.step > before + 2)
        self.assertFalse(any(e["event"] == "trainer died" for e in being.memory.life()))

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


class Enlarging(Home):
    IDS = [1, 70, 80, 90, 100, 110]

    def enlarge(self, being, *settings):
        being.grow(m.Shape.of(self.configured(*settings)))

    def test_an_organism_that_grew_says_the_same_and_stays_large(self):
        being = self.grown("delta_seal_chars=10")
        for line in ("The quartz lamp is old.", "The ferry leaves at seven."):
            being.teach(line)
            being.wait_trained()
        being.sleep()
        before = being.voice()[1].logits(self.IDS).data
        self.enlarge(being, "n_embd=24", "n_head=3")
        self.enlarge(being, "n_layer=3", "n_embd=24", "n_head=3", "block_size=32",
                     f"norm_eps={being.config.norm_eps!r}")
        after = being.voice()[1].logits(self.IDS).data
        self.assertLess(max(abs(a - b) for a, b in zip(before, after)), 1e-4)
        self.assertEqual(len(being.voice()[1].deltas), 2)
        self.assertTrue(being.memory.layers()["delta0"].sealed)
        self.assertIn("n_layer 2 → 3", being.notices[-1])
        config = m.stored_config(being.memory, [])
        self.assertEqual((config.n_layer, config.n_embd, config.block_size), (3, 24, 32))
        self.assertIn("grew", [event["event"] for event in being.memory.life()])

    def test_it_learns_with_what_is_new_and_then_is_at_rest(self):
        being = self.grown()
        being.sleep()
        self.enlarge(being, "n_layer=3")
        step, new = being.growth.step, being.voice()[1].params["2.down"]
        self.assertFalse(any(new.data))
        being.awake()
        being.wait_trained()
        self.assertEqual((being.growth.phase, being.growth.enlarged), ("grown", False))
        self.assertGreater(being.growth.step, step)
        self.assertTrue(any(being.voice()[1].params["2.down"].data))

    def test_in_its_warm_up_it_grows_as_well_and_goes_on(self):
        being = self.organism("warmup_steps=500", "warmup_epochs=1000.0")
        being.learn_now(steps=6)
        being.awake()
        being.wait_order()
        being.sleep()
        self.assertEqual(being.growth.phase, "warmup")
        before = being.voice()[1].logits(self.IDS).data
        self.enlarge(being, "n_embd=32")
        self.assertLess(max(abs(a - b) for a, b in zip(
            before, being.voice()[1].logits(self.IDS).data)), 1e-4)
        being.learn_now(steps=3)
        being.awake()
        being.wait_order()
        self.assertFalse(being.failed)
        self.assertEqual(being.growth.phase, "warmup")

    def test_while_another_trains_it_does_not_grow(self):
        being = self.grown()
        being.sleep()
        being.memory.take_lease("elsewhere:1", 60.0, lambda owner: True)
        with self.assertRaisesRegex(m.TrainerError, "leave that one first"):
            self.enlarge(being, "n_layer=3")
        self.assertEqual(m.Shape.of(being.config).n_layer, 2)

    def test_another_process_notices_that_it_grew(self):
        being = self.grown()
        being.sleep()
        memory = m.Memory(self.config.db_path)
        self.addCleanup(memory.close)
        other = m.Organism(self.config, memory, m.interpreted_engine())
        other.voice()
        self.enlarge(being, "n_layer=3")
        "".join(other.reply("Hello there."))
        self.assertEqual(len(other.voice()[1].params), 4 * 3 + 2)

    def test_a_text_that_outgrew_its_model_is_told_and_auto_grow_acts_on_it(self):
        small = ("n_layer=1", "n_embd=8", "n_head=1")
        being = self.organism("auto_grow=0", *small)
        rng = random.Random(1)
        lines = ["".join(rng.choices("abcdefgh ", k=60)) for _ in range(100)]
        self.corpus.write_text("\n\n".join(lines), encoding="utf-8")
        being.awake()
        being.wait_trained()
        told = [e for e in being.memory.life() if e["event"] == "outgrown"]
        self.assertEqual(len(told), 1, being.growth)
        self.assertEqual(told[0]["proposed"], {"n_embd": [8, 16], "n_head": [1, 2], "n_ff": [24, 48]})
        self.assertEqual(m.Shape.of(being.config).n_embd, 8)
        being.sleep()
        again = self.organism("auto_grow=1", *small)
        again.awake()
        self.until(lambda: again.memory.setting("shape")["n_embd"] > 16)  # and once more

    def test_a_text_that_fits_its_model_is_not_called_too_much(self):
        grown = m.Growth(phase="grown", bpc=2.5, train_bpc=2.4, warmup_chars=100_000)
        self.assertTrue(m.has_outgrown(grown, 100_000))
        self.assertFalse(m.has_outgrown(grown, 130_000))
        self.assertFalse(m.has_outgrown(dataclasses.replace(grown, train_bpc=2.0), 90_000))


class Unlearning(Home):
    """What is forgotten leaves the weights that were trained on it."""

    SECRET = "Quartz wolves hum zigzag jokes."
    EAGER = ("held_out_share=0.0", "unlearn_seconds=0.0", "delta_seal_chars=20", "delta_rank=4")
    STRONG = ("n_layer=1", "n_embd=8", "n_head=1", "dropout=0.0", "micro_steps=20",
              "delta_rate=0.03", "learning_rate=0.03", "warmup_steps=100", "patience=1000",
              "rate_epochs=1000000", "cooling=10")

    def being(self, *more):
        being = self.organism(*self.EAGER, *more)
        being.awake()
        being.wait_trained()
        return being

    def nats(self, being):
        """Return the loss of the secret by whichever layer knows it best."""
        tokenizer, model = being.voice()
        ids = [m.END_OF_TEXT] + tokenizer.encode(self.SECRET)
        return min(sum(m.scored_nats(model.with_delta(place), ids, 24))
                   for place in (None, *range(len(model.deltas))))

    def events(self, being):
        return [e["event"] for e in being.memory.life() if "learn" in e["event"]]

    def taught(self, being, *lines):
        for line in lines:
            being.teach(line)
            being.wait_trained()

    def test_a_delta_that_read_what_is_forgotten_is_rebuilt_and_those_before_it_stay(self):
        being = self.being(*self.STRONG)
        self.taught(being, "The ferry leaves at seven.")
        before = self.nats(being)
        self.taught(being, self.SECRET)
        learned = self.nats(being)
        self.assertLess(learned, 0.75 * before)
        self.taught(being, "Copper turns green in rain.")
        kept = being.memory.layers()
        self.assertEqual(m.delta_names(kept), ["delta0", "delta1", "delta2"])
        m.forget(being.memory, self.SECRET)
        self.until(lambda: "unlearned" in self.events(being))
        layers = being.memory.layers()
        self.assertEqual(m.delta_names(layers), ["delta0", "delta4"])
        self.assertEqual((layers["base"], layers["delta0"]), (kept["base"], kept["delta0"]))
        # what another sentence taught of all sentences stays
        self.assertGreater(self.nats(being), (learned + before) / 2.0)
        self.assertFalse(being.memory.entries("NOT learned"))
        self.assertEqual(self.events(being)[-4:], ["unlearning", "learning", "learned", "unlearned"])

    def test_a_line_taken_out_of_the_corpus_is_unlearned_by_a_new_base_while_the_old_speaks(self):
        never = self.being(*self.STRONG, f"db_path={self.folder / 'twin.sqlite3'}")
        twin = self.nats(never)
        never.sleep()
        self.append("\n" + self.SECRET + "\n")
        being = self.being(*self.STRONG)
        learned, spoken = self.nats(being), []
        self.assertLess(learned, 0.75 * twin)
        on_snapshot = being._on_snapshot

        def watched(blobs, growth, **rest):
            on_snapshot(blobs, growth, **rest)
            spoken.append((growth["phase"], self.nats(being)))
        being._on_snapshot = watched
        self.corpus.write_text(LINES, encoding="utf-8")
        being.take_in_corpus()
        being.wait_trained()
        self.assertTrue(all(nats == learned for phase, nats in spoken if phase == "warmup"))
        self.assertAlmostEqual(self.nats(being), twin, delta=0.15 * twin)
        self.assertEqual(being.growth.phase, "grown")
        self.assertFalse([n for n in being.memory.manifests() if n.startswith(m.OLD)])
        self.assertEqual(self.events(being)[-4:], ["unlearning", "learning", "learned", "unlearned"])

    def test_killed_while_it_unlearns_it_goes_on_where_it_was(self):
        being = self.being()
        self.taught(being, self.SECRET)
        being.sleep()
        before = self.nats(being)
        self.corpus.write_text(LINES.replace("The garden is green in spring.\n", ""))
        then = self.organism(*self.EAGER)
        then.take_in_corpus()
        then._unlearn(0)
        self.assertIn("old.base", then.memory.manifests())
        again = self.organism(*self.EAGER)
        self.assertEqual(again.growth.phase, "newborn")
        self.assertEqual(self.nats(again), before)
        with self.assertRaisesRegex(m.TrainerError, "being rebuilt"):
            again.grow(m.Shape.of(self.configured("n_layer=3")))
        again.awake()
        again.wait_trained()
        self.assertEqual(again.growth.phase, "grown")
        self.assertNotIn("old.base", again.memory.manifests())
        self.assertEqual(self.events(again)[-1], "unlearned")

    def test_corrected_lines_are_collected_and_moved_ones_are_not_lost(self):
        being = self.being("unlearn_corrected_chars=50")

        def edit(*changes):
            text = self.corpus.read_text(encoding="utf-8")
            for old, new in changes:
                self.assertIn(old, text)
                text = text.replace(old, new)
            self.corpus.write_text(text, encoding="utf-8")
            being.take_in_corpus()
            being.wait_trained()
            return being.memory.to_unlearn()
        self.assertEqual(edit(("spring.\n", "spring.\n\n")), [])  # one document became two
        self.assertEqual(edit(("is green in spring", "was green in spring")), [(0, 30, True)])
        self.assertEqual(edit(("was green in spring", "is green in spring")), [(2, 31, True)])
        self.assertNotIn("unlearning", self.events(being))
        edit(("A bird sits in", "A bird sat in"))
        self.assertEqual(being.memory.to_unlearn(), [])
        self.assertEqual(self.events(being)[-1], "unlearned")

    def test_what_is_told_again_in_time_is_not_unlearned(self):
        being = self.being("unlearn_seconds=1000")
        self.taught(being, self.SECRET)
        m.forget(being.memory, self.SECRET)
        self.assertEqual(len(being.memory.to_unlearn()), 1)
        being.teach(self.SECRET)
        self.assertEqual(being.memory.to_unlearn(), [])
        m.forget(being.memory, self.SECRET)
        self.assertEqual(being.memory.to_unlearn(), [(1, len(self.SECRET) + 1, False)])

    def test_what_a_sample_left_out_is_not_lost(self):
        lines = [f"The number {i} stands alone." for i in range(60)]
        self.corpus.write_text("\n\n".join(lines), encoding="utf-8")
        being = self.organism("max_corpus_lines=20", "held_out_share=0.0")
        being.take_in_corpus()
        being.memory.mark_trained(0)
        del lines[57]
        self.corpus.write_text("\n\n".join([*lines, *(f"New is {i}." for i in range(9))]))
        being.take_in_corpus()
        self.assertEqual(being.memory.to_unlearn(), [(0, len("The number 57 stands alone."), False)])

    def test_when_nothing_is_left_to_learn_nothing_of_the_old_is_left(self):
        being = self.being()
        self.corpus.write_text("\n", encoding="utf-8")
        being.take_in_corpus()
        being.wait_trained()
        self.assertEqual(set(being.memory.manifests()) - {"tokenizer"}, set())
        self.assertEqual(being.growth.phase, "newborn")


class Processes(Home):
    """The program as its owner runs it; what is killed is a process of its own."""

    def words(self, *words):
        sets = [part for setting in TINY for part in ("--set", setting)]
        return ("--corpus", str(self.corpus), "--db", self.config.db_path, *sets, *words)

    def run_macrogpt(self, *words, text=""):
        return run_inside(*self.words(*words), stdin=text.encode(), cwd=self.folder)

    def kill_macrogpt(self, *words, when):
        """Start the program, and kill it once a condition holds."""
        with start_macrogpt(*self.words(*words), cwd=self.folder) as process:
            try:
                self.until(when)
            finally:
                process.kill()

    def stats(self):
        return json.loads(self.run_macrogpt("--json", "stats").stdout)

    def stored_step(self):
        """Return the step that is committed, read from beside the program."""
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
        self.kill_macrogpt("train", *long, when=lambda: self.stored_step() > 2)
        step = self.stored_step()
        facts = self.run_macrogpt("--json", "train", "--steps", "2", *long)
        self.assertEqual(facts.returncode, 0, facts.stderr)
        growth = json.loads(facts.stdout)
        self.assertGreaterEqual(growth["step"], step + 2)
        self.assertEqual(growth["steps_now"], growth["step"] - step)

    def stored_layers(self):
        """Return the names of the layers that are committed, read from beside the program."""
        try:
            db = sqlite3.connect(f"file:{self.config.db_path}?mode=ro", uri=True)
            try:
                return {name for name, in db.execute("SELECT name FROM layers")}
            finally:
                db.close()
        except sqlite3.Error:
            return set()

    def test_killed_while_merges_ripen_it_goes_on_with_them_and_brings_them_into_use(self):
        growing = [word for setting in (
            "n_layer=1", "min_merge_chars=1", "max_merges=5", "growth_merges=5", "growth_chars=60",
            "growth_need=9.0", "growth_bound=1.0", "warmup_steps=4")
            for word in ("--set", setting)]
        self.run_macrogpt("train", *growing)
        self.assertEqual(self.stats()["merges"], 5)
        self.append("\n" + "The quartz lamp of quartz stands beside the quartz window.\n" * 3)
        self.kill_macrogpt("train", "--seconds", "60", *growing, "--set", "commit_seconds=0.1",
                           when=lambda: "sprout" in self.stored_layers())
        facts = self.stats()
        self.assertEqual((facts["merges"], facts["ripening"]), (5, 5))
        self.assertEqual(self.run_macrogpt("doctor").returncode, 0)
        done = self.run_macrogpt("train", *growing)
        self.assertEqual(done.returncode, 0, done.stderr)
        facts = self.stats()
        self.assertEqual((facts["merges"], facts["ripening"]), (10, 0))
        self.assertEqual(facts["vocabulary"], 257 + 10)
        self.assertIn("vocabulary grew", [e["event"] for e in facts["life"]])
        self.assertNotIn("sprout", self.stored_layers())

    def test_train_with_steps_does_exactly_so_many(self):
        first = json.loads(self.run_macrogpt("--json", "train", "--steps", "3").stdout)
        second = json.loads(self.run_macrogpt("--json", "train", "--steps", "4").stdout)
        self.assertEqual((first["step"], second["step"]), (3, 7))

    def test_asked_for_what_was_never_told_it_says_so_however_well_it_speaks(self):
        self.run_macrogpt("train")
        grown = ("--set", "trust_bpc=100", "--no-train")
        self.run_macrogpt(*grown, text="My lamp is called Quartz.\n")
        asked = self.run_macrogpt(*grown, text="What is my boat called?\nWhat is my river?\n")
        said = asked.stdout.decode().splitlines()  # in other words the second time
        self.assertEqual((len(said), len({*said} & {*m.UNKNOWN_REPLIES})), (2, 2))

    def test_a_smaller_shape_is_refused_with_the_way_out(self):
        self.run_macrogpt("train", "--steps", "1")
        refused = self.run_macrogpt("--set", "n_layer=1", "ask", "hello")
        self.assertEqual(refused.returncode, 2)
        self.assertIn(b"--db", refused.stderr)
        self.assertEqual(refused.stderr.count(b"\n"), 1)


class SameLife(Home):
    """A life is given by its seed, its edits and its conversation, in their order."""

    SETS = [part for setting in (
        *TINY, "threads=1", "n_layer=1", "delta_rank=2", "max_merges=20", "burst_passes=6",
        "mix_passes=2", "min_new_chars_to_train=1", "min_merge_chars=300", "delta_seal_chars=60",
        "max_delta_modules=2", "commit_seconds=0.1", "held_out_share=0.3", "warmup_epochs=0.1")
        for part in ("--set", setting)]
    SAID = ("My lamp is made of quartz.", "/teach The ferry leaves at seven.",
            "I live beside the old mill.", "The heron sleeps on one leg.")

    def life(self, name, parts, hash_seed):
        """Live a life, started anew for each part of the talk; return its layers."""
        folder = self.folder / name
        folder.mkdir()
        corpus = folder / "corpus.txt"
        corpus.write_text(LINES, encoding="utf-8")
        for part in parts:
            words = ("--corpus", str(corpus), "--db", str(folder / "m.sqlite3"), "--wait-trained")
            with start_macrogpt(*words, *self.SETS, cwd=folder, stderr=subprocess.DEVNULL, text=True,
                                env={"PYTHONHASHSEED": hash_seed}) as chat:
                for words in part:
                    if words.startswith("edit "):
                        after = corpus.read_text(encoding="utf-8") + "\n" + words[5:] + "\n"
                        (folder / "new.txt").write_text(after, encoding="utf-8")
                        os.replace(folder / "new.txt", corpus)
                        continue
                    chat.stdin.write(words + "\n")
                    chat.stdin.flush()
                    self.assertTrue(chat.stdout.readline())
                chat.stdin.close()
                self.assertEqual(chat.wait(), 0)
        memory = m.Memory(str(folder / "m.sqlite3"))
        self.addCleanup(memory.close)
        return memory.layers()

    def test_a_life_lived_twice_gives_the_same_bits_with_a_restart_in_between_or_without(self):
        many = " ".join(f"On day {day} the kite flies above the quay." for day in range(30))
        said = [*self.SAID[:3], "edit The rain is warm.", self.SAID[3],
                "/forget The ferry leaves at seven.", "edit " + many, "Thank you."]
        whole = self.life("whole", [said], "1")
        parts = self.life("parts", [said[:3], said[3:]], "2")
        self.assertEqual(len(m.delta_names(whole)), 1)  # those before were warmed up over
        self.assertIn("mixer", whole)
        self.assertIn("sprout", whole)  # merges of what came later ripen
        self.assertEqual(sorted(whole), sorted(parts))
        for name, layer in whole.items():
            self.assertEqual(layer, parts[name], name)


if __name__ == "__main__":
    unittest.main()
