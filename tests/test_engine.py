"""Claims about the kernels, their fast twins, the packed matrices, the caches and the engines."""
import ast
import ctypes
import math
import os
import random
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
from array import array
from fractions import Fraction
from unittest import mock

import macrogpt as m
from support import ROOT, Folder, compiled_engine

TWINS = dict(m.TWINS)
KERNELS = {kernel.__name__: kernel for kernel in m.KERNELS}
PARTS = {"multiply_adds", "put_part", "put8", "multiply", "clear", "copy_block", "tile_product",
         "tile_spread", "softmax_row", "softmax", "slopes_row", "add_rows",
         "attention_forward_tiled", "attention_backward_tiled", "exponential", "sigmoid",
         "row_product", "normed_row", "decode_block", "decode_head", "penalise", "penalise_repeats",
         "largest", "softened", "typical_part", "sample_token"}  # of what compiled engines do
CLOSE = {"f": 3e-6, "d": 1e-10}
SHAPES = [(1, 1, 1), (1, 7, 3), (5, 1, 1), (3, 9, 13), (8, 8, 8), (2, 3, 1), (0, 3, 2), (11, 5, 17),
          (4, 3, 0)]  # rows, inner, columns
LIKES = ("normal", "zeros", "denormals", "large", "mixed")


def numbers(rng, typecode, n, like="normal"):
    """A buffer of n numbers of one kind."""
    tiny = 1e-41 if typecode == "f" else 5e-324
    make = {"normal": lambda: rng.gauss(0.0, 1.0), "zeros": lambda: 0.0,
            "denormals": lambda: tiny * rng.randint(-9, 9),
            "large": lambda: rng.choice((-1e4, 1e4, 9.9e3)),
            "mixed": lambda: rng.choice((0.0, -1.0, 1e3, 1e-3, rng.random()))}[like]
    return array(typecode, [make() for _ in range(n)])


def whole(values):
    return array("i", values)


def largest(*buffers):
    return max((abs(x) for buffer in buffers for x in buffer), default=0.0)


def copied(args):
    return [a[:] if isinstance(a, array) else a for a in args]


def naive_attention(q, keys, values):
    """Softmax attention of one query over rows, written from the formula."""
    scores = [sum(a * b for a, b in zip(q, k)) / math.sqrt(len(q)) for k in keys]
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    total = math.fsum(weights)
    return [math.fsum(w * v[c] for w, v in zip(weights, values)) / total for c in range(len(q))]


class KernelCase(unittest.TestCase):
    def assert_near(self, found, expected, tolerance, hint=""):
        self.assertEqual(len(found), len(expected), hint)
        for i, (a, b) in enumerate(zip(found, expected)):
            self.assertTrue(abs(a - b) <= tolerance, f"{hint}: number {i} is {a!r}, not {b!r}")

    def compare(self, name, typecode, args, scale=None):
        """Run kernel and twin on equal buffers; every buffer must end alike."""
        slow, fast = copied(args), copied(args)
        KERNELS[name](*slow)
        TWINS[name](*fast)
        for i, (a, b) in enumerate(zip(fast, slow)):
            if isinstance(a, array):
                size = 1e-30 + (largest(b) if scale is None else scale)
                self.assertTrue(all(map(math.isfinite, b)), f"{name}: argument {i} overflows")
                hint = f"{name}, {typecode}, argument {i}, {args[-6:]}"
                self.assert_near(a, b, CLOSE[typecode] * size, hint)


class EveryTwinDoesWhatItsKernelDoes(KernelCase):
    def each(self, seed, likes=LIKES):
        """Yield rng, typecode, and a maker of buffers, for every kind of number."""
        rng = random.Random(seed)
        for typecode in "fd":
            for like in likes:
                def make(n, like=like, typecode=typecode):
                    return numbers(rng, typecode, n, like)
                yield rng, typecode, make

    def test_every_twin_is_tested_here(self):
        here = " ".join(name for name in dir(self) if name.startswith("test_"))
        self.assertEqual([n for n in TWINS if f"test_{n}" not in here], [])
        self.assertLessEqual(set(TWINS), set(KERNELS))

    def test_matmul_nt(self):
        for rng, typecode, make in self.each(1):
            for rows, inner, cols in SHAPES:
                x, w = make(rows * inner), make(cols * inner)
                out = numbers(rng, typecode, rows * cols)
                self.compare("matmul_nt", typecode, (x, w, out, rows, inner, cols),
                             1.0 + largest(x) * largest(w) * inner)

    def test_matmul_nt_of_a_packed_matrix(self):
        for rng, typecode, make in self.each(2):
            for rows, inner, cols in SHAPES:
                if cols:
                    x, w = make(rows * inner), make(cols * inner)
                    slow, fast = (numbers(rng, typecode, rows * cols) for _ in range(2))
                    m.matmul_nt(x, w, slow, rows, inner, cols)
                    packed = m.PackedMatrix(w, cols, inner)
                    m.lane_matmul_nt(x, packed, fast, rows, inner, cols)
                    self.assert_near(fast, slow, 1e-30 + 3e-7 * largest(x) * largest(w) * inner)

    def test_matmul_nn(self):
        for rng, typecode, make in self.each(3):
            for rows, inner, cols in SHAPES:
                g, w = make(rows * inner), make(inner * cols)
                dx = numbers(rng, typecode, rows * cols)
                self.compare("matmul_nn", typecode, (g, w, dx, rows, inner, cols),
                             1.0 + largest(g) * largest(w) * inner)

    def test_matmul_tn(self):
        for rng, typecode, make in self.each(4):
            for inner, rows, cols in SHAPES:  # here no inner rows at all is the empty batch
                g, x = make(inner * rows), make(inner * cols)
                dw = numbers(rng, typecode, rows * cols)
                self.compare("matmul_tn", typecode, (g, x, dw, rows, inner, cols),
                             1.0 + largest(g) * largest(x) * inner)

    def test_matmul_nn_and_matmul_tn_of_packed_matrices(self):
        for rng, typecode, make in self.each(20):
            for rows, inner, cols in SHAPES:
                for name in ("matmul_nn", "matmul_tn"):
                    a, b = make(rows * inner), make(inner * cols)
                    shape = (rows, inner) if name == "matmul_nn" else (inner, rows)
                    slow, fast = (array(typecode, [0.5] * (rows * cols)) for _ in range(2))
                    KERNELS[name](a, b, slow, rows, inner, cols)
                    TWINS[name](m.PackedMatrix(a, *shape), m.PackedMatrix(b, inner, cols), fast,
                                rows, inner, cols)
                    size = 1.0 + largest(a) * largest(b) * inner
                    self.assert_near(fast, slow, CLOSE[typecode] * size, (name, shape, cols))

    def test_softmax(self):
        for rng, typecode, make in self.each(46):
            for n in (1, 7, 33):
                slow, fast = (array(typecode, x) for x in [make(n + 1)] * 2)
                total = m.softmax(slow, n)
                self.assertAlmostEqual(m.map_softmax(fast, n), total, 5)
                self.assert_near(fast, slow, CLOSE[typecode])

    def test_add_scaled(self):
        for rng, typecode, make in self.each(5):
            for n in (0, 1, 7, 16, 33):
                for scale in (1.0, 0.0, -2.5):
                    self.compare("add_scaled", typecode, (make(n), make(n + 3), n, scale))

    def test_dot(self):
        for rng, typecode, make in self.each(19):
            for n in (0, 1, 7, 33):
                x, y = make(n + 2), make(n)
                found, expected = m.map_dot(x, y, n), m.dot(x, y, n)
                self.assertAlmostEqual(found, expected, delta=1e-12 * (1.0 + largest(x, y) ** 2))

    def test_gather_rows(self):
        for rng, typecode, make in self.each(6):
            for rows, dim, table in SHAPES:
                ids = whole(rng.randrange(table + 1) for _ in range(rows))
                self.compare("gather_rows", typecode,
                             (make((table + 1) * dim), ids, make(rows * dim), rows, dim))

    def test_rmsnorm_forward(self):
        for rng, typecode, make in self.each(7):
            for rows, dim, _ in SHAPES:
                self.compare("rmsnorm_forward", typecode,
                             (make(rows * dim), make(rows * dim), make(rows), rows, dim, 1e-5))

    def test_rmsnorm_backward(self):
        for rng, typecode, make in self.each(8):
            for rows, dim, _ in SHAPES:
                x, out, inverse = make(rows * dim), make(rows * dim), make(rows)
                m.rmsnorm_forward(x, out, inverse, rows, dim, 1e-5)
                g, dx = (numbers(rng, typecode, rows * dim) for _ in range(2))
                self.compare("rmsnorm_backward", typecode, (g, out, inverse, dx, rows, dim))

    def test_rope_turn(self):
        for rng, typecode, make in self.each(9):
            for rows, heads, rest, width in ((1, 1, 0, 2), (3, 2, 5, 4), (0, 1, 2, 2), (5, 3, 1, 6),
                                             (2, 0, 3, 4)):
                turned, dim = heads * width, heads * width + rest
                table = array(typecode, m.rope_angles(rng.randrange(900), rows, width))
                for sign in (1.0, -1.0):
                    self.compare("rope_turn", typecode, (
                        make(rows * dim), table, make(rows * dim), rows, dim, turned, width, sign))

    def test_swiglu_forward(self):
        for rng, typecode, make in self.each(10):
            for rows, dim, _ in SHAPES:
                self.compare("swiglu_forward", typecode,
                             (make(rows * 2 * dim), make(rows * dim), rows, dim))

    def test_swiglu_backward(self):
        for rng, typecode, make in self.each(11):
            for rows, dim, _ in SHAPES:
                self.compare("swiglu_backward", typecode, (
                    make(rows * dim), make(rows * 2 * dim), make(rows * 2 * dim), rows, dim))

    def test_swiglu_forward_and_swiglu_backward_take_gates_of_any_size(self):
        gates = (1e5, -1e5, 750.0, -750.0, 699.0, -701.0, 40.0, -40.0, 0.0, -0.0)
        for typecode in "fd":
            x = array(typecode, [*gates, *[2.0] * len(gates)])
            ones = array(typecode, [1.0] * len(gates))
            self.compare("swiglu_forward", typecode, (x, ones, 1, len(gates)), 1.0)
            self.compare("swiglu_backward", typecode, (ones, x, x, 1, len(gates)), 1.0)
            out, dx = array(typecode, bytes(ones.itemsize * 10)), array(typecode, [0.0] * 20)
            for engine in (m.reference_engine(typecode), m.interpreted_engine(typecode)):
                engine.swiglu_forward(x, out, 1, 10)
                self.assertEqual((out[0], out[1]), (2e5, 0.0))
                engine.swiglu_backward(ones, x, dx, 1, 10)
                self.assertTrue(all(map(math.isfinite, dx)))

    def attention_cases(self, rng):
        for width in (1, 2, 5):
            for heads in (1, 3):
                for starts in ((0, 1), (0, 7), (0, 1, 2, 9), (0, 3, 4), (0, 33, 50)):
                    yield heads, width, whole(starts)

    def test_attention_forward(self):
        for rng, typecode, make in self.each(12, ("normal", "zeros", "denormals", "mixed")):
            for heads, width, starts in self.attention_cases(rng):
                rows, dim = starts[-1], heads * width
                qkv = make(rows * 3 * dim)
                self.compare("attention_forward", typecode, (
                    qkv, make(rows * dim), make(rows * heads), starts, len(starts) - 1, heads,
                    width), 1.0 + largest(qkv) ** 2)

    def test_attention_forward_with_huge_scores(self):
        for typecode in "fd":
            rng = random.Random(13)
            for heads, width, starts in self.attention_cases(rng):
                rows, dim = starts[-1], heads * width
                qkv = array(typecode, [rng.choice((-100.0, 100.0, 50.0))
                                       for _ in range(rows * 3 * dim)])
                out, lse = numbers(rng, typecode, rows * dim), numbers(rng, typecode, rows * heads)
                self.compare("attention_forward", typecode,
                             (qkv, out, lse, starts, len(starts) - 1, heads, width))

    def test_attention_backward(self):
        for rng, typecode, make in self.each(14, ("normal", "zeros", "denormals", "mixed")):
            for heads, width, starts in self.attention_cases(rng):
                rows, dim, segments = starts[-1], heads * width, len(starts) - 1
                qkv, out, lse = make(rows * 3 * dim), make(rows * dim), make(rows * heads)
                m.attention_forward(qkv, out, lse, starts, segments, heads, width)
                g, dqkv = numbers(rng, typecode, rows * dim), numbers(rng, typecode, rows * 3 * dim)
                self.compare("attention_backward", typecode, (
                    g, qkv, out, lse, dqkv, starts, segments, heads, width),
                    1.0 + largest(qkv) ** 2)

    def test_attention_forward_and_attention_backward_pass_over_empty_segments(self):
        for typecode in "fd":
            rng = random.Random(15)
            for starts in ((0, 0, 3), (0, 3, 3), (0, 2, 2, 3), (0, 0)):
                rows, tail = starts[-1], (whole(starts), len(starts) - 1, 2, 2)
                qkv, out, lse = (numbers(rng, typecode, rows * n) for n in (12, 4, 2))
                self.compare("attention_forward", typecode, (qkv, out, lse, *tail))
                m.attention_forward(qkv, out, lse, *tail)
                self.compare("attention_backward", typecode, (
                    numbers(rng, typecode, rows * 4), qkv, out, lse,
                    numbers(rng, typecode, rows * 12), *tail))

    def test_cross_entropy_forward(self):
        for rng, typecode, make in self.each(16):
            for rows, _, vocab in ((1, 0, 1), (3, 0, 13), (0, 0, 5), (6, 0, 33)):
                logits, targets = make(rows * vocab), whole(
                    rng.randrange(-1, vocab) for _ in range(rows))
                self.compare("cross_entropy_forward", typecode, (
                    logits, targets, make(rows), make(rows), rows, vocab), 1.0 + largest(logits))

    def test_cross_entropy_backward(self):
        for rng, typecode, make in self.each(17):
            for rows, vocab in ((1, 1), (3, 13), (0, 5), (6, 33)):
                logits, lse, losses = make(rows * vocab), make(rows), make(rows)
                targets = whole(rng.randrange(-1, vocab) for _ in range(rows))
                m.cross_entropy_forward(logits, targets, lse, losses, rows, vocab)
                self.compare("cross_entropy_backward", typecode, (
                    logits, targets, lse, numbers(rng, typecode, rows * vocab), rows, vocab, 0.3))

    def test_adamw_step(self):
        for rng, typecode, make in self.each(18):
            for first, n in ((0, 1), (0, 9), (3, 10), (5, 5), (0, 0)):
                w, g, moment = numbers(rng, typecode, n), make(n), numbers(rng, typecode, n)
                square = array(typecode, [x * x for x in numbers(rng, typecode, n)])
                self.compare("adamw_step", typecode, (
                    w, g, moment, square, first, n, 0.01, 0.9, 0.99, 1e-8, 0.1, 10.0, 100.0, 0.5))


class KernelsKnowTheAnswersWorkedOutByHand(KernelCase):
    def setUp(self):
        self.engines = [make(typecode) for typecode in "fd"
                        for make in (m.reference_engine, m.interpreted_engine)]

    def test_the_three_products_of_two_small_matrices(self):
        for engine in self.engines:
            a, b = engine.buffer_of([1, 2, 3, 4]), engine.buffer_of([5, 6, 7, 8])
            for name, answer in (("matmul_nt", [17, 23, 39, 53]), ("matmul_nn", [19, 22, 43, 50]),
                                 ("matmul_tn", [26, 30, 38, 44])):
                out = engine.buffer(4)
                getattr(engine, name)(a, b, out, 2, 2, 2)
                self.assert_near(out, answer, 1e-5, name)

    def test_dot(self):
        for engine in self.engines:
            x, y = engine.buffer_of([1, 2, 9]), engine.buffer_of([3, 4, 9])
            self.assertEqual(engine.dot(x, y, 2), 11)

    def test_scatter_sums_what_falls_on_one_row(self):
        for engine in self.engines:
            table = engine.buffer_of([1.0] * 6)
            engine.scatter_rows(engine.buffer_of([1, 2, 3, 4, 5, 6]), whole([2, 0, 2]), table, 3, 2)
            self.assertEqual(list(table), [4, 5, 1, 1, 7, 9])

    def test_rmsnorm_of_three_and_four(self):
        for engine in self.engines:
            out, inverse = engine.buffer(2), engine.buffer(1)
            engine.rmsnorm_forward(engine.buffer_of([3, 4]), out, inverse, 1, 2, 0.0)
            self.assert_near(out, [3 / math.sqrt(12.5), 4 / math.sqrt(12.5)], 1e-6)

    def test_equal_keys_give_the_running_mean_of_the_values(self):
        for engine in self.engines:
            qkv = engine.buffer_of([n for value in (2.0, 4.0, 9.0) for n in (0.7, 1.0, value)])
            out, lse = engine.buffer(3), engine.buffer(3)
            engine.attention_forward(qkv, out, lse, whole([0, 3]), 1, 1, 1)
            self.assert_near(out, [2.0, 3.0, 5.0], 1e-5)
            self.assert_near(lse, [0.7, 0.7 + math.log(2), 0.7 + math.log(3)], 1e-5)

    def test_swiglu_opens_with_the_gate(self):
        for engine in self.engines:
            out = engine.buffer(3)
            engine.swiglu_forward(engine.buffer_of([0.0, 1.0, 100.0, 5.0, 3.0, 2.0]), out, 1, 3)
            self.assert_near(out, [0.0, 3.0 / (1.0 + math.exp(-1.0)), 200.0], 1e-5)

    def test_equal_logits_cost_the_log_of_the_vocabulary_and_no_target_costs_nothing(self):
        for engine in self.engines:
            for level in (0.0, 1e4, -1e4):
                lse, losses = engine.buffer(2), engine.buffer_of([7.0, 7.0])
                engine.cross_entropy_forward(engine.buffer_of([level] * 16), whole([3, -1]), lse,
                                             losses, 2, 8)
                self.assert_near(losses, [math.log(8), 0.0], 1e-3 if level else 1e-6)

    def test_huge_logits_neither_overflow_nor_leave_the_probabilities(self):
        for engine in self.engines:
            logits = engine.buffer_of([1e4, -1e4, 0.0])
            lse, losses = engine.buffer(1), engine.buffer(1)
            for target, loss, slope in ((0, 0.0, [0, 0, 0]), (1, 2e4, [1, -1, 0])):
                engine.cross_entropy_forward(logits, whole([target]), lse, losses, 1, 3)
                self.assert_near(losses, [loss], 1e-2)
                grad = engine.buffer(3)
                engine.cross_entropy_backward(logits, whole([target]), lse, grad, 1, 3, 1.0)
                self.assert_near(grad, slope, 1e-3)

    def test_adamw_is_the_formula_of_the_paper(self):
        rate, beta1, beta2, eps, decay, clip, t = 0.02, 0.8, 0.95, 1e-6, 0.1, 0.25, 3
        w0, g0, m0, v0 = [1.0, -2.0, 3.0], [0.5, 0.0, -8.0], [0.1, 0.2, -0.3], [0.01, 0.02, 0.03]
        for engine in self.engines:
            w, g, first, second = map(engine.buffer_of, (w0, g0, m0, v0))
            engine.adamw_step(w, g, first, second, 1, 3, rate, beta1, beta2, eps, decay,
                              1 / (1 - beta1 ** t), 1 / (1 - beta2 ** t), clip)
            for i in (1, 2):
                mean = beta1 * m0[i] + (1 - beta1) * clip * g0[i]
                square = beta2 * v0[i] + (1 - beta2) * (clip * g0[i]) ** 2
                step = (mean / (1 - beta1 ** t)) / (math.sqrt(square / (1 - beta2 ** t)) + eps)
                expected = w0[i] - rate * step - rate * decay * w0[i]
                self.assert_near((w[i], first[i], second[i]), (expected, mean, square), 1e-6)
            self.assert_near((w[0], first[0], second[0]), (1.0, 0.1, 0.01), 1e-8)


class KernelsAddOrSetAsTheySay(KernelCase):
    def calls(self, engine):
        """Yield name, whether it adds, the place of its result, and arguments."""
        rng, code, starts = random.Random(20), engine.typecode, whole([0, 2, 5])

        def make(n):
            return numbers(rng, code, n)
        table, ids = array(code, m.rope_angles(3, 5, 2)), whole([3, 0, 3, 1, 2])
        qkv, out, lse = make(60), make(20), make(10)
        m.attention_forward(qkv, out, lse, starts, 2, 2, 2)
        logits, sums, losses = make(35), make(5), make(5)
        m.cross_entropy_forward(logits, ids, sums, losses, 5, 7)
        yield "matmul_nt", False, 2, (make(15), make(6), make(10), 5, 3, 2)
        yield "matmul_nn", True, 2, (make(15), make(6), make(10), 5, 3, 2)
        yield "matmul_tn", True, 2, (make(15), make(6), make(10), 5, 3, 2)
        yield "add_scaled", True, 1, (make(9), make(9), 9, 0.5)
        yield "gather_rows", False, 2, (make(12), ids, make(15), 5, 3)
        yield "scatter_rows", True, 2, (make(15), ids, make(12), 5, 3)
        yield "rmsnorm_forward", False, 1, (make(15), make(15), make(5), 5, 3, 1e-5)
        yield "rmsnorm_backward", True, 3, (make(15), make(15), make(5), make(15), 5, 3)
        yield "rope_turn", True, 2, (make(30), table, make(30), 5, 6, 4, 2, 1.0)
        yield "attention_forward", False, 1, (qkv, make(20), make(10), starts, 2, 2, 2)
        yield "attention_backward", True, 4, (make(20), qkv, out, lse, make(60), starts, 2, 2, 2)
        yield "attention_cached", False, 4, (make(4), 0, make(12), make(12), make(4), 0, 3, 3, 2, 2,
                                             make(19), 0)
        yield "swiglu_forward", False, 1, (make(20), make(10), 5, 2)
        yield "swiglu_backward", True, 2, (make(10), make(20), make(20), 5, 2)
        yield "dropout_apply", True, 1, (make(9), make(9), 9, 0.4, 5)
        yield "cross_entropy_forward", False, 3, (logits, ids, make(5), make(5), 5, 7)
        yield "cross_entropy_backward", True, 3, (logits, ids, sums, make(35), 5, 7, 0.5)

    def test_what_was_in_the_result_before_stays_below_or_is_gone(self):
        for engine in (m.reference_engine("d"), m.interpreted_engine("d")):
            tested = {"dot", "adamw_step", *PARTS}  # these return a number, move their own state
            for name, adds, at, args in self.calls(engine):
                with self.subTest(engine=engine.name, kernel=name):
                    on_zeros = copied(args)
                    on_zeros[at] = engine.buffer(len(args[at]))
                    on_old = copied(args)
                    getattr(engine, name)(*on_zeros)
                    getattr(engine, name)(*on_old)
                    old = args[at] if adds else engine.buffer(len(args[at]))
                    self.assertTrue(any(on_zeros[at]), "a result of zeros would prove nothing")
                    self.assert_near(on_old[at], list(map(sum, zip(on_zeros[at], old))), 1e-12)
                    tested.add(name)
            self.assertEqual(tested, set(KERNELS))


class PackedMatrixIsTheMatrix(KernelCase):
    def times(self, weights, rows, dim, x):
        """Return the product with one vector as lanes give it, in whatever typecode."""
        fixed = m.FixedPoint(array(weights.typecode, x), 29)
        return m.PackedMatrix(weights, rows, dim).rows.lanes.times(
            fixed.scalars(slice(None)), fixed.unit)

    def assert_exact(self, weights, rows, dim, x):
        """The product must come within the rounding of both factors to fixed point."""
        found = self.times(weights, rows, dim, x)
        widest, length = math.hypot(*weights), math.hypot(*x)
        weight_unit, vector_unit = widest * 2.0 ** -32, length * 2.0 ** -28
        bound = (math.sqrt(dim) * (length * weight_unit + widest * vector_unit) / 2
                 + (4096 + dim) * weight_unit * vector_unit) * 1.01 + 1e-300
        for r in range(rows):
            exact = sum(Fraction(w) * Fraction(v)
                        for w, v in zip(weights[r * dim:(r + 1) * dim], x))
            self.assertLessEqual(abs(found[r] - float(exact)), bound, (rows, dim, r))
        self.assertEqual(len(found), rows)

    def test_times_is_the_exact_product_but_for_rounding(self):
        rng = random.Random(30)
        for typecode in "fd":
            for rows, dim in ((1, 1), (1, 9), (7, 1), (13, 5), (3, 64), (4, 63), (2, 300)):
                for like in LIKES:
                    self.assert_exact(numbers(rng, typecode, rows * dim, like), rows, dim,
                                      numbers(rng, typecode, dim, like))

    def test_its_error_is_below_1e_7_of_the_largest_result(self):
        rng = random.Random(31)
        for dim in (8, 72, 192):
            weights, x = numbers(rng, "f", 40 * dim), numbers(rng, "f", dim)
            exact = [math.fsum(map(float.__mul__, weights[r * dim:(r + 1) * dim], x))
                     for r in range(40)]
            self.assert_near(self.times(weights, 40, dim, x), exact, 1e-7 * largest(exact), dim)

    def test_lanes_at_the_edge_of_their_width_do_not_run_over(self):
        for dim in (1, 3, 4, 7, 8, 127, 128):
            for rows in (1, 2, 5):
                for sign in (1.0, -1.0):
                    ones = array("d", [sign] * (rows * dim))
                    found = self.times(ones, rows, dim, [1.0] * dim)
                    self.assert_near(found, [sign * dim] * rows, 1e-6 * dim)

    def test_negative_lanes_do_not_disturb_their_neighbours(self):
        for pattern in ((1, -1, 1, -1), (-1, -1, -1, -1), (-1, 0, 0, 1), (0, -1, 0, 0),
                        (1, 0, 0, -1)):
            for x in (3.0, -3.0):
                found = self.times(array("f", pattern), 4, 1, [x])
                self.assert_near(found, [x * p for p in pattern], 1e-6)

    def test_whole_weights_come_out_whole_beside_negative_ones(self):
        rng = random.Random(32)
        for _ in range(50):  # the norm is just below 2**33, so that one unit of the lanes is 1
            weights = [1.0 - 2.0 ** 33, *(float(rng.randint(-9, 9)) for _ in range(12))]
            rng.shuffle(weights)
            for x in (1.0, -1.0):
                found = self.times(array("d", weights), 13, 1, [x])
                self.assert_near(found, [x * w for w in weights], 1e-5)

    def test_zeros_give_zeros(self):
        zeros, some = array("f", [0.0] * 12), array("f", range(12))
        self.assertEqual(self.times(zeros, 4, 3, [1.0, -2.0, 3.0]), [0.0] * 4)
        self.assertEqual(self.times(some, 4, 3, [0.0] * 3), [0.0] * 4)

    def test_a_matrix_without_rows_has_an_empty_product(self):
        engine = m.interpreted_engine()
        out = engine.buffer(0)
        packed = engine.pack(engine.buffer(0), 0, 2)
        engine.matmul_nt(engine.buffer_of([1, 2]), packed, out, 1, 2, 0)
        self.assertEqual(len(out), 0)

    def test_a_vector_that_is_not_finite_gives_numbers_that_are_not_finite(self):
        engine = m.interpreted_engine()
        packed = engine.pack(engine.buffer_of([1, 2, 3, 4]), 2, 2)
        for bad in (math.inf, -math.inf, math.nan):
            for x in ([bad, 1.0], [1.0, bad], [bad, bad], [math.inf, -math.inf]):
                out = engine.buffer(2)
                engine.matmul_nt(engine.buffer_of(x), packed, out, 1, 2, 2)
                self.assertFalse(any(map(math.isfinite, out)), (x, out))

    def test_weights_that_are_not_finite_give_numbers_that_are_not_finite(self):
        for bad in (math.inf, -math.inf, math.nan):
            for engine in (m.reference_engine(), m.interpreted_engine()):
                packed = engine.pack(engine.buffer_of([bad, 2, 3, 4]), 2, 2)
                for rows in (1, 2):
                    out = engine.buffer(rows * 2)
                    engine.matmul_nt(engine.buffer_of([1.0] * rows * 2), packed, out, rows, 2, 2)
                    self.assertFalse(math.isfinite(out[0]), (bad, engine.name, rows))


class CachesRememberTheNewestSlots(KernelCase):
    def run_ring(self, typecode, block, heads, width, like):
        """Write two and a half turns into both caches, and look at each step."""
        rng, dim = random.Random(40), heads * width
        flat = m.FlatCache(m.reference_engine(typecode), block, heads, width)
        tuples = m.TupleCache(m.interpreted_engine(typecode), block, heads, width)
        ring = {}
        for position in range(block * 5 // 2 + 1):
            keys, values, q = (numbers(rng, typecode, dim, like) for _ in range(3))
            ring[position % block] = (keys, values)
            found = []
            for cache in (flat, tuples):
                cache.write(position % block, keys, values)
                out = array(typecode, [9.0] * dim)
                cache.attend(q, min(position + 1, block), out)
                found.append(out)
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                expected = naive_attention(q[part], [k[part] for k, _ in ring.values()],
                                           [v[part] for _, v in ring.values()])
                for out in found:
                    self.assert_near(out[part], expected, CLOSE[typecode] * 100, position)

    def test_both_caches_are_softmax_attention_past_the_end_of_the_ring(self):
        for typecode in "fd":
            for block, heads, width in ((1, 1, 1), (3, 2, 2), (8, 1, 5), (5, 3, 1)):
                for like in ("normal", "zeros", "denormals"):
                    self.run_ring(typecode, block, heads, width, like)

    def test_a_large_value_leaves_no_trace_once_it_is_written_over(self):
        cache = m.TupleCache(m.interpreted_engine("d"), 4, 1, 1)
        for position in range(40):
            value = 1234.567 if position % 13 == 5 and position < 33 else 0.1
            cache.write(position % 4, array("d", [0.0]), array("d", [value]))
        out = array("d", [0.0])
        cache.attend(array("d", [1.0]), 4, out)
        self.assertAlmostEqual(out[0], 0.1, delta=1e-14)

    def test_values_large_and_small_do_not_drift_over_many_turns(self):
        rng, block = random.Random(41), 6
        cache, ring = m.TupleCache(m.interpreted_engine("f"), block, 1, 2), {}
        for position in range(block * 100):
            key = numbers(rng, "f", 2)
            value = array("f", [rng.choice((100.0, 1e-2)) * rng.gauss(0, 1) for _ in range(2)])
            cache.write(position % block, key, value)
            ring[position % block] = (key, value)
        q, out = numbers(rng, "f", 2), array("f", [0.0, 0.0])
        cache.attend(q, block, out)
        expected = naive_attention(q, [k for k, _ in ring.values()], [v for _, v in ring.values()])
        self.assert_near(out, expected, 1e-5 * largest(expected))


class DropoutIsFair(KernelCase):
    def masked(self, engine, n, rate, seed):
        out = engine.buffer(n)
        engine.dropout_apply(engine.buffer_of([1.0] * n), out, n, rate, seed)
        return out

    def test_the_mask_follows_from_the_seed_alone(self):
        for engine in (m.reference_engine(), m.interpreted_engine()):
            first = self.masked(engine, 200, 0.5, 77)
            self.assertEqual(first, self.masked(engine, 200, 0.5, 77))
            self.assertEqual(first[:50], self.masked(engine, 50, 0.5, 77))
            self.assertNotEqual(first, self.masked(engine, 200, 0.5, 78))

    def test_about_the_right_share_falls_and_the_mean_stays(self):
        engine, n = m.interpreted_engine(), 20_000
        for rate in (0.1, 0.5, 0.9):
            for seed in (0, 1, 2 ** 32 - 1):
                out = self.masked(engine, n, rate, seed)
                share = sum(1 for x in out if x == 0.0) / n
                self.assertAlmostEqual(share, rate, delta=5 * math.sqrt(rate * (1 - rate) / n))
                self.assertAlmostEqual(sum(out) / n, 1.0, delta=0.08)
                kept = {round(x, 4) for x in out if x}
                self.assertEqual(kept, {round(1 / (1 - rate), 4)})

    def test_a_rate_of_zero_keeps_everything(self):
        self.assertEqual(list(self.masked(m.reference_engine(), 50, 0.0, 3)), [1.0] * 50)


class EnginesAreTables(unittest.TestCase):
    def test_every_engine_has_every_kernel(self):
        for engine in (m.reference_engine(), m.interpreted_engine()):
            for name in KERNELS:
                self.assertTrue(callable(getattr(engine, name)), name)
            with self.assertRaises(AttributeError):
                engine.matmul_xx

    def test_the_reference_runs_the_kernels_and_the_interpreted_engine_their_twins(self):
        reference, interpreted = m.reference_engine(), m.interpreted_engine()
        for name, kernel in KERNELS.items():
            self.assertIs(getattr(reference, name), kernel)
            self.assertIs(getattr(interpreted, name), TWINS.get(name, kernel))

    def test_buffers_start_at_zero_in_the_engine_s_typecode(self):
        for typecode in "fd":
            engine = m.interpreted_engine(typecode)
            self.assertEqual(engine.buffer(3), array(typecode, [0.0] * 3))
            self.assertEqual(engine.buffer_of([1.0, 2.0]), array(typecode, [1.0, 2.0]))
            self.assertEqual(engine.buffer(3).typecode, typecode)

    def test_no_grad_ends_even_when_its_block_fails(self):
        engine = m.interpreted_engine()
        with self.assertRaises(KeyError):
            with engine.no_grad():
                self.assertFalse(engine.recording)
                raise KeyError
        self.assertTrue(engine.recording)

    def test_an_engine_is_chosen_by_name_or_refused_with_a_remedy(self):
        self.assertEqual(m.choose_engine("python").name, "python")
        with mock.patch.dict(os.environ, {"CC": "no-such-compiler"}):
            for wish in ("auto", ""):
                engine = m.choose_engine(wish, True)
                self.assertEqual((engine.name, engine.typecode), ("python", "f"))
            with self.assertRaisesRegex(m.EngineError, "native.*CC.*use auto or python"):
                m.choose_engine("native")
        for wish in ("gpu", "Python", " "):
            with self.assertRaisesRegex(m.ConfigError, "MACROGPT_ENGINE.*use auto"):
                m.choose_engine(wish)


def refused(source):
    """Return what is said of a kernel that is outside the subset."""
    try:
        m.CKernel(ast.parse(textwrap.dedent(source)).body[0])
    except m.EngineError as error:
        return str(error)
    return ""


class TheTranslator(unittest.TestCase):
    def test_what_is_outside_the_subset_is_refused_with_its_line_and_reason(self):
        head = "def odd(x: F32, n: int) -> None:\n"
        for body, signs in (
                ("    for i in range(n):\n        print(i)\n", ("line 3",)),
                ("    y = open(n)\n", ("line 2", "open")),
                ("    y = z + 1\n", ("line 2", "z")),
                ("    y = n ** 2\n", ("line 2", "Pow")),
                ("    with n:\n        n = 1\n", ("line 2", "With")),
                ("    y = [i for i in x]\n", ("line 2", "ListComp")),
                ("    n = 0 < n < 3\n", ("line 2", "comparison")),
                ("    y = ~n\n", ("line 2", "Invert")),
                ("    y = lambda: n\n", ("line 2", "Lambda")),
                ("    y = x.append\n", ("line 2", "Attribute"))):
            said = refused(head + body)
            for sign in ("kernel odd", *signs):
                self.assertIn(sign, said, body)
        for body in (
                "x[0] = y = 1.0", "for i in x:\n        x[0] = 1.0", "y = True", "y = None", "y = 'a'",
                "for i in range(0, n, -1):\n        x[i] = 1.0", "y = 1e400", "y = 1 << 70",
                "for i in range(n):\n        n = 1\n    else:\n        n = 2", "n |= 3", "n /= 2",
                "while n > 0:\n        n -= 1\n    else:\n        n = 2", "return n", "return",
                "a = [0.0] * n", "a = [0.0, 1.0]", "a = [0.0] * 4\n    a = [0.0] * 8", "x = 1.0",
                "y = x", "y = x[0][1]", "y = x[-1]", "x[1.5] = 0.0", "x[0] = x", "x[n:] = x[0]",
                "y = max(1, 2, 3)", "y = exp(1.0, 2.0)", "y = exp()", "y = exp(x=1.0)",
                "y = 1\n    y = 1.5", "y = n // 2.0", "y = -7 // 2", "y = n % -3", "y = load8(x)",
                "store8(x, 0)", "store8(x, 0, 1.0)", "y = 1 if n else x", "y = 99999999999999999999",
                "for x[0] in range(3):\n        n = 1", "i = 0\n    for i in range(3):\n        n = i",
                "y, z = 1, 2", "del n", "global n", "assert n", "y = not n", "y = n and 1"):
            self.assertIn("kernel odd, line ", refused(f"{head}    {body}\n"), body)
        for head in ("def odd(x: F32, *n: int) -> None:", "def odd(x: F32, n: int = 3) -> None:",
                     "def odd(x: F32, *, n: int) -> None:", "def odd(x: F32) -> str:",
                     "def odd(x: F32):"):
            self.assertIn("kernel odd", refused(head + "\n    x[0] = 1.0\n"), head)
        self.assertIn("type of the subset", refused("def odd(x) -> None:\n    x = 1\n"))
        self.assertIn("type of the subset", refused("def odd(x: str) -> None:\n    x = 1\n"))

    def test_small_constant_loops_are_written_out_and_others_stay_loops(self):
        tree = ast.parse("def f(x: F32, n: int) -> None:\n    for i in range(3):\n"
                         "        x[i] = n / 2\n    for i in range(n):\n        x[i] += 1.5\n")
        code = m.CKernel(tree.body[0]).code
        for line in ("x[0] = ((float)n / 2);", "x[2] = ((float)n / 2);",
                     "for (i = 0; i < n; i += 1) {", "x[i] += 1.5f;"):
            self.assertIn(line, code)

    def test_every_kernel_is_in_the_subset(self):
        source = m.c_source(m.KERNELS)
        for name in KERNELS:
            self.assertRegex(source, rf"\n(static inline )?(void|float|long) {name}\(")


SANITIZED = """
import random, sys
import macrogpt as m
from array import array
kernels = m.load_kernels(sys.argv[1])
engine, rng = m.NativeEngine(kernels), random.Random(1)
def some(n):
    return array("f", [rng.gauss(0.0, 1.0) for _ in range(n)])
for seed in range(2):
    for name, args in m.sample_calls(random.Random(seed)):
        kernels[name](*args)
for heads, width, lengths in ((4, 18, (40, 40)), (1, 2, (1,)), (2, 18, (5, 1, 9)), (3, 8, (17,)),
                              (1, 32, (33, 2)), (2, 4, (0, 3)), (5, 2, (1, 1, 1))):
    dim, starts = heads * width, [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    rows, shape = starts[-1], (array("i", starts), len(lengths), heads, width)
    qkv, out, lse = some(rows * 3 * dim), some(rows * dim), some(rows * heads)
    engine.attention_forward(qkv, out, lse, *shape)
    engine.attention_backward(some(rows * dim), qkv, out, lse, some(rows * 3 * dim), *shape)
for _ in range(40):
    sizes = [rng.choice((0, 1, 5, 6, 7, 8, 15, 16, 17, 24, 40)) for _ in range(3)]
    sizes[rng.randrange(3)] = rng.choice((1, 40, 257))
    rows, inner, cols = sizes
    for name in ("matmul_nt", "matmul_nn", "matmul_tn"):
        getattr(engine, name)(some(rows * inner), some(inner * cols), some(rows * cols), rows,
                              inner, cols)
print("clean")
"""


class TheCompiledKernels(KernelCase):
    @classmethod
    def setUpClass(cls):
        cls.engine = compiled_engine()
        cls.kernels = cls.engine.compiled

    def parity(self, name, args, tolerance=2e-5):
        plain, compiled = copied(args), copied(args)
        results = KERNELS[name](*plain), self.kernels[name](*compiled)
        if results[0] is not None:
            self.assertAlmostEqual(*results, delta=tolerance * (1.0 + abs(results[0])))
        for i, (a, b) in enumerate(zip(compiled, plain)):
            if isinstance(a, array):
                self.assert_near(a, b, tolerance * (1.0 + largest(b)), (name, i))

    def test_every_kernel_does_the_same_both_ways(self):
        for seed in range(2):
            names = set()
            for name, args in m.sample_calls(random.Random(seed)):
                self.parity(name, args)
                names.add(name)
            self.assertEqual(names, set(KERNELS) - {"put8"})  # that one only kernels can call

    def test_the_exponential_is_within_its_bound(self):
        rng = random.Random(60)
        for x in [0.0, -0.0, 1e-30, 87.9, -87.3, *(rng.uniform(-87.3, 88.0) for _ in range(20000))]:
            x = array("f", [x])[0]
            self.assertLess(abs(m.exponential(x) / math.exp(x) - 1.0), 4e-7)
            self.assertLess(abs(self.kernels["exponential"](x) / math.exp(x) - 1.0), 6e-7, x)
        for function in (m.exponential, self.kernels["exponential"]):
            self.assertEqual([function(x) for x in (-88.0, -1e30)], [0.0, 0.0])
            self.assertAlmostEqual(function(3e38) / math.exp(88.0), 1.0, delta=1e-5)

    def test_blocks_for_few_registers_and_for_many_give_the_same_products(self):
        compiler, (rows, inner, cols) = m.find_compiler(), (29, 300, 53)
        rng = random.Random(61)
        a, b = numbers(rng, "f", rows * inner), numbers(rng, "f", inner * cols)
        plain = array("f", [0.0] * (rows * cols))
        KERNELS["matmul_nn"](a, b, plain, rows, inner, cols)
        with tempfile.TemporaryDirectory() as folder:
            for registers in (16, 32):
                source, library = (os.path.join(folder, f"{registers}.{end}") for end in ("c", "so"))
                with open(source, "w", encoding="utf-8") as file:
                    file.write(m.c_source([m.put_part, m.put8, m.multiply], registers))
                subprocess.run([*compiler, "-O1", "-fPIC", "-std=gnu99", "-w", "-shared", source, "-o",
                                library, "-lm"], check=True)
                out = array("f", [9.0] * (rows * cols))
                addresses = (ctypes.c_void_p(x.buffer_info()[0]) for x in (a, b, out))
                sizes = map(ctypes.c_long, (rows, inner, cols, inner, 1, cols, 1, 0))
                ctypes.CDLL(library).multiply(*addresses, *sizes)
                self.assert_near(out, plain, 1e-4, registers)

    def test_no_kernel_touches_what_is_not_its_own(self):
        compiler = m.find_compiler()
        checks = ["-fsanitize=address,undefined", "-fno-sanitize=alignment",
                  "-fno-sanitize-recover=undefined"]
        runtime = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True,
                                 text=True, check=False).stdout.strip()
        with tempfile.TemporaryDirectory() as folder:
            source, library = (os.path.join(folder, name) for name in ("k.c", "k.so"))
            with open(source, "w", encoding="utf-8") as file:
                file.write(m.c_source(m.KERNELS, 32))
            built = subprocess.run([*compiler, "-O0", *checks, "-fPIC", "-std=gnu99", "-w", "-shared",
                                    source, "-o", library, "-lm"], capture_output=True, check=False)
            if built.returncode or not os.path.isabs(runtime):
                self.skipTest("this compiler has no address sanitizer")
            environment = dict(os.environ, LD_PRELOAD=runtime, PYTHONMALLOC="malloc",
                               ASAN_OPTIONS="detect_leaks=0")
            probe = subprocess.run([sys.executable, "-S", "-c", ""], env=environment, check=False,
                                   capture_output=True)
            if probe.returncode:
                self.skipTest("Python does not start under the address sanitizer")
            done = subprocess.run([sys.executable, "-S", "-c", SANITIZED, library],
                                  env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
            self.assertEqual((done.returncode, done.stdout), (0, "clean\n"), done.stderr[-2000:])

    def test_products_of_every_shape_are_the_same_both_ways(self):
        rng = random.Random(50)
        sizes = (0, 1, 2, 5, 6, 7, 12, 15, 16, 17, 33)
        for _ in range(150):
            rows, inner, cols = (rng.choice(sizes) for _ in range(3))
            a, b = numbers(rng, "f", rows * inner), numbers(rng, "f", inner * cols)
            for name in ("matmul_nt", "matmul_nn", "matmul_tn"):
                plain, mine = (array("f", [0.5] * (rows * cols)) for _ in range(2))
                KERNELS[name](a, b, plain, rows, inner, cols)
                getattr(self.engine, name)(a, b, mine, rows, inner, cols)
                if inner:
                    self.assert_near(mine, plain, 1e-5 * (1 + largest(a) * largest(b) * inner),
                                     (name, rows, inner, cols))

    def test_the_number_of_threads_changes_no_bit(self):
        rng, results = random.Random(53), []
        x, w, g = (numbers(rng, "f", n) for n in (200 * 70, 90 * 70, 200 * 90))
        qkv = numbers(rng, "f", 120 * 48)
        shape = (whole([0, 40, 41, 120]), 3, 2, 8)
        for threads in (1, 2, 3, 5):
            engine = m.NativeEngine(self.kernels)
            engine.threads = threads
            with mock.patch.object(m, "PARALLEL_WORK", 0):
                out, dx, dw, mixed, dqkv = (
                    engine.buffer(n) for n in (200 * 90, 200 * 70, 90 * 70, 120 * 16, 120 * 48))
                lse = engine.buffer(240)
                engine.matmul_nt(x, w, out, 200, 70, 90)
                engine.matmul_nn(g, w, dx, 200, 90, 70)
                engine.matmul_tn(g, x, dw, 90, 200, 70)
                engine.attention_forward(qkv, mixed, lse, *shape)
                engine.attention_backward(mixed, qkv, mixed, lse, dqkv, *shape)
                normed, inverse = engine.buffer(200 * 90), engine.buffer(200)
                turned, gated, slopes = (engine.buffer(n) for n in (200 * 90, 200 * 45, 200 * 90))
                engine.rmsnorm_forward(g, normed, inverse, 200, 90, 1e-5)
                engine.rmsnorm_backward(out, normed, inverse, slopes, 200, 90)
                engine.rope_turn(g, x[:2000], turned, 200, 90, 60, 10, 1.0)
                engine.swiglu_forward(g, gated, 200, 45)
                engine.swiglu_backward(gated, g, slopes, 200, 45)
            results.append((out, dx, dw, mixed, lse, dqkv, normed, inverse, turned, gated, slopes))
        self.assertTrue(all(result == results[0] for result in results))

    def test_huge_logits_and_long_rows_keep_their_sums(self):
        for scale in (0.0, 1.0, 80.0, 1e4):
            rng = random.Random(51)
            logits = array("f", [rng.gauss(0.0, scale) for _ in range(3 * 700)])
            targets = whole([0, 699, -1])
            self.parity("cross_entropy_forward", (logits, targets, array("f", [0.0] * 3),
                                                  array("f", [0.0] * 3), 3, 700))
            gates = array("f", [rng.gauss(0.0, scale) for _ in range(2 * 40)])
            self.parity("swiglu_forward", (gates, array("f", [0.0] * 40), 1, 40))

    def test_attention_of_every_shape_is_the_same_both_ways(self):
        rng = random.Random(52)
        for heads, width, lengths in ((1, 2, (1,)), (2, 18, (5, 1, 9)), (3, 8, (17,)),
                                      (1, 32, (33, 2)), (4, 6, (8, 8)), (2, 4, (0, 3))):
            dim, starts = heads * width, [0]
            for length in lengths:
                starts.append(starts[-1] + length)
            total, shape = starts[-1], (whole(starts), len(lengths), heads, width)
            qkv, out, lse = (numbers(rng, "f", n) for n in (total * 3 * dim, total * dim,
                                                            total * heads))
            self.parity("attention_forward", (qkv, out, lse, *shape))
            m.attention_forward(qkv, out, lse, *shape)
            g, dqkv = numbers(rng, "f", total * dim), numbers(rng, "f", total * 3 * dim)
            self.parity("attention_backward", (g, qkv, out, lse, dqkv, *shape))

    def test_a_training_run_gives_the_same_losses_in_both_engines(self):
        def losses(engine):
            rng = random.Random(5)
            shape = m.Shape.of(m.Config().replace(["n_embd=24", "n_head=2", "block_size=16"]))
            model, adam = m.GPT(shape, 40, engine, rng), m.AdamW.of(m.Config())
            for _ in range(9):
                windows = [[rng.randrange(40) for _ in range(rng.randint(2, 17))]
                           for _ in range(3)]
                yield m.train_step(model, adam, windows, 0.005, 0.1, rng).loss
        for mine, plain in zip(losses(self.engine), losses(m.interpreted_engine())):
            self.assertAlmostEqual(mine, plain, delta=1e-4 * plain)

    def test_what_it_says_from_the_cache_is_what_it_says_of_the_whole(self):
        model = m.GPT(m.Shape.of(m.Config()), 60, self.engine, random.Random(3))
        ids, cache = [random.Random(4).randrange(60) for _ in range(40)], model.new_cache()
        with self.engine.no_grad():
            whole_text = model.logits(ids)
        for t, token in enumerate(ids):
            self.assert_near(model.feed(cache, [token]), whole_text.row(t), 1e-5)

    def test_denormals_stay_numbers_after_loading(self):
        self.assertGreater(5e-324, 0.0)
        self.assertEqual(array("f", [1e-40])[0] / 2.0 > 0.0, True)
        self.assertGreater(2.0 ** -1074 * random.Random(1).choice([1.0]), 0.0)



QUICK = ("-O0", "-fPIC", "-std=gnu99", "-w")  # compiles in a third of the time


class FindingAndTrustingTheCompiler(Folder, unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        compiled_engine()
        cls.source = m.c_source(m.KERNELS)

    def setUp(self):
        super().setUp()
        for change in (mock.patch.dict(os.environ, {"XDG_CACHE_HOME": self.folder}),
                       mock.patch.object(m, "C_FLAGS", QUICK),
                       mock.patch.object(m, "c_source", return_value=self.source)):
            change.start()
            self.addCleanup(change.stop)
        self.cache = self.path("macrogpt")

    def script(self, text):
        path = self.write("compiler", "#!/bin/sh\n" + text)
        os.chmod(path, 0o700)
        os.environ["CC"] = path

    def test_what_was_compiled_once_is_loaded_ever_after(self):
        self.assertEqual(m.choose_engine("auto").name, "python")
        self.assertEqual(m.choose_engine("auto", True).name, "native")
        self.assertEqual(os.stat(self.cache).st_mode & 0o777, 0o700)
        names = os.listdir(self.cache)
        self.assertEqual(len(names), 1, "nothing but the library is left")
        with mock.patch.object(m, "_compile", side_effect=AssertionError):
            self.assertEqual(m.choose_engine("auto").name, "native")

    def test_a_compiler_that_fails_means_interpreted_and_one_line(self):
        for text in ("exit 0\n", "echo no >&2; exit 7\n", "kill -9 $$\n", "exit 1\n"):
            self.script(text)
            told = []
            self.assertEqual(m.choose_engine("auto", True, told.append).name, "python", text)
            self.assertEqual(len(told), 1)
            self.assertNotIn("\n", told[0])
        with self.assertRaisesRegex(m.EngineError, "MACROGPT_ENGINE=native"):
            m.choose_engine("native")

    def test_a_compiler_that_never_ends_is_given_up(self):
        self.script("exec sleep 100\n")
        with mock.patch.multiple(m, COMPILE_SECONDS=0.3, ANSWER_SECONDS=0.3):
            self.assertEqual(m.choose_engine("auto", True).name, "python")

    def test_a_compiler_that_did_not_answer_is_not_waited_for_again_for_an_hour(self):
        self.script("exec sleep 100\n")
        asked = mock.Mock(side_effect=m.CompilerHangs("late"))
        with mock.patch.object(m, "_compile", asked):
            for calls, build in ((1, lambda: m.native_engine(patient=False)),
                                 (1, lambda: m.native_engine(patient=False)),
                                 (2, m.native_engine),
                                 (3, lambda: m.native_engine(
                                     patient=False, clock=lambda: time.time() + 3601))):
                with self.assertRaises(m.CompilerHangs):
                    build()
                self.assertEqual(asked.call_count, calls)
            told = []
            self.assertEqual(m.choose_engine("auto", True, told.append).name, "python")
            self.assertIn("did not answer", told[0])
            self.script("exec sleep 200\n")  # another compiler is another matter
            self.assertEqual(m.choose_engine("auto", True).name, "python")
            self.assertEqual(asked.call_count, 4)

    def test_a_compiler_may_have_options_or_a_path_with_a_blank(self):
        real = m.find_compiler()[0]
        os.environ["CC"] = f"{real} -DEXTRA=1"
        self.assertEqual(m.find_compiler(), [real, "-DEXTRA=1"])
        self.assertEqual(m.choose_engine("auto", True).name, "native")
        os.symlink(real, self.path("a compiler"))
        os.environ["CC"] = self.path("a compiler")
        self.assertEqual(m.find_compiler(), [self.path("a compiler")])
        os.environ["CC"] = "no-such-compiler -O2"
        self.assertIsNone(m.find_compiler())

    def test_an_option_the_compiler_does_not_know_is_left_out(self):
        real = m.find_compiler()[0]
        self.script(f"""for word; do case $word in -march=native|-mcpu=native) exit 1;; esac; done
exec {real} "$@"\n""")
        self.assertEqual(m.choose_engine("auto", True).name, "native")

    def test_of_old_libraries_only_the_newest_stay(self):
        os.mkdir(self.cache, 0o700)
        for i in range(m.KEPT_LIBRARIES + 3):
            os.utime(self.write(os.path.join("macrogpt", f"kernels-{i}.so"), ""), (i, i))
        self.assertEqual(m.choose_engine("auto", True).name, "native")
        names = sorted(os.listdir(self.cache))
        self.assertEqual(len(names), m.KEPT_LIBRARIES)
        self.assertNotIn("kernels-3.so", names)
        self.assertIn("kernels-4.so", names)

    def test_a_cache_that_cannot_be_written_or_is_somebody_elses_is_not_used(self):
        self.assertEqual(m.cache_folder(), self.cache)
        with mock.patch.object(os, "access", return_value=False):
            self.assertIsNone(m.cache_folder())
        with mock.patch.object(os, "geteuid", return_value=os.geteuid() + 1):
            self.assertIsNone(m.cache_folder())

    def test_kernels_that_compute_something_else_are_not_trusted(self):
        real = m.find_compiler()[0]
        self.script(f"""for word; do case $word in *.c) sed -i 's/+= 1.0f/+= 2.0f/; \
s/sqrtf(/expf(/' $word;; esac; done; exec {real} "$@"\n""")
        told = []
        self.assertEqual(m.choose_engine("auto", True, told.append).name, "python")
        self.assertEqual(len(told), 1)
        self.assertEqual(os.listdir(self.cache), [])

    def test_garbage_in_the_cache_is_never_used_and_made_anew(self):
        name = m._library_name(m.find_compiler())
        library = self.write(os.path.join(m.cache_folder(), name), "garbage")
        self.assertEqual(m.choose_engine("auto").name, "python")
        self.assertEqual(m.choose_engine("auto", True).name, "native")
        self.assertEqual(os.listdir(self.cache), [name])
        self.assertGreater(os.path.getsize(library), len("garbage"))

    def test_a_cache_that_is_no_folder_of_ours_is_left_alone(self):
        self.write("macrogpt", "a file")
        self.assertIsNone(m.cache_folder())
        self.assertEqual(m.choose_engine("auto", True).name, "native")
        os.unlink(self.cache)
        os.mkdir(self.cache, 0o777)
        os.chmod(self.cache, 0o777)
        self.assertIsNone(m.cache_folder())
        other = self.path("other")
        os.mkdir(other)
        os.rmdir(self.cache)
        os.symlink(other, self.cache)
        self.assertIsNone(m.cache_folder())

    def test_two_that_compile_at_once_both_succeed(self):
        code = (f"import macrogpt as m; import sys; m.C_FLAGS = {QUICK}; "
                "sys.exit(m.choose_engine('auto', True).name != 'native')")
        both = [subprocess.Popen([sys.executable, "-S", "-c", code], cwd=ROOT) for _ in range(2)]
        self.assertEqual([process.wait(60) for process in both], [0, 0])
        self.assertEqual(len(os.listdir(self.cache)), 1)


if __name__ == "__main__":
    unittest.main()
