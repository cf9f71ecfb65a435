"""Fits the weights and thresholds of RECALL's judge, and says what they are worth on unseen sets.

    python3 tests/fit_recall.py [FILE ...]     the sets of tests/, and those given

A set is a group of lines: `G name`, `F fact | what a right answer holds`, then questions about the
fact above (`Q`, or by how far their words are from the fact's: `T` as taught, `N` near, `R` freer,
`O` round about), `U` a question about what was never told, `S` small talk. Each group is told to a
memory of its own that has read the project's corpus. Whole groups are held out in turn, so that no
figure is about a fact that was fitted on. Prints the table for JUDGE, and the curve between
answering, quoting and silence.
"""
import collections
import glob
import math
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import macrogpt as m
from support import seed_corpus

HERE = os.path.dirname(os.path.abspath(__file__))
FOLDS = 5
RIDGE = 1.0
FALSE_SHARE = 0.03   # of questions about what was never told that may be answered
QUOTED_SHARE = 0.48  # of them that may meet a quotation
SAID_AT = 0.55       # Config.recall_score: the bias is moved so that it is the threshold


def groups_of(path):
    """Return the groups of a file, each a list of (tag, words)."""
    groups = [[]]
    with open(path, encoding="utf-8") as file:
        for line in file:
            tag, _, words = line.strip().partition(" ")
            if tag == "G":
                groups.append([])
            elif len(tag) == 1 and tag.isalpha() and words:
                groups[-1].append((tag, words))
    return [group for group in groups if group]


def well_read(*clock):
    """Return a memory that has read the project's corpus."""
    memory = m.Memory(":memory:", *clock)
    with memory.transaction():
        for document in seed_corpus().documents:
            memory.add_entry("corpus", document)
    return memory


def exchanged(rng, asked, nouns):
    """Yield a question about what was not told: a telling word of a told one is another's."""
    pieces = [word.text for word in asked.line.words]
    for i in [i for i in asked.terms if i not in asked.asking and pieces[i].isalpha()][:1]:
        pieces[i] = rng.choice(nouns)
        yield " ".join(pieces).replace(" 's", "'s") + "?"


def rows_of(group, memory, rng, read=False):
    """Yield (tag, question's polarity, [(signals, right, verdict)]) for each question of a group."""
    told, lex, newest = m.Memory(":memory:"), m.lexicon_of(memory), memory.about_count()
    memory._db.backup(told._db)
    facts = [words.split("|")[0].strip() for tag, words in group if tag == "F"]
    size = 4 if read else 1  # as lines of a file, or as words of a chat
    with told.transaction():
        for at in range(0, len(facts), size):
            told.add_entry("corpus" if read else "chat",
                           m.Document(tuple(facts[at:at + size]), True))
    fact, questions, met = "", [], []
    for tag, words in group:
        if tag == "F":
            fact = words.split("|")[0].strip()
        elif tag in "QTNRO":
            questions.append((tag, words, fact))
            met.append(m.analyzed(lex, words))
        elif tag in "US":
            questions.append((tag, words, ""))
    nouns = sorted({a.line.words[i].text for a in met for i in a.terms if i not in a.asking})
    questions += [("X", words, "") for asked in met[::3] for words in exchanged(rng, asked, nouns)]
    for tag, words, fact in questions:
        asked, entries = m.gathered(lex, told, m.analyzed(lex, m._question_in(lex, words)))
        rows = [(m.signals(lex, asked, unit)[0],
                 unit.text.strip(" .") in fact and unit.entry.id > newest, verdict)
                for unit, verdict in ((x.unit, x.verdict) for x in m.judged(lex, asked, entries)
                                      if x.news)]
        # an exchanged question may be about another fact after all
        if tag != "X" or not any(found["whole"] for found, *_ in rows):
            yield tag, asked.polar, rows if tag != "S" or m.asks(words) else []
    told.close()


def fitted(questions, names):
    """Return the weights of a logistic regression, by Newton's method."""
    rows = [([(k, found[name]) for k, name in enumerate(names) if found.get(name)], right)
            for *_, candidates in questions for found, right, _ in candidates]
    weights, size = [0.0] * len(names), len(names)
    for _ in range(12):
        gradient = [-RIDGE * w for w in weights]
        hessian = [[RIDGE * (i == j) for j in range(size)] for i in range(size)]
        for row, right in rows:
            p = 1.0 / (1.0 + math.exp(-sum(weights[k] * x for k, x in row)))
            slope, bend = right - p, p * (1.0 - p)
            for k, x in row:
                gradient[k] += slope * x
                for j, y in row:
                    hessian[k][j] += bend * x * y
        step = solved(hessian, gradient)
        weights = [w + s for w, s in zip(weights, step)]
        if max(map(abs, step)) < 1e-3:
            break
    return dict(zip(names, weights))


def solved(a, b):
    """Return x of a·x = b, where a is positive definite, by Gauss and Jordan."""
    rows = [[*row, value] for row, value in zip(a, b)]
    for i, chosen in enumerate(rows):
        chosen[:] = [x / chosen[i] for x in chosen]
        for row in rows:
            if row is not chosen:
                row[:] = [x - row[i] * y for x, y in zip(row, chosen)]
    return [row[-1] for row in rows]


def scored(questions, weights):
    """Return (tag, the best two: how sure to answer, how sure to quote, right) of each question."""
    found = []
    for tag, polar, rows in questions:
        chances = [m.weighed(signals, weights) for signals, *_ in rows]
        sure = [math.log((1e-9 + p) / (1e-9 + 1.0 - p)) for p in chances]
        best = sorted(zip(sure, rows), reverse=True, key=lambda pair: pair[0])[:2]
        found.append((tag, [(-99.0 if polar and not verdict else z, z, right)
                            for z, (_, right, verdict) in best]))
    return found


def report(found, quoted_share):
    """Print what two thresholds give; return those at which the shares of false ones are."""
    def threshold(which, share):
        never = sorted((best[0][which] if best else -99.0 for tag, best in found if tag == "U"),
                       reverse=True)
        at = int(share * len(never))
        return sum(never[at - 1:at + 1]) / 2.0  # halfway from the last that may to the next
    said, quote = threshold(0, FALSE_SHARE), threshold(1, quoted_share)
    kinds = collections.defaultdict(collections.Counter)
    for tag, best in found:
        counts, right = kinds[tag], [is_right for *_, is_right in best] or [False]
        counts["all"] += 1
        if best and best[0][0] > said:
            counts["right" if right[0] else "wrong"] += 1
        elif best and best[0][1] > quote:
            shown = any(is_right and z > quote for _, z, is_right in best)
            counts["quoted right" if shown else "quoted wrong"] += 1
    print(f"answers from {said:.2f}, quotes from {quote:.2f}")
    for tag, counts in sorted(kinds.items()):
        whole = counts.pop("all")
        print(f"  {tag} {whole:5}", *(f"{name} {n / whole:.0%}" for name, n in counts.items()))
    return said, quote


def main(args):
    paths = [*glob.glob(os.path.join(HERE, "recall_[cs]*.txt")), *args]
    memory, rng, sets, held_out = well_read(), random.Random(1), [], []
    for group in (group for path in sorted(set(paths)) for group in groups_of(path)):
        sets.append(list(rows_of(group, memory, rng)))
        if len(sets) % 3 == 0:
            sets.append(list(rows_of(group, memory, rng, True)))
    everything = [question for questions in sets for question in questions]
    names = list(dict.fromkeys(name for *_, rows in everything for found, *_ in rows
                               for name in found))
    print(len(sets), "groups", len(everything), "questions")
    for fold in range(FOLDS):
        others = [q for k, questions in enumerate(sets) if k % FOLDS != fold for q in questions]
        weights = fitted(others, names)
        for questions in sets[fold::FOLDS]:
            held_out += scored(questions, weights)
    for share in (0.3, 0.4, 0.5, 0.6, 0.7, QUOTED_SHARE):
        print("held out,", share, "quoted")
        said, quote = report(held_out, share)
    weights = fitted(everything, names)
    move = math.log(SAID_AT / (1.0 - SAID_AT)) - said
    weights["bias"] += move
    quote = 1.0 / (1.0 + math.exp(-quote - move))
    table = ", ".join(f'"{name}": {value:.2f}' for name, value in weights.items())
    print("JUDGE = {" + f'"quote": {quote:.3f}, {table}' + "}")


if __name__ == "__main__":
    main(sys.argv[1:])
