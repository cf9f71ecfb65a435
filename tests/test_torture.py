"""Claims that `torture.py` puts to many cases, here to a few; it prints what fails."""
import collections
import concurrent.futures
import unittest

import torture

CLAIMS = {
    "killed at any instant it loses no acknowledged word and nothing that it learned":
        [("kills", 5)],
    "whatever call fails no word is lost and there is a reply a line or one complaint":
        [("faults", 22), ("faults", 39)],
    "a damaged store is talked with or refused in one line": [("damage", 0), ("damage", 1)],
    "several chats on one store answer every line": [("chats", 2, 5)],
    "odd lines, words and files have a reply each and no control comes back": [("fuzz", 1, 20)],
}


def came_of(case):
    """Do one case, and return what came of it, counted."""
    part, number, *sizes = case
    counts = collections.Counter()
    torture.attempt(part, number, 1, counts, *sizes)
    return {what: number for (_, what), number in counts.items()}


class Torture(unittest.TestCase):
    def test_it_bears_kills_faults_damage_crowds_and_odd_words(self):
        torture.grown(1)  # the store that several begin with
        with concurrent.futures.ThreadPoolExecutor(3) as pool:  # they wait more than they work
            done = {claim: [pool.submit(came_of, case) for case in cases]
                    for claim, cases in CLAIMS.items()}
        for claim, cases in done.items():
            for counts in (case.result() for case in cases):
                with self.subTest(claim):
                    self.assertEqual({*counts} & {*torture.FAILURES}, set())
                    self.assertEqual(counts["cases"], 1)
