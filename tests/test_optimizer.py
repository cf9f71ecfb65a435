"""Claims about AdamW, the clipping of gradients and the schedule of the rate."""
import math
import random
import unittest

import macrogpt as m
from support import Case

CONFIG = m.Config(beta1=0.8, beta2=0.95, eps_adam=1e-7, weight_decay=0.1, grad_clip=1.5)


class NaiveAdamW:
    """Algorithm 2 of arXiv:1711.05101 on plain lists, after clipping by the global norm."""

    def __init__(self, weights, decays, config):
        self.w = [list(w) for w in weights]
        self.m, self.v = ([[0.0] * len(w) for w in weights] for _ in range(2))
        self.decays, self.t = decays, 0
        self.beta1, self.beta2, self.eps = config.beta1, config.beta2, config.eps_adam
        self.weight_decay, self.clip = config.weight_decay, config.grad_clip

    def step(self, grads, rate):
        self.t += 1
        norm = math.sqrt(sum(g * g for grad in grads for g in grad))
        shrink = self.clip / norm if norm > self.clip else 1.0
        for p, grad in enumerate(grads):
            for i, g in enumerate(shrink * g for g in grad):
                self.m[p][i] = self.beta1 * self.m[p][i] + (1 - self.beta1) * g
                self.v[p][i] = self.beta2 * self.v[p][i] + (1 - self.beta2) * g * g
                mean = self.m[p][i] / (1 - self.beta1 ** self.t)
                square = self.v[p][i] / (1 - self.beta2 ** self.t)
                decay = self.weight_decay * self.w[p][i] if self.decays[p] else 0.0
                self.w[p][i] -= rate * (mean / (math.sqrt(square) + self.eps) + decay)
        return norm


def state(params):
    return [(p.data[:], *(moment[:] for moment in p.moments), p.steps) for p in params]


class AdamWIsItsPaper(Case):
    def params(self, engine, shapes=((3, 4), (2, 2), (1, 1)), decays=(True, False, True)):
        rng = random.Random(1)
        return [m.MatrixParam.normal(engine, f"p{i}", *shape, 1.0, rng, d)
                for i, (shape, d) in enumerate(zip(shapes, decays))]

    def give(self, param, numbers):
        param.grad = param.engine.buffer_of(numbers)

    def test_several_steps_agree_with_a_naive_twin(self):
        for make in (m.interpreted_engine, m.reference_engine):
            for code, tolerance in (("f", 1e-5), ("d", 1e-11)):
                params, rng = self.params(make(code)), random.Random(2)
                twin = NaiveAdamW([p.data for p in params], [True, False, True], CONFIG)
                for step in range(12):
                    size = (0.01, 1.0, 30.0)[step % 3]  # some are clipped and some are not
                    grads = [[rng.gauss(0, size) for _ in p.data] for p in params]
                    for param, grad in zip(params, grads):
                        self.give(param, grad)
                    found, expected = m.descend(params, 0.03, CONFIG), twin.step(grads, 0.03)
                    self.assertAlmostEqual(found, expected, delta=1e-5 * expected)
                    for i, p in enumerate(params):
                        for a, b in zip((p.data, *p.moments), (twin.w[i], twin.m[i], twin.v[i])):
                            self.assert_near(a, b, tolerance, (code, step, p.name))
                        self.assertEqual((p.steps, p.grad), (step + 1, None))

    def test_a_parameter_without_a_gradient_stays_and_does_not_age(self):
        params = self.params(m.interpreted_engine())
        before = state(params)
        self.give(params[0], [1.0] * 12)
        m.descend(params, 0.1, CONFIG)
        self.assertEqual(state(params)[1:], before[1:])
        self.assertNotEqual(state(params)[0], before[0])

    def test_a_gradient_that_is_not_finite_moves_nothing(self):
        for make in (m.interpreted_engine, m.reference_engine):
            params = self.params(make())
            for param in params:
                self.give(param, [1.0] * len(param.data))
            m.descend(params, 0.1, CONFIG)
            for bad in (math.nan, math.inf, -math.inf):
                before = state(params)
                for param in params:
                    self.give(param, [0.5] * len(param.data))
                params[1].grad[2] = bad
                self.assertEqual(m.descend(params, 0.1, CONFIG), math.inf)
                self.assertEqual(state(params), before)
                self.assertEqual([p.grad for p in params], [None] * 3)
            self.assertEqual([p.steps for p in params], [1] * 3)  # the next good one is the next

    def test_the_norm_does_not_overflow_float32(self):
        params = self.params(m.interpreted_engine())
        self.assertEqual(m.gradient_norm(params), 0.0)
        self.give(params[2], [3e38])
        self.assertAlmostEqual(m.gradient_norm(params) / 3e38, 1.0, places=5)


class TheRateRisesAndFalls(unittest.TestCase):
    def test_it_rises_in_a_line_until_the_warmup_ends_and_falls_by_its_shape_to_zero(self):
        third = 0.5 * math.cos(math.pi / 3)
        for shape, corners in (("linear", {0.91: 0.1, 0.4: 2 / 3}),
                               ("cosine", {0.4: 0.5 + third, 0.7: 0.5 - third})):
            for done, share in {0.05: 0.5, 0.1: 1.0, 0.55: 0.5, 1.0: 0.0, 1.5: 0.0,
                                **corners}.items():
                self.assertAlmostEqual(m.scheduled_rate(0.2, done, 0.1, shape), 0.2 * share)
            self.assertGreater(m.scheduled_rate(1.0, 0.0, 0.1, shape), 0.0)  # the first step moves
            for warmup in (0.0, 0.05, 0.5, 0.9, 1.0):
                rates = [m.scheduled_rate(1.0, i / 200, warmup, shape) for i in range(201)]
                top = rates.index(max(rates))
                self.assertAlmostEqual(top / 200, warmup, delta=0.0051)
                self.assertEqual(rates, sorted(rates[:top]) + sorted(rates[top:], reverse=True))
                self.assertTrue(all(0.0 <= r <= 1.0 + 1e-12 for r in rates))
                self.assertAlmostEqual(rates[-1], 0.0)
