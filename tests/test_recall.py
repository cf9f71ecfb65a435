"""Claims about what is told, asked for in other words, never told, and small talk.

The sentences are in recall_cases.txt: facts with questions, questions about what nobody told,
ordinary talk, and facts that change. Thresholds lie a little under what was measured.
"""
import contextlib
import functools
import os
import random
import statistics
import sys
import time
import unittest

import macrogpt as m
from support import ROOT, Folder


def groups():
    """Return the cases: groups of (tag, fields)."""
    found = []
    with open(os.path.join(ROOT, "tests", "recall_cases.txt"), encoding="utf-8") as file:
        for line in file:
            if line.startswith("G "):
                found.append([])
            elif line[0] != "#":
                found[-1].append((line[0], [part.strip() for part in line[2:].split("|")]))
    return found


class Undone(Exception):
    """Rolls back what was told for one case."""


class Clock:
    """A clock that ticks once a look."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        self.now += 1.0
        return self.now


@functools.lru_cache(maxsize=None)
def well_read():
    """Return the one memory that has read the project's corpus, to be copied."""
    memory = m.Memory(":memory:", Clock())
    with memory.transaction():
        for document in m.read_corpus(os.path.join(ROOT, "nonames.txt")).documents:
            memory.add_entry("corpus", document)
    for end in (well_read.cache_clear, memory.close):
        unittest.addModuleCleanup(end)
    return memory


def memory_of(*told, source="chat"):
    """Return a memory that has read the project's corpus and was then told the sentences."""
    memory = m.Memory(":memory:", Clock(well_read().clock()))
    well_read()._db.backup(memory._db)
    with memory.transaction():
        for text in told:
            memory.add_entry(source, m.Document((text,), True))
    return memory


def answer(memory, text):
    """Return what memory answers by itself, or None."""
    return m.recollection(memory, text, random.Random(0), m.Config.recall_score)[0]


def is_a_fact(fit):
    """Return whether an answer is a told or written statement, not a turn of an exchange."""
    return fit is not None and not m.is_exchange(fit.entry)


class Remembering(unittest.TestCase):
    """Every group is told to a memory of its own, beside the project's corpus."""

    @classmethod
    def setUpClass(cls):
        cls.groups = [(memory_of(*(fields[0] for tag, fields in cases if tag == "F")), cases)
                      for cases in groups()]

    @classmethod
    def tearDownClass(cls):
        for memory, _ in cls.groups:
            memory.close()

    def cases(self, tag):
        """Yield (memory, fields) of every case with that tag."""
        for memory, cases in self.groups:
            for own, fields in cases:
                if own == tag:
                    yield memory, fields

    def questions(self):
        """Yield (memory, what a right answer holds, question)."""
        for memory, cases in self.groups:
            for tag, fields in cases:
                if tag == "F":
                    key = fields[1].lower()
                elif tag == "Q":
                    yield memory, key, fields[0]

    def reach(self, least, rows):
        """Assert that at least such a share of the (passed, what) rows passed."""
        failed = [what for passed, what in rows if not passed]
        self.assertGreaterEqual(1.0 - len(failed) / len(rows), least, "\n".join(failed))

    def test_what_was_told_is_answered_in_other_words(self):
        self.reach(0.92, [(fit is not None and key in fit.answer.lower(),
                           f"{asked} -> {fit and fit.answer}")
                          for memory, key, asked in list(self.questions())[::2]
                          for fit in [answer(memory, asked)]])

    def test_without_full_text_search_as_well(self):
        memory, cases = self.groups[0]
        self.addCleanup(setattr, memory, "has_fts", memory.has_fts)
        memory.has_fts = False
        rows = [row for row in self.questions() if row[0] is memory]
        self.reach(0.9, [(fit is not None and key in fit.answer.lower(), asked)
                         for _, key, asked in rows[::8] for fit in [answer(memory, asked)]])

    def test_what_was_never_told_is_not_answered_with_something_else(self):
        self.reach(0.94, [(not is_a_fact(fit), f"{asked} -> {fit and fit.answer}")
                          for memory, (asked,) in list(self.cases("U"))[::2]
                          for fit in [answer(memory, asked)]])

    def test_ordinary_talk_is_never_answered_with_a_fact(self):
        for memory, (text,) in self.cases("T"):
            fit = answer(memory, text)
            self.assertFalse(is_a_fact(fit), f"{text} -> {fit and fit.answer}")

    def test_facts_are_told_from_ordinary_talk(self):
        self.reach(0.95, [(not m.states_a_fact(text), text) for _, (text,) in self.cases("T")])
        self.reach(0.85, [(m.states_a_fact(fact), fact) for _, (fact, _) in self.cases("F")])

    def test_the_newest_of_what_was_told_is_given(self):
        memory = memory_of()
        self.addCleanup(memory.close)
        for _, (old, new, asked, key) in self.cases("C"):
            with contextlib.suppress(Undone), memory.transaction():
                for text in (old, "The moon is full.", new):
                    memory.add_entry("chat", m.Document((text,), True))
                fit = answer(memory, asked)
                self.assertIn(key, fit.answer if fit else "", asked)
                raise Undone

    def test_a_question_of_yes_or_no_is_answered_so(self):
        memory = memory_of()
        self.addCleanup(memory.close)
        for _, (told, asked, begins) in self.cases("Y"):
            with contextlib.suppress(Undone), memory.transaction():
                memory.add_entry("chat", m.Document((told,), True))
                fit = answer(memory, asked)
                self.assertTrue(fit and fit.answer.startswith(begins), f"{asked} -> {fit}")
                raise Undone

    def test_slips_of_the_finger_are_seen_through(self):
        memory = memory_of("My cat is called Biscuit.", "My umbrella is in the hall cupboard.",
                           "The wifi password is tulip42.", "My birthday is on 12 March.")
        for asked, key in (("whats teh name of my cta", "Biscuit"), ("wher is my umbrela", "hall"),
                           ("what is the wfii pasword", "tulip42"),
                           ("when is my brithday?", "March")):
            fit = answer(memory, asked)
            self.assertIn(key, fit.answer if fit else "", asked)
        self.assertFalse(is_a_fact(answer(memory, "What is my hrose called?")))
        memory.close()


class Telling(unittest.TestCase):
    """What may be left out of a statement that answers, and what may not."""

    @staticmethod
    def after(told, asked, source="chat"):
        memory = m.Memory(":memory:", Clock())
        with memory.transaction():
            memory.add_entry(source, m.Document(tuple(told.splitlines()), True))
        fit = answer(memory, asked)
        memory.close()
        return fit

    def known(self, told, asked, key, source="chat"):
        fit = self.after(told, asked, source)
        self.assertIn(key, fit.answer if fit else "", (told, asked))

    def unknown(self, told, asked, source="chat"):
        fit = self.after(told, asked, source)
        self.assertFalse(is_a_fact(fit), (told, asked, fit))

    def test_the_opposite_of_what_is_asked_is_no_answer(self):
        told = "The chemist opens at eight."
        self.known(told, "When does the chemist open?", "eight")
        self.unknown(told, "When does the chemist close?")
        self.known("The chemist closes at six.", "Until when is the chemist open?", "six")

    def test_an_aside_may_be_missing_unless_another_stands_in_its_place(self):
        self.known("My tax number is 4471.", "I need my tax number for a letter, what is it?", "4471")
        told = "The password of the radio at the lodge is fern9."
        self.known(told, "What is the password of the radio at the lodge?", "fern9")
        self.unknown(told, "What is the password of the radio at the school?")

    def test_who_does_a_thing_is_named_by_it(self):
        self.known("Ottilie painted the big portrait.", "Who is the painter of the portrait?",
                   "Ottilie")
        self.unknown("The garden sleeps in winter.", "When does the gardener come?")

    def test_how_many_asks_for_a_count_of_just_that(self):
        self.known("I have three nieces.", "How many nieces do I have?", "three")
        self.unknown("I feed my hens at six.", "How many hens do I feed?")

    def test_a_question_may_stand_behind_a_comma(self):
        self.assertTrue(m.asks("my library card, when does it expire"))
        self.assertFalse(m.asks("I met Anna, who is my boss"))
        self.known("My library card runs out in June.", "my library card, when does it expire", "June")

    def test_a_roundabout_way_of_asking_asks_the_same(self):
        for asked in ("What is it that I am allergic to?", "what was it that I am allergic to"):
            self.known("I am allergic to celery.", asked, "celery")
        self.known("I was born in Graz.", "What is the name of the town where I was born?", "Graz")

    def test_a_list_of_lines_is_a_list_of_facts_and_a_tale_is_a_tale(self):
        notes = ("The kiln is fired on Mondays.\nThe glazes stand in the cold room.\n"
                 "Irma keeps the wheel.\nThe clay comes from Delft.")
        self.known(notes, "On which day do we fire the kiln?", "Monday", "corpus")
        self.known(notes, "Where does our clay come from?", "Delft", "corpus")
        tale = ("The clay lay in the rain.\nThen it dreamed of Delft.\nIt woke on Monday.\n"
                "So they fired the kiln.")
        self.unknown(tale, "When do we fire the kiln?", "corpus")

    def test_each_of_a_list_of_questions_and_answers_stands_for_itself(self):
        notes = ("H: Who tunes the organ?\nA: Ruben tunes it.\nH: Where is the crypt key?\n"
                 "A: On the nail behind the font.")
        self.known(notes, "In which place do I find the key of the crypt?", "font", "corpus")
        self.known(notes, "Who is it that tunes the organ?", "Ruben", "corpus")

    def test_a_question_and_its_answer_say_a_thing_together(self):
        notes = "H: Who minds the hives?\nA: Odile."
        self.known(notes, "Which person minds the hives?", "Odile", "corpus")
        self.unknown(notes, "Where are the hives?", "corpus")

    def test_a_slot_is_filled_by_what_is_of_its_kind(self):
        self.unknown("The crossing takes 35 minutes.", "How much does the crossing cost?")
        self.unknown("Four geese live on the lake.", "How deep is the lake?")
        self.known("The lake is forty metres deep.", "What is the depth of the lake?", "forty")
        self.unknown("My cousin Odile is getting married in Verona.", "Who is Odile marrying?")
        self.known("The bell was given by the guild.", "Who donated the bell?", "guild")
        self.unknown("Our loft is full since 2011.", "How many rooms has the loft?")

    def test_another_of_its_kind_is_not_what_was_asked_for(self):
        self.unknown("I broke my left arm in a race.", "Which leg did I break?")
        self.unknown("My favourite colour is teal.", "Which song do I like best?")
        self.unknown("My rabbit is called Clover.", "What does my rabbit like to eat?")
        self.unknown("My neighbour is called Ada.", "What is my other neighbour called?")
        self.known("I cannot stand parsley.", "Which herb can I not stand?", "parsley")


class Turning(unittest.TestCase):
    def test_the_owner_is_spoken_to(self):
        for told, said in (("My cat is called Biscuit.", "Your cat is called Biscuit."),
                           ("I am tired and I was ill", "You are tired and you were ill"),
                           ("I've lost my keys", "You have lost your keys"),
                           ("My wife and I met in Rome", "Your wife and you met in Rome"),
                           ("That book is mine", "That book is yours"),
                           ("We saw an old salt mine", "You saw an old salt mine"),
                           ("I taught myself", "You taught yourself"),
                           ("Your name is Mac", "My name is Mac"),
                           ("You are my friend", "I am your friend"),
                           ("Karl gave me your book", "Karl gave you my book"),
                           ("He was born in May", "He was born in May"),
                           ("I'll call you", "You will call me"),
                           ("The key is under the mat.", "The key is under the mat.")):
            self.assertEqual(m.turned(told), said)

    def test_opening_words_are_not_said_back(self):
        memory = memory_of()
        for told, said in (("No, my cat is called Muffin now.", "Your cat is called Muffin now."),
                           ("Remember that the key is under the mat", "The key is under the mat."),
                           ("Hi! My name is Ada and I live in Bern.", "Your name is Ada"),
                           ("by the way, my boss is Karl", "Your boss is Karl.")):
            entry = m.Entry(1, "chat", 1, told, 0.0, True, True, False, False)
            texts = m.statements_of(told)
            units = [m.Unit(entry, text, m.tokens_of(text)) for text in texts]
            self.assertTrue(any(m.said_back(u).startswith(said) for u in units), (told, texts))
        memory.close()


class Asking(unittest.TestCase):
    def test_a_question_is_one_without_its_mark_too(self):
        for text in ("what is my name", "tell me where I live", "do you know my birthday",
                     "whats my cat called", "remind me what my code is", "where did i park",
                     "in which city do I live", "can you tell me when I was born",
                     "is my cat black", "how old am i", "I forgot where I put my keys"):
            self.assertTrue(m.asks(text), text)

    def test_a_statement_or_a_wish_is_none(self):
        for text in ("tell me a joke", "I am tired", "what a nice day", "When I was young I sang.",
                     "My cat is called Biscuit.", "I forgot my umbrella at the office.",
                     "Remember that my code is 12.", "hello", "Have a nice day"):
            self.assertFalse(m.asks(text), text)


class Talking(Folder, unittest.TestCase):
    """The same through the whole program: told, closed, opened, asked."""

    def talk(self, *lines, apart=False):
        done = self.run_here("--no-train", stdin=("\n".join(lines) + "\n").encode(), apart=apart)
        self.assertEqual(done.returncode, 0, done.stderr)
        said = done.stdout.decode().splitlines()
        self.assertEqual(len(said), len(lines))
        return said

    def test_told_closed_opened_asked(self):
        told = self.talk("My cat is called Biscuit.", "/teach The wifi password is tulip42.",
                         "Hi! My name is Ada and I live in Bern.", "I have a dog named Rex.",
                         apart=True)
        self.assertEqual(told[0], m.KEPT_REPLY)
        asked = self.talk("What is the name of my cat?", "what's my cat called", "wifi password?",
                          "How do I call my cat?", "tell me where I live", "who am i",
                          "Do I have a dog?", "What is the name of my horse?", apart=True)
        self.assertEqual(asked, ["Your cat is called Biscuit.", "Your cat is called Biscuit.",
                                 "The wifi password is tulip42.", "Your cat is called Biscuit.",
                                 "You live in Bern.", "Your name is Ada.",
                                 "Yes. You have a dog named Rex.", m.UNKNOWN_REPLY])

    def test_written_into_the_corpus_it_is_known_too(self):
        self.write("nonames.txt", "The ferry leaves at nine.\nMy boat is called Plover.\n\n"
                                  "H: What is the code of the gate?\nA: The gate code is 4711.\n")
        self.assertEqual(self.talk("when does the ferry depart", "name of my boat?", "gate code?"),
                         ["The ferry leaves at nine.", "Your boat is called Plover.",
                          "The gate code is 4711."])

    def test_a_correction_in_short_is_understood(self):
        self.talk("The meeting with Laura is on Thursday.", "No, it is on Friday.",
                  "The ferry leaves at nine.", "No, at ten.")
        self.assertEqual(self.talk("When is the meeting with Laura?", "when does the ferry leave"),
                         ["The meeting with Laura is on Friday.", "The ferry leaves at ten."])

    def test_corrected_it_gives_the_newest(self):
        self.talk("My cat is called Biscuit.")
        self.talk("No, my cat is called Muffin now.")
        self.assertEqual(self.talk("What is my cat called?"), ["Your cat is called Muffin now."])

    def test_a_rejected_answer_is_not_given_again_to_the_same_question(self):
        first, _ = self.talk("Who are you?", "/bad")
        again, = self.talk("who are you")
        self.assertNotEqual(first, again)
        self.assertEqual(self.talk("Where does the heron sleep?"),
                         ["The heron sleeps beside the mill pond."])

    def test_a_rejected_fact_comes_back_when_it_is_approved(self):
        self.talk("My cat is called Biscuit.")
        said = self.talk("What is my cat called?", "/bad", "What is my cat called?")
        self.assertIn("Biscuit", said[0])
        self.assertNotIn("Biscuit", said[2])


def figures(unrelated=0):
    """Print the measures of each group, its memory grown by so many unrelated lines."""
    rng = random.Random(5)
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        words = file.read().split()
    for cases in groups():
        memory = memory_of(*(fields[0] for tag, fields in cases if tag == "F"))
        with memory.transaction():
            for i in range(unrelated):
                at = rng.randrange(len(words) - 9)
                memory.add_entry("corpus", m.Document((" ".join(words[at:at + 9]) + f" {i}",), True))
        right, times = {"Q": [], "U": [], "T": []}, []
        for tag, fields in cases:
            if tag == "F":
                key = fields[1].lower()
            elif tag in right:
                start = time.perf_counter()
                fit = answer(memory, fields[0])
                times.append(1e3 * (time.perf_counter() - start))
                right[tag].append(fit is not None and key in fit.answer.lower() if tag == "Q"
                                  else not is_a_fact(fit))
        print(*(f"{name} {sum(right[tag])} of {len(right[tag])}" for tag, name in
                (("Q", "asked in other words"), ("U", "never told"), ("T", "ordinary talk"))),
              f"median {statistics.median(times):.1f} ms", sep=", ")
        memory.close()


class OtherLanguages(unittest.TestCase):
    """What is not English is neither turned nor run together."""

    def test_german_im_is_no_slip_for_i_am(self):
        self.assertEqual(m.turned("Die Katze sitzt im Garten."), "Die Katze sitzt im Garten.")
        self.assertEqual(m.turned("im tired and im sad"), "You are tired and you are sad")

    def test_a_script_without_spaces_is_taken_sign_by_sign(self):
        self.assertEqual(m.folded_words("我累了 ok"), ["我", "累", "了", "ok"])
        memory = m.Memory(":memory:", Clock())
        self.addCleanup(memory.close)
        for text in ("H: 我累了。\nA: 那就休息一下吧。\n", "H: 下雨了。\nA: 你带伞了吗？\n"):
            memory.add_entry("corpus", m.Document(tuple(text.splitlines()), True))
        best = m.recall(memory, "我今天很累", random.Random(0))[0]
        self.assertEqual(best.answer, "那就休息一下吧。")


if __name__ == "__main__":
    if sys.argv[1:2] == ["figures"]:
        figures(*map(int, sys.argv[2:]))
    else:
        unittest.main()
