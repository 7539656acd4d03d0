"""Teacher outputs written once and read by many trainings: a folder of safetensors shards and a manifest.

    with CacheWriter("cache", kind="hidden", vocab_size=V, weight=head.weight) as writer:
        for ids in sequences[writer.examples :]:          # a writer that was killed goes on where it was
            writer.append(ids, hidden=model(ids))

    cache = TeacherCache("cache")
    for batch in DataLoader(cache, batch_size=8, collate_fn=cache.collate):
        kd_loss(student(batch.input_ids), batch.teacher, mask=batch.mask)

An example is one sequence of S tokens and S rows of the teacher: row i is what it says after the tokens 0 to i. What a
row holds depends on the kind:

- "hidden": hidden states [S, H]; the head, weight [V, H] and bias [V], is kept once.
- "topk": token ids and log-probabilities [S, K] and the logarithm of the tail's mass [S], at a stated temperature.
- "dense": logits [S, V].

Several processes build one cache by `rank` and `world_size` of the writer, none of which needs another; it reads as if
one had. docs/teacher-cache.md has the format. Nothing is ever unpickled, and what differs from the manifest is refused
before a tensor of it is given out. Reading needs safetensors: pip install 'fastkd[cache]'.
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
