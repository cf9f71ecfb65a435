"""Claims about the sampler chain, the draw, the generating loop and the stop texts."""
import dataclasses
import math
import random
import unittest
from array import array
from unittest import mock

import macrogpt as m
from support import compiled_engine

LN2 = math.log(2.0)
# exp(logit - max) = 8, 4, 2, 1, 1 over 8: the probabilities are 1/2, 1/4, 1/8, 1/16, 1/16.
HALVES = [(3 * LN2, 4), (2 * LN2, 0), (1 * LN2, 2), (0.0, 1), (0.0, 3)]


def ids(c):
    return [token for _, token in c]


def random_candidates(rng):
    size = rng.randint(1, 40)
    grid = rng.random() < 0.5  # half the cases are full of equal logits
    values = [float(rng.randint(-2, 2)) if grid else rng.gauss(0.0, 3.0) for _ in range(size)]
    return m.candidates_of(values)


def every_filter(rng):
    """(name, function) of every filter, with random parameters."""
    history = [rng.randrange(45) for _ in range(rng.randint(0, 30))]
    some = frozenset(rng.sample(range(45), 3))
    values = {
        "temper": (rng.choice([0.0, 0.3, 1.0, 4.0]),),
        "keep_top_k": (rng.randint(-1, 50),),
        "keep_top_p": (rng.choice([0.0, 0.5, 0.9, 1.0]), rng.randint(0, 5)),
        "keep_min_p": (rng.choice([0.0, 0.05, 0.5, 1.0, 3.0]),),
        "keep_typical": (rng.choice([0.0, 0.2, 0.9, 1.0]),),
        "keep_top_n_sigma": (rng.choice([0.0, 0.01, 1.0]),),
        "exclude_top_choices": (rng.choice([0.0, 0.5, 1.0]), rng.choice([0.0, 0.1, 0.6]), rng),
        "penalise_repetition": (history, rng.choice([0.5, 1.0, 1.3]), rng.randint(-1, 30),
                                rng.choice([0.0, 0.7]), rng.choice([0.0, 0.2])),
        "penalise_dry": (history, rng.choice([0.0, 1.0]), 1.75, rng.randint(0, 2),
                         rng.randint(-1, 30), some),
    }
    return [(name, lambda c, n=name, v=v: getattr(m, n)(c, *v)) for name, v in values.items()]


def naive_dry_penalties(history, multiplier, base, allowed_length, breakers):
    """DRY by its definition: try every earlier place and walk backwards from both ends."""
    longest = {}
    for at in range(1, len(history)):
        length = 0
        while length < at and history[at - 1 - length] == history[len(history) - 1 - length]:
            if history[at - 1 - length] in breakers:
                break
            length += 1
        if length and history[at] not in breakers:
            longest[history[at]] = max(length, longest.get(history[at], 0))
    return {token: multiplier * base ** (length - allowed_length)
            for token, length in longest.items() if length >= allowed_length}


class CandidatesTest(unittest.TestCase):
    def test_candidates_fall_by_logit_and_ties_rise_by_id(self):
        got = m.candidates_of(array("f", [1.0, 3.0, 1.0, 3.0, 2.0]))
        self.assertEqual(got, [(3.0, 1), (3.0, 3), (2.0, 4), (1.0, 0), (1.0, 2)])

    def test_nan_and_minus_infinity_are_dropped_and_banned_ids_too(self):
        logits = [math.nan, 1.0, -math.inf, 2.0, 3.0]
        self.assertEqual(ids(m.candidates_of(logits)), [4, 3, 1])
        self.assertEqual(ids(m.candidates_of(logits, frozenset({4}))), [3, 1])

    def test_plus_infinity_is_certainty_shared_equally(self):
        self.assertEqual(m.candidates_of([5.0, math.inf, math.nan, math.inf]), [(0.0, 1), (0.0, 3)])

    def test_logits_with_nothing_to_draw_raise(self):
        for logits in ([], [math.nan, -math.inf]):
            with self.assertRaisesRegex(ValueError, f"all {len(logits)} logits"):
                m.candidates_of(logits)
        with self.assertRaises(ValueError):
            m.candidates_of([1.0], frozenset({0}))

    def test_softmax_of_halving_weights_is_known_and_survives_huge_logits(self):
        for shift in (0.0, 1e4, -1e4):
            got = m.probabilities([(logit + shift, token) for logit, token in HALVES])
            for a, b in zip(got, [0.5, 0.25, 0.125, 0.0625, 0.0625]):
                self.assertAlmostEqual(a, b, places=9)


class FiltersTest(unittest.TestCase):
    def test_temperature_divides_logits_and_zero_is_greedy(self):
        self.assertEqual(m.temper([(3.0, 7), (-1.0, 2)], 0.5), [(6.0, 7), (-2.0, 2)])
        self.assertEqual(m.temper([(3.0, 7), (3.0, 9)], 0.0), [(3.0, 7)])
        self.assertEqual(ids(m.temper([(3e38, 7), (-3e38, 9)], 1e-320)), [7])  # no overflow

    def test_top_k_keeps_the_k_highest_and_zero_is_off(self):
        self.assertEqual(ids(m.keep_top_k(HALVES, 2)), [4, 0])
        self.assertEqual(m.keep_top_k(HALVES, 0), HALVES)
        self.assertEqual(m.keep_top_k(HALVES, 99), HALVES)

    def test_top_p_keeps_the_candidate_that_crosses_p(self):
        # Cumulative: 0.5, 0.75, 0.875, 0.9375, 1.
        for p, kept in ((0.0, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4), (1.0, 5)):
            self.assertEqual(m.keep_top_p(HALVES, p), HALVES[:kept], p)
        self.assertEqual(m.keep_top_p(HALVES, 0.1, min_keep=3), HALVES[:3])

    def test_top_p_that_is_reached_exactly_needs_no_more(self):
        # Two equal logits: each is exactly 0.5.
        self.assertEqual(ids(m.keep_top_p([(1.0, 0), (1.0, 1)], 0.5)), [0])

    def test_min_p_keeps_what_is_at_least_that_fraction_of_the_best(self):
        # Relative to the best: 1, 1/2, 1/4, 1/8, 1/8.
        for min_p, kept in ((0.0, 5), (0.12, 5), (0.13, 3), (0.3, 2), (0.6, 1), (1.0, 1), (9.0, 1)):
            self.assertEqual(m.keep_min_p(HALVES, min_p), HALVES[:kept], min_p)

    def test_typical_starts_at_the_entropy_not_at_the_best(self):
        # In units of ln 2: surprises 1, 2, 3, 4, 4; H = 1/2 + 2/4 + 3/8 + 4/16 + 4/16 = 1.875.
        # Distances 0.875, 0.125, 1.125, 2.125, 2.125: the order is ids 0, 4, 2, 1, 3 with
        # cumulative mass 0.25, 0.75, 0.875, 0.9375, 1.
        for p, kept in ((0.2, [0]), (0.3, [4, 0]), (0.8, [4, 0, 2]), (0.9, [4, 0, 2, 1])):
            self.assertEqual(ids(m.keep_typical(HALVES, p)), kept, p)
        self.assertEqual(m.keep_typical(HALVES, 1.0), HALVES)

    def test_typical_bears_probabilities_that_underflow(self):
        self.assertEqual(ids(m.keep_typical([(0.0, 0), (-1e4, 1)], 0.9)), [0])

    def test_top_n_sigma_measures_from_the_best(self):
        # Logits 4, 2, 0, -2, -4: mean 0, variance (16+4+0+4+16)/5 = 8, sigma 2.828.
        c = m.candidates_of([4.0, 2.0, 0.0, -2.0, -4.0])
        for n, kept in ((0.0, 5), (0.5, 1), (1.0, 2), (2.0, 3), (3.0, 5)):
            # Floors: off; 4-1.41=2.59; 4-2.83=1.17; 4-5.66=-1.66; 4-8.49=-4.49.
            self.assertEqual(m.keep_top_n_sigma(c, n), c[:kept], n)

    def test_xtc_drops_all_top_choices_but_the_last(self):
        # At least 0.1: ids 4, 0, 2 (1/2, 1/4, 1/8). Ids 4 and 0 go.
        got = m.exclude_top_choices(HALVES, 1.0, 0.1, random.Random(1))
        self.assertEqual(ids(got), [2, 1, 3])
        self.assertEqual(m.exclude_top_choices(HALVES, 1.0, 0.6, random.Random(1)), HALVES)
        rng = random.Random(1)
        self.assertEqual(m.exclude_top_choices(HALVES, 0.0, 0.1, rng), HALVES)
        self.assertEqual(rng.random(), random.Random(1).random())  # off uses no number

    def test_xtc_acts_with_its_probability(self):
        rng = random.Random(2)
        acted = sum(len(m.exclude_top_choices(HALVES, 0.3, 0.1, rng)) == 3 for _ in range(2000))
        self.assertTrue(500 < acted < 700, acted)  # 600 expected, sigma 20.5

    def test_repetition_divides_positive_and_multiplies_negative_logits(self):
        # Penalty 2: 4 -> 2, -1 -> -2, 0 stays 0; id 1 is unseen; id 0 counts once for all its
        # three appearances.
        c = m.candidates_of([4.0, 3.0, -1.0, 0.0])
        got = m.penalise_repetition(c, [0, 0, 2, 3, 0, 99], 2.0, 64)
        self.assertEqual(got, [(3.0, 1), (2.0, 0), (0.0, 3), (-2.0, 2)])

    def test_presence_counts_once_and_frequency_every_time(self):
        # Id 0 three times: 4 - (3 * 0.5 + 0.25) = 2.25; id 1 once: 3 - (0.5 + 0.25) = 2.25.
        # The scaling comes first: 4/2 - 1.75 = 0.25; 3/2 - 0.75 = 0.75.
        c = m.candidates_of([4.0, 3.0, 1.0])
        got = m.penalise_repetition(c, [0, 1, 0, 0], 1.0, 64, presence=0.25, frequency=0.5)
        self.assertEqual(got, [(2.25, 0), (2.25, 1), (1.0, 2)])
        got = m.penalise_repetition(c, [0, 1, 0, 0], 2.0, 64, presence=0.25, frequency=0.5)
        self.assertEqual(got, [(1.0, 2), (0.75, 1), (0.25, 0)])

    def test_repetition_looks_back_last_n_ids_only(self):
        c = m.candidates_of([4.0, 3.0])
        self.assertEqual(m.penalise_repetition(c, [0, 1], 2.0, 1), [(4.0, 0), (1.5, 1)])
        self.assertEqual(m.penalise_repetition(c, [0, 1], 2.0, 0), c)
        self.assertEqual(m.penalise_repetition(c, [0, 1], 2.0, -1), [(2.0, 0), (1.5, 1)])
        self.assertEqual(m.penalise_repetition(c, [0, 1], 1.0, 64), c)


class DryTest(unittest.TestCase):
    def test_dry_charges_the_id_that_would_prolong_a_repetition(self):
        # History 1 2 3 4 1 2 3: the ending 1 2 3 stood before 4, so id 4 has match length 3 and
        # pays 0.8 * 1.75**(3 - 2) = 1.4. Other places: the ending 3 stands before 4 only.
        flat = m.candidates_of([0.0] * 6)
        got = dict((t, x) for x, t in m.penalise_dry(flat, [1, 2, 3, 4, 1, 2, 3], 0.8, 1.75, 2, -1))
        self.assertAlmostEqual(got.pop(4), -1.4)
        self.assertEqual(set(got.values()), {0.0})

    def test_dry_is_silent_below_the_allowed_length_and_when_off(self):
        c, history = m.candidates_of([0.0] * 6), [1, 2, 3, 4, 1, 2, 3]
        self.assertEqual(m.penalise_dry(c, history, 0.8, 1.75, 4, -1), c)
        self.assertEqual(m.penalise_dry(c, history, 0.0, 1.75, 2, -1), c)
        self.assertEqual(m.penalise_dry(c, history, 0.8, 1.75, 2, 0), c)
        # The last five ids are 3 4 1 2 3: only the ending 3 stood before 4 there, length 1.
        self.assertEqual(m.penalise_dry(c, history, 0.8, 1.75, 2, 5), c)
        self.assertNotEqual(m.penalise_dry(c, history, 0.8, 1.75, 1, 5), c)

    def test_dry_matches_do_not_cross_a_breaker(self):
        # With 2 as breaker only the ending 3 counts: length 1 costs 1 * 2**(1 - 1) = 1.
        c, history = m.candidates_of([0.0] * 6), [1, 2, 3, 4, 1, 2, 3]
        got = m.penalise_dry(c, history, 1.0, 2.0, 1, -1, frozenset({2}))
        self.assertEqual(got[-1], (-1.0, 4))
        # A breaker at the end leaves nothing to match, and a breaker to come is never charged.
        self.assertEqual(m.penalise_dry(c, history, 1.0, 2.0, 1, -1, frozenset({3})), c)
        self.assertEqual(m.penalise_dry(c, history, 1.0, 2.0, 1, -1, frozenset({4})), c)

    def test_dry_equals_its_naive_twin(self):
        rng = random.Random(11)
        punished = 0
        for _ in range(400):
            width = rng.randint(1, 4)
            history = [rng.randrange(width) for _ in range(rng.randint(0, 40))]
            breakers = frozenset(rng.sample(range(width), rng.randint(0, width // 2)))
            allowed, last_n = rng.randint(1, 4), rng.choice([-1, 0, 7, 30])
            c = m.candidates_of([rng.gauss(0.0, 1.0) for _ in range(5)])
            recent = history if last_n < 0 else history[len(history) - min(last_n, len(history)):]
            costs = naive_dry_penalties(recent, 0.8, 1.75, allowed, breakers)
            want = sorted(((x - costs.get(t, 0.0), t) for x, t in c), key=lambda p: (-p[0], p[1]))
            got = m.penalise_dry(c, history, 0.8, 1.75, allowed, last_n, breakers)
            self.assertEqual(ids(got), ids(want))
            for (a, _), (b, _) in zip(got, want):
                self.assertAlmostEqual(a, b, delta=1e-9 * abs(b) + 1e-12)
            punished += bool(costs)
        self.assertGreater(punished, 100)

    def test_dry_stays_finite_on_an_endless_repetition(self):
        # 1.75**2998 is no float; the cost is capped near e**80 and the id only falls last.
        got = m.penalise_dry(m.candidates_of([9.0, 0.0]), [0] * 3000, 1.0, 1.75, 2, -1)
        self.assertEqual(ids(got), [1, 0])
        self.assertTrue(math.isfinite(got[1][0]))


class ChainTest(unittest.TestCase):
    def test_every_filter_is_pure_keeps_order_and_never_empties(self):
        rng = random.Random(5)
        for _ in range(200):
            c = random_candidates(rng)
            before = list(c)
            for name, apply in every_filter(rng):
                got = apply(c)
                self.assertEqual(c, before, name)
                self.assertTrue(got, name)
                self.assertEqual(got, sorted(got, key=lambda p: (-p[0], p[1])), name)
                self.assertLessEqual(set(ids(got)), set(ids(c)), name)
                if name.startswith("penalise"):
                    self.assertEqual(sorted(ids(got)), sorted(ids(c)), name)
                elif name.startswith("keep"):
                    self.assertLessEqual(set(got), set(c), name)

    def test_top_k_min_p_and_greedy_are_idempotent(self):
        rng = random.Random(6)
        for _ in range(100):
            c = random_candidates(rng)
            for once in (lambda c: m.keep_top_k(c, 5), lambda c: m.keep_min_p(c, 0.2),
                         lambda c: m.temper(c, 0.0)):
                self.assertEqual(once(once(c)), once(c))

    def test_the_default_chain_is_its_filters_in_order(self):
        rng = random.Random(7)
        s = dataclasses.replace(m.SamplerSettings(), dry_multiplier=0.8, top_n_sigma=2.0)
        for _ in range(50):
            c, history = random_candidates(rng), [rng.randrange(6) for _ in range(30)]
            want = m.penalise_repetition(c, history, 1.1, 64)
            want = m.keep_top_n_sigma(m.penalise_dry(want, history, 0.8, 1.75, 2, -1), 2.0)
            want = m.keep_top_p(m.keep_typical(m.keep_top_k(want, 40), 0.95), 0.92)
            want = m.temper(m.keep_min_p(want, 0.06), 0.85)
            self.assertEqual(m.apply_samplers(c, history, s, rng), want)

    def test_the_order_of_the_chain_is_the_owners(self):
        # Top-k 1 first keeps id 0 whatever it costs; penalties first put id 1 before it (4/2 < 3).
        c = m.candidates_of([4.0, 3.0])
        for samplers, best in ((("top_k", "penalties"), 0), (("penalties", "top_k"), 1)):
            s = m.SamplerSettings(top_k=1, repeat_penalty=2.0, samplers=samplers)
            self.assertEqual(ids(m.apply_samplers(c, [0], s, random.Random(0))), [best])
        s = m.SamplerSettings(samplers=())
        self.assertEqual(m.apply_samplers(c, [0], s, random.Random(0)), c)

    def test_settings_that_cannot_run_are_refused_by_name(self):
        with self.assertRaisesRegex(ValueError, "mirostat.*penalties, dry, .*temperature"):
            m.SamplerSettings(samplers=("top_k", "mirostat"))
        for wrong in ({"temperature": -1.0}, {"repeat_penalty": 0.0}, {"dry_base": math.nan}):
            with self.assertRaisesRegex(ValueError, next(iter(wrong))):
                m.SamplerSettings(**wrong)


class DrawTest(unittest.TestCase):
    def test_draw_follows_the_probabilities(self):
        rng = random.Random(3)
        counts = dict.fromkeys(ids(HALVES), 0)
        for _ in range(16000):
            counts[m.draw(HALVES, rng)] += 1
        wants = {4: 8000, 0: 4000, 2: 2000, 1: 1000, 3: 1000}
        chi_square = sum((counts[t] - want) ** 2 / want for t, want in wants.items())
        self.assertLess(chi_square, 25.0)  # 4 degrees of freedom: passed by chance 1 in 20,000

    def test_draw_uses_exactly_one_number_even_for_a_single_candidate(self):
        for c in (HALVES, HALVES[:1]):
            rng, twin = random.Random(4), random.Random(4)
            m.draw(c, rng)
            twin.random()
            self.assertEqual(rng.getstate(), twin.getstate())

    def test_the_number_chooses_the_slice_it_falls_in(self):
        class Fixed(random.Random):
            value = 0.0

            def random(self):
                return self.value

        # Equal logits: slices [0, 1/4), [1/4, 1/2), [1/2, 3/4), [3/4, 1).
        rng, c = Fixed(), m.candidates_of([1.0] * 4)
        last = 1.0 - 2.0 ** -53
        for value, token in ((0.0, 0), (0.24, 0), (0.25, 1), (0.5, 2), (0.75, 3), (last, 3)):
            rng.value = value
            self.assertEqual(m.draw(c, rng), token)


class GenerateTest(unittest.TestCase):
    GREEDY = m.SamplerSettings(temperature=0.0, repeat_penalty=1.0)

    def counting_model(self, fed):
        """A model of 6 ids that always wants the id after the last one it was fed."""
        def next_logits(new_ids):
            fed.append(list(new_ids))
            return [9.0 if token == (new_ids[-1] + 1) % 6 else 0.0 for token in range(6)]
        return next_logits

    def test_the_prompt_is_fed_first_then_each_token_once(self):
        fed = []
        got = list(m.generate_ids(self.counting_model(fed), [5, 0], self.GREEDY,
                                  random.Random(0), 3))
        self.assertEqual(got, [1, 2, 3])
        self.assertEqual(fed, [[5, 0], [1], [2]])  # the last id need not be fed

    def test_nothing_is_fed_ahead_of_the_consumer(self):
        fed = []
        stream = m.generate_ids(self.counting_model(fed), [0], self.GREEDY, random.Random(0), 9)
        self.assertEqual((next(stream), fed), (1, [[0]]))
        self.assertEqual((next(stream), fed), (2, [[0], [1]]))

    def test_an_end_id_stops_unseen(self):
        fed = []
        got = list(m.generate_ids(self.counting_model(fed), [0], self.GREEDY, random.Random(0), 9,
                                  end_ids=frozenset({3})))
        self.assertEqual((got, fed), ([1, 2], [[0], [1], [2]]))

    def test_end_ids_wait_for_min_tokens_and_banned_ids_for_ever(self):
        def flat(new_ids):
            return [5.0, 4.0, 3.0, 2.0]  # greedily 0, the end id, once it is allowed

        got = list(m.generate_ids(flat, [3], self.GREEDY, random.Random(0), 9, frozenset({0}),
                                  min_tokens=2, banned=frozenset({1})))
        self.assertEqual(got, [2, 2])

    def test_penalties_see_prompt_and_reply(self):
        # Presence 10 sinks each id once seen: the prompt holds 0, so 1, 2, 3 follow, then 0 again.
        s = m.SamplerSettings(temperature=0.0, repeat_penalty=1.0, presence_penalty=10.0)
        got = list(m.generate_ids(lambda _: [5.0, 4.0, 3.0, 2.0], [0], s, random.Random(0), 4))
        self.assertEqual(got, [1, 2, 3, 0])

    def test_an_empty_prompt_is_refused_at_once_and_no_tokens_feed_nothing(self):
        fed = []
        with self.assertRaisesRegex(ValueError, "prompt"):
            m.generate_ids(self.counting_model(fed), [], self.GREEDY, random.Random(0), 3)
        self.assertEqual(
            list(m.generate_ids(self.counting_model(fed), [1], self.GREEDY, random.Random(0), 0)),
            [])
        self.assertEqual(fed, [])

    def test_the_same_seed_makes_the_same_reply(self):
        noise = random.Random(8)
        table = [[noise.gauss(0.0, 1.0) for _ in range(50)] for _ in range(50)]

        def reply(seed):
            return list(m.generate_ids(lambda new: table[new[-1]], [1, 2], m.SamplerSettings(),
                                       random.Random(seed), 40))

        self.assertEqual(reply(1), reply(1))
        self.assertNotEqual(reply(1), reply(2))


class StopTextTest(unittest.TestCase):
    def test_only_a_possible_beginning_of_a_stop_is_held_back(self):
        gate = m.StopText(["\nH:"])
        self.assertEqual(gate.feed("one\n"), ("one", False))
        self.assertEqual(gate.feed("H"), ("", False))
        self.assertEqual(gate.feed("i\n"), ("\nHi", False))
        self.assertEqual(gate.feed("H: two"), ("", True))
        self.assertEqual(gate.feed("three"), ("", True))
        self.assertEqual(gate.flush(), "")

    def test_flush_gives_back_what_was_held_once(self):
        gate = m.StopText(["END"])
        self.assertEqual(gate.feed("the EN"), ("the ", False))
        self.assertEqual((gate.flush(), gate.flush()), ("EN", ""))

    def test_no_stops_let_everything_through_and_an_empty_one_is_refused(self):
        self.assertEqual(m.StopText([]).feed("abc"), ("abc", False))
        with self.assertRaises(ValueError):
            m.StopText(["x", ""])

    def test_the_stop_completed_first_wins_and_of_equals_the_longest(self):
        self.assertEqual(m.StopText(["xabc", "ab"]).feed("xabc"), ("x", True))
        self.assertEqual(m.StopText(["b", "ab"]).feed("xabc"), ("x", True))

    def test_however_the_text_is_split_it_shows_up_to_the_first_stop(self):
        rng = random.Random(9)
        stopped_count = 0
        for _ in range(1500):
            text = "".join(rng.choice("ab\nH:") for _ in range(rng.randint(0, 25)))
            stops = ["".join(rng.choice("ab\nH:") for _ in range(rng.randint(1, 4)))
                     for _ in range(rng.randint(0, 3))]
            # The naive twin: the shortest beginning of the text that ends with a stop.
            want, stopped = text, False
            for end in range(len(text) + 1):
                done = [len(stop) for stop in stops if text[:end].endswith(stop)]
                if done:
                    want, stopped = text[:end - max(done)], True
                    break
            gate, shown, at, closed = m.StopText(stops), "", 0, False
            while at < len(text):
                size = rng.randint(1, 6)
                piece, closed = gate.feed(text[at:at + size])
                shown, at = shown + piece, at + size
                held = text[len(shown):at]  # held back: nothing, or the beginning of a stop
                self.assertTrue(closed or not held or any(s.startswith(held) for s in stops))
            self.assertEqual((shown + gate.flush(), closed), (want, stopped), (text, stops))
            stopped_count += stopped
        self.assertTrue(300 < stopped_count < 1200)


class TheKernelDrawsAsTheChainDoes(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.engine = compiled_engine()

    def settings(self, rng):
        """Settings of the usual chain, some of its filters at their ends."""
        pick = rng.choice
        return m.SamplerSettings(
            temperature=pick((0.3, 0.85, 1.5)), top_k=pick((1, 7, 40, 1000)),
            typical_p=pick((0.3, 0.95, 1.0)), top_p=pick((0.2, 0.92, 1.0)),
            min_p=pick((0.0, 0.06, 0.5)), repeat_penalty=pick((1.0, 1.1, 1.6)),
            repeat_last_n=pick((0, 8, 64, -1)), presence_penalty=pick((0.0, 0.4)),
            frequency_penalty=pick((0.0, 0.2)), dry_multiplier=pick((0.0, 0.8, 3.0)),
            dry_allowed_length=pick((1, 2, 4)), dry_last_n=pick((-1, 0, 20)))

    def test_for_any_logits_history_and_chance(self):
        rng, unlike = random.Random(70), 0
        for case in range(600):
            n, settings = rng.choice((1, 5, 60, 300)), self.settings(rng)
            logits = array("f", [rng.gauss(0.0, 3.0) for _ in range(n)])
            some = [rng.randrange(n) for _ in range(rng.choice((1, 3, 12)))]
            history = array("i", [rng.choice(some) for _ in range(rng.randrange(1, 80))])
            draws = [random.Random(case) for _ in range(2)]
            fast = m.fast_draw(self.engine, settings)(logits, history, draws[0])
            left = m.apply_samplers(m.candidates_of(logits), history, settings, draws[1])
            self.assertEqual(draws[0].getstate() == random.Random(case).getstate(), False)
            unlike += fast != m.draw(left, draws[1])
            self.assertEqual(draws[0].getstate(), draws[1].getstate())
        self.assertLessEqual(unlike, 2, "float32 may round a sum to the other side of a bound")

    def test_what_it_cannot_do_is_left_to_the_chain(self):
        for changes in ({"temperature": 0.0}, {"top_k": 0}, {"xtc_probability": 0.5},
                        {"top_n_sigma": 1.0}, {"samplers": ("top_k", "temperature")}):
            self.assertIsNone(m.fast_draw(self.engine, m.SamplerSettings(**changes)), changes)
        self.assertIsNone(m.fast_draw(m.interpreted_engine(), m.SamplerSettings()))
        fast, rng = m.fast_draw(self.engine, m.SamplerSettings()), random.Random(1)
        before = rng.getstate()
        for bad in (math.nan, math.inf, -math.inf):
            self.assertIsNone(fast(array("f", [0.0, bad, 1.0]), array("i", [1]), rng))
        self.assertEqual(rng.getstate(), before)

    def test_generation_with_it_gives_the_same_text(self):
        logits = {}

        def next_logits(ids):
            rng = random.Random(hash(tuple(ids)) % 1000)
            return logits.setdefault(tuple(ids), array("f", [rng.gauss(0, 2) for _ in range(50)]))
        for seed in range(5):
            both = [list(m.generate_ids(next_logits, [1, 2], m.SamplerSettings(dry_multiplier=0.8),
                                        random.Random(seed), 60, frozenset([3]), 1, engine=engine))
                    for engine in (None, self.engine)]
            self.assertEqual(*both)


class OnlyWhatTopKCanKeepIsLookedAt(unittest.TestCase):
    def test_the_cut_before_the_penalties_changes_nothing(self):
        rng = random.Random(71)
        for _ in range(200):
            n = rng.choice((3, 60, 200))
            c = m.candidates_of([round(rng.gauss(0.0, 2.0), 1) for _ in range(n)])
            history = [rng.randrange(n) for _ in range(rng.randrange(30))]
            settings = m.SamplerSettings(top_k=rng.choice((1, 5, 20)), dry_multiplier=0.8)
            with mock.patch.object(m, "_within_reach", side_effect=lambda c, *rest: c):
                whole = m.apply_samplers(c, history, settings, rng)
            self.assertEqual(m.apply_samplers(c, history, settings, rng), whole)


if __name__ == "__main__":
    unittest.main()
