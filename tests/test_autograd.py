"""Claims about values, operations, gradients, and the graph taken apart behind them."""
import gc
import itertools
import math
import random
import unittest
import weakref

import macrogpt as m
from support import Case
from test_model import PLAIN, layered

S = m.ScalarValue


class ScalarsKnowTheirDerivatives(unittest.TestCase):
    def test_derivatives_known_by_hand(self):
        a, b = S(0.5), S(2.0)
        gauss = b * (-1.0 * (a * a)).exp() + 5
        m.backward(gauss)
        self.assertAlmostEqual(gauss.data, 2 * math.exp(-0.25) + 5)
        self.assertAlmostEqual(a.grad, -2 * math.exp(-0.25))
        self.assertAlmostEqual(b.grad, math.exp(-0.25))
        a = S(3.0)
        b = 2 * a
        m.backward((1 + b) * (b * b))  # 4a² + 8a³
        self.assertEqual(a.grad, 8 * 3 + 24 * 9)
        a = b = S(1.5)
        for _ in range(20):  # it doubles each time: a naive walk would need 2**20 visits
            b = b + b
        m.backward(b)
        self.assertEqual((b.data, a.grad), (1.5 * 2 ** 20, 2 ** 20))

    def test_leaves_gather_over_several_passes_and_a_constant_gets_no_gradient(self):
        a, fixed = S(3.0), S(2.0, needs_grad=False)
        product = fixed * 3.0
        self.assertEqual((product.data, product.sources, product.needs_grad), (6.0, (), False))
        m.backward(a * a)
        m.backward(product * a)
        self.assertEqual((a.grad, fixed.grad, repr(fixed)), (12.0, None, "ScalarValue(2)"))


class GraphsDieWhenTheyAreDone(unittest.TestCase):
    def setUp(self):
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        self.model = layered(m.interpreted_engine(), (4,))

    def loss(self):
        return self.model.loss([[1, 2, 3], [4, 5]], 0.1, random.Random(5))

    def test_a_chain_of_20_000_nodes_is_differentiated_or_dies_without_recursion(self):
        for wanted in (True, False):
            x = S(1.0)
            y = x + 0.0
            gone = weakref.ref(y)
            for _ in range(20_000):
                y = y + 1.0
            if wanted:
                m.backward(y)
                self.assertEqual((y.data, x.grad), (20_001.0, 1.0))
            del y
            self.assertIsNone(gone())

    def test_after_backward_a_graph_is_gone_though_its_result_lives(self):
        loss = self.loss()
        nodes, todo = [], [value for value, _ in loss.sources]
        while todo:
            node = todo.pop()
            if not isinstance(node, m.MatrixParam):
                nodes.append(weakref.ref(node))
                todo.extend(value for value, _ in node.sources)
        del node
        self.assertGreater(len(nodes), 30)
        m.backward(loss)
        self.assertEqual(([node() for node in nodes if node() is not None], loss.sources), ([], ()))
        self.assertTrue(all(p.grad is not None for p in self.model.trainable()))
        x = m.embed([1, 2], m.MatrixParam(self.model.engine, "t", 7, 4))
        m.backward(m.cross_entropy(x, [0, 3])[0])
        self.assertEqual((x.grad, x.sources), (None, ()), "what lives on keeps nothing")

    def test_a_model_leaves_nothing_for_the_garbage_collector(self):
        gc.collect()
        m.backward(self.loss())
        self.loss()
        self.model.feed(self.model.new_cache(), [1, 2, 3])
        self.assertEqual(gc.collect(), 0)


class NoGradBuildsNoGraph(unittest.TestCase):
    def test_a_nested_block_or_one_that_fails_restores_what_was_before(self):
        engine = m.interpreted_engine()
        table = m.MatrixParam(engine, "t", 5, 4)
        with self.assertRaises(KeyError), engine.no_grad():
            with engine.no_grad():
                pass
            inside = m.embed([1], table)
            self.assertEqual((inside.sources, inside.needs_grad), ((), False))
            raise KeyError
        with m.interpreted_engine().no_grad():  # another engine's block is not this one's
            self.assertIs(m.embed([1], table).sources[0][0], table)


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
        m.backward(S(0.0).of((out, lambda g: out.add_grad(ups))))
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
