"""Claims about the transformer's operations and the parameters they use; gradients: test_model."""
import math
import random

import macrogpt as m
from support import Case

ENGINES = (m.interpreted_engine, m.reference_engine)


def matrix(engine, rows, dim, rng, name="w"):
    return m.MatrixParam.normal(engine, name, rows, dim, 1.0, rng)


def copy_of(engine, rows, dim, data):
    return m.VectorValue(engine, rows, dim, engine.buffer_of(data))


class GradientsAreFiniteDifferences(Case):
    def check(self, build, *shapes):
        """Compare the gradient of Σ c·build(*inputs) wrt every input with central differences.

        Every number of every input is moved, and every input is used twice.
        """
        for make in ENGINES:
            rng, engine = random.Random(50), make("d")
            inputs = [matrix(engine, rows, dim, rng, f"input {i}")
                      for i, (rows, dim) in enumerate(shapes)]

            def twice(inputs=inputs):
                return m.added(build(*inputs), build(*inputs))
            weights = [rng.gauss(0.0, 1.0) for _ in twice().data]

            def total(inputs=inputs, weights=weights, twice=twice):
                for x in inputs:
                    x.changed()
                return math.fsum(a * b for a, b in zip(twice().data, weights))
            out, c = twice(), engine.buffer_of(weights)
            m.backward(m.ScalarValue(0.0).of((out, lambda g, out=out, c=c: out.add_grad(c))))
            for x in inputs:
                self.compare(x, total, engine.name)

    def compare(self, x, total, hint, h=1e-5):
        slopes = []
        for i, value in enumerate(x.data):
            sides = []
            for x.data[i] in (value + h, value - h):
                sides.append(total())
            x.data[i] = value
            slopes.append((sides[0] - sides[1]) / (2 * h))
        steepest = max(map(abs, slopes))
        self.assertGreater(steepest, 0.05, "a flat function would prove nothing")
        self.assert_near(x.grad, slopes, 1e-6 * (1.0 + steepest), f"{hint}, {x.name}")

    def test_of_every_operation(self):
        def turned(x, width, channels):
            angles = x.engine.buffer_of(m.rope_angles(2, 3, width, 100.0))
            return m.rope_turned(x, angles, width, channels)

        def delta_of(w, a, b):
            delta = m.DeltaAdapter(w.engine, "d", w, 2, random.Random(0))
            delta.a, delta.b = a, b
            return delta
        for name, build, *shapes in (
                ("embed", lambda table: m.embed([2, 0, 2, 3], table), (4, 3)),
                ("linear", m.linear, (3, 5), (4, 5)),
                ("linear of itself", lambda x: m.linear(x, x), (3, 5)),
                ("mixed", m.mixed, (3, 2), (2, 5)),
                ("added", m.added, (3, 4), (3, 4)),
                ("added to itself", lambda x: m.added(x, x), (3, 4)),
                ("scaled", m.scaled, (3, 4), (1, 1)),
                ("rmsnorm", m.rmsnorm, (3, 5)),
                ("rmsnorm of one", lambda x: m.rmsnorm(x, 0.5), (2, 1)),
                ("rope", lambda x: turned(x, 4, 8), (3, 8)),
                ("rope of some channels", lambda x: turned(x, 2, 4), (3, 7)),
                ("attention", lambda x: m.causal_attention(x, (0, 2, 3, 5), 2), (5, 12)),
                ("swiglu", m.swiglu, (3, 8)),
                ("dropout", lambda x: m.dropout(x, 0.4, 1234), (4, 5)),
                ("a delta on a matrix", lambda x, w, a, b: delta_of(w, a, b)(x, m.linear(x, w)),
                 (3, 5), (4, 5), (2, 5), (4, 2)),
                ("a delta on an embedding", lambda w, a, b: delta_of(w, a, b).embed(
                    [3, 1, 3], m.embed([3, 1, 3], w)), (4, 5), (2, 5), (4, 2))):
            with self.subTest(name):
                self.check(build, *shapes)


class OperationsKeepTheirPromises(Case):
    def setUp(self):
        self.engine, self.rng = m.interpreted_engine(), random.Random(80)

    def test_the_angles_are_position_times_a_falling_rate(self):
        found = m.rope_angles(3, 2, 4, 100.0)  # the rates of the two pairs are 1 and 1/10
        expected = [turn(a) for a in (3.0, 0.3, 4.0, 0.4) for turn in (math.cos, math.sin)]
        self.assert_near(found, expected, 1e-12)
        self.assert_near(m.rope_angles(7, 1, 4)[2:], [math.cos(0.07), math.sin(0.07)], 1e-12)

    def test_embed_returns_the_rows_named(self):
        table = m.MatrixParam(self.engine, "t", 3, 2, self.engine.buffer_of(range(6)))
        self.assertEqual(list(m.embed([2, 0, 2], table).data), [4, 5, 0, 1, 4, 5])
        self.assertEqual(m.embed([], table).rows, 0)

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

    def test_added_leaves_its_inputs_alone_and_dropout_follows_its_seed(self):
        x, y = (copy_of(self.engine, 1, 2, [1.0, 2.0]) for _ in range(2))
        self.assertEqual(list(m.added(x, y).data), [2.0, 4.0])
        self.assertEqual((list(x.data), list(y.data)), ([1.0, 2.0], [1.0, 2.0]))
        x = copy_of(self.engine, 20, 50, [1.0] * 1000)
        self.assertEqual(m.dropout(x, 0.3, 9).data, m.dropout(x, 0.3, 9).data)
        self.assertIs(m.dropout(x, 0.0, 9), x)

    def test_cross_entropy_is_the_mean_over_the_rows_with_a_target(self):
        for make in ENGINES:
            logits = copy_of(make("d"), 3, 2, [0.0, math.log(3), 0.0, 0.0, 5.0, 5.0])
            loss, each = m.cross_entropy(logits, [0, -1, 1])
            self.assert_near(each, [math.log(4), 0.0, math.log(2)], 1e-12)
            self.assertAlmostEqual(loss.data, math.log(8) / 2)
        x = matrix(self.engine, 2, 3, self.rng)
        loss, each = m.cross_entropy(x, [-1, -1])
        m.backward(loss)
        self.assertEqual((loss.data, list(each), list(x.grad)), (0.0, [0.0] * 2, [0.0] * 6))
        m.backward(m.cross_entropy(x, [-1, 2])[0])
        self.assertEqual((list(x.grad[:3]), all(x.grad[3:])), ([0.0] * 3, True))


class ParametersAndDeltas(Case):
    engine = m.interpreted_engine()

    def test_normal_numbers_have_the_spread_asked_for(self):
        w = m.MatrixParam.normal(self.engine, "w", 50, 40, 0.3, random.Random(90), decays=False)
        self.assertAlmostEqual(math.sqrt(sum(x * x for x in w.data) / 2000), 0.3, delta=0.02)
        self.assertAlmostEqual(sum(w.data) / 2000, 0.0, delta=0.03)
        self.assertEqual((w.rows, w.dim, w.decays, w.needs_grad), (50, 40, False, True))

    def test_linear_sees_every_change_of_the_numbers(self):
        w = m.MatrixParam(self.engine, "w", 2, 3, self.engine.buffer_of(range(6)))
        x = copy_of(self.engine, 1, 3, [1.0, 1.0, 1.0])
        self.assert_near(m.linear(x, w).data, [3.0, 12.0], 1e-5)
        w.load(self.engine.buffer_of([1.0] * 6))
        self.assert_near(m.linear(x, w).data, [3.0, 3.0], 1e-5)
        w.data[0] = 11.0
        w.changed()
        self.assert_near(m.linear(x, w).data, [13.0, 3.0], 1e-5)
        self.assertEqual(w.changes, 2)

    def test_a_newborn_has_no_effect_and_then_its_change_is_b_times_a(self):
        engine, rng, ids = m.interpreted_engine(), random.Random(95), (6, 0, 6)
        base, x = matrix(engine, 7, 4, rng), matrix(engine, 3, 4, rng, "x")
        delta = m.DeltaAdapter(engine, "d", base, 2, rng)

        def outputs():
            return (delta(x, m.linear(x, base)).data, delta.embed(ids, m.embed(ids, base)).data)
        spoken, table = m.linear(x, base).data, m.embed(ids, base).data
        self.assertEqual(outputs(), (spoken, table))
        delta.b.load(engine.buffer_of([rng.gauss(0, 1) for _ in range(14)]))
        a, b = delta.a.data, delta.b.data
        self.assertTrue(any(a))
        change = [[sum(b[o * 2 + r] * a[r * 4 + c] for r in range(2)) for c in range(4)]
                  for o in range(7)]
        said = [spoken[t * 7 + o] + sum(x.data[t * 4 + c] * change[o][c] for c in range(4))
                for t in range(3) for o in range(7)]
        looked_up = [table[t * 4 + c] + change[i][c] for t, i in enumerate(ids) for c in range(4)]
        for found, expected in zip(outputs(), (said, looked_up)):
            self.assert_near(found, expected, 1e-5)
