"""Claims about the settings: each has a type and a range, every error one line and a remedy."""
import dataclasses
import math
import re

import macrogpt as m
from support import Case

FIELDS = dataclasses.fields(m.Config)
NUMBERS = [f for f in FIELDS if type(f.default) is not str]
WRONG_TYPES = {int: [1.5, "7", None, True, [1], 1j], float: ["0.5", None, True, [0.5], 1j],
               str: [3, None, b"x", ["x"], 0.5]}


def beyond(f, end, sign):
    """Return a value just outside the range of a field."""
    limit = f.metadata[end]
    return int(limit) + sign if type(f.default) is int else (
        limit + sign * max(1e-9, abs(limit) * 1e-3))


class Settings(Case):
    def refuse(self, change, *signs):
        return self.refused(m.ConfigError, change, *signs)

    def refuse_value(self, f, value, *signs):
        with self.subTest(f.name, value=value):
            self.refuse(lambda: m.Config(**{f.name: value}), f"{f.name}=", *signs)

    def refuse_text(self, text, *signs):
        with self.subTest(text=text):
            self.refuse(lambda: m.Config().replace([text]), *signs)

    def test_every_field_says_what_it_means_and_its_default_lies_in_its_range(self):
        for f in FIELDS:
            with self.subTest(f.name):
                self.assertTrue(f.metadata["doc"].strip())
                self.assertEqual(f.type, type(f.default).__name__)
                self.assertEqual(getattr(m.Config(), f.name), f.default)
                if f in NUMBERS:
                    self.assertTrue(-math.inf < f.metadata["low"] <= f.default)
                    self.assertLessEqual(f.default, f.metadata["high"])

    def test_a_value_outside_its_range_is_refused_by_name_and_the_ends_are_allowed(self):
        limited = [f for f in NUMBERS if f.metadata["high"] < math.inf]
        self.assertGreater(len(limited), 20)
        for f in NUMBERS:
            self.refuse_value(f, beyond(f, "low", -1), "default", repr(f.default))
            for value in (math.nan, math.inf, -math.inf):
                self.refuse_value(f, value)
            for end in (f.metadata["low"], f.metadata["high"]):
                if math.isfinite(end) and f.name not in ("n_embd", "n_head"):  # these must also fit
                    value = type(f.default)(end)
                    self.assertEqual(getattr(m.Config(**{f.name: value}), f.name), value, f.name)
        for f in limited:
            self.refuse_value(f, beyond(f, "high", 1), f"{f.metadata['high']:g}")

    def test_a_value_of_another_type_or_a_text_that_is_no_path_is_refused_by_name(self):
        for f in FIELDS:
            for wrong in WRONG_TYPES[type(f.default)]:
                self.refuse_value(f, wrong, type(f.default).__name__, type(wrong).__name__)
            if f not in NUMBERS:
                for wrong in ("", "a\0b", "\0"):
                    self.refuse_value(f, wrong)
        self.assertEqual(m.Config(temperature=1).temperature, 1)  # a whole number is a float too

    def test_channels_that_do_not_fit_the_heads_name_a_remedy_that_works(self):
        self.refuse(lambda: m.Config(n_embd=12, n_head=4), "even")
        for heads in range(1, 13):
            for channels in range(2, 60):
                if channels % heads == 0 and channels // heads % 2 == 0:
                    self.assertEqual(m.Config(n_embd=channels, n_head=heads).n_head, heads)
                    continue
                text = self.refuse(lambda: m.Config(n_embd=channels, n_head=heads),
                                   "n_embd", "n_head")
                tried = int(re.search(r"try (?:n_embd=)?(\d+)$", text)[1])
                self.assertEqual(m.Config(n_embd=tried, n_head=heads).n_embd, tried)

    def test_the_feed_forward_width_is_a_multiple_of_eight_near_eight_thirds(self):
        for channels, width in ((2, 8), (8, 24), (64, 168), (72, 192), (384, 1024), (992, 2648)):
            self.assertEqual(m.Config(n_embd=channels, n_head=1).ff_width, width)
        self.assertEqual(m.Config(n_ff=31).ff_width, 31)

    def test_replace_changes_what_is_named_in_any_order_and_the_last_wins(self):
        for texts, changes in (
                ([], {}), (["top_k=5", "temperature=0"], {"top_k": 5, "temperature": 0.0}),
                (["top_k=5", "top_k=6"], {"top_k": 6}),
                (["n_embd=18", "n_head=3"], {"n_embd": 18, "n_head": 3}),
                (["n_head=3", "n_embd=18"], {"n_embd": 18, "n_head": 3}),
                (["corpus_path=a=b.txt"], {"corpus_path": "a=b.txt"}),
                ([" top_k = 7 ", "temperature= 1e-3"], {"top_k": 7, "temperature": 0.001})):
            self.assertEqual(m.Config().replace(texts), m.Config(**changes))

    def test_every_default_survives_the_round_trip_through_text(self):
        for f in FIELDS:
            name, value = m.parse_assignment(f"{f.name}={f.default}")
            self.assertEqual((name, value, type(value)), (f.name, f.default, type(f.default)))

    def test_an_unknown_field_gives_the_nearest_known_ones_or_the_list(self):
        for wrong, meant in (("topk", "top_k"), ("temprature", "temperature"),
                             ("n_layers", "n_layer"), ("learningrate", "learning_rate")):
            self.refuse_text(f"{wrong}=1", repr(wrong), "did you mean", meant)
        self.refuse_text("zzzzqqqq=1", "'zzzzqqqq'", "known are", "top_k", "db_path")

    def test_what_is_no_assignment_shows_the_form_in_one_line(self):
        for text in ("top_k", "", "top_k 5", "top_k:5"):
            self.refuse_text(text, "FIELD=VALUE", repr(text))
        for text in ("a\nb", "top_k=a\nb", "a\nb=3", "corpus_path=\n\0"):
            self.refuse_text(text)

    def test_what_is_no_finite_number_is_refused_with_the_default(self):
        for f in NUMBERS:
            for raw in ("", "many", "1,5", "0x10", "--3"):
                self.refuse_text(f"{f.name}={raw}", f.name, type(f.default).__name__,
                                 repr(f.default))
            for raw in ("nan", "inf", "-inf", "1e999"):
                self.refuse_text(f"{f.name}={raw}", f.name)
            for raw in ("9" * 400, "-" + "9" * 400, "9" * 5000):  # beyond every float
                try:
                    config = m.Config().replace([f"{f.name}={raw}"])
                except m.ConfigError as error:
                    self.assertIn(f.name, str(error))
                else:
                    self.assertEqual(str(getattr(config, f.name)), raw)
        self.refuse_text("top_k=1.5", "top_k", "int")

    def test_every_error_of_the_family_has_an_exit_code(self):
        for kind, code in ((m.ConfigError, 2), (m.UsageError, 2), (m.CorpusError, 1),
                           (m.StoreError, 1), (m.EngineError, 1), (m.TrainerError, 1)):
            self.assertTrue(issubclass(kind, m.MacroGPTError))
            self.assertEqual(kind.exit_code, code)
