"""Claims about values, their gradients, and the graph that is taken apart behind them."""
import gc
import math
import random
import unittest
import weakref

import macrogpt as m

S = m.ScalarValue


def grads_of(function, *points):
    """Return the value and the gradients of a function of scalars."""
    leaves = [S(p) for p in points]
    result = function(*leaves)
    m.backward(result)
    return result.data, [leaf.grad for leaf in leaves]


def random_expression(rng):
    """Return a function of three positive numbers, good for floats and for ScalarValues alike."""
    steps = [(rng.choice(("add", "sub", "mul", "div", "neg", "pow", "exp", "log", "radd", "rsub",
                          "rmul", "rdiv")), rng.random(), rng.random(), rng.uniform(0.5, 2.0))
             for _ in range(rng.randint(1, 12))]

    def exp(x):
        return x.exp() if isinstance(x, S) else math.exp(x)

    def log(x):
        return x.log() if isinstance(x, S) else math.log(x)

    def positive(x):
        return (x * x + 1.0) ** 0.5

    def function(*leaves):
        pool = list(leaves)
        for name, left, right, number in steps:
            a, b = pool[int(left * len(pool))], pool[int(right * len(pool))]
            pool.append({
                "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b,
                "div": lambda: a / positive(b), "neg": lambda: -a,
                "pow": lambda: positive(a) ** number, "exp": lambda: exp(-positive(a)),
                "log": lambda: log(positive(a)), "radd": lambda: number + a,
                "rsub": lambda: number - a, "rmul": lambda: number * a,
                "rdiv": lambda: number / positive(a)}[name]())
        total = pool[0]
        for value in pool[1:]:
            total = total + value
        return total
    return function


class ScalarsKnowTheirDerivatives(unittest.TestCase):
    def assert_grads(self, function, points, value, slopes):
        found, grads = grads_of(function, *points)
        self.assertAlmostEqual(found, value, places=12)
        for a, b in zip(grads, slopes):
            self.assertAlmostEqual(a, b, places=12)

    def test_derivatives_known_by_hand(self):
        e = math.e
        for function, points, value, slopes in (
                (lambda a, b: a + b, (2, 3), 5, (1, 1)),
                (lambda a, b: a - b, (2, 3), -1, (1, -1)),
                (lambda a, b: a * b, (2, 3), 6, (3, 2)),
                (lambda a, b: a / b, (2, 4), 0.5, (0.25, -0.125)),
                (lambda a: -a, (2,), -2, (-1,)),
                (lambda a: a ** 3, (2,), 8, (12,)),
                (lambda a: a ** -0.5, (4,), 0.5, (-1 / 16,)),
                (lambda a: a ** 2, (0,), 0, (0,)),
                (lambda a: a.exp(), (1,), e, (e,)),
                (lambda a: a.log(), (4,), math.log(4), (0.25,)),
                (lambda a: 5 + a, (2,), 7, (1,)),
                (lambda a: 5 - a, (2,), 3, (-1,)),
                (lambda a: 5 * a, (2,), 10, (5,)),
                (lambda a: 5 / a, (2,), 2.5, (-1.25,)),
                (lambda a: a - 5, (2,), -3, (1,)),
                (lambda a: a / 4, (2,), 0.5, (0.25,))):
            self.assert_grads(function, points, value, slopes)

    def test_the_logistic_function_has_the_slope_s_times_one_minus_s(self):
        s = 1 / (1 + math.exp(-0.3))
        self.assert_grads(lambda x: 1 / (1 + (-x).exp()), (0.3,), s, (s * (1 - s),))

    def test_random_expressions_agree_with_finite_differences(self):
        rng, h = random.Random(1), 1e-6
        for case in range(200):
            function = random_expression(rng)
            points = [rng.uniform(0.2, 1.5) for _ in range(3)]
            value, grads = grads_of(function, *points)
            self.assertAlmostEqual(value, function(*points), delta=1e-9 * (1 + abs(value)))
            for i, grad in enumerate(grads):
                sides = [function(*[p + s * (i == j) for j, p in enumerate(points)])
                         for s in (h, -h)]
                slope = (sides[0] - sides[1]) / (2 * h)
                self.assertAlmostEqual(grad, slope, delta=1e-5 * (1 + abs(slope) + abs(value)),
                                       msg=f"expression {case}, leaf {i}")

    def test_a_value_used_twice_gathers_both_gradients(self):
        self.assert_grads(lambda a: a * a, (3,), 9, (6,))
        self.assert_grads(lambda a: a + a + a, (3,), 9, (3,))

        def diamond(a):
            b = a * 2
            return (b + 1) * (b * b)  # 4a² + 8a³
        self.assert_grads(diamond, (3,), 4 * 9 + 8 * 27, (8 * 3 + 24 * 9,))

    def test_a_shared_node_pushes_only_after_all_its_children(self):
        def ladder(a):
            x = a
            for _ in range(20):  # x doubles each time: a naive walk would need 2**20 visits
                x = x + x
            return x
        self.assert_grads(ladder, (1.5,), 1.5 * 2 ** 20, (2 ** 20,))

    def test_leaves_gather_over_several_backward_passes(self):
        a = S(3.0)
        m.backward(a * a)
        m.backward(a * 5)
        self.assertEqual(a.grad, 11.0)

    def test_a_constant_gets_no_parents_and_no_graph(self):
        fixed = S(2.0, needs_grad=False)
        product = fixed * 3.0
        self.assertEqual((product.data, product.parents, product.push), (6.0, (), None))
        self.assertFalse(product.needs_grad)
        x = S(4.0)
        m.backward(product * x)
        self.assertEqual(x.grad, 6.0)

    def test_the_logarithm_of_zero_and_below_is_refused(self):
        for x in (0.0, -1.0):
            with self.assertRaises(ValueError):
                S(x).log()

    def test_a_scalar_shows_its_number(self):
        self.assertEqual(repr(S(2.5)), "ScalarValue(2.5)")


class GraphsDieWhenTheyAreDone(unittest.TestCase):
    def setUp(self):
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        self.engine = m.interpreted_engine()
        rng = random.Random(2)
        self.table = m.MatrixParam.normal(self.engine, "table", 7, 4, 1.0, rng)
        self.qkv = m.MatrixParam.normal(self.engine, "qkv", 12, 4, 1.0, rng)

    def vectors(self):
        """A loss and weak references to every node on the way to it."""
        x = m.embed([1, 2, 3], self.table)
        normed = m.rmsnorm(x)
        qkv = m.rope_rotate(m.linear(normed, self.qkv), 0, 2)
        y = m.added(x, m.dropout(m.causal_attention(qkv, (0, 3), 2), 0.2, 5))
        logits = m.linear(m.swiglu(m.added(qkv, qkv)), m.MatrixParam(self.engine, "w", 7, 6))
        loss, _ = m.cross_entropy(m.added(logits, m.linear(y, self.table)), [2, 3, -1])
        found, todo = {}, list(loss.parents)
        while todo:
            node = todo.pop()
            if id(node) not in found and not isinstance(node, m.MatrixParam):
                found[id(node)] = weakref.ref(node)
                todo.extend(node.parents)
        self.assertGreater(len(found), 9)
        return loss, list(found.values())

    def test_a_chain_of_100_000_nodes_is_differentiated_without_recursion(self):
        x = y = S(1.0)
        for _ in range(100_000):
            y = y + 1.0
        m.backward(y)
        self.assertEqual((y.data, x.grad), (100_001.0, 1.0))

    def test_a_chain_that_is_never_differentiated_dies_without_recursion(self):
        x = S(1.0)
        y = x + 1.0
        gone = weakref.ref(y)
        for _ in range(100_000):
            y = y + 1.0
        del y
        self.assertIsNone(gone())

    def test_after_backward_a_scalar_graph_is_gone_though_its_result_lives(self):
        x = S(2.0)
        middle = x * x
        gone = weakref.ref(middle)
        result = middle * 3.0
        del middle
        self.assertIsNotNone(gone())
        m.backward(result)
        self.assertIsNone(gone())
        self.assertEqual((x.grad, result.parents, result.push), (12.0, (), None))

    def test_after_backward_a_vector_graph_is_gone_though_its_loss_lives(self):
        loss, nodes = self.vectors()
        self.assertTrue(all(node() is not None for node in nodes))
        m.backward(loss)
        self.assertEqual([node() for node in nodes if node() is not None], [])
        self.assertIsNotNone(self.table.grad)

    def test_a_vector_that_lives_on_after_backward_keeps_no_gradient_and_no_parents(self):
        x = m.embed([1, 2], self.table)
        loss, _ = m.cross_entropy(x, [0, 3])
        m.backward(loss)
        self.assertEqual((x.grad, x.parents, x.push), (None, (), None))

    def test_a_forward_pass_without_backward_holds_no_cycles(self):
        loss, nodes = self.vectors()
        del loss
        self.assertEqual([node() for node in nodes if node() is not None], [])

    def test_a_whole_model_leaves_nothing_for_the_garbage_collector(self):
        shape = m.Shape(2, 8, 2, 8, 8, 10_000.0, 1e-5)
        model = m.GPT(shape, 20, self.engine, random.Random(3))
        model.append_delta(2, random.Random(4))
        gc.collect()
        m.backward(model.loss([[1, 2, 3], [4, 5]], 0.1, random.Random(5)))
        model.loss([[1, 2, 3]])
        model.feed(model.new_cache(), [1, 2, 3])
        self.assertEqual(gc.collect(), 0)


class NoGradBuildsNoGraph(unittest.TestCase):
    def setUp(self):
        self.engine = m.interpreted_engine()
        self.table = m.MatrixParam.normal(self.engine, "t", 5, 4, 1.0, random.Random(6))

    def test_nothing_made_inside_has_parents(self):
        with self.engine.no_grad():
            x = m.embed([1, 2], self.table)
            loss, _ = m.cross_entropy(m.linear(m.rmsnorm(x), self.table), [0, 1])
        for node in (x, loss):
            self.assertEqual((node.parents, node.push, node.needs_grad), ((), None, False))
        m.backward(loss)
        self.assertIsNone(self.table.grad)

    def test_the_numbers_are_the_same(self):
        outside = m.linear(m.embed([1, 2], self.table), self.table).data
        with self.engine.no_grad():
            self.assertEqual(m.linear(m.embed([1, 2], self.table), self.table).data, outside)

    def test_a_nested_block_restores_what_was_before(self):
        with self.engine.no_grad():
            with self.engine.no_grad():
                pass
            self.assertFalse(self.engine.recording)
            self.assertEqual(m.embed([1], self.table).parents, ())
        self.assertTrue(self.engine.recording)
        self.assertEqual(m.embed([1], self.table).parents, (self.table,))

    def test_one_engine_s_block_leaves_another_recording(self):
        other = m.interpreted_engine()
        with other.no_grad():
            self.assertEqual(m.embed([1], self.table).parents, (self.table,))


class VectorsAreRowsOverOneBuffer(unittest.TestCase):
    def setUp(self):
        self.engine = m.interpreted_engine()

    def test_a_vector_starts_at_zero_or_with_its_data(self):
        self.assertEqual(list(m.VectorValue(self.engine, 2, 3).data), [0.0] * 6)
        data = self.engine.buffer_of(range(6))
        x = m.VectorValue(self.engine, 2, 3, data)
        self.assertIs(x.data, data)
        self.assertEqual(repr(x), "VectorValue(rows=2, dim=3)")

    def test_data_of_another_size_is_refused(self):
        for n in (0, 5, 7):
            with self.assertRaises(ValueError):
                m.VectorValue(self.engine, 2, 3, self.engine.buffer(n))

    def test_a_row_is_a_copy(self):
        x = m.VectorValue(self.engine, 2, 3, self.engine.buffer_of(range(6)))
        row = x.row(1)
        self.assertEqual(list(row), [3, 4, 5])
        row[0] = 99.0
        self.assertEqual(list(x.data), [0, 1, 2, 3, 4, 5])
        for i in (-1, 2):
            with self.assertRaises(ValueError):
                x.row(i)

    def test_the_gradient_buffer_is_made_once_and_then_added_to(self):
        x = m.VectorValue(self.engine, 1, 2)
        self.assertIsNone(x.grad)
        x.grad_buffer()[0] += 1.0
        x.grad_buffer()[0] += 1.0
        self.assertEqual(list(x.grad), [2.0, 0.0])


if __name__ == "__main__":
    unittest.main()
