"""Claims about the transformer's operations, their gradients, and the parameters they use."""
import math
import random
import unittest
from array import array

import macrogpt as m

ENGINES = (m.interpreted_engine, m.reference_engine)


def matrix(engine, rows, dim, rng, name="w"):
    return m.MatrixParam.normal(engine, name, rows, dim, 1.0, rng)


def copy_of(engine, rows, dim, data):
    return m.VectorValue(engine, rows, dim, engine.buffer_of(data))


def naive_attention(qkv, starts, n_head):
    """Causal softmax attention on rows of plain lists, written from the formula."""
    dim = len(qkv[0]) // 3
    width, out = dim // n_head, []
    for i, row in enumerate(qkv):
        first = max(s for s in starts[:-1] if s <= i)
        mixed = []
        for h in range(n_head):
            q = row[h * width:(h + 1) * width]
            keys = [qkv[j][dim + h * width:dim + (h + 1) * width] for j in range(first, i + 1)]
            values = [qkv[j][2 * dim + h * width:2 * dim + (h + 1) * width]
                      for j in range(first, i + 1)]
            scores = [math.exp(sum(a * b for a, b in zip(q, k)) / math.sqrt(width)) for k in keys]
            mixed += [sum(s * v[c] for s, v in zip(scores, values)) / sum(scores)
                      for c in range(width)]
        out.append(mixed)
    return out


class LayerCase(unittest.TestCase):
    def assert_near(self, found, expected, tolerance=1e-6, hint=""):
        self.assertEqual(len(found), len(expected), hint)
        for i, (a, b) in enumerate(zip(found, expected)):
            self.assertTrue(abs(a - b) <= tolerance, f"{hint}: number {i} is {a!r}, not {b!r}")


class GradientsAreFiniteDifferences(LayerCase):
    def check(self, build, *shapes):
        """Compare the gradient of Σ c·build(*inputs) wrt every input with central differences.

        Every number of every input is moved, and every input is used twice. Two rows at least,
        for one alone meets a matrix in fixed point, where a small step is no step.
        """
        for make in ENGINES:
            rng, engine = random.Random(50), make("d")
            inputs = [matrix(engine, rows, dim, rng, f"input {i}")
                      for i, (rows, dim) in enumerate(shapes)]

            def twice(inputs=inputs):
                return m.added(build(*inputs), build(*inputs), 0.4)
            weights = [rng.gauss(0.0, 1.0) for _ in twice().data]

            def total(inputs=inputs, weights=weights, twice=twice):
                for x in inputs:
                    x.changed()
                return math.fsum(a * b for a, b in zip(twice().data, weights))
            self.run_backward(engine, twice(), weights)
            for x in inputs:
                self.assertIsNotNone(x.grad, x.name)
                self.compare(x, total, engine.name)

    def run_backward(self, engine, out, weights):
        """Differentiate Σ weights·out: a scalar on top of the vector."""
        top = m.ScalarValue(0.0)
        coefficients = engine.buffer_of(weights)
        top.connect([out], lambda g: engine.add_scaled(
            coefficients, out.grad_buffer(), len(coefficients), g))
        m.backward(top)

    def compare(self, x, total, hint, h=1e-5):
        slopes = []
        for i, value in enumerate(x.data):
            x.data[i] = value + h
            above = total()
            x.data[i] = value - h
            below = total()
            x.data[i] = value
            slopes.append((above - below) / (2 * h))
        scale = 1.0 + max(map(abs, slopes))
        self.assertGreater(max(map(abs, slopes)), 0.05, "a flat function would prove nothing")
        self.assert_near(x.grad, slopes, 1e-6 * scale, f"{hint}, {x.name}")

    def test_embed(self):
        self.check(lambda table: m.embed([2, 0, 2, 3], table), (4, 3))

    def test_linear(self):
        self.check(m.linear, (3, 5), (4, 5))

    def test_linear_of_itself(self):
        self.check(lambda x: m.linear(x, x), (3, 5))

    def test_mixed(self):
        self.check(m.mixed, (3, 2), (2, 5))

    def test_added_with_a_scale(self):
        self.check(lambda x, y: m.added(x, y, -2.5), (3, 4), (3, 4))
        self.check(m.added, (3, 4), (3, 4))
        self.check(lambda x: m.added(x, x, 0.25), (3, 4))

    def test_beside(self):
        self.check(m.beside, (3, 2), (3, 4))

    def test_with_rows(self):
        self.check(lambda x, y: m.with_rows(x, [0, 2], y), (4, 3), (2, 3))

    def test_with_no_rows(self):
        engine = m.interpreted_engine()
        x = matrix(engine, 2, 3, random.Random(1))
        self.assertEqual(m.with_rows(x, [], m.VectorValue(engine, 0, 3)).data, x.data)

    def test_scaled(self):
        self.check(m.scaled, (3, 4), (1, 1))

    def test_rmsnorm(self):
        self.check(m.rmsnorm, (3, 5))
        self.check(lambda x: m.rmsnorm(x, 0.5), (2, 1))

    def test_rope_rotate(self):
        self.check(lambda x: m.rope_rotate(x, 5, 4, 100.0), (3, 8))

    def test_rope_turned_leaves_the_rest(self):
        def turn(x):
            angles = x.engine.buffer_of(m.rope_angles(2, 3, 2))
            return m.rope_turned(x, angles, 2, 4)
        self.check(turn, (3, 7))

    def test_causal_attention_over_several_segments(self):
        for starts, heads in (((0, 5), 2), ((0, 2, 3, 5), 2), ((0, 1, 5), 1)):
            self.check(lambda x, s=starts, h=heads: m.causal_attention(x, s, h), (5, 12))

    def test_swiglu(self):
        self.check(m.swiglu, (3, 8))

    def test_dropout_with_a_seed(self):
        self.check(lambda x: m.dropout(x, 0.4, 1234), (4, 5))

    def test_dropout_at_rate_zero(self):
        self.check(lambda x: m.added(m.dropout(x, 0.0, 1234), x), (2, 2))

    def test_cross_entropy(self):
        for targets in ([1, 0, 4, 2], [-1, 3, -1, 0]):
            for make in ENGINES:
                engine = make("d")
                x = matrix(engine, 4, 5, random.Random(51), "logits")
                m.backward(m.cross_entropy(x, targets)[0])
                self.compare(x, lambda t=targets, x=x: m.cross_entropy(x, t)[0].data, engine.name)

    def test_cross_entropy_scaled_from_above(self):
        engine = m.interpreted_engine("d")
        x = matrix(engine, 2, 3, random.Random(52), "logits")
        m.backward(m.cross_entropy(x, [1, 2])[0] * 3.0)
        self.compare(x, lambda: 3.0 * m.cross_entropy(x, [1, 2])[0].data, engine.name)

    def test_unlikelihood(self):
        for targets in ([1, 0, 4, 2], [-1, 3, -1, 0]):
            for make in ENGINES:
                engine = make("d")
                x = matrix(engine, 4, 5, random.Random(53), "logits")
                m.backward(m.unlikelihood(x, targets))
                self.compare(x, lambda t=targets, x=x: m.unlikelihood(x, t).data, engine.name)

    def test_unlikelihood_is_bounded_where_the_model_is_sure(self):
        engine = m.interpreted_engine("d")
        x = m.MatrixParam(engine, "logits", 1, 3, array("d", [50.0, 0.0, 0.0]))
        loss = m.unlikelihood(x, [0])
        m.backward(loss)
        self.assertTrue(math.isfinite(loss.data) and all(map(math.isfinite, x.grad)))
        self.assertLess(max(map(abs, x.grad)), 20.0)

    def test_a_delta_on_a_matrix(self):
        def build(x, w, a, b):
            delta = m.DeltaAdapter(x.engine, "d", w, 2, random.Random(0), 0.7)
            delta.a, delta.b = a, b
            return delta(x, m.linear(x, w))
        self.check(build, (3, 5), (4, 5), (2, 5), (4, 2))

    def test_a_delta_on_an_embedding(self):
        def build(w, a, b):
            delta = m.DeltaAdapter(w.engine, "d", w, 2, random.Random(0), 0.7)
            delta.a, delta.b = a, b
            ids = [3, 1, 3]
            return delta.embed(ids, m.embed(ids, w))
        self.check(build, (4, 5), (2, 5), (4, 2))

    def test_a_frozen_input_gets_no_gradient_and_the_others_the_same(self):
        engine = m.interpreted_engine("d")
        for op, shapes in ((m.linear, ((3, 5), (4, 5))), (m.mixed, ((3, 2), (2, 5))),
                           (m.added, ((3, 4), (3, 4))), (m.scaled, ((3, 4), (1, 1)))):
            inputs = [matrix(engine, *shape, random.Random(53)) for shape in shapes]
            weights = [1.0] * len(op(*inputs).data)
            self.run_backward(engine, op(*inputs), weights)
            full = [x.grad for x in inputs]
            for frozen, other in ((0, 1), (1, 0)):
                inputs[0].grad = inputs[1].grad = None
                inputs[frozen].freeze()
                self.run_backward(engine, op(*inputs), weights)
                self.assertIsNone(inputs[frozen].grad)
                self.assertEqual(inputs[other].grad, full[other])
                inputs[frozen].freeze(False)


class AttentionSeesThePastOfItsOwnSegment(LayerCase):
    def attention(self, engine, rows, starts, heads):
        flat = [n for row in rows for n in row]
        qkv = copy_of(engine, len(rows), len(rows[0]) if rows else 12, flat)
        return m.causal_attention(qkv, starts, heads)

    def rows(self, count, dim=12, seed=60, size=1.0):
        rng = random.Random(seed)
        return [[rng.gauss(0.0, size) for _ in range(dim)] for _ in range(count)]

    def test_it_is_the_naive_softmax(self):
        for make in ENGINES:
            for heads in (1, 2, 4):
                for starts in ((0, 9), (0, 1, 2, 9), (0, 4, 9)):
                    rows = self.rows(9, size=2.0)
                    found = self.attention(make("d"), rows, starts, heads).data
                    expected = [n for row in naive_attention(rows, starts, heads) for n in row]
                    self.assert_near(found, expected, 1e-10)

    def test_later_rows_do_not_matter(self):
        for make in ENGINES:
            for cut in range(1, 7):
                rows, others = self.rows(7), self.rows(7, seed=61)
                changed = rows[:cut] + others[cut:]
                a = self.attention(make("f"), rows, (0, 7), 2)
                b = self.attention(make("f"), changed, (0, 7), 2)
                self.assert_near(b.data[:cut * 4], a.data[:cut * 4], 1e-6)
                self.assertNotEqual(b.row(6), a.row(6))

    def test_segments_do_not_see_each_other(self):
        for make in ENGINES:
            rows, others = self.rows(8), self.rows(8, seed=62)
            alone = self.attention(make("f"), rows[3:6], (0, 3), 2)
            inside = self.attention(make("f"), others[:3] + rows[3:6] + others[6:], (0, 3, 6, 8), 2)
            self.assert_near(inside.data[12:24], alone.data, 1e-6)

    def test_a_row_alone_returns_its_value(self):
        for make in ENGINES:
            rows = self.rows(1)
            self.assert_near(self.attention(make("f"), rows, (0, 1), 2).data, rows[0][8:], 1e-6)

    def test_an_empty_segment_changes_nothing(self):
        for make in ENGINES:
            rows = self.rows(3)
            expected = self.attention(make("f"), rows, (0, 1, 3), 2).data
            for starts in ((0, 0, 1, 3), (0, 1, 1, 3), (0, 1, 3, 3)):
                self.assert_near(self.attention(make("f"), rows, starts, 2).data, expected)

    def test_no_rows_give_no_rows(self):
        for make in ENGINES:
            for starts in ((0,), (0, 0)):
                self.assertEqual(self.attention(make("f"), [], starts, 2).rows, 0)

    def test_scores_of_any_size_keep_the_weights_finite(self):
        for make in ENGINES:
            out = self.attention(make("f"), self.rows(6, size=1e3), (0, 6), 2)
            self.assertTrue(all(map(math.isfinite, out.data)))

    def test_bounds_and_heads_that_do_not_fit_are_refused(self):
        engine = m.interpreted_engine()
        for starts in ((0, 2), (1, 3), (0, 4), (0, 2, 1, 3), (-1, 3)):
            with self.assertRaises(ValueError, msg=starts):
                self.attention(engine, self.rows(3), starts, 2)
        with self.assertRaises(ValueError):
            self.attention(engine, self.rows(3), (0, 3), 3)
        with self.assertRaises(ValueError):
            self.attention(engine, self.rows(3, dim=13), (0, 3), 2)


class RopeTurnsPairsByTheirPosition(LayerCase):
    def test_a_quarter_turn(self):
        for make in ENGINES:
            x = copy_of(make("d"), 2, 4, [1.0, 0.0, 3.0, 4.0] * 2)
            angles = array("d", [1.0, 0.0, 0.0, 1.0])  # row 0: none, row 1: a quarter
            turned = m.rope_turned(x, angles, 2, 4)
            self.assert_near(turned.row(0), [1.0, 0.0, 3.0, 4.0], 0.0)
            self.assert_near(turned.row(1), [0.0, 1.0, -4.0, 3.0], 0.0)

    def test_the_angles_are_position_times_a_falling_rate(self):
        found = m.rope_angles(3, 2, 4, 100.0)  # the rates of the two pairs are 1 and 1/10
        expected = [turn(a) for a in (3.0, 0.3, 4.0, 0.4) for turn in (math.cos, math.sin)]
        self.assert_near(found, expected, 1e-12)

    def test_the_base_is_10_000_unless_told(self):
        self.assertEqual(m.rope_angles(1, 1, 4), m.rope_angles(1, 1, 4, 10_000.0))
        self.assert_near(m.rope_angles(7, 1, 4)[2:], [math.cos(0.07), math.sin(0.07)], 1e-12)

    def test_position_zero_is_not_turned(self):
        x = copy_of(m.interpreted_engine(), 1, 8, range(8))
        self.assertEqual(m.rope_rotate(x, 0, 4).data, x.data)

    def test_lengths_stay(self):
        rng = random.Random(70)
        x = matrix(m.interpreted_engine("d"), 5, 8, rng)
        turned = m.rope_rotate(x, 11, 4)
        for i in range(0, 40, 2):
            self.assertAlmostEqual(math.hypot(*turned.data[i:i + 2]), math.hypot(*x.data[i:i + 2]))

    def test_scores_depend_only_on_the_distance(self):
        rng = random.Random(71)
        for make in ENGINES:
            engine = make("d")
            q, k = (copy_of(engine, 1, 6, [rng.gauss(0, 1) for _ in range(6)]) for _ in range(2))

            def score(at_q, at_k, engine=engine, q=q, k=k):
                a, b = m.rope_rotate(q, at_q, 6), m.rope_rotate(k, at_k, 6)
                return engine.dot(a.data, b.data, 6)
            for distance in (0, 1, 5, 40):
                scores = [score(at + distance, at) for at in (0, 1, 17, 900)]
                self.assert_near(scores, [scores[0]] * 4, 1e-9)
            self.assertGreater(abs(score(1, 0) - score(0, 0)), 1e-3)
            self.assertGreater(abs(score(1, 0) - score(0, 1)), 1e-3)

    def test_every_head_turns_alike(self):
        x = copy_of(m.interpreted_engine(), 2, 8, [1, 2, 3, 4] * 4)
        for row in map(m.rope_rotate(x, 3, 4).row, range(2)):
            self.assertEqual(row[:4], row[4:])

    def test_an_odd_width_is_refused(self):
        x = copy_of(m.interpreted_engine(), 1, 6, range(6))
        with self.assertRaises(ValueError):
            m.rope_angles(0, 1, 3)
        with self.assertRaises(ValueError):
            m.rope_rotate(x, 0, 3)

    def test_angles_that_do_not_fit_are_refused(self):
        x = copy_of(m.interpreted_engine(), 2, 6, range(12))
        for angles, width, turned in ((4, 4, 4), (4, 2, 3), (9, 4, 4)):
            with self.assertRaises(ValueError):
                m.rope_turned(x, x.engine.buffer(angles), width, turned)

    def test_more_turned_channels_than_there_are_are_refused(self):
        for make in ENGINES:
            x = copy_of(make("f"), 2, 4, range(8))
            with self.assertRaises(ValueError):
                m.rope_turned(x, x.engine.buffer(8), 4, 8)


class SmallOperationsKeepTheirPromises(LayerCase):
    def setUp(self):
        self.engine, self.rng = m.interpreted_engine(), random.Random(80)

    def test_embed_returns_the_rows_named(self):
        table = m.MatrixParam(self.engine, "t", 3, 2, self.engine.buffer_of(range(6)))
        self.assertEqual(list(m.embed([2, 0, 2], table).data), [4, 5, 0, 1, 4, 5])
        self.assertEqual(m.embed([], table).rows, 0)
        for ids in ([3], [-1], [0, 1, 99]):
            with self.assertRaises(ValueError):
                m.embed(ids, table)

    def test_shapes_that_do_not_fit_are_refused(self):
        x, w = m.VectorValue(self.engine, 2, 4), m.MatrixParam(self.engine, "w", 3, 5)
        with self.assertRaisesRegex(ValueError, "w takes vectors of 5; found 4"):
            m.linear(x, w)
        with self.assertRaises(ValueError):
            m.mixed(x, w)
        for other in ((4, 2), (2, 3), (1, 4)):
            with self.assertRaises(ValueError):
                m.added(x, m.VectorValue(self.engine, *other))
        with self.assertRaises(ValueError):
            m.swiglu(m.VectorValue(self.engine, 2, 3))

    def test_rows_stand_beside_and_in_place_of_others(self):
        x, y = (copy_of(self.engine, 2, 2, numbers) for numbers in ([1, 2, 3, 4], [5, 6, 7, 8]))
        self.assertEqual(list(m.beside(x, y).data), [1, 2, 5, 6, 3, 4, 7, 8])
        last = copy_of(self.engine, 1, 2, [9, 9])
        self.assertEqual(list(m.with_rows(x, [1], last).data), [1, 2, 9, 9])
        self.assertEqual(list(x.data), [1, 2, 3, 4])
        with self.assertRaises(ValueError):
            m.beside(x, last)
        with self.assertRaises(ValueError):
            m.with_rows(x, [0, 1], last)

    def test_added_leaves_its_inputs_alone(self):
        x, y = (copy_of(self.engine, 1, 2, [1.0, 2.0]) for _ in range(2))
        self.assertEqual(list(m.added(x, y, 3.0).data), [4.0, 8.0])
        self.assertEqual((list(x.data), list(y.data)), ([1.0, 2.0], [1.0, 2.0]))

    def test_rmsnorm_has_a_mean_square_of_one_whatever_the_size(self):
        for size in (1e-2, 1.0, 1e4):
            x = copy_of(self.engine, 3, 16, [self.rng.gauss(0, size) for _ in range(48)])
            for row in map(m.rmsnorm(x, 1e-12).row, range(3)):
                self.assertAlmostEqual(sum(n * n for n in row) / 16, 1.0, places=5)
        self.assertEqual(list(m.rmsnorm(m.VectorValue(self.engine, 1, 4)).data), [0.0] * 4)

    def test_dropout_is_the_kernel_s_mask(self):
        x = copy_of(self.engine, 20, 50, [1.0] * 1000)
        out = m.dropout(x, 0.3, 9)
        self.assertEqual(out.data, m.dropout(x, 0.3, 9).data)
        self.assertAlmostEqual(sum(1 for n in out.data if n == 0.0) / 1000, 0.3, delta=0.08)
        self.assertIs(m.dropout(x, 0.0, 9), x)

    def test_cross_entropy_is_the_mean_over_the_rows_with_a_target(self):
        for make in ENGINES:
            logits = copy_of(make("d"), 3, 2, [0.0, math.log(3), 0.0, 0.0, 5.0, 5.0])
            loss, each = m.cross_entropy(logits, [0, -1, 1])
            self.assert_near(each, [math.log(4), 0.0, math.log(2)], 1e-12)
            self.assertAlmostEqual(loss.data, math.log(8) / 2)

    def test_without_any_target_the_loss_is_zero_and_so_is_the_gradient(self):
        x = matrix(self.engine, 2, 3, self.rng)
        loss, each = m.cross_entropy(x, [-1, -1])
        m.backward(loss)
        self.assertEqual((loss.data, list(each), list(x.grad)), (0.0, [0.0] * 2, [0.0] * 6))

    def test_targets_that_do_not_fit_are_refused(self):
        x = m.VectorValue(self.engine, 2, 3)
        for targets in ([0], [0, 1, 2], [0, 3], [-2, 0], []):
            with self.assertRaises(ValueError):
                m.cross_entropy(x, targets)


class ParametersGrowAndFreeze(LayerCase):
    def setUp(self):
        self.engine = m.interpreted_engine()
        self.w = m.MatrixParam(self.engine, "w", 2, 3, self.engine.buffer_of(range(6)))

    def test_normal_numbers_have_the_spread_asked_for(self):
        w = m.MatrixParam.normal(self.engine, "w", 50, 40, 0.3, random.Random(90), decays=False)
        self.assertAlmostEqual(math.sqrt(sum(x * x for x in w.data) / 2000), 0.3, delta=0.02)
        self.assertAlmostEqual(sum(w.data) / 2000, 0.0, delta=0.03)
        self.assertEqual((w.rows, w.dim, w.decays, w.needs_grad), (50, 40, False, True))

    def test_rows_append_with_moments_at_zero_beside_the_old(self):
        for i in range(6):
            self.w.m[i], self.w.v[i] = i + 1.0, i + 2.0
        self.w.grad_buffer()[0], self.w.steps = 5.0, 9
        self.w.append_rows([7.0] * 6)
        self.assertEqual((self.w.rows, self.w.steps, self.w.grad), (4, 9, None))
        self.assertEqual(list(self.w.data), [0, 1, 2, 3, 4, 5] + [7] * 6)
        self.assertEqual(list(self.w.m), [1, 2, 3, 4, 5, 6] + [0] * 6)
        self.assertEqual(list(self.w.v), [2, 3, 4, 5, 6, 7] + [0] * 6)
        self.assertEqual(len(self.w.grad_buffer()), 12)

    def test_appending_no_rows_changes_nothing(self):
        self.w.append_rows([])
        self.assertEqual((self.w.rows, list(self.w.data)), (2, [0, 1, 2, 3, 4, 5]))

    def test_half_a_row_is_refused_and_changes_nothing(self):
        for n in (1, 4, 7):
            with self.assertRaisesRegex(ValueError, "w has rows of 3"):
                self.w.append_rows([0.0] * n)
        self.assertEqual((self.w.rows, len(self.w.data), len(self.w.m)), (2, 6, 6))

    def test_frozen_rows_stay_frozen_when_rows_are_appended_and_the_new_ones_train(self):
        self.w.freeze()
        self.assertEqual((self.w.needs_grad, self.w.frozen_rows), (False, 2))
        self.w.append_rows([])
        self.assertFalse(self.w.needs_grad)
        self.w.append_rows([9.0] * 3)
        self.assertEqual((self.w.needs_grad, self.w.frozen_rows), (True, 2))
        self.w.freeze(False)
        self.assertEqual((self.w.needs_grad, self.w.frozen_rows), (True, 0))

    def test_load_replaces_the_numbers_and_refuses_another_count(self):
        self.w.load(self.engine.buffer_of([8.0] * 6))
        self.assertEqual(list(self.w.data), [8.0] * 6)
        for n in (0, 5, 7):
            with self.assertRaisesRegex(ValueError, r"w has shape \(2, 3\); found"):
                self.w.load(self.engine.buffer(n))

    def test_linear_sees_every_change_of_the_numbers(self):
        x = copy_of(self.engine, 1, 3, [1.0, 1.0, 1.0])
        self.assert_near(m.linear(x, self.w).data, [3.0, 12.0], 1e-5)
        self.w.load(self.engine.buffer_of([1.0] * 6))
        self.assert_near(m.linear(x, self.w).data, [3.0, 3.0], 1e-5)
        self.w.append_rows([2.0] * 3)
        self.assert_near(m.linear(x, self.w).data, [3.0, 3.0, 6.0], 1e-5)
        self.w.data[0] = 11.0
        self.w.changed()
        self.assert_near(m.linear(x, self.w).data, [13.0, 3.0, 6.0], 1e-5)

    def test_a_parameter_keeps_its_gradient_after_backward(self):
        loss, _ = m.cross_entropy(self.w, [0, 1])
        m.backward(loss)
        self.assertIsNotNone(self.w.grad)

    def test_data_of_another_shape_is_refused(self):
        with self.assertRaises(ValueError):
            m.MatrixParam(self.engine, "w", 2, 3, self.engine.buffer(5))


class DeltasAreBornSilent(LayerCase):
    def setUp(self):
        self.engine, rng = m.interpreted_engine(), random.Random(95)
        self.base = matrix(self.engine, 7, 4, rng)
        self.x = matrix(self.engine, 3, 4, rng, "x")
        self.delta = m.DeltaAdapter(self.engine, "d", self.base, 2, rng, scale=0.5)

    def stir(self):
        rng = random.Random(96)
        self.delta.b.load(self.engine.buffer_of(
            [rng.gauss(0, 1) for _ in range(self.delta.b.rows * 2)]))

    def outputs(self):
        ids = [6, 0, 6]
        return (self.delta(self.x, m.linear(self.x, self.base)).data,
                self.delta.embed(ids, m.embed(ids, self.base)).data)

    def plain(self):
        return m.linear(self.x, self.base).data, m.embed([6, 0, 6], self.base).data

    def test_a_newborn_delta_has_no_effect_at_all(self):
        self.assertEqual(self.outputs(), self.plain())
        self.assertEqual((self.delta.a.rows, self.delta.a.dim), (2, 4))
        self.assertEqual((self.delta.b.rows, self.delta.b.dim), (7, 2))
        self.assertTrue(any(self.delta.a.data))

    def test_its_change_is_scale_times_b_times_a(self):
        self.stir()
        a, b, rows = self.delta.a.data, self.delta.b.data, self.x.data
        change = [[0.5 * sum(b[o * 2 + r] * a[r * 4 + c] for r in range(2)) for c in range(4)]
                  for o in range(7)]
        plain = self.plain()[0]
        expected = [plain[t * 7 + o] + sum(rows[t * 4 + c] * change[o][c] for c in range(4))
                    for t in range(3) for o in range(7)]
        self.assert_near(self.outputs()[0], expected, 1e-5)
        table = self.plain()[1]
        expected = [table[t * 4 + c] + change[i][c]
                    for t, i in enumerate((6, 0, 6)) for c in range(4)]
        self.assert_near(self.outputs()[1], expected, 1e-5)

    def test_folding_it_into_the_base_keeps_the_function(self):
        self.stir()
        before = self.outputs()
        self.base.packed()
        self.delta.fold_into(self.base)
        for found, expected in zip(self.plain(), before):
            self.assert_near(found, expected, 1e-5)

    def test_rows_that_are_appended_have_no_effect(self):
        self.stir()
        before = self.outputs()
        self.base.append_rows([0.5] * 8)
        self.delta.append_rows(2)
        self.assertEqual(self.delta.b.rows, 9)
        after = self.outputs()
        for t in range(3):
            old, new = slice(t * 9, t * 9 + 7), slice(t * 9 + 7, t * 9 + 9)
            self.assert_near(after[0][old], before[0][t * 7:t * 7 + 7], 1e-6)
            self.assert_near(after[0][new], self.plain()[0][new], 0.0)
        self.assertEqual(after[1], before[1])


if __name__ == "__main__":
    unittest.main()
