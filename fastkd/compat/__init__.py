"""Adapters that compute the losses of other stacks with fastkd, under the same signatures and with the same results.

An adapter matches its stack's argument names and order, defaults, reductions and temperature factors. Quirks of a stack
are confined to its adapter; fastkd's own losses do not know them. Where an adapter deliberately differs, its docstring
and the stack's page in docs/stacks say so. Importing these modules does not import the stacks: a stack is imported only
when a class that subclasses one of its own is accessed.

`ADAPTERS` lists the adapters, with the version of each stack that the tests import. `python -m fastkd info` compares
these versions with what is installed.
"""

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

__all__ = ["ADAPTERS", "Adapter"]


@dataclass(frozen=True)
class Adapter:
    """The adapter of one stack: a row of `ADAPTERS`."""

    stack: str
    """The stack's name."""
    package: str | None
    """The package that pip installs; None if the stack is not on PyPI."""
    tested: str | None
    """The version of the package that the tests compare with; None without a package."""
    replaces: Mapping[str, str]
    """The adapter's names, each with the name in the stack that it stands in for or subclasses."""
    page: str
    """The page in docs/stacks, without its suffix."""
    tests: str
    """The file in tests/compat, without its suffix."""

    @property
    def installed(self) -> str | None:
        """The version of the package that is installed, or None."""
        try:
            return importlib.metadata.version(self.package) if self.package else None
        except importlib.metadata.PackageNotFoundError:
            return None


def _each(module: str, *names: str) -> dict[str, str]:
    """Return the entries of names that a stack has in this module and the adapter has under the same name."""
    return {name: f"{module}.{name}" for name in names}


ADAPTERS = {
    "trl": Adapter(
        "TRL", "trl", "1.16.0",
        {
            "GKDTrainer": "trl.experimental.gkd.GKDTrainer",
            "DistillationTrainer": "trl.DistillationTrainer",
            "SDFTTrainer": "trl.experimental.sdft.SDFTTrainer",
            "SDPOTrainer": "trl.experimental.sdpo.SDPOTrainer",
            "AsyncDistillationTrainer": "trl.experimental.async_distillation.AsyncDistillationTrainer",
            "GOLDTrainer": "trl.experimental.gold.GOLDTrainer",
            "IWOPDTrainer": "trl.experimental.iw_opd.IWOPDTrainer",
            "ServerDistillationTrainer": "trl.experimental.server_distillation.ServerDistillationTrainer",
            "generalized_jsd_loss": "trl.experimental.gkd.GKDTrainer.generalized_jsd_loss",
            "gold_jsd_loss": "trl.experimental.gold.GOLDTrainer.generalized_jsd_loss",
            "chunked_divergence_loss": "trl.trainer.distillation_trainer._chunked_divergence_loss",
            "chunked_jsd_loss": "trl.experimental.async_distillation.async_distillation_trainer._chunked_jsd_loss",
            **_each(
                "trl.experimental.sdft.loss_utils",
                "compute_full_logit_self_distillation_loss", "compute_topk_self_distillation_loss",
            ),
        },
        "trl", "test_compat_trl",
    ),
    "transformers": Adapter(
        "transformers", "transformers", "5.24.0",
        dict.fromkeys(("KDTrainer", "compute_loss_func", "DistillationMixin"), "transformers.Trainer"),
        "transformers", "test_compat_transformers",
    ),
    "liger": Adapter(
        "Liger Kernel", "liger-kernel", "0.8.5",
        _each(
            "liger_kernel.transformers", "LigerJSD", "LigerKLDIVLoss", "LigerTVDLoss", "LigerFusedCETVDLoss",
            "LigerFusedLinearJSD", "LigerFusedLinearKLDivLoss",
        ) | _each("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss") | _each(
            "liger_kernel.ops",
            "LigerFusedLinearScaledCrossEntropyFunction", "LigerFusedLinearScaledCrossEntropyTPFunction",
        ),
        "liger", "test_compat_liger",
    ),
    "torchtune": Adapter(
        "torchtune", "torchtune", "0.6.1",
        _each(
            "torchtune.modules.loss", "ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss",
            "ForwardKLWithChunkedOutputLoss", "ReverseKLWithChunkedOutputLoss", "SymmetricKLWithChunkedOutputLoss",
        ),
        "torchtune", "test_compat_torchtune",
    ),
    "modelopt": Adapter(
        "NVIDIA Model-Optimizer", "nvidia-modelopt", "0.47.0",
        _each("modelopt.torch.distill", "LogitsDistillationLoss", "MFTLoss")
        | _each("modelopt.torch.distill.plugins.megatron", "LogitsKLLoss", "TopKLogitsKLLoss")
        | _each("modelopt.torch.distill.plugins.huggingface", "KDTrainer")
        | _each("modelopt.torch.quantization.plugins.transformers_trainer", "QADTrainer"),
        "modelopt", "test_compat_modelopt",
    ),
    "megatron": Adapter(
        "Megatron-LM", "megatron-core", "0.16.1",
        _each("megatron.training.distillation.cached_logits_loss", "topk_kl_div"),
        "megatron", "test_compat_megatron",
    ),
    "verl": Adapter(
        "verl", "verl", "0.9.1",
        {
            "topk_losses": "verl.trainer.distillation.losses.compute_topk_loss",
            "register_loss": "verl.trainer.distillation.losses.register_distillation_loss",
        },
        "verl", "test_compat_verl",
    ),
    "veomni": Adapter(
        "VeOmni", "veomni", "0.1.12",
        _each("veomni.ops.kernels.cross_entropy", "chunk_topk_distill_function"),
        "verl", "test_compat_verl",
    ),
    "nemo_automodel": Adapter(
        "NeMo AutoModel", "nemo-automodel", "0.7.0",
        _each("nemo_automodel.components.loss.kd_loss", "KDLoss"),
        "nemo", "test_compat_nemo_swift",
    ),
    "swift": Adapter(
        "ms-swift", "ms-swift", "4.6.0",
        _each("swift.rlhf_trainers.gkd_loss", "gkd_loss"),
        "swift", "test_compat_nemo_swift",
    ),
    "speculators": Adapter(
        "speculators", "speculators", "0.9.0",
        _each(
            "speculators.losses", "kl_div_loss", "reverse_kl_div_loss", "js_div_loss", "ce_loss", "tv_loss",
            "neg_log_acceptance_loss", "lk_hybrid_loss",
        ),
        "speculators", "test_compat_speculators",
    ),
    "specforge": Adapter(
        "SpecForge", "specforge", "0.2.0",
        _each("specforge.core.loss", "LogSoftmaxLoss") | _each("specforge.core.lk_loss", "compute_acceptance_rate"),
        "specforge", "test_compat_draft_heads",
    ),
    "skyrl": Adapter(
        "SkyRL", "skyrl", "0.3.0",
        _each("skyrl.backends.skyrl_train.mtp.soft_ce", "draft_soft_ce", "draft_soft_ce_topk"),
        "skyrl", "test_compat_draft_heads",
    ),
    "axolotl": Adapter(
        "Axolotl", "axolotl", "0.19.0",
        _each("axolotl.integrations.kd.kernels.liger", "LigerFusedLinearKLTopKLogprobLoss")
        | _each("axolotl.integrations.kd", "KDPlugin"),
        "axolotl", "test_compat_axolotl",
    ),
    "nemo_rl": Adapter(
        "NeMo-RL", None, None,
        _each("nemo_rl.algorithms.loss", "DistillationLossFn"),
        "nemo_rl", "test_compat_nemo_rl",
    ),
    "lightning": Adapter(
        "Lightning", "lightning", "2.6.6",
        {"DistillationModule": "lightning.LightningModule"},
        "lightning", "test_compat_lightning",
    ),
    "mdistiller": Adapter(
        "mdistiller", None, None,
        _each("mdistiller.distillers.KD", "kd_loss") | _each("mdistiller.distillers.DKD", "dkd_loss"),
        "criteria", "test_compat_criteria",
    ),
    "torchdistill": Adapter(
        "torchdistill", "torchdistill", "1.1.5",
        _each("torchdistill.losses.mid_level", "KDLoss", "LogitStdKDLoss", "DISTLoss", "ATLoss", "RKDLoss"),
        "criteria", "test_compat_criteria",
    ),
}  # fmt: skip
"""The adapters by the name of their module: ``fastkd.compat.NAME``."""


def __getattr__(name: str) -> ModuleType:
    if name in ADAPTERS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
