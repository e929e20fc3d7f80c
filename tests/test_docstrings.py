"""Every public name says what it is: parameters, results, shapes, errors, fields and sources.

Read from the source without importing it, so that modules of optional packages are held to it too.
The names of `gptjax.__all__` and their methods are held to more than the rest: there every function
of more than one parameter has an `Args:` section, elsewhere those of more than three.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import docstring_parser
import pytest
from docstring_parser import DocstringStyle

import gptjax

PACKAGE = Path(gptjax.__file__).parent
FACE = {f"{home}.{name}" for name, home in gptjax._HOMES.items()}

_SHAPE = re.compile(
    r"\[[^\]]*\b[A-Za-z0-9*]+[^\]]*\]|\bscalars?\b|\b1-D\b|\b[a-z]\w*_[A-Z][A-Za-z0-9]*\b"
)
# What has no shape worth telling, or says where it is told.
_TOLD = re.compile(r"\bas in\b|\blikewise\b|\brandom keys?\b|\bas for\b|\bsee `", re.IGNORECASE)
_ARRAY = re.compile(r"(jax\.Array|np\.ndarray)( \| None)?")

SOURCES = {
    "activations.gelu_tanh": "Hendrycks & Gimpel 2016",
    "adapters.LoRA": "Hu et al. 2021",
    "attention.attention": "Vaswani et al. 2017",
    "choice.choose": "Gao 2021",
    "config.ModelConfig": "Su et al. 2021; Zhang & Sennrich 2019; Ainslie et al. 2023; "
    "Dehghani et al. 2023; So et al. 2021; Shazeer 2020; Shazeer et al. 2017; Dai et al. 2024; "
    "Wang & Komatsuzaki 2021; Beltagy et al. 2020",
    "constrained.generate_constrained": "Willard and Louf 2023",
    "cudnn_attention": "Dao et al. 2022",
    "data.packing": "Krell et al. 2021",
    "evaluation.bias": "Nangia et al. 2020; Rudinger et al. 2018",
    "evaluation.calibration": "Guo et al. 2017",
    "evaluation.contamination": "Brown et al. 2020",
    "evaluation.last_word": "Paperno et al. 2016",
    "evaluation.memorization": "Carlini et al. 2022",
    "evaluation.metrics": "Post 2018; Popović 2015; Rajpurkar et al. 2016",
    "evaluation.multiple_choice": "Brown et al. 2020; Zellers et al. 2019",
    "experts": "Shazeer et al. 2017; Fedus et al. 2021; Zoph et al. 2022",
    "layouts.quantize": "Dettmers et al. 2022",
    "loss.LossOptions": "Chowdhery et al. 2022",
    "model_card": "Mitchell et al. 2019",
    "optimizer.OptimizerConfig": "Loshchilov & Hutter 2019; Jordan et al. 2024; Hu et al. 2024",
    "pipeline": "Huang et al. 2019",
    "preferences.DPO": "Rafailov et al. 2023",
    "pretrained.gpt2": "Radford et al. 2019",
    "pretrained.gpt_neox": "Black et al. 2022",
    "pretrained.llama": "Touvron et al. 2023",
    "pretrained.mistral": "Jiang et al. 2023",
    "ring": "Liu et al. 2023",
    "sampling.Sampling": "Holtzman et al. 2020; Nguyen et al. 2024; Meister et al. 2023; "
    "Keskar et al. 2019",
    "sharding.make_mesh": "Rajbhandari et al. 2020; Shoeybi et al. 2019",
    "speculation": "Leviathan et al. 2023; Chen et al. 2023",
    "speculation.PromptLookup": "Saxena 2023",
}
"""What implements a method of others -> the papers that its docstring, or its module's, names; of a
module, its docstrings together."""


@dataclass(frozen=True)
class Name:
    """A public module, class, function, method or property."""

    path: str
    node: ast.Module | ast.ClassDef | ast.FunctionDef
    owner: ast.ClassDef | None = None

    @property
    def text(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def doc(self) -> docstring_parser.Docstring:
        return docstring_parser.parse(self.text, DocstringStyle.GOOGLE)

    @property
    def is_face(self) -> bool:
        own = self.path if self.owner is None else self.path.rpartition(".")[0]
        return own in FACE or _real(own) in FACE

    @property
    def parameters(self) -> dict[str, str]:
        """Name -> annotation, without `self` and `cls`."""
        assert isinstance(self.node, ast.FunctionDef)
        given = self.node.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        if self.owner is not None and "staticmethod" not in self.decorators:
            every = every[1:]
        return {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in every if a}

    @property
    def sections(self) -> dict[str, str]:
        """The entries of `Args:`, name -> text."""
        return {
            entry.arg_name.lstrip("*"): entry.description or ""
            for entry in self.doc.params
            if entry.args[0] == "param"
        }

    @property
    def returns(self) -> str:
        """The annotation of the result; empty where nothing is returned."""
        assert isinstance(self.node, ast.FunctionDef)
        kind = "" if self.node.returns is None else ast.unparse(self.node.returns)
        return "" if kind in ("None", "NoReturn", "Self") else kind

    @property
    def decorators(self) -> list[str]:
        return [ast.unparse(d) for d in getattr(self.node, "decorator_list", ())]

    @property
    def is_property(self) -> bool:
        return any("property" in decorator for decorator in self.decorators)


def _real(path: str) -> str:
    """A name of a folder's module by the folder, as `_HOMES` may have it."""
    module, _, name = path.rpartition(".")
    return f"{module.rpartition('.')[0]}.{name}"


@cache
def names() -> list[Name]:
    return list(_names())


def _names() -> Iterator[Name]:
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        if any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        path = ".".join(part for part in parts if part != "__init__")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        yield Name(path, tree)
        for node in _public(tree):
            yield Name(f"{path}.{node.name}", node)
            if isinstance(node, ast.ClassDef):
                for method in _public(node):
                    yield Name(f"{path}.{node.name}.{method.name}", method, node)


def _public(tree: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def functions() -> list[Name]:
    return [name for name in names() if isinstance(name.node, ast.FunctionDef)]


def classes() -> list[Name]:
    return [name for name in names() if isinstance(name.node, ast.ClassDef)]


def constructor(name: Name) -> Name | None:
    assert isinstance(name.node, ast.ClassDef)
    for node in name.node.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return Name(f"{name.path}.__init__", node, name.node)
    return None


def test_what_is_walked():
    paths = {name.path for name in names()}
    assert len(paths) > 500
    assert {"gptjax.model.forward", "gptjax.config.ModelConfig.replace"} <= paths
    found = {name.path for name in names() if name.owner is None and name.is_face}
    assert {path.rpartition(".")[2] for path in found} >= set(gptjax.__all__)


def test_every_public_name_has_a_docstring():
    assert [name.path for name in names() if not name.text] == []


def test_arguments_are_the_parameters():
    wrong = {}
    for name in functions():
        if name.is_property:
            continue
        expected, given = set(name.parameters), set(name.sections)
        if (given or len(expected) > (1 if name.is_face else 3)) and given != expected:
            wrong[name.path] = given ^ expected
    assert wrong == {}


def test_arguments_of_constructors():
    wrong = {}
    for name in classes():
        made = constructor(name)
        if made is None:
            continue
        given = set(made.sections) | set(name.sections)
        if (given or name.is_face or len(made.parameters) > 3) and given != set(made.parameters):
            wrong[name.path] = given ^ set(made.parameters)
    assert wrong == {}


def test_results_are_told():
    silent = []
    for name in functions():
        # What a method without choices gives is its first sentence.
        short = name.owner is not None and len(name.parameters) < 2
        if name.is_face and name.returns and not (short or name.is_property or name.doc.returns):
            silent.append(name.path)
    assert silent == [], silent


def _raised_here(node: ast.AST) -> Iterator[ast.Raise]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(child, ast.Raise):
            yield child
        yield from _raised_here(child)


def test_errors_are_told():
    silent = []
    for name in functions():
        raised = [ast.unparse(found) for found in _raised_here(name.node)]
        told = {entry.type_name for entry in name.doc.raises}
        if any("UserError(" in text for text in raised) and "UserError" not in told:
            silent.append(name.path)
    assert silent == [], silent


def test_fields_are_told():
    silent = {}
    for name in classes():
        assert isinstance(name.node, ast.ClassDef)
        head = [*name.decorators, *map(ast.unparse, name.node.bases)]
        if not re.search(r"dataclass|NamedTuple", " ".join(head)):
            continue
        told = {entry.arg_name for entry in name.doc.params}
        body = name.node.body
        fields = set()
        for place, node in enumerate(body):
            if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
                continue
            field = ast.unparse(node.target)
            fields.add(field)
            after = body[place + 1] if body[place + 1 :] else None
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                told.add(field)
        public = {field for field in fields if not field.startswith("_")}
        if public - told or told - fields:
            silent[name.path] = (public - told) | (told - fields)
    assert silent == {}


def test_shapes_are_told():
    silent = []
    for name in functions():
        sections = name.sections
        for parameter, kind in name.parameters.items():
            text = sections.get(parameter)
            if text is None or not _ARRAY.fullmatch(kind):
                continue
            if not (_SHAPE.search(f"{parameter} {text}") or _TOLD.search(text)):
                silent.append(f"{name.path}({parameter})")
        if name.is_face and _ARRAY.search(name.returns):
            text = name.doc.returns.description if name.doc.returns else name.text
            if not _SHAPE.search(text or "") and "[B, T]" not in name.text:
                silent.append(f"{name.path} -> {name.returns}")
    assert silent == [], silent


@pytest.mark.parametrize("path", SOURCES)
def test_sources_are_told(path: str):
    texts = {name.path: " ".join(name.text.split()) for name in names()}
    path = f"gptjax.{path}"
    assert path in texts
    own = [text for other, text in texts.items() if f"{other}.".startswith(f"{path}.")]
    around = " ".join([*own, texts[path.rpartition(".")[0]]])
    for source in SOURCES[path.removeprefix("gptjax.")].split("; "):
        assert source in around, source
