"""Claims about nonames.txt: its form, its small language, and that it says nothing twice.

A spoken line is written with care or as people type: `H: do you sleep`, all small letters, needs no
full stop. What the program says, and what stands in the passages, is always written with care.
"""
import collections
import itertools
import os
import re
import unittest

import macrogpt as m
from support import ROOT, seed_corpus

PATH = os.path.join(ROOT, "nonames.txt")
WORD = re.compile(r"/?[a-z0-9]+(?:['-][a-z]+)*")
MARKED = re.compile(r"\s*[A-Za-z]\s*:")        # what looks like a marker
SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+")
QUOTE_OR_BRACKET = re.compile("[\"'()]")
ODD_SIGN = re.compile(r"[^A-Za-z0-9 .,!?;:'\"()/{}-]")
OPENING = re.compile(r"^(?:\{\w+\}.*|[\"'(]+(?=\w))")  # a quotation, or a tool at the beginning
STRAY_SPACE = re.compile(r"  | [.,!?;:)]|\( |[,;:?!](?![ ?!)\"]|$)")
MOST_ROUNDS, STORY_LINES = 8, range(3, 13)
FREQUENT_WORDS, THEIR_SHARE = 2000, 0.95
FRAME_WORDS = 5                                 # shorter lines are what everybody says
RUN_WORDS, RUN_USES = 5, 30
# What would take eyes, ears, a nose, a mouth, legs or a heart, said of itself with no "not".
POWERS = re.compile(r"(?<!that )(?<!how )\bI (?:can )?"
                    r"(?:hear|taste|smell|feel|breathe|love you|see you)\b(?! nothing\b| no\b)")

def said(line):
    """Return a line without its marker."""
    return line[3:] if line.startswith(m.MARKERS) else line


def words_of(line):
    """Return the words of a line in small letters; doesn't and page-tired are one word each."""
    return WORD.findall(said(line).casefold())


def is_typed(line):
    """Return whether a line is one that a person types without care for capitals."""
    return line.startswith("H: ") and not said(line)[0].isupper()


def is_open(text):
    """Return whether a bracket or a quote that opens in text does not close in it."""
    if not QUOTE_OR_BRACKET.search(text):
        return False
    depths = [0, *itertools.accumulate((sign == "(") - (sign == ")") for sign in text)]
    quotes = re.sub(r"(?<=\w)'(?=\w)", "", text)  # less the apostrophe of don't
    return min(depths) < 0 or depths[-1] > 0 or any(quotes.count(q) % 2 for q in "\"'")


class Seed(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with open(PATH, "rb") as file:
            cls.raw = file.read()
        cls.corpus = seed_corpus()
        cls.spoken = [d for d in cls.corpus.documents if not d.is_dictionary]
        cls.placed = [(line, number) for number, document in enumerate(cls.spoken)
                      for line in document.lines]
        cls.lines = [line for line, _ in cls.placed]
        cls.words = [words_of(line) for line in cls.lines]
        cls.runs = [set(zip(*(words[start:] for start in range(RUN_WORDS))))
                    for words in cls.words]

    def none(self, faults, what):
        """Fail and show the first of the faults, if there are any."""
        faults = list(faults)
        self.assertFalse(faults, f"{len(faults)} {what}, such as {faults[:5]}")

    def test_the_file_is_its_clean_documents_with_a_blank_line_between_and_nothing_is_cut(self):
        text = "\n".join(document.text for document in self.corpus.documents)
        pairs = itertools.zip_longest(self.raw.decode("utf-8").split("\n"), text.split("\n"))
        self.none((pair for pair in pairs if pair[0] != pair[1]), "lines that differ when read")
        self.assertEqual((self.corpus.notices, self.corpus.kept_all), ((), True))
        self.none((d for d in self.corpus.documents if not d.closed), "documents cut")

    def test_it_has_35000_lines_and_more_two_thirds_of_it_exchanges_and_one_of_several_rounds(self):
        self.assertIn(self.corpus.total_lines, range(35_000, 60_000))
        self.assertIn(len(self.raw), range(1_200_000, 3_000_000))
        spoken = [len(d.lines) for d in self.spoken if d.is_exchange]
        self.assertGreaterEqual(3 * sum(size for size in spoken if size > 3), len(self.placed))
        self.assertGreaterEqual(3 * len(spoken), 2 * len(self.spoken))
        self.assertGreaterEqual(3 * sum(spoken), 2 * len(self.placed))

    def test_a_person_begins_an_exchange_and_the_program_ends_it_and_a_passage_is_tiny(self):
        for document in self.spoken:
            if document.is_exchange:
                speakers = "".join(speaker for speaker, _ in document.turns())
                rounds = len(speakers) // 2
                self.assertEqual(speakers, "HA" * rounds, document.lines[0])
                self.assertIn(rounds, range(1, MOST_ROUNDS + 1), document.lines[0])
            else:
                self.assertIn(len(document.lines), STORY_LINES, document.lines[0])
                self.none(filter(MARKED.match, document.lines), "lines that look spoken")

    def test_word_knowledge_stands_at_the_end_in_small_letters_and_no_group_twice(self):
        kinds = [d.is_dictionary for d in self.corpus.documents]
        self.assertEqual(kinds, sorted(kinds))
        groups = [group.strip() for d in self.corpus.documents if d.is_dictionary
                  for line in d.lines for group in line.lstrip("~ ").split(",")]
        self.none(re.findall(r"[^a-z :,\n-]", " ".join(groups)), "odd signs")
        self.none((g for g, n in collections.Counter(groups).items() if n > 1), "groups twice")

    def test_sentences_begin_with_a_capital_and_end_in_a_sign_and_i_is_a_capital(self):
        careful = [line for line in self.lines if not is_typed(line)]
        self.none((line for line in careful if line[-1] not in ".!?"), "lines without an end")
        self.none((line for line in careful for sentence in SENTENCE_BREAK.split(said(line))
                   if not (OPENING.sub("", sentence) or "A")[:1].isupper()
                   or re.search(r"\bi\b", sentence)),
                  "lines with a small beginning")

    def test_only_plain_letters_tools_and_signs_none_astray_or_left_open_and_no_sense_claimed(self):
        self.assertLessEqual(set(re.findall(r"\{(.*?)\}", self.raw.decode())), set(m.TOOLS))
        for fault, what in ((ODD_SIGN.search, "another sign"), (is_open, "something open"),
                            (STRAY_SPACE.search, "a space astray")):
            self.none((line for line in self.lines if fault(said(line))), f"lines with {what}")
        self.none((line for line in self.lines if line.startswith("A:") and POWERS.search(line)),
                  "replies that claim a sense or a body")

    def test_two_thousand_words_carry_nearly_all_of_it(self):
        uses = collections.Counter(word for words in self.words for word in words)
        carried = sum(count for _, count in uses.most_common(FREQUENT_WORDS))
        self.assertGreaterEqual(carried, THEIR_SHARE * sum(uses.values()))

    def test_no_two_lines_are_the_same_or_of_two_documents_and_differ_in_one_word_only(self):
        lines, frames = collections.defaultdict(list), collections.defaultdict(dict)
        for (line, number), words in zip(self.placed, self.words):
            lines[" ".join(words) or said(line)].append(line)
            for gap in range(len(words) if len(words) >= FRAME_WORDS else 0):
                frames[(*words[:gap], "", *words[gap + 1:])].setdefault(number, line)
        self.none((same for same in lines.values() if len(same) > 1), "lines twice")
        self.none((list(same.values()) for same in frames.values() if len(same) > 1),
                  "frames filled")

    def test_no_run_of_words_is_worn_out_or_half_of_two_lines_of_different_documents(self):
        places, shared = collections.defaultdict(list), collections.Counter()
        for at, run in ((at, run) for at, found in enumerate(self.runs) for run in found):
            shared.update((other, at) for other in places[run])
            places[run].append(at)
        self.none((run for run, found in places.items() if len(found) > RUN_USES),
                  "runs used too often")
        copies = []
        for (one, other), count in shared.items():
            fewest = min(len(self.runs[one]), len(self.runs[other]))
            # Of two runs one may be everybody's, such as "what would you like to".
            if 2 * count >= fewest and (count, fewest) != (1, 2):
                copies.append((self.placed[one], self.placed[other]))
        self.none((pair for pair in copies if pair[0][1] != pair[1][1]), "lines nearly the same")
