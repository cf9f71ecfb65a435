"""Claims about the file itself: sections, what each may use, effects, sizes, signatures."""
import ast
import builtins
import collections
import os
import re
import symtable
import sys
import unittest

import macrogpt

PATH = os.path.abspath(macrogpt.__file__)
RULE = re.compile(r"# ─+")
BANNER = re.compile(r"# (\d+) · ([A-Z]+) — (\S.*\S)   uses:((?: \d+)*)")
MAP_LINE = re.compile(r" +(\d+) ([A-Z]+) +\S.*")
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MUTATORS = frozenset(
    "append extend insert remove pop clear sort reverse add discard update setdefault popitem "
    "appendleft popleft extendleft rotate subtract move_to_end difference_update "
    "intersection_update symmetric_difference_update __setitem__ __delitem__".split())
MUTABLE_NODES = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_MAKERS = frozenset("list dict set bytearray array deque defaultdict Counter "
                           "OrderedDict".split())
# What a file that is only imported has no business with.
WORKING = frozenset("open print input exec eval __import__ os sys time random subprocess sqlite3 "
                    "threading socket shutil tempfile signal asyncio queue importlib".split())


class Section:
    """One banner, what it declares, and the module's names between it and the next."""

    def __init__(self, line, number, name, uses):
        self.line, self.number, self.name = line, int(number), name
        self.uses = tuple(map(int, uses.split()))
        self.nodes, self.defines = [], set()

    def __repr__(self):
        return f"{self.number} {self.name}"


def names_bound(node):
    """Return the names that a statement of the module binds."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [name.id for target in targets if target is not None
            for name in ast.walk(target) if isinstance(name, ast.Name)]


def annotation_names(nodes):
    """Return the names in all annotations of nodes, those inside quotes too."""
    found = (getattr(node, name, None) for node in nodes for name in ("annotation", "returns"))
    return {name for annotation in filter(None, found)
            for name in re.findall(r"(?<![.\w])[A-Za-z_]\w*", ast.unparse(annotation))}


def global_names(table):
    """Yield the names that a piece of the module takes from the module or from the builtins."""
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (table.get_type() == "module" or symbol.is_global()):
            yield symbol.get_name()
    for child in table.get_children():
        yield from global_names(child)


def references(node, source):
    """Return the names of the module that a statement refers to, annotations included."""
    names = set(global_names(symtable.symtable(source, PATH, "exec")))
    if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):  # from 3.12 on the module knows these, too
        names -= {name.id for part in ast.walk(node) if isinstance(part, ast.comprehension)
                  for name in ast.walk(part.target) if isinstance(name, ast.Name)}
    return names | annotation_names(ast.walk(node))


def walk_functions(tree, inside=()):
    """Yield (function, the classes and functions that it stands in) for every one of the file."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FUNCTIONS):
            yield node, inside
        deeper = (*inside, node) if isinstance(node, (*FUNCTIONS, ast.ClassDef)) else inside
        yield from walk_functions(node, deeper)


def root_name(node):
    """Return the first name of a dotted, called or subscripted expression, or None."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def run_at_import(node):
    """Yield the parts of a module's statement that run when it is imported."""
    if isinstance(node, (*FUNCTIONS, ast.Lambda)):
        own = [*node.args.defaults, *filter(None, node.args.kw_defaults),
               *getattr(node, "decorator_list", ())]
    else:
        yield node
        own = ast.iter_child_nodes(node)
    for child in own:
        yield from run_at_import(child)


class Layout(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with open(PATH, encoding="utf-8") as file:
            cls.text = file.read()
        cls.tree, cls.lines = ast.parse(cls.text), cls.text.split("\n")
        cls.nodes, cls.functions = list(ast.walk(cls.tree)), list(walk_functions(cls.tree))
        banners = ((at, BANNER.fullmatch(line)) for at, line in enumerate(cls.lines, 1))
        cls.sections = [Section(at, *found.group(1, 2, 4)) for at, found in banners if found]
        cls.imports = [node for node in cls.nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
        cls.imported = {name for node in cls.tree.body if node in cls.imports
                        for name in names_bound(node)}
        for node in cls.tree.body:
            section = cls.section_at(node.lineno)
            if section is not None:
                section.nodes.append(node)
                section.defines.update(names_bound(node))

    @classmethod
    def section_at(cls, line):
        """Return the section of a line, or None above the first."""
        return next((s for s in reversed(cls.sections) if s.line < line), None)

    def none(self, violations):
        """Assert that there are no (line, complaint) pairs; show them as file:line."""
        shown = [f"macrogpt.py:{line}: {complaint}" for line, complaint in sorted(violations)]
        if shown:
            self.fail("\n" + "\n".join(shown))

    def test_20_sections_stand_in_order_framed_introduced_and_in_the_map_of_the_docstring(self):
        self.assertEqual([s.number for s in self.sections], list(range(20)))
        found = map(MAP_LINE.fullmatch, ast.get_docstring(self.tree, clean=False).split("\n"))
        self.assertEqual([(int(match[1]), match[2]) for match in found if match],
                         [(s.number, s.name) for s in self.sections])
        rules = [at for at, line in enumerate(self.lines, 1) if RULE.fullmatch(line)]
        self.assertEqual(rules, [s.line + by for s in self.sections for by in (-1, 1)])
        self.assertEqual(len({self.lines[at - 1] for at in rules}), 1, "rules of one length")
        self.none([(s.line, f"section {s} has no paragraph after its banner") for s in self.sections
                   if not any(re.match(r"# [A-Za-z`\"]", line)
                              for line in self.lines[s.line + 1:s.line + 3])])

    def test_every_section_uses_what_it_declares_no_more_and_no_less_and_only_from_above(self):
        home = {name: s.number for s in self.sections for name in s.defines}
        free = self.imported | set(dir(builtins)) | {"__file__", "__version__", "__name__"}
        broken = []
        for section in self.sections:
            used = set()
            for node in section.nodes:
                first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
                source = "\n".join(self.lines[first - 1:node.end_lineno])
                for name in references(node, source):
                    used.add(home.get(name, section.number))
                    if name not in home and name not in free:
                        broken.append((node.lineno, f"{name} is defined nowhere"))
                    elif home.get(name, 0) > section.number:
                        broken.append((node.lineno, f"{name} is of a section below"))
            if sorted(used - {section.number}) != list(section.uses):
                broken.append((section.line, f"section {section} declares {section.uses} and uses "
                                             f"{sorted(used - {section.number})}"))
        self.none(broken)

    def test_imports_are_of_the_standard_library_are_used_and_stand_before_the_first_section(self):
        used = {"annotations", *(node.id for node in self.nodes if isinstance(node, ast.Name))}
        broken = [(1, f"{name} is imported and not used") for name in self.imported - used]
        broken += [(n.lineno, "an import below the first banner") for n in self.imports
                   if n in self.tree.body and n.lineno > self.sections[0].line]
        known = getattr(sys, "stdlib_module_names", None)  # which came with Python 3.10
        for node in self.imports:
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module or "."])
            broken += [(node.lineno, f"{name} is not in the standard library") for name in names
                       if known and name.partition(".")[0] not in known]
        self.none(broken)

    def test_the_module_holds_only_definitions_none_twice_and_importing_it_starts_nothing(self):
        bound = [(name, node.lineno) for node in self.tree.body for name in names_bound(node)]
        count = collections.Counter(name for name, _ in bound)
        broken = [(line, f"{name} is bound again") for name, line in bound if count[name] > 1]
        *body, last = self.tree.body
        allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.ClassDef, *FUNCTIONS)
        self.assertIsInstance(body[0], ast.Expr)
        first = next(node for node in body if isinstance(node, ast.If))  # before the other imports
        body.remove(first)
        for guard in (first, last):
            self.assertEqual(ast.unparse(guard.test), "__name__ == '__main__'")
        broken += [(n.lineno, f"{type(n).__name__} at the top level") for n in body[1:]
                   if not isinstance(n, allowed)]
        for part in (part for node in body for part in run_at_import(node)):
            if (isinstance(part, ast.Call) and root_name(part.func) in WORKING
                    or isinstance(part, (ast.For, ast.While, ast.With, ast.Try, ast.If))):
                broken.append((part.lineno, f"{ast.unparse(part)} runs at import"))
        self.none(broken)

    def test_only_constants_hold_mutable_values_at_the_top_level_and_no_default_does(self):
        broken = [(f.lineno, f"{f.name} has a mutable default") for f, _ in self.functions
                  for default in (*f.args.defaults, *f.args.kw_defaults)
                  if isinstance(default, MUTABLE_NODES)]
        for node in self.tree.body:
            value = getattr(node, "value", None)
            mutable = isinstance(value, MUTABLE_NODES) or (
                isinstance(value, ast.Call) and root_name(value.func) in MUTABLE_MAKERS)
            broken += [(node.lineno, f"{name} is a mutable value and no ALL_CAPS table")
                       for name in names_bound(node)
                       if mutable and not CONSTANT.fullmatch(name)]
        self.none(broken)

    def test_nothing_of_the_module_is_ever_changed(self):
        module = {name for section in self.sections for name in section.defines} - self.imported
        constants = {name for name in module if CONSTANT.fullmatch(name)}
        broken = [(n.lineno, "global") for n in self.nodes if isinstance(n, ast.Global)]
        for node in self.nodes:
            targets = (node.targets if isinstance(node, (ast.Assign, ast.Delete)) else
                       [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else [])
            for target in targets:
                inner = isinstance(target, (ast.Subscript, ast.Attribute))
                if inner and root_name(target) in module or (
                        isinstance(node, ast.AugAssign) and root_name(target) in constants):
                    broken.append((node.lineno, f"{ast.unparse(target)} is changed"))
            if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                    and node.func.attr in MUTATORS and isinstance(node.func.value, ast.Name)
                    and node.func.value.id in constants):
                broken.append((node.lineno, f"{ast.unparse(node.func)} changes a constant"))
        self.none(broken)

    def test_only_the_interface_prints_reads_the_keyboard_or_the_command_line(self):
        self.none([(node.lineno, f"{ast.unparse(node)} outside section {self.sections[-1]}")
                   for node in self.nodes
                   if (isinstance(node, ast.Name) and node.id in ("print", "input")
                       or isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.argv")
                   and self.section_at(node.lineno) not in (None, self.sections[-1])])

    def test_of_the_network_it_knows_its_host_how_a_path_is_quoted_and_in_one_place_listens(self):
        used = [ast.unparse(node) for node in self.nodes if isinstance(node, ast.Attribute)]
        self.assertEqual({name for name in used if re.match(
            r"socket\.|urllib\.|asyncio\.(start_s|start_u|open_)|.*\.(create_(conn|dat|serv|unix)"
            r"|sock_|connect_acc)", name)}, {
                "socket.gethostname", "urllib.parse", "urllib.parse.quote", "asyncio.start_server"})
        self.assertEqual(used.count("asyncio.start_server"), 1)
        self.assertFalse(self.imported & {"http", "ftplib", "smtplib", "socketserver", "ssl",
                                          "xmlrpc", "webbrowser"})

    def test_lines_have_at_most_100_characters_functions_45_lines_and_no_work_is_unfinished(self):
        self.none([(at, line) for at, line in enumerate(self.lines, 1)
                   if len(line) > 100 or "\t" in line or line != line.rstrip()
                   or re.search(r"\b(TODO|FIXME|XXX)\b", line)])
        self.assertTrue(self.text.endswith("\n") and not self.text.endswith("\n\n"))
        self.none([(f.lineno, f"{f.name} ends in line {f.end_lineno}")
                   for f, _ in self.functions if f.end_lineno - f.lineno >= 45])

    def test_what_is_public_has_a_docstring_and_every_signature_is_fully_annotated(self):
        classes = [(n, ()) for n in self.tree.body if isinstance(n, ast.ClassDef)]
        public = [node for node, inside in (*classes, *self.functions)
                  if not any(n.name.startswith("_") for n in (node, *inside))
                  and not any(isinstance(outer, FUNCTIONS) for outer in inside)]
        broken = [(node.lineno, f"{node.name} has no docstring") for node in public
                  if not ast.get_docstring(node)]
        for function, inside in self.functions:
            a = function.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            static = "staticmethod" in map(ast.unparse, function.decorator_list)
            if inside and isinstance(inside[-1], ast.ClassDef) and not static:
                given = given[1:]
            missing = [arg.arg for arg in given if arg.annotation is None]
            missing += ["return"] * (function.returns is None)
            broken += [(function.lineno, f"{function.name}: {name}") for name in missing]
        self.none(broken)
