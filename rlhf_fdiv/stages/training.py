"""What the training loops share: a policy with its optimiser and schedule under Accelerate."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from rlhf_fdiv.checkpoints import what_is_kept
from rlhf_fdiv.config.options import TrainingOptions
from rlhf_fdiv.errors import UserError
from rlhf_fdiv.models import Policy, save_policy
from rlhf_fdiv.stages.saving import Checkpoints
from rlhf_fdiv.stages.stopping import asked, stop
from rlhf_fdiv.tracking import Metrics, write_table


def launch(key: str, count: int) -> Accelerator:
    """The Accelerator of this process. Raises UserError where a step's `count` rows cannot be shared out evenly."""
    accelerator = Accelerator(step_scheduler_with_optimizer=False)
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise UserError("launch: MEGATRON_LM is not supported; take DDP, FSDP2 or DeepSpeed")
    if zero := accelerator.deepspeed_plugin:
        zero.dschf = None  # with it transformers would shard whatever it loads, the reference and the copy among them
    if accelerator.distributed_type == DistributedType.FSDP:
        if accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise UserError("launch: FSDP needs fsdp_version: 2 in the config of accelerate")
        # with it the other processes would start from empty weights
        if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            raise UserError("launch: FSDP needs fsdp_cpu_ram_efficient_loading: false in the config of accelerate")
    if count % accelerator.num_processes:
        raise UserError(f"{key}: {count} must be a multiple of {accelerator.num_processes} processes")
    return accelerator


def row_order(seed: int, step: int, count: int, total: int) -> list[int]:
    """The rows of one step: a new permutation each epoch, as a function of the step alone, so that a resume needs no state.

    Step 0 is the self-check's.
    """
    first = max(step - 1, 0) * count
    rows: list[int] = []
    while len(rows) < count:
        epoch, place = divmod(first + len(rows), total)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        rows += order[place : place + count - len(rows)].tolist()
    return rows


def configure_zero(zero: Any, policy: Policy, options: TrainingOptions) -> None:
    """Tells DeepSpeed what it does itself within `backward`. Raises UserError where its step would be another."""
    dtypes = {p.dtype for p in policy.parameters() if p.requires_grad}
    if len(dtypes) > 1 or torch.float64 in dtypes:  # it flattens them into one tensor, and steps in float32
        raise UserError(
            f"model.dtype: DeepSpeed trains all weights in float32 or all in bfloat16, and these are in {dtypes} (a value "
            "head is never in bfloat16). Set float32 or model.lora, or launch DDP"
        )
    if policy.logprob_chunk and zero.zero_stage == 3:  # which gathers the head anew for each
        raise UserError("logprob_chunk: ZeRO-3 needs as many chunks on every process; set 0, or launch ZeRO-2 or FSDP2")
    zero.deepspeed_config |= {
        "gradient_clipping": options.max_grad_norm,
        "gradient_accumulation_steps": 1,  # it would divide the loss by it
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 1,  # is asked for, and used for its counts alone
        "zero_force_ds_cpu_optimizer": False,  # `optim` is the optimiser, with an offload too
    }


@contextlib.contextmanager
def gathered(weight: Tensor) -> Iterator[Tensor]:
    """All of a weight that FSDP2 or ZeRO-3 has sharded; asked by all processes together."""
    if isinstance(weight, DTensor):
        yield weight.full_tensor()
    else:
        import deepspeed

        with deepspeed.zero.GatheredParameters(weight):
            yield weight


class Training:
    """`policy` is the wrapped module that a loss must go through; `state` names what else a checkpoint holds, log Z
    among it: objects with `state_dict` and `load_state_dict`."""

    def __init__(
        self,
        policy: Policy,
        options: TrainingOptions,
        out: Path,
        accelerator: Accelerator,
        report_to: str = "none",
        **state: Any,
    ) -> None:
        self.options: Any = options
        self.out, self.accelerator = out, accelerator
        trained = [p for p in policy.parameters() if p.requires_grad]
        settings: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
        if options.optim == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, **settings)
        else:
            optimizer = torch.optim.AdamW(trained, **settings, fused=options.optim == "adamw_torch_fused")
        warmup = options.warmup_steps * (options.max_steps if options.warmup_steps < 1 else 1)
        scheduler = get_scheduler(options.lr_scheduler_type, optimizer, math.ceil(warmup), options.max_steps)
        # FSDP2 and ZeRO-3 shard the policy in place; what samples and what is saved needs all of it: a copy follows it
        zero = accelerator.deepspeed_plugin
        sharded = accelerator.distributed_type == DistributedType.FSDP or (zero is not None and zero.zero_stage == 3)
        policy.share_prompts = not sharded
        self._copy = copy.deepcopy(policy) if sharded else None
        if zero:
            configure_zero(zero, policy, options)
        self.policy, self.optimizer = accelerator.prepare(policy, optimizer)
        if zero:
            self.optimizer.optimizer.check_grad_overflow = True  # or ZeRO-1 and 2 step along nan in bfloat16
        self.state = {"scheduler": scheduler, **state}
        self._checkpoints = Checkpoints(out, accelerator, self.policy, self.state)
        self.at_step, self.batch = 0, dict[str, list[Any]]()
        self._report_to, self._seconds, self.stopping = report_to, 0.0, False
        self.metrics: Any = None  # of the main process, from its first step on

    def step(
        self, rows: Tensor, loss_of: Callable[[Tensor], Tensor], lengths: Tensor | None = None
    ) -> tuple[float, float]:
        """One optimiser step along the mean of `loss_of(rows)` ([b] → [b]), in micro-batches; returns loss and grad_norm,
        those of all processes together. A `max_grad_norm` of 0 clips nothing, as in TrainingArguments. With the `lengths`
        of all texts given, micro-batches are of rows of like length, so that less of them is padding.

        Raises UserError, before any weight has changed, where either is not finite.
        """
        total = 0.0
        rows = rows if lengths is None else rows[lengths[rows].argsort(stable=True)]
        micro_batches = rows.split(self.options.per_device_train_batch_size)
        for micro in micro_batches:
            last = self.accelerator.sync_gradients = micro is micro_batches[-1]  # DeepSpeed's backward steps then
            now = last or self._copy is not None  # FSDP2 would hold whole gradients until the last
            with contextlib.nullcontext() if now else self.accelerator.no_sync(self.policy), self._enough_memory():
                loss = loss_of(micro).sum() / len(rows)
                self.require_finite(loss, "loss")
                self.accelerator.backward(loss)
            total += float(loss.detach())
        norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.options.max_grad_norm or math.inf)
        norm = torch.as_tensor(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self.require_finite(norm, "gradient norm")
        with self._enough_memory():  # the first step makes the optimiser's state
            self.optimizer.step()
        self.optimizer.zero_grad()
        mean = self.accelerator.reduce(torch.tensor(total, device=self.accelerator.device), "mean")  # of all processes
        return float(mean), float(norm)

    def whole(self) -> Policy:
        """The policy with all its weights on this process, to sample from and to save; asked by all processes together."""
        policy: Policy = self.accelerator.unwrap_model(self.policy)
        if self._copy is None:
            return policy
        self._copy.to(self.accelerator.device)
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # some keep their weights gathered after a forward
        with torch.no_grad():
            for mine, shards in zip(self._copy.parameters(), policy.parameters(), strict=True):
                if shards.requires_grad:
                    with gathered(shards) as theirs:
                        mine.copy_(theirs)
        return self._copy

    def gather(self, x: Any) -> Any:
        """The rows of all processes, [B, …] each, padded with 0 to the longest in dimension 1; None stays None."""
        if x is None:
            return None
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1).contiguous())

    def own(self, everyones: Tensor | None, like: Tensor) -> Tensor | None:
        """This process's rows of what `gather` made of tensors as large as `like`, [B, T]."""
        if everyones is None:
            return None
        return everyones[self.accelerator.process_index * len(like) :][: len(like), : like.shape[1]]

    def share(self, rows: list[int]) -> list[int]:
        """This process's part of a step's rows."""
        width = len(rows) // self.accelerator.num_processes
        return rows[self.accelerator.process_index * width :][:width]

    @contextlib.contextmanager
    def keeping(self, step: int, batch: dict[str, list[Any]]) -> Iterator[None]:
        """Remembers the batch, so that a failure in scoring or update can leave it in the run folder."""
        self.at_step, self.batch = step, batch
        try:
            yield
        except UserError as error:
            raise UserError(*dict.fromkeys([*error.problems, self._keep_batch()])) from error
        except Exception as error:
            raise UserError(
                f"step {step}: scoring raised {type(error).__name__}: {error}", self._keep_batch()
            ) from error

    @contextlib.contextmanager
    def _enough_memory(self) -> Iterator[None]:
        """Says which keys need less, where the memory is not enough."""
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU is one; a CPU's allocator raises it plainly
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                size = self.options.per_device_train_batch_size
                raise UserError(
                    f"step {self.at_step}: out of memory in the update. Lower per_device_train_batch_size (now {size}), set "
                    f"logprob_chunk or model.lora, or take model.dtype=bfloat16. {what_is_kept(self.out)}"
                ) from error
            raise

    def require_finite(self, value: Tensor, what: str) -> None:
        """Stops the run at a nan or infinite value, before it reaches the weights."""
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"step {self.at_step}: the {what} is {float(value.detach())}", self._keep_batch())

    def _keep_batch(self) -> str:
        path = self.out / f"bad_batch-{self.at_step}.parquet"
        write_table(path, self.batch)
        return f"The batch is in {path}; no weight was changed by it. {what_is_kept(self.out)}"

    def log(self, step: int, values: dict[str, float], seconds: float, shown: tuple[str, ...] = ()) -> None:
        """One row of metrics.jsonl and one line on the screen, of what is `shown` of it, by the main process."""
        if not self.accelerator.is_main_process:
            return
        if self.metrics is None:
            self.metrics = Metrics(self.out, self._report_to, step - 1)
        self.metrics.log(step, {**values, "seconds": seconds})
        self._seconds = 0.9 * self._seconds + 0.1 * seconds if self._seconds else seconds
        left = (self.options.max_steps - step) * self._seconds / 60
        figures = "  ".join(f"{k} {values[k]:.3g}" for k in shown or values if math.isfinite(values[k]))
        line = f"[bold]{step:>5}/{self.options.max_steps}[/]  {figures}  {seconds:.1f} s, {left:.0f} min left"
        Console(highlight=False).print(line, soft_wrap=True)

    def finish(self, tokenizer: Any) -> None:
        """Writes the trained model and ends the launch."""
        if self.metrics is not None:
            self.metrics.close()
        whole = self.whole()
        if self.accelerator.is_main_process:
            save_policy(whole, tokenizer, self.out)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    @property
    def schedule(self) -> float:
        """The share of `learning_rate` that this step has."""
        return float(self.state["scheduler"].get_last_lr()[0] / self.options.learning_rate)

    def end_step(self, step: int) -> bool:
        """Advances the schedule; True where a checkpoint is due, by the number of steps or a scheduler's signal."""
        self.state["scheduler"].step()
        self.stopping = asked() and step < self.options.max_steps
        return self.stopping or step % self.options.save_steps == 0 or step == self.options.max_steps

    def save(self, step: int) -> None:
        """Writes a checkpoint, and ends the process then if a signal asked for it."""
        self._checkpoints.save(step, self.options.save_total_limit)
        if self.stopping:
            stop(f"step {step}: stopped; {self.out / f'checkpoint-{step}'} is saved")

    def restore(self) -> int:
        """Loads the newest whole checkpoint, if there is one, and returns its step; 0 without any."""
        return self._checkpoints.restore()


class Mean:
    """The mean over the tokens that a mask keeps, of all the batches of all processes."""

    def __init__(self, training: Training) -> None:
        self.accelerator = training.accelerator
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)

    def add(self, x: Tensor, mask: Tensor) -> None:
        self.sums += torch.stack([(x * mask).sum(), mask.sum()])

    def of_all(self) -> float:
        """To be asked by all processes together."""
        total, count = self.accelerator.reduce(self.sums, "sum").tolist()
        return total / count
