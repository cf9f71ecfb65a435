"""Claims about the counts that learn in one reading (section 11) and the one voice (section 12)."""
import math
import random
import unittest
from array import array

import macrogpt as m

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

    def test_shares_add_up_to_how_far_the_token_stands_above_the_average(self):
        for mixture, logits, history in self.each():
            token = self.rng.randrange(VOCAB)
            wanted, _, _ = naive_mixture(mixture, logits, history)
            mean = sum(math.exp(p) * p for p in wanted)
            self.assertAlmostEqual(sum(mixture.shares(token)), wanted[token] - mean, 3)

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


if __name__ == "__main__":
    unittest.main()
