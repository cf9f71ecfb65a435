"""Claims about sessions: what a prompt is made of, compaction, forgetting, and a new start."""
import itertools
import random
import unittest
from unittest import mock

import macrogpt as m
from support import Folder, entries_with, passage


def spoken(*pairs, verdict=0):
    """Return messages, owner and self in turn; None leaves one out."""
    texts = [text for pair in pairs for text in pair]
    return [m.Message(i, 1, ("owner", "self")[i % 2], text, float(i), verdict, m.KEPT)
            for i, text in enumerate(texts) if text is not None]


def entry(text, number=1):
    return m.Entry(number, "chat", number, text, 0.0, True, True, False, False)


class Prompts(unittest.TestCase):
    """With byte tokens, so that a token is a character."""

    def shown(self, summary=(), entries=(), turns=(), text="now?", budget=300):
        tokenizer = m.EvolvingTokenizer()
        ids = m.whole_prompt_ids(tokenizer, summary, entries, turns, text, budget)
        self.assertLessEqual(len(ids), budget)
        return "".join("|" if i == m.END_OF_TEXT else tokenizer.decode([i]) for i in ids)

    def test_an_entry_is_a_document_and_the_summary_begins_the_exchange_as_in_training(self):
        shown = self.shown(spoken(("I live in Tartu.", None), ("Is it far?", "No.")),
                           [entry("H: Hello.\nA: Hi.\n"), entry("The ferry is late.\n")],
                           [("owner", "hm"), ("self", "Yes?")])
        self.assertEqual(shown, "|The ferry is late.\n|H: Hello.\nA: Hi.\n|H: I live in Tartu.\n"
                                "H: Is it far?\nA: No.\nH: hm\nA: Yes?\nH: now?\nA:")

    def test_the_newest_exchange_goes_in_first_then_summary_and_entries_then_older_turns(self):
        summary, entries = spoken(("I am old.", None)), [entry("The ferry is late.\n")]
        turns = [("owner", "older"), ("self", "older too"), ("owner", "x" * 60), ("self", "y" * 60)]
        for budget in range(140, 260, 5):
            shown = self.shown(summary, entries, turns, budget=budget)
            self.assertIn(f"H: {'x' * 60}\nA: {'y' * 60}\nH: now?\nA:", shown)
        turns = [("owner" if i % 2 == 0 else "self", f"{i} " + "z" * 20) for i in range(40)]
        shown = self.shown(summary, entries, turns)
        for text in ("I am old.", "The ferry is late.", f"{turns[-3][1]}\n"):
            self.assertIn(text, shown)
        self.assertNotIn(f"{turns[0][1]}\n", shown)

    def test_summary_and_entries_are_each_sure_of_a_share_and_take_what_the_other_leaves(self):
        summary = spoken(*((f"My fact {i:2} is this.", None) for i in range(20)))
        entries = [entry(f"The entry {i:2} is this.\n", i) for i in range(20)]
        both = self.shown(summary, entries)
        one, other = self.shown(summary), self.shown(entries=entries)
        for shown, word, least in ((both, "fact", 3), (both, "entry", 3), (one, "fact", 7),
                                   (other, "entry", 7)):
            self.assertGreaterEqual(shown.count(word), least)
        self.assertIn("fact 19", both, "of a summary the newest")
        self.assertIn("entry  0", both, "of entries the best")
        self.assertEqual(self.shown(entries=[entry("Tea.\n"), entry("Tea.\n")]).count("Tea"), 1)

    def test_the_budget_is_never_exceeded_and_counted_in_real_tokens(self):
        rng = random.Random(5)
        tokenizer = m.EvolvingTokenizer()
        tokenizer.learn_merges(["the heron sleeps by the mill and the crane does not"] * 9, 40)
        words = ["heron", "ü", "你好", "\N{GRINNING FACE}", "the mill", "\n", "", "A:", "H: x"]

        def some(most):
            return " ".join(rng.choices(words, k=rng.randint(0, most)))
        for _ in range(300):
            budget = rng.randint(8, 120)
            ids = m.whole_prompt_ids(
                tokenizer, spoken(*((some(9), rng.choice([None, some(9)])) for _ in range(4))),
                [entry(some(9) + "\n") for _ in range(3)],
                [(rng.choice(("owner", "self")), some(6)) for _ in range(rng.randint(0, 8))],
                some(rng.choice((3, 60))), budget)
            self.assertLessEqual(len(ids), budget)
            self.assertEqual(ids[0], m.END_OF_TEXT)


class Summaries(unittest.TestCase):
    def setUp(self):
        self.memory = m.Memory(":memory:")
        self.addCleanup(self.memory.close)
        for i in range(40):
            self.memory.add_entry("corpus", passage(f"so it is what you do and that is {i}"))

    def summed(self, *pairs, chars=30, verdict=0):
        parts = m.summary_of(self.memory, m.exchanges_of(spoken(*pairs, verdict=verdict)), chars)
        return [[x.text for x in part] for part in parts]

    def test_what_tells_most_is_kept_rare_words_and_statements_before_questions(self):
        talk = [("so that is what it is", "Yes."), ("The ferryman hid a ruby", "I see."),
                ("and what you do is so", "Yes.")]
        for order in itertools.permutations(talk):
            self.assertEqual(self.summed(*order), [["The ferryman hid a ruby"]])
        self.assertEqual(self.summed(("A heron nests here.", "Oh."), ("Any ruby hid?", "Zinc!")),
                         [["A heron nests here."]])
        fact = "The ferryman hid a ruby by the mill in Ghent"  # not crowded out by short talk
        self.assertEqual(self.summed(("hm well", "Oh."), (fact, "Oh."), chars=50), [[fact]])

    def test_a_question_stays_with_its_answer_and_means_nothing_without_one(self):
        asked = ("Where is the heron?", "At the mill.")
        self.assertEqual(self.summed(asked, chars=60), [list(asked)])
        self.assertEqual(self.summed(asked, chars=60, verdict=-1), [])
        for answer in (m.UNKNOWN_REPLY, None):
            self.assertEqual(self.summed((asked[0], answer), chars=60), [])

    def test_what_is_hardly_a_word_tells_nothing_and_of_two_alike_the_newer_is_kept(self):
        self.assertEqual(self.summed(("hm", "Yes."), ("ok.", "Yes.")), [])
        self.assertEqual(self.summed(("我住塔林", "Yes.")), [["我住塔林"]])
        ghent, delft = "The ruby is in Ghent", "The ruby is in Delft"
        self.assertEqual(self.summed((ghent, "Oh."), (delft, "Oh.")), [[delft]])

    def test_it_never_grows_beyond_its_room_and_a_longer_statement_is_cut(self):
        rng, told = random.Random(2), "The heron hid a ruby by the mill " * 40
        pairs = [(" ".join(rng.choices(["ruby", "heron", "mill", "Ghent", "zinc", "so"], k=6))
                  + f" {i}" + rng.choice("?."), f"answer {i}") for i in range(250)]
        for chars in (8, 16, 48, 200):
            self.assertEqual(self.summed((told, "Oh."), chars=chars), [[told]])
            part = m.exchange_text(spoken((told, None)), chars)
            self.assertLessEqual(len(part), chars + len("H: \n"))
            parts = m.summary_of(self.memory, m.exchanges_of(spoken(*pairs)), chars)
            self.assertTrue(parts)
            self.assertLessEqual(sum(len(m.exchange_text(p, chars)) for p in parts), chars + 8)


class Talk(unittest.TestCase):
    """An organism in memory alone, whose replies are made up."""

    def setUp(self):
        self.now = 1000.0
        self.memory = m.Memory(":memory:", lambda: self.now)
        self.addCleanup(self.memory.close)
        self.answers = lambda turn: f"Well, {len(turn.text)}."
        answers = mock.patch.object(m.Turn, "answer", lambda turn: iter([self.answers(turn)]))
        answers.start()
        self.addCleanup(answers.stop)
        self.being = m.Organism(m.Config(), self.memory, m.interpreted_engine(), "main")
        self.session = self.memory.session_id("main")

    def say(self, *texts):
        for text in texts:
            self.now += 60.0
            "".join(self.being.reply(text))

    def in_prompt(self, stage=m.HEARD):
        """Return the texts of the prompt's messages that have come to a stage."""
        return [message.text for message in self.memory.prompt_messages(self.session)
                if message.stage >= stage]

    def crashed(self, text, session="main"):
        """Leave a message that a crash kept from being taken in."""
        self.memory.add_message(self.memory.session_id(session), "owner", text)

    def test_compacted_by_itself_and_when_told_it_meets_no_turn_again_and_every_word_stays(self):
        told, met = [f"The number {i} boat is called {i * 7919 % 1000}." for i in range(120)], []
        self.answers = lambda turn: met.append(turn.turns) or "Yes."
        budget = self.being.mind().prompt_budget
        for i, text in enumerate(told):
            summary = {*self.in_prompt(m.SUMMED)}
            self.say(text)
            turns = [words for _, words in met[-1] if words != "Yes."]
            self.assertEqual(turns, told[i - len(turns):i])
            self.assertEqual((bool(turns), {*turns} & summary), (i > 0, set()))
            if i % 7 == 0:
                self.being.compact()
            self.assertLessEqual(len(self.in_prompt()), 8)
            parts = m.summary_texts([x for x in self.memory.prompt_messages(self.session)
                                     if x.stage == m.SUMMED], budget)
            self.assertLessEqual(len("".join(parts)), budget // m.SHARE * m.CHARS_A_TOKEN + 8)
            self.assertEqual(i > 0, bool(parts))
        said = self.memory.newest_messages(self.session, 1000)
        self.assertEqual([text for role, text in said if role == "owner"], told)
        self.assertEqual(len(said), 240)
        self.assertEqual([e.text.strip() for e in self.memory.entries()], told)
        for asked in ("757", "Could you perhaps tell whether any 999 or 757 boat lies about?"):
            self.assertIn("called 757.", " ".join(e.text for e in m.search(self.memory, asked)))

    def test_it_can_be_compacted_ever_again_and_sums_up_no_newest_turn_and_dates_no_fact_anew(self):
        self.assertEqual((self.being.compact()[0], self.in_prompt()), (0, []))
        self.say("The ferry leaves at seven.", "The ferry leaves at nine.")
        old = [(e.text, e.told_at) for e in self.memory.entries()]
        for i in range(4):
            self.say(f"The {i} heron eats.", "The ferry leaves at nine, really.", "x" * 3000)
            self.assertEqual(self.in_prompt()[-2:], ["x" * 3000, "Well, 3000."])
            self.being.compact()
            self.assertEqual(self.in_prompt()[-2:], ["x" * 3000, "Well, 3000."])
            self.assertTrue(self.in_prompt(m.SUMMED))
        self.assertEqual([(e.text, e.told_at) for e in self.memory.entries()][:2], old)
        before = self.in_prompt()
        for _ in range(3):
            self.assertEqual((self.being.compact()[0], self.in_prompt()), (0, before))

    def test_what_a_crash_left_in_any_session_is_known_later_dated_when_it_was_said(self):
        self.crashed("The ferry leaves at seven.", "old")
        self.crashed("The ferry leaves at eight.")
        self.memory.add_entry("chat", passage("The ferry leaves at eight."), told_at=1400.0)
        self.now += 500.0
        self.say("The ferry leaves at nine.")
        self.crashed("The ferry leaves at ten.")
        self.being.compact()
        self.assertEqual(
            {e.text.split()[-1]: e.told_at for e in self.memory.entries()},
            {"seven.": 1000.0, "eight.": 1400.0, "nine.": 1560.0, "ten.": 1560.0})

    def test_a_compaction_broken_off_anywhere_leaves_the_session_as_it_was_never_half(self):
        self.say("The heron eats.", "The crane sleeps.")
        self.crashed("The owl hid a ruby.")

        def state():
            return self.in_prompt(), self.in_prompt(m.SUMMED), self.memory.heard_messages(), (
                self.memory.counts())
        before = state()
        for name, good in (("add_entry", 0), *(("advance_messages", good) for good in range(3))):
            steps = [mock.DEFAULT] * good + [m.StoreError("full")]
            with mock.patch.object(self.memory, name, wraps=getattr(self.memory, name),
                                   side_effect=steps), self.assertRaises(m.StoreError):
                self.being.compact()
            self.assertEqual(state(), before)
        self.being.compact()
        self.assertEqual((self.memory.heard_messages(), self.memory.entry_count()), ([], 3))

    def test_what_is_forgotten_is_gone_from_summaries_and_turns_and_never_comes_back(self):
        fact = "The heron hid a ruby."
        self.say(fact, "hm", "The crane eats.", "The heron's ruby is red, isn't it?")
        self.being.compact()
        self.assertIn(fact, self.in_prompt(m.SUMMED))
        self.crashed(fact)
        self.assertIn("forgotten", m.forget(self.memory, fact))
        for i in range(6):
            self.assertNotIn("ruby", " ".join(self.in_prompt()))
            self.assertFalse(self.memory.entries("e.text = ?", fact + "\n"))
            self.say(f"so {i}")
            self.being.compact()
        self.assertTrue(self.in_prompt())

    def test_replies_that_repeat_what_is_forgotten_approved_or_taught_do_not_bring_it_back(self):
        self.say("The crane eats.")
        self.answers = lambda turn: "Your cat is called Biscuit, I think."
        self.say("My cat is called Biscuit.", "What is my cat called?")
        self.being.judge(True)
        self.answers = lambda turn: "Your dog is called Rex."
        self.say("What is my dog called?")
        self.being.judge(True)
        self.being.teach("My cat is called Biscuit.")
        told = self.memory.entries("e.text LIKE 'My cat%'", limit=1)[0]
        self.assertIn("forgotten", m.forget(self.memory, str(told.id)))
        self.assertEqual([e.text for e in m.search(self.memory, "Biscuit")], [])
        self.assertEqual(len(m.search(self.memory, "Rex")), 1)
        self.assertNotIn("Biscuit", " ".join(self.in_prompt()))
        self.assertEqual(self.in_prompt()[0], "The crane eats.")
        self.assertEqual(len(self.memory.newest_messages(self.session, 99)), 5)


class Chats(Folder):
    def test_told_compacted_and_left_behind_by_new_it_still_answers_until_it_is_forgotten(self):
        fact, asked = "The ferryman's parrot is called Zephyrine.", "What is the parrot called?"
        def chat(*lines, session="main"):
            return self.chat(*lines, args=("--no-train", "--session", session))
        for session in ("main", "../../x"):
            said = chat("/compact", fact, "Copper pots are heavy.", "/compact", "/compact",
                        session=session)
            self.assertIn("empty", said[0])
            self.assertIn("H: The ferryman's", said[3])
            self.assertIn("no turns", said[4])
        [again, _, clean, _] = chat("/compact", "/new", "/compact", "Otters swim.")
        self.assertEqual(again.partition(";")[2], said[4].partition(";")[2])
        self.assertIn("empty", clean)
        self.assertIn("Otters", "".join(chat("hm", "/compact", session="talk 1")))
        self.assertNotIn("Otters", "".join(chat("hm", "/compact")))
        self.assertIn("Zephyrine", chat(asked, session="talk 1")[0])
        self.assertIn("forgotten", chat(f"/forget {fact}", session="talk 1")[0])
        for session in ("main", "talk 1"):
            said = chat(asked, "hm", "/compact", "/compact", session=session)
            self.assertNotIn("Zephyrine", " ".join(said))
