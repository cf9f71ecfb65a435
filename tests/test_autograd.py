"""Claims about values, their gradients, and the graph that is taken apart behind them."""
import gc
import math
import random
import unittest
import weakref

import macrogpt as m

S = m.ScalarValue


class ScalarsKnowTheirDerivatives(unittest.TestCase):
    def test_derivatives_known_by_hand(self):
        def diamond(a):
            b = a * 2
            return (b + 1) * (b * b)  # 4a² + 8a³

        def gauss(a, b):
            return b * (-1.0 * (a * a)).exp()

        def ladder(a):
            for _ in range(20):  # a doubles each time: a naive walk would need 2**20 visits
                a = a + a
            return a
        for function, points, value, slopes in (
                (lambda a, b: a + b, (2, 3), 5, (1, 1)),
                (lambda a, b: a * b, (2, 3), 6, (3, 2)),
                (lambda a: a.exp(), (1,), math.e, (math.e,)),
                (lambda a: 5 + a, (2,), 7, (1,)),
                (lambda a: 5 * a, (2,), 10, (5,)),
                (lambda a: a * -0.25, (4,), -1, (-0.25,)),
                (lambda a: a * a, (3,), 9, (6,)),
                (lambda a: a + a + a, (3,), 9, (3,)),
                (diamond, (3,), 4 * 9 + 8 * 27, (8 * 3 + 24 * 9,)),
                (gauss, (0.5, 2), 2 * math.exp(-0.25), (-2 * math.exp(-0.25), math.exp(-0.25))),
                (ladder, (1.5,), 1.5 * 2 ** 20, (2 ** 20,))):
            leaves = [S(point) for point in points]
            result = function(*leaves)
            m.backward(result)
            for a, b in zip([result.data, *(x.grad for x in leaves)], [value, *slopes]):
                self.assertAlmostEqual(a, b, places=12)

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
        shape = m.Shape(2, 8, 2, 8, 8, 10_000.0, 1e-5)
        self.model = m.GPT(shape, 20, m.interpreted_engine(), random.Random(3))
        self.model.append_delta(2, random.Random(4))

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
    def setUp(self):
        self.engine = m.interpreted_engine()
        self.table = m.MatrixParam.normal(self.engine, "t", 5, 4, 1.0, random.Random(6))

    def test_a_nested_block_or_one_that_fails_restores_what_was_before(self):
        with self.assertRaises(KeyError), self.engine.no_grad():
            with self.engine.no_grad():
                pass
            inside = m.embed([1], self.table)
            self.assertEqual((inside.sources, inside.needs_grad), ((), False))
            raise KeyError
        self.assertIs(m.embed([1], self.table).sources[0][0], self.table)
        with m.interpreted_engine().no_grad():  # another engine's block is not this one's
            self.assertIs(m.embed([1], self.table).sources[0][0], self.table)
