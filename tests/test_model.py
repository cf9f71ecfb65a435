"""Claims about the model: its exact form, its cache, its growth and its gradient."""
import dataclasses
import itertools
import math
import random
import unittest

import macrogpt as m

SHAPE = m.Shape(n_layer=2, n_embd=8, n_head=2, n_ff=12, block_size=8, rope_base=10_000.0,
                norm_eps=1e-5)
VOCAB = 20
ENGINES = [(make, code) for make in (m.interpreted_engine, m.reference_engine) for code in "fd"]


def lively(engine, seed=1, shape=SHAPE, vocab=VOCAB):
    """A model whose weights are so large that every part of it matters."""
    model, rng = m.GPT(shape, vocab, engine, random.Random(seed)), random.Random(seed)
    for param in model.params.values():
        spread = 1.3 * param.dim ** -0.5
        param.load(engine.buffer_of([rng.gauss(0.0, spread) for _ in param.data]))
    model.params["scale"].load(engine.buffer_of([1.7]))
    return model


def stir(model, seed=2, spread=0.3):
    """Give the newest delta an effect."""
    rng = random.Random(seed)
    for adapter in model.deltas[-1].values():
        adapter.b.load(model.engine.buffer_of([rng.gauss(0, spread) for _ in adapter.b.data]))


def some_ids(n, seed=3):
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(n)]


def naive_llama(model, ids, window=None):
    """Logits of plain lists: the Llama form from its papers; each row sees `window` rows."""
    shape, params = model.shape, model.params
    width = shape.n_embd // shape.n_head

    def rows(name):
        p = params[name]
        return [list(p.data[r * p.dim:(r + 1) * p.dim]) for r in range(p.rows)]

    def times(name, vector):
        return [math.fsum(a * b for a, b in zip(row, vector)) for row in rows(name)]

    def norm(vector):
        size = math.sqrt(math.fsum(n * n for n in vector) / len(vector) + 1e-5)
        return [n / size for n in vector]

    def turn(head, position):
        turned = []
        for pair in range(width // 2):
            z = complex(head[2 * pair], head[2 * pair + 1])
            angle = position / 10_000.0 ** (2 * pair / width)
            z *= complex(math.cos(angle), math.sin(angle))
            turned += [z.real, z.imag]
        return turned

    def heads(vector):
        return [vector[h * width:(h + 1) * width] for h in range(shape.n_head)]

    def attention(queries, keys, values, t):
        mixed = []
        for h in range(shape.n_head):
            first = max(0, t + 1 - window) if window else 0
            scores = [math.exp(sum(a * b for a, b in zip(queries[t][h], keys[j][h]))
                               / math.sqrt(width)) for j in range(first, t + 1)]
            mixed += [sum(s * v[h][c] for s, v in zip(scores, values[first:t + 1])) / sum(scores)
                      for c in range(width)]
        return mixed
    table = rows("embedding")
    stream = [table[i] for i in ids]
    for layer in range(shape.n_layer):
        joint = [times(f"{layer}.qkv", norm(x)) for x in stream]
        dim = shape.n_embd
        queries = [[turn(h, t) for h in heads(row[:dim])] for t, row in enumerate(joint)]
        keys = [[turn(h, t) for h in heads(row[dim:2 * dim])] for t, row in enumerate(joint)]
        values = [heads(row[2 * dim:]) for row in joint]
        for t, x in enumerate(stream):
            y = times(f"{layer}.out", attention(queries, keys, values, t))
            stream[t] = [a + b for a, b in zip(x, y)]
        for t, x in enumerate(stream):
            both = times(f"{layer}.gate_up", norm(x))
            gates, ups = both[:shape.n_ff], both[shape.n_ff:]
            opened = [g / (1 + math.exp(-g)) * u for g, u in zip(gates, ups)]
            stream[t] = [a + b for a, b in zip(x, times(f"{layer}.down", opened))]
    scale = params["scale"].data[0]
    return [times("embedding", [scale * n for n in norm(x)]) for x in stream]


class ModelCase(unittest.TestCase):
    def assert_near(self, found, expected, tolerance=1e-5, hint=""):
        self.assertEqual(len(found), len(expected), hint)
        for i, (a, b) in enumerate(zip(found, expected)):
            self.assertTrue(abs(a - b) <= tolerance, f"{hint}: number {i} is {a!r}, not {b!r}")


class TheFormIsLlama(ModelCase):
    def test_logits_are_those_of_a_naive_llama(self):
        ids = some_ids(8)
        for make, code in ENGINES:
            model = lively(make(code))
            found, expected = model.logits(ids), naive_llama(model, ids)
            self.assertEqual((found.rows, found.dim), (8, VOCAB))
            self.assertGreater(max(map(abs, found.data)), 1.0)
            for t in range(8):
                self.assert_near(found.row(t), expected[t], 1e-5 if code == "f" else 1e-10, t)

    def test_the_loss_is_the_mean_nats_of_the_naive_llama(self):
        ids = some_ids(9)
        model = lively(m.interpreted_engine("d"))
        nats = []
        for row, target in zip(naive_llama(model, ids[:-1]), ids[1:]):
            nats.append(math.log(sum(map(math.exp, row))) - row[target])
        self.assertAlmostEqual(model.loss([ids]).data, sum(nats) / 8, places=10)

    def test_the_count_of_parameters_is_the_formula(self):
        layers, dim, ff = SHAPE.n_layer, SHAPE.n_embd, SHAPE.n_ff
        model = m.GPT(SHAPE, VOCAB, m.interpreted_engine(), random.Random(1))
        base = VOCAB * dim + layers * (4 * dim * dim + 3 * dim * ff) + 1
        self.assertEqual(model.n_params, base)
        model.append_delta(3, random.Random(1))
        per_layer = (dim + 3 * dim) + (dim + dim) + (dim + 2 * ff) + (ff + dim)
        self.assertEqual(model.n_params, base + 3 * (VOCAB + dim + layers * per_layer))
        self.assertEqual(model.vocab_size, VOCAB)

    def test_a_newborn_model_knows_nothing_in_particular(self):
        model = m.GPT(SHAPE, VOCAB, m.interpreted_engine(), random.Random(1))
        self.assertAlmostEqual(model.loss([some_ids(9)]).data, math.log(VOCAB), delta=0.2)

    def test_the_seed_decides_the_weights(self):
        a, b, c = (m.GPT(SHAPE, VOCAB, m.interpreted_engine(), random.Random(s)) for s in (5, 5, 6))
        for name in a.params:
            self.assertEqual(a.params[name].data, b.params[name].data)
        self.assertNotEqual(a.params["0.qkv"].data, c.params["0.qkv"].data)

    def test_without_randomness_the_matrices_wait_at_zero_to_be_loaded(self):
        drawn = lively(m.interpreted_engine())
        blank = m.GPT(SHAPE, VOCAB, drawn.engine, None)
        self.assertFalse(any(blank.params["0.qkv"].data))
        self.assertEqual(list(blank.params), list(drawn.params))
        for name, param in blank.params.items():
            param.load(drawn.params[name].data[:])
        self.assertEqual(blank.logits([1, 2, 3]).data, drawn.logits([1, 2, 3]).data)

    def test_decay_spares_the_embedding_and_the_scale(self):
        model = m.GPT(SHAPE, VOCAB, m.interpreted_engine(), random.Random(1))
        spared = [name for name, p in model.params.items() if not p.decays]
        self.assertEqual(spared, ["embedding", "scale"])

    def test_a_shape_follows_from_the_config(self):
        shape = m.Shape.of(m.Config(n_layer=3, n_embd=24, n_head=2, block_size=32))
        self.assertEqual(shape, m.Shape(3, 24, 2, 64, 32, 10_000.0, 1e-5))

    def test_ids_out_of_range_are_refused(self):
        model = lively(m.interpreted_engine())
        for ids in ([VOCAB], [-1], [0, 99]):
            with self.assertRaises(ValueError):
                model.logits(ids)
        with self.assertRaises(ValueError):
            model.logits([1, 2, 3], (0, 2))

    def test_no_ids_give_no_logits(self):
        for make, code in ENGINES:
            self.assertEqual(lively(make(code)).logits([]).rows, 0)


class TheCacheSaysWhatTheModelSays(ModelCase):
    def test_token_by_token_equals_the_whole_at_every_position(self):
        ids = some_ids(8)
        for make, code in ENGINES:
            model = lively(make(code))
            whole, cache = model.logits(ids), model.new_cache()
            for t, token in enumerate(ids):
                self.assert_near(model.feed(cache, [token]), whole.row(t), 1e-5, (code, t))
                self.assertEqual(cache.position, t + 1)

    def test_prefill_equals_token_by_token(self):
        ids = some_ids(8)
        for make, code in ENGINES:
            model = lively(make(code))
            for split in range(1, 8):
                cache, single = model.new_cache(), model.new_cache()
                model.feed(cache, ids[:split])
                for token in ids[:split]:
                    model.feed(single, [token])
                self.assert_near(model.feed(cache, ids[split:]), model.feed(single, ids[split:]))

    def test_past_the_block_it_goes_on_as_sliding_attention(self):
        ids = some_ids(30)
        for make, code in ENGINES:
            model = lively(make(code))
            expected, cache = naive_llama(model, ids, window=8), model.new_cache()
            for t, token in enumerate(ids):
                self.assert_near(model.feed(cache, [token]), expected[t], 2e-5, (code, t))

    def test_past_the_block_one_layer_sees_exactly_the_newest_window(self):
        shape, ids = dataclasses.replace(SHAPE, n_layer=1), some_ids(21)
        model = lively(m.interpreted_engine(), shape=shape)
        cache = model.new_cache()
        for t, token in enumerate(ids):
            expected = model.logits(ids[max(0, t - 7):t + 1])
            self.assert_near(model.feed(cache, [token]), expected.row(expected.rows - 1), 1e-5, t)

    def test_past_the_block_the_cache_does_not_grow(self):
        def size(cache):
            if isinstance(cache, m.FlatCache):
                return len(cache.keys), len(cache.values)
            return ([len(k) for k in cache.keys], [len(h) for h in cache.halves],
                    [len(c) for c in cache.columns], len(cache.column_halves))
        for make in (m.interpreted_engine, m.reference_engine):
            model = lively(make())
            cache = model.new_cache()
            model.feed(cache, some_ids(8))
            before = [size(layer) for layer in cache.layers]
            for token in some_ids(19):
                model.feed(cache, [token])
            self.assertEqual([size(layer) for layer in cache.layers], before)
            self.assertEqual(cache.position, 27)

    def test_of_more_than_a_block_only_the_newest_are_read(self):
        ids = some_ids(20)
        model = lively(m.interpreted_engine())
        newest = model.feed(model.new_cache(), ids[-8:])
        self.assertEqual(model.feed(model.new_cache(), ids), newest)
        used = model.new_cache()
        model.feed(used, [1, 2])
        model.feed(used, ids)
        self.assertEqual(used.position, 10)

    def test_two_caches_of_one_model_do_not_meet(self):
        model = lively(m.interpreted_engine())
        a, b = model.new_cache(), model.new_cache()
        model.feed(a, [1, 2, 3])
        expected = model.feed(model.new_cache(), [4])
        self.assertEqual(model.feed(b, [4]), expected)

    def test_deltas_speak_through_the_cache_too(self):
        model = lively(m.interpreted_engine())
        model.append_delta(2, random.Random(5))
        stir(model)
        cache, whole = model.new_cache(), model.logits(some_ids(8))
        for t, token in enumerate(some_ids(8)):
            self.assert_near(model.feed(cache, [token]), whole.row(t), 1e-5, t)

    def test_nothing_fed_is_refused(self):
        model = lively(m.interpreted_engine())
        with self.assertRaises(ValueError):
            model.feed(model.new_cache(), [])

    def test_feeding_builds_no_graph_and_leaves_the_engine_recording(self):
        model = lively(m.interpreted_engine())
        model.feed(model.new_cache(), [1, 2])
        self.assertTrue(model.engine.recording)
        self.assertTrue(model.logits([1, 2]).parents)


class WindowsShareOneGraph(ModelCase):
    WINDOWS = ([1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [3, 3, 3, 3, 3, 3, 3, 3, 3])

    def test_the_loss_of_a_batch_is_the_mean_of_its_windows_weighted_by_length(self):
        for make, code in ENGINES:
            model = lively(make(code))
            total = sum(model.loss([w]).data * (len(w) - 1) for w in self.WINDOWS)
            weight = sum(len(w) - 1 for w in self.WINDOWS)
            self.assertAlmostEqual(model.loss(self.WINDOWS).data, total / weight, places=6)

    def test_the_gradient_of_a_batch_is_that_of_its_windows(self):
        # one row alone meets the interpreted engine's matrices in fixed point
        for make, tolerance in ((m.interpreted_engine, 1e-7), (m.reference_engine, 1e-12)):
            model = lively(make("d"))
            m.backward(model.loss(self.WINDOWS))
            joint = {name: p.grad for name, p in model.params.items()}
            for param in model.params.values():
                param.grad = None
            weight = sum(len(w) - 1 for w in self.WINDOWS)
            for w in self.WINDOWS:
                m.backward(model.loss([w]) * ((len(w) - 1) / weight))
            for name, param in model.params.items():
                self.assert_near(param.grad, joint[name], tolerance, name)

    def test_where_a_segment_starts_does_not_matter(self):
        for make, code in ENGINES:
            model, ids, before = lively(make(code)), some_ids(6), some_ids(40, seed=9)
            alone, late = model.logits(ids), model.logits(before + ids, (0, 7, 40, 46))
            self.assert_near(late.data[40 * VOCAB:], alone.data, 1e-5)

    def test_the_order_of_windows_does_not_matter(self):
        model = lively(m.interpreted_engine())
        self.assertAlmostEqual(model.loss(self.WINDOWS).data, model.loss(self.WINDOWS[::-1]).data,
                               places=5)

    def test_a_window_of_one_id_is_refused(self):
        model = lively(m.interpreted_engine())
        for window in ([1], []):
            with self.assertRaises(ValueError):
                model.loss([[1, 2], window])

    def test_dropout_follows_its_rng_and_without_one_there_is_none(self):
        model = lively(m.interpreted_engine())
        plain = model.loss(self.WINDOWS).data
        losses = [model.loss(self.WINDOWS, 0.3, random.Random(s)).data for s in (1, 1, 2)]
        self.assertEqual(losses[0], losses[1])
        self.assertNotEqual(losses[0], losses[2])
        self.assertNotEqual(losses[0], plain)
        self.assertEqual(model.loss(self.WINDOWS, 0.3, None).data, plain)
        self.assertEqual(model.loss(self.WINDOWS, 0.0, random.Random(1)).data, plain)


class GradientsOfTheWholeModel(ModelCase):
    def check(self, model, params, drop=0.0, samples=5):
        """Compare sampled slopes of the loss with central differences."""
        windows, rng, h = ([1, 2, 3, 2, 5], [4, 1, 1]), random.Random(7), 1e-5

        def loss():
            return model.loss(windows, drop, random.Random(8))
        m.backward(loss())
        for param in params:
            self.assertIsNotNone(param.grad, param.name)
            places = {max(range(len(param.grad)), key=lambda i, g=param.grad: abs(g[i]))}
            places.update(rng.randrange(len(param.data)) for _ in range(samples))
            for i in sorted(places):
                value, sides = param.data[i], []
                for step in (h, -h):
                    param.data[i] = value + step
                    param.changed()
                    sides.append(loss().data)
                param.data[i] = value
                param.changed()
                slope = (sides[0] - sides[1]) / (2 * h)
                self.assertAlmostEqual(param.grad[i], slope, delta=1e-6 * (abs(slope) + 1e-2),
                                       msg=f"{model.engine.name}: {param.name}[{i}]")
            self.assertGreater(max(map(abs, param.grad)), 1e-4, param.name)

    def test_of_the_base(self):
        for make in (m.interpreted_engine, m.reference_engine):
            model = lively(make("d"))
            self.check(model, model.params.values())

    def test_of_the_base_with_dropout(self):
        model = lively(m.interpreted_engine("d"))
        self.check(model, model.params.values(), drop=0.3, samples=2)

    def test_of_a_delta_beside_a_frozen_base_and_a_frozen_delta(self):
        model = lively(m.interpreted_engine("d"))
        for seed in (5, 6):
            model.append_delta(2, random.Random(seed))
            stir(model, seed)
        self.check(model, model.trainable(), samples=2)
        for param in (*model.params.values(), *(x for d in model.deltas[0].values()
                                                for x in (d.a, d.b))):
            self.assertIsNone(param.grad, param.name)


class TheModelGrowsByAppending(ModelCase):
    def setUp(self):
        self.engine = m.interpreted_engine()
        self.model, self.ids = lively(self.engine), some_ids(8)

    def test_growing_the_vocabulary_leaves_old_logits_unchanged(self):
        for deltas in (0, 1):
            if deltas:
                self.model.append_delta(2, random.Random(5))
                stir(self.model)
            old, before = self.model.vocab_size, self.model.logits(self.ids)
            self.model.grow_vocabulary([(1, 2), (3, 3), (old, 5)])
            after = self.model.logits(self.ids)
            self.assertEqual((self.model.vocab_size, after.dim), (old + 3, old + 3))
            for t in range(8):
                self.assert_near(after.row(t)[:old], before.row(t), 1e-5, t)

    def test_a_new_row_is_the_mean_of_its_parts(self):
        self.model.grow_vocabulary([(1, 2), (VOCAB, 3)])
        table = self.model.params["embedding"]
        first = [(a + b) / 2 for a, b in zip(table.row(1), table.row(2))]
        second = [(a + b) / 2 for a, b in zip(first, table.row(3))]
        self.assert_near(table.row(VOCAB), first, 1e-6)
        self.assert_near(table.row(VOCAB + 1), second, 1e-6)
        self.model.loss([[VOCAB, VOCAB + 1, 2]])  # the new ids can be used at once

    def test_no_merges_grow_nothing(self):
        before = self.model.logits(self.ids).data
        self.model.grow_vocabulary([])
        self.assertEqual(self.model.logits(self.ids).data, before)

    def test_a_fresh_delta_changes_nothing(self):
        before = self.model.logits(self.ids).data
        fed = self.model.feed(self.model.new_cache(), self.ids[:1])
        for seed in (5, 6):
            self.model.append_delta(2, random.Random(seed))
            self.assertEqual(self.model.logits(self.ids).data, before)
            self.assertEqual(self.model.feed(self.model.new_cache(), self.ids[:1]), fed)

    def test_folding_the_oldest_delta_keeps_the_logits(self):
        for seed in (5, 6, 7):
            self.model.append_delta(2, random.Random(seed))
            stir(self.model, seed, 0.1)
        newest = self.model.deltas[-1]
        for left in (2, 1, 0):
            before = self.model.logits(self.ids).data
            self.model.fold_oldest_delta()
            self.assertEqual(len(self.model.deltas), left)
            self.assert_near(self.model.logits(self.ids).data, before, 1e-4)
            if left:
                self.assertIs(self.model.deltas[-1], newest)

    def test_a_stirred_delta_does_change_the_logits(self):
        before = self.model.logits(self.ids).data
        self.model.append_delta(2, random.Random(5))
        stir(self.model, 5, 0.1)
        after = self.model.logits(self.ids).data
        self.assertGreater(max(abs(a - b) for a, b in zip(after, before)), 1e-2)

    def test_decoding_with_deltas_folded_in_follows_every_change(self):
        for engine in (m.interpreted_engine(), m.reference_engine()):
            model = lively(engine)
            for seed in (5, 6):
                model.append_delta(2, random.Random(seed))
                stir(model, seed, 0.1)
                cache, whole = model.new_cache(), model.logits(self.ids)
                for t, token in enumerate(self.ids):
                    self.assert_near(model.feed(cache, [token]), whole.row(t), 2e-5, (seed, t))

    def test_appending_a_delta_freezes_all_but_itself(self):
        self.assertEqual(self.model.trainable(), list(self.model.params.values()))
        for seed in (5, 6):
            self.model.append_delta(2, random.Random(seed))
            newest = [x for d in self.model.deltas[-1].values() for x in (d.a, d.b)]
            self.assertEqual(self.model.trainable(), newest)
        self.assertEqual(len({p.name for p in self.model.delta_params()}), 36)

    def test_a_frozen_model_learns_nothing_and_thaws_at_its_base_alone(self):
        self.model.append_delta(2, random.Random(5))
        self.model.freeze()
        self.assertEqual(self.model.trainable(), [])
        loss = self.model.loss([[1, 2, 3]])
        self.assertFalse(loss.needs_grad)
        self.model.freeze(False)
        self.assertEqual(self.model.trainable(), list(self.model.params.values()))

    def test_rows_that_join_a_frozen_embedding_train_while_the_old_ones_stay(self):
        self.model.freeze()
        self.model.grow_vocabulary([(1, 2)])
        table = self.model.params["embedding"]
        self.assertEqual(self.model.trainable(), [table])
        before = table.data[:]
        optimizer = m.AdamW(0.9, 0.99, 1e-8, 0.0, 1.0)
        m.train_step(self.model, optimizer, [[1, VOCAB, 2, VOCAB]], 0.1, 0.0, random.Random(1))
        self.assertEqual(table.data[:VOCAB * 8], before[:VOCAB * 8])
        self.assertNotEqual(table.data[VOCAB * 8:], before[VOCAB * 8:])

    def sprouting(self, engine=None, deltas=1):
        """Return a model with deltas and two sprouts, the second of the first."""
        model = lively(engine or self.engine)
        for seed in range(deltas):
            model.append_delta(2, random.Random(seed))
            stir(model, seed, 0.1)
        model.grow_sprout([(1, 2), (VOCAB, 3)], self.ids)
        return model

    def test_sprouts_change_nothing_until_they_count_and_then_only_add_ids(self):
        for deltas in (0, 2):
            model = self.sprouting(deltas=deltas)
            sprout, model.sprout = model.sprout, None
            before = model.logits(self.ids)
            model.sprout = sprout
            self.assertEqual(model.logits(self.ids).data, before.data)
            self.assertEqual(model.vocab_size, VOCAB)
            with self.assertRaises(ValueError):
                model.logits([VOCAB])
            with model.sprouted():
                self.assertEqual(model.vocab_size, VOCAB + 2)
                after = model.logits(self.ids)
            self.assertEqual((after.dim, model.vocab_size), (VOCAB + 2, VOCAB))
            for t in range(len(self.ids)):
                self.assert_near(after.row(t)[:VOCAB], before.row(t), 1e-6, t)

    def test_what_sprouted_models_say_adopted_ones_say_too(self):
        for engine in (m.interpreted_engine(), m.reference_engine()):
            model = self.sprouting(engine, deltas=2)
            model.freeze()
            ids = [*self.ids[:4], VOCAB, 2, VOCAB + 1, VOCAB]
            with model.sprouted():
                before = model.logits(ids).data
            model.adopt_sprout()
            self.assertEqual((model.vocab_size, model.trainable()), (VOCAB + 2, []))
            self.assert_near(model.logits(ids).data, before, 1e-5)
            cache, whole = model.new_cache(), model.logits(ids)
            for t, token in enumerate(ids):
                self.assert_near(model.feed(cache, [token]), whole.row(t), 2e-5, t)

    def test_an_unsealed_delta_trains_on_after_an_adoption_the_base_does_not(self):
        model = self.sprouting()
        trains = set(model.trainable()) - {model.sprout}
        model.adopt_sprout()
        self.assertEqual(set(model.trainable()), trains)
        self.assertNotIn(model.params["embedding"], trains)

    def test_narrowed_to_its_old_rows_a_grown_model_says_what_it_said(self):
        for engine in (m.interpreted_engine(), m.reference_engine()):
            model = self.sprouting(engine, deltas=2)
            before = model.logits(self.ids).data
            fed = model.feed(model.new_cache(), self.ids)
            model.adopt_sprout()
            less = model.narrowed(VOCAB)
            self.assertEqual((less.vocab_size, model.vocab_size), (VOCAB, VOCAB + 2))
            self.assert_near(less.logits(self.ids).data, before)
            self.assert_near(less.feed(less.new_cache(), self.ids), fed, 2e-5)

    def test_a_sprout_is_the_mean_of_its_parts_and_quiet_where_the_head_has_a_direction(self):
        model = self.sprouting(deltas=0)
        quiet, sums = model._quiet_step(self.ids), [0.0, 0.0]
        table = model.params["embedding"]
        first = [(a + b) / 2 for a, b in zip(table.row(1), table.row(2))]
        second = [(a + b) / 2 for a, b in zip(first, table.row(3))]
        for i, row in enumerate((first, second)):
            self.assert_near(model.sprout.row(i), [a - b for a, b in zip(row, quiet)], 1e-5)
        loud = m.MatrixParam(self.engine, "loud", 2, 8, self.engine.buffer_of(first + second))
        for rows in (model.sprout, loud):
            model.sprout = rows
            with model.sprouted():
                logits = model.logits(self.ids)
            sums[rows is loud] = sum(sum(logits.row(t)[VOCAB:]) for t in range(len(self.ids)))
        self.assertLess(sums[0], sums[1])
        self.assertLessEqual((sums[1] - sums[0]) / 2 / len(self.ids), m.QUIET_NATS + 1e-3)

    def test_the_gradient_of_sprouts_is_right_and_what_is_frozen_beside_them_stays(self):
        model = self.sprouting(m.interpreted_engine("d"))
        loss = [[1, VOCAB, 2, VOCAB + 1], [3, VOCAB + 1]]
        with model.sprouted():
            m.backward(model.loss(loss))
            for i in (0, 5, 8, 15):
                sides = []
                for step in (1e-5, -1e-5):
                    model.sprout.data[i] += step
                    model.sprout.changed()
                    sides.append(model.loss(loss).data)
                    model.sprout.data[i] -= step
                    model.sprout.changed()
                slope = (sides[0] - sides[1]) / 2e-5
                self.assertAlmostEqual(model.sprout.grad[i], slope, delta=1e-6)
        self.assertIsNone(model.params["embedding"].grad)
        before, rows = model.params["embedding"].data[:], model.sprout.data[:]
        optimizer = m.AdamW(0.9, 0.99, 1e-8, 0.0, 1.0)
        m.train_step(model, optimizer, [[1, 2, 3]], 0.1, 0.0, random.Random(1))
        self.assertEqual(model.sprout.data, rows)  # text without them does not move them
        with model.sprouted():
            m.train_step(model, optimizer, loss, 0.1, 0.0, random.Random(1))
        self.assertNotEqual(model.sprout.data, rows)
        self.assertEqual(model.params["embedding"].data, before)

    def test_drawing_the_embedding_anew_touches_nothing_else(self):
        others = {n: p.data[:] for n, p in self.model.params.items() if n != "embedding"}
        before = self.model.params["embedding"].data[:]
        self.model.draw_embedding(random.Random(9))
        table = self.model.params["embedding"].data
        self.assertFalse(set(table) & set(before))
        spread = math.sqrt(sum(x * x for x in table) / len(table))
        self.assertAlmostEqual(spread, m.EMBEDDING_SIGMA, delta=0.02)
        for name, data in others.items():
            self.assertEqual(self.model.params[name].data, data)


class Enlargement(unittest.TestCase):
    SIZES = {"n_layer": (2, 3), "n_embd": (8, 24), "n_head": (2, 3), "n_ff": (12, 20),
             "block_size": (8, 12)}

    @staticmethod
    def engines():
        yield m.interpreted_engine()
        try:
            yield m.native_engine()
        except m.EngineError:
            pass

    def wanted(self):
        """Yield every combination of sizes that keeps the heads as wide as they are."""
        for sizes in itertools.product(*self.SIZES.values()):
            shape = dataclasses.replace(SHAPE, **dict(zip(self.SIZES, sizes)))
            if shape.head_dim >= SHAPE.head_dim and shape.n_embd % (2 * shape.n_head) == 0:
                yield shape

    @staticmethod
    def said(model, ids):
        """Return the logits of ids, read at once, and of the last when it is fed alone."""
        cache = model.new_cache()
        model.feed(cache, ids[:-1])
        return [*model.logits(ids).data, *model.feed(cache, ids[-1:])]

    def test_a_larger_model_says_what_the_smaller_one_said_whatever_grew(self):
        ids = some_ids(7)
        for engine in self.engines():
            model = lively(engine)
            for seed in (5, 6):
                model.append_delta(2, random.Random(seed))
                stir(model, seed)
            before = self.said(model, ids)
            count = 0
            for shape in self.wanted():
                larger = m.enlarged(model, shape, random.Random(7))
                self.assertEqual((larger.shape.n_layer, larger.shape.n_embd, larger.shape.n_ff),
                                 (shape.n_layer, shape.n_embd, shape.n_ff))
                error = max(abs(a - b) for a, b in zip(before, self.said(larger, ids)))
                self.assertLess(error, 1e-4, (engine.name, shape))
                count += 1
            self.assertEqual(count, 24)

    def test_it_can_grow_again_and_again(self):
        model, ids = lively(m.interpreted_engine()), some_ids(7)
        before = self.said(model, ids)
        for n_embd in (12, 16, 28, 40):
            model = m.enlarged(model, dataclasses.replace(
                model.shape, n_embd=n_embd, n_layer=model.shape.n_layer + 1), random.Random(n_embd))
        self.assertLess(max(abs(a - b) for a, b in zip(before, self.said(model, ids))), 1e-4)

    def test_all_that_is_new_learns(self):
        shape = dataclasses.replace(SHAPE, n_layer=3, n_embd=24, n_head=3, n_ff=20)
        model = m.enlarged(lively(m.interpreted_engine("d")), shape, random.Random(7))
        before = {name: param.data[:] for name, param in model.params.items()}
        adam, windows = m.AdamW.of(m.Config()), [some_ids(9, seed) for seed in range(4)]
        losses = [m.train_step(model, adam, windows, 0.01, 0.0, random.Random(0)).loss
                  for _ in range(4)]
        self.assertLess(losses[-1], losses[0])
        for name, param in model.params.items():
            still = sum(a == b for a, b in zip(before[name], param.data))
            self.assertLess(still, 0.2 * len(param.data), name)

    def test_what_cannot_be_is_refused_and_the_way_is_named(self):
        for change, sign in (({"n_layer": 1}, "n_layer=1 is less than the 2"),
                             ({"block_size": 4}, "block_size=4 is less"),
                             ({"n_ff": 8}, "n_ff=8 is less"),
                             ({"n_head": 4}, "n_embd=16"),
                             ({"rope_base": 500.0}, "rope_base"),
                             ({"norm_eps": 1e-6}, "norm_eps")):
            with self.assertRaisesRegex(m.ConfigError, sign) as caught:
                SHAPE.grown_to(dataclasses.replace(SHAPE, **change))
            self.assertIn("another with --db", str(caught.exception))


if __name__ == "__main__":
    unittest.main()
