"""A learner, its births and voice, what it stores, and the child process that drives it."""
import dataclasses
import io
import math
import os
import queue
import random
import unittest
from unittest import mock

import macrogpt as m
from support import engine_in_use

SMALL = ("n_layer=1", "n_embd=8", "n_head=1", "block_size=24", "warmup_steps=6", "micro_steps=4",
         "eval_steps=3", "eval_chars=300", "batch_size=2", "delta_rank=2", "mix_passes=1",
         "min_merge_chars=1000000", "burst_passes=1", "dropout=0.0")
KINDS = {"sea": "the gull and the wave and the salt wind blow over the pier ",
         "sums": "17 + 25 = 42; 9 * 8 = 72; 100 - 58 = 42; ",
         "shout": "WHO GOES THERE? STAND AND UNFOLD YOURSELF! "}


def text_of(kind, count=10, seed=0):
    """Return lines of one kind, in an order of their own."""
    words = KINDS[kind].split(" ")
    rng = random.Random(f"{kind} {seed}")
    return "".join(" ".join(rng.choices(words, k=9)) + "\n" for _ in range(count))


def row(number, text, unread=True, probe=""):
    """Return one text as the parent sends it: its id and its key are one number."""
    return [number, number, text, True, unread, "corpus", probe]


def rows(kind, count, first=1, **options):
    return [row(i, text_of(kind, 2, i), **options) for i in range(first, first + count)]


PROBE = row(900, text_of("sea", 6, 99), unread=False, probe="0")


class Pupils:
    """A test-case mixin: learners, without a parent and a process."""

    def learner(self, *more, growth=None, layers=None):
        """Return a learner, newborn unless told; it must be given text."""
        config = m.Config().replace([*SMALL, *more])
        return m.Learner(config, growth or m.Growth(), layers or {}, engine_in_use())

    @staticmethod
    def job(learner, steps=None):
        return m.Job(learner, steps, None, lambda: 0.0)

    @staticmethod
    def to_end(job):
        while not job.finished():
            job.advance()

    def work(self, learner, told=(), steps=None):
        """Work as the child does until what is new is learned or given up: (job, keys read)."""
        learner.take_text((), told)
        job = self.job(learner, steps)
        for _ in range(2000):
            job.advance()
            if job.finished() and (job.harm() is None or job.given_up):
                return job, job.close()
        raise AssertionError("the job did not end")

    def grown(self, *more, told=()):
        learner = self.learner(*more)
        self.work(learner, [*rows("sea", 9), PROBE])
        learner.take_text((), told)
        return learner

    @staticmethod
    def base(learner):
        return m.pack_params(list(learner.model.params.values())).data

    @staticmethod
    def numbers(learner, number=1):
        """Return a copy of all that one delta knows."""
        return m.pack_params(m.delta_matrices(learner.model.deltas[number - 1])).data

    @staticmethod
    def has_effect(learner):
        """Return whether any delta changes what the base says."""
        return any(any(p.data) for p in learner.model.delta_params() if p.name.endswith(".b"))


class Stored(Pupils, unittest.TestCase):
    def test_a_snapshot_holds_what_changed_since_the_last_and_no_more(self):
        learner = self.grown()
        layers = learner.snapshot()[1]
        self.assertEqual(set(layers), {"tokenizer", "base", "mixer", "optimizer", "router"})
        with self.assertRaisesRegex(m.StoreError, "another --db"):
            self.learner("n_embd=16", layers=layers)
        self.work(learner, rows("sums", 2, first=50))
        for changed in ({"delta1", "optimizer", "router"}, {"optimizer"}):
            self.assertEqual(set(learner.snapshot()[1]), changed)

    def test_a_learner_made_from_a_snapshot_goes_on_to_the_same_bits(self):
        self.assertEqual(m.Growth.of({"step": 7, "of a later version": 3}), m.Growth(step=7))
        for grown in (False, True):
            one = self.grown("dropout=0.1") if grown else self.learner("dropout=0.1")
            kept = one.snapshot()[1]
            one.take_text((), [*rows("sea", 9, unread=not grown), PROBE, *rows("sums", 2, 50)])
            for first in (60, 70):
                if grown:
                    self.work(one, rows("sums", 2, first))
                else:
                    one.step(0.005, 0)
            growth, layers = one.snapshot()
            two = self.learner("dropout=0.1", growth=growth, layers={**kept, **layers})
            one.take_text((), rows("shout", 2, first=90))
            two.take_text((), map(list, one.texts.values()))
            for learner in (one, two):
                self.work(learner, steps=3)
            self.assertEqual(self.base(two), self.base(one))
            self.assertEqual((two.growth.step, two.growth.bpc), (one.growth.step, one.growth.bpc))
            self.assertEqual(two.router.counts, one.router.counts)
            if grown:
                self.assertEqual(self.numbers(two), self.numbers(one))


class Births(Pupils, unittest.TestCase):
    LONG = ("warmup_steps=100000", "warmup_epochs=100000", "patience=1", "eval_steps=1")

    def test_a_birth_lowers_the_loss_reads_all_that_is_not_held_out_and_freezes_the_base(self):
        learner = self.learner("warmup_steps=30")
        learner.take_text((), [*rows("sea", 9), row(900, "~~~~~~\n" * 9, False, "0")])
        stream = learner.tokenizer.decode(learner.pool.stream[1:])
        self.assertIn("gull", stream)
        self.assertNotIn("~", stream)
        learner.take_text([900], [PROBE])
        before = learner.evaluate()
        _, read = self.work(learner)
        self.assertLess(learner.growth.bpc, before)
        self.assertEqual(sorted(read), list(range(1, 10)))
        self.assertEqual((learner.growth.phase, learner.model.trainable()), ("grown", []))
        self.assertEqual(learner.unread(), [])

    def born(self, *losses):
        """Return a birth whose held-out losses are these, and then ever the last."""
        learner, said = self.learner(*self.LONG), list(losses)
        learner.take_text((), [*rows("sea", 3), PROBE])

        def evaluate():
            learner.growth.bpc = said.pop(0) if len(said) > 1 else said[0]
            return learner.growth.bpc
        learner.evaluate = evaluate
        return self.job(learner)

    def test_once_a_reading_brings_no_gain_its_rate_falls_from_the_best_weights_to_zero(self):
        job = self.born(4.0, 3.0, 2.0, 9.0)
        learner, growth, best, rates = job.learner, job.learner.growth, None, []
        while not growth.cooling_step:
            job.advance()
            best = best or growth.best_bpc == 2.0 and self.base(learner)
            self.assertFalse(job.finished())
        self.assertEqual(growth.cooling_step, 3 + math.ceil(learner.steps_of(m.PATIENT_SHARE)))
        self.assertEqual(self.base(learner), best)
        while not job.finished():
            rates.append(job.rate())
            job.advance()
        self.assertEqual(rates, sorted(rates, reverse=True))
        self.assertLess(job.rate(), 0.2 * rates[0])
        self.assertEqual(len(rates), learner.cooling_steps())
        job.close()
        self.assertEqual((self.base(learner), growth.bpc), (best, 2.0))

    def test_text_that_comes_is_read_or_when_it_cools_by_a_delta_and_what_goes_is_not(self):
        job = self.born(2.0, 3.0)
        learner = job.learner
        job.advance()
        before = self.base(learner), dataclasses.replace(learner.growth)
        learner.take_text([2], rows("sums", 1, first=50))
        self.assertEqual((self.base(learner), learner.growth), before)
        while not learner.growth.cooling_step:
            job.advance()
        learner.take_text((), rows("sums", 1, first=60))
        self.to_end(job)
        self.assertEqual(sorted(job.close()), [1, 3, 50])
        self.assertEqual([text.key for text in learner.unread()], [60])
        self.assertEqual(self.work(learner)[1], [60])


class Generations(Pupils, unittest.TestCase):
    MERGING = ("min_merge_chars=500", "max_merges=12", "min_pair_count=2", "life_merges=20")

    def test_merges_only_append_over_generations_and_in_step_with_the_text(self):
        self.assertEqual(self.grown(*self.MERGING[1:]).tokenizer.version, 0)  # too small a text
        old = self.grown(*self.MERGING)
        self.assertEqual(old.tokenizer.version, 12)
        # no more text, a little more, many times as much; and 20 merges in a whole life
        for kind, count, merges in (("sums", 0, 12), ("sums", 2, 14), ("shout", 200, 20),
                                    ("sums", 900, 20)):
            new = self.learner(*self.MERGING, growth=old.growth.heir(old.growth.generation + 1),
                               layers={"tokenizer": m.Layer(None, old.tokenizer.pack())})
            more = rows(kind, count, first=1000 + len(old.texts))
            new.take_text((), [*map(list, old.texts.values()), *more])
            self.assertEqual(new.tokenizer.merges[:old.tokenizer.version], old.tokenizer.merges)
            self.assertEqual(new.tokenizer.version, merges)
            self.assertEqual(new.model.vocab_size, new.tokenizer.vocab_size)
            old = new

    def test_it_may_live_that_reads_no_probe_much_worse_than_it_was_ever_read(self):
        for before, best, now, fits in ((2.0, 2.0, 2.05, True), (2.0, 2.0, 2.07, False),
                                        (2.1, 2.0, 2.07, False), (2.0, 2.1, 2.05, True)):
            old, new = mock.Mock(), mock.Mock()
            old.config.rebirth_bound, old.growth.best_probes = 0.03, {"0": best}
            old.probe_losses.return_value = {"0": before, "7": 1.0, "8": 3.0}
            new.growth.probes = {"0": now, "7": 0.9}
            worst = m.fit_to_live(new, old)
            self.assertEqual(worst is None, fits, (before, best, now))
            if not fits:
                self.assertEqual((worst["probe"], worst["now"]), ("0", now))


class Probes(Pupils, unittest.TestCase):
    def test_a_probe_is_read_whole_and_costs_the_same_when_another_is_added(self):
        learner, whole = self.grown("eval_chars=100", "held_out_chars=100"), PROBE[2] + "\n"
        self.assertGreater(len(whole), 200)
        ids = m.text_ids(learner.tokenizer, whole)
        loss = m.bits_per_character(learner.model, ids, len(whole), 24)
        self.assertEqual(learner.probe_losses(), {"0": loss})
        learner.take_text((), [row(901, text_of("sums", 6), probe="40"), *rows("sums", 1, 50)])
        after = learner.probe_losses()
        self.assertEqual((set(after), after["0"]), ({"0", "40"}, loss))
        # and one whose text changes is another probe
        learner.growth.best_probes = {"0": 2.0, "40": 3.0}
        learner.take_text([901], [row(902, text_of("sums", 7), probe="40")])
        self.assertEqual(learner.growth.best_probes, {"0": 2.0})
        learner.take_text((), rows("sums", 1, first=60))
        self.assertEqual(learner.growth.best_probes, {"0": 2.0})


class Child(Pupils, unittest.TestCase):
    """The process's work, done here step by step; what it would send is kept."""

    def child(self, *more, born=False):
        self.sent, self.now = [], 0.0
        child = m.TrainerChild(io.BytesIO(), io.BytesIO(), engine_in_use(), lambda: self.now)
        child._send = lambda kind, **message: self.sent.append((kind, message))
        child.on_start(config=dataclasses.asdict(m.Config().replace([*SMALL, *more])),
                       growth={}, layers={})
        self.told(child, [*rows("sea", 9), PROBE])
        if born:
            self.finish(child)
        return child

    @staticmethod
    def told(child, texts):
        child.on_text([], texts)
        child.on_learn(None, None)

    @staticmethod
    def rebirth(child, unlearns, **shape):
        """Begin a next generation, of another shape, as a parent asks for it."""
        config = dataclasses.asdict(dataclasses.replace(child.learner.config, **shape))
        growth = dataclasses.asdict(m.Growth(2, step=child.learner.growth.step))
        child.on_rebirth(unlearns=unlearns, config=config, growth=growth, layers={})

    @staticmethod
    def finish(child):
        while child.job or child.birth:
            child._advance(child.job or child.birth)

    def messages(self, kind):
        return [message for of, message in self.sent if of == kind]

    def upon(self, child, *messages):
        """Let the child read these messages and then the end; return what it sends upon that."""
        self.sent.clear()
        child.source = io.BytesIO(b"".join(map(m.pack_frame, messages)))
        with mock.patch.object(os, "_exit", side_effect=SystemExit), \
                self.assertRaises(SystemExit):
            child._read()
        return self.sent

    def test_a_birth_is_saved_by_the_clock_and_when_told_to_stop_and_a_burst_only_whole(self):
        child = self.child("warmup_steps=8")
        for seconds, count in ((1.0, 1), (9.0, 2), (1.0, 2), (9.0, 3), (1.0, 3)):
            self.now += seconds
            child._advance(child.job)
            self.assertEqual(len(self.messages("snapshot")), count)
        self.assertEqual(self.upon(child), [], "its parent is gone")
        self.assertEqual(self.upon(child, {"do": "stop"})[-1][1]["growth"]["step"], 5)
        self.finish(child)
        self.assertEqual(sorted(self.messages("snapshot")[-1]["read"]), list(range(1, 10)))
        self.assertEqual(self.sent[-1][0], "done")
        self.told(child, rows("sums", 1, first=50))
        child._advance(child.job)
        self.assertEqual(self.upon(child, {"do": "stop"}), [])
        while child.job:
            self.now += 9.0
            child._advance(child.job)
        self.assertEqual([message["read"] for message in self.messages("snapshot")], [[50]])

    def test_a_burst_begins_anew_from_what_was_committed_when_other_text_comes(self):
        child = self.child(born=True)
        self.told(child, rows("sums", 1, first=50))
        for _ in range(2):
            child._advance(child.job)
        child.on_text([50], rows("shout", 1, first=60))
        self.assertIsNone(child.job)
        self.assertFalse(self.has_effect(child.learner))
        child.on_learn(None, None)
        self.finish(child)
        self.assertEqual(self.messages("snapshot")[-1]["read"], [60])

    def test_what_is_new_is_learned_before_the_birth_of_the_next_goes_on(self):
        child, order = self.child(born=True), []
        self.rebirth(child, unlearns=False, n_embd=16)
        child.inbox, advance = queue.SimpleQueue(), child._advance
        advance(child.birth)
        self.told(child, rows("sums", 1, first=50))
        step = child.birth.learner.growth.step

        def watched(job):
            order.append("birth" if job is child.birth else "burst")
            advance(job)
            if not (child.job or child.birth):
                raise EOFError
        child._advance, child._read = watched, lambda: None
        with self.assertRaises(EOFError):
            child.run()
        self.assertEqual(order, sorted(order, reverse=True))
        self.assertGreater(order.count("burst"), 1)
        self.assertEqual(child.learner.growth.step, step + order.count("birth"))
        [adopted] = [message for message in self.messages("snapshot") if message["adopted"]]
        self.assertEqual(sorted(adopted["read"]), [*range(1, 10), 50])
        self.assertEqual(child.learner.config.n_embd, 16)

    def test_one_that_reads_worse_is_given_up_unless_it_must_unlearn(self):
        for unlearns in (False, True):
            child = self.child(born=True)
            self.rebirth(child, unlearns)
            child.learner.growth.best_probes = {"0": 0.01}
            old = child.learner
            self.finish(child)
            self.assertEqual(child.learner is old, not unlearns)
            told = [message["probe"] for message in self.messages("given_up")]
            self.assertEqual(told, [] if unlearns else ["0"])
            self.assertEqual(child.learner.growth.best_probes, {"0": 0.01})

    def test_a_step_with_a_loss_that_is_not_finite_is_told(self):
        child = self.child()
        child.learner.model.params["scale"].load(child.engine.buffer_of([math.inf]))
        child._advance(child.job)
        [told] = [message for message in self.messages("log") if message["event"] == "step skipped"]
        self.assertIn("was skipped", told["notice"])
