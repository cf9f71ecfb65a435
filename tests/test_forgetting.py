"""Learning that does not forget: bursts, the gate, a bench."""
import contextlib
import io
import itertools
import json
import unittest
from unittest import mock

import bench_forgetting as bench
import macrogpt as m
from support import Folder
from test_learning import SMALL, Pupils, rows, text_of

SUMS, MORE_SUMS, SHOUTS = (rows("sums", 6, first=100), rows("sums", 6, first=200),
                           rows("shout", 6, first=300))
HARM = {"0": (2.0, 2.5)}


class Bursts(Pupils, unittest.TestCase):
    def test_a_burst_changes_the_active_delta_alone_and_a_full_one_is_sealed_before_the_next(self):
        learner, sealed = self.grown("delta_seal_chars=10"), []
        base = self.base(learner)
        for number in (1, 2, 3):
            _, read = self.work(learner, rows("sums", 2, first=100 * number))
            self.assertEqual(sorted(read), [100 * number, 100 * number + 1])
            stored = {name: layer.sealed for name, layer in learner.snapshot()[1].items()
                      if name.startswith("delta")}
            self.assertEqual(stored, {f"delta{k}": k < number for k in (number - 1, number) if k})
            self.assertEqual(self.base(learner), base)
            sealed.append(self.numbers(learner, number))
            self.assertEqual([self.numbers(learner, i + 1) for i in range(number)], sealed)
        self.assertEqual(len(set(sealed)), 3)

    def test_a_burst_ends_when_the_loss_of_what_is_new_stops_falling(self):
        learner = self.grown("burst_passes=1000", told=SUMS)
        with mock.patch.object(m.Learner, "fresh_bpc", side_effect=itertools.chain(
                [6.0, 5.0, 4.0, 3.0, 2.9999], itertools.repeat(0.0))):
            job, _ = self.work(learner)
        self.assertEqual(job.done_steps, 4 * job.lap_steps)
        self.assertLess(job.done_steps, job.steps)

    def test_a_burst_is_as_long_as_what_is_new_within_bounds(self):
        one, four, many = (self.job(self.grown(told=rows("sums", count, first=100))).steps
                           for count in (6, 24, 999))
        self.assertTrue(3 * one < four < 5 * one, (one, four))
        self.assertEqual(many, m.BURST_STEPS * 4)
        self.assertEqual(self.job(self.grown()).steps, 4)

    def test_text_of_another_kind_gets_a_delta_of_its_own_and_more_of_a_kind_does_not(self):
        learner = self.grown("delta_rate=0.03", "delta_seal_chars=6000", "gate_bound=9")
        for told, count in ((SUMS, 1), (MORE_SUMS, 1), (SHOUTS, 2)):
            self.work(learner, told, steps=24)
            self.assertEqual(len(learner.model.deltas), count, told[0][2])

    def test_what_is_learned_is_called_for_old_text_is_read_as_before_and_the_best_stays(self):
        learner = self.grown(told=SUMS)
        learner.growth.best_probes = {"0": 0.5}
        before, job = learner.probe_losses(), self.job(learner, 20)
        fresh = learner.fresh_bpc()
        self.to_end(job)
        self.assertLess(learner.fresh_bpc(), fresh)
        self.assertEqual((job.harm(), len(job.close())), (None, 6))
        self.assertEqual(learner.router.choose(text_of("sums", 3, 50).encode()), 1)
        self.assertEqual(learner.probe_losses(), before)
        self.assertEqual((learner.growth.probes, learner.growth.best_probes), (before, {"0": 0.5}))

    def test_what_reads_nothing_at_all_passes_no_gate(self):
        learner = self.grown(told=SUMS)
        job = self.job(learner, 4)
        job.advance()
        with mock.patch.object(m, "bits_per_character", return_value=m.math.nan):
            self.assertEqual(job.harm()["now"], m.math.inf)
            other = mock.Mock(growth=m.Growth(probes=learner.probe_losses()))
        self.assertEqual(m.fit_to_live(other, learner)["now"], m.math.inf)

    def test_a_new_delta_begins_as_the_layer_that_reads_the_new_text_best(self):
        learner = self.grown("delta_seal_chars=1", told=SUMS)
        self.work(learner, steps=12)
        known = self.numbers(learner)
        learner.take_text((), MORE_SUMS)
        learner.begin_burst()
        self.assertEqual(self.numbers(learner, 2), known)
        learner.take_text([text[1] for text in MORE_SUMS], SHOUTS)
        learner.begin_delta()  # which resembles nothing, and begins with no effect
        learner.model.deltas = learner.model.deltas[-1:]
        self.assertFalse(self.has_effect(learner))

    def test_a_burst_rehearses_what_is_known_in_step_with_what_its_delta_knows(self):
        learner = self.grown("replay_share=0.5", told=SUMS)
        self.assertEqual(self.job(learner).fresh_share, 1.0)
        learner.growth.delta_chars = learner.chars(unread=True)
        self.assertEqual(self.job(learner).fresh_share, 0.75)
        with mock.patch.object(m.Replay, "window", return_value=[1, 2, 3]) as replayed:
            self.work(learner, steps=20)
        self.assertTrue(2 <= replayed.call_count <= 18, replayed.call_count)


class Gates(Pupils, unittest.TestCase):
    def burst(self, learner, told, harms):
        """Let a learner work with a gate that finds harm so many times, and then none."""
        found = itertools.chain([HARM] * harms, itertools.repeat({}))
        with mock.patch.object(m.Gate, "worse", side_effect=found), \
                mock.patch.object(m.Gate, "now", {"0": 2.0}, create=True):
            return self.work(learner, told)

    def test_a_burst_that_does_harm_leaves_no_trace_and_is_not_tried_for_ever(self):
        learner = self.grown()
        job, read = self.burst(learner, SUMS, harms=3)
        self.assertEqual((job.given_up, len(read)), (True, 6))
        self.assertFalse(self.has_effect(learner))
        self.assertFalse(learner.router.counts[-1])
        self.assertEqual((learner.growth.delta_chars, learner.unread()), (0, []))

    def test_harm_in_a_delta_that_knows_something_gives_what_is_new_a_layer_of_its_own(self):
        learner = self.grown()
        self.burst(learner, SUMS, harms=0)
        known = self.numbers(learner)
        job, read = self.burst(learner, MORE_SUMS, harms=1)
        self.assertEqual((len(learner.model.deltas), self.numbers(learner)), (2, known))
        self.assertEqual((job.given_up, len(read)), (False, 6))
        self.assertNotEqual(self.numbers(learner, 2), known)

    def test_the_bound_is_above_the_best_of_a_life_so_that_small_harms_do_not_add_up(self):
        learner = self.grown("gate_bound=0.01", told=SUMS)
        gate = self.job(learner).gate
        for before, best, now, worse in ((2.0, 2.0, 2.01, False), (2.0, 2.0, 2.03, True),
                                         (2.02, 2.0, 2.03, True), (2.5, 2.0, 2.5, False),
                                         (2.5, 2.0, 2.51, True)):
            gate.before, learner.growth.best_probes = {"0": before}, {"0": best}
            with mock.patch.object(m.Learner, "probe_losses", return_value={"0": now}):
                self.assertEqual(bool(gate.worse()), worse, (before, best, now))
        with mock.patch.object(m.Gate, "worse", return_value={**HARM, "7": (1.0, 3.0)}):
            told = self.job(learner).harm()  # the worst
        self.assertEqual(told, {"probe": "7", "before": 1.0, "now": 3.0, "then": "rolled back"})

    def test_a_curve_keeps_its_ends_and_stays_short(self):
        memory, steps = m.Memory(":memory:"), m.PROBE_POINTS * 2
        self.addCleanup(memory.close)
        for step in range(steps):
            m.note_probes(memory, step, {"0": 3.0 - step / steps})
        curve = memory.setting("probes")["0"]
        self.assertLessEqual(len(curve), m.PROBE_POINTS)
        self.assertEqual((curve[0][0], curve[-1][0]), (0, steps - 1))
        self.assertEqual(curve, sorted(curve))


class Benchmark(Folder):
    SIZES = ("--chars", "1000", "--tokens", "100", "--shifts", "2", "--shift-chars", "1000",
             "--shift-tokens", "50", "--test-chars", "100",
             *(word for setting in ("max_merges=0", "gate_bound=9", *SMALL)
               for word in ("--set", setting)))

    def run_bench(self, text, *words):
        """Return the exit code and what the benchmark says on its two streams."""
        own, out, err = self.write("own.txt", text), io.StringIO(), io.StringIO()
        with mock.patch.object(bench, "UNLIKE_TEXTS", 3), contextlib.redirect_stdout(out), \
                contextlib.redirect_stderr(err):
            code = bench.main([own, "--corpus", self.corpus, *self.SIZES, *words])
        return code, out.getvalue(), err.getvalue()

    def test_forgetting_is_measured_by_each_method_for_model_and_voice(self):
        code, said, told = self.run_bench(text_of("sea", 40), "--json")
        self.assertEqual(code, 0, told)
        streams = json.loads(said)["streams"]
        self.assertEqual(list(streams), ["3 unlike texts", "2 shifts"])
        for name, stream in streams.items():
            self.assertEqual(list(stream), list(bench.METHODS))
            for facts in stream.values():
                first, *_, last = facts["texts"].items()
                self.assertEqual(first[0], "own.txt")
                self.assertEqual(last[1]["after"], last[1]["end"])  # nothing came after the last
                self.assertTrue(all(len(facts[x]) == 2 for x in ("forgetting", "worst", "learned")))
            self.assertEqual(len(bench.table(name, stream)), len(facts["texts"]) + 5)
        self.assertEqual(streams["3 unlike texts"]["full"]["learned"], [0.0, 0.0])

    def test_a_text_too_short_to_learn_is_refused(self):
        code, said, told = self.run_bench("short")
        self.assertEqual((code, said), (1, ""))
        self.assertIn("own.txt has 5 characters", told)
