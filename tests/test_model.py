"""Claims about the model: its exact form, its cache, its gradient, its layers and who speaks."""
import cmath
import itertools
import math
import random
from unittest import mock

import macrogpt as m
from support import Case, engine_in_use
from test_engine import naive_attention

SHAPE = m.Shape(n_layer=2, n_embd=8, n_head=2, n_ff=12, block_size=8, rope_base=100.0,
                norm_eps=1e-3)
VOCAB = 20
PLAIN = (m.interpreted_engine, m.reference_engine)
ENGINES = [(make, code) for make in PLAIN for code in "fd"] + [(lambda _: engine_in_use(), "f")]


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


def layered(engine, seeds, spread=0.1):
    """A lively model with a delta that has an effect for each seed."""
    model = lively(engine)
    for seed in seeds:
        model.append_delta(2, random.Random(seed))
        stir(model, seed, spread)
    return model


def some_ids(n, seed=3):
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(n)]


def nats_of(row, token):
    """Nats that a token costs by its row of logits."""
    return math.log(sum(map(math.exp, row))) - row[token]


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
        size = math.sqrt(math.fsum(n * n for n in vector) / len(vector) + shape.norm_eps)
        return [n / size for n in vector]

    def turn(head, position):
        turned = []
        for pair in range(width // 2):
            angle = position / shape.rope_base ** (2 * pair / width)
            z = complex(*head[2 * pair:2 * pair + 2]) * cmath.exp(1j * angle)
            turned += [z.real, z.imag]
        return turned

    def heads(vector):
        return [vector[h * width:(h + 1) * width] for h in range(shape.n_head)]

    def attention(queries, keys, values, t):
        past = slice(max(0, t + 1 - window) if window else 0, t + 1)
        return [n for h in range(shape.n_head) for n in naive_attention(
            queries[t][h], [k[h] for k in keys[past]], [v[h] for v in values[past]])]
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


class TheFormIsLlama(Case):
    def test_logits_and_loss_are_those_of_a_naive_llama(self):
        ids = some_ids(9)
        for make, code in ENGINES:
            model = lively(make(code))
            found, expected = model.logits(ids[:-1]), naive_llama(model, ids[:-1])
            self.assertEqual((found.rows, found.dim), (8, VOCAB))
            self.assertGreater(max(map(abs, found.data)), 1.0)
            close = 1e-5 if code == "f" else 1e-10
            for t, row in enumerate(expected):
                self.assert_near(found.row(t), row, close, (model.engine.name, t))
            nats = sum(map(nats_of, expected, ids[1:]))
            self.assertAlmostEqual(model.loss([ids]).data, nats / 8, delta=close)
            self.assertEqual(model.logits([]).rows, 0)

    def test_a_newborn_model_knows_nothing_in_particular_and_decay_spares_two(self):
        layers, dim, ff = SHAPE.n_layer, SHAPE.n_embd, SHAPE.n_ff
        model = m.GPT(SHAPE, VOCAB, m.interpreted_engine(), random.Random(1))
        self.assertAlmostEqual(model.loss([some_ids(9)]).data, math.log(VOCAB), delta=0.2)
        spared = [name for name, p in model.params.items() if not p.decays]
        self.assertEqual((spared, model.vocab_size), (["embedding", "scale"], VOCAB))
        self.assertEqual(model.n_base,
                         VOCAB * dim + layers * (4 * dim * dim + 3 * dim * ff) + 1)

    def test_the_seed_decides_the_weights_and_without_one_they_wait_to_be_loaded(self):
        a, b, c = (m.GPT(SHAPE, VOCAB, m.interpreted_engine(), random.Random(s)) for s in (5, 5, 6))
        blank = m.GPT(SHAPE, VOCAB, a.engine, None)
        self.assertEqual(list(blank.params), list(a.params))
        for name, param in a.params.items():
            self.assertEqual(param.data, b.params[name].data)
        self.assertNotEqual(a.params["0.qkv"].data, c.params["0.qkv"].data)
        self.assertFalse(any(blank.params["0.qkv"].data))

    def test_a_shape_follows_from_the_config(self):
        shape = m.Shape.of(m.Config(n_layer=3, n_embd=24, n_head=2, block_size=32))
        self.assertEqual(shape, m.Shape(3, 24, 2, 64, 32, 10_000.0, 1e-5))

    def test_what_does_not_fit_is_refused(self):
        model = lively(m.interpreted_engine())
        for call, *given in ((model.logits, [VOCAB]), (model.logits, [0, -1]),
                             (model.logits, [1, 2, 3], (0, 2)), (model.loss, [[1, 2], [1]]),
                             (model.loss, [[1, 2], []]), (model.feed, model.new_cache(), [])):
            self.assertRaises(ValueError, call, *given)


class TheCacheSaysWhatTheModelSays(Case):
    def test_read_at_once_or_one_by_one_it_is_attention_that_slides_past_the_block(self):
        ids = some_ids(30)
        for make, code in ENGINES:
            model = lively(make(code))
            expected = naive_llama(model, ids, window=8)
            for split in (1, 2, 7, 8):
                cache = model.new_cache()
                found = model.feed(cache, ids[:split])
                self.assert_near(found, expected[split - 1], 2e-5, (code, split))
                for t in range(split, 30 if split == 1 else 9):
                    found = model.feed(cache, [ids[t]])
                    self.assert_near(found, expected[t], 2e-5, (code, split, t))
                    self.assertEqual(cache.position, t + 1)
            found = model.feed(cache, ids[9:12])  # several beside what is cached
            self.assert_near(found, expected[11], 2e-5, code)

    def test_past_the_block_it_does_not_grow_and_of_more_only_the_newest_are_read(self):
        model, ids = lively(m.interpreted_engine()), some_ids(20)
        cache = model.new_cache()
        self.assertEqual(model.feed(cache, ids), model.feed(model.new_cache(), ids[-8:]))
        for token in ids:
            model.feed(cache, [token])
            for layer in cache.blocks:
                self.assertEqual({len(rows) for rows, _ in layer.keys}, {8})
                self.assertEqual(list(map(len, layer.columns)), [8] * 8)
        model.feed(cache, ids)
        self.assertEqual(cache.position, 8 + 20 + 8)

    def test_feeding_builds_no_graph_and_leaves_the_engine_recording(self):
        model = lively(m.interpreted_engine())
        with mock.patch.object(m.Value, "of", self.fail):
            model.feed(model.new_cache(), [1, 2])
        self.assertTrue(model.logits([1, 2]).sources)


class WindowsShareOneGraph(Case):
    WINDOWS = ([1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [3, 3, 3, 3, 3, 3, 3, 3, 3])

    def test_loss_and_gradient_of_a_batch_are_the_mean_of_its_windows_weighted_by_length(self):
        # one row alone meets the interpreted engine's matrices in fixed point
        for make, tolerance in ((m.interpreted_engine, 1e-7), (m.reference_engine, 1e-12)):
            joint, single = (lively(make("d")) for _ in range(2))
            loss, total = joint.loss(self.WINDOWS), 0.0
            m.backward(loss)
            for w in self.WINDOWS:
                part = single.loss([w]) * ((len(w) - 1) / sum(len(w) - 1 for w in self.WINDOWS))
                m.backward(part)
                total += part.data
            self.assertAlmostEqual(loss.data, total, places=6)
            for name, param in single.params.items():
                self.assert_near(param.grad, joint.params[name].grad, tolerance, name)

    def test_dropout_follows_its_rng_and_without_one_there_is_none(self):
        model = lively(m.interpreted_engine())
        plain = model.loss(self.WINDOWS).data
        first, again, other = (model.loss(self.WINDOWS, 0.3, random.Random(s)).data
                               for s in (1, 1, 2))
        self.assertEqual(first, again)
        self.assertEqual(len({plain, first, other}), 3)
        self.assertEqual(model.loss(self.WINDOWS, 0.3, None).data, plain)
        self.assertEqual(model.loss(self.WINDOWS, 0.0, random.Random(1)).data, plain)


class GradientsAreFiniteDifferences(Case):
    """Of the whole model, so of every operation, and of a table that is used at both its ends."""

    def check(self, model, drop=0.0):
        """Compare the steepest slopes of what is trainable, and some others, with differences."""
        windows, rng, h = ([1, 2, 3, 2, 5], [4, 1, 1]), random.Random(7), 1e-5

        def loss():
            return model.loss(windows, drop, random.Random(8))
        m.backward(loss())
        for param in model.trainable():
            places = {max(range(len(param.grad)), key=lambda i, g=param.grad: abs(g[i]))}
            places.update(rng.randrange(len(param.data)) for _ in range(2))
            for i in sorted(places):
                value, sides = param.data[i], []
                for param.data[i] in (value + h, value - h):
                    param.changed()
                    sides.append(loss().data)
                param.data[i] = value
                param.changed()
                slope = (sides[0] - sides[1]) / (2 * h)
                self.assertAlmostEqual(param.grad[i], slope, delta=1e-6 * (abs(slope) + 1e-2),
                                       msg=f"{model.engine.name}: {param.name}[{i}]")
            self.assertGreater(max(map(abs, param.grad)), 1e-4, param.name)

    def test_of_the_base_with_and_without_dropout(self):
        for make, drop in itertools.product(PLAIN, (0.0, 0.3)):
            self.check(lively(make("d")), drop)

    def test_of_a_delta_beside_a_frozen_base_and_a_frozen_delta(self):
        model = layered(m.interpreted_engine("d"), (5, 6), 0.3)
        self.check(model)
        for param in (*model.params.values(), *m.delta_matrices(model.deltas[0])):
            self.assertIsNone(param.grad, param.name)


class TheModelGrowsByAppending(Case):
    def test_a_newborn_has_no_effect_and_the_newest_delta_alone_learns_and_bears_its_number(self):
        model = lively(m.interpreted_engine())
        base, said = model.trainable(), model.logits(some_ids(8)).data
        self.assertEqual(base, list(model.params.values()))
        for seed in (5, 6):
            model.append_delta(2, random.Random(seed))
            self.assertEqual(model.trainable(), m.delta_matrices(model.deltas[-1]))
            self.assertEqual(model.logits(some_ids(8)).data, said)
        names = [(p.name, p.rows, p.dim) for p in model.delta_params()]
        self.assertEqual((names[0], len(names)), (("delta1.embedding.a", 2, 8), 36))
        self.assertEqual(names[18:21], [("delta2.embedding.a", 2, 8), ("delta2.embedding.b", 20, 2),
                                        ("delta2.0.qkv.a", 2, 8)])
        model.freeze()
        self.assertEqual(model.trainable(), [])
        self.assertFalse(model.loss([[1, 2, 3]]).needs_grad)
        model.freeze(False)
        self.assertEqual(model.trainable(), base)


class EveryLayerSpeaksForItself(Case):
    def setUp(self):
        self.model, self.ids = layered(engine_in_use(), (5, 6, 7)), some_ids(8)

    def assert_decodes(self, model):
        """Assert that a model that is fed one by one says what it says of all at once."""
        cache, whole = model.new_cache(), model.logits(self.ids)
        for t, token in enumerate(self.ids):
            self.assert_near(model.feed(cache, [token]), whole.row(t), 2e-5, (model.layer, t))

    def test_decoding_with_deltas_says_what_they_say_together(self):
        for make, code in ENGINES:
            self.assert_decodes(layered(make(code), (5, 6)))

    def said(self, number):
        return self.model.with_layer(number).logits(self.ids).data

    def naive(self, number):
        """Return what the base says with one delta beside it, unfolded; 0 is the base alone."""
        model = m.GPT(SHAPE, VOCAB, self.model.engine, None, self.model.params)
        model.deltas = self.model.deltas[number - 1:number] if number else []
        return model.logits(self.ids).data

    def test_a_layer_is_the_base_with_its_delta_and_no_other(self):
        for number in range(4):
            voice = self.model.with_layer(number)
            self.assertEqual((voice.layer, voice.deltas, voice.router), (number, [], None))
            self.assert_near(self.said(number), self.naive(number), 1e-4)
            self.assert_decodes(voice)
        for number in (-1, 4):
            self.assertRaises(ValueError, self.model.with_layer, number)
        before = [self.said(k) for k in range(4)]
        self.model.append_delta(2, random.Random(8))
        stir(self.model, 8, 0.5)
        self.assertEqual([self.said(k) for k in range(4)], before, "one more disturbs nobody")

    def test_without_a_router_all_speak_and_with_one_the_layer_that_it_names(self):
        model, router = self.model, mock.Mock(return_value=2)
        self.assertEqual((model.routed, model.speaker([4, 5])), (False, model))
        model.router = router
        self.assertEqual((model.routed, model.layer_after([1])), (True, 2))
        self.assertIs(model.speaker([4, 5]), model.with_layer(2))
        model.deltas = []
        self.assertEqual((model.routed, model.layer_after([1]), model.speaker([1])),
                         (False, 0, model))
        self.assertEqual(router.mock_calls, [mock.call([1]), mock.call([4, 5])])

    def test_a_speaker_is_kept_until_its_matrices_change_or_another_delta_has_its_number(self):
        self.assertIs(self.model.with_layer(3), self.model.with_layer(3))
        before = list(self.said(3))
        stir(self.model, 9, 0.3)
        self.assertNotEqual(list(self.said(3)), before)
        self.assert_near(self.said(3), self.naive(3), 1e-4)
        del self.model.deltas[2]
        self.model.append_delta(2, random.Random(7))
        stir(self.model, 10, 0.3)
        stir(self.model, 10, 0.3)  # as often changed as the one that had the number
        self.assert_near(self.said(3), self.naive(3), 1e-4)

    def test_of_speakers_only_the_newest_are_kept(self):
        with mock.patch.object(m, "KEPT_NUMBERS", 2 * self.model.n_base):
            voices = [self.model.with_layer(number) for number in range(4)]
            for number, kept in ((3, True), (2, True), (1, False), (3, False)):
                self.assertEqual(self.model.with_layer(number) is voices[number], kept, number)
        with mock.patch.object(m, "KEPT_NUMBERS", 0):
            self.assertIs(self.model.with_layer(1), self.model.with_layer(1))

    def test_only_the_newest_delta_learns_and_it_learns_beside_the_base_alone(self):
        *before, last = [list(self.said(k)) for k in range(4)]
        self.model.router = self.fail  # whoever learns is not chosen
        learner = self.model.learner()
        self.assert_near(learner.logits(self.ids).data, last, 1e-4)
        self.assertEqual(learner.trainable(), m.delta_matrices(self.model.deltas[-1]))
        m.train_step(learner, m.Config(), [self.ids], 0.05, 0.0, random.Random(1))
        self.assertEqual([list(self.said(k)) for k in range(3)], before)
        self.assertNotEqual(list(self.said(3)), last)
