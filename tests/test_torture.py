"""Claims that `torture.py` puts to many cases, here to a few; it prints what fails."""
import collections
import concurrent.futures
import unittest

import torture


class Torture(unittest.TestCase):
    def bears(self, part, *numbers, **options):
        counts = collections.Counter()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda n: torture.attempt(part, n, 1, counts, **options), numbers))
        self.assertEqual([what for _, what in counts if what in torture.FAILURES], [])

    def test_killed_at_any_instant_it_loses_no_acknowledged_word_and_nothing_that_it_learned(self):
        self.bears("kills", 5)

    def test_whatever_call_fails_no_word_is_lost_and_there_is_a_reply_a_line_or_one_complaint(self):
        self.bears("faults", 22, 39)

    def test_a_damaged_store_is_talked_with_or_refused_in_one_line(self):
        self.bears("damage", 0, 1)

    def test_several_chats_on_one_store_answer_every_line(self):
        self.bears("chats", 2, messages=5)

    def test_odd_lines_words_and_files_have_a_reply_each_and_no_control_comes_back(self):
        self.bears("fuzz", 1, count=20)
