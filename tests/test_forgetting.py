"""Learning that does not forget: the choice of layers, folding, replay, the gate, the benchmark."""
import itertools
import json
import random
import tempfile
import time
import unittest
from collections import Counter
from pathlib import Path
from unittest import mock

import macrogpt as m
from support import Folder, engine_in_use, run_inside

SMALL = ("n_layer=1", "n_embd=8", "n_head=1", "block_size=24", "warmup_steps=6", "micro_steps=4",
         "eval_steps=3", "eval_chars=300", "batch_size=2", "delta_rank=2", "mix_passes=1",
         "min_merge_chars=1000000", "held_out_chars=300", "small_batch_tokens=0", "burst_passes=1")
KINDS = {"sea": "the gull and the wave and the salt wind blow over the pier ",
         "sums": "17 + 25 = 42; 9 * 8 = 72; 100 - 58 = 42; ",
         "shout": "WHO GOES THERE? STAND AND UNFOLD YOURSELF! "}


def text_of(kind, count=10, seed=0):
    """Return lines of one kind, in an order of their own."""
    words = KINDS[kind].split(" ")
    rng = random.Random(f"{kind} {seed}")
    return "".join(" ".join(rng.choices(words, k=9)) + "\n" for _ in range(count))


class Choosing(unittest.TestCase):
    def setUp(self):
        self.tokenizer = m.EvolvingTokenizer()
        self.router = m.Router(self.tokenizer)
        for place, kind in enumerate(KINDS):
            if place:
                self.router.append()
            self.router.learn(place, [text_of(kind, 60)])

    def test_a_text_calls_for_the_layer_that_has_learned_its_kind(self):
        for expected, kind in zip((None, 0, 1), KINDS):
            for seed in range(1, 6):
                raw = text_of(kind, 3, seed).encode()
                self.assertEqual(self.router.choose(raw), expected, raw)
                self.assertEqual(self.router(self.tokenizer.encode(raw.decode())), expected)

    def test_what_no_layer_knows_and_what_is_nothing_are_for_the_base(self):
        for raw in (b"", b"x", "žluťoučký kůň".encode(), b"qqqq zzzz jjjj"):
            self.assertIsNone(self.router.choose(raw))

    def test_a_layer_without_text_is_never_chosen(self):
        self.router.append()
        for kind in KINDS:
            self.assertNotEqual(self.router.choose(text_of(kind).encode()), 2)

    def test_a_shy_layer_is_called_only_for_what_is_clearly_its_own(self):
        raw = (text_of("sea", 1) + text_of("sums", 1)).encode()
        self.router.margins[1] = 1e6
        self.assertIsNone(self.router.choose(raw))

    def test_refining_takes_over_the_text_of_the_base_and_only_that(self):
        self.router.append()
        self.router.refine(3)
        self.assertEqual([self.router.choose(text_of(kind, 3, 9).encode()) for kind in KINDS],
                         [2, 0, 1])

    def test_a_folded_layers_text_is_for_the_base(self):
        self.router.fold_oldest()
        self.assertEqual([self.router.choose(text_of(kind, 3, 9).encode()) for kind in KINDS],
                         [None, None, 0])

    def test_the_base_takes_over_no_text_of_a_layer_that_it_got_no_share_of(self):
        base = self.router.counts[0]
        self.router.fold_oldest(0.0)
        self.assertEqual((self.router.counts[0], len(self.router.counts)), (base, 2))

    def test_stored_and_loaded_it_chooses_alike(self):
        self.router.margins[2] = 16.0
        again = m.load_router(self.tokenizer, m.pack_router(self.router), 2)
        self.assertEqual((again.counts, again.margins), (self.router.counts, self.router.margins))
        for kind in KINDS:
            raw = text_of(kind, 2, 7).encode()
            self.assertEqual(again.scores(raw), self.router.scores(raw))

    def test_what_was_kept_comes_back(self):
        past = self.router.copied()
        before = self.router.scores(b"the gull")
        self.router.learn(1, ["the gull " * 50])
        self.assertNotEqual(self.router.scores(b"the gull"), before)
        self.router.restore(past)
        self.assertEqual(self.router.scores(b"the gull"), before)


class Voices(unittest.TestCase):
    IDS = (0, 5, 9, 17, 3, 22, 40)

    def setUp(self):
        config = m.Config().replace(SMALL)
        self.rng = random.Random(1)
        self.model = m.GPT(m.Shape.of(config), 48, engine_in_use(), self.rng)
        for _ in range(3):
            self.model.append_delta(2, self.rng)
            for param in m._matrices(self.model.deltas[-1]):
                param.load(self.model.engine.buffer_of(
                    [self.rng.gauss(0.0, 0.1) for _ in range(param.rows * param.dim)]))

    def said(self, model=None):
        return list((model or self.model).logits(self.IDS).data)

    def assertClose(self, a, b, most=1e-4):
        self.assertLess(max(abs(x - y) for x, y in zip(a, b)), most)

    def naive(self, index):
        """Return what the base says with one delta beside it, computed unfolded."""
        deltas, self.model.deltas = self.model.deltas, self.model.deltas[index:index + 1]
        said = self.said()
        self.model.deltas = deltas
        return said

    def test_a_chosen_delta_speaks_with_the_base_and_with_no_other(self):
        for index in range(3):
            self.assertClose(self.said(self.model.with_delta(index)), self.naive(index))
        self.assertClose(self.said(self.model.with_delta(None)), self.naive(3))

    def test_the_router_is_asked_for_what_stands_before(self):
        asked = []
        self.model.router = lambda ids: asked.append(list(ids)) or 1
        self.assertIs(self.model.speaker([4, 5]), self.model.with_delta(1))
        self.assertEqual(asked, [[4, 5]])

    def test_a_layer_more_changes_not_a_bit_of_what_the_others_say(self):
        before = [self.said(self.model.with_delta(i)) for i in (None, 0, 1, 2)]
        self.model.append_delta(2, self.rng)
        for param in m._matrices(self.model.deltas[-1]):
            param.load(self.model.engine.buffer_of([0.5] * (param.rows * param.dim)))
        self.assertEqual([self.said(self.model.with_delta(i)) for i in (None, 0, 1, 2)], before)

    def test_a_change_of_a_delta_is_heard_at_once(self):
        before = self.said(self.model.with_delta(1))
        param = self.model.deltas[1]["embedding"].b
        param.load(self.model.engine.buffer_of([0.3] * (param.rows * param.dim)))
        self.assertNotEqual(self.said(self.model.with_delta(1)), before)
        self.assertClose(self.said(self.model.with_delta(1)), self.naive(1))

    def test_folding_leaves_what_all_others_say_and_gives_the_base_its_share(self):
        for share in (1.0, 0.5, 0.0):
            with self.subTest(share=share):
                self.setUp()
                others = [self.said(self.model.with_delta(i)) for i in (1, 2)]
                oldest, base = (self.said(self.model.with_delta(i)) for i in (0, None))
                self.model.fold_oldest_delta(share)
                self.assertClose([x for i in (0, 1) for x in self.said(self.model.with_delta(i))],
                                 [x for said in others for x in said])
                after = self.said(self.model.with_delta(None))
                if share != 0.5:
                    self.assertClose(after, oldest if share else base)

    def test_folding_again_and_again_leaves_the_last_as_it_was(self):
        last = self.said(self.model.with_delta(2))
        self.model.fold_oldest_delta(0.75)
        self.model.fold_oldest_delta(0.5)
        self.assertClose(self.said(self.model.with_delta(0)), last)

    def test_only_the_newest_delta_learns(self):
        before = [self.said(self.model.with_delta(i)) for i in (None, 0, 1)]
        optimizer = m.AdamW(0.9, 0.99, 1e-8, 0.0, 1.0)
        m.train_step(self.model.learner(), optimizer, [list(self.IDS)], 0.05, 0.0, self.rng)
        self.assertEqual([self.said(self.model.with_delta(i)) for i in (None, 0, 1)], before)
        self.assertNotEqual(self.said(self.model.with_delta(2)), self.naive(3))


class Reading(unittest.TestCase):
    def test_every_place_is_scored_once_and_from_enough(self):
        for count, block, stride, first in itertools.product(
                (1, 5, 23, 24, 25, 48, 100), (8, 24), (4, 8), (0, 3, 30)):
            plan = list(m.reading_plan(count, block, stride, first))
            places = [place for _, scored, end in plan for place in range(scored, end)]
            self.assertEqual(places, list(range(count)), (count, block, stride, first))
            for start, scored, end in plan:
                self.assertLessEqual(end - start, block)
                if start and stride < block:
                    self.assertGreaterEqual(scored - start, block - stride)

    def test_nobody_is_chosen_by_what_is_still_to_be_read(self):
        config = m.Config().replace(SMALL)
        model = m.GPT(m.Shape.of(config), 300, engine_in_use(), random.Random(1))
        model.append_delta(2, random.Random(2))
        ids, seen = list(range(200)), []
        model.router = lambda before: seen.append(max(before)) or None
        for at, _ in enumerate(m.predicted_rows(model, ids, 12), 1):
            self.assertLess(seen[-1], at)
        self.assertGreater(len(seen), 10)


class Replaying(unittest.TestCase):
    def test_old_new_and_rare_are_dealt_alike_and_no_window_twice_too_soon(self):
        documents = [("corpus", list(range(1, 161))), ("chat", [901, 902, 903])]
        replay, rng = m.Replay(documents, 5), random.Random(3)
        windows = [replay.window(rng) for _ in range(9 * 8)]
        rare = sum(window[1] > 900 for window in windows)
        self.assertEqual(rare, 8)  # one band of nine
        met = Counter(window[1] for window in windows if window[1] < 900)
        self.assertEqual(len(met), 32)
        self.assertEqual(set(met.values()), {2})

    def test_where_nothing_is_known_there_is_nothing_to_repeat(self):
        self.assertEqual(m.Replay([], 5).window(random.Random(1)), [])


class Pupils(unittest.TestCase):
    def student(self, *more, growth=None, layers=None):
        config = m.Config().replace([*SMALL, *more])
        return m.Student(config, growth or m.Growth(), layers or {}, engine_in_use())

    @staticmethod
    def documents(*told):
        """Return documents, [kind, fresh] each, as the trainer gets them."""
        return [[i, text_of(kind, 12, i), True, fresh, "corpus"]
                for i, (kind, fresh) in enumerate(told)]

    def run_job(self, student, steps=None):
        job = m.Job(student, steps, None, time.monotonic)
        for _ in range(1000):
            job.advance()
            if job.finished():
                if job.passes() or job.given_up():
                    return job, job.close()
                job.again()
        raise AssertionError("the job did not end")

    def grown(self, *more):
        student = self.student(*more)
        probes = {"0": text_of("sea", 6, 99)}
        student.take_text(self.documents(("sea", False)), probes["0"], probes)
        self.run_job(student)
        return student, probes


class Bursts(Pupils):
    def test_a_burst_ends_when_the_loss_of_what_is_new_stops_falling(self):
        student, probes = self.grown("burst_passes=1000")
        student.take_text(self.documents(("sea", False), ("sums", True)), "", probes)
        with mock.patch.object(m.Student, "fresh_nats", side_effect=itertools.chain(
                [5.0, 4.0, 3.0, 2.9999], itertools.repeat(0.0))):
            job = m.Job(student, None, None, time.monotonic)
            job.advance()
            while not job.finished():
                job.advance()
        self.assertEqual(job.done_steps, 4 * job.lap_steps)
        self.assertLess(job.done_steps, job.steps)

    def test_a_burst_is_as_long_as_what_is_new(self):
        steps = []
        for count in (1, 4):
            student, probes = self.grown()
            student.take_text(self.documents(("sea", False), *[("sums", True)] * count), "", probes)
            steps.append(m.Job(student, None, None, time.monotonic).steps)
        self.assertGreater(steps[1], 2 * steps[0])

    def test_text_of_another_kind_gets_a_delta_of_its_own_and_more_of_a_kind_does_not(self):
        student, probes = self.grown("delta_rate=0.03", "delta_seal_chars=8000", "gate_bound=9")
        told = [("sea", False)]
        expected = []
        for kind, count in (("sums", 1), ("sums", 1), ("shout", 2)):
            told.append((kind, True))
            student.take_text(self.documents(*told), "", probes)
            self.run_job(student, steps=24)
            told[-1] = (kind, False)
            expected.append(count)
            self.assertEqual(len(student.delta_names), count, (kind, student.notes))

    def test_what_is_learned_is_called_for_and_old_text_is_read_as_before(self):
        student, probes = self.grown()
        before = student.probe_losses()
        student.take_text(self.documents(("sea", False), ("sums", True)), "", probes)
        fresh = student.fresh_nats()
        self.run_job(student, steps=20)
        self.assertEqual(student.router.choose(text_of("sums", 3, 50).encode()), 0)
        self.assertEqual(student.probe_losses(), before)
        self.assertLess(student.fresh_nats(), fresh)

    def test_after_a_second_warm_up_the_first_delta_is_begun_anew(self):
        student, probes = self.grown("min_merge_chars=100", "max_merges=0")
        told = [("sea", False), ("sums", True)]
        student.take_text(self.documents(*told), "", probes)
        self.run_job(student, steps=4)
        student.growth.delta_chars = 5000  # enough for a shift to seal it
        many = self.documents(*[("sea", False)] * 20)
        student.take_text(many, "", probes)
        self.assertEqual((student.growth.phase, student.delta_names), ("warmup", []))
        self.run_job(student)
        student.take_text(many + self.documents(*[("sea", False)] * 20, ("shout", True))[-1:], "",
                          probes)
        self.run_job(student, steps=4)
        self.assertEqual(student.delta_names, ["delta1"])

    def test_a_new_delta_begins_as_the_layer_that_reads_the_new_text_best(self):
        student, probes = self.grown("delta_seal_chars=1")
        student.take_text(self.documents(("sea", False), ("sums", True)), "", probes)
        self.run_job(student, steps=12)
        known = [list(p.data) for p in m._matrices(student.model.deltas[0])]
        told = self.documents(("sea", False), ("sums", False), ("sums", True))
        student.take_text(told, "", probes)
        student.begin_burst()
        self.assertEqual([list(p.data) for p in m._matrices(student.model.deltas[1])], known)
        self.assertEqual([list(p.data) for p in m._matrices(student.model.deltas[0])], known)

    def test_with_nothing_new_a_delta_learns_more_of_what_the_base_knows(self):
        student, probes = self.grown()
        student.take_text(self.documents(("sea", False)), "", probes)
        self.run_job(student, steps=12)
        self.assertEqual(student.router.choose(text_of("sea", 3, 50).encode()), 0)
        self.assertLess(student.growth.probes["0"], student.growth.best_probes["0"] + 1e-9)

    def test_folds_and_routes_come_back_from_what_was_stored(self):
        student, probes = self.grown("max_delta_modules=2", "delta_seal_chars=1")
        told, kept = [("sea", False)], {}
        for kind in ("sums", "shout", "sums", "shout"):
            told.append((kind, True))
            student.take_text(self.documents(*told), "", probes)
            self.run_job(student, steps=6)
            told[-1] = (kind, False)
            kept.update(student.snapshot()[1])
        layers = {name: kept[name] for name in student.layer_names() if name in kept}
        self.assertEqual([n for n in layers if n.startswith("fold")], ["fold1"])
        again = self.student(growth=student.growth, layers=layers)
        for place in (None, 0, 1):
            ids = [1, 50, 60, 70]
            one, two = (list(x.model.with_delta(place).logits(ids).data) for x in (student, again))
            self.assertLess(max(abs(a - b) for a, b in zip(one, two)), 1e-5)
        self.assertEqual(again.router.counts, student.router.counts)

    def test_of_folds_no_more_are_kept_than_there_are_deltas_that_need_them(self):
        student, probes = self.grown("max_delta_modules=2", "delta_seal_chars=1")
        told = [("sea", False)]
        for i in range(6):
            told.append((("sums", "shout")[i % 2], True))
            student.take_text(self.documents(*told), "", probes)
            self.run_job(student, steps=2)
            told[-1] = (told[-1][0], False)
        self.assertEqual(len(student.delta_names), 2)
        self.assertLessEqual(len(student.folds), 2)
        self.assertTrue(all(len(lacks) <= 2 for lacks in student.model.lacks))


class Gates(Pupils):
    def burst(self, harms, *more):
        """Run a burst whose gate finds the harms, in turn, and then none."""
        student, probes = self.grown(*more)
        told = [("sea", False), ("sums", True)]
        student.take_text(self.documents(*told), "", probes)
        found = itertools.chain(harms, itertools.repeat({}))
        with mock.patch.object(m.Gate, "harm", side_effect=found):
            job, learned = self.run_job(student)
        return student, job, learned

    HARM = {"0": (2.0, 2.5)}

    def test_a_burst_that_does_harm_again_and_again_is_rolled_back_and_not_tried_for_ever(self):
        student, job, learned = self.burst(itertools.repeat(self.HARM), "gate_tries=2")
        self.assertEqual(job.gate.tries, 3)
        self.assertEqual(learned, [1])
        self.assertFalse(any(any(b.data) for b in student.model.delta_params() if ".b" in b.name))
        self.assertFalse(student.router.counts[-1])
        self.assertEqual([note["then"] for note in student.notes], [
            "more replay at a lower rate", "more replay at a lower rate", "rolled back"])

    def test_a_burst_that_did_harm_is_tried_again_with_more_replay_at_a_lower_rate(self):
        student, job, _ = self.burst([self.HARM])
        self.assertEqual(job.calm, 0.5)
        self.assertGreaterEqual(job.replay, 0.5)
        self.assertTrue(student.router.counts[-1])
        self.assertEqual(student.router.choose(text_of("sums", 3, 50).encode()), 0)

    def test_harm_in_a_delta_that_knows_something_gives_what_is_new_a_layer_of_its_own(self):
        student, job, _ = self.burst([])
        student.growth.delta_chars = 100
        known = [list(p.data) for p in m._matrices(student.model.deltas[0])]
        student.take_text(self.documents(("sea", False), ("sums", False), ("sums", True)), "",
                          {"0": text_of("sea", 6, 99)})
        with mock.patch.object(m.Gate, "harm", side_effect=[self.HARM, {}]):
            self.run_job(student)
        self.assertEqual(len(student.delta_names), 2)
        self.assertEqual([list(p.data) for p in m._matrices(student.model.deltas[0])], known)

    def test_a_layer_that_is_called_where_it_harms_is_called_less_readily(self):
        student, probes = self.grown()
        student.take_text(self.documents(("sea", False), ("sums", True)), "", probes)
        job = m.Job(student, None, None, time.monotonic)
        with mock.patch.object(m.Gate, "worse", side_effect=[self.HARM, self.HARM, {}]):
            self.assertEqual(job.gate.harm(), {})
        self.assertEqual(student.router.margins[-1], m.SHY_MARGINS[1])
        self.assertEqual(student.notes[-1]["then"], "called less readily")

    def test_the_bound_is_above_the_best_of_a_life_so_that_small_harms_do_not_add_up(self):
        student, probes = self.grown("gate_bound=0.01")
        student.take_text(self.documents(("sea", False), ("sums", True)), "", probes)
        gate = m.Job(student, None, None, time.monotonic).gate
        for before, best, now, worse in ((2.0, 2.0, 2.01, False), (2.0, 2.0, 2.03, True),
                                         (2.02, 2.0, 2.03, True), (2.5, 2.0, 2.5, False),
                                         (2.5, 2.0, 2.51, True)):
            gate.before, student.growth.best_probes = {"0": before}, {"0": best}
            with mock.patch.object(m.Student, "probe_losses", return_value={"0": now}):
                self.assertEqual(bool(gate.worse()), worse, (before, best, now))


class LifeOfProbes(Folder, unittest.TestCase):
    def test_probe_sets_are_known_by_their_epochs(self):
        memory = m.Memory(self.db)
        self.addCleanup(memory.close)
        for epoch, line in ((0, "The first line."), (70, "A later one.")):
            document = m.Document((line,), True)
            memory.hold_out({m.line_key(line.casefold())}, epoch)
            memory.add_entry("corpus", document, held_out=True)
        texts = m.probe_texts(memory.entries("held_out"), memory.probe_epochs())
        self.assertEqual(set(texts), {"0", "70"})
        self.assertIn("A later one.", texts["70"])

    def test_a_curve_keeps_its_ends_and_stays_short(self):
        memory = m.Memory(self.db)
        self.addCleanup(memory.close)
        with memory.transaction():
            for step in range(1000):
                m.note_probes(memory, step, {"0": 3.0 - step / 1000})
        curve = memory.setting("probes")["0"]
        self.assertLessEqual(len(curve), m.PROBE_POINTS)
        self.assertEqual((curve[0][0], curve[-1][0]), (0, 999))
        self.assertEqual(curve, sorted(curve))

    def test_stats_show_each_probes_loss_over_life(self):
        self.write("nonames.txt", "\n\n".join(f"The lamp of pier {i} burns." for i in range(60)))
        self.run_here("train")
        stats = json.loads(self.run_here("stats", "--json").stdout)
        self.assertEqual(list(stats["probe_curves"]), ["0"])
        self.assertIn("probe      0", self.run_here("stats").stdout.decode())

    def test_dreams_are_off_unless_asked_for_and_come_after_rest_on_mains_power(self):
        now = [0.0]
        for seconds, waited, plugged, dreams in ((0, 999, True, False), (60, 30, True, False),
                                                 (60, 61, True, True), (60, 61, False, False)):
            config = m.Config(dream_seconds=float(seconds), corpus_path=self.corpus)
            memory = m.Memory(":memory:", lambda: now[0])
            self.addCleanup(memory.close)
            now[0] = 0.0
            being = m.Organism(config, memory, engine_in_use())
            being.take_in_corpus()
            being.growth.phase = "grown"
            memory.mark_learned(memory.entry_keys("corpus"))
            now[0] = waited
            with mock.patch.object(m, "on_mains", return_value=plugged):
                self.assertEqual(bool(being._plan()), dreams, (seconds, waited, plugged))

    def test_a_machine_is_on_battery_only_if_all_its_plugs_are_out(self):
        with tempfile.TemporaryDirectory() as folder:
            self.assertTrue(m.on_mains(folder))
            for name, online, expected in (("AC", "0", False), ("USB", "1", True)):
                (Path(folder) / name).mkdir()
                (Path(folder) / name / "online").write_text(online + "\n")
                self.assertEqual(m.on_mains(folder), expected)


class Benchmark(Folder, unittest.TestCase):
    SIZES = tuple(word for setting in (
        "bench_chars=1000", "bench_tokens=100", "bench_shifts=2", "bench_shift_chars=1000",
        "bench_shift_tokens=50", "bench_test_chars=100", "max_merges=0", "gate_bound=9", *SMALL)
        for word in ("--set", setting))

    def test_forgetting_is_measured_by_each_method_for_model_and_voice(self):
        self.write("own.txt", text_of("sea", 40))
        self.write("nonames.txt", text_of("shout", 40))
        done = run_inside("bench", "--forgetting", "own.txt", *self.SIZES, "--json",
                          cwd=self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        streams = json.loads(done.stdout)["streams"]
        self.assertEqual(list(streams), ["5 unlike texts", "2 shifts"])
        for stream in streams.values():
            self.assertEqual(list(stream), list(m.METHODS))
            for told in stream.values():
                self.assertEqual(next(iter(told["texts"])), "own.txt")
                after, end = (list(told["texts"].values())[-1][x] for x in ("after", "end"))
                self.assertEqual(after, end)  # nothing came after the last
                self.assertTrue(all(len(told[x]) == 2 for x in ("forgetting", "worst", "learned")))
        self.assertEqual(streams["5 unlike texts"]["full"]["learned"], [0.0, 0.0])

    def test_a_text_too_short_to_learn_is_refused(self):
        self.write("own.txt", "short")
        done = run_inside("bench", "--forgetting", "own.txt", *self.SIZES, cwd=self.folder)
        self.assertEqual(done.returncode, 1)
        self.assertIn("own.txt has 5 characters", done.stderr.decode())


if __name__ == "__main__":
    unittest.main()
