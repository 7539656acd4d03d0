"""python -m fastkd cache: build, verify and describe a teacher cache."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastkd.teachers.cache.build import build_cache, tokenizer_sha256
from fastkd.teachers.cache.format import DTYPES, KINDS, Manifest, need
from fastkd.teachers.cache.parts import part_folder, read_manifest
from fastkd.teachers.cache.reader import TeacherCache
from fastkd.tools.info import columns

API_KEY = "FASTKD_API_KEY"  # the environment variable with the key of a server


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def _rank(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, got {text!r}")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text!r}")
    return value


def _model(text: str) -> Path:
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"must be a local Hugging Face folder, got {text!r}, which has no config.json"
        )
    return Path(text)


def _seconds(text: str) -> float:
    return _temperature(text)  # the same range and message


def _ids(text: str) -> list[list[int]]:
    """Read a file of JSON lines, each a list of token ids."""
    sequences = []
    for number, line in enumerate(_text(text).splitlines(), 1):
        try:
            ids = json.loads(line)
        except ValueError:
            ids = None
        if not (isinstance(ids, list) and ids and all(type(one) is int for one in ids)):
            raise argparse.ArgumentTypeError(
                f"must be a file with a JSON list of token ids on every line, got {text!r}, whose line {number} is none"
            )
        sequences.append(ids)
    return sequences


def _text(text: str) -> str:
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"must be a UTF-8 text file, got {text!r}: {error}") from error  # fmt: skip


def add_parser(commands: Any) -> None:
    """Add `cache` to the subparsers of python -m fastkd."""
    parser = commands.add_parser(
        "cache", help="build, verify or describe a teacher's outputs on disk"
    )
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser(
        "build",
        help="run a teacher over a text, or ask a server that runs it; resumes an interrupted build",
    )
    build.add_argument("path", metavar="OUT", help="the folder of the cache")
    teacher = build.add_mutually_exclusive_group(required=True)
    teacher.add_argument(
        "--model", type=_model, metavar="FOLDER", help="a local Hugging Face folder"
    )
    teacher.add_argument(
        "--server", metavar="URL", help="a vLLM or SGLang server, for kind topk (docs/serving.md)"
    )
    tokens = build.add_mutually_exclusive_group(required=True)
    tokens.add_argument("--text", type=_text, metavar="FILE", help="a UTF-8 text file")
    tokens.add_argument(
        "--ids",
        type=_ids,
        metavar="FILE",
        help="with --server, in place of --text: a file with a JSON list of token ids on every line",
    )
    build.add_argument(
        "--kind",
        choices=KINDS,
        help="which outputs to store; required with --model, and topk with --server",
    )
    build.add_argument(
        "--k", type=_count, default=64, help="entries per row, for kind topk (default: 64)"
    )
    build.add_argument(
        "--temperature",
        type=_temperature,
        default=1.0,
        help="temperature of the log-probabilities, for kind topk (default: 1)",
    )
    build.add_argument(
        "--length", type=_count, default=256, help="tokens per sequence (default: 256)"
    )
    build.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the outputs (default: float32)"
    )
    build.add_argument(
        "--sequences",
        type=_count,
        help="stop after this number of sequences (default: the whole text)",
    )
    build.add_argument(
        "--shard-examples", type=_count, default=64, help="sequences per shard (default: 64)"
    )
    build.add_argument(
        "--rank",
        type=_rank,
        help="the rank of this process, from 0, if several build the cache (default: $RANK, as torchrun sets it)",
    )
    build.add_argument(
        "--world-size",
        type=_count,
        help="the number of processes that build the cache (default: $WORLD_SIZE)",
    )
    _add_server_options(build)
    verify = actions.add_parser(
        "verify", help="check every digest and value; exit code 1 if one is wrong"
    )
    info = actions.add_parser("info", help="report what a cache contains and its size")
    info.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    for action in (verify, info):
        action.add_argument("path", metavar="PATH", help="the folder of the cache")


# The options of --server with their defaults.
_SERVER_OPTIONS = {
    "api": "vllm",
    "served_model": None,
    "tokenizer": None,
    "vocab_size": None,
    "concurrency": 8,
    "timeout": 600.0,
    "missing": "raise",
}


def _add_server_options(build: argparse.ArgumentParser) -> None:
    """Add the options of --server, whose defaults are in _SERVER_OPTIONS."""
    group = build.add_argument_group(
        "with --server", f"A key for the server is read from the environment variable {API_KEY}."
    )
    group.add_argument(
        "--api", choices=("vllm", "sglang"), help="the server's kind (default: vllm)"
    )
    group.add_argument("--served-model", metavar="NAME", help="the name of the model on the server")
    group.add_argument(
        "--tokenizer",
        type=_model,
        metavar="FOLDER",
        help="a local Hugging Face folder with the tokenizer for --text, and a config.json that states the vocabulary",
    )
    group.add_argument(
        "--vocab-size",
        type=_count,
        help="the size of the teacher's vocabulary (default: that of --tokenizer)",
    )
    group.add_argument("--concurrency", type=_count, help="requests under way at once (default: 8)")
    group.add_argument(
        "--timeout", type=_seconds, help="seconds for one attempt of a request (default: 600)"
    )
    group.add_argument(
        "--missing",
        choices=("raise", "drop"),
        help="what to do with positions whose log-probabilities are missing or NaN (default: raise)",
    )


def run(parsed: argparse.Namespace) -> int:
    """Run a parsed `cache` command and return its exit code."""
    try:
        if parsed.action == "build":
            rank, world_size = _process(parsed)
            folder = part_folder(Path(parsed.path), rank, world_size)
            build = _build if parsed.server is None else _build_from_server
            manifest = build(parsed, rank, world_size)
            print(f"{folder}: {manifest.examples} examples, {manifest.rows} rows")
        elif parsed.action == "verify":
            cache = TeacherCache(parsed.path)
            cache.verify()
            print(f"{parsed.path}: {cache.manifest.examples} examples match their digests")
        else:
            description = describe(read_manifest(parsed.path))
            print(json.dumps(description, indent=2) if parsed.json else text(description))
    except BrokenPipeError:  # an OSError, but not an error of the cache; fastkd.__main__ handles it
        raise
    except (ValueError, OSError, ImportError) as error:
        print(f"python -m fastkd cache {parsed.action}: {error}", file=sys.stderr)
        return 1
    return 0


def _process(parsed: argparse.Namespace) -> tuple[int, int]:
    """Return (rank, world size) from the arguments, else from torchrun's environment variables, else (0, 1)."""
    arguments = parsed.rank, parsed.world_size
    if None not in arguments:
        return arguments
    if arguments != (None, None):
        raise ValueError("--rank and --world-size must be passed together")
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return 0, 1
    try:
        rank, world_size = _rank(os.environ["RANK"]), _count(os.environ["WORLD_SIZE"])
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"RANK and WORLD_SIZE in the environment: {error}") from None
    print(f"RANK and WORLD_SIZE: this is process {rank} of {world_size}", file=sys.stderr)
    return rank, world_size


def _build(parsed: argparse.Namespace, rank: int, world_size: int) -> Manifest:
    given = [name for name in _SERVER_OPTIONS if getattr(parsed, name) is not None]
    given += ["ids"] if parsed.ids is not None else []
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} must be passed with --server only")
    if parsed.kind is None:
        raise ValueError(f"--kind must be one of {', '.join(KINDS)} with --model")
    transformers = need("transformers", "building a teacher cache", "cache-build")
    need("rich", "building a teacher cache", "cache-build")
    from rich.console import Console
    from rich.progress import Progress

    transformers.utils.logging.disable_progress_bar()
    tokenizer, sequences = _tokenized(transformers, parsed.model, parsed)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        parsed.model, local_files_only=True, dtype=torch.float32
    )
    vocab_size = model.config.get_text_config().vocab_size
    _check_vocabulary(sequences, vocab_size)
    # torchrun sets LOCAL_RANK, the rank among the processes of this machine, which share its GPUs and its terminal.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    model.to(torch.device("cuda", local_rank % gpus) if gpus else "cpu")
    with Progress(console=Console(stderr=True), disable=local_rank > 0) as progress:
        task = progress.add_task("sequences", total=len(sequences))
        return build_cache(
            parsed.path,
            model,
            sequences,
            kind=parsed.kind,
            dtype=DTYPES[parsed.dtype],
            shard_examples=parsed.shard_examples,
            k=parsed.k,
            temperature=parsed.temperature,
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            teacher=parsed.model.resolve().name,
            rank=rank,
            world_size=world_size,
            progress=lambda done: progress.update(task, completed=done),
        )


def _tokenized(
    transformers: Any, folder: Path, parsed: argparse.Namespace
) -> tuple[Any, Sequence[torch.Tensor]]:
    """Return the tokenizer of a folder, and --text as sequences of --length tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # Tokenize a list of lines rather than one string, so that the tokenizer uses every core.
    lines = tokenizer(
        parsed.text.splitlines(keepends=True) or [""], add_special_tokens=False, verbose=False
    )
    tokens = torch.tensor(list(itertools.chain.from_iterable(lines["input_ids"])))
    sequences = tokens.split(parsed.length)[: parsed.sequences] if len(tokens) else ()
    return tokenizer, sequences


def _check_vocabulary(sequences: Sequence[torch.Tensor], vocab_size: int) -> None:
    largest = max((int(ids.max()) for ids in sequences), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer returned id {largest}, but the model's vocabulary has {vocab_size} entries; use "
            "the tokenizer of the model"
        )


def _build_from_server(parsed: argparse.Namespace, rank: int, world_size: int) -> Manifest:
    from fastkd.serving import ServedTeacher, build_cache_from_server
    from fastkd.serving.progress import progress_bar

    options = {name: getattr(parsed, name) for name in _SERVER_OPTIONS}
    options = {
        name: default if options[name] is None else options[name]
        for name, default in _SERVER_OPTIONS.items()
    }
    if parsed.kind not in (None, "topk"):
        raise ValueError(f"--kind must be topk with --server, got {parsed.kind}")
    if parsed.temperature != 1.0:
        raise ValueError(
            f"--temperature must be 1 with --server, got {parsed.temperature}: a server's log-probabilities are at 1"
        )
    folder, vocab_size, sha256 = options.pop("tokenizer"), options.pop("vocab_size"), None
    if vocab_size is None and folder is not None:
        vocab_size = _vocab_size(folder)
    if vocab_size is None:
        raise ValueError("--vocab-size or --tokenizer must be passed with --server")
    if parsed.ids is not None:
        sequences: Sequence[torch.Tensor] = [
            torch.tensor(ids) for ids in parsed.ids[: parsed.sequences]
        ]
        if folder is not None:
            transformers = need("transformers", "reading a tokenizer", "cache-build")
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            sha256 = tokenizer_sha256(tokenizer)
    elif folder is None:
        raise ValueError("--tokenizer must be passed with --server and --text")
    else:
        transformers = need("transformers", "reading a tokenizer", "cache-build")
        tokenizer, sequences = _tokenized(transformers, folder, parsed)
        sha256 = tokenizer_sha256(tokenizer)
    if parsed.ids is None:
        _check_vocabulary(sequences, vocab_size)
    teacher = ServedTeacher(
        parsed.server,
        k=parsed.k,
        model=options.pop("served_model"),
        vocab_size=vocab_size,
        api_key=os.environ.get(API_KEY) or None,
        **options,
    )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    with progress_bar(len(sequences), disable=local_rank > 0) as show:
        return build_cache_from_server(
            parsed.path,
            teacher,
            sequences,
            vocab_size=vocab_size,
            dtype=DTYPES[parsed.dtype],
            shard_examples=parsed.shard_examples,
            tokenizer_sha256=sha256,
            rank=rank,
            world_size=world_size,
            progress=show,
        )


def _vocab_size(folder: Path) -> int | None:
    """Return the size of the vocabulary that a folder's config.json states, if it does."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config.get("text_config", config).get("vocab_size")
    return size if type(size) is int else None


def describe(manifest: Manifest) -> dict[str, Any]:
    """Return the facts that `info` prints, ready for JSON; sizes are in bytes."""
    head = manifest.head.bytes if manifest.head else 0
    total = head + sum(shard.bytes for shard in manifest.shards)
    per_row = (total - head) / manifest.rows if manifest.rows else None
    dense = 4 * manifest.vocab_size
    return {
        "kind": manifest.kind,
        "complete": manifest.complete,
        "teacher": manifest.teacher,
        "vocab_size": manifest.vocab_size,
        "hidden_size": manifest.hidden_size,
        "k": manifest.k,
        "temperature": manifest.temperature,
        "dtypes": manifest.dtypes,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "examples": manifest.examples,
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "bytes": total,
        "head_bytes": head,
        "bytes_per_row": per_row,
        "dense_float32_bytes_per_row": dense,
        "times_smaller_per_row": dense / per_row if per_row else None,
    }


def text(description: dict[str, Any]) -> str:
    """Format the result of :func:`describe` for people."""
    rows = []
    for name, value in description.items():
        if value is None:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {dtype}" for key, dtype in value.items())
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, (int, float)):
            value = f"{value:,.2f}".removesuffix(".00")
        rows.append((name.replace("_", " "), value))
    return "\n".join(columns(rows, indent=""))
