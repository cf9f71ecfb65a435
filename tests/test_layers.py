"""Claims about operations alone; of what the model does with them, test_model speaks."""
import itertools
import math
import random

import macrogpt as m
from support import Case
from test_model import PLAIN


class OperationsKeepTheirPromises(Case):
    engine = m.interpreted_engine()

    def test_shapes_bounds_angles_ids_and_targets_that_do_not_fit_are_refused(self):
        def blank(rows, dim):
            return m.VectorValue(self.engine, rows, dim)
        x, w, odd = blank(2, 4), m.MatrixParam(self.engine, "w", 3, 5), blank(2, 3)
        with self.assertRaisesRegex(ValueError, "w takes vectors of 5; found 4"):
            m.linear(x, w)
        with self.assertRaisesRegex(ValueError, r"w has shape \(3, 5\); found"):
            w.load(self.engine.buffer(14))
        for operation, *given in (
                (m.mixed, x, w), (m.swiglu, odd), (m.added, x, odd), (m.rope_angles, 0, 1, 3),
                *((m.added, x, blank(*shape)) for shape in ((4, 2), (1, 4))),
                *((m.embed, ids, w) for ids in ([3], [-1], [0, 1, 99])),
                *((m.cross_entropy, odd, t) for t in ([0], [0, 1, 2], [0, 3], [-2, 0], [])),
                *((m.rope_turned, blank(2, 6), self.engine.buffer(angles), width, turned)
                  for angles, width, turned in ((4, 4, 4), (4, 2, 3), (9, 4, 4), (8, 4, 8))),
                *((m.causal_attention, blank(3, 12), starts, 2)
                  for starts in ((0, 2), (1, 3), (0, 4), (0, 2, 1, 3), (-1, 3))),
                (m.causal_attention, blank(3, 12), (0, 3), 3),
                (m.causal_attention, blank(3, 13), (0, 3), 2),
                *((operation, *given, self.engine.buffer(n)) for n in (0, 14, 16)
                  for operation, *given in ((w.load,), (m.VectorValue, self.engine, 3, 5),
                                            (m.MatrixParam, self.engine, "w", 3, 5)))):
            with self.assertRaises(ValueError, msg=given):
                operation(*given)

    def slopes(self, engine, times, build, *shapes):
        """Return how inputs of such shapes learn from the sum of what is built of them."""
        inputs = [m.MatrixParam.normal(engine, "x", *shape, 1.0, random.Random(shape[0]))
                  for shape in shapes]
        before = [x.data[:] for x in inputs]
        out = build(*inputs)
        for _ in range(times - 1):
            out = m.added(out, build(*inputs))
        self.assertEqual([x.data for x in inputs], before, "inputs are left alone")
        ups = m.MatrixParam.normal(engine, "c", out.rows, out.dim, 1.0, random.Random(50)).data
        m.backward(m.ScalarValue(0.0).of((out, lambda g: out.add_grad(ups))))
        return [slope for x in inputs for slope in x.grad]

    def test_what_is_used_twice_learns_twice(self):
        def turned(x):
            return m.rope_turned(x, x.engine.buffer_of(m.rope_angles(2, 3, 2, 100.0)), 2, 4)
        for make, (build, *shapes) in itertools.product(PLAIN, (
                (lambda table: m.embed([2, 0, 2, 3], table), (4, 3)), (m.linear, (3, 5), (4, 5)),
                (m.mixed, (3, 2), (2, 5)), (m.added, (3, 4), (3, 4)), (m.scaled, (3, 4), (1, 1)),
                (m.rmsnorm, (3, 5)), (turned, (3, 7)), (m.swiglu, (3, 8)),
                (lambda x: m.causal_attention(x, (0, 2, 3, 5), 2), (5, 12)),
                (lambda x: m.dropout(x, 0.4, 1234), (4, 5)))):
            once, twice = (self.slopes(make("d"), times, build, *shapes) for times in (1, 2))
            self.assertGreater(max(map(abs, once)), 0.05)
            self.assert_near(twice, [2.0 * slope for slope in once], 1e-6)

    def test_linear_sees_every_change_of_the_numbers(self):
        w = m.MatrixParam(self.engine, "w", 2, 3, self.engine.buffer_of(range(6)))
        x = m.VectorValue(self.engine, 1, 3, self.engine.buffer_of([1.0] * 3))
        self.assert_near(m.linear(x, w).data, [3.0, 12.0], 1e-5)
        w.load(self.engine.buffer_of([1.0] * 6))
        self.assert_near(m.linear(x, w).data, [3.0, 3.0], 1e-5)
        w.data[0] = 11.0
        w.changed()
        self.assert_near(m.linear(x, w).data, [13.0, 3.0], 1e-5)

    def test_cross_entropy_is_the_mean_over_the_rows_with_a_target(self):
        for engine in (self.engine, m.reference_engine()):
            x = m.MatrixParam(engine, "x", 3, 2, engine.buffer_of(
                [0.0, math.log(3), 0.0, 0.0, 5.0, 5.0]))
            loss, each = m.cross_entropy(x, [0, -1, 1])
            self.assert_near(each, [math.log(4), 0.0, math.log(2)])
            self.assertAlmostEqual(loss.data, math.log(8) / 2, 6)
            m.backward(loss)
            self.assert_near(x.grad, [-0.375, 0.375, 0.0, 0.0, 0.25, -0.25])
            x.grad = None
            loss, each = m.cross_entropy(x, [-1] * 3)
            m.backward(loss)
            self.assertEqual((loss.data, [*each], [*x.grad]), (0.0, [0.0] * 3, [0.0] * 6))

    def test_normal_numbers_have_the_spread_asked_for(self):
        w = m.MatrixParam.normal(self.engine, "w", 50, 40, 0.3, random.Random(90), decays=False)
        self.assertAlmostEqual(math.sqrt(sum(x * x for x in w.data) / 2000), 0.3, delta=0.02)
        self.assertAlmostEqual(sum(w.data) / 2000, 0.0, delta=0.03)
        self.assertEqual((w.rows, w.dim, w.decays, w.needs_grad), (50, 40, False, True))
