"""Claims about values, their gradients, and the graph taken apart behind them."""
import gc
import math
import random
import unittest
import weakref

import macrogpt as m
from test_model import layered

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
