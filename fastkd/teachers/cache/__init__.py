"""Teacher outputs on disk, written once and read by many training runs: safetensors shards and a manifest.

    with CacheWriter("cache", kind="hidden", vocab_size=V, weight=head.weight) as writer:
        for ids in sequences[writer.examples :]:          # resumes after an interruption
            writer.append(ids, hidden=model(ids))

    cache = TeacherCache("cache")
    for batch in DataLoader(cache, batch_size=8, collate_fn=cache.collate):
        kd_loss(student(batch.input_ids), batch.teacher, mask=batch.mask)

An example is one sequence of S tokens and S rows of teacher outputs. Row i is the teacher's output after the tokens 0
to i. Its content depends on the kind of the cache:

- "hidden": hidden states [S, H]; the lm_head, weight [V, H] and bias [V], is stored once.
- "topk": token ids and log-probabilities [S, K] and the tail's log-probability [S], at a given temperature.
- "dense": logits [S, V].

Several processes can build one cache without communicating, through `rank` and `world_size` of the writer. The result
reads like a cache built by one process. docs/teacher-cache.md describes the format. No file is ever unpickled, and a
file that contradicts the manifest is rejected before any of its tensors is returned. Reading needs safetensors: pip
install 'fastkd[cache]'.
"""

from fastkd.teachers.cache.build import build_cache, tokenizer_sha256
from fastkd.teachers.cache.format import (
    CacheError,
    IncompleteError,
    LockedError,
    Manifest,
    ManifestError,
    ShardError,
)
from fastkd.teachers.cache.parts import read_manifest
from fastkd.teachers.cache.reader import Batch, Example, TeacherCache
from fastkd.teachers.cache.writer import CacheWriter

__all__ = [
    "Batch",
    "CacheError",
    "CacheWriter",
    "Example",
    "IncompleteError",
    "LockedError",
    "Manifest",
    "ManifestError",
    "ShardError",
    "TeacherCache",
    "build_cache",
    "read_manifest",
    "tokenizer_sha256",
]
