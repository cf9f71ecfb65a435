"""Claims about the counts that learn in one reading and the one voice."""
import json
import math
import random
import shutil
import tempfile
import threading
import unittest
import unittest.mock
from array import array
from pathlib import Path

import macrogpt as m
from support import TINY, Folder, run_inside

VOCAB = 40


def text_of(rng, length, vocab=VOCAB):
    """Return ids with structure: a walk that mostly follows fixed steps."""
    steps = [[rng.randrange(vocab) for _ in range(3)] for _ in range(vocab)]
    ids = [rng.randrange(vocab)]
    while len(ids) < length:
        ids.append(rng.choice(steps[ids[-1]]) if rng.random() < 0.9 else rng.randrange(vocab))
    return ids


def naive_counts(ids, order, lowest=0):
    """Return {context: {id: count}} by update exclusion, written from its definition."""
    tables = {}
    for at, token in enumerate(ids):
        for k in range(min(order, at), lowest - 1, -1):
            counts = tables.setdefault(tuple(ids[at - k:at]), {})
            known = token in counts
            counts[token] = counts.get(token, 0) + 1
            if known:
                break
    return tables


def naive_discounts(tables, k):
    """Return D0 to D3 by Chen and Goodman's formula, with the memory's prior."""
    seen = [c for key, counts in tables.items() if len(key) == k for c in counts.values()]
    n1, n2, n3, n4 = (seen.count(c) + prior for c, prior in zip((1, 2, 3, 4), (30, 10, 5, 3)))
    y = n1 / (n1 + 2 * n2)
    return [0.0, *(max(0.05, d) for d in (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2,
                                         3 - 4 * y * n4 / n3))]


def naive_chances(tables, order, history, vocab, lowest=0):
    """Return p of every id: p ← p·ΣD/n + (c − D)/n from the shortest context up."""
    p = [1.0 / vocab] * vocab
    for k in range(lowest, min(order, len(history)) + 1):
        counts = tables.get(tuple(history[len(history) - k:]))
        if counts is None:
            break
        off, n = naive_discounts(tables, k), sum(counts.values())
        back = sum(off[min(c, 3)] for c in counts.values()) / n
        p = [x * back for x in p]
        for token, c in counts.items():
            p[token] += (c - off[min(c, 3)]) / n
    return p


def tables_of(memory):
    """Return an NgramMemory's tables as naive_counts gives them."""
    return {key: dict(found) if type(found) is dict else {found: 1}
            for table in memory.tables for key, found in table.items()}


def learned(ids, order=3, **options):
    memory = m.NgramMemory(order, **options)
    memory.learn(ids)
    return memory


def chances(expectation, vocab=VOCAB):
    return [math.exp(expectation.log_p(token)) for token in range(vocab)]


class CountsLearnInOneReading(unittest.TestCase):
    def test_the_tables_are_those_of_the_definition(self):
        for seed, order, lowest in ((1, 3, 0), (2, 1, 0), (3, 5, 1), (4, 2, 0)):
            ids = text_of(random.Random(seed), 400)
            memory = learned(ids, order, lowest=lowest)
            naive = naive_counts(ids, order, lowest)
            self.assertEqual(tables_of(memory), naive)
            self.assertEqual(memory.size, sum(map(len, naive.values())))
            for k in range(lowest, order + 1):
                for found, wanted in zip(memory.discounts(k), naive_discounts(naive, k)):
                    self.assertAlmostEqual(found, wanted, 12)

    def test_a_text_learned_in_pieces_counts_as_one_learned_whole(self):
        rng = random.Random(5)
        ids = text_of(rng, 500)
        memory, at = m.NgramMemory(3), 0
        while at < len(ids):
            size = rng.randint(1, 9)
            memory.learn(ids[at:at + size], ids[max(0, at - 7):at])
            at += size
        whole = learned(ids)
        self.assertEqual(tables_of(memory), tables_of(whole))
        self.assertEqual(memory.tally, whole.tally)
        history = tuple(ids[-3:])
        self.assertEqual(chances(memory.expect(history, VOCAB)),
                         chances(whole.expect(history, VOCAB)))

    def test_a_known_answer_by_hand(self):
        memory = learned([1, 2, 1, 2, 1], order=1)
        self.assertEqual(tables_of(memory), {(): {1: 2, 2: 1}, (1,): {2: 2}, (2,): {1: 2}})
        y = 31 / (31 + 2 * 11)                        # after nothing: one count of 1, one of 2
        d1, d2 = 1 - 2 * y * 11 / 31, 2 - 3 * y * 5 / 11
        p = (d1 + d2) / 3 / 4 + (1 - d1) / 3          # of id 2, with 4 ids in all
        y = 30 / (30 + 2 * 12)
        d2 = 2 - 3 * y * 5 / 12                       # after one id: two counts of 2
        expected = p * d2 / 2 + (2 - d2) / 2
        self.assertAlmostEqual(math.exp(memory.expect((1,), 4).log_p(2)), expected, 6)

    def test_expectations_are_those_of_the_definition_and_sum_to_1(self):
        for order, lowest in ((3, 0), (1, 0), (5, 1)):
            rng = random.Random(order)
            ids = text_of(rng, 600)
            memory, naive = learned(ids, order, lowest=lowest), naive_counts(ids, order, lowest)
            for _ in range(60):
                at = rng.randrange(len(ids))
                history = tuple(ids[max(0, at - order):at])
                if rng.random() < 0.3:
                    history = tuple(rng.randrange(VOCAB) for _ in range(order))
                found = chances(memory.expect(history, VOCAB))
                self.assertAlmostEqual(sum(found), 1.0, 5)
                for a, b in zip(found, naive_chances(naive, order, history, VOCAB, lowest)):
                    self.assertAlmostEqual(a, b, 6)

    def test_nothing_learned_expects_everything_alike(self):
        for memory in (m.NgramMemory(), m.copyist()):
            for history in ((), (1, 2, 3)):
                expectation = memory.expect(history, 8)
                self.assertEqual(expectation.seen, 0)
                for chance in chances(expectation, 8):
                    self.assertAlmostEqual(chance, 1 / 8)

    def test_reach_is_the_longest_context_known_and_seen_its_count(self):
        memory = learned([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3])
        for history, reach, seen in (((1, 2, 3), 3, 2), ((9, 2, 3), 2, 2), ((9, 9, 3), 1, 2),
                                     ((9, 9, 9), 0, 7), ((), 0, 7)):
            found = memory.expect(history, 10)
            self.assertEqual((found.reach, found.seen), (reach, seen), history)

    def test_one_reading_is_enough_to_go_on_with_a_sentence(self):
        memory = learned(text_of(random.Random(6), 300))
        memory.learn([30, 31, 32, 33, 34])
        for history, token in (((30, 31, 32), 33), ((31, 32, 33), 34)):
            found = chances(memory.expect(history, VOCAB))
            self.assertEqual(max(range(VOCAB), key=found.__getitem__), token)

    def test_what_is_learned_later_is_expected_at_once(self):
        memory = learned([1, 2, 3] * 5)
        before = memory.expect((2,), 8).log_p(7)
        memory.learn([2, 7])
        self.assertGreater(memory.expect((2,), 8).log_p(7), before + 1.0)

    def test_what_is_learned_between_two_looks_still_sums_to_1_and_is_nearly_counted_anew(self):
        rng = random.Random(10)
        ids = text_of(rng, 3000)
        memory = learned(ids[:2000])
        for at in range(2000, 3000):
            memory.expect(tuple(ids[at - 3:at]), VOCAB)
            memory.learn(ids[at:at + 1], ids[at - 3:at])
        anew = learned(ids)
        self.assertEqual(tables_of(memory), tables_of(anew))
        for _ in range(50):
            history = tuple(rng.choices(range(VOCAB), k=3))
            found = chances(memory.expect(history, VOCAB))
            self.assertAlmostEqual(sum(found), 1.0, 5)
            for a, b in zip(found, chances(anew.expect(history, VOCAB))):
                self.assertAlmostEqual(a, b, delta=0.12 * b + 0.001)

    def test_one_thread_may_count_while_another_asks(self):
        rng = random.Random(11)
        memory, texts = learned(text_of(rng, 200)), [text_of(rng, 50) for _ in range(200)]
        counting = threading.Thread(target=lambda: [memory.learn(ids) for ids in texts])
        counting.start()
        while counting.is_alive():
            history = tuple(rng.choices(range(VOCAB), k=3))
            self.assertAlmostEqual(sum(chances(memory.expect(history, VOCAB))), 1.0, 5)
        counting.join()

    def test_it_stays_within_its_bound_and_still_sums_to_1(self):
        rng = random.Random(7)
        memory = m.NgramMemory(3, max_counts=1000)
        for _ in range(40):
            memory.learn(text_of(rng, 200))
            self.assertLessEqual(memory.size, 1000)
            self.assertEqual(memory.size, sum(map(len, tables_of(memory).values())))
        for k in range(4):
            counts = [c for key, found in tables_of(memory).items() if len(key) == k
                      for c in found.values()]
            self.assertEqual(memory.tally[k][1:5], [counts.count(c) for c in range(1, 5)])
        for _ in range(20):
            history = tuple(rng.randrange(VOCAB) for _ in range(3))
            self.assertAlmostEqual(sum(chances(memory.expect(history, VOCAB))), 1.0, 5)

    def test_under_its_bound_what_was_met_once_goes_before_what_was_met_often(self):
        memory = m.NgramMemory(3, max_counts=1000)
        for _ in range(5):
            memory.learn([1, 2, 3, 4])
        rng = random.Random(8)
        memory.learn([rng.randrange(5, 400) for _ in range(320)])
        self.assertIn((1, 2, 3), memory.tables[3])


class VoiceCase(unittest.TestCase):
    def setUp(self):
        self.rng = random.Random(1)
        self.engine = m.choose_engine("python")
        self.ids = text_of(self.rng, 600)
        self.counts = learned(self.ids)
        self.mixer = m.Mixer(3)

    def logits(self):
        return array("f", [self.rng.gauss(0.0, 2.0) for _ in range(VOCAB)])

    def mixture(self, copied=()):
        return m.Mixture(self.engine, self.counts, self.mixer, m.copyist([copied]))


def naive_mixture(mixture, logits, history):
    """Return ln p of every id: the experts' ln p, weighed, summed, and made to sum to 1."""
    weights = mixture.mixer.chosen(mixture.mixer.situation(
        mixture.counts.expect(history[-3:], VOCAB), mixture.copy.expect(history[-5:], VOCAB)))
    counts = mixture.counts.expect(history[-3:], VOCAB)
    pairs = m.NgramMemory(1)
    pairs.tables, pairs.tally = mixture.counts.tables, mixture.counts.tally
    pairs, copied = pairs.expect(history[-1:], VOCAB), mixture.copy.expect(history[-5:], VOCAB)
    top = math.log(sum(map(math.exp, logits)))
    rows = [[x - top for x in logits], *([e.log_p(i) for i in range(VOCAB)]
                                         for e in (pairs, counts, copied))]
    scores = [sum(w * row[i] for w, row in zip(weights, rows)) for i in range(VOCAB)]
    total = math.log(sum(map(math.exp, scores)))
    return [score - total for score in scores], rows, weights


class OneVoiceOfThree(VoiceCase):
    def each(self):
        """Yield mixtures at places in the text, with and without something to copy."""
        for at in (0, 1, 5, 77, 250, 401):
            for copied in ((), self.ids[max(0, at - 40):at + 9]):
                mixture, logits = self.mixture(copied), self.logits()
                history = tuple(self.ids[max(0, at - 8):at])
                mixture.mix(logits, history)
                yield mixture, logits, history

    def test_its_chances_are_the_weighed_sum_of_logs_and_sum_to_1(self):
        for mixture, logits, history in self.each():
            wanted, _, _ = naive_mixture(mixture, logits, history)
            found = [-mixture.nats(i) for i in range(VOCAB)]
            self.assertAlmostEqual(sum(map(math.exp, found)), 1.0, 5)
            for a, b in zip(found, wanted):
                self.assertAlmostEqual(a, b, 4)

    def test_slopes_are_those_of_ln_p_by_the_weights(self):
        for mixture, logits, history in self.each():
            token = self.rng.randrange(VOCAB)
            wanted, rows, _ = naive_mixture(mixture, logits, history)
            for slope, row in zip(mixture.slopes(token), rows):
                mean = sum(math.exp(p) * x for p, x in zip(wanted, row))
                self.assertAlmostEqual(slope, row[token] - mean, 3)

    def test_shares_are_what_each_expert_gives_the_token_over_its_likeliest_rival(self):
        for mixture, logits, history in self.each():
            token = self.rng.randrange(VOCAB)
            wanted, rows, weights = naive_mixture(mixture, logits, history)
            rival = max((i for i in range(VOCAB) if i != token), key=wanted.__getitem__)
            shares = mixture.shares(token)
            self.assertAlmostEqual(sum(shares), wanted[token] - wanted[rival], 3)
            for share, weight, row in zip(shares, weights, rows):
                self.assertAlmostEqual(share, weight * (row[token] - row[rival]), 3)

    def test_a_step_of_learning_makes_what_came_likelier(self):
        for mixture, logits, history in self.each():
            token = self.rng.randrange(VOCAB)
            before = mixture.nats(token)
            mixture.learn(token)
            mixture.mix(logits, history)
            self.assertLess(mixture.nats(token), before)

    def test_weights_learn_whom_to_trust(self):
        rng = random.Random(3)
        text = text_of(rng, 400)
        self.counts = learned(text_of(rng, 400))  # of another walk: of no use

        def reading(learn):
            mixture, nats = self.mixture(), 0.0
            for at in range(1, len(text)):
                knowing = array("f", [0.0] * VOCAB)
                knowing[text[at]] = 3.0
                mixture.mix(knowing, tuple(text[max(0, at - 8):at]))
                nats += mixture.nats(text[at])
                if learn:
                    mixture.learn(text[at])
            return nats
        before = reading(False)
        for _ in range(3):
            reading(True)
        self.assertLess(reading(False), 0.8 * before)

    def test_the_copyist_goes_on_with_the_longest_match(self):
        copied = m.copyist([[1, 2, 3, 4, 5], [9, 3, 4, 6]])
        found = chances(copied.expect((1, 2, 3, 4), 12), 12)
        self.assertEqual(max(range(12), key=found.__getitem__), 5)
        found = chances(copied.expect((0, 9, 3, 4), 12), 12)
        self.assertEqual(max(range(12), key=found.__getitem__), 6)
        self.assertEqual(copied.expect((7, 8), 12).special, {})

    def test_a_voice_is_the_same_on_both_engines(self):
        native = m.choose_engine("", True)
        for mixture, logits, history in self.each():
            other = m.Mixture(native, self.counts, self.mixer, mixture.copy)
            other.mix(logits, history)
            for token in range(0, VOCAB, 7):
                self.assertAlmostEqual(other.nats(token), mixture.nats(token), 4)
                for a, b in zip(other.shares(token), mixture.shares(token)):
                    self.assertAlmostEqual(a, b, 3)


class WeightsAreKept(VoiceCase):
    def test_a_mixer_comes_back_as_it_was(self):
        mixture = self.mixture()
        for at in range(1, 50):
            mixture.mix(self.logits(), tuple(self.ids[:at]))
            mixture.learn(self.ids[at])
        again = m.Mixer(3)
        self.assertTrue(again.load(self.mixer.numbers()))
        self.assertEqual(again.numbers(), self.mixer.numbers())

    def test_weights_of_another_form_or_damaged_change_nothing(self):
        fresh, numbers = self.mixer.numbers(), self.mixer.numbers()
        for bad in ([], numbers[:-1], m.Mixer(2).numbers(), [math.nan] * len(numbers)):
            self.assertFalse(self.mixer.load(bad))
            self.assertEqual(self.mixer.numbers(), fresh)


class CountsAreKept(unittest.TestCase):
    def test_stored_counts_come_back_as_they_were_and_go_on_learning(self):
        for order, lowest in ((3, 0), (1, 0), (5, 1)):
            rng = random.Random(order)
            ids = text_of(rng, 800)
            memory = learned(ids, order, lowest=lowest)
            again = m.NgramMemory.unpack(memory.pack())
            for one in (memory, again):
                one.learn([1, 2, 3, 1, 2, 3], ids)
            self.assertEqual(again.tables, memory.tables)
            self.assertEqual((again.tally, again.size), (memory.tally, memory.size))
            history = tuple(ids[-order:])
            self.assertEqual(chances(again.expect(history, VOCAB)),
                             chances(memory.expect(history, VOCAB)))

    def test_nothing_learned_is_stored_as_nothing(self):
        again = m.NgramMemory.unpack(m.NgramMemory(2).pack())
        self.assertEqual((again.size, again.order, again.tables), (0, 2, [{}, {}, {}]))

    def test_what_is_no_stored_counts_is_refused_with_a_value_error(self):
        good = learned(list(range(50))).pack()
        raw = m.zlib.decompress(good)
        for bad in (b"", b"junk", good[:-7], m.zlib.compress(b"{}\n"), m.zlib.compress(b"[]\n"),
                    m.zlib.compress(raw[:-4]), m.zlib.compress(raw + b"\0" * 4),
                    m.zlib.compress(raw.replace(b"ngrams 1", b"ngrams 9"))):
            with self.assertRaises(ValueError):
                m.NgramMemory.unpack(bad)


def document(text, closed=True):
    return m.Document(tuple(text.splitlines()), closed)


class TheEntriesAreCounted(unittest.TestCase):
    def setUp(self):
        self.memory, self.tokenizer = m.Memory(":memory:"), m.EvolvingTokenizer()
        self.addCleanup(self.memory.close)
        self.config, self.follower = m.Config(), m.EntryCounts()
        for i in range(30):
            self.memory.add_entry("corpus", document(f"line {i} of a ferry\nand {i * i} more",
                                                     closed=i % 3 > 0))

    def follow(self, follower=None):
        return (follower or self.follower).follow(self.memory, self.tokenizer, self.config)

    def assert_as_counted_anew(self):
        found, anew = self.follow(), self.follow(m.EntryCounts())
        self.assertEqual(found.tables, anew.tables)
        self.assertEqual(found.tally, anew.tally)

    def holds(self, text):
        """Return whether the counts have met these characters one after the other."""
        ids = self.tokenizer.encode(text)
        tables = tables_of(self.follow())
        return all(ids[i + 3] in tables.get(tuple(ids[i:i + 3]), {}) for i in range(len(ids) - 3))

    def test_what_is_added_is_counted_as_if_it_had_always_been_there(self):
        self.follow()
        self.memory.add_entry("chat", document("the heron sleeps by the mill"))
        self.assertTrue(self.holds("heron sleeps"))
        self.assert_as_counted_anew()

    def test_nothing_held_out_is_counted(self):
        self.memory.add_entry("corpus", document("quizzical xylophones"), held_out=True)
        self.assertFalse(self.holds("xylophone"))
        self.follow()
        self.memory.add_entry("corpus", document("jumping wizards"), held_out=True)
        self.assertFalse(self.holds("wizard"))

    def keep_however_few(self):
        """Count what there is, and store the counts."""
        with unittest.mock.patch.object(m, "KEPT_COUNT_CHARS", 1):
            self.follow()
            self.follower.keep(self.memory)

    def test_what_is_forgotten_is_counted_no_more_even_where_its_id_is_given_again(self):
        self.memory.add_entry("taught", document("my cat is called Biscuit"))
        self.assertTrue(self.holds("Biscuit"))
        self.follower.keep(self.memory)
        m.forget(self.memory, "my cat is called Biscuit")
        self.memory.add_entry("taught", document("rain at noon"))
        self.assertFalse(self.holds("Biscuit"))
        self.assertTrue(self.holds("at noon"))
        self.assert_as_counted_anew()

    def test_stored_counts_go_when_an_entry_is_taken_out(self):
        self.keep_however_few()
        self.assertIn("ngrams", self.memory.layers())
        self.memory.remove_entries("corpus", [document("line 4 of a ferry\nand 16 more").key])
        self.assertNotIn("ngrams", self.memory.layers())

    def test_merges_learned_later_count_everything_anew(self):
        self.follow()
        self.tokenizer.learn_merges(["a ferry and more"] * 9, 5)
        self.assertTrue(self.holds("of a ferry"))
        self.assert_as_counted_anew()

    def test_stored_counts_are_taken_up_and_what_came_since_is_added(self):
        self.keep_however_few()
        self.memory.add_entry("chat", document("the moon over the sea"))
        other = m.EntryCounts()
        with unittest.mock.patch.object(m.NgramMemory, "unpack", wraps=m.NgramMemory.unpack) as used:
            found = self.follow(other)
        self.assertEqual(used.call_count, 1)
        self.assertTrue(self.holds("moon over"))
        self.assertEqual(found.tables, self.follow().tables)

    def test_stored_counts_that_cannot_be_read_are_counted_anew(self):
        self.keep_however_few()
        layer = self.memory.layers()["ngrams"]
        self.memory.save_layers({"ngrams": layer._replace(data=b"not counts")})
        self.assertEqual(self.follow(m.EntryCounts()).tables, self.follow().tables)

    def test_broken_off_it_begins_anew(self):
        stops = iter([False] * 7)
        self.follower.follow(self.memory, self.tokenizer, self.config,
                             lambda: next(stops, True))
        self.assert_as_counted_anew()

    def test_only_the_newest_characters_are_counted(self):
        self.config = m.Config(ngram_chars=60)
        self.assertTrue(self.holds("line 29"))
        self.assertFalse(self.holds("line 3 of"))
        self.config = m.Config(ngram_chars=0)
        self.assertEqual(self.follow(m.EntryCounts()).size, 0)


class ReadingAText(VoiceCase):
    def setUp(self):
        super().setUp()
        config = m.Config(n_layer=1, n_embd=16, n_head=2, block_size=24)
        self.model = m.GPT(m.Shape.of(config), VOCAB, self.engine, random.Random(2))

    def test_rows_are_those_that_the_score_of_the_model_alone_is_made_of(self):
        for length in (2, 5, 24, 25, 26, 37, 90):
            ids = self.ids[:length]
            rows = list(m.predicted_rows(self.model, ids, 12))
            self.assertEqual(len(rows), length - 1)
            nats = sum(math.log(sum(map(math.exp, row))) - row[token]
                       for row, token in zip(rows, ids[1:]))
            self.assertAlmostEqual(nats, sum(m.scored_nats(self.model, ids, 12)), 2)
        self.assertEqual(list(m.predicted_rows(self.model, [1], 12)), [])

    def read(self, ids, fit=False):
        still, live = (m.Mixture(self.engine, self.counts, mixer)
                       for mixer in (self.mixer, self.mixer if fit else m.Mixer(3)))
        return [sum(part) for part in zip(*m.read_through(self.model, ids, still, live, fit))]

    def test_reading_without_fitting_learns_nothing(self):
        before, counts = self.mixer.numbers(), self.counts.pack()
        first = self.read(self.ids[:120])
        self.assertEqual(self.read(self.ids[:120]), first)
        self.assertEqual((self.mixer.numbers(), self.counts.pack()), (before, counts))

    def test_fitted_weights_read_better_and_one_that_learns_reads_repetitions_best(self):
        text = text_of(random.Random(9), 60) * 4
        before = self.read(text)
        for _ in range(3):
            self.read(text, fit=True)
        after = self.read(text)
        self.assertLess(after[2], before[2])
        self.assertLess(before[3], 0.8 * before[2])

    def test_fitted_weights_are_a_layer_that_comes_back(self):
        self.read(self.ids[:100], fit=True)
        again = m.load_mixer(m.Config(), {"mixer": m.pack_mixer(self.mixer)})
        for a, b in zip(again.numbers(), self.mixer.numbers()):
            self.assertAlmostEqual(a, b, 3)
        self.assertEqual(m.load_mixer(m.Config(ngram_order=2), {
            "mixer": m.pack_mixer(self.mixer)}).numbers(), m.Mixer(2).numbers())


class WhatMovedAReply(VoiceCase):
    def setUp(self):
        super().setUp()
        self.tokenizer = m.EvolvingTokenizer()
        self.config = m.Config(n_layer=1, n_embd=16, n_head=2, block_size=48, max_gen_tokens=12)
        self.model = m.GPT(m.Shape.of(self.config), self.tokenizer.vocab_size, self.engine,
                           random.Random(2))
        memory = m.Memory(":memory:")
        self.addCleanup(memory.close)
        for text in ("the heron sleeps by the mill", "copper turns green"):
            memory.add_entry("taught", document(text))
        self.entries = memory.entries()

    def speak(self):
        """Return the trace of a reply that may copy from two entries, and its text."""
        sources = [(e, m.document_ids(self.tokenizer, e.text)) for e in self.entries]
        counts = m.NgramMemory(3)
        mixer = m.Mixer(3)
        for at in range(0, len(mixer.weights), 4):  # who copies, above all
            mixer.weights[at:at + 4] = array("d", (0.3, 0.0, 0.1, 1.5))
        mixture = m.Mixture(self.engine, counts, mixer, m.copyist(ids for _, ids in sources))
        prompt = [m.END_OF_TEXT] + self.tokenizer.encode("the heron sl")
        trace = m.Trace(self.model, self.tokenizer, prompt, sources)
        text = "".join(m.spoken(self.model, self.tokenizer, prompt, self.config, random.Random(0),
                                ("\n",), mixture, trace.tokens))
        return trace, text

    def test_every_token_said_is_traced_and_the_shares_sum_to_1(self):
        trace, text = self.speak()
        said = self.tokenizer.decode([said.token for said in trace.tokens])
        self.assertEqual(said.partition("\n")[0], text)
        shares = trace.expert_shares()
        self.assertEqual(tuple(shares), m.EXPERTS)
        self.assertAlmostEqual(sum(shares.values()), 1.0)

    def test_the_entry_that_was_copied_is_named_first(self):
        trace, text = self.speak()
        self.assertTrue(text.startswith("eeps by"), text)
        entry, tokens, nats = trace.entry_shares()[0]
        self.assertEqual(entry.text, "the heron sleeps by the mill\n")
        self.assertGreater(tokens, 3)
        self.assertGreater(nats, 0.0)

    def test_a_token_is_preceded_by_what_stood_before_it(self):
        trace, _ = self.speak()
        whole = trace.prompt + [said.token for said in trace.tokens]
        for i, said in enumerate(trace.tokens, len(trace.prompt)):
            self.assertEqual(said.before, tuple(whole[max(0, i - m.SAID_ORDER):i]))

    def test_a_delta_of_no_effect_moved_nothing_and_others_are_measured_by_leaving_them_out(self):
        self.assertEqual(self.speak()[0].delta_shares(), [])
        self.model.append_delta(2, random.Random(1))
        self.assertEqual([round(x, 6) for x in self.speak()[0].delta_shares()], [0.0])
        for param in self.model.delta_params():
            param.load(array("f", [0.3] * len(param.data)))
        trace, _ = self.speak()
        ids = trace.prompt + [said.token for said in trace.tokens]
        with_it = m._reply_nats(self.model, ids, len(trace.tokens))
        self.model.deltas.clear()
        without = m._reply_nats(self.model, ids, len(trace.tokens))
        self.model.append_delta(2, random.Random(1))
        for param in self.model.delta_params():
            param.load(array("f", [0.3] * len(param.data)))
        self.assertAlmostEqual(trace.delta_shares()[0], (without - with_it) / len(trace.tokens), 4)

    def test_why_is_said_in_lines_that_name_experts_tokens_and_entries(self):
        trace, _ = self.speak()
        lines = m.why_lines(trace, 7)
        self.assertIn("step 7", lines[0])
        for name in m.EXPERTS:
            self.assertIn(name, lines[0])
        self.assertIn("copy+", lines[1])
        self.assertIn("the heron sleeps by the mill", lines[2])
        self.assertNotIn("\n", "".join(lines))
        self.assertEqual(m.why_lines(None, 3), ["the model said it by itself, at step 3"])


class TheStudent(Folder, unittest.TestCase):
    def test_of_a_large_text_no_more_is_held_out_than_fits_the_weights(self):
        self.write("nonames.txt", "".join(f"This is the passage of number {i}.\n\n"
                                          for i in range(900)))
        for chars, low, high in ((1000, 300, 2200), (10 ** 6, 2000, 5000)):
            config = m.Config(corpus_path=self.corpus, held_out_chars=chars)
            memory = m.Memory(":memory:")
            self.addCleanup(memory.close)
            m.Organism(config, memory, m.choose_engine("python")).take_in_corpus()
            held = sum(len(entry.text) for entry in memory.entries("held_out"))
            self.assertTrue(low <= held <= high, held)

    def student(self, *more, layers=()):
        config = m.Config(n_layer=1, n_embd=16, n_head=2, block_size=24)
        student = m.Student(config, m.Growth(), dict(layers), m.choose_engine("python"))
        documents = [[i, f"the ferry of pier {i} leaves at {i}\n", True, False] for i in range(40)]
        student.take_text(documents, *more)
        return student

    def test_the_student_fits_the_voice_on_held_out_text_and_keeps_it(self):
        student = self.student("the ferry of pier 70 leaves at 70\n")
        self.assertNotIn("mixer", student.layer_names())
        self.assertTrue(student.fit_voice())
        self.assertIn("mixer", student.layer_names())
        _, layers = student.snapshot()
        fitted = m.load_mixer(student.config, layers)
        self.assertNotEqual(fitted.numbers(), m.Mixer(3).numbers())
        again = self.student("", layers={"mixer": layers["mixer"]})
        self.assertIn("mixer", again.layer_names())

    def test_a_fit_that_is_broken_off_changes_nothing_and_stays_due(self):
        student = self.student("the ferry of pier 70 leaves at 70\n")
        stops = iter([False] * 5)
        self.assertFalse(student.fit_voice(lambda: next(stops, True)))
        self.assertTrue(student.mix_due)
        self.assertNotIn("mixer", student.layer_names())
        self.assertTrue(student.fit_voice())
        self.assertFalse(student.mix_due)

    def test_without_held_out_text_nothing_is_fitted(self):
        student = self.student("")
        self.assertFalse(student.fit_voice())
        self.assertNotIn("mixer", student.layer_names())


class TheWholeProgram(Folder, unittest.TestCase):
    """An organism that grew up once, and a copy of it for each test."""

    @classmethod
    def setUpClass(cls):
        text = "".join(f"H: what is {w}?\nA: it is a kind of {w} by the sea\n\n"
                       for w in "amber boats cliffs dunes eels foam gulls herons ice".split())
        place = tempfile.TemporaryDirectory()
        cls.addClassCleanup(place.cleanup)
        cls.grown = place.name
        Path(place.name, "nonames.txt").write_text(text * 3, encoding="utf-8")
        run_inside("train", *TINY, "--set", "held_out_share=0.3", cwd=place.name)

    def setUp(self):
        super().setUp()
        shutil.copytree(self.grown, self.folder, dirs_exist_ok=True)

    def test_eval_reports_model_counts_voice_and_learning_voice(self):
        self.write("held.txt", "H: what is kelp?\nA: it is a kind of kelp by the sea\n\n" * 9)
        first, again = (json.loads(self.run_here("eval", "held.txt", "--json").stdout)
                        for _ in range(2))
        self.assertEqual(first, again)
        self.assertLess(first["voice_bpc"], first["gpt_bpc"])
        self.assertLess(first["voice_adaptive_bpc"], first["voice_bpc"])

    def test_why_is_one_line_in_a_pipe(self):
        done = self.run_here("--no-train", "--set", "trust_bpc=99", "--set", "recall_score=1",
                             "--set", "boldness=99", stdin=b"well it rains on and on\n/why\n")
        lines = done.stdout.decode().splitlines()
        self.assertEqual(len(lines), 2)
        self.assertIn("the voice said it", lines[1])
        for name in m.EXPERTS:
            self.assertIn(name, lines[1])

    def test_the_model_alone_speaks_where_mix_is_0(self):
        done = self.run_here("--no-train", "--set", "trust_bpc=99", "--set", "recall_score=1",
                             "--set", "mix=0", stdin=b"well it rains on and on\n/why\n")
        self.assertIn("the model said it by itself", done.stdout.decode())


if __name__ == "__main__":
    unittest.main()
