"""Claims about streams of ids, the windows cut from them, training steps and honest scores."""
import contextlib
import itertools
import math
import random
import unittest
from collections import Counter
from unittest import mock

import macrogpt as m
from support import Case
from test_learning import KINDS, text_of
from test_model import PLAIN, SHAPE, VOCAB, lively, nats_of, some_ids


def weights(model):
    """Return a copy of all that training may change in a model's base."""
    return [pack(list(model.params.values())) for pack in (m.pack_params, m.pack_moments)]


class TextBecomesAStreamWithoutLoss(unittest.TestCase):
    def test_line_ends_and_random_texts_with_blank_lines_come_back(self):
        rng, plain, learned = random.Random(1), m.EvolvingTokenizer(), m.EvolvingTokenizer()
        learned.learn_merges(["a b\n\na b\n", "the then\nthe\n\n\n the then"] * 5, 30)
        self.assertGreater(learned.version, 5)
        texts = ["".join(rng.choices(("\n", "\n", "\n\n", "a", "the ", "é", " ", "\t", "日", "\r",
                                      "<|endoftext|>", "\x00", "’", "🙂", "a b"),
                                     k=rng.randrange(25))) for _ in range(200)]
        texts += [before + "\n" * n + after for n in range(12) for before in ("", "a")
                  for after in ("", "b")]
        newline, = plain.encode("\n")
        for tokenizer, text in itertools.product((plain, learned), texts):
            ids = m.text_ids(tokenizer, text)
            self.assertEqual((ids[0], ids[-1]), (m.END_OF_TEXT, m.END_OF_TEXT))
            inner = [newline if i == m.END_OF_TEXT else i for i in ids[1:-1]]
            self.assertEqual(tokenizer.decode(inner), text)

    def test_a_document_is_closed_by_a_blank_line_unless_told_otherwise(self):
        tokenizer, end = m.EvolvingTokenizer(), [m.END_OF_TEXT]
        one, two = map(tokenizer.encode, ("one\ntwo\n", "three"))
        self.assertEqual(m.document_ids(tokenizer, "three", closed=False), two)
        self.assertEqual(m.text_ids(tokenizer, "one\ntwo\n\nthree"), end + one + end + two + end)


class PoolsDealTheirText(unittest.TestCase):
    def pool(self, n, fresh=0):
        """A pool whose stream is 0, 1, 2, … n: an id tells its place. The last are fresh."""
        pool = m.TextPool(8)
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
        def firsts(seed, count=40):
            return [w[0] for w in self.pool(400).windows(count, 0, random.Random(seed))]
        found = firsts(6)
        self.assertNotIn(found, (sorted(found), sorted(found, reverse=True)))
        self.assertEqual(len({first % 8 for first in found if first}), 1)
        self.assertEqual({firsts(seed, 1)[0] % 8 for seed in range(100)}, set(range(8)))
        self.assertEqual(firsts(6), found)
        self.assertNotEqual(firsts(7), found)

    def test_fresh_windows_are_of_new_text_alone_or_where_there_is_none_of_the_whole(self):
        for fresh in (20, 0):
            windows = self.pool(100, fresh=fresh).windows(12, 5, random.Random(9))
            new = [all(i == m.END_OF_TEXT or i > 80 for i in window) for window in windows]
            self.assertEqual((len(new), all(new[:5]), all(new[5:])), (12, fresh > 0, False))
        pool = m.TextPool(8)
        pool.add([], fresh=True)
        self.assertEqual(pool.windows(4, 2, random.Random(12)), [])

    def test_text_that_is_added_later_is_dealt_too(self):
        pool, rng = self.pool(40), random.Random(13)
        pool.windows(3, 0, rng)
        pool.add(range(41, 81))
        self.assertGreater(min(self.counts(pool, 80, 100, rng)[45:70]), 0)


class StepsLearn(unittest.TestCase):
    def step(self, model, windows, guard):
        return m.train_step(model, m.Config(), windows, 0.02, 0.0, random.Random(1), guard)

    def test_the_report_holds_loss_and_norm_before_the_update_which_alone_is_inside_the_guard(self):
        model, windows, seen = lively(m.interpreted_engine()), [[1, 2, 3, 4], [5, 6]], []
        start, expected = weights(model), model.loss(windows)
        m.backward(expected)
        norm = m.gradient_norm(model.trainable())

        @contextlib.contextmanager
        def guard():
            seen.append((weights(model) == start, model.params["0.qkv"].grad is not None))
            yield
            seen.append(weights(model) == start)
        report = self.step(model, windows, guard())  # the gradients left must not count
        self.assertEqual(report, (expected.data, 4, norm, True))
        self.assertEqual(seen, [(True, True), False])
        self.assertEqual({p.grad for p in model.params.values()}, {None})

    def test_a_loss_or_a_gradient_that_is_not_finite_changes_nothing_and_is_reported(self):
        @contextlib.contextmanager
        def spoiled(model, bad):
            model.params["0.qkv"].grad[3] = bad
            yield
        for make, bad, sound in itertools.product(PLAIN, (math.nan, math.inf, -math.inf),
                                                  (False, True)):
            model = lively(make())
            if not sound:
                model.params["0.out"].data[3] = bad
            before = weights(model)
            report = self.step(model, [[1, 2, 3, 4, 5], [5, 6, 7]],
                               spoiled(model, bad) if sound else None)
            self.assertEqual(math.isfinite(report.loss), sound)
            self.assertEqual(report[1:], (6, math.inf, False))
            self.assertEqual(weights(model), before)


class ScoresAndReplay(Case):
    def naive(self, model, ids, stride):
        """Each id alone, from the rows of the first window that reaches it."""
        nats = []
        for place, token in enumerate(ids[1:], 1):
            start = 0
            while start + 8 < place:
                start += stride
            if start:
                self.assertGreater(place - start, 8 - stride)
            nats.append(nats_of(model.logits(ids[start:place]).row(place - start - 1), token))
        return nats

    def test_scores_are_those_of_every_id_alone_however_many_windows_go_together(self):
        model, routed = (lively(m.interpreted_engine()) for _ in range(2))
        routed.append_delta(2, random.Random(1))
        routed.router = lambda ids: 0
        for n, stride in itertools.product((0, 1, 2, 8, 9, 10, 17, 18, 25), (8, 3, 1)):
            ids = some_ids(n)
            expected = self.naive(model, ids, stride)
            for one, batch in itertools.product((model, routed), (1, 4, 99)):
                with mock.patch.object(m, "ROUTE_FIRST", 3):  # the first window is read twice
                    found = sum(m.scored_nats(one, ids, stride, batch))
                    rows = [row for _, row in m.predicted_rows(one, ids, stride)]
                self.assertAlmostEqual(found, sum(expected), delta=1e-4 * n, msg=(n, stride, batch))
                self.assert_near(list(map(nats_of, rows, ids[1:])), expected, 1e-4, (n, stride))

    def test_bits_per_character_are_the_bits_of_all_ids_over_all_characters(self):
        uniform, bits = m.GPT(SHAPE, VOCAB, m.interpreted_engine(), None), math.log2(VOCAB) * 32
        with mock.patch.object(m, "cross_entropy", side_effect=m.cross_entropy) as spy:
            found = m.bits_per_character(uniform, some_ids(33), 77, 4)
        self.assertAlmostEqual(found, bits / 77, 4)
        for call in spy.call_args_list:
            self.assertEqual(call[0][0].sources, (), "to score builds no graph")
        for ids, characters in (([], 5), ([3], 5), ([3, 4], 0)):  # nothing can be scored
            self.assertTrue(math.isnan(m.bits_per_character(uniform, ids, characters, 8)))

    def test_the_router_is_asked_for_what_stands_before_and_never_for_what_is_to_be_read(self):
        seen, model = [], lively(m.interpreted_engine())
        model.append_delta(2, random.Random(1))
        model.router = lambda before: seen.append(list(before)) or 1
        for at, (layer, _) in enumerate(m.predicted_rows(model, list(range(VOCAB)), 4), 1):
            self.assertEqual((layer, max(seen[-1]) < at), (1, True))
        self.assertGreater(len(seen), 1)

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
            self.router.append()
            self.router.learn(layer, [self.text(layer, 0, 55)])
        self.router.truncate(3)

    @staticmethod
    def text(layer, seed, lines=3):
        return text_of(list(KINDS)[layer], lines, seed)

    def chosen(self, seed=9):
        """Return whom a text of each kind calls for; a router made anew must know the same."""
        raw = b"the gull and STAND AND UNFOLD 17 + 25"
        self.assertEqual(self.router.scores(raw), self.router.copied().scores(raw))
        return [self.router.choose(self.text(layer, seed).encode()) for layer in range(3)]

    def test_a_text_calls_for_the_layer_that_has_learned_its_kind_or_else_for_the_base(self):
        for seed in range(1, 6):
            self.assertEqual(self.chosen(seed), [0, 1, 2])
            for layer in range(3):
                ids = self.tokenizer.encode(self.text(layer, seed))
                self.assertEqual(self.router(ids), layer)
        for raw in (b"", b"x", "žluťoučký kůň".encode(), b"qqqq zzzz jjjj"):
            self.assertEqual(self.router.choose(raw), 0)

    def test_without_text_a_layer_is_never_chosen_nor_one_that_went(self):
        for _ in range(2):
            self.assertEqual(self.chosen(), [0, 1, 2])
            self.router.append()
        self.assertEqual(self.router.scores(b"the gull")[3], -math.inf)
        self.router.refine(3)
        self.assertEqual(self.chosen(), [3, 1, 2], "it has taken over that of the base")
        self.router.truncate(2)
        self.assertEqual((self.chosen()[1:], len(self.router.margins)), ([1, 0], 2))
        self.router.append()
        self.router.learn(2, [self.text(2, 0, 55)])
        self.assertEqual(self.chosen()[1:], [1, 2])

    def test_a_delta_must_fit_better_than_the_base_by_a_margin(self):
        twin = m.Router(self.tokenizer, [self.router.counts[1], self.router.counts[1]])
        base, delta = twin.scores(b"17 + 25 = 42")
        self.assertAlmostEqual(base - delta, m.ROUTE_MARGIN)
        self.assertEqual(twin.choose(b"17 + 25 = 42"), 0)

    def test_what_was_kept_or_stored_comes_back(self):
        self.router.margins[2] = m.SHY_MARGINS[0]
        past, before = self.router.copied(), self.router.scores(b"the gull")
        self.router.learn(1, ["the gull " * 50])
        self.assertNotEqual(self.router.scores(b"the gull"), before)
        self.router.restore(past)
        stored = m.load_router(self.tokenizer, m.pack_router(self.router))
        for router in (self.router, stored):
            self.assertEqual(router.scores(b"the gull"), before)
