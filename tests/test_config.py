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


class Settings(Case):
    def refuse(self, given, *signs):
        """Assert that values, or a text that sets one, are refused in one line with the signs."""
        def change():
            return m.Config().replace([given]) if isinstance(given, str) else m.Config(**given)
        with self.subTest(given):
            return self.refused(m.ConfigError, change, *signs)

    def test_every_field_has_a_meaning_and_a_default_in_its_range_that_survives_as_text(self):
        for f in FIELDS:
            with self.subTest(f.name):
                self.assertTrue(f.metadata["doc"].strip())
                self.assertEqual(f.type, type(f.default).__name__)
                self.assertEqual(getattr(m.Config(), f.name), f.default)
                if f in NUMBERS:
                    self.assertTrue(f.metadata["low"] <= f.default <= f.metadata["high"])
                name, value = m.parse_assignment(f"{f.name}={f.default}")
                self.assertEqual((name, value, type(value)), (f.name, f.default, type(f.default)))

    def test_a_value_outside_its_range_is_refused_by_name_and_the_ends_are_allowed(self):
        for f in NUMBERS:
            kind = type(f.default)
            for end, sign in ((f.metadata["low"], -1), (f.metadata["high"], 1)):
                beyond = int(end) + sign if kind is int else math.nextafter(end, sign * math.inf)
                self.refuse({f.name: beyond}, f"{f.name}=", f"{end:g}", repr(f.default))
                if f.name not in ("n_embd", "n_head"):  # these must also fit
                    self.assertEqual(getattr(m.Config(**{f.name: kind(end)}), f.name), end)
            for value in (math.nan, math.inf, -math.inf):
                self.refuse({f.name: value}, f"{f.name}=")

    def test_a_value_of_another_type_or_a_text_that_means_nothing_is_refused_by_name(self):
        for f in FIELDS:
            for wrong in WRONG_TYPES[type(f.default)]:
                self.refuse({f.name: wrong}, f"{f.name}=", type(f.default).__name__,
                            type(wrong).__name__)
            for wrong in ("", "a\0b", "\0") if f not in NUMBERS else ():
                self.refuse({f.name: wrong}, f"{f.name}=")
        self.refuse({"schedule": "steps"}, "schedule='steps'", "linear or cosine")
        self.assertEqual(m.Config(temperature=1).temperature, 1)  # a whole number is a float too

    def test_channels_that_do_not_fit_the_heads_or_are_too_many_name_a_remedy(self):
        self.refuse({"n_layer": 64, "n_embd": 8192, "n_head": 1}, "n_layer=64", "try less")
        for heads in range(1, 13):
            for channels in range(2, 60):
                given = {"n_embd": channels, "n_head": heads}
                if channels % (2 * heads) == 0:
                    self.assertEqual(m.Config(**given).n_head, heads)
                    continue
                text = self.refuse(given, "n_embd", "n_head", "even")
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

    def test_what_sets_no_known_field_is_refused_with_the_form_or_the_nearest_names(self):
        for text, *signs in (
                *((text, "FIELD=VALUE", repr(text)) for text in ("top_k", "", "top_k 5", "k:5")),
                ("topk=1", "'topk'", "did you mean", "top_k"),
                ("temprature=1", "'temprature'", "did you mean", "temperature"),
                ("n_layers=1", "'n_layers'", "did you mean", "n_layer"),
                ("learningrate=1", "'learningrate'", "did you mean", "learning_rate"),
                ("zzzzqqqq=1", "'zzzzqqqq'", "known are", "top_k", "db_path"),
                ("a\nb",), ("top_k=a\nb",), ("a\nb=3",), ("corpus_path=\n\0",)):
            self.refuse(text, *signs)

    def test_what_is_no_finite_number_is_refused_with_the_default(self):
        for f in NUMBERS:
            for raw in ("", "many", "1,5", "0x10", "--3"):
                self.refuse(f"{f.name}={raw}", f.name, type(f.default).__name__, repr(f.default))
            for raw in ("nan", "inf", "-inf", "1e999"):
                self.refuse(f"{f.name}={raw}", f.name)
            for raw in ("9" * 400, "-" + "9" * 400, "9" * 5000):  # beyond every float and range
                self.refuse(f"{f.name}={raw}", f.name)
        self.refuse("top_k=1.5", "top_k", "int")

    def test_every_error_of_the_family_has_an_exit_code(self):
        for kind, code in ((m.ConfigError, 2), (m.UsageError, 2), (m.CorpusError, 1),
                           (m.StoreError, 1), (m.EngineError, 1), (m.TrainerError, 1)):
            self.assertTrue(issubclass(kind, m.MacroGPTError))
            self.assertEqual(kind.exit_code, code)
