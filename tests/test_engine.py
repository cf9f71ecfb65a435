"""Claims about the kernels, their fast twins, the packed matrices, the caches and the engines."""
import ast
import cProfile
import itertools
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from array import array
from fractions import Fraction
from unittest import mock

import macrogpt as m
from support import ROOT, Case, Folder, compiled_engine, engine_in_use, environment

KERNELS = {kernel.__name__: kernel for kernel in m.KERNELS}
CLOSE = {"f": 3e-6, "d": 1e-10}
SHAPES = [(1, 1, 1), (1, 7, 3), (5, 1, 1), (3, 9, 13), (8, 8, 8), (2, 3, 1), (0, 3, 2), (11, 5, 17),
          (4, 3, 0)]  # rows, inner, columns
LIKES = ("normal", "zeros", "denormals", "large", "mixed")
PRODUCTS = ("matmul_nt", "matmul_nn", "matmul_tn")


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


def naive_attention(q, keys, values):
    """Softmax attention of one query over rows, written from the formula."""
    scores = [sum(a * b for a, b in zip(q, k)) / math.sqrt(len(q)) for k in keys]
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    total = math.fsum(weights)
    return [math.fsum(w * v[c] for w, v in zip(weights, values)) / total for c in range(len(q))]


def naive_causal(qkv, starts, heads, width):
    """Causal attention inside each segment of a flat buffer, written from the formula."""
    dim, out = heads * width, []

    def part(row, which, h):
        at = row * 3 * dim + which * dim + h * width
        return qkv[at:at + width]
    for first, last in zip(starts, starts[1:]):
        for i in range(first, last):
            for h in range(heads):
                out += naive_attention(part(i, 0, h), *(
                    [part(j, which, h) for j in range(first, i + 1)] for which in (1, 2)))
    return out


class EveryTwinDoesWhatItsKernelDoes(Case):
    def each(self, seed, likes=LIKES):
        """Yield rng, typecode, and a maker of buffers, for every kind of number."""
        rng = random.Random(seed)
        for typecode in "fd":
            for like in likes:
                yield rng, typecode, lambda n, t=typecode, k=like: numbers(rng, t, n, k)

    def compare(self, name, args, scale=None):
        """Kernel and twin of that name, given equal buffers, must leave and return the same."""
        slow, fast = ([a[:] if isinstance(a, array) else a for a in args] for _ in range(2))
        results = KERNELS[name](*slow), m.TWINS[name](*fast)
        close = CLOSE[args[0].typecode]
        if results[0] is not None:
            self.assertAlmostEqual(*results, delta=1e-12 + close * (scale or 1.0))
        for i, (a, b) in enumerate(zip(fast[:4], slow[:4])):  # behind them attention has room
            if isinstance(a, array):
                self.assertTrue(all(map(math.isfinite, b)), f"{name}: argument {i} overflows")
                size = 1e-30 + (largest(b) if scale is None else scale)
                self.assert_near(a, b, close * size, (name, i))
        return slow

    def test_products_by_lanes_are_the_plain_ones_packed_or_not(self):
        plain, engine, rng = m.reference_engine(), m.interpreted_engine(), random.Random(20)
        for like, (rows, inner, cols), name in itertools.product(LIKES, SHAPES, PRODUCTS):
            a, b, slow = (numbers(rng, "f", n, like)
                          for n in (rows * inner, inner * cols, rows * cols))
            size = 1.0 + largest(slow) + largest(a) * largest(b) * inner
            left = (inner, rows) if name == "matmul_tn" else (rows, inner)
            right = (cols, inner) if name == "matmul_nt" else (inner, cols)
            packed = m.PackedMatrix(a, *left), m.PackedMatrix(b, *right)
            fast = [slow[:], slow[:]]
            getattr(plain, name)(a, b, slow, rows, inner, cols)
            for out, factors in zip(fast, ((a, b), packed)):
                getattr(engine, name)(*factors, out, rows, inner, cols)
                self.assert_near(out, slow, CLOSE["f"] * size, (name, rows, inner, cols))

    def test_sums_and_softmax_are_those_of_the_kernels(self):
        self.assertEqual(set(m.TWINS), {"add_scaled", "dot", "softmax", "attention_forward",
                                        "attention_backward"}, "a twin is not compared here")
        for rng, typecode, make in self.each(5):
            for n in (0, 1, 7, 16, 33):
                for scale in (1.0, 0.0, -2.5):
                    self.compare("add_scaled", (make(n), make(n + 3), n, scale))
                x, y = make(n + 2), make(n)
                self.compare("dot", (x, y, n), 1e-2 * (1.0 + largest(x, y) ** 2))
                if n:
                    self.compare("softmax", (make(n + 1), n), 1e5)

    def compare_attention(self, rng, qkv, starts, heads, width, scale=None):
        """Forward and backward must come to the same by kernel, by twin and by formula."""
        code, rows, dim = qkv.typecode, starts[-1], heads * width
        shape = (whole(starts), len(starts) - 1, heads, width,
                 array(code, [0.0] * (2 * m.QUERIES * rows)))
        out, lse, g = (numbers(rng, code, n) for n in (rows * dim, rows * heads, rows * dim))
        _, out, lse, *_ = self.compare("attention_forward", (qkv, out, lse, *shape), scale)
        size = 1e-30 + (largest(out) if scale is None else scale)
        self.assert_near(out, naive_causal(qkv, starts, heads, width), CLOSE[code] * size, starts)
        dqkv = numbers(rng, code, rows * 3 * dim)
        self.compare("attention_backward", (g, qkv, lse, dqkv, *shape), scale)

    def test_attention_is_that_of_the_kernels_and_of_the_formula(self):
        for rng, typecode, make in self.each(12, ("normal", "zeros", "denormals", "mixed")):
            for (heads, width), starts in itertools.product(
                    ((3, 1), (1, 2), (3, 5)),
                    ((0, 1), (0, 0), (0, 7), (0, 1, 2, 9), (0, 3, 3, 4))):
                qkv = make(starts[-1] * 3 * heads * width)
                if typecode == "f":  # it does not tell scores of a million apart
                    qkv = array("f", [x if abs(x) < 100.0 else x / 100.0 for x in qkv])
                self.compare_attention(rng, qkv, starts, heads, width,
                                       10.0 * (1.0 + largest(qkv) ** 2))
        for typecode, most in itertools.product("fd", (1.0, 100.0)):  # of these, huge scores
            qkv = array(typecode, rng.choices((-most, most, most / 2), k=50 * 18))
            self.compare_attention(rng, qkv, (0, 33, 50), 2, 3)


class KernelsKnowTheAnswersWorkedOutByHand(Case):
    def setUp(self):
        self.engines = [engine_in_use(), *(make(typecode) for typecode in "fd" for make in (
            m.reference_engine, m.interpreted_engine))]

    def test_swiglu_opens_with_the_gate(self):
        for engine in self.engines:
            x = engine.buffer_of([1e5, -1e5, 750.0, 1.0, *[2.0] * 4])
            out, slopes = engine.buffer(4), engine.buffer(8)
            engine.swiglu_forward(x, out, 1, 4)
            engine.swiglu_backward(engine.buffer_of([1.0] * 4), x, slopes, 1, 4)
            self.assert_near(out, [2e5, 0.0, 1500.0, 2.0 / (1.0 + math.exp(-1.0))], 1e-5)
            self.assertTrue(all(map(math.isfinite, slopes)))

    def test_equal_logits_cost_the_log_of_the_vocabulary_and_huge_ones_do_not_overflow(self):
        for engine in self.engines:
            for level in (0.0, 1e4, -1e4):
                lse, losses = engine.buffer(2), engine.buffer_of([7.0, 7.0])
                engine.cross_entropy_forward(engine.buffer_of([level] * 1400), whole([3, -1]), lse,
                                             losses, 2, 700)
                self.assert_near(losses, [math.log(700), 0.0], 1e-3 if level else 1e-5)
            logits = engine.buffer_of([1e4, -1e4, 0.0])
            for target, loss, slope in ((0, 0.0, [0, 0, 0]), (1, 2e4, [1, -1, 0])):
                lse, losses, grad = map(engine.buffer, (1, 1, 3))
                engine.cross_entropy_forward(logits, whole([target]), lse, losses, 1, 3)
                engine.cross_entropy_backward(logits, whole([target]), lse, grad, 1, 3, 1.0)
                self.assert_near(losses, [loss], 1e-2)
                self.assert_near(grad, slope, 1e-3)

    def test_the_seed_decides_what_falls_in_about_the_right_share_and_the_mean_stays(self):
        def masked(n, rate, seed):
            out = engine.buffer(n)
            engine.dropout_apply(engine.buffer_of([1.0] * n), out, n, rate, seed)
            return out
        for engine in self.engines:
            first = masked(200, 0.5, 77)
            self.assertEqual(first[:50], masked(50, 0.5, 77))
            self.assertNotEqual(first, masked(200, 0.5, 78))
        for rate, seed in itertools.product((0.0, 0.1, 0.5, 0.9), (0, 1, 2 ** 32 - 1)):
            out, n = masked(10_000, rate, seed), 10_000
            share = out.count(0.0) / n
            self.assertAlmostEqual(share, rate, delta=5 * math.sqrt(rate * (1 - rate) / n))
            self.assertAlmostEqual(sum(out) / n, 1.0, delta=0.12)
            self.assertEqual({round(x, 4) for x in out if x}, {round(1 / (1 - rate), 4)})


class PackedMatrixIsTheMatrix(Case):
    def assert_exact(self, weights, rows, dim, x):
        """The product by lanes must come within the rounding of both factors to fixed point."""
        vector = m.PackedMatrix(array(weights.typecode, x), 1, dim)
        found = next(m.PackedMatrix(weights, rows, dim).times(False, vector, False))
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
        for (rows, dim), typecode, like in itertools.product(
                ((1, 1), (1, 9), (7, 1), (13, 5), (3, 64), (4, 63), (2, 300)), "fd", LIKES):
            self.assert_exact(numbers(rng, typecode, rows * dim, like), rows, dim,
                              numbers(rng, typecode, dim, like))

    def test_lanes_neither_run_over_at_their_edge_nor_disturb_their_neighbours(self):
        for dim, rows, sign in itertools.product((1, 3, 4, 7, 8, 127, 128), (1, 2, 5), (1.0, -1.0)):
            self.assert_exact(array("d", [sign] * (rows * dim)), rows, dim, [1.0] * dim)
        for pattern in ((1, -1, 1, -1), (-1, -1, -1, -1), (-1, 0, 0, 1), (0, -1, 0, 0)):
            for x in (3.0, -3.0):
                self.assert_exact(array("f", pattern), 4, 1, [x])


class TheTranslator(Case):
    def refused_kernel(self, source, *signs):
        """Assert that a kernel is outside the subset, and what is said of it."""
        self.refused(m.EngineError, lambda: m.CKernel(ast.parse(source).body[0]), *signs)

    def test_what_is_outside_the_subset_is_refused_with_its_line_and_reason(self):
        head = "def odd(x: F32, n: int) -> None:\n    "
        for body, line, sign in (
                ("for i in range(n):\n        print(i)", 3, "print"), ("y = z + 1", 2, "z"),
                ("y = n ** 2", 2, "Pow"), ("with n:\n        n = 1", 2, "With"),
                ("y = [i for i in x]", 2, "ListComp"), ("y = ~n", 2, "Invert"),
                ("n = 0 < n < 3", 2, "comparison"), ("y = x.append", 2, "Attribute")):
            self.refused_kernel(head + body, f"kernel odd, line {line}", sign)
        for body in (
                "x[0] = y = 1.0", "for i in x:\n        x[0] = 1.0", "y = True", "y = None",
                "for i in range(0, n, -1):\n        x[i] = 1.0", "y = 1e400", "y = 1 << 70",
                "for i in range(n):\n        n = 1\n    else:\n        n = 2", "n |= 3", "n /= 2",
                "while n > 0:\n        n -= 1\n    else:\n        n = 2", "return n", "return",
                "a = [0.0] * n", "a = [0.0, 1.0]", "a = [0.0] * 4\n    a = [0.0] * 8", "x = 1.0",
                "y = x", "y = x[0][1]", "y = x[-1]", "x[1.5] = 0.0", "x[0] = x", "x[n:] = x[0]",
                "y = max(1, 2, 3)", "y = exp()", "y = exp(x=1.0)", "y = 1\n    y = 1.5",
                "y = n // 2.0", "y = -7 // 2", "y = n % -3", "y = load8(x)", "store8(x, 0)",
                "y = 1 if n else x", "for x[0] in range(3):\n        n = 1", "y, z = 1, 2",
                "i = 0\n    for i in range(3):\n        n = i", "y = not n", "y = n and 1"):
            self.refused_kernel(head + body, "kernel odd, line ")
        for head, sign in (
                ("x: F32, *n: int) -> None", ""), ("x: F32, n: int = 3) -> None", ""),
                ("x: F32, *, n: int) -> None", ""), ("x: F32) -> str", ""), ("x: F32)", ""),
                ("x) -> None", "type of the subset"), ("x: str) -> None", "type of the subset")):
            self.refused_kernel(f"def odd({head}:\n    x[0] = 1.0", "kernel odd", sign)

    def test_every_kernel_is_in_the_subset(self):
        source = m.c_source(m.KERNELS)
        self.assertEqual([name for name in KERNELS if f" {name}(" not in source], [])


SANITIZED = """
print("begun", flush=True)
import random, sys
import macrogpt as m
import test_engine
m.check_library(sys.argv[1])
engine, rng = m.NativeEngine(m.load_kernels(sys.argv[1])), random.Random(1)
for case in test_engine.ATTENDED:
    test_engine.attended(engine, rng, *case)
for case in test_engine.multiplied_sizes(rng, 40):
    test_engine.multiplied(engine, rng, *case)
print("clean")
"""
ATTENDED = ((1, 2, (1,)), (2, 18, (5, 1, 9)), (3, 8, (17,)), (1, 32, (33, 2)), (4, 6, (8, 8)),
            (2, 4, (0, 3)), (2, 20, (24, 25, 47, 48, 49)), (4, 18, (40, 40)), (5, 2, (1, 1, 1)))


def attended(engine, rng, heads, width, lengths):
    """Return what attention over segments of such lengths gives forward, and then backward."""
    starts = whole([sum(lengths[:s]) for s in range(len(lengths) + 1)])
    rows, dim = starts[-1], heads * width
    qkv, g = numbers(rng, "f", rows * 3 * dim), numbers(rng, "f", rows * dim)
    out, lse, dqkv = map(engine.buffer, (rows * dim, rows * heads, rows * 3 * dim))
    engine.attend("attention_forward", (qkv, out, lse), starts, heads, width)
    engine.attend("attention_backward", (g, qkv, lse, dqkv), starts, heads, width)
    return out, lse, dqkv


def multiplied_sizes(rng, count):
    """Yield sizes of products: rows, inner, columns."""
    for _ in range(count):
        sizes = [rng.choice((0, 1, 2, 5, 6, 7, 8, 12, 15, 16, 17, 24, 33, 40)) for _ in range(3)]
        sizes[rng.randrange(3)] = rng.choice((1, 40, 257))
        yield sizes


def multiplied(engine, rng, rows, inner, cols):
    """Return the three products of random matrices of such sizes."""
    a, b = numbers(rng, "f", rows * inner), numbers(rng, "f", inner * cols)
    products = [array("f", [0.5] * (rows * cols)) for _ in PRODUCTS]
    for name, product in zip(PRODUCTS, products):
        getattr(engine, name)(a, b, product, rows, inner, cols)
    return products


class TheCompiledKernels(Case):
    @classmethod
    def setUpClass(cls):
        if not m.find_compiler():
            raise unittest.SkipTest("there is no C compiler")
        cls.engine = m.native_engine()  # fails where kernels do not pass their check
        cls.kernels = cls.engine.compiled

    def test_a_trial_reaches_every_kernel_and_comes_to_the_same_both_ways(self):
        profile = cProfile.Profile(builtins=False)
        plain = profile.runcall(m.trial, m.Engine("plain", KERNELS))
        reached = {entry.code for entry in profile.getstats()}
        missing = {name for name, kernel in KERNELS.items() if kernel.__code__ not in reached}
        self.assertLessEqual(missing, {"exponential"})  # plain kernels take the library's
        for i, (a, b) in enumerate(zip(m.trial(self.engine), plain)):
            self.assertTrue(any(b), f"buffer {i} of zeros would prove nothing")
            self.assert_near(a, b, 2e-5 * largest(b), i)

    def test_the_exponential_is_within_its_bound(self):
        rng = random.Random(60)
        some = array("f", [0.0, -0.0, 1e-30, 87.9, -87.3,
                           *(rng.uniform(-87.3, 88.0) for _ in range(4000))])
        for function, bound in ((m.exponential, 4e-7), (self.kernels["exponential"], 6e-7)):
            for x in some:
                self.assertLess(abs(function(x) / math.exp(x) - 1.0), bound, x)
            self.assertEqual([function(x) for x in (-88.0, -1e30)], [0.0, 0.0])
            self.assertAlmostEqual(function(3e38) / math.exp(88.0), 1.0, delta=1e-5)

    def test_no_kernel_touches_what_is_not_its_own_whatever_the_registers(self):
        compiler = m.find_compiler()
        runtime = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True,
                                 text=True, check=False).stdout.strip()
        env = environment(ROOT, {"LD_PRELOAD": runtime, "PYTHONMALLOC": "malloc",
                                 "ASAN_OPTIONS": "detect_leaks=0",
                                 "PYTHONPATH": os.path.join(ROOT, "tests")})
        with tempfile.TemporaryDirectory() as folder:
            source, library = (os.path.join(folder, name) for name in ("k.c", "k.so"))
            with open(source, "w", encoding="utf-8") as file:  # the blocks that are not in use here
                file.write(m.c_source(m.KERNELS, 16 if "avx512vl" in m._cpu_features() else 32))
            built = subprocess.run([
                *compiler, *QUICK, "-fsanitize=address,undefined", "-fno-sanitize=alignment",
                "-fno-sanitize-recover=undefined", "-shared", source, "-o", library, "-lm"],
                capture_output=True, check=False)
            if built.returncode or not os.path.isabs(runtime):
                self.skipTest("this compiler has no address sanitizer")
            done = subprocess.run(
                [sys.executable, "-S", "-c", SANITIZED, library], env=env, cwd=ROOT,
                capture_output=True, text=True, check=False, timeout=60)
            if not done.stdout:
                self.skipTest("Python does not start under the address sanitizer")
            self.assertEqual((done.returncode, done.stdout), (0, "begun\nclean\n"),
                             done.stderr[-2000:])

    def test_the_number_of_threads_changes_no_bit(self):
        results = []
        for threads in (1, 2, 3, 5):
            engine = m.NativeEngine(self.kernels)
            engine.threads = threads
            with mock.patch.object(m, "PARALLEL_WORK", 0):
                results.append(m.trial(engine))
            self.assertEqual(results[-1], results[0])
            self.assertEqual("_pool" in vars(engine), threads > 1)

    def test_products_and_attention_of_every_shape_are_the_same_both_ways(self):
        sizes = [case for case in multiplied_sizes(random.Random(50), 30) if case[1]]  # inner
        for work, plain, cases in ((multiplied, m.reference_engine(), sizes),
                                   (attended, m.interpreted_engine(), ATTENDED)):
            for case in cases:
                results = (work(e, random.Random(52), *case) for e in (self.engine, plain))
                for mine, wanted in zip(*results):
                    self.assert_near(mine, wanted, 2e-5 * (1.0 + largest(wanted)), case)

    def test_denormals_stay_numbers_after_loading(self):
        self.assertGreater(array("f", [1e-40])[0] / 2.0, 0.0)
        self.assertGreater(2.0 ** -1074 * random.Random(1).choice([1.0]), 0.0)

    def test_kernels_that_do_something_else_are_not_trusted(self):
        trial, plain, found = m.trial, m.trial(m.reference_engine()), set()
        for name in self.kernels:
            idle = mock.Mock(return_value=1.0)
            with mock.patch.multiple(
                    m, load_kernels=lambda path, n=name, f=idle: {**self.kernels, n: f},
                    trial=lambda engine: trial(engine) if engine.is_fast else plain):
                try:
                    m.check_library("")
                except (m.EngineError, ArithmeticError):
                    found.add(name)
            self.assertEqual(idle.called, name in found, name)
        self.assertGreater(len(found), 20)


QUICK = ("-O0", "-fPIC", "-std=gnu99", "-w")  # compiles in a third of the time
HOLLOW = "".join(f"void {name}(void) {{}}\n" for name in KERNELS)  # can be loaded in no time


class FindingAndTrustingTheCompiler(Folder):
    @classmethod
    def setUpClass(cls):
        compiled_engine()

    def setUp(self):
        super().setUp()
        self.real = {name: getattr(m, name) for name in ("c_source", "CALL_CODE")}
        hollow = {"c_source": mock.Mock(return_value=HOLLOW), "CALL_CODE": "", "C_FLAGS": QUICK}
        for change in (mock.patch.dict(os.environ, {"XDG_CACHE_HOME": self.folder}),
                       mock.patch.multiple(m, **hollow)):
            change.start()
            self.addCleanup(change.stop)
        self.cache = self.path("macrogpt")

    def script(self, text):
        path = self.write("compiler", "#!/bin/sh\n" + text)
        os.chmod(path, 0o700)
        os.environ["CC"] = path

    def test_what_was_compiled_and_checked_once_is_loaded_ever_after(self):
        source = self.real["c_source"](m.KERNELS)
        m.CALL_CODE, m.c_source.return_value = self.real["CALL_CODE"], source
        self.assertEqual(m.choose_engine("auto").name, "python")
        self.assertEqual(m.choose_engine("auto", True).name, "native")
        self.assertEqual(os.stat(self.cache).st_mode & 0o777, 0o700)
        names = sorted(os.listdir(self.cache))
        self.assertEqual([name[-7:] for name in names], [names[0][-7:], ".so.sum"])
        self.assertEqual(os.stat(os.path.join(self.cache, names[0])).st_mode & 0o777, 0o600)
        with mock.patch.object(m, "_compile", side_effect=AssertionError):
            self.assertEqual(m.choose_engine("auto").name, "native")
        for name in names:
            os.unlink(os.path.join(self.cache, name))
        at = source.index("] += ", source.index("void scatter_rows("))
        m.c_source.return_value = source[:at] + "] = " + source[at + len("] += "):]
        told = []
        self.assertEqual(m.choose_engine("auto", True, told.append).name, "python")
        self.assertIn("with code 1", told[0])
        self.assertEqual(os.listdir(self.cache), [])

    def test_a_compiler_that_fails_or_never_ends_means_interpreted_and_one_line(self):
        with mock.patch.multiple(m, COMPILE_SECONDS=0.5, ANSWER_SECONDS=0.5):
            for text in ("exit 0\n", "echo no >&2; exit 7\n", "kill -9 $$\n", "exec sleep 100\n"):
                self.script(text)
                told = []
                self.assertEqual(m.choose_engine("auto", True, told.append).name, "python", text)
                self.assertEqual(len(told), 1)
                self.assertNotIn("\n", told[0])
            with self.assertRaisesRegex(m.EngineError, "MACROGPT_ENGINE=native"):
                m.choose_engine("native")

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

    def test_a_compiler_may_have_options_or_a_path_with_a_blank_or_not_know_an_option(self):
        real = m.find_compiler()[0]
        os.environ["CC"] = f"{real} -DEXTRA=1"
        self.assertEqual(m.find_compiler(), [real, "-DEXTRA=1"])
        self.assertEqual(m.choose_engine("auto", True).name, "native")
        os.symlink(real, self.path("a compiler"))
        os.environ["CC"] = self.path("a compiler")
        self.assertEqual(m.find_compiler(), [self.path("a compiler")])
        os.environ["CC"] = "no-such-compiler -O2"
        self.assertIsNone(m.find_compiler())
        self.assertEqual(m.choose_engine("auto", True).name, "python")
        self.script(f"""for word; do case $word in -march=native|-mcpu=native) exit 1;; esac; done
exec {real} "$@"\n""")
        self.assertEqual(m.choose_engine("auto", True).name, "native")

    def test_of_old_libraries_only_the_newest_stay(self):
        os.mkdir(self.cache, 0o700)
        for i in range(m.KEPT_LIBRARIES + 3):
            os.utime(self.write(os.path.join("macrogpt", f"kernels-{i}.so"), ""), (i, i))
        self.assertEqual(m.choose_engine("auto", True).name, "native")
        names = [name for name in os.listdir(self.cache) if name.endswith(".so")]
        self.assertEqual((len(names), "kernels-3.so" in names, "kernels-4.so" in names),
                         (m.KEPT_LIBRARIES, False, True))

    def test_what_is_not_as_it_was_compiled_is_never_used_and_made_anew(self):
        name = m._library_name(m.find_compiler())
        library = self.write(os.path.join(m.cache_folder(), name), "garbage")
        for damage in (lambda code: code, lambda code: code[:5000],
                       lambda code: code[:2000] + bytes(2000) + code[4000:], None):
            if damage is None:
                os.chmod(library, 0o666)
            else:  # as another file, for the former is in use
                code = damage(Path(library).read_bytes())
                os.unlink(library)
                Path(library).write_bytes(code)
            self.assertEqual(m.choose_engine("auto").name, "python")
            self.assertEqual(m.choose_engine("auto", True).name, "native")
            self.assertEqual(sorted(os.listdir(self.cache)), [name, name + ".sum"])
            self.assertEqual(m.choose_engine("auto").name, "native")

    def test_a_cache_that_cannot_be_written_or_is_not_ours_alone_is_not_used(self):
        self.assertEqual(m.cache_folder(), self.cache)
        for name, answer in (("access", False), ("geteuid", os.geteuid() + 1)):
            with mock.patch.object(os, name, return_value=answer):
                self.assertIsNone(m.cache_folder())
        os.chmod(self.cache, 0o777)
        self.assertIsNone(m.cache_folder())
        os.rename(self.cache, self.path("other"))
        os.chmod(self.path("other"), 0o700)
        os.symlink(self.path("other"), self.cache)
        self.assertIsNone(m.cache_folder())
        os.unlink(self.cache)
        self.write("macrogpt", "a file")
        self.assertIsNone(m.cache_folder())
        self.assertEqual(m.choose_engine("auto", True).name, "native")

    def test_two_that_compile_at_once_both_succeed(self):
        code = (f"import macrogpt as m; import sys; m.C_FLAGS = {QUICK}; m.CALL_CODE = ''; "
                f"m.c_source = lambda *_: {HOLLOW!r}; "
                "sys.exit(m.choose_engine('auto', True).name != 'native')")
        env = environment(self.folder, {"XDG_CACHE_HOME": self.folder})
        both = [subprocess.Popen([sys.executable, "-S", "-c", code], cwd=ROOT, env=env)
                for _ in range(2)]
        self.assertEqual([process.wait(60) for process in both], [0, 0])
        self.assertEqual(len(os.listdir(self.cache)), 2)
