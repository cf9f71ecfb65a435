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
from support import ROOT

PATH = os.path.join(ROOT, "nonames.txt")
WORD = re.compile(r"/?[a-z0-9]+(?:['-][a-z]+)*")
MARKED = re.compile(r"\s*[A-Za-z]\s*:")        # what looks like a marker
SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+")
ODD_SIGN = re.compile(r"[^A-Za-z0-9 .,!?;:'\"()/-]")
STRAY_SPACE = re.compile(r"  | [.,!?;:)]|\( |[,;:?!](?![ ?!)\"]|$)")
SHORTENED = re.compile(r"(?:n't|'(?:s|ll|re|ve|m|d))$")
MOST_ROUNDS, STORY_LINES = 6, range(3, 6)
FREQUENT_WORDS, THEIR_SHARE = 1000, 0.95
FRAME_WORDS = 5                                 # shorter lines are what everybody says
RUN_WORDS, RUN_USES = 5, 6
# What would take eyes, ears, a nose, a mouth, legs or a heart, said of itself with no "not".
POWERS = re.compile(r"(?<!that )(?<!how )\bI (?:can )?"
                    r"(?:hear|taste|smell|feel|breathe|love you|see you)\b(?! nothing\b| no\b)")

# Words that the whole corpus has once; each was looked at.
SEEN_ONCE = frozenset("""
    /bad /help /memory /sleep /train /why also annoying august bite boyfriend brb capital chat
    chatgpt cheer confused conscious cover dangerous december delete dont dots dumb dying
    eighteen excuse failed fever fifty-two fill film follow girlfriend god grandma gravity haha
    hahaha headache heard huh idiot lol macro meow mess mhm mushrooms nineteen octopus online
    owns politics president private pulls repeat rich roll rude scissors seventeen shut sick
    spain stressed stung subject thirsty thirteen thx translate tv twenty-four ugly useless
    wassup wednesday woof zero""".split())


def said(line):
    """Return a line without its marker."""
    return line[3:] if line.startswith(m.MARKERS) else line


def words_of(line):
    """Return the words of a line in small letters; doesn't and page-tired are one word each."""
    return WORD.findall(said(line).casefold())


def is_typed(line):
    """Return whether a line is one that a person types without care for capitals."""
    return line.startswith("H: ") and not said(line)[0].isupper()


def is_closed(text):
    """Return whether every bracket and quote that opens in text closes in it."""
    depths = [0, *itertools.accumulate((sign == "(") - (sign == ")") for sign in text)]
    quotes = re.sub(r"(?<=\w)'(?=\w)", "", text)  # less the apostrophe of don't
    return (min(depths), depths[-1]) == (0, 0) and not any(quotes.count(q) % 2 for q in "\"'")


def roots(word):
    """Return what a word may be a form of: walks and walker of walk, quickly of quick."""
    plain = SHORTENED.sub("", word)
    found = {plain, m.base_of(plain)}
    for ending in ("er", "est", "ly", "y", "ed"):
        stump = plain[:-len(ending)]
        if plain.endswith(ending) and len(stump) > 2:
            found |= {stump, stump + "e", re.sub("i$", "y", stump), re.sub(r"(.)\1$", r"\1", stump)}
    return found


def runs_of(words):
    """Return the runs of RUN_WORDS words."""
    return set(zip(*(words[start:] for start in range(RUN_WORDS))))


class Seed(unittest.TestCase):
    """The corpus is read once, by the program's own reader."""

    @classmethod
    def setUpClass(cls):
        with open(PATH, "rb") as file:
            cls.raw = file.read()
        cls.corpus = m.read_corpus(PATH, m.Config.max_corpus_lines, m.Config.max_line_chars)
        cls.exchanges = [d for d in cls.corpus.documents if d.is_exchange]
        cls.passages = [d for d in cls.corpus.documents if not d.is_exchange]
        # Each line with the number of its document.
        cls.placed = [(line, number) for number, document in enumerate(cls.corpus.documents)
                      for line in document.lines]
        cls.lines = [line for line, _ in cls.placed]
        cls.uses = collections.Counter(word for line in cls.lines for word in words_of(line))

    def none(self, faults, what):
        """Fail and show the first of the faults, if there are any."""
        faults = list(faults)
        self.assertFalse(faults, f"{len(faults)} {what}, such as {faults[:5]}")


class Form(Seed):
    """The file as bytes and lines."""

    def test_the_file_is_its_clean_documents_with_a_blank_line_between(self):
        text = "\n".join(document.text for document in self.corpus.documents)
        pairs = itertools.zip_longest(self.raw.decode("utf-8").split("\n"), text.split("\n"))
        self.none((pair for pair in pairs if pair[0] != pair[1]), "lines that differ when read")

    def test_nothing_is_cut_or_left_out_or_longer_than_a_line_may_be(self):
        self.assertEqual((self.corpus.notices, self.corpus.kept_all), ((), True))
        self.none((d for d in self.corpus.documents if not d.closed), "documents cut")
        longest = max(self.raw.decode("utf-8").split("\n"), key=len)
        self.assertLessEqual(len(longest), m.Config.max_line_chars, longest)

    def test_it_has_four_to_six_thousand_lines_in_250_to_400_kilobytes(self):
        self.assertIn(self.corpus.total_lines, range(4000, 6001))
        self.assertIn(len(self.raw), range(250_000, 400_001))

    def test_two_thirds_or_more_are_exchanges(self):
        self.assertGreaterEqual(3 * len(self.exchanges), 2 * len(self.corpus.documents))
        spoken = sum(len(document.lines) for document in self.exchanges)
        self.assertGreaterEqual(3 * spoken, 2 * self.corpus.total_lines)

    def test_a_person_begins_an_exchange_and_the_program_ends_it_within_six_rounds(self):
        for document in self.exchanges:
            speakers = "".join(speaker for speaker, _ in document.turns())
            rounds = len(speakers) // 2
            self.assertEqual(speakers, "HA" * rounds, document.lines[0])
            self.assertIn(rounds, range(1, MOST_ROUNDS + 1), document.lines[0])

    def test_a_passage_is_a_tiny_story_without_markers(self):
        for document in self.passages:
            self.assertIn(len(document.lines), STORY_LINES, document.lines[0])
            self.none(filter(MARKED.match, document.lines), "lines that look spoken")


class Writing(Seed):
    """Sentences, signs and words."""

    def test_lines_end_in_a_full_stop_a_question_mark_or_an_exclamation_mark(self):
        self.none((line for line in self.lines if not is_typed(line) and line[-1] not in ".!?"),
                  "lines without an end")

    def test_sentences_begin_with_a_capital_and_i_is_one(self):
        careful = [line for line in self.lines if not is_typed(line)]
        self.none((line for line in careful for sentence in SENTENCE_BREAK.split(said(line))
                   if not sentence[:1].isupper() or re.search(r"\bi\b", sentence)),
                  "lines with a small beginning")

    def test_only_plain_letters_and_signs_with_no_space_astray(self):
        self.none(filter(ODD_SIGN.search, self.lines), "lines with another sign")
        self.none((line for line in self.lines if STRAY_SPACE.search(said(line))),
                  "lines with a space astray")

    def test_brackets_and_quotes_are_closed(self):
        self.none((line for line in self.lines if not is_closed(said(line))), "lines left open")

    def test_a_thousand_words_carry_nearly_all_of_it(self):
        carried = sum(count for _, count in self.uses.most_common(FREQUENT_WORDS))
        self.assertGreaterEqual(carried, THEIR_SHARE * sum(self.uses.values()))

    def test_every_word_is_used_twice_in_some_form_or_was_looked_at(self):
        forms = collections.Counter()
        for word, count in self.uses.items():
            forms.update(dict.fromkeys(roots(word), count))
        self.none((word for word, count in self.uses.items() if count == 1 and
                   word not in SEEN_ONCE and max(map(forms.get, roots(word))) == 1),
                  "words nobody looked at")
        self.none(SEEN_ONCE - self.uses.keys(), "words looked at that are gone")

    def test_the_program_claims_no_sense_and_no_body(self):
        self.none((line for line in self.lines if line.startswith("A:") and POWERS.search(line)),
                  "replies that claim too much")


class Variety(Seed):
    """No templates: a line may echo those beside it, and is like no other."""

    def test_no_line_is_there_twice_whatever_its_capitals_and_signs(self):
        lines = collections.defaultdict(list)
        for line in self.lines:
            lines[" ".join(words_of(line)) or said(line)].append(line)
        self.none((same for same in lines.values() if len(same) > 1), "lines twice")

    def test_no_two_lines_of_different_documents_differ_in_one_word_only(self):
        frames = collections.defaultdict(dict)
        for line, number in self.placed:
            words = words_of(line)
            if len(words) >= FRAME_WORDS:
                for gap in range(len(words)):
                    frames[(*words[:gap], "", *words[gap + 1:])].setdefault(number, line)
        self.none((list(same.values()) for same in frames.values() if len(same) > 1),
                  "frames filled")

    def test_no_line_shares_half_its_runs_of_words_with_one_of_another_document(self):
        places, shared = collections.defaultdict(list), collections.Counter()
        runs = [runs_of(words_of(line)) for line in self.lines]
        for at, run in ((at, run) for at, found in enumerate(runs) for run in found):
            shared.update((other, at) for other in places[run])
            places[run].append(at)
        copies = []
        for (one, other), count in shared.items():
            fewest = min(len(runs[one]), len(runs[other]))
            # Of two runs one may be everybody's, such as "what would you like to".
            if 2 * count >= fewest and (count, fewest) != (1, 2):
                copies.append((self.placed[one], self.placed[other]))
        self.none((pair for pair in copies if pair[0][1] != pair[1][1]), "lines nearly the same")

    def test_no_run_of_words_is_worn_out(self):
        uses = collections.Counter(run for line in self.lines for run in runs_of(words_of(line)))
        self.none((run for run, count in uses.items() if count > RUN_USES), "runs used too often")


if __name__ == "__main__":
    unittest.main()
