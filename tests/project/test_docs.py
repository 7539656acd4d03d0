"""The pages: their Python runs, their links work, and they cover every loss, public name and error."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch
from support.paths import ROOT
from torch import Tensor, nn

import fastkd
from fastkd.divergences import WITH_LABELS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
pytestmark = pytest.mark.skipif(len(PAGES) < 2, reason="there is no checkout around these tests")


def name_of(path: Path) -> str:
    """A page's path below docs/, since several pages are called index.md."""
    return path.relative_to(ROOT).as_posix().removeprefix("docs/")


page = pytest.mark.parametrize("path", PAGES, ids=name_of)

# Blocks that are not run here, by page and title, with the test that runs them. In the page they have ```python
# title=FILE.
ELSEWHERE = {
    ("adding-a-divergence.md", "fastkd/divergences.py"): "tests/project/test_cli.py puts it into a copy of that file",
    ("adding-a-divergence.md", "tests/support/oracles.py"): "tests/project/test_cli.py compares it with the above",
    ("kernels.md", "fastkd/divergences.py"): "test_quoted_code_is_in_the_source",
    ("stacks/lightning.md", "train.py"): "tests/compat/test_compat_lightning.py has imported lightning",
    ("stacks/modelopt.md", "distil.py"): "tests/compat/test_compat_modelopt.py has imported Model-Optimizer",
}  # fmt: skip

# Public names of the modules below that are neither losses nor parts of one.
NOT_LOSSES = {
    "fastkd.distiller": {"Tap", "find_logits", "first_tensor", "unwrapped"},
    "fastkd.features": {"over_peak", "unit"},
    "fastkd.sequences": {"Sequences", "Step"},
    "fastkd.online": {"MutualParts"},
    "fastkd.response": {"DraftParts"},
    "fastkd.sampled": {"PolicyParts"},
    "fastkd.logprobs": {"LogProbs", "StudentTopK"},
}
MODULES = (
    "response",
    "sequences",
    "sampled",
    "calibration",
    "features",
    "distiller",
    "relations",
    "online",
)


# ---- what pages are given


class Decoder(nn.Module):
    """A language model of one layer with the interface that the pages use of transformers."""

    def __init__(self, vocabulary: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def model(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.embedding(input_ids)))

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **options: Any
    ) -> Tensor:
        new = torch.randint(1, self.lm_head.out_features, (len(input_ids), max_new_tokens))
        return torch.cat([input_ids, new], -1)


def decoders(vocabulary: int) -> dict[str, Any]:
    return {"student": Decoder(vocabulary), "teacher": Decoder(vocabulary, 16)}


def for_losses() -> dict[str, Any]:
    return {**decoders(30), "prompts": torch.randint(1, 30, (2, 3))}


def for_teachers() -> dict[str, Any]:
    return {**decoders(30), "ids": torch.randint(30, (2, 6))}


def for_the_cache() -> dict[str, Any]:
    """A cache in OUT for the page's snippets to read, and sequences to write another."""
    from fastkd.teachers.cache import CacheWriter

    sequences = [torch.randint(49152, (length,)) for length in (5, 3, 4)]
    with CacheWriter(
        "OUT", kind="hidden", vocab_size=49152, weight=torch.randn(49152, 16)
    ) as writer:
        for ids in sequences:
            writer.append(ids, hidden=torch.randn(len(ids), 16))
    return {**decoders(49152), "sequences": sequences, "device": "cpu"}


def for_trl() -> dict[str, Any]:
    """Models of transformers, and chats in the form that TRL's collator takes."""
    import datasets
    from support import tiny_models

    chat = [
        {"role": "user", "content": "in the"},
        {"role": "assistant", "content": "beginning god"},
    ]
    return {
        "student": tiny_models.llama(),
        "teacher": tiny_models.llama(width=24),
        "tokenizer": tiny_models.tokenizer(),
        "chats": datasets.Dataset.from_dict({"messages": [chat] * 8}),
    }


def for_the_trainer() -> dict[str, Any]:
    """The names for the trainer's pages, and a dataset of token ids."""
    from support import tiny_models

    ids = torch.randint(3, 61, (8, 6))
    models = {"student": tiny_models.llama(), "teacher": tiny_models.llama(width=24)}
    return {**models, "data": [{"input_ids": row, "labels": row} for row in ids]}


class Provided(NamedTuple):
    """What a page's snippets need: names, and whether torch.distributed has a group of this process alone."""

    names: Callable[[], dict[str, Any]] = dict
    group: bool = False
    stacks: bool = False  # whether its snippets import another stack
    served: bool = False  # whether its snippets ask the server at `url`


GIVEN = {
    "losses.md": Provided(for_losses),
    "parallel.md": Provided(group=True),
    "stacks/megatron.md": Provided(group=True),
    "serving.md": Provided(for_losses, served=True),
    "teacher-cache.md": Provided(for_the_cache),
    "teachers.md": Provided(for_teachers),
    "stacks/transformers.md": Provided(for_the_trainer, stacks=True),
    "stacks/trl.md": Provided(for_trl, stacks=True),
}


@pytest.fixture
def group(path: Path, tmp_path: Path) -> Iterator[None]:
    """A group of one process, for pages that need one."""
    if not GIVEN.get(name_of(path), Provided()).group:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def address(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The url of a server that speaks as vLLM does, for pages that ask one."""
    if not GIVEN.get(name_of(path), Provided()).served:
        yield {}
        return
    from support.served import Bigram, Server

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(Bigram(30)) as server:
        yield {"url": server.url}


# ---- snippets


class Block(NamedTuple):
    line: int  # line number of the block's first line in the page
    title: str
    body: str


def blocks(path: Path) -> list[Block]:
    """The Python blocks of a page."""
    text = path.read_text(encoding="utf-8")
    results = []
    for match in re.finditer(r"^```python([^\n]*)\n(.*?)^```$", text, re.S | re.M):
        info = match[1].strip()
        assert info == "" or info.startswith("title="), f"{name_of(path)}: ```python {info}"
        line = text.count("\n", 0, match.start(2)) + 1
        results.append(Block(line, info.removeprefix("title="), match[2]))
    return results


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.stacks] * GIVEN.get(name_of(path), Provided()).stacks)
        for path in PAGES
    ],
    ids=name_of,
)
def test_snippets_run(
    path: Path,
    tmp_path: Path,
    group: None,
    address: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Snippets run in order, in one namespace and an empty folder; a block with a title is a module there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    given = GIVEN.get(name_of(path), Provided()).names()
    names: dict[str, Any] = {"__name__": path.stem, **given, **address}
    written = set()
    try:
        for block in blocks(path):
            if (name_of(path), block.title) in ELSEWHERE:
                continue
            if block.title:
                with (tmp_path / block.title).open("a", encoding="utf-8") as module:
                    module.write(f"{block.body}\n\n")
                written.add(Path(block.title).stem)
                continue
            source = (
                "\n" * (block.line - 1) + block.body
            )  # so that tracebacks show the page's line numbers
            exec(compile(source, str(path), "exec"), names)
    finally:
        for module_name in written:
            sys.modules.pop(module_name, None)


def test_blocks_that_run_elsewhere_exist() -> None:
    titles = {(name_of(path), block.title) for path in PAGES for block in blocks(path)}
    assert titles >= ELSEWHERE.keys()


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)


# ---- links


def anchors(path: Path) -> set[str]:
    """The anchors of headings, as GitHub generates them."""
    results: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(path), re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in results:
            number += 1
        results.add(name)
    return results


@page
def test_links_have_a_target(path: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "`", prose(path))
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        goal = (path.parent / name).resolve() if name else path
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            dead.append(target)
    assert not dead, f"{name_of(path)}: {dead}"


@page
def test_tests_that_a_page_names_exist(path: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)", path.read_text(encoding="utf-8"))
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (ROOT / file).is_file()
        or not re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.M)
    ]
    assert not missing, f"{name_of(path)}: {missing}"


# ---- the losses


def public(name: str) -> set[str]:
    """Functions and classes that fastkd.<name> defines or names in __all__."""
    module = importlib.import_module(f"fastkd.{name}")
    members = set(getattr(module, "__all__", ())) or {
        member
        for member, value in vars(module).items()
        if not member.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }
    return members - NOT_LOSSES.get(module.__name__, set())


LOSSES = {
    "fastkd": {"kd_loss", "fused_linear_kd_loss", "KDLoss", "FusedLinearKDLoss"},
    "divergences": {*fastkd.DIVERGENCES, *WITH_LABELS},
    **{name: public(name) for name in (*MODULES, "logprobs")},
}


@pytest.mark.parametrize("module", LOSSES)
def test_every_loss_has_an_entry(module: str) -> None:
    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    code = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", prose))))
    missing = LOSSES[module] - code
    assert not missing, f"docs/losses.md has no entry for {sorted(missing)} of {module}"


@pytest.mark.parametrize("module", [name for name in LOSSES if name != "divergences"])
def test_every_loss_is_called_somewhere(module: str) -> None:
    code = "\n".join(block.body for path in PAGES for block in blocks(path))
    missing = {name for name in LOSSES[module] if not re.search(rf"\b{name}\(", code)}
    assert not missing, f"no page calls {sorted(missing)} of {module}"


def test_names_listed_as_no_loss_exist() -> None:
    for name, others in NOT_LOSSES.items():
        module = importlib.import_module(name)
        assert all(hasattr(module, other) for other in others)


def test_names_listed_as_no_loss_do_not_end_like_a_loss() -> None:
    """Names that are listed as no loss must not end like a loss."""
    assert not [n for names in NOT_LOSSES.values() for n in names if re.search(r"[lL]oss$", n)]


# ---- names, messages and what is quoted


def test_every_public_name_has_its_docstring_on_the_site() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in PAGES if path.parent.name == "api")
    shown = set(re.findall(r"^::: fastkd\.([\w.]+)$", pages, re.M))
    assert shown >= {*fastkd.__all__, "teachers.cache", "serving", *MODULES}, {
        *fastkd.__all__,
        *MODULES,
    } - shown


class Message(NamedTuple):
    """The texts of a raised or logged message, with … for filled-in values."""

    where: str
    texts: tuple[str, ...]


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            getattr(part, "value", "") if isinstance(part, ast.Constant) else "…"
            for part in node.values
        )
    if isinstance(node, ast.BinOp):
        return f"{_text(node.left) or '…'}{_text(node.right) or '…'}"
    return None


@functools.cache
def messages() -> list[Message]:
    """The messages of every raise, warning and obstacle of the package. Adapters have their own pages."""
    results = []
    functions_with_messages = {"warn", "_log_once", "Obstacle", "CollectiveError"}
    for path in sorted((ROOT / "fastkd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            raised = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(raised, ast.Call):
                continue
            name = ast.unparse(raised.func).rpartition(".")[2]
            if name == "Scalar":  # a row of the table of options
                results += [
                    Message(
                        f"{path.relative_to(ROOT)}:{node.lineno}",
                        (keyword.value.value.replace("{value}", "…"),),
                    )
                    for keyword in raised.keywords
                    if keyword.arg == "needs_labels" and isinstance(keyword.value, ast.Constant)
                ]
            if (
                isinstance(node, ast.Raise)
                or name in functions_with_messages
                or ast.unparse(raised.func) == "super().__init__"
            ):
                texts = tuple(filter(None, map(_text, raised.args)))
                if texts and "compat" not in path.parts:
                    results.append(Message(f"{path.relative_to(ROOT)}:{node.lineno}", texts))
    return results


def quoted_messages() -> list[str]:
    """The terms of docs/troubleshooting.md: lines of code that a line with a colon follows."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    terms = "\n".join(re.findall(r"^(`.+`)\n:  ", text, re.M))
    return [a or b for a, b in re.findall(r"``(.+?)``|`([^`]+)`", terms)]


def test_quoted_messages_are_in_the_source() -> None:
    texts = [text for message in messages() for text in message.texts]
    quoted = quoted_messages()
    assert len(quoted) > 100
    missing = [message for message in quoted if not any(message in text for text in texts)]
    assert not missing, f"docs/troubleshooting.md quotes what nothing says: {missing}"


def test_every_message_is_explained() -> None:
    """Every message is explained, except those that say what an argument must be, explained together, and those that
    only pass on another message."""
    quoted = quoted_messages()
    unexplained = [
        message
        for message in messages()
        if not any(re.search(r"\bmust\b", text) for text in message.texts)
        and any(re.search(r"[a-z] [a-z]", text) for text in message.texts)
        and not any(part in text for part in quoted for text in message.texts)
    ]
    assert not unexplained, unexplained


def test_quoted_code_is_in_the_source() -> None:
    """Lines of code in docs/kernels.md that name their file, and every `file` `name` pair, are in the source."""
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    blocks_of_files = re.findall(r"^```\w+ title=(\S+)\n(.*?)^```$", text, re.S | re.M)
    assert blocks_of_files
    for file, body in blocks_of_files:
        assert body in (ROOT / file).read_text(encoding="utf-8"), f"{file}: run python docs/walk.py"
    named = re.findall(r"`((?:fastkd|csrc|kernels)/[\w/.]+)`\s+`(\w+)`", text)
    assert len(named) > 20
    missing = [
        (file, name)
        for file, name in named
        if not re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8"))
    ]
    assert not missing


def script(name: str) -> ModuleType:
    """A script of docs/, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # NamedTuple looks up its annotations there
    spec.loader.exec_module(module)
    return module


def test_the_walk_to_the_gradient() -> None:
    """Every function of a walk exists and mentions the next, and the line numbers are current."""
    walk = script("walk")
    page = walk.PAGE.read_text(encoding="utf-8")
    walks = walk.walks(page)
    assert list(walks) == ["eager mode", "reference", "portable", "cpu", "triton", "cuda"]
    entry = walks["eager mode"]
    for name, hops in walks.items():
        assert name == "eager mode" or not hops[-1].function, f"{name} ends before the line"
        chain = hops if hops is entry else [entry[-1], *hops]
        for hop, following in itertools.pairwise(chain):
            body = walk.span(hop.path, hop.function)[1]
            through = re.search(r"\(through `(\w+)`\)", hop.remark)
            mentioned = through[1] if through else following.function.partition(".")[0]
            assert re.search(rf"\b{mentioned}\b", body), (
                f"{name}: {hop.function} in {hop.path} does not mention {mentioned}"
            )
    assert walk.numbered(page) == page, "run python docs/walk.py"


# At a width of 1,300 pixels the site's middle column shows 88 characters.
@pytest.mark.parametrize("name", ["index.md", "guide.md", "install.md", "losses.md"])
def test_code_of_the_first_pages_does_not_scroll_sideways(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```\w+[^\n]*\n(.*?)^```$", text, re.S | re.M))
    wide = [line for line in code.splitlines() if len(line) > 84]
    assert not wide, wide


ARITY = {
    "mfrac": 2,
    "msub": 2,
    "msup": 2,
    "msubsup": 3,
}  # the number of children that MathML requires


def test_formulas_are_typeset() -> None:
    """Indented blocks of the pages become mathematics, code does not, and the output is well-formed."""
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    try:
        formulas = importlib.import_module("formulas")
    finally:
        sys.path.pop(0)
    blocks_of_pages = [
        block for path in PAGES for block in re.findall(r"(?<=\n\n)(?: {4}\S.*\n)+", prose(path))
    ]
    assert blocks_of_pages
    for block in blocks_of_pages:
        assert formulas.is_formula(block), f"an indented block that is no formula: {block}"
        made = ElementTree.fromstring(formulas.block(block))
        for element in made.iter():
            assert len(element) == ARITY.get(element.tag, len(element)), (element.tag, block)
    assert not formulas.is_formula("    loss = fastkd.kd_loss(student_logits, teacher_logits)\n")
    assert formulas.inline("½ Σ (√p + q)²") == (
        '<math><mfrac><mn>1</mn><mn>2</mn></mfrac><mspace width="0.17em"/><mo>Σ</mo><mspace width="0.17em"/>'
        "<msup><mrow><mo>(</mo><msqrt><mi>p</mi></msqrt><mo>+</mo><mi>q</mi><mo>)</mo></mrow><mrow><mn>2</mn></mrow>"
        "</msup></math>"
    )


def test_drawings_match_their_script() -> None:
    for draw in script("drawings").DRAWINGS:
        file = ROOT / "docs" / "img" / f"{draw.__name__}.svg"
        assert file.read_text(encoding="utf-8") == draw().svg(), "run python docs/drawings.py"
