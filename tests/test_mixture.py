"""Claims about the counts that learn in one reading and the one voice."""
import dataclasses
import itertools
import math
import random
import threading
import unittest
from array import array
from unittest import mock

import macrogpt as m
from support import Case, Folder, engine_in_use, passage

VOCAB, SMALL = 40, m.Config(n_layer=1, n_embd=16, n_head=2, block_size=24)


def text_of(rng, length, vocab=VOCAB):
    """Return ids with structure: a walk that mostly follows fixed steps."""
    steps = [[rng.randrange(vocab) for _ in range(3)] for _ in range(vocab)]
    ids = [rng.randrange(vocab)]
    while len(ids) < length:
        ids.append(rng.choice(steps[ids[-1]]) if rng.random() < 0.9 else rng.randrange(vocab))
    return ids


def naive_counts(ids, order, lowest=0):
    """Return {context: {id: count}} by update exclusion, written from its definition."""
    tables = {}
    for at, token in enumerate(ids):
        for k in range(min(order, at), lowest - 1, -1):
            counts = tables.setdefault(tuple(ids[at - k:at]), {})
            known = token in counts
            counts[token] = counts.get(token, 0) + 1
            if known:
                break
    return tables


def naive_discounts(tables, k):
    """Return D0 to D3 by Chen and Goodman's formula, with the memory's prior."""
    seen = [c for key, counts in tables.items() if len(key) == k for c in counts.values()]
    n1, n2, n3, n4 = (seen.count(c) + prior for c, prior in zip((1, 2, 3, 4), (30, 10, 5, 3)))
    y = n1 / (n1 + 2 * n2)
    return [0.0, *(max(0.05, d) for d in (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2,
                                         3 - 4 * y * n4 / n3))]


def naive_chances(tables, order, history, vocab, lowest=0):
    """Return p of every id: p ← p·ΣD/n + (c − D)/n from the shortest context up."""
    p = [1.0 / vocab] * vocab
    for k in range(lowest, min(order, len(history)) + 1):
        counts = tables.get(tuple(history[len(history) - k:]))
        if counts is None:
            break
        off, n = naive_discounts(tables, k), sum(counts.values())
        back = sum(off[min(c, 3)] for c in counts.values()) / n
        p = [x * back for x in p]
        for token, c in counts.items():
            p[token] += (c - off[min(c, 3)]) / n
    return p


def tables_of(memory):
    """Return an NgramMemory's tables as naive_counts gives them."""
    return {tuple(array("I", key)): dict(found) if type(found) is dict else {found: 1}
            for table in memory.tables for key, found in table.items()}


def learned(ids, order=3, **options):
    memory = m.NgramMemory(order, **options)
    memory.learn(ids)
    return memory


def chances(expectation, vocab=VOCAB):
    return [math.exp(expectation.log_p(token)) for token in range(vocab)]


class CountsLearnInOneReading(Case):
    def assert_sums_to_1(self, memory, rng, times=20):
        for _ in range(times):
            found = chances(memory.expect(tuple(rng.choices(range(VOCAB), k=3)), VOCAB))
            self.assertAlmostEqual(sum(found), 1.0, 5)

    def test_counts_and_chances_are_those_of_the_definition_and_sum_to_1(self):
        for seed, order, lowest in ((1, 3, 0), (2, 1, 0), (3, 5, 1), (4, 2, 0), (0, 3, 0)):
            rng = random.Random(seed)
            ids = text_of(rng, 500) if seed else []
            memory, naive = learned(ids, order, lowest=lowest), naive_counts(ids, order, lowest)
            self.assertEqual(tables_of(memory), naive)
            self.assertEqual(memory.size, sum(map(len, naive.values())))
            for at in rng.choices(range(len(ids) + 1), k=20):
                for history in (ids[max(0, at - order):at], rng.choices(range(VOCAB), k=order)):
                    expectation = memory.expect(tuple(history), VOCAB)
                    ends = [tuple(history[k:]) for k in range(len(history) - lowest, -1, -1)]
                    known = [end for end in ends if end in naive] or [()]
                    self.assertEqual(expectation.reach, len(known[-1]))
                    self.assertEqual(expectation.seen, sum(naive.get(known[-1], {}).values()))
                    found = chances(expectation)
                    self.assertAlmostEqual(sum(found), 1.0, 5)
                    self.assert_near(found, naive_chances(naive, order, history, VOCAB, lowest))

    def test_what_is_learned_in_pieces_between_looks_is_counted_as_one_learned_whole(self):
        rng = random.Random(10)
        ids, memory, at = text_of(rng, 2000), m.NgramMemory(3), 0
        while at < len(ids):
            size = rng.randint(1, 9)
            memory.expect(tuple(ids[max(0, at - 3):at]), VOCAB)
            memory.learn(ids[at:at + size], ids[max(0, at - 7):at])
            at += size
        whole = learned(ids)
        self.assertEqual((memory.tables, memory.tally), (whole.tables, whole.tally))
        for _ in range(50):
            history = tuple(rng.choices(range(VOCAB), k=3))
            found, wanted = (chances(one.expect(history, VOCAB)) for one in (memory, whole))
            self.assertAlmostEqual(sum(found), 1.0, 5)
            for a, b in zip(found, wanted):
                self.assertAlmostEqual(a, b, delta=0.12 * b + 0.001)

    def test_one_thread_may_count_while_another_asks(self):
        rng = random.Random(11)
        memory, texts = learned(text_of(rng, 200)), [text_of(rng, 50) for _ in range(200)]
        counting = threading.Thread(target=lambda: [memory.learn(ids) for ids in texts])
        counting.start()
        while counting.is_alive():
            self.assert_sums_to_1(memory, rng, 1)
        counting.join()

    def test_within_its_bound_what_was_met_once_goes_first_and_the_rest_is_rightly_counted(self):
        rng, memory = random.Random(7), m.NgramMemory(3, max_counts=1000)
        for _ in range(40):
            memory.learn(text_of(rng, 200))
            self.assertLessEqual(memory.size, 1000)
        tables = tables_of(memory)
        self.assertEqual(memory.size, sum(map(len, tables.values())))
        for k in range(4):
            counts = [c for key in tables if len(key) == k for c in tables[key].values()]
            self.assertEqual(memory.tally[k][1:5], [counts.count(c) for c in range(1, 5)])
        self.assert_sums_to_1(memory, rng)
        memory = learned([1, 2, 3, 4] * 5, max_counts=1000)
        memory.learn([rng.randrange(5, 400) for _ in range(320)])
        self.assertIn(m.context_key((1, 2, 3)), memory.tables[3])


def naive_mixture(mixture, logits, history):
    """Return ln p of every id: the experts' ln p, weighed, summed, and made to sum to 1."""
    counts = mixture.counts.expect(history[-3:], VOCAB)
    copied = mixture.copy.expect(history[-5:], VOCAB)
    weights = mixture.mixer.chosen(mixture.mixer.situation(counts, copied))
    pairs = m.NgramMemory(1)
    pairs.tables, pairs.tally = mixture.counts.tables, mixture.counts.tally
    top = math.log(sum(map(math.exp, logits)))
    rows = [[x - top for x in logits], *([e.log_p(i) for i in range(VOCAB)]
                                         for e in (pairs.expect(history[-1:], VOCAB), counts,
                                                   copied))]
    scores = [sum(w * row[i] for w, row in zip(weights, rows)) for i in range(VOCAB)]
    total = math.log(sum(map(math.exp, scores)))
    return [score - total for score in scores], rows, weights


class VoiceCase(Case):
    def setUp(self):
        self.rng, self.engine = random.Random(1), engine_in_use()
        self.ids = text_of(self.rng, 600)
        self.counts, self.mixer = learned(self.ids), m.Mixer(3)


class OneVoiceOfThree(VoiceCase):
    def test_chances_slopes_and_shares_are_those_of_the_definition_on_both_engines(self):
        for at, copying, engine in itertools.product(
                (0, 1, 5, 77, 401), (False, True), (m.choose_engine("python"), self.engine)):
            logits = array("f", [self.rng.gauss(0.0, 2.0) for _ in range(VOCAB)])
            history = tuple(self.ids[max(0, at - 8):at])
            mixture = m.Mixture(engine, self.counts, self.mixer,
                                [self.ids[max(0, at - 40):at + 9]] * copying)
            mixture.mix(logits, history)
            token = self.rng.randrange(VOCAB)
            wanted, rows, weights = naive_mixture(mixture, logits, history)
            found = [-mixture.nats(i) for i in range(VOCAB)]
            self.assertAlmostEqual(sum(map(math.exp, found)), 1.0, 5)
            self.assert_near(found, wanted, 1e-4)
            rival = max((i for i in range(VOCAB) if i != token), key=wanted.__getitem__)
            for slope, share, weight, row in zip(mixture.slopes(token), mixture.shares(token),
                                                 weights, rows):
                mean = sum(math.exp(p) * x for p, x in zip(wanted, row))
                self.assertAlmostEqual(slope, row[token] - mean, 3)
                self.assertAlmostEqual(share, weight * (row[token] - row[rival]), 3)


class TheEntriesAreCounted(unittest.TestCase):
    def setUp(self):
        self.memory, self.tokenizer = m.Memory(":memory:"), m.EvolvingTokenizer()
        self.addCleanup(self.memory.close)
        for i in range(30):
            self.memory.add_entry("corpus", passage(
                f"line {i} of a ferry\nand {i * i} more", closed=i % 3 > 0))
        self.counted = self.anew()

    def anew(self, **settings):
        counted = m.EntryCounts(self.memory, self.tokenizer, m.Config(**settings))
        counted.catch_up()
        return counted

    def holds(self, counted, *texts):
        """Return whether counts have met the characters of each text one after the other."""
        tables = tables_of(counted.counts)
        return [all(ids[i + 3] in tables.get(tuple(ids[i:i + 3]), {}) for i in range(len(ids) - 3))
                for ids in map(self.tokenizer.encode, texts)]

    def test_what_is_added_is_counted_as_if_it_had_always_been_there_unless_it_is_held_out(self):
        self.memory.add_entry("chat", passage("the heron sleeps by the mill"))
        self.memory.add_entry("corpus", passage("quizzical xylophones"), held_out=True)
        for known in (False, True):
            self.assertEqual(self.holds(self.counted, "heron sleeps", "xylophone"), [known, False])
            self.counted.catch_up()
        counts, anew = self.counted.counts, self.anew().counts
        self.assertEqual((counts.tables, counts.tally), (anew.tables, anew.tally))

    def test_counts_of_what_is_forgotten_or_of_other_merges_or_sizes_do_not_fit(self):
        self.memory.add_entry("taught", passage("my cat is called Biscuit"))
        self.counted.catch_up()
        self.assertTrue(self.counted.fits(m.EvolvingTokenizer(), m.Config(temperature=0.5)))
        for change in ({"ngram_order": 2}, {"ngram_counts": 5000}, {"ngram_chars": 9}):
            self.assertFalse(self.counted.fits(self.tokenizer, m.Config(**change)), change)
        grown = m.EvolvingTokenizer()
        grown.learn_merges(["a ferry and more"] * 9, 5)
        self.assertFalse(self.counted.fits(grown, m.Config()))
        m.forget(self.memory, "my cat is called Biscuit")
        self.memory.add_entry("taught", passage("rain at noon"))  # the same id is given again
        self.assertFalse(self.counted.fits(self.tokenizer, m.Config()))
        self.assertEqual(self.holds(self.anew(), "Biscuit", "at noon"), [False, True])

    def test_only_the_newest_characters_are_counted_if_any(self):
        anew = self.anew(ngram_chars=60)
        self.assertEqual(self.holds(anew, "line 29", "line 3 of"), [True, False])
        self.assertEqual(self.anew(ngram_chars=0).counts.size, 0)


class TheMindIsRenewed(Folder):
    def setUp(self):
        super().setUp()
        self.memory = self.kept(":memory:")
        self.memory.add_entry("taught", passage("the heron sleeps by the mill"))
        self.speaker = m.Speaker(lambda: SMALL, self.memory, m.choose_engine("python"), True)

    def test_it_stays_the_same_until_something_is_committed_or_forgotten(self):
        mind = self.speaker.mind(True)
        size = mind.counts.size
        self.memory.add_entry("chat", passage("copper turns green in the rain"))
        self.assertIs(self.speaker.mind(True), mind)
        self.assertGreater(mind.counts.size, size, "what is new is counted in its place")
        self.memory.set_setting("commits", 1)
        renewed = self.speaker.mind(True)
        self.assertIsNot(renewed.model, mind.model)
        self.assertIs(renewed.counts, mind.counts, "nothing of them is out of date")
        m.forget(self.memory, "copper turns green in the rain")
        self.assertEqual(self.speaker.mind(True).counts.size, size)

    def test_it_speaks_with_the_best_weights_of_a_birth_and_trusts_those_that_read_well(self):
        model = m.GPT(m.Shape.of(SMALL), m.FIRST_MERGE, self.speaker.engine, random.Random(9))
        best = m.pack_params(list(model.params.values()))
        worse = best._replace(data=bytes(len(best.data)))
        for commits, (phase, bpc, trusted) in enumerate((
                ("newborn", 0.5, False), ("warmup", SMALL.trust_bpc, True),
                ("warmup", SMALL.trust_bpc + 0.1, False), ("grown", None, False),
                ("grown", SMALL.trust_bpc * 1.4, True)), 1):
            self.memory.save_layers({"base": worse, "best": best})
            self.memory.set_setting("growth", {"phase": phase, "best_bpc": bpc})
            self.memory.set_setting("commits", commits)
            mind = self.speaker.mind(True)
            self.assertEqual(mind.trusted, trusted, (phase, bpc))
            wanted = best if phase == "warmup" else worse
            self.assertEqual(m.pack_params(list(mind.model.params.values())), wanted)

    def test_a_mind_whose_counts_take_long_speaks_when_they_are_complete(self):
        kept = self.speaker.mind(True)
        self.speaker.background = True  # somebody renews it between replies
        for i in range(300):
            self.memory.add_entry("chat", passage(f"a long text of number {i}"))
        m.forget(self.memory, "the heron sleeps by the mill")
        with mock.patch.object(m, "AT_ONCE_CHARS", 16):
            self.assertIs(self.speaker.mind(True), kept)
            while not self.speaker.renew(16, True):
                self.assertIs(self.speaker._kept[1], kept)
            renewed = self.speaker.mind(True)
        self.assertIsNot(renewed, kept)
        anew = m.EntryCounts(self.memory, renewed.tokenizer, SMALL)
        anew.catch_up()
        self.assertEqual(renewed.counts.tables, anew.counts.tables)


class ReadingAText(VoiceCase):
    def setUp(self):
        super().setUp()
        self.model = m.GPT(m.Shape.of(SMALL), VOCAB, self.engine, random.Random(2))

    def read(self, ids, fit=False):
        still, live = (m.Mixture(self.engine, self.counts, mixer)
                       for mixer in (self.mixer, self.mixer if fit else m.Mixer(3)))
        return [sum(part) for part in zip(*m.read_through(self.model, ids, still, live, fit))]

    def test_fitted_weights_read_better_and_one_that_learns_reads_repetitions_best(self):
        text, state = text_of(random.Random(9), 40) * 4, (self.mixer.numbers(), self.counts.size)
        before = self.read(text)
        self.assertEqual(self.read(text), before)
        self.assertEqual((self.mixer.numbers(), self.counts.size), state, "reading changed it")
        for _ in range(3):
            self.read(text, fit=True)
        after = self.read(text)
        self.assertLess(after[2], before[2])
        self.assertLess(before[3], 0.8 * before[2])

    def test_fitted_weights_are_a_layer_that_comes_back_and_of_another_form_changes_nothing(self):
        self.read(self.ids[:60], fit=True)
        layer = m.pack_mixer(self.mixer)
        again, other = m.load_mixer(m.Config(), layer), m.Mixer(2).numbers()
        numbers = again.numbers()
        self.assert_near(numbers, self.mixer.numbers(), 1e-3)
        self.assertEqual(m.load_mixer(m.Config(ngram_order=2), layer).numbers(), other)
        for bad in ([], numbers[:-1], other, [math.nan] * len(numbers)):
            self.assertFalse(again.load(bad))
        self.assertEqual(again.numbers(), numbers)


class WhatMovedAReply(VoiceCase):
    def setUp(self):
        super().setUp()
        self.tokenizer, memory = m.EvolvingTokenizer(), m.Memory(":memory:")
        self.config = dataclasses.replace(SMALL, block_size=48, max_gen_tokens=12)
        self.model = m.GPT(m.Shape.of(self.config), self.tokenizer.vocab_size, self.engine,
                           random.Random(2))
        self.addCleanup(memory.close)
        for text in ("the heron sleeps by the mill", "copper turns green"):
            memory.add_entry("taught", passage(text))
        self.sources = [(e, m.document_ids(self.tokenizer, e.text)) for e in memory.entries()]

    def speak(self):
        """Return the trace of a reply that may copy from two entries, and its text."""
        for at in range(0, len(self.mixer.weights), 4):  # who copies, above all
            self.mixer.weights[at:at + 4] = array("d", (0.3, 0.0, 0.1, 1.5))
        mixture = m.Mixture(self.engine, m.NgramMemory(3), self.mixer,
                            (ids for _, ids in self.sources))
        prompt = [m.END_OF_TEXT] + self.tokenizer.encode("the heron sl")
        trace = m.Trace(self.model, self.tokenizer, prompt, self.sources)
        text = "".join(m.spoken(self.model, self.tokenizer, prompt, self.config, random.Random(0),
                                mixture, trace.tokens))
        return trace, text

    def test_every_token_is_traced_and_why_names_the_experts_and_first_the_entry_copied(self):
        trace, text = self.speak()
        self.assertTrue(text.startswith("eeps by"), text)
        tokens = [said.token for said in trace.tokens]
        self.assertEqual(self.tokenizer.decode(tokens).partition("\n")[0], text)
        whole = trace.prompt + tokens
        for i, said in enumerate(trace.tokens, len(trace.prompt)):
            self.assertEqual(said.before, tuple(whole[max(0, i - m.SAID_ORDER):i]))
        self.assertAlmostEqual(sum(trace.expert_shares().values()), 1.0)
        entry, copied, nats = trace.entry_shares()[0]
        self.assertEqual((entry.text, copied > 3, nats > 0),
                         ("the heron sleeps by the mill\n", True, True))
        lines = m.why_lines(trace, 7)
        for line, *signs in ((0, "step 7", *m.EXPERTS), (1, "copy+"),
                             (2, "the heron sleeps by the mill")):
            for sign in signs:
                self.assertIn(sign, lines[line])
        self.assertNotIn("\n", "".join(lines))
        self.assertEqual(m.why_lines(None, 3), ["the model said it by itself, at step 3"])

    def test_what_the_layer_that_spoke_gave_is_measured_by_leaving_it_out(self):
        self.assertEqual(self.speak()[0].delta_shares(), [])
        for _ in range(2):
            self.model.append_delta(2, random.Random(1))
        self.model.router = m.Router(self.tokenizer, [{b"xyz": 1}, {}, {b"the": 9, b"ron": 9}])
        self.assertEqual([round(x, 6) for x in self.speak()[0].delta_shares()], [0.0, 0.0])
        for matrix in m.delta_matrices(self.model.deltas[1]):
            matrix.load(array("f", [0.3] * len(matrix.data)))
        trace, _ = self.speak()
        ids, count = trace.prompt + [said.token for said in trace.tokens], len(trace.tokens)
        alone, spoke = (m._reply_nats(self.model.with_layer(i), ids, count) for i in (0, 2))
        self.assertNotAlmostEqual(alone, spoke, 3)
        self.assert_near(trace.delta_shares(), (0.0, (alone - spoke) / count), 1e-4)


class TheVoiceIsFitted(unittest.TestCase):
    def test_it_is_fitted_on_new_held_out_text_alone_and_later_only_the_newest_deltas_weights(self):
        def learner_of(probes, **layers):
            learner = m.Learner(SMALL, m.Growth(phase="grown"), layers, engine_in_use())
            learner.take_text((), [
                [i, i, f"the ferry of pier {i} leaves at {i}\n", True, i >= 70, "corpus",
                 str(i) if i >= 70 else ""] for i in (*range(40), *range(70, 70 + probes))])
            return learner
        for probes, passes in ((0, 1), (1, 0)):
            learner = learner_of(probes)
            learner.config = learner.config.replace([f"mix_passes={passes}"])
            learner.fit_voice()
            self.assertIsNone(learner.mixer)
        learner = learner_of(1)
        learner.fit_voice()
        layer = learner.snapshot()[1]["mixer"]
        self.assertNotEqual(m.load_mixer(SMALL, layer).numbers(), m.Mixer(3).numbers())
        self.assertEqual(layer.manifest["probes"], ["70"])
        self.assertNotIn("mixer", learner.snapshot()[1], "it is stored already")
        again = learner_of(1, mixer=layer)
        again.fit_voice()
        self.assertEqual(again.mixer, layer, "it knows the probe")
        again = learner_of(2, mixer=layer)
        again.begin_burst()
        again.settle_route()
        again.router.choose = lambda raw: 1
        again.fit_voice()
        before, now = (m.load_mixer(SMALL, one).weights for one in (layer, again.mixer))
        self.assertEqual(now[:len(before)], before)
        self.assertTrue(any(now[len(before):]), "the delta's own")
        self.assertEqual(again.mixer.manifest["probes"], ["70", "71"])


class TheWholeProgram(Folder):
    def test_eval_measures_every_voice_and_learns_nothing_and_why_is_one_line_whoever_speaks(self):
        text = "".join(f"H: what is {w}?\nA: it is a kind of {w} by the sea\n\n"
                       for w in "amber boats cliffs dunes eels foam gulls herons ice".split())
        self.write("nonames.txt", text * 3)
        held = "H: what is kelp?\nA: it is — a kind of kelp by the sea\n\n" * 9
        self.write("held.txt", held)
        newborn = self.report("eval", "held.txt")
        self.assertTrue(6.0 < newborn["gpt_bpc"] < 12.0, "a newborn knows nothing")
        self.good("train", "--set", "held_out_share=0.3")
        first, again = (self.report("eval", "held.txt") for _ in range(2))
        self.assertEqual((first, first["characters"]), (again, len(held)), "it learns nothing")
        self.assertLess(first["voice_bpc"], first["gpt_bpc"])
        self.assertLess(first["voice_adaptive_bpc"], first["voice_bpc"])
        for mix, found in ((1, ("the voice said it", *m.EXPERTS)), (0, ("said it by itself",))):
            _, why = self.chat("well it rains on and on", "/why", args=(
                "--no-train", "--set", "trust_bpc=99", "--set", "recall_score=1",
                "--set", "boldness=99", "--set", f"mix={mix}"))
            for words in found:
                self.assertIn(words, why)
