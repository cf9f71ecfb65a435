"""Claims about RECALL and VOICE: what memory answers, what a model is shown, where it stops."""
import contextlib
import random
import unittest

import macrogpt as m
from support import passage

ENGLISH = ("the cat sleeps on the mat", "the dog sleeps on the rug", "the bird sings in the tree",
           "the sun shines on the sea", "the rain falls on the roof")


def memory_of(*texts, source="corpus"):
    """Return a memory in no file that holds the texts, lines divided by line feeds."""
    memory = m.Memory(":memory:")
    for text in texts:
        memory.add_entry(source, passage(text))
    return memory


def exchange(asked, answered):
    return f"H: {asked}\nA: {answered}"


class Words(unittest.TestCase):
    def test_a_stem_is_five_letters_of_a_word_and_signs_case_and_accents_do_not_count(self):
        for text, stems in (("Sleeping SLEEPS sleep, asleep!", ["sleep"] * 3 + ["aslee"]),
                            ("你好，世界！", ["你", "好", "世", "界"]), ("Москва-река", ["москв", "река"]),
                            ("room 1234567", ["room", "12345"]), ("", []), (" \t\n", []),
                            ("?!…—()\"'", []), ("\N{GRINNING FACE}", [])):
            self.assertEqual(m.stems_of(text), stems)
        for one, other in (("Zürich", "zurich"), ("CAFÉ", "cafe"), ("cafe\u0301", "caf\u00e9"),
                           ("STRASSE", "straße"), ("ΘΆΛΑΣΣΑ", "θαλασσα"), ("Ёлка", "елка"),
                           ("ﬁsh", "FISH"), ("İstanbul", "istanbul")):
            self.assertEqual(m.stems_of(one), m.stems_of(other))


class Recalling(unittest.TestCase):
    def best(self, memory, text, seed=0):
        fits = m.recall(memory, text, random.Random(seed))
        return fits[0] if fits else None

    def test_an_exact_question_is_answered_with_its_own_answer_also_without_full_text_search(self):
        pairs = [(f"What is {word}?", f"It is number {i}.") for i, word in
                 enumerate(("copper", "granite", "amber", "velvet", "ivory"))]
        memory = memory_of(*(exchange(*pair) for pair in pairs))
        memory.add_entry("chat", passage("My cat is called Biscuit."))
        for memory.has_fts in (memory.has_fts, False):
            for asked, answered in pairs:
                fit = self.best(memory, asked)
                self.assertEqual(fit.answer, answered)
                self.assertAlmostEqual(fit.score, 1.0)
            self.assertEqual(self.best(memory, "What is my cat's name?").answer,
                             "Your cat is called Biscuit.")

    def test_the_fitting_exchange_comes_first_and_scores_fall_from_1_to_0(self):
        memory = memory_of(exchange("Where does the heron sleep?", "By the mill."),
                           exchange("Where does the fox sleep?", "In its den."),
                           exchange("What does the heron eat?", "Fish."),
                           exchange("Who are you?", "A lantern."))
        fits = m.recall(memory, "so where does a heron sleep", random.Random(0))
        self.assertEqual(fits[0].answer, "By the mill.")
        self.assertEqual([f.score for f in fits if f.answer == "A lantern." and f.score > 0.0], [])
        memory = memory_of(*ENGLISH, *(exchange(line + "?", "yes") for line in ENGLISH))
        memory.add_entry("chat", passage("the moon rises over the sea"))
        rng = random.Random(2)
        words = [word for line in ENGLISH for word in line.split()] + ["moon", "?", "walrus", "''"]
        some = (m.recall(memory, " ".join(rng.choices(words, k=rng.randint(1, 8))), rng)
                for _ in range(100))
        for fits in (fits, *some):
            scores = [round(fit.score, 2) for fit in fits]
            self.assertTrue(all(0.0 <= score <= 1.0 for score in scores), scores)
            self.assertEqual(scores, sorted(scores, reverse=True))

    def test_one_rare_word_decides_over_several_common_ones(self):
        common = [exchange(f"do you know what the {i} is about?", f"no {i}") for i in range(30)]
        memory = memory_of(*common, exchange("tell me of quasars", "They are far."))
        self.assertEqual(self.best(memory, "do you know quasars?").answer, "They are far.")

    def test_of_an_exchange_only_answers_are_said_and_only_questions_matched(self):
        memory = memory_of(exchange("good morning", "the walrus wakes") + "\n"
                           + exchange("and then?", "the walrus dives"))
        self.assertEqual(self.best(memory, "good morning").answer, "the walrus wakes")
        self.assertEqual(self.best(memory, "and then").answer, "the walrus dives")
        fits = m.recall(memory, "walrus", random.Random(0))
        self.assertEqual([fit.score for fit in fits if fit.score > 0], [])
        for texts, asked, said in (
                (["H: are you a heron\nH: or a crane\nA: neither"], "are you a heron", {"neither"}),
                (["H: hello heron", "A: a heron answers nobody"], "hello heron", set())):
            fits = m.recall(memory_of(*texts), asked, random.Random(0))
            self.assertEqual({fit.answer for fit in fits}, said)

    def test_a_plain_line_may_be_said_but_weighs_less_than_an_exchange(self):
        memory = memory_of("Herons eat fish.\nCranes eat seeds.",
                           exchange("Cranes eat seeds.", "Quite so."))
        self.assertEqual(self.best(memory, "do herons eat fish?").answer, "Yes. Herons eat fish.")
        self.assertEqual(self.best(memory, "cranes eat seeds").answer, "Quite so.")

    def test_what_was_told_or_taught_in_any_of_its_lines_is_offered_to_questions_only(self):
        for source in m.TOLD:
            memory = memory_of("my boat is called Plover\nit lies in the harbour", source=source)
            self.assertIn("Your boat is called Plover.",
                          self.best(memory, "what is my boat called?").answer)
            self.assertIn("harbour", self.best(memory, "what lies in the harbour?").answer)
            self.assertEqual(m.recall(memory, "my boat is called Plover", random.Random(0)), [])

    def test_a_search_finds_every_kind_of_entry_the_owners_first(self):
        memory = memory_of("a heron by the mill", exchange("heron?", "a bird"))
        memory.add_entry("chat", passage("I saw a heron"), recall=True)
        memory.add_entry("chat", passage("nothing of the kind"))
        found = [entry.text.strip() for entry in m.search(memory, "heron mill")]
        self.assertEqual(found, ["I saw a heron", "a heron by the mill", "H: heron?\nA: a bird"])
        self.assertEqual(len(m.search(memory, "heron mill", 2)), 2)
        self.assertEqual(m.search(memory, ""), [])

    def test_nothing_fits_an_empty_memory_or_a_text_without_words(self):
        for texts, asked in (((), "hello"), (ENGLISH, ""), (ENGLISH, "?!"), (ENGLISH, "   ")):
            self.assertEqual(m.recall(memory_of(*texts), asked, random.Random(0)), [])

    def test_the_same_seed_gives_the_same_order_and_equals_take_turns(self):
        memory = memory_of(*(exchange("hello", f"answer {i}") for i in range(6)))
        orders, again = ([[fit.answer for fit in m.recall(memory, "hello", random.Random(seed))]
                          for seed in range(20)] for _ in range(2))
        self.assertEqual(orders, again)
        self.assertGreater(len({order[0] for order in orders}), 1)


class ScriptedModel:
    """Stands in for a GPT: however it is asked, it wants to say a given row of ids."""

    vocab_size, engine = m.FIRST_MERGE, None

    def __init__(self, ids):
        self.script, self.fed, self.caches = list(ids), [], []

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

    def test_of_an_overlong_text_the_prompt_has_the_end(self):
        text = "x" * 500 + " the end?"
        for budget in (8, 20, 72):
            start, *ids = m.prompt_ids(self.tokenizer, [("owner", "before")], text, budget)
            shown = self.tokenizer.decode(ids)
            self.assertTrue(f"H: {text}\nA:".endswith(shown))
            self.assertEqual((start, len(shown)), (m.END_OF_TEXT, budget - 1))

    def say(self, ids, free_tokens=0, **settings):
        """Return the pieces spoken by a model that wants to say ids, and the model."""
        if isinstance(ids, str):
            ids = self.tokenizer.encode(ids)
        model = ScriptedModel(ids)
        config = m.Config(temperature=0.0, samplers="temperature", **settings)
        prompt = self.tokenizer.encode("H: hello\nA:")
        return list(m.spoken(model, self.tokenizer, prompt, config, random.Random(0),
                             free_tokens=free_tokens)), model

    def test_it_stops_at_the_line_feed_the_end_of_text_or_after_max_gen_tokens(self):
        stopped = [*self.tokenizer.encode("yes"), m.END_OF_TEXT, 70, 71]
        for ids, settings, said, fed in ((" good day\nH: and more", {}, " good day", 10),
                                         (stopped, {}, "yes", 4),
                                         ("abcdefgh", {"max_gen_tokens": 3}, "abc", 3)):
            pieces, model = self.say(ids, **settings)
            self.assertEqual(("".join(pieces), len(model.fed)), (said, fed))

    def test_the_end_of_text_is_no_first_word(self):
        pieces, model = self.say([m.END_OF_TEXT, *self.tokenizer.encode("x\n")])
        self.assertEqual(len(model.fed), 3)  # something else was said first, then the x
        self.assertNotIn("<|endoftext|>", "".join(pieces))
        self.assertTrue("".join(pieces).endswith("x"))

    def test_pieces_are_never_empty_nor_half_a_character_unless_it_was_cut_short(self):
        pieces, _ = self.say("aé你\N{GRINNING FACE}z\n")
        self.assertEqual(pieces, ["a", "é", "你", "\N{GRINNING FACE}", "z"])
        pieces, _ = self.say([*self.tokenizer.encode("a你")[:-1], m.END_OF_TEXT])
        self.assertEqual("".join(pieces), "a\ufffd")

    def test_nothing_is_fed_ahead_of_the_listener_and_each_reply_has_a_cache_of_its_own(self):
        model = ScriptedModel(self.tokenizer.encode("ab\n"))
        for _ in range(2):
            model.fed.clear()
            stream = m.spoken(model, self.tokenizer, [0], m.Config(temperature=0.0),
                              random.Random(0))
            self.assertEqual((next(stream), model.fed), ("a", [[0]]))
            self.assertEqual((next(stream), model.fed), ("b", [[0], self.tokenizer.encode("a")]))
        self.assertEqual(len(model.caches), 2)

    def test_free_text_goes_on_through_the_ends_of_lines_and_texts(self):
        script = [m.END_OF_TEXT, *self.tokenizer.encode("a\nb"), m.END_OF_TEXT, 99, 99]
        pieces, model = self.say(script, free_tokens=6)
        self.assertEqual(("".join(pieces), len(model.fed)), ("\na\nb\nb", 6))

    def test_a_reply_may_be_cut_after_each_of_its_sentences(self):
        for text, *cut in (("I am 3.5 years old. Are you? yes", "I am 3.5 years old.",
                            "I am 3.5 years old. Are you?"), ("你好。再见！", "你好。", "你好。再见！"),
                           ("Ask Dr. Moss. Now.", "Ask Dr. Moss.", "Ask Dr. Moss. Now."),
                           ("Go on. Say yes or no.", "Go on.", "Go on. Say yes or no."),
                           ("no end", "no end")):
            self.assertEqual(m.beginnings(text), cut)

    def test_what_goes_round_in_circles_or_has_no_end_or_strange_words_is_worth_less(self):
        known = set("i am sorry that you are tired".split()).__contains__
        self.assertEqual(m.form_of("I am sorry that you are tired.", known), 0.0)
        for worse in ("I am sorry that you are", "I am sorry that I am sorry that you are.",
                      "I am sorried that you are tired."):
            self.assertGreater(m.form_of(worse, known), 0.0, worse)


class Silence(unittest.TestCase):
    """With nothing to say it acknowledges, in the language of what was said, where it knows it."""

    def test_it_keeps_hears_kindly_refuses_or_does_not_know_what_is_said_in_four_languages(self):
        for text, echo, *said in (
                ("My lamp is called Quartz.", "Your lamp is called Quartz. ", *m.SILENCE["kept"]),
                ("What is my lamp called?", "", m.UNKNOWN_REPLY),
                ("Mein Hund heißt Rex.", "", "Ich merke es mir."),
                ("Wo ist mein Hund?", "", "Das weiß ich noch nicht."),
                ("¿Cómo se llama mi perro?", "", "Eso no lo sé todavía."),
                ("Où est mon chien ?", "", "Je ne le sais pas encore."),
                ("write me a letter to the mayor", "", *m.SILENCE["cannot"]),
                ("Could you help me with my taxes?", "", *m.SILENCE["cannot"]),
                ("Kindly compose a verse on turnips", "", *m.SILENCE["cannot"]),
                ("The bus left without me and then it rained all the way.", "",
                 *m.SILENCE["heard"]),
                ("Where did I put my keys?", "", *m.UNKNOWN_REPLIES),
                ("We buried him on Monday, and nobody spoke.", "", *m.SILENCE["sad"]),
                ("I won the race, and my sister jumped for joy.", "", *m.SILENCE["glad"]),
                ("How do you make friends in a new town?", "", *m.SILENCE["guess"]),
                ("My chest hurts, should I be worried?", "", *m.SILENCE["worry"]),
                ("Will it rain on the parade?", "", *m.SILENCE["guess"] + m.UNKNOWN_REPLIES),
                ("Are you older than my cat?", "", *m.SILENCE["self"])):
            self.assertIn(m.silence(text), [echo + words for words in said])

    def test_what_has_no_words_has_a_reply_all_the_same(self):
        for text in ("", "?", "...", ":)", "!!!", "  ",
                     "how much do i owe Rufus I agreed to it. anyway"):  # asks as a whole
            self.assertTrue(m.silence(text).strip(), text)

    def test_what_is_said_back_is_a_whole_sentence_turned_round_or_nothing(self):
        lex = m.lexicon()
        for text, echo in (
                ("my brother got the bigger room and its not fair, im older than him",
                 "Your brother got the bigger room."),
                ("I ran into my old teacher at the pool, and neither of us knew where to look.",
                 "You ran into your old teacher at the pool."),
                ("Ugh, my nose is blocked", ""),  # not its first clause
                ("Dinner with my cousins in the new place by the river", ""),  # no verb
                ("Well, three hours of that", ""), ("Write me a verse, please.", ""),
                ("Is it raining where you are?", ""), ("", "")):
            self.assertEqual(m.echo_of(lex, text), echo)

    def test_it_varies_and_says_nothing_that_was_rejected(self):
        said = {m.UNKNOWN_REPLY}
        self.assertIn(m.silence("What is my lamp called?", (), said), m.UNKNOWN_REPLIES[1:])
        rejected = {m.rejection("What is my lamp called?", m.UNKNOWN_REPLY)}
        self.assertIn(m.silence("What is my lamp called?", rejected), m.UNKNOWN_REPLIES[1:])
        first = m.silence("We walked by the river and then we sat down for a while.")
        again = m.silence("They opened a bakery and then they closed it for good.", (), {first})
        self.assertNotEqual(first.split(". ")[-1], again.split(". ")[-1])


class Hearing(unittest.TestCase):
    """A message is heard as a whole and clause by clause."""

    def test_what_fits_the_whole_and_a_clause_stands_once_and_where_it_fits_best(self):
        with contextlib.closing(memory_of(
                exchange("my exam is tomorrow", "Sleep well before it."),
                exchange("the bus was late again", "Was it very late?"),
                exchange("late for my exam tomorrow", "Then run."),
                exchange("again late", "So it goes."))) as memory:
            keys = {entry.text: entry.key for entry in memory.entries()}
            def like(text):  # all that was said to it, by how many words it shares
                words = set(text.replace(",", "").split())
                return [(len(words & set(said.split()[1:])) / 8.0, key, 0)
                        for said, key in keys.items()]
            for text in ("the bus was late again, and my exam is tomorrow",
                         "my exam is tomorrow, and the bus was late again"):
                fits = m.recall(memory, text, random.Random(1), like=like)
                scores = [round(fit.score, 2) for fit in fits]
                self.assertEqual(scores, sorted(scores, reverse=True))
                self.assertEqual([fit.answer for fit in fits].count("Then run."), 1)
                self.assertEqual({fit.answer for fit in fits[:2]},
                                 {"Sleep well before it.", "Was it very late?"})

    def test_before_it_has_sentence_vectors_it_hears_clauses_by_their_words(self):
        with contextlib.closing(memory_of(
                exchange("I burned the caramel", "It turns in the second one looks away."),
                exchange("is the third batch of glass dear", "That I cannot know."),
                *(exchange(f"the mill has {count} wheels", "So many wheels!")
                  for count in ("two", "three", "four", "five")))) as memory:
            for text in ("I burned the caramel twice, but the third batch came out like glass",
                         "The mill is shut today. I burned the caramel"):
                fit = m.recall(memory, text, random.Random(1))[0]
                self.assertEqual(fit.answer, "It turns in the second one looks away.")
                self.assertLess(fit.score, 1.0)  # it answers a part of what was said


class Turns(unittest.TestCase):
    """A turn says what it knows, or that it does not, and from where it has it."""

    EXCHANGES = (exchange("tell me a joke", "A snail went home."),
                 exchange("tell me another joke", "A book went to bed."),
                 exchange("Where is the key?", "The key is in the barn."),
                 exchange("Where is the other key?", "The key hangs by the door."))

    def setUp(self):
        self.memory = memory_of(*self.EXCHANGES)
        self.addCleanup(self.memory.close)
        self.memory.add_entry("taught", passage("My cat is called Biscuit."))
        self.session = self.memory.session_id("main")

    def turn(self, text, trusted=True, **settings):
        """Return a turn that is through; its model is newborn, and trusted all the same."""
        config = m.Config(**{"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 64,
                             "max_gen_tokens": 12, **settings})
        tokenizer, engine = m.EvolvingTokenizer(), m.choose_engine("python")
        model = m.GPT(m.Shape.of(config), tokenizer.vocab_size, engine, random.Random(1))
        mind = m.Mind(config, tokenizer, model, m.NgramMemory(3), m.Mixer(3), 2.0, trusted)
        turn = m.Turn(self.memory, mind, text, self.session, random.Random(1))
        turn.said_text = "".join(turn.answer())
        return turn

    def test_what_was_told_is_said_by_the_memory_and_names_its_entry(self):
        for trusted in (False, True):
            turn = self.turn("what is the name of my cat?", trusted)
            self.assertEqual(turn.said_text, "Your cat is called Biscuit.")
            self.assertEqual((turn.reply.source, turn.reply.entry.text),
                             ("memory", "My cat is called Biscuit.\n"))
            self.assertGreaterEqual(turn.reply.score, m.Config.recall_score)
            self.assertIsNone(turn.trace)

    def test_what_nobody_told_the_model_is_not_asked_for_however_bold_it_is(self):
        for text, said in (("where is my passport?", m.UNKNOWN_REPLIES),
                           ("My sister is called Olga.",
                            [f"Your sister is called Olga. {kept}" for kept in m.KEPT_REPLIES])):
            turn = self.turn(text, boldness=99.0)
            self.assertIn(turn.said_text, said)
            self.assertEqual((turn.reply.source, turn.reply.entry, turn.trace),
                             ("nothing", None, None))

    def test_until_it_is_trusted_the_best_exchange_speaks_or_nobody(self):
        for text, said, source in (
                ("a joke", ("A snail went home.", "A book went to bed."), "exchange"),
                ("well it rains on and on", m.SILENCE["heard"], "nothing")):
            turn = self.turn(text, trusted=False, boldness=99.0)
            self.assertIn(turn.said_text, said)
            self.assertEqual(turn.reply.source, source)

    def test_trusted_it_says_a_draft_of_its_own_and_can_tell_what_moved_each_token(self):
        turn = self.turn("well it rains on and on", boldness=99.0)
        self.assertEqual((turn.reply.source, turn.reply.entry), ("voice", None))
        drafted = m.EvolvingTokenizer().decode([said.token for said in turn.trace.tokens])
        self.assertTrue(m.tidied(drafted).strip().startswith(turn.said_text), drafted)
        alone = self.turn("well it rains on and on", boldness=99.0, mix=0)
        self.assertEqual((alone.reply.source, alone.trace), ("voice", None))
        timid = self.turn("well it rains on and on", boldness=0.0)
        self.assertEqual((timid.reply.source, timid.said_text in m.SILENCE["heard"]), ("nothing", True))

    def test_what_was_rejected_is_not_said_again_to_the_same(self):
        for text in ("well it rains on and on", "tell me a joke", "what is my cat called?"):
            first = self.turn(text, boldness=99.0).said_text
            self.memory.set_setting("rejected", [m.rejection(text, first)])
            self.assertNotEqual(self.turn(text, boldness=99.0).said_text, first)

    def test_small_talk_is_answered_in_another_way_when_it_comes_again_and_facts_are_not(self):
        for text, changes in (("tell me a joke", True), ("Where is the key?", False)):
            first = self.turn(text, boldness=99.0).said_text
            self.assertIn(exchange(text, first), self.EXCHANGES)
            self.memory.add_message(self.session, "owner", text)
            self.memory.add_message(self.session, "self", first)
            again = self.turn(text, boldness=99.0).said_text
            self.assertEqual(again != first, changes, again)

    def test_what_was_said_is_stored_first_and_a_reply_as_far_as_it_came(self):
        speaker = m.Speaker(lambda: m.Config(mix=0), self.memory, m.choose_engine("python"), True)
        stream = speaker.reply("what is my cat called?", self.session)
        first = next(stream)
        self.assertEqual(self.memory.newest_messages(self.session, 9),
                         [("owner", "what is my cat called?")])
        stream.close()
        self.assertEqual(self.memory.newest_messages(self.session, 1), [("self", first.strip())])
        self.assertEqual((speaker.turn.reply.text, speaker.turn.reply.source), ("Your", "memory"))
