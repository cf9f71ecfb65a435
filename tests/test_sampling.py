"""Claims about the sampler chain, the draw, and the kernel that draws as the chain does."""
import math
import random
import unittest
from array import array
from unittest import mock

import macrogpt as m
from support import Case, compiled_engine

LN2 = math.log(2.0)
# exp(logit - max) = 8, 4, 2, 1, 1 over 8: the probabilities are 1/2, 1/4, 1/8, 1/16, 1/16.
HALVES = [(3 * LN2, 4), (2 * LN2, 0), (1 * LN2, 2), (0.0, 1), (0.0, 3)]


def ids(c):
    return [token for _, token in c]


def random_candidates(rng):
    grid = rng.random() < 0.5  # half the cases are full of equal logits
    return m.candidates_of([float(rng.randint(-2, 2)) if grid else rng.gauss(0.0, 3.0)
                            for _ in range(rng.randint(1, 40))])


def naive_dry_penalties(history, multiplier, base, allowed_length):
    """DRY by its definition: try every earlier place and walk backwards from both ends."""
    longest = {}
    for at in range(1, len(history)):
        length = 0
        while length < at and history[at - 1 - length] == history[len(history) - 1 - length]:
            length += 1
        longest[history[at]] = max(length, longest.get(history[at], 0))
    return {token: multiplier * base ** (length - allowed_length)
            for token, length in longest.items() if length >= allowed_length}


class FiltersTest(unittest.TestCase):
    def test_they_fall_by_logit_without_nan_or_minus_infinity_and_infinity_is_certainty(self):
        nan, inf = math.nan, math.inf
        for logits, wanted in (
                ([1.0, 3.0, 1.0, 3.0, 2.0], [(3.0, 1), (3.0, 3), (2.0, 4), (1.0, 0), (1.0, 2)]),
                ([nan, 1.0, -inf, 2.0, 3.0], [(3.0, 4), (2.0, 3), (1.0, 1)]),
                ([5.0, inf, nan, inf], [(0.0, 1), (0.0, 3)])):
            self.assertEqual(m.candidates_of(array("f", logits)), wanted)
        for logits in ([], [nan, -inf]):
            with self.assertRaisesRegex(ValueError, f"all {len(logits)} logits"):
                m.candidates_of(logits)

    def test_softmax_of_halving_weights_is_known_and_survives_huge_logits(self):
        for shift in (0.0, 1e4, -1e4):
            got = m.probabilities([(logit + shift, token) for logit, token in HALVES])
            for a, b in zip(got, [0.5, 0.25, 0.125, 0.0625, 0.0625]):
                self.assertAlmostEqual(a, b, places=9)

    def test_temperature_divides_logits_and_zero_is_greedy(self):
        self.assertEqual(m.temper([(3.0, 7), (-1.0, 2)], 0.5), [(6.0, 7), (-2.0, 2)])
        self.assertEqual(m.temper([(3.0, 7), (3.0, 9)], 0.0), [(3.0, 7)])
        self.assertEqual(ids(m.temper([(3e38, 7), (-3e38, 9)], 1e-320)), [7])  # no overflow

    def test_each_cut_keeps_so_many_of_the_best(self):
        # Logits 4, 2, 0, -2, -4: mean 0, variance (16+4+0+4+16)/5 = 8, sigma 2.828.
        steps = m.candidates_of([4.0, 2.0, 0.0, -2.0, -4.0])
        for keep, c, cases in (
                (m.keep_top_k, HALVES, {2: 2, 0: 5, 99: 5}),
                # Cumulative: 0.5, 0.75, 0.875, 0.9375, 1; the one that crosses p is kept.
                (m.keep_top_p, HALVES, {0.0: 1, 0.49: 1, 0.51: 2, 0.74: 2, 0.9: 4, 1.0: 5}),
                # Relative to the best: 1, 1/2, 1/4, 1/8, 1/8.
                (m.keep_min_p, HALVES, {0.0: 5, 0.12: 5, 0.13: 3, 0.3: 2, 0.6: 1, 1.0: 1, 9.0: 1}),
                # Floors: off; 4-1.41=2.59; 4-2.83=1.17; 4-5.66=-1.66; 4-8.49=-4.49.
                (m.keep_top_n_sigma, steps, {0.0: 5, 0.5: 1, 1.0: 2, 2.0: 3, 3.0: 5})):
            for bound, kept in cases.items():
                self.assertEqual(keep(c, bound), c[:kept], (keep.__name__, bound))
        # Reached exactly p needs no more: of two equal logits each is exactly 0.5.
        self.assertEqual(ids(m.keep_top_p([(1.0, 0), (1.0, 1)], 0.5)), [0])

    def test_typical_starts_at_the_entropy_not_at_the_best(self):
        # In units of ln 2: surprises 1, 2, 3, 4, 4; H = 1/2 + 2/4 + 3/8 + 4/16 + 4/16 = 1.875.
        # Distances 0.875, 0.125, 1.125, 2.125, 2.125: the order is ids 0, 4, 2, 1, 3 with
        # cumulative mass 0.25, 0.75, 0.875, 0.9375, 1.
        for p, kept in ((0.0, [0]), (0.2, [0]), (0.3, [4, 0]), (0.8, [4, 0, 2]),
                        (0.9, [4, 0, 2, 1]), (1.0, ids(HALVES))):
            self.assertEqual(ids(m.keep_typical(HALVES, p)), kept, p)
        # A probability that underflows is borne.
        self.assertEqual(ids(m.keep_typical([(0.0, 0), (-1e4, 1)], 0.9)), [0])

    def test_xtc_drops_all_top_choices_but_the_last(self):
        # At least 0.1: ids 4, 0, 2 (1/2, 1/4, 1/8). Ids 4 and 0 go.
        got = m.exclude_top_choices(HALVES, 1.0, 0.1, random.Random(1))
        self.assertEqual(ids(got), [2, 1, 3])
        self.assertEqual(m.exclude_top_choices(HALVES, 1.0, 0.6, random.Random(1)), HALVES)
        rng = random.Random(1)
        self.assertEqual(m.exclude_top_choices(HALVES, 0.0, 0.1, rng), HALVES)
        self.assertEqual(rng.random(), random.Random(1).random())  # off uses no number
        acted = sum(len(m.exclude_top_choices(HALVES, 0.3, 0.1, rng)) == 3 for _ in range(2000))
        self.assertTrue(500 < acted < 700, acted)  # 600 expected, sigma 20.5

    def test_repetition_divides_positive_and_multiplies_negative_logits_of_the_last_ids(self):
        two, three, four = (m.candidates_of([4.0, 3.0, *more]) for more in ([], [1.0], [-1.0, 0.0]))
        for c, history, settings, want in (
                # Id 1 is unseen; id 0 counts once for all its three appearances; 0 stays 0.
                (four, [0, 0, 2, 3, 0, 99], (2.0, 64), [(3.0, 1), (2.0, 0), (0.0, 3), (-2.0, 2)]),
                # Presence counts once and frequency every time: 4 - 3 * 0.5 - 0.25; 3 - 0.5 - 0.25.
                (three, [0, 1, 0, 0], (1.0, 64, 0.25, 0.5), [(2.25, 0), (2.25, 1), (1.0, 2)]),
                # The scaling comes first: 4/2 - 1.75; 3/2 - 0.75.
                (three, [0, 1, 0, 0], (2.0, 64, 0.25, 0.5), [(1.0, 2), (0.75, 1), (0.25, 0)]),
                (two, [0, 1], (2.0, 1), [(4.0, 0), (1.5, 1)]), (two, [0, 1], (2.0, 0), two),
                (two, [0, 1], (2.0, -1), [(2.0, 0), (1.5, 1)]), (two, [0, 1], (1.0, 64), two)):
            self.assertEqual(m.penalise_repetition(c, history, *settings), want)

    def test_it_charges_what_would_prolong_a_repetition_just_as_its_naive_twin_does(self):
        rng, punished = random.Random(11), 0
        for _ in range(300):
            width = rng.randint(1, 4)
            history = [rng.randrange(width) for _ in range(rng.randint(0, 40))]
            allowed, last_n = rng.randint(1, 4), rng.choice([-1, 0, 7, 30])
            c = m.candidates_of([rng.gauss(0.0, 1.0) for _ in range(5)])
            recent = history if last_n < 0 else history[len(history) - min(last_n, len(history)):]
            multiplier = rng.choice((0.0, 0.8, 0.8))
            costs = naive_dry_penalties(recent, multiplier, 1.75, allowed)
            want = sorted(((x - costs.get(t, 0.0), t) for x, t in c), key=lambda p: (-p[0], p[1]))
            got = m.penalise_dry(c, history, multiplier, 1.75, allowed, last_n)
            self.assertEqual(ids(got), ids(want))
            for (a, _), (b, _) in zip(got, want):
                self.assertAlmostEqual(a, b, delta=1e-9 * abs(b) + 1e-12)
            punished += any(costs.values())
        self.assertGreater(punished, 100)

    def test_it_stays_finite_on_an_endless_repetition(self):
        # 1.75**2998 is no float; the cost is capped near e**80 and the id only falls last.
        got = m.penalise_dry(m.candidates_of([9.0, 0.0]), [0] * 3000, 1.0, 1.75, 2, -1)
        self.assertEqual(ids(got), [1, 0])
        self.assertTrue(math.isfinite(got[1][0]))


class ChainTest(Case):
    def test_the_chain_is_its_filters_each_of_which_is_pure_keeps_order_and_never_empties(self):
        rng = random.Random(5)
        pick = rng.choice
        for case in range(400):
            s = m.Config(
                repeat_penalty=pick((0.5, 1.0, 1.3)), repeat_last_n=rng.randint(0, 30),
                presence_penalty=pick((0.0, 0.7)), frequency_penalty=pick((0.0, 0.2)),
                dry_multiplier=pick((0.0, 1.0)), dry_base=pick((1.5, 1.75)),
                dry_allowed_length=rng.randint(1, 3), dry_last_n=rng.randint(-1, 30),
                top_n_sigma=pick((0.0, 0.01, 1.0)), top_k=pick((0, 0, 7, 30)),
                typical_p=pick((0.0, 0.9, 1.0)), top_p=pick((0.0, 0.5, 0.9, 1.0)),
                min_p=pick((0.0, 0.05, 0.5, 1.0)), xtc_probability=pick((0.0, 0.5, 1.0)),
                xtc_threshold=pick((0.0, 0.1, 0.4)), temperature=pick((0.0, 0.3, 1.0, 4.0)))
            start, history = random_candidates(rng), rng.choices(range(9), k=rng.randint(0, 30))
            c, die = start, random.Random(case)
            for step, *given in (
                    (m.penalise_repetition, history, s.repeat_penalty, s.repeat_last_n,
                     s.presence_penalty, s.frequency_penalty),
                    (m.penalise_dry, history, s.dry_multiplier, s.dry_base, s.dry_allowed_length,
                     s.dry_last_n),
                    (m.keep_top_n_sigma, s.top_n_sigma), (m.keep_top_k, s.top_k),
                    (m.keep_typical, s.typical_p), (m.keep_top_p, s.top_p), (m.keep_min_p, s.min_p),
                    (m.exclude_top_choices, s.xtc_probability, s.xtc_threshold, die),
                    (m.temper, s.temperature)):
                taken, before = c, c[:]
                c = step(taken, *given)
                self.assertEqual(taken, before, step)
                self.assertTrue(c and set(ids(c)) <= set(ids(taken)), step)
                self.assertEqual(c, sorted(c, key=lambda p: (-p[0], p[1])), step)
            self.assertEqual(m.apply_samplers(start, history, s, random.Random(case)), c)

    def test_the_order_of_the_chain_is_the_owners(self):
        # Top-k 1 first keeps id 0 whatever it costs; penalties first put id 1 before it (4/2 < 3).
        c = m.candidates_of([4.0, 3.0])
        for samplers, best in (("top_k,penalties", 0), (" penalties , top_k,", 1)):
            s = m.Config(top_k=1, repeat_penalty=2.0, samplers=samplers)
            self.assertEqual(ids(m.apply_samplers(c, [0], s, random.Random(0))), [best])
        self.assertEqual(m.apply_samplers(c, [0], m.Config(samplers=","), random.Random(0)), c)
        self.assertEqual(m.chain_of(m.Config()), tuple(m.SAMPLERS))

    def test_an_unknown_sampler_is_a_config_error_of_one_line(self):
        for order in ("top_k,topp", "nonsense", "Temperature"):
            self.refused(m.ConfigError, lambda s=m.Config(samplers=order): m.chain_of(s),
                         order, "penalties, dry, ", "temperature")


class DrawTest(unittest.TestCase):
    def test_the_number_chooses_the_slice_it_falls_in(self):
        # Halves: slices [0, 1/2), [1/2, 3/4), [3/4, 7/8), [7/8, 15/16), [15/16, 1).
        for value, token in ((0.0, 4), (0.49, 4), (0.51, 0), (0.74, 0), (0.76, 2), (0.87, 2),
                             (0.88, 1), (0.93, 1), (0.94, 3), (1.0 - 2.0 ** -53, 3)):
            rng = mock.Mock(**{"random.return_value": value})
            self.assertEqual(m.draw(HALVES, rng), token)
            rng.random.assert_called_once_with()

    def test_one_number_draws_a_token_and_the_same_seed_draws_the_same(self):
        def reply(seed, config):
            rng, twin, history = random.Random(seed), random.Random(seed), array("i", [1, 2])
            for _ in range(40):
                history.append(m.draw_token([0.1 * i for i in range(50)], history, config, rng))
                twin.random()
            self.assertEqual(rng.getstate(), twin.getstate())
            return history
        for config, differ in ((m.Config(temperature=2.0), True), (m.Config(top_k=1), False)):
            self.assertEqual(reply(1, config), reply(1, config))
            self.assertEqual(reply(1, config) != reply(2, config), differ)

    def test_penalties_see_prompt_and_reply(self):
        # Presence 10 sinks each id once seen: the prompt holds 0, so 1, 2, 3 follow, then 0 again.
        s, history = m.Config(temperature=0.0, presence_penalty=10.0), array("i", [0])
        for _ in range(4):
            history.append(m.draw_token([5.0, 4.0, 3.0, 2.0], history, s, random.Random(0)))
        self.assertEqual(list(history), [0, 1, 2, 3, 0])


class TheKernelDrawsAsTheChainDoes(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.engine = compiled_engine()

    def test_for_any_settings_logits_history_and_chance(self):
        rng, unlike = random.Random(70), 0
        pick = rng.choice
        for case in range(600):
            n = pick((1, 5, 60, 300))
            settings = m.Config(  # of the usual chain, at the ends of what they may be and beyond
                temperature=pick((0.3, 0.85, 100.0)), top_k=pick((1, 7, 40, 1000, 10 ** 9)),
                top_p=pick((0.0, 1e-60, 0.2, 0.92, 1.0)), min_p=pick((0.0, 0.06, 0.5, 1.0)),
                dry_multiplier=pick((0.0, 0.8, 3.0)), dry_last_n=pick((-1, 0, 20, 10 ** 9)),
                dry_allowed_length=pick((1, 2, 4, 10 ** 9)))
            logits = array("f", [rng.gauss(0.0, 3.0) for _ in range(n)])
            some = [rng.randrange(n) for _ in range(rng.choice((1, 3, 12)))]
            history = array("i", [rng.choice(some) for _ in range(rng.randrange(1, 80))])
            draws = [random.Random(case) for _ in range(2)]
            fast = m.fast_draw(logits, history, settings, draws[0], self.engine)
            self.assertIsNotNone(fast)
            unlike += fast != m.draw_token(logits, history, settings, draws[1])
            self.assertNotEqual(draws[0].getstate(), random.Random(case).getstate())
            self.assertEqual(draws[0].getstate(), draws[1].getstate())
        self.assertLessEqual(unlike, 3, "float32 may round a sum to the other side of a bound")

    def test_what_it_cannot_do_is_left_to_the_chain(self):
        logits, history, rng = array("f", [0.0, 2.0, 1.0]), array("i", [1]), random.Random(1)
        before = rng.getstate()
        for changes in ({"temperature": 0.0}, {"top_k": 0}, {"xtc_probability": 0.5},
                        {"top_n_sigma": 1.0}, {"samplers": "top_k,temperature"},
                        {"dry_base": 1.0}, {"typical_p": 0.9}, {"repeat_penalty": 1.1},
                        {"presence_penalty": 0.1}):
            self.assertIsNone(m.fast_draw(logits, history, m.Config(**changes), rng, self.engine),
                              changes)
        self.assertIsNone(m.fast_draw(logits, history, m.Config(), rng, m.interpreted_engine()))
        for bad in (math.nan, math.inf, -math.inf):
            logits[1] = bad
            self.assertIsNone(m.fast_draw(logits, history, m.Config(), rng, self.engine))
        self.assertEqual(rng.getstate(), before)
