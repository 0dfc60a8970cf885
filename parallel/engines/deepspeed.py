"""The DeepSpeed engine: ZeRO stage 1 (optimizer state sharded), 2 (gradients too) or 3 (parameters too), with the same losses and
checkpoints as the torch engine.

DeepSpeed keeps flat fp32 partitions over all ranks. A checkpoint knows them as parts of named parameters (fragment.py), so what
one engine saves the other loads. Experts that expert parallelism has spread have no place in partitions over all ranks:
DeepSpeed never sees them. An optimizer of our own updates them here, the gradient rule sums their gradients, and one norm and
one clip cover both.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.config import Strict
from parallel.context import cut_batch
from parallel.engines.apart import hidden, shared_out
from parallel.engines.base import Engine, Veto
from parallel.engines.fragment import Fragment
from parallel.engines.uncompiled import import_uncompiled
from parallel.gradients import BUCKET, GradientRule
from parallel.layout import cuts, plain_name
from parallel.share import Share
from parallel.state import load_optimizer_tensors, model_tensors, optimizer_tensors

if TYPE_CHECKING:
    from parallel.grid import Grid
    from parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedConfig(Strict):
    kind: Literal["deepspeed"] = "deepspeed"
    stage: Literal[1, 2, 3] = 2
    """ZeRO stage: 1 shards the optimizer state, 2 the gradients too, 3 the parameters too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lives in CPU memory: nothing; the optimizer's state, which also works there; the sharded parameters too (stage 3)."""
    keep_whole: int = Field(100_000, ge=0)
    """Stage 3 leaves parameters of fewer elements than this whole on every rank: less to gather, for a little more memory."""
    overlap_comm: bool = False
    """Reduce gradients while the backward pass still runs."""
    bucket_bytes: int | None = Field(None, ge=4)
    """Gradients of up to so many bytes (one larger than that: alone) are reduced in one call, and DeepSpeed sets a buffer of that
    size aside; `python -m parallel.fabric` finds the number for a cluster. null: DeepSpeed's own, 2 GB."""

    def check(self, grid: Grid, compiled: bool = False) -> None:
        """Raises ValueError for what DeepSpeed cannot do on this grid, naming what it can. compiled: the blocks are."""
        for axis in ("pp", "tp"):
            if (size := grid.size(axis)) > 1:
                raise ValueError(
                    f"mesh.{axis}={size}: the deepspeed engine keeps flat partitions over all ranks, which have no place for "
                    f"parameters that only some ranks hold; use engine.kind=torch, or mesh.{axis}=1 (valid here: mesh.dp, "
                    "mesh.cp, and mesh.ep in stages 1 and 2)"
                )
        if grid.replicate > 1:
            raise ValueError(
                f"mesh.replicate={grid.replicate}: the deepspeed engine shards over all ranks; use engine.kind=torch, or leave "
                "mesh.replicate out"
            )
        if self.offload == "parameters" and self.stage != 3:
            raise ValueError(
                f"engine.offload=parameters needs sharded parameters, but engine.stage={self.stage}; use engine.stage=3, or "
                "engine.offload=optimizer"
            )
        if grid.ep > 1 and self.stage == 3:
            raise ValueError(
                f"mesh.ep={grid.ep}: ZeRO stage 3 gathers every parameter from all ranks, but these experts lie on some only; "
                "use engine.stage=1 or 2, or engine.kind=torch, or mesh.ep=1"
            )
        if grid.ep > 1 and self.offload != "none":
            raise ValueError(
                f"mesh.ep={grid.ep}: engine.offload={self.offload} would leave the experts' optimizer state on the device, for "
                "they are not in DeepSpeed's partitions; use engine.offload=none or mesh.ep=1"
            )
        if compiled and self.stage == 3:
            raise ValueError(
                "train.compile=true: ZeRO stage 3 gathers parameters in hooks inside the blocks; use engine.stage=1 or 2, or "
                "train.compile=false"
            )

    def build(self, model: nn.Module, blocks: Any, optimizer: Any, mesh: Mesh, clip: float | None) -> DeepSpeedEngine:
        return DeepSpeedEngine(self, model, optimizer, mesh, clip)

    def settings(self, clip: float | None, pin: bool) -> dict[str, Any]:
        """DeepSpeed's own configuration. pin: page-locked memory for what is offloaded."""
        zero: dict[str, Any] = {"stage": self.stage, "overlap_comm": self.overlap_comm}
        if self.bucket_bytes is not None:
            zero["reduce_bucket_size"] = self.bucket_bytes // 4  # it counts elements, and gradients are fp32 here
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = self.keep_whole
        if self.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
        if self.offload == "parameters":
            zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
        return {
            "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: the loop decides what a micro-batch is
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its own CPU Adam would be compiled for minutes at first use
            "gradient_clipping": clip or 0.0,
        }


class _KeepAutocast(nn.Module):
    """DeepSpeed turns a caller's autocast off inside its forward (on GPUs only); this turns it on again below."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, autocast: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(**autocast):
            return self.model(*args, **kwargs)


class DeepSpeedEngine(Engine):
    """The model has been cut over expert and context ranks before (parallel/expert/, parallel/context/)."""

    def __init__(self, config: DeepSpeedConfig, model: nn.Module, optimizer: Any, mesh: Mesh, clip: float | None):
        import deepspeed  # 1.5 s, and only for those who ask for it

        # It asks of every optimizer whether it is its own Muon, which compiles its kernels.
        import_uncompiled("deepspeed.runtime.zero.muon.muon_optimizer")
        config.check(mesh.grid)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if not dist.is_initialized():
            raise ValueError("the deepspeed engine needs a process group, also for one rank")
        # On CPUs DeepSpeed would compile a shared-memory all-reduce in C++ at first use, for minutes; gloo does without.
        shared_memory = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
        if shared_memory is not None:
            deepspeed.ops.__compatible_ops__[shared_memory.NAME] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        if deepspeed.utils.groups._WORLD_GROUP is None:  # it would form one that waits for half an hour
            deepspeed.utils.groups._WORLD_GROUP = dist.new_group(timeout=mesh.processes.timeout)
        self.model, self.stage, self.clip = model, config.stage, clip
        self.ranks = mesh.processes.world
        self.cut = partial(cut_batch, mesh=mesh)
        table = cuts(model)
        named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        self.apart = {name: parameter for name, parameter in named.items() if name in table}
        self.names = {name: parameter for name, parameter in named.items() if name not in table}
        self.shapes = {name: parameter.shape for name, parameter in self.names.items()}
        whole: Optimizer = optimizer(model)
        if not isinstance(whole, torch.optim.AdamW):
            raise ValueError(
                f"{type(whole).__name__}: DeepSpeed's flat partitions serve optimizers that treat every element alike, and "
                "checkpoints of them know AdamW; use optimizer.kind=adamw, or engine.kind=torch"
            )
        ours, self.experts = shared_out(whole, set(self.apart.values()))
        self.rule = GradientRule(model, mesh, only=self.apart, bucket=config.bucket_bytes or BUCKET)
        self.device = next(model.parameters()).device.type
        if config.offload != "none":
            for group in ours.param_groups:
                group["foreach"], group["fused"] = False, True  # one pass over memory instead of ten, on a CPU
        settings = config.settings(clip, pin=self.device == "cuda")
        with hidden(model, set(self.apart.values())):  # what it finds it takes over, and copies from rank 0
            self.engine, *_ = deepspeed.initialize(model=_KeepAutocast(model), optimizer=ours, config=settings)
        self.zero: Any = self.engine.optimizer
        self.norm, self.expert_norm = math.inf, 0.0
        self.veto: Veto = None
        self.called_off = False
        self._judge_norms()
        # Now: DeepSpeed ties state to parameters once, after the first group's first step, when other groups have none yet.
        self._initialise_state()

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

    def step(self, lr: float, veto: Veto = None) -> float:
        for optimizer in (self.engine.optimizer, self.experts):
            for group in [] if optimizer is None else optimizer.param_groups:
                group["lr"] = lr
        self._reduce_experts()
        # Where it meets something that is not finite before it takes a norm, the norm stays as it is here.
        self.norm, self.veto = math.inf, veto
        self.engine.step()
        self._update_experts(updated=not self.zero.overflow)
        return self.norm

    def _judge_norms(self) -> None:
        """Has DeepSpeed take its norm through `_judged`.

        When the norm is not finite it drops the gradients and updates nothing, as it does with a loss scale that was too large:
        a veto goes the same way. Stages 1 and 2 ask for the norm, stage 3 for the norms of groups.
        """
        if self.stage == 3:
            groups = self.zero._get_norm_groups

            def judged(*args: Any, **kwargs: Any) -> list[Tensor]:
                norms = groups(*args, **kwargs)
                each = torch.stack([torch.as_tensor(norm) for norm in norms])
                good = (each >= 0).all() & each.isfinite().all()  # DeepSpeed says -1 for one that is not finite
                whole = self._judged(torch.where(good, torch.linalg.vector_norm(each), math.inf))
                return [whole] if self.called_off else norms

            self.zero._get_norm_groups = judged
        else:
            whole = self.zero.scaled_global_norm
            self.zero.scaled_global_norm = lambda *args, **kwargs: self._judged(whole(*args, **kwargs))

    def _judged(self, norm: Tensor) -> Tensor:
        """DeepSpeed's norm -> that by which it clips, with the experts in it; not finite to skip the step."""
        if self.experts is not None:
            norm = (norm.double().square() + self.expert_norm**2).sqrt().to(norm.dtype)
        value = float(norm)
        self.norm = value if math.isfinite(value) else math.inf
        self.called_off = math.isfinite(value) and self.veto is not None and self.veto(value)
        return torch.full_like(norm, math.inf) if self.called_off else norm

    # -------------------------------------------------------------------------- experts that DeepSpeed does not know of

    def _reduce_experts(self) -> None:
        if self.experts is not None:
            gradients = [parameter.grad for parameter in self.apart.values() if parameter.grad is not None]
            torch._foreach_div_(gradients, self.ranks)  # the loss was scaled for DeepSpeed's averages
            self.rule.reduce()
            self.expert_norm = self.rule.clip(None)

    def _update_experts(self, updated: bool) -> None:
        if self.experts is None:
            return
        if updated:
            if self.clip is not None and (factor := self.clip / (self.norm + 1e-6)) < 1.0:
                torch._foreach_mul_([p.grad for p in self.apart.values() if p.grad is not None], factor)
            self.experts.step()
        self.experts.zero_grad(set_to_none=True)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    @property
    def _flats(self) -> list[Tensor]:
        """This rank's flat fp32 partitions: what DeepSpeed's optimizer updates."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _initialise_state(self) -> None:
        """Gives the flat partitions their (zero) optimizer state before the first step, so that it can be saved and loaded."""
        state = self.zero.optimizer.state
        fused = any(group.get("fused") for group in self.zero.optimizer.param_groups)
        for flat in self._flats:
            if not state.get(flat):
                # The fused kernel wants its count where the weights are, the other form on the host.
                step = torch.zeros((), device=flat.device if fused else "cpu")
                state[flat] = {"step": step, **{key: torch.zeros_like(flat.detach()) for key in MOMENTS}}
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def _fragment(self, name: str, key: str | None) -> Tensor:
        """What this rank's partition holds of a parameter (key None) or of one of its moments."""
        parameter: Any = self.names[name]  # with what DeepSpeed has hung on it
        shape = self.shapes[name]
        if self.stage == 3:
            flat, _ = self.zero._get_fp32_opt_state_partition(parameter, False, key)
            start = flat.numel() * dist.get_rank(parameter.ds_process_group)
            flat = flat.narrow(0, 0, min(flat.numel(), max(0, shape.numel() - start)))  # without the padding at the end
        elif parameter._hp_mapping is None:  # all of it lies in other ranks' partitions
            flat, start = self._flats[0].narrow(0, 0, 0), 0
        else:
            flat, start = parameter._hp_mapping.get_hp_fragment(key), parameter._hp_mapping.lp_fragment_address.start
        return Fragment.at(start, flat.detach(), shape, name)

    def state_tensors(self) -> dict[str, Tensor]:
        self._initialise_state()
        tensors: dict[str, Tensor] = {}
        for name in self.names:
            tensors[f"model/{name}"] = self._fragment(name, None)
            for key in MOMENTS:
                tensors[f"optimizer/{name}/{key}"] = self._fragment(name, key)
            tensors[f"optimizer/{name}/step"] = self.zero.optimizer.state[self._flats[0]]["step"].clone()
        for name, tensor in model_tensors(self.model).items():
            tensors.setdefault(name, tensor)  # buffers, and experts that DeepSpeed does not know of
        if self.experts is not None:
            tensors |= optimizer_tensors(self.model, self.experts)
        return tensors

    def replicated(self) -> dict[str, Tensor]:
        """Partitions are on one rank each. What the model computes with is on all of them, but for stage 3."""
        copies = {} if self.stage == 3 else {f"model/{name} (copy)": p.detach() for name, p in self.names.items()}
        return {**self.state_tensors(), **copies}

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        steps = {float(tensors[f"optimizer/{name}/step"]) for name in self.names}
        if len(steps) > 1:
            raise ValueError(
                f"this checkpoint's parameters have taken different numbers of steps {sorted(steps)}; "
                "DeepSpeed keeps one count for all: resume with engine.kind=torch"
            )
        own = self.state_tensors()
        for name, tensor in own.items():
            if isinstance(tensor, Share):
                tensor.fill(tensors[name])
            elif name.startswith("model/"):
                tensor.copy_(tensors[name])
        for flat in self._flats:
            self.zero.optimizer.state[flat]["step"].fill_(steps.copy().pop())
        if self.experts is not None:
            load_optimizer_tensors(self.model, self.experts, tensors)
        self._spread_weights()

    def _spread_weights(self) -> None:
        """From the fp32 partitions to the parameters that the model computes with, on all ranks. Collective."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for group in range(len(self._flats)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
