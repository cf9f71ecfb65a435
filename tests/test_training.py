"""Claims about streams of ids, the windows cut from them, training steps and honest scores."""
import contextlib
import itertools
import math
import random
import unittest
from collections import Counter
from unittest import mock

import macrogpt as m
from test_learning import KINDS
from test_model import PLAIN, VOCAB, lively

SHAPE = m.Shape(n_layer=1, n_embd=8, n_head=2, n_ff=8, block_size=8, rope_base=10_000.0,
                norm_eps=1e-5)


def small_model(engine=None):
    return m.GPT(SHAPE, VOCAB, engine or m.interpreted_engine(), random.Random(1))


def weights(model):
    return {name: (p.data[:], *(moment[:] for moment in p.moments), p.steps) for name, p in model.params.items()}


class TextBecomesAStreamWithoutLoss(unittest.TestCase):
    def test_line_ends_and_random_texts_with_blank_lines_come_back(self):
        rng, plain, learned = random.Random(1), m.EvolvingTokenizer(), m.EvolvingTokenizer()
        learned.learn_merges(["a b\n\na b\n", "the then\nthe\n\n\n the then"] * 5, 30)
        self.assertGreater(learned.version, 5)
        texts = ["".join(rng.choice(("\n", "\n", "\n\n", "a", "the ", "é", " ", "\t", "日",
                                     "<|endoftext|>", "\x00", "\r", "’", "🙂", "a b"))
                         for _ in range(rng.randrange(25))) for _ in range(200)]
        texts += [before + "\n" * n + after for n in range(12) for before in ("", "a")
                  for after in ("", "b")]
        newline, = plain.encode("\n")
        for tokenizer in (plain, learned):
            for text in texts:
                ids = m.text_ids(tokenizer, text)
                self.assertEqual((ids[0], ids[-1]), (m.END_OF_TEXT, m.END_OF_TEXT))
                inner = [newline if i == m.END_OF_TEXT else i for i in ids[1:-1]]
                self.assertEqual(tokenizer.decode(inner), text)

    def test_a_document_is_closed_by_a_blank_line_unless_told_otherwise(self):
        tokenizer = m.EvolvingTokenizer()
        ids = tokenizer.encode("hi\n")
        self.assertEqual(m.document_ids(tokenizer, "hi\n"), [*ids, m.END_OF_TEXT])
        self.assertEqual(m.document_ids(tokenizer, "hi\n", closed=False), ids)
        expected = [m.END_OF_TEXT, *m.document_ids(tokenizer, "one\ntwo\n"),
                    *m.document_ids(tokenizer, "three")]
        self.assertEqual(m.text_ids(tokenizer, "one\ntwo\n\nthree"), expected)


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
            window, = pool.windows(1, 0, rng)  # a piece of the stream of 2 to block + 1 ids
            self.assertEqual(window, list(range(window[0], window[-1] + 1)))
            self.assertTrue(2 <= len(window) <= 9, window)
            for i in window[1:]:
                counts[i] += 1
        return counts[1:]

    def test_the_middle_of_a_stream_is_dealt_exactly_once_an_epoch(self):
        rng = random.Random(3)
        for n in (30, 64, 101):
            pool = self.pool(n)
            for windows in (1, 2, 5, 12, 51, 300):  # after any number of windows
                middle = self.counts(pool, n, windows, rng)[8:n - 9]
                self.assertLessEqual(max(middle) - min(middle), 2 if windows > 1 else 1)

    def test_the_edges_of_a_stream_are_dealt_about_as_often_as_its_middle(self):
        for n in (1, 2, 7, 8, 9, 12, 20, 50):
            counts = self.counts(self.pool(n), n, 2000, random.Random(5))
            self.assertGreater(min(counts), 0.4 * max(counts), (n, counts))

    def test_an_epoch_is_dealt_in_an_order_and_at_a_shift_that_the_seed_decides(self):
        rng = random.Random(6)
        firsts = [w[0] for w in self.pool(400).windows(40, 0, rng)]
        self.assertNotIn(firsts, (sorted(firsts), sorted(firsts, reverse=True)))
        self.assertEqual(len({first % 8 for first in firsts if first}), 1)
        shifts = {self.pool(400).windows(1, 0, rng)[0][0] % 8 for _ in range(100)}
        self.assertEqual(shifts, set(range(8)))
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

    def test_where_nothing_is_new_all_windows_are_of_the_whole_and_of_nothing_there_are_none(self):
        windows = self.pool(50).windows(6, 4, random.Random(11))
        self.assertEqual((len(windows), {2 <= len(w) <= 9 for w in windows}), (6, {True}))
        pool = m.TextPool(8)
        for fresh in (False, True):
            self.assertEqual(pool.windows(4, 2, random.Random(12)), [])
            pool.add([], fresh=fresh)

    def test_text_that_is_added_later_is_dealt_too(self):
        pool, rng = self.pool(40), random.Random(13)
        pool.windows(3, 0, rng)
        pool.add(range(41, 81))
        counts = self.counts(pool, 80, 100, rng)
        self.assertGreater(min(counts[45:70]), 0)


class StepsLearn(unittest.TestCase):
    CONFIG = m.Config(beta1=0.9, beta2=0.99)

    def step(self, model, windows, rate=0.02, guard=None, drop=0.0):
        return m.train_step(model, self.CONFIG, windows, rate, drop, random.Random(1), guard)

    def test_the_same_seed_learns_the_same_while_what_is_frozen_stays(self):
        models = small_model(), small_model()
        for model in models:
            model.append_delta(2, random.Random(2))
            before = weights(model)
            losses = [self.step(model, [[1, 2, 3, 1, 2, 3]], drop=0.1).loss for _ in range(30)]
            self.assertEqual(weights(model), before)
            self.assertLess(losses[-1], losses[0] - 0.3)
        a, b = ([p.data for p in model.delta_params()] for model in models)
        self.assertEqual(a, b)

    def test_the_report_holds_the_loss_before_the_step_and_the_norm_of_its_gradient(self):
        model = lively(m.interpreted_engine(), shape=SHAPE)
        windows = [[1, 2, 3, 4], [5, 6]]
        expected = model.loss(windows)
        m.backward(expected)
        norm = m.gradient_norm(model.trainable())
        report = self.step(model, windows)  # the gradients left above must not count
        self.assertEqual((report.loss, report.norm), (expected.data, norm))
        self.assertEqual((report.applied, report.tokens), (True, 4))
        self.assertEqual({p.grad for p in model.params.values()}, {None})

    def test_a_loss_or_a_gradient_that_is_not_finite_changes_nothing_and_is_reported(self):
        @contextlib.contextmanager
        def spoiled(model, bad):
            model.params["0.qkv"].grad[3] = bad
            yield
        for make, bad, sound in itertools.product(PLAIN, (math.nan, math.inf, -math.inf),
                                                  (False, True)):
            model = small_model(make())
            if not sound:
                model.params["0.out"].data[3] = bad
            before = repr(weights(model))  # NaN is not equal to itself, its text is
            report = self.step(model, [[1, 2, 3, 4, 5], [5, 6, 7]],
                               guard=spoiled(model, bad) if sound else None)
            self.assertEqual((report.applied, math.isfinite(report.loss)), (False, sound))
            self.assertEqual((report.tokens, report.norm), (6, math.inf))
            self.assertEqual(repr(weights(model)), before)

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


class ScoresAndReplay(unittest.TestCase):
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

    def test_the_sum_is_that_of_every_id_scored_alone_however_many_windows_go_together(self):
        model, routed = (lively(m.interpreted_engine(), shape=SHAPE) for _ in range(2))
        routed.append_delta(2, random.Random(1))
        routed.router = lambda ids: 0
        for n, stride in itertools.product((0, 1, 2, 8, 9, 10, 17, 18, 25), (8, 3, 1)):
            expected = sum(self.naive(model, self.ids(n), stride))
            for one, batch in itertools.product((model, routed), (1, 4, 99)):
                with mock.patch.object(m, "ROUTE_FIRST", 3):  # the first window is read twice
                    found = sum(m.scored_nats(one, self.ids(n), stride, batch))
                self.assertAlmostEqual(found, expected, delta=1e-4 * n, msg=(n, stride, batch))

    def test_bits_per_character_are_the_bits_of_all_ids_over_all_characters(self):
        uniform, bits = m.GPT(SHAPE, VOCAB, m.interpreted_engine(), None), math.log2(VOCAB) * 32
        with mock.patch.object(m, "cross_entropy", side_effect=m.cross_entropy) as spy:
            found = m.bits_per_character(uniform, self.ids(33), 77, 4)
        self.assertAlmostEqual(found, bits / 77, 4)
        for call in spy.call_args_list:
            self.assertEqual(call[0][0].sources, (), "to score builds no graph")
        for ids, characters in (([], 5), ([3], 5), ([3, 4], 0)):  # nothing can be scored
            self.assertTrue(math.isnan(m.bits_per_character(uniform, ids, characters, 8)))

    def test_the_router_is_asked_for_what_stands_before_and_never_for_what_is_to_be_read(self):
        seen, told, model = [], [], small_model()
        model.append_delta(2, random.Random(1))
        model.router = lambda before: seen.append(list(before)) or 1
        for at, (layer, _) in enumerate(m.predicted_rows(model, list(range(VOCAB)), 4), 1):
            told.append(layer)
            self.assertLess(max(seen[-1]), at)
        self.assertEqual((len(seen) > 1, set(told)), (True, {1}))

    def test_old_new_and_rare_are_repeated_alike_and_no_window_twice_too_soon(self):
        documents = [("corpus", list(range(1, 161))), ("chat", [901, 902, 903])]
        replay, rng = m.Replay(documents, 5), random.Random(3)
        met = Counter(replay.window(rng)[1] for _ in range(9 * 8))
        self.assertEqual(sum(met.pop(x) for x in list(met) if x > 900), 8)  # one band of nine
        self.assertEqual((len(met), set(met.values())), (32, {2}))
        self.assertEqual(m.Replay([], 5).window(random.Random(1)), [])


class RoutersChoose(unittest.TestCase):
    def setUp(self):
        self.tokenizer = m.EvolvingTokenizer()
        self.router = m.Router(self.tokenizer)
        for layer in range(3):
            if layer:
                self.router.append()
            self.router.learn(layer, [self.text(layer, 500)])

    def text(self, layer, count, seed=0):
        words = list(KINDS.values())[layer].split(" ")
        return " ".join(random.Random(f"{layer} {seed}").choices(words, k=count))

    def chosen(self):
        return [self.router.choose(self.text(layer, 30, 9).encode()) for layer in range(3)]

    def test_a_text_calls_for_the_layer_that_has_learned_its_kind_or_else_for_the_base(self):
        for layer, seed in itertools.product(range(3), range(1, 6)):
            text = self.text(layer, 30, seed)
            self.assertEqual(self.router.choose(text.encode()), layer, text)
            self.assertEqual(self.router(self.tokenizer.encode(text)), layer, text)
        for raw in (b"", b"x", "žluťoučký kůň".encode(), b"qqqq zzzz jjjj"):
            self.assertEqual(self.router.choose(raw), 0)

    def test_a_layer_without_text_is_never_chosen_until_it_takes_over_that_of_the_base(self):
        self.router.append()
        self.assertEqual(self.chosen(), [0, 1, 2])
        self.assertEqual(self.router.scores(b"the gull")[3], -math.inf)
        self.router.refine(3)
        self.assertEqual(self.chosen(), [3, 1, 2])

    def test_a_delta_must_fit_better_than_the_base_by_a_margin(self):
        twin = m.Router(self.tokenizer, [self.router.counts[1], self.router.counts[1]])
        base, delta = twin.scores(b"17 + 25 = 42")
        self.assertAlmostEqual(base - delta, m.ROUTE_MARGIN)
        self.assertEqual(twin.choose(b"17 + 25 = 42"), 0)

    def test_truncated_it_knows_nothing_of_the_layers_that_went(self):
        self.router.truncate(2)
        self.assertEqual(self.chosen(), [0, 1, 0])
        self.assertEqual(len(self.router.scores(b"STAND")), 2)
        self.router.append()
        self.router.learn(2, [self.text(2, 500)])
        self.assertEqual(self.chosen(), [0, 1, 2])

    def test_what_was_kept_or_stored_comes_back(self):
        past, before = self.router.copied(), self.router.scores(b"the gull")
        self.router.learn(1, ["the gull " * 50])
        self.assertNotEqual(self.router.scores(b"the gull"), before)
        self.router.restore(past)
        stored = m.load_router(self.tokenizer, m.pack_router(self.router))
        for router in (self.router, stored):
            self.assertEqual(router.scores(b"the gull"), before)
