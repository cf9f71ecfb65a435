"""Claims about RECALL and VOICE: what memory answers, what the model is shown, and where it stops."""
import dataclasses
import random
import unittest
from unittest import mock

import macrogpt as m

ENGLISH = ("the cat sleeps on the mat", "the dog sleeps on the rug", "the bird sings in the tree",
           "the sun shines on the sea", "the rain falls on the roof")


def document(text):
    return m.Document(tuple(text.splitlines()), True)


def memory_of(*texts, source="corpus"):
    """Return a memory in no file that holds the texts, lines divided by line feeds."""
    memory = m.Memory(":memory:")
    for text in texts:
        memory.add_entry(source, document(text))
    return memory


def exchange(asked, answered):
    return f"H: {asked}\nA: {answered}"


class Stems(unittest.TestCase):
    def test_a_stem_is_the_first_five_letters_folded(self):
        self.assertEqual(m.stems_of("Sleeping SLEEPS sleep, asleep!"),
                         ["sleep", "sleep", "sleep", "aslee"])

    def test_case_and_accents_do_not_count(self):
        for one, other in (("Zürich", "zurich"), ("CAFÉ", "cafe"), ("cafe\u0301", "caf\u00e9"),
                           ("STRASSE", "straße"), ("ΘΆΛΑΣΣΑ", "θαλασσα"), ("Ёлка", "елка"),
                           ("ﬁsh", "FISH"), ("İstanbul", "istanbul")):
            self.assertEqual(m.stems_of(one), m.stems_of(other))

    def test_other_scripts_and_digits_make_words_and_signs_do_not(self):
        self.assertEqual(m.stems_of("你好，世界！"), ["你", "好", "世", "界"])
        self.assertEqual(m.stems_of("Москва-река"), ["москв", "река"])
        self.assertEqual(m.stems_of("room 1234567"), ["room", "12345"])
        for empty in ("", " \t\n", "?!…—()\"'", "\N{GRINNING FACE}"):
            self.assertEqual(m.stems_of(empty), [])

    def test_stems_of_stems_are_themselves(self):
        rng = random.Random(1)
        letters = "aA1_éÉüßñΣςйЁ你好한국 ,.-'\u0301\u0130\ufb01\U0001f600\0\n"
        for _ in range(300):
            stems = m.stems_of("".join(rng.choices(letters, k=rng.randint(0, 30))))
            self.assertEqual([m.stems_of(stem) for stem in stems], [[stem] for stem in stems])
            self.assertTrue(all(1 <= len(stem) <= m.STEM_CHARS for stem in stems))


class Questions(unittest.TestCase):
    def test_a_question_ends_with_its_mark_whatever_the_script(self):
        for text in ("Why?", "why ?", "Who said \"why?\"", "really?!?", "你好吗？", "كيف حالك؟",
                     "(is it?)", "Why?  "):
            self.assertTrue(m.is_question(text), text)

    def test_what_only_holds_a_mark_is_none(self):
        for text in ("", " ", "I know.", "Why? Because.", "?!", "a?b", "what"):
            self.assertFalse(m.is_question(text), text)


class Recalling(unittest.TestCase):
    def best(self, memory, text, seed=0):
        fits = m.recall(memory, text, random.Random(seed))
        return fits[0] if fits else None

    def test_an_exact_question_is_answered_with_its_own_answer(self):
        pairs = [(f"What is {word}?", f"It is number {i}.") for i, word in
                 enumerate(("copper", "granite", "amber", "velvet", "ivory"))]
        memory = memory_of(*(exchange(*pair) for pair in pairs))
        for asked, answered in pairs:
            fit = self.best(memory, asked)
            self.assertEqual(fit.answer, answered)
            self.assertAlmostEqual(fit.score, 1.0)

    def test_the_fitting_exchange_comes_first_and_scores_fall(self):
        memory = memory_of(exchange("Where does the heron sleep?", "By the mill."),
                           exchange("Where does the fox sleep?", "In its den."),
                           exchange("What does the heron eat?", "Fish."),
                           exchange("Who are you?", "A lantern."))
        fits = m.recall(memory, "so where does a heron sleep", random.Random(0))
        self.assertEqual(fits[0].answer, "By the mill.")
        scores = [round(fit.score, 2) for fit in fits]
        self.assertEqual(scores, sorted(scores, reverse=True))
        self.assertEqual([f.score for f in fits if f.answer == "A lantern." and f.score > 0.0], [])

    def test_one_rare_word_decides_over_several_common_ones(self):
        common = [exchange(f"do you know what the {i} is about?", f"no {i}") for i in range(30)]
        memory = memory_of(*common, exchange("tell me of quasars", "They are far."))
        self.assertEqual(self.best(memory, "do you know quasars?").answer, "They are far.")

    def test_every_score_is_from_0_to_1(self):
        memory = memory_of(*ENGLISH, *(exchange(line + "?", "yes") for line in ENGLISH))
        memory.add_entry("chat", document("the moon rises over the sea"))
        rng = random.Random(2)
        words = [word for line in ENGLISH for word in line.split()] + ["moon", "?", "walrus", "''"]
        for _ in range(100):
            text = " ".join(rng.choices(words, k=rng.randint(1, 8)))
            for fit in m.recall(memory, text, rng):
                self.assertTrue(0.0 <= fit.score <= 1.0 + 1e-9, (text, fit))

    def test_of_an_exchange_only_answers_are_said_and_only_questions_matched(self):
        memory = memory_of("H: good morning\nA: the walrus wakes\nH: and then?\nA: the walrus dives")
        self.assertEqual(self.best(memory, "good morning").answer, "the walrus wakes")
        self.assertEqual(self.best(memory, "and then").answer, "the walrus dives")
        fits = m.recall(memory, "walrus", random.Random(0))
        self.assertEqual([fit.score for fit in fits if fit.score > 0], [])
        self.assertTrue({fit.answer for fit in fits} <= {"the walrus wakes", "the walrus dives"})

    def test_two_turns_of_one_speaker_give_no_question_as_an_answer(self):
        memory = memory_of("H: are you a heron\nH: or a crane\nA: neither")
        self.assertNotIn("or a crane", [fit.answer for fit in
                                        m.recall(memory, "are you a heron", random.Random(0))])

    def test_an_exchange_without_an_answer_says_nothing(self):
        memory = memory_of("H: hello heron", "A: a heron answers nobody")
        self.assertEqual(m.recall(memory, "hello heron", random.Random(0)), [])

    def test_a_plain_line_may_be_said_but_weighs_less_than_an_exchange(self):
        memory = memory_of("Herons eat fish.\nCranes eat seeds.",
                           exchange("Cranes eat seeds.", "Quite so."))
        self.assertEqual(self.best(memory, "do herons eat fish?").answer, "Yes. Herons eat fish.")
        self.assertEqual(self.best(memory, "cranes eat seeds").answer, "Quite so.")

    def test_what_the_owner_said_is_offered_to_questions_only(self):
        memory = memory_of("my boat is called Plover", source="chat")
        fit = self.best(memory, "what is my boat called?")
        self.assertEqual(fit.answer, "Your boat is called Plover.")
        self.assertEqual(m.recall(memory, "my boat is called Plover", random.Random(0)), [])

    def test_a_statement_of_several_lines_is_offered_too(self):
        memory = memory_of("my boat is called Plover\nit lies in the harbour", source="chat")
        self.assertIn("Plover", self.best(memory, "what is my boat called?").answer)
        self.assertIn("harbour", self.best(memory, "what lies in the harbour?").answer)

    def test_a_told_line_with_a_marker_of_an_exchange_is_survived(self):
        for text in ("H: hello heron", "A: hello heron", "H:", "A:", "H: heron?\nA: yes, heron"):
            memory = memory_of(text, source="chat")
            for asked in ("heron?", "hello heron", "H: heron?"):
                self.assertIsInstance(m.recall(memory, asked, random.Random(0)), list)

    def test_what_is_taught_is_told_too(self):
        memory = memory_of("the harbour opens at six", source="taught")
        self.assertEqual("The harbour opens at six.",
                         self.best(memory, "when does the harbour open?").answer)

    def test_a_statement_without_the_questions_rarest_word_never_reaches_the_answering_score(self):
        memory = memory_of("the name of my cat is Pixel", "the name of my boat is Plover",
                           "the name of my street is long", source="chat")
        memory.add_entry("corpus", document("the name of the walrus"))
        fits = m.recall(memory, "what is the name of my walrus?", random.Random(0))
        told = [fit for fit in fits if fit.entry.source == "chat"]
        self.assertTrue(all(fit.score < m.Config.recall_score for fit in told))
        self.assertIn("Pixel", self.best(memory, "what is the name of my cat?").answer)

    def test_a_search_finds_every_kind_of_entry_best_and_newest_first(self):
        memory = memory_of("a heron by the mill", exchange("heron?", "a bird"))
        memory.add_entry("chat", document("I saw a heron"), recall=True)
        memory.add_entry("chat", document("nothing of the kind"))
        found = [entry.text.strip() for entry in m.search(memory, "heron mill")]
        self.assertEqual(found, ["a heron by the mill", "I saw a heron", "H: heron?\nA: a bird"])
        self.assertEqual(len(m.search(memory, "heron mill", 2)), 2)
        self.assertEqual(m.search(memory, ""), [])

    def test_nothing_fits_an_empty_memory_or_a_text_without_words(self):
        self.assertEqual(m.recall(memory_of(), "hello", random.Random(0)), [])
        for text in ("", "?!", "   "):
            self.assertEqual(m.recall(memory_of(*ENGLISH), text, random.Random(0)), [])

    def test_the_same_seed_gives_the_same_order_and_equals_take_turns(self):
        memory = memory_of(*(exchange("hello", f"answer {i}") for i in range(6)))
        orders = [[fit.answer for fit in m.recall(memory, "hello", random.Random(seed))]
                  for seed in range(20)]
        again = [[fit.answer for fit in m.recall(memory, "hello", random.Random(seed))]
                 for seed in range(20)]
        self.assertEqual(orders, again)
        self.assertGreater(len({order[0] for order in orders}), 1)

    def test_a_memory_without_full_text_recalls_the_same(self):
        memory = memory_of(*(exchange(line + "?", f"yes, {i}") for i, line in enumerate(ENGLISH)))
        with_index = [self.best(memory, f"{line}?").answer for line in ENGLISH]
        memory.has_fts = False
        self.assertEqual([self.best(memory, f"{line}?").answer for line in ENGLISH], with_index)


class Prompts(unittest.TestCase):
    def setUp(self):
        self.tokenizer = m.EvolvingTokenizer()

    def shown(self, turns, text, budget):
        """Return the prompt as text, after its first id has been seen to be the end of text."""
        ids = m.prompt_ids(self.tokenizer, turns, text, budget)
        self.assertEqual(ids[0], m.END_OF_TEXT)
        self.assertLessEqual(len(ids), budget)
        return self.tokenizer.decode(ids)

    def test_it_is_an_exchange_that_waits_for_its_answer(self):
        turns = [("owner", "hello"), ("self", "hello to you")]
        self.assertEqual(self.shown(turns, "who are you", 1000),
                         "H: hello\nA: hello to you\nH: who are you\nA:")
        self.assertEqual(self.shown([], "", 100), "H: \nA:")

    def test_the_newest_turns_are_the_first_in_and_none_is_skipped(self):
        turns = [("owner", "one"), ("self", "two"), ("owner", "three"), ("self", "four")]
        whole = "H: one\nA: two\nH: three\nA: four\nH: five\nA:"
        starts = [0, 7, 14, 23, 31]  # where each turn of the whole begins
        for budget in range(16, 60):
            text = self.shown(turns, "five", budget)
            self.assertEqual(text, whole[next(s for s in starts if len(whole) - s < budget):])

    def test_of_an_overlong_text_the_end_is_kept(self):
        text = "x" * 500 + " the end?"
        for budget in (8, 20, 72):
            shown = self.shown([("owner", "before")], text, budget)
            self.assertTrue(f"H: {text}\nA:".endswith(shown))
            self.assertEqual(len(shown), budget - 1)

    def test_the_budget_is_never_exceeded(self):
        rng = random.Random(3)
        tokenizer = m.EvolvingTokenizer()
        tokenizer.learn_merges(["the heron sleeps by the mill and the crane does not"] * 9, 40)
        words = ["heron", "ü", "你好", "\N{GRINNING FACE}", "the mill", "\n", "", "A:", "H: x"]
        for _ in range(300):
            turns = [(rng.choice(("owner", "self")), " ".join(rng.choices(words, k=rng.randint(0, 6))))
                     for _ in range(rng.randint(0, 8))]
            text = " ".join(rng.choices(words, k=rng.randint(0, 30)))
            budget = rng.randint(1, 80)
            ids = m.prompt_ids(tokenizer, turns, text, budget)
            self.assertLessEqual(len(ids), budget)
            self.assertEqual(ids[0], m.END_OF_TEXT)
            self.assertNotIn(m.END_OF_TEXT, ids[1:])


class Settings(unittest.TestCase):
    def test_every_setting_of_the_chain_comes_from_the_config(self):
        changed = {}
        for f in dataclasses.fields(m.SamplerSettings):
            if f.name != "samplers" and hasattr(m.Config, f.name):
                step = 1 if type(f.default) is int else -0.01 if f.name == "typical_p" else 0.01
                changed[f.name] = getattr(m.Config, f.name) + step
        self.assertGreater(len(changed), 12)
        made = m.sampler_settings(dataclasses.replace(m.Config(), **changed))
        self.assertEqual({name: getattr(made, name) for name in changed}, changed)

    def test_every_field_of_the_chain_can_be_set(self):
        mapped = {f.name for f in dataclasses.fields(m.SamplerSettings)}
        known = {f.name for f in dataclasses.fields(m.Config)}
        self.assertEqual(mapped - known, set())

    def test_the_order_is_the_owners(self):
        for order in ("temperature,top_k", "top_k , temperature,", "min_p"):
            made = m.sampler_settings(m.Config(samplers=order))
            self.assertEqual(list(made.samplers), [n.strip() for n in order.split(",") if n.strip()])
        self.assertEqual(m.sampler_settings(m.Config()).samplers, m.DEFAULT_SAMPLERS)

    def test_an_unknown_sampler_is_a_config_error_of_one_line(self):
        for order in ("top_k,topp", "nonsense", "Temperature"):
            with self.assertRaises(m.ConfigError) as caught:
                m.sampler_settings(m.Config(samplers=order))
            self.assertIn(order, str(caught.exception))
            self.assertIn("top_p", str(caught.exception))
            self.assertEqual(len(str(caught.exception).splitlines()), 1)

    def test_the_ends_of_every_range_make_a_chain(self):
        for f in dataclasses.fields(m.Config):
            if f.name in {s.name for s in dataclasses.fields(m.SamplerSettings)} - {"samplers"}:
                for end in (f.metadata["low"], f.metadata["high"]):
                    if abs(end) < 1e9:
                        config = dataclasses.replace(m.Config(), **{f.name: type(f.default)(end)})
                        self.assertEqual(getattr(m.sampler_settings(config), f.name), end)


class ScriptedModel:
    """Stands in for a GPT: however it is asked, it wants to say a given row of ids."""

    def __init__(self, ids, vocab_size=m.FIRST_MERGE):
        self.script, self.vocab_size, self.fed, self.caches = list(ids), vocab_size, [], []
        self.engine = None

    def speaker(self, ids):
        return self

    def new_cache(self):
        self.caches.append([])
        return self.caches[-1]

    def feed(self, cache, ids):
        assert cache is self.caches[-1]
        self.fed.append(list(ids))
        logits = [0.0] * self.vocab_size
        logits[self.script[min(len(self.fed), len(self.script)) - 1]] = 50.0
        return logits


class Speaking(unittest.TestCase):
    def setUp(self):
        self.tokenizer = m.EvolvingTokenizer()

    def say(self, ids, stops=("\n",), **settings):
        """Return the pieces spoken by a model that wants to say ids, and the model."""
        if isinstance(ids, str):
            ids = self.tokenizer.encode(ids)
        model = ScriptedModel(ids)
        config = dataclasses.replace(m.Config(), temperature=0.0, samplers="temperature", **settings)
        prompt = self.tokenizer.encode("H: hello\nA:")
        return list(m.spoken(model, self.tokenizer, prompt, config, random.Random(0), stops)), model

    def test_it_stops_at_the_line_feed_and_asks_for_nothing_after_it(self):
        pieces, model = self.say(" good day\nH: and more")
        self.assertEqual("".join(pieces), " good day")
        self.assertEqual(len(model.fed), len(" good day\n"))

    def test_it_stops_at_the_end_of_text(self):
        pieces, _ = self.say([*self.tokenizer.encode("yes"), m.END_OF_TEXT, 70, 71])
        self.assertEqual("".join(pieces), "yes")

    def test_the_prompt_is_fed_once_and_then_each_token_once(self):
        _, model = self.say("abc\n")
        said = self.tokenizer.encode("abc")
        self.assertEqual(model.fed, [self.tokenizer.encode("H: hello\nA:"), *([i] for i in said)])

    def test_the_end_of_text_is_no_first_word(self):
        pieces, model = self.say([m.END_OF_TEXT, *self.tokenizer.encode("x\n")])
        self.assertEqual(len(model.fed), 3)  # something else was said first, then the x
        self.assertNotIn("<|endoftext|>", "".join(pieces))
        self.assertTrue("".join(pieces).endswith("x"))

    def test_pieces_are_never_empty_nor_half_a_character(self):
        pieces, _ = self.say("aé你\N{GRINNING FACE}z\n")
        self.assertEqual(pieces, ["a", "é", "你", "\N{GRINNING FACE}", "z"])

    def test_a_character_cut_short_shows_as_the_replacement(self):
        pieces, _ = self.say([*self.tokenizer.encode("a你")[:-1], m.END_OF_TEXT])
        self.assertEqual("".join(pieces), "a\ufffd")

    def test_it_says_at_most_max_gen_tokens(self):
        pieces, model = self.say("abcdefgh", max_gen_tokens=3)
        self.assertEqual("".join(pieces), "abc")
        self.assertEqual(len(model.fed), 3)

    def test_what_might_begin_a_stop_is_held_back_and_given_at_the_end(self):
        pieces, _ = self.say([*self.tokenizer.encode("one\nH"), m.END_OF_TEXT], ("\nH:",))
        self.assertEqual("".join(pieces), "one\nH")
        pieces, _ = self.say("one\nH: two", ("\nH:", "\nA:"))
        self.assertEqual("".join(pieces), "one")

    def test_each_reply_has_a_cache_of_its_own(self):
        model = ScriptedModel(self.tokenizer.encode("a\n"))
        config = m.Config(temperature=0.0)
        for _ in range(2):
            model.fed.clear()
            list(m.spoken(model, self.tokenizer, [0], config, random.Random(0)))
        self.assertEqual(len(model.caches), 2)

    def test_the_same_seed_says_the_same(self):
        config = m.Config(n_layer=1, n_embd=16, n_head=2, block_size=24, max_gen_tokens=12)
        engine = m.choose_engine("python")
        model = m.GPT(m.Shape.of(config), self.tokenizer.vocab_size, engine, random.Random(1))

        def said(seed):
            return list(m.spoken(model, self.tokenizer, [0, 5], config, random.Random(seed)))
        self.assertEqual(said(3), said(3))
        self.assertGreater(len({"".join(said(seed)) for seed in range(4)}), 1)


class Silence(unittest.TestCase):
    """With nothing to say it acknowledges, in the language of what it has read."""

    def said(self, text, *texts):
        memory = memory_of(*texts)
        return m.silence(memory, text)

    def test_in_english_and_with_nothing_read_yet_it_has_words_for_it(self):
        for texts in ((), ENGLISH * 5):
            self.assertEqual(self.said("My lamp is called Quartz.", *texts), m.KEPT_REPLY)
            self.assertEqual(self.said("Wie heißt mein Hund?", *texts), m.UNKNOWN_REPLY)

    def test_in_another_language_it_says_what_it_heard(self):
        german = [f"Der Hund Nummer {i} schläft." for i in range(40)]
        for text, said in (("Mein Hund heißt Rex.", "Rex."), ("Wo ist Rex?", "Wo ist Rex?"),
                           ("Der Hund schläft.", "Der Hund schläft."), ("Ich bin heute müde.", "Müde.")):
            self.assertEqual(self.said(text, *german), said)
        chinese = [exchange(f"{i}号小狗在哪里？", "它在睡觉。") for i in range(40)]
        self.assertEqual(self.said("我的猫叫咪咪。", *chinese), "我的猫叫咪咪。")


class Drafts(unittest.TestCase):
    """Replies are drafted, judged, and cut where they are still good."""

    def entry(self, text):
        return m.Entry(0, "corpus", 0, text, 0.0, True, True, False, True)

    def test_a_reply_may_be_cut_after_each_of_its_sentences(self):
        self.assertEqual(m.beginnings("I am 3.5 years old. Are you? yes"),
                         ["I am 3.5 years old.", "I am 3.5 years old. Are you?"])
        self.assertEqual(m.beginnings("你好。再见！"), ["你好。", "你好。再见！"])
        self.assertEqual(m.beginnings("no end"), ["no end"])
        self.assertEqual(m.beginnings("Ask Dr. Moss. Now."), ["Ask Dr. Moss.", "Ask Dr. Moss. Now."])

    def test_one_pass_judges_each_beginning_as_if_it_were_all_that_is_said(self):
        shape = m.Shape.of(dataclasses.replace(m.Config(), n_layer=1, n_embd=16, n_head=2,
                                               block_size=24))
        model = m.GPT(shape, 60, m.choose_engine("python"), random.Random(3))
        prompt, bare, said, stop = [0, 11, 12], [0], [21, 22, 23, 24, 25], 26
        flows = m.flows_of(model, prompt, bare, [*said, stop], [2, 5])
        for end, flow in zip((2, 5), flows):
            alone = m.flows_of(model, prompt, bare, [*said[:end], stop], [end])
            self.assertAlmostEqual(flow, alone[0], places=5)
        self.assertNotAlmostEqual(*flows, places=3)
        endless = m.flows_of(model, prompt, bare, said * 9, [2, 45])
        self.assertEqual(len(endless), 2)

    def test_what_goes_round_in_circles_or_has_no_end_or_strange_words_is_worth_less(self):
        known = set("i am sorry that you are tired".split()).__contains__
        good = m.form_of("I am sorry that you are tired.", known)
        self.assertEqual(good, 0.0)
        for worse in ("I am sorry that you are", "I am sorry that I am sorry that you are.",
                      "I am sorried that you are tired."):
            self.assertGreater(m.form_of(worse, known), good, worse)

    def test_words_of_an_exchange_that_the_owner_did_not_say_are_borrowed(self):
        entries = [self.entry("H: My father is ill.\nA: I hope your father gets well.\n")]
        borrowed = m.borrowed_stems("My mother is ill.", entries)
        self.assertIn("fathe", borrowed)
        self.assertFalse({"ill", "mothe", "well"} & borrowed)

    def test_an_answer_without_the_question_that_closes_it(self):
        for answer, told in (("Hi! What is it?", "Hi!"), ("So? I see.", "So? I see."),
                             ("Why?", ""), ("好。你呢？", "好。"), ("", "")):
            self.assertEqual(m.told_of(answer), told)

    def test_another_question_may_close_an_answer_where_it_is_about_the_same(self):
        memory = memory_of(
            exchange("Do you know the otter?", "I know its name. May I go on?"),
            exchange("The otter is here.", "Good! What does the otter eat?"),
            exchange("My uncle came.", "What did he tell you of the otter?"),
            exchange("There it swims.", "I hear you. The otter?"),
            exchange("The heron is here.", "Which lake does the heron like, of all the lakes?"),
            *(exchange(f"Number {i} is here.", "Is it a number?") for i in range(80)))
        fit = m.recall(memory, "Do you know the otter?", random.Random(1))[0]
        self.assertEqual([found.answer for found in m.grafted(
            memory, "Do you know the otter?", [fit], True)],
            ["I know its name. What does the otter eat?"])
        self.assertEqual([found.answer for found in m.grafted(memory, "an otter!", [], True)],
                         ["What does the otter eat?"])
        self.assertEqual(list(m.grafted(memory, "an otter!", [], False)), [])

    def answers(self, text, turns, *exchanges):
        """Return the answer of an organism that speaks by itself and knows some exchanges."""
        being = m.Organism(m.Config(), memory_of(*exchanges), m.choose_engine("python"))
        with mock.patch.object(being, "trusts_model", lambda: True), mock.patch.object(
                being, "_may_lack", lambda *_: 0.0):
            return "".join(being._answer(text, turns, random.Random(1)))

    def test_small_talk_is_answered_in_another_way_when_it_comes_again_and_facts_are_not(self):
        jokes = [exchange("tell me a joke", "A snail went home."),
                 exchange("tell me another joke", "A book went to bed.")]
        facts = [exchange("Where is the key?", "The key is in the barn. Is it dark?"),
                 exchange("Where is the other key?", "The key hangs by the door.")]
        for text, exchanges, changes in (("tell me a joke", jokes, True),
                                         ("Where is the key?", facts, False)):
            first = self.answers(text, [], *exchanges)
            self.assertEqual(first, exchanges[0].partition("A: ")[2])
            again = self.answers(text, [("owner", text), ("self", first)], *exchanges)
            self.assertEqual(again != first, changes, again)


if __name__ == "__main__":
    unittest.main()
