"""The DeepSpeed engine: ZeRO stage 1 (optimizer state sharded) or 2 (gradients too), with the same losses and checkpoints.

DeepSpeed keeps flat fp32 partitions. A checkpoint never sees them: parameters and optimizer state are assembled by name, so
what one engine saves the other loads.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.config import Strict
from parallel.engines.base import Engine
from parallel.mesh import Mesh
from parallel.state import load_model_tensors, model_tensors


class DeepSpeedConfig(Strict):
    kind: Literal["deepspeed"] = "deepspeed"
    stage: Literal[1, 2] = 2
    """ZeRO stage: 1 shards the optimizer state, 2 the gradients too."""
    overlap_comm: bool = False
    """Reduce gradients while the backward pass still runs."""

    def build(self, model: nn.Module, blocks: Any, optimizer: Any, mesh: Mesh, clip: float | None) -> DeepSpeedEngine:
        return DeepSpeedEngine(self, model, optimizer, mesh, clip)


class _KeepAutocast(nn.Module):
    """DeepSpeed turns a caller's autocast off inside its forward (on GPUs only); this turns it on again below."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, autocast: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(**autocast):
            return self.model(*args, **kwargs)


class DeepSpeedEngine(Engine):
    def __init__(self, config: DeepSpeedConfig, model: nn.Module, optimizer: Any, mesh: Mesh, clip: float | None):
        import deepspeed  # 1.5 s, and only for those who ask for it

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if not dist.is_initialized():
            raise ValueError("the deepspeed engine needs a process group, also for one rank")
        # On CPUs DeepSpeed would compile a shared-memory all-reduce in C++ at first use, for minutes; gloo does without.
        shared_memory = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
        if shared_memory is not None:
            deepspeed.ops.__compatible_ops__[shared_memory.NAME] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self.model, self.ranks = model, mesh.dp_size
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: the loop decides what a micro-batch is
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": config.stage, "overlap_comm": config.overlap_comm},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": clip or 0.0,
        }
        self.device = next(model.parameters()).device.type
        self.engine, *_ = deepspeed.initialize(model=_KeepAutocast(model), optimizer=optimizer(model), config=settings)
        self.zero: Any = self.engine.optimizer
        self.names = dict(model.named_parameters())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        autocast = {
            "device_type": self.device,
            "dtype": torch.get_autocast_dtype(self.device),
            "enabled": torch.is_autocast_enabled(self.device),
        }
        return self.engine(autocast, *args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.ranks, scale_wrt_gas=False)  # DeepSpeed averages; the interface promises a sum

    def step(self, lr: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()  # DeepSpeed itself skips the update when the norm is not finite
        return float(self.engine.get_global_grad_norm() or 0.0)

    def _initialise_state(self) -> None:
        """Gives the flat partitions their (zero) optimizer state before the first step, so that it can be saved and loaded."""
        optimizer = self.zero.optimizer
        for flat in self.zero.single_partition_of_fp32_groups:
            if not optimizer.state.get(flat):
                zeros = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[flat] = {"step": torch.tensor(0.0), **zeros}
        self.zero._lazy_init_hp_params_optimizer_state()

    def state_tensors(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._initialise_state()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.names.items():
            tensors[f"model/{name}"] = safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"optimizer/{name}/{key}"] = safe_get_full_optimizer_state(parameter, key)
            tensors[f"optimizer/{name}/step"] = self._steps().clone()
        for name, tensor in model_tensors(self.model).items():
            tensors.setdefault(name, tensor)  # buffers
        return tensors

    def _steps(self) -> Tensor:
        flat = self.zero.single_partition_of_fp32_groups[0]
        return torch.as_tensor(self.zero.optimizer.state[flat]["step"], dtype=torch.float32)

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._initialise_state()
        load_model_tensors(self.model, tensors)
        for name, parameter in self.names.items():
            safe_set_full_fp32_param(parameter, tensors[f"model/{name}"])
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(parameter, tensors[f"optimizer/{name}/{key}"], key)
        steps = {float(tensors[f"optimizer/{name}/step"]) for name in self.names}
        if len(steps) > 1:
            raise ValueError(
                f"this checkpoint's parameters have taken different numbers of steps {sorted(steps)}; "
                "DeepSpeed keeps one count for all: resume with engine.kind=torch"
            )
        (count,) = steps
        for flat in self.zero.single_partition_of_fp32_groups:
            self.zero.optimizer.state[flat]["step"] = torch.tensor(count)
