"""Teachers behind a server: requests that score given sequences, and the teacher that the replies describe.

    teacher = ServedTeacher("http://localhost:8000", k=20)
    batch = collate(teacher.score(sequences, starts=prompt_lengths))
    kd_loss(student(input_ids).logits, batch.teacher, mask=batch.mask)

vLLM and SGLang are supported, over HTTP or by parsing what their Python engines return. Nothing of either is imported.
:class:`ServedTeacher` needs httpx: pip install 'fastkd[serving]'. All else needs torch only.
docs/serving.md explains the use, and what a server must be started with.
"""

from fastkd.serving.cache import build_cache_from_server
from fastkd.serving.client import ServedTeacher, ServingError
from fastkd.serving.requests import Request, sglang_request, vllm_params, vllm_request
from fastkd.serving.scored import Batch, Nested, Scored, collate
from fastkd.serving.sglang import from_sglang
from fastkd.serving.vllm import from_vllm, from_vllm_token_ids

__all__ = [
    "Batch",
    "Nested",
    "Request",
    "Scored",
    "ServedTeacher",
    "ServingError",
    "build_cache_from_server",
    "collate",
    "from_sglang",
    "from_vllm",
    "from_vllm_token_ids",
    "sglang_request",
    "vllm_params",
    "vllm_request",
]
