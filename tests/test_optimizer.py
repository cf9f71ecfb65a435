"""Claims about AdamW, the clipping of gradients and the schedule of the rate."""
import itertools
import math
import random
import unittest
from array import array

import macrogpt as m
from support import Case

CONFIG = m.Config(beta1=0.8, beta2=0.95, eps_adam=1e-7, weight_decay=0.1, grad_clip=1.5)


class NaiveAdamW:
    """Algorithm 2 of arXiv:1711.05101 on plain lists, after clipping by the global norm."""

    def __init__(self, weights, decays, config):
        self.w = [list(w) for w in weights]
        self.m, self.v = ([[0.0] * len(w) for w in weights] for _ in range(2))
        self.decays, self.config, self.t = decays, config, 0

    def step(self, grads, rate):
        self.t += 1
        c, beta1, beta2 = self.config, self.config.beta1, self.config.beta2
        norm = math.sqrt(sum(g * g for grad in grads for g in grad))
        shrink = c.grad_clip / norm if norm > c.grad_clip else 1.0
        for p, grad in enumerate(grads):
            for i, g in enumerate(shrink * g for g in grad):
                self.m[p][i] = beta1 * self.m[p][i] + (1 - beta1) * g
                self.v[p][i] = beta2 * self.v[p][i] + (1 - beta2) * g * g
                mean = self.m[p][i] / (1 - beta1 ** self.t)
                square = self.v[p][i] / (1 - beta2 ** self.t)
                decay = c.weight_decay * self.w[p][i] if self.decays[p] else 0.0
                self.w[p][i] -= rate * (mean / (math.sqrt(square) + c.eps_adam) + decay)
        return norm


class AdamWIsItsPaper(Case):
    def test_steps_agree_with_a_naive_twin_and_there_is_none_without_a_finite_gradient(self):
        for make, (code, tolerance) in itertools.product(
                (m.interpreted_engine, m.reference_engine), (("f", 1e-5), ("d", 1e-11))):
            engine, rng, decays = make(code), random.Random(2), (True, False, True)
            params = [m.MatrixParam.normal(engine, f"p{i}", *shape, 1.0, rng, decays[i])
                      for i, shape in enumerate(((3, 4), (2, 2), (1, 1)))]
            idle = m.MatrixParam.normal(engine, "idle", 2, 2, 1.0, rng)
            twin, start = NaiveAdamW([p.data for p in params], decays, CONFIG), idle.data[:]
            # some are clipped and some are not; behind one that is not finite comes the next
            for size in (0.01, 1.0, math.nan, 30.0, -math.inf, math.inf, 0.5, 2.0):
                finite = math.isfinite(size)
                grads = [[rng.gauss(0, size if finite else 1.0) for _ in p.data] for p in params]
                for param, grad in zip(params, grads):
                    param.grad = engine.buffer_of(grad)
                if not finite:
                    params[1].grad[2] = size
                found = m.descend([*params, idle], 0.03, CONFIG)
                wanted = twin.step(grads, 0.03) if finite else math.inf
                self.assertTrue(math.isclose(found, wanted, rel_tol=1e-5), (found, wanted))
                for i, p in enumerate(params):
                    for a, b in zip((p.data, *p.moments), (twin.w[i], twin.m[i], twin.v[i])):
                        self.assert_near(a, b, tolerance, (code, size, p.name))
                    self.assertEqual((p.steps, p.grad), (twin.t, None))
            self.assertEqual((idle.data, idle.steps), (start, 0))

    def test_the_norm_does_not_overflow_float32(self):
        param = m.MatrixParam(m.interpreted_engine(), "p", 1, 1)
        self.assertEqual(m.gradient_norm([param]), 0.0)
        param.grad = array("f", [3e38])
        self.assertAlmostEqual(m.gradient_norm([param]) / 3e38, 1.0, places=5)


class TheRateRisesAndFalls(unittest.TestCase):
    def test_it_rises_in_a_line_until_the_warmup_ends_and_falls_by_its_shape_to_zero(self):
        third = 0.5 * math.cos(math.pi / 3)
        for shape, corners in (("linear", {0.91: 0.1, 0.4: 2 / 3}),
                               ("cosine", {0.4: 0.5 + third, 0.7: 0.5 - third})):
            for done, share in {0.05: 0.5, 0.1: 1.0, 0.55: 0.5, 1.0: 0.0, 1.5: 0.0,
                                **corners}.items():
                self.assertAlmostEqual(m.scheduled_rate(0.2, done, 0.1, shape), 0.2 * share)
            self.assertGreater(m.scheduled_rate(1.0, 0.0, 0.1, shape), 0.0)  # the first step moves
            for warmup in (0.0, 1.0):  # all falls, or all rises until the end
                rates = [m.scheduled_rate(1.0, i / 200, warmup, shape) for i in range(201)]
                self.assertEqual(rates[:-1], sorted(rates[:-1], reverse=not warmup))
                self.assertAlmostEqual(rates[-1], 0.0)
