"""Claims about streams of ids, the windows cut from them, training steps and honest scores."""
import contextlib
import math
import random
import unittest

import macrogpt as m

SHAPE = m.Shape(n_layer=1, n_embd=8, n_head=2, n_ff=8, block_size=8, rope_base=10_000.0,
                norm_eps=1e-5)
VOCAB = 20
NEWLINE = m.FIRST_BYTE + ord("\n")


def small_model(engine=None, seed=1):
    return m.GPT(SHAPE, VOCAB, engine or m.interpreted_engine(), random.Random(seed))


def lively(engine=None, seed=1):
    """A model that is far from uniform."""
    model, rng = small_model(engine, seed), random.Random(seed)
    for param in model.params.values():
        param.load(model.engine.buffer_of(
            [rng.gauss(0, 1.3 * param.dim ** -0.5) for _ in param.data]))
    return model


def uniform():
    """A model all of whose logits are equal."""
    model = small_model()
    table = model.params["embedding"]
    table.load(model.engine.buffer(len(table.data)))
    return model


def weights(model):
    return {name: (p.data[:], p.m[:], p.v[:], p.steps) for name, p in model.params.items()}


class TextBecomesAStreamWithoutLoss(unittest.TestCase):
    def read_back(self, tokenizer, text):
        ids = m.text_ids(tokenizer, text)
        self.assertEqual((ids[0], ids[-1]), (m.END_OF_TEXT, m.END_OF_TEXT))
        return tokenizer.decode(NEWLINE if i == m.END_OF_TEXT else i for i in ids[1:-1])

    def tokenizers(self):
        learned = m.EvolvingTokenizer()
        learned.learn_merges(["a b\n\na b\n", "the then\nthe\n\n\n the then"] * 5, 30)
        self.assertGreater(learned.version, 5)
        return m.EvolvingTokenizer(), learned

    def test_random_texts_with_blank_lines_come_back(self):
        rng = random.Random(1)
        for tokenizer in self.tokenizers():
            for _ in range(200):
                text = "".join(rng.choice(("\n", "\n", "\n\n", "a", "the ", "é", " ", "\t", "日",
                                           "<|endoftext|>", "\x00", "\r", "’", "🙂", "a b"))
                               for _ in range(rng.randrange(25)))
                self.assertEqual(self.read_back(tokenizer, text), text)

    def test_runs_of_line_ends_of_every_length_come_back(self):
        for tokenizer in self.tokenizers():
            for n in range(12):
                for text in ("\n" * n, "a" + "\n" * n, "\n" * n + "a", "a" + "\n" * n + "b"):
                    self.assertEqual(self.read_back(tokenizer, text), text)

    def test_a_blank_line_ends_a_document_as_the_trainer_ends_it(self):
        tokenizer = m.EvolvingTokenizer()
        expected = [m.END_OF_TEXT, *m.document_ids(tokenizer, "one\ntwo\n"),
                    *m.document_ids(tokenizer, "three")]
        self.assertEqual(m.text_ids(tokenizer, "one\ntwo\n\nthree"), expected)

    def test_the_empty_text_is_its_two_ends(self):
        self.assertEqual(m.text_ids(m.EvolvingTokenizer(), ""), [m.END_OF_TEXT] * 2)

    def test_a_document_is_closed_unless_told_otherwise(self):
        tokenizer = m.EvolvingTokenizer()
        ids = tokenizer.encode("hi\n")
        self.assertEqual(m.document_ids(tokenizer, "hi\n"), [*ids, m.END_OF_TEXT])
        self.assertEqual(m.document_ids(tokenizer, "hi\n", closed=False), ids)


class PoolsDealTheirText(unittest.TestCase):
    def pool(self, n, block=8, fresh=0):
        """A pool whose stream is 0, 1, 2, … n: an id tells its place. The last are fresh."""
        pool = m.TextPool(block)
        pool.add(range(1, n + 1 - fresh))
        pool.add(range(n + 1 - fresh, n + 1), fresh=True)
        return pool

    def counts(self, pool, n, windows, rng):
        counts = [0] * (n + 1)
        for _ in range(windows):
            for i in pool.windows(1, 0, rng)[0][1:]:
                counts[i] += 1
        return counts[1:]

    def test_windows_are_pieces_of_the_stream_of_2_to_block_plus_1_ids(self):
        rng = random.Random(2)
        for n in (1, 2, 7, 8, 9, 10, 16, 17, 100):
            pool = self.pool(n)
            for window in pool.windows(60, 0, rng):
                self.assertEqual(window, list(range(window[0], window[0] + len(window))))
                self.assertTrue(2 <= len(window) <= 9, window)
                self.assertLessEqual(window[-1], n)

    def test_the_middle_of_a_stream_is_dealt_exactly_once_an_epoch(self):
        rng = random.Random(3)
        for n in (30, 64, 100, 101):
            pool = self.pool(n)
            for windows in (1, 2, 5, 11, 12, 50, 51):  # after any number of windows
                counts = self.counts(pool, n, windows, rng)
                middle = counts[8:n - 9]
                self.assertLessEqual(max(middle) - min(middle), 2 if windows > 1 else 1)
            pool = self.pool(n)
            middle = self.counts(pool, n, 300, rng)[8:n - 9]
            self.assertLessEqual(max(middle) - min(middle), 1)

    def test_every_place_is_dealt_in_the_end(self):
        for n in (8, 9, 12, 30, 101):
            self.assertGreater(min(self.counts(self.pool(n), n, 1500, random.Random(4))), 0)

    def test_the_edges_of_a_stream_are_dealt_about_as_often_as_its_middle(self):
        for n in (5, 8, 9, 12, 16, 20, 50):
            counts = self.counts(self.pool(n), n, 3000, random.Random(5))
            self.assertGreater(min(counts), 0.4 * max(counts), (n, counts))

    def test_an_epoch_is_dealt_in_random_order_at_a_random_shift(self):
        rng = random.Random(6)
        firsts = [w[0] for w in self.pool(400).windows(40, 0, rng)]
        self.assertNotIn(firsts, (sorted(firsts), sorted(firsts, reverse=True)))
        self.assertEqual(len({first % 8 for first in firsts if first}), 1)
        shifts = {self.pool(400).windows(1, 0, rng)[0][0] % 8 for _ in range(100)}
        self.assertEqual(shifts, set(range(8)))

    def test_the_seed_decides_the_deal(self):
        a, b, c = (self.pool(90).windows(30, 0, random.Random(s)) for s in (7, 7, 8))
        self.assertEqual(a, b)
        self.assertNotEqual(a, c)

    def test_fresh_windows_are_of_new_text_alone(self):
        pool = self.pool(100, fresh=20)
        windows = pool.windows(12, 5, random.Random(9))
        self.assertEqual(len(windows), 12)
        for window in windows[:5]:
            self.assertTrue(all(i == m.END_OF_TEXT or i > 80 for i in window), window)
        self.assertTrue(any(i <= 80 for window in windows[5:] for i in window if i))

    def test_fresh_text_is_in_both_streams(self):
        counts = self.counts(self.pool(30, fresh=10), 30, 400, random.Random(10))
        self.assertTrue(all(counts))

    def test_where_nothing_is_new_all_windows_are_of_the_whole(self):
        windows = self.pool(50).windows(6, 4, random.Random(11))
        self.assertEqual(len(windows), 6)
        self.assertTrue(all(2 <= len(w) <= 9 for w in windows))

    def test_an_empty_pool_has_no_windows(self):
        pool = m.TextPool(8)
        self.assertEqual(pool.windows(4, 2, random.Random(12)), [])
        pool.add([])
        pool.add([], fresh=True)
        self.assertEqual(pool.windows(4, 0, random.Random(12)), [])

    def test_text_that_is_added_later_is_dealt_too(self):
        pool, rng = self.pool(40), random.Random(13)
        pool.windows(3, 0, rng)
        pool.add(range(41, 81))
        counts = self.counts(pool, 80, 100, rng)
        self.assertGreater(min(counts[45:70]), 0)


class StepsLearn(unittest.TestCase):
    OPTIMIZER = m.AdamW(0.9, 0.99, 1e-8, 0.0, 1.0)

    def step(self, model, windows, rate=0.02, guard=None, drop=0.0):
        return m.train_step(model, self.OPTIMIZER, windows, rate, drop, random.Random(1), guard)

    def test_a_small_pattern_is_learned(self):
        windows = [[1, 2, 3, 4, 1, 2, 3, 4, 1], [3, 4, 1, 2, 3]]
        for engine in (m.interpreted_engine(), m.reference_engine()):
            model = small_model(engine)
            reports = [self.step(model, windows, 0.05) for _ in range(40)]
            self.assertAlmostEqual(reports[0].loss, math.log(VOCAB), delta=0.3)
            self.assertLess(reports[-1].loss, 0.15)
            self.assertTrue(all(r.applied and r.tokens == 12 and r.norm > 0 for r in reports))

    def test_what_is_unwanted_becomes_unlikely_and_the_rest_stays(self):
        windows, unwanted = [[1, 2, 3, 4, 1, 2, 3, 4, 1]], ([1, 2, 3], 2)
        model = small_model()
        for _ in range(40):
            self.step(model, windows, 0.05)

        def chance(ids):
            return math.exp(-model.loss([ids]).data * (len(ids) - 1))
        before, kept = chance([2, 3]), chance([3, 4, 1])
        for _ in range(20):
            m.train_step(model, self.OPTIMIZER, [[3, 4, 1]], 0.02, 0.0, random.Random(1), None,
                         [unwanted])
        self.assertLess(chance([1, 2, 3]), 0.3 * before)
        self.assertGreater(chance([3, 4, 1]), 0.7 * kept)

    def test_the_same_seed_learns_the_same(self):
        a, b = small_model(), small_model()
        for model in (a, b):
            for _ in range(3):
                self.step(model, [[1, 2, 3], [4, 5]], drop=0.2)
        self.assertEqual(weights(a), weights(b))

    def test_the_report_holds_the_loss_before_the_step_and_the_norm_of_its_gradient(self):
        model = lively()
        windows = [[1, 2, 3, 4], [5, 6]]
        expected = model.loss(windows)
        m.backward(expected)
        norm = m.gradient_norm(model.trainable())
        report = self.step(model, windows)  # the gradients left above must not count
        self.assertEqual((report.loss, report.norm), (expected.data, norm))

    def test_gradients_are_gone_afterwards(self):
        model = small_model()
        self.step(model, [[1, 2, 3]])
        self.assertEqual({p.grad for p in model.params.values()}, {None})

    def test_frozen_parameters_stay_while_a_delta_learns(self):
        model = small_model()
        model.append_delta(2, random.Random(2))
        before = weights(model)
        losses = [self.step(model, [[1, 2, 3, 1, 2, 3]]).loss for _ in range(30)]
        self.assertEqual(weights(model), before)
        self.assertLess(losses[-1], losses[0] - 0.3)

    def test_a_loss_that_is_not_finite_changes_nothing_and_is_reported(self):
        windows = [[1, 2, 3, 4], [5, 6, 7]]
        for make in (m.interpreted_engine, m.reference_engine):
            for bad in (math.nan, math.inf):
                model = small_model(make())
                self.step(model, windows)
                model.params["0.out"].data[3] = bad
                model.params["0.out"].changed()
                before = repr(weights(model))  # NaN is not equal to itself, its text is
                report = self.step(model, windows)
                self.assertFalse(report.applied or math.isfinite(report.loss))
                self.assertEqual((report.tokens, report.norm), (5, math.inf))
                self.assertEqual(repr(weights(model)), before)

    def test_even_a_window_of_two_ids_reports_a_loss_that_is_not_finite(self):
        for make in (m.interpreted_engine, m.reference_engine):
            model = small_model(make())
            model.params["0.out"].data[3] = math.nan
            model.params["0.out"].changed()
            self.assertFalse(self.step(model, [[1, 2]]).applied)

    def test_a_gradient_that_is_not_finite_changes_nothing_and_is_reported(self):
        @contextlib.contextmanager
        def spoil(model, bad):
            model.params["0.qkv"].grad[3] = bad
            yield
        for make in (m.interpreted_engine, m.reference_engine):
            for bad in (math.nan, math.inf, -math.inf):
                model = small_model(make())
                before = weights(model)
                report = self.step(model, [[1, 2, 3]], guard=spoil(model, bad))
                self.assertTrue(math.isfinite(report.loss))
                self.assertFalse(report.applied or math.isfinite(report.norm))
                self.assertEqual(weights(model), before)

    def test_a_gradient_that_overflows_float32_changes_nothing_and_is_reported(self):
        model = small_model(m.reference_engine())
        for name, number in (("0.qkv", 0.0), ("0.out", 3e38), ("scale", 1e3)):
            param = model.params[name]  # zeros times 3e38 do no harm until the way back
            param.load(model.engine.buffer_of([number] * len(param.data)))
        before, report = weights(model), self.step(model, [[1, 2, 3, 4, 5]])
        self.assertTrue(math.isfinite(report.loss))
        self.assertFalse(report.applied or math.isfinite(report.norm))
        self.assertEqual(weights(model), before)

    def test_the_update_alone_happens_inside_the_guard(self):
        model, seen = small_model(), []
        start = weights(model)

        @contextlib.contextmanager
        def guard():
            seen.append(weights(model) == start)
            seen.append(model.params["0.qkv"].grad is not None)
            yield
            seen.append(weights(model) == start)
        self.step(model, [[1, 2, 3]], guard=guard())
        self.assertEqual(seen, [True, True, False])


class ScoresCountEveryIdOnce(unittest.TestCase):
    LENGTHS = (2, 3, 8, 9, 10, 12, 16, 17, 18, 25, 40)

    def ids(self, n):
        rng = random.Random(n)
        return [rng.randrange(VOCAB) for _ in range(n)]

    def naive(self, model, ids, stride):
        """Each id alone, from the rows of the first window that reaches it."""
        nats = []
        for place in range(1, len(ids)):
            start = 0
            while start + 8 < place:
                start += stride
            context = ids[start:place]
            if start:
                self.assertGreater(len(context), 8 - stride)
            logits = model.logits(context)
            row = logits.row(logits.rows - 1)
            nats.append(math.log(sum(map(math.exp, row))) - row[ids[place]])
        return nats

    def test_the_sum_is_that_of_every_id_scored_alone(self):
        model = lively()
        for n in self.LENGTHS:
            for stride in (8, 3, 1):
                found = sum(m.scored_nats(model, self.ids(n), stride))
                expected = sum(self.naive(model, self.ids(n), stride))
                self.assertAlmostEqual(found, expected, delta=1e-4 * n, msg=(n, stride))

    def test_with_the_block_as_stride_it_is_the_loss_of_the_windows_side_by_side(self):
        model = lively()
        for n in self.LENGTHS:
            ids = self.ids(n)
            windows = [ids[s:s + 9] for s in range(0, n - 1, 8)]
            expected = sum(model.loss([w]).data * (len(w) - 1) for w in windows)
            self.assertAlmostEqual(sum(m.scored_nats(model, ids, 8)), expected, delta=1e-4 * n)

    def test_every_id_after_the_first_costs_the_log_of_the_vocabulary_when_all_are_alike(self):
        model = uniform()
        for n in self.LENGTHS:
            for stride in (8, 5, 1):
                for batch in (1, 3):
                    found = sum(m.scored_nats(model, self.ids(n), stride, batch))
                    self.assertAlmostEqual(found, (n - 1) * math.log(VOCAB), delta=1e-4)

    def test_how_many_windows_go_together_does_not_matter(self):
        model, ids = lively(), self.ids(50)
        sums = [sum(m.scored_nats(model, ids, 3, batch)) for batch in (1, 2, 4, 99)]
        for total in sums:
            self.assertAlmostEqual(total, sums[0], places=3)

    def test_one_id_or_none_costs_nothing(self):
        for engine in (m.reference_engine(), m.interpreted_engine()):
            for ids in ([], [3]):
                self.assertEqual(sum(m.scored_nats(small_model(engine), ids, 8)), 0.0)

    def test_scoring_builds_no_graph_and_leaves_the_engine_recording(self):
        model = small_model()
        for _ in m.scored_nats(model, self.ids(60), 8):
            self.assertTrue(model.engine.recording)
        self.assertTrue(all(p.grad is None for p in model.params.values()))

    def test_a_uniform_model_pays_log2_of_the_vocabulary_a_token(self):
        for n in (2, 9, 33):
            for characters in (1, 40, 77):
                found = m.bits_per_character(uniform(), self.ids(n), characters, 4)
                self.assertAlmostEqual(found, math.log2(VOCAB) * (n - 1) / characters, places=4)

    def test_where_nothing_can_be_scored_it_is_not_a_number(self):
        for ids, characters in (([], 5), ([3], 5), ([3, 4], 0)):
            self.assertTrue(math.isnan(m.bits_per_character(uniform(), ids, characters, 8)))


if __name__ == "__main__":
    unittest.main()
