"""Claims that `torture.py` puts to many cases, here to a few; it prints what fails."""
import collections
import concurrent.futures
import unittest

import torture

CASES = (("kills", 5), ("fuzz", 1, 20), ("damage", 0), ("damage", 1), ("faults", 22),
         ("faults", 39), ("chats", 2, 5))


def came_of(case):
    """Do one case, and return what came of it, counted."""
    part, number, *sizes = case
    counts = collections.Counter()
    torture.attempt(part, number, 1, counts, *sizes)
    return counts


class Torture(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        torture.grown(1)  # the store that several begin with
        with concurrent.futures.ThreadPoolExecutor(3) as pool:  # they wait more than they work
            cls.counts = sum(pool.map(came_of, CASES), collections.Counter())

    def bears(self, part):
        self.assertEqual([what for where, what in self.counts
                          if where == part and what in torture.FAILURES], [])
        self.assertEqual(self.counts[part, "cases"], sum(case[0] == part for case in CASES))

    def test_killed_at_any_instant_it_loses_no_acknowledged_word_and_nothing_that_it_learned(self):
        self.bears("kills")

    def test_whatever_call_fails_no_word_is_lost_and_there_is_a_reply_a_line_or_one_complaint(self):
        self.bears("faults")

    def test_a_damaged_store_is_talked_with_or_refused_in_one_line(self):
        self.bears("damage")

    def test_several_chats_on_one_store_answer_every_line(self):
        self.bears("chats")

    def test_odd_lines_words_and_files_have_a_reply_each_and_no_control_comes_back(self):
        self.bears("fuzz")
