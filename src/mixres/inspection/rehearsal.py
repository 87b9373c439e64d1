"""One rank of a run on fake tensors: loading, a step, a sample grid and a save, without weights, GPU or other ranks.

Promise: what is counted is the training's own code over the whole configured model. No layer is known here by name. Of
the base only configuration files are read. Cost: processor time, some 40 s for 60 blocks, and 0.6 GB.

How. Torch's fake tensors have a shape, a type and a device, but no values. Under `FakeTensorMode` the transformer, its
adapters and the optimizer are made by `load_trained`, and a step is taken by `run_step`. With fsdp2 a process group
whose collectives do nothing stands for the other ranks. `LiveStorages` counts.

By formula, not by running it:
- weights in nf4 and bnb_int8, whose kernels have no fake form;
- state of optimizers that are not torch's, torchao's or prodigyopt's, from steps on small matrices;
- what waits in host memory (`train.offload`, `train.cpu_offload`): it is taken off what is on the device;
- `ddp`: one rank, whose gradients are there from the start, as they are in its buckets.
- `cache.text: recompute`: the text encoder, beside all else. It embeds while a step's gradients are there.

Not counted: what a kernel allocates inside itself, other encoders (they are gone by then), the allocator's rounding,
and the libraries' own few hundred MB on a GPU. On a machine without CUDA the CPU's operations run: norms that CUDA
computes in float32 under autocast stay in bfloat16, and AdamW updates one tensor after the other, as CUDA's fused
kernel does.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes

from mixres.batch import Batch
from mixres.config.schema import Config
from mixres.errors import UserError
from mixres.inspection.storages import LiveStorages, bytes_of
from mixres.inspection.text_memory import TextMemory, text_memory
from mixres.models.block_swap import frozen_matrices
from mixres.models.blocks import repeated_blocks
from mixres.models.family import Family
from mixres.models.lora_file import ADAPTER_PARTS
from mixres.models.quantize import empty_like, is_torchao, quantize_blocks, stored_bytes
from mixres.training.distributed import dist_env, shard_mesh
from mixres.training.optimizer import TRIAL_SIZE, make_state, optimizer_class, optimizer_tensors, state_of_a_step
from mixres.training.result import write_results
from mixres.training.resume import save_run
from mixres.training.setup import TrainState, load_trained
from mixres.training.step import run_step
from mixres.verification.flops import FlopCounter
from mixres.verification.synthetic import SampleTokens, noise_batch

_FAKED_OPTIMIZERS = ("torch", "torchao", "prodigyopt")  # others may hand addresses of tensors to kernels of their own


@dataclass(frozen=True)
class _Rank:
    """What loading and a step ask of accelerate's `Accelerator`, with nobody to talk to."""

    device: torch.device
    num_processes: int
    autocasts: bool

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocasts, cache_enabled=False)

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        return tensor


class _Weightless:
    """A family whose transformer is loaded without values."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def transformer_folder(self) -> None:
        return None

    def load_transformer(self, *, dtype: torch.dtype, device: torch.device, quantize: Any) -> Any:
        with unset_fake_temporarily():
            transformer = self._family.transformer_skeleton()
            nn.Module.to(transformer, dtype)  # not diffusers' own, which warns
            if quantize:
                quantize_blocks(transformer, quantize, dtype=dtype)
        return _without_values(transformer, device)


def _without_values(model: nn.Module, device: torch.device) -> nn.Module:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(empty_like(parameter.detach(), device), parameter.requires_grad))
    return model


@contextmanager
def fake_ranks(config: Config, count: int) -> Iterator[int]:
    """Within it, this process is the first of so many that split the weights, where the configuration does that.

    Yields how many. Their collectives do nothing.
    """
    if config.train.parallel != "fsdp2" or count == 1:
        yield 1
        return
    if count % (config.train.shard_size or 1):
        size = config.train.shard_size
        raise UserError(f"train.shard_size: {count} processes are no groups of {size}: give a divisor, or null")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        # Here, since a mesh computes with values.
        shard_mesh(dist.group.WORLD, dist_env().device.type, config.train.shard_size or count)
        yield count
    finally:
        dist.destroy_process_group()


@contextmanager
def _shapes_apart() -> Iterator[None]:
    """Within it, DTensor infers shapes outside all modes: it makes whole tensors for that, which are not to count."""
    plain = ShardingPropagator._propagate_tensor_meta_non_cached

    def apart(propagator: ShardingPropagator, schema: Any) -> Any:
        with _disable_current_modes():
            return plain(propagator, schema)

    ShardingPropagator._propagate_tensor_meta_non_cached = apart  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = plain  # type: ignore[method-assign]


class FakeRun:
    """Model, optimizer and objective of a configuration on fake tensors, after a first update.

    Within its `with` block operations are fake and counted. `resident` are bytes by what holds them between steps, on
    each device; `host_bytes` those that wait in host memory instead.

    Raises:
        UserError: the base's configuration, the optimizer's class or an argument of it is wrong.
    """

    def __init__(self, config: Config, family: Family, *, ranks: int = 1) -> None:
        self.config, self.device = config, dist_env().device
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        # Its memory of what it has made are weak references, with which `Module.to` refuses to change a parameter.
        vars(self.fake.fake_tensor_converter)["set_tensor_memo"] = lambda tensor, made: None
        self.storages = LiveStorages(device=self.device)
        autocasts = config.train.mixed_precision == "bf16" and ranks == 1  # else FSDP2's own policy
        self._stack = ExitStack()
        with self:
            rank: Any = _Rank(self.device, ranks, autocasts)
            self.trained: TrainState = load_trained(_fakeable(config), _Weightless(family), rank)  # type: ignore[arg-type]
            self.load_peak = self.storages.peak
            self._make_state()
        self.resident, self.host_bytes, self.correction = self._held(ranks)

    def __enter__(self) -> LiveStorages:
        self._stack.enter_context(self.fake)
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))  # torchao would compile its update
        self._stack.enter_context(_shapes_apart())
        return self._stack.enter_context(self.storages)  # type: ignore[no-any-return]

    def __exit__(self, *raised: Any) -> None:
        self._stack.close()

    def _make_state(self) -> None:
        optimizer = self.trained.optimizer

        def before(*_: Any) -> None:
            self.storages.value = 1  # of numbers that it divides by

        def after(*_: Any) -> None:
            self.storages.value = 0  # of losses, norms and flags: so the step is not skipped

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        make_state(optimizer)

    def _held(self, ranks: int) -> tuple[dict[str, int], int, int]:
        """`resident`, `host_bytes`, and what is to be added to bytes counted to get those on the device."""
        trained, config = self.trained, self.config
        parameters = list(trained.transformer.parameters())
        state = optimizer_tensors(trained.optimizer, trained.parameters)
        average = bytes_of(tensor for name, tensor in state.items() if name.startswith("ema|"))
        by_formula = 0
        if not _is_faked(config):
            by_formula = optimizer_bytes(config, [p.numel() for p in trained.parameters.values()])
        kept = bytes_of(tensor for tensor in state.values() if tensor.dim()) - average + by_formula
        learnt = bytes_of(trained.parameters.values())
        swapped, slots = self._swapped_bytes()
        saved = self._saved_by_bitsandbytes()
        resident = {
            "weights": bytes_of(parameters) - learnt - saved - swapped + slots,  # frozen ones
            "trained_weights": learnt,
            "gradients": learnt,
            "optimizer": kept,
            "ema": average,
        }
        correction = by_formula - saved - swapped + slots
        if config.train.cpu_offload and ranks > 1:
            waiting = sum(resident.values())
            return dict.fromkeys(resident, 0), swapped + waiting, correction - waiting + learnt
        return resident, swapped, correction

    @property
    def frozen_bytes(self) -> list[int]:
        """Of the matrices of each block that are not trained."""
        blocks = repeated_blocks(self.trained.transformer)
        return [bytes_of(matrix for _, _, matrix in frozen_matrices(block)) for block in blocks]

    def _swapped_bytes(self) -> tuple[int, int]:
        """Bytes of frozen matrices that wait in host memory, and of the slots on the device for some of them."""
        keep, sizes = self.config.train.offload.blocks, self.frozen_bytes
        return (0, 0) if keep is None else (sum(sizes), min(keep, len(sizes)) * max(sizes))

    def _saved_by_bitsandbytes(self) -> int:
        """Bytes that nf4 and bnb_int8 take off the weights."""
        method = self.config.model.quantize
        if method is None or is_torchao(method):
            return 0
        blocks = repeated_blocks(self.trained.transformer)
        linears = [m for b in blocks for name, m in b.named_modules() if not any(p in name for p in ADAPTER_PARTS)]
        weights = [m.weight for m in linears if type(m) is nn.Linear]
        return sum(w.numel() * w.itemsize - stored_bytes(method, *w.shape) for w in weights)

    @contextmanager
    def saving_on_host(self, moved: list[int]) -> Iterator[None]:
        """Within it, what autograd saves for backward is in host memory; its bytes are added to `moved`."""

        def to_host(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
            moved.append(tensor.nbytes)
            return tensor.shape, tensor.dtype

        def from_host(packed: tuple[torch.Size, torch.dtype]) -> Tensor:
            return torch.empty(packed[0], dtype=packed[1], device=self.device)

        with saved_tensors_hooks(to_host, from_host):
            yield


def _is_faked(config: Config) -> bool:
    return config.optimizer.class_path.partition(".")[0] in _FAKED_OPTIMIZERS


def _fakeable(config: Config) -> Config:
    """Without what is counted by formula, and what changes no tensor's size."""
    model, train = config.model, config.train
    lora = model.lora and model.lora.model_copy(update={"pretrained_weight": None})
    quantize = model.quantize if is_torchao(model.quantize) else None
    offload = train.offload.model_copy(update={"blocks": None, "activations": False})
    faked = {
        "model": model.model_copy(update={"lora": lora, "quantize": quantize}),
        "train": train.model_copy(update={"offload": offload, "compile": False, "shard_read": "rows"}),
    }
    if not _is_faked(config):
        faked["optimizer"] = config.optimizer.model_copy(
            update={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}
        )
    return config.model_copy(update=faked)


def optimizer_bytes(config: Config, numbers: Sequence[int]) -> int:
    """Bytes of state that the optimizer keeps for trained tensors of so many `numbers` each.

    From steps on three square matrices. A class may keep a fixed part once a tensor (8-bit classes: a map) beside one
    that grows with its numbers, and store small tensors otherwise.
    """
    few, some, more = (_state_bytes(config, size) for size in (TRIAL_SIZE // 2, TRIAL_SIZE, 2 * TRIAL_SIZE))
    square = TRIAL_SIZE**2
    each = (more - some) / (3 * square)
    once = some - each * square
    return round(sum(once + each * n if n >= square else few * n / (square / 4) for n in numbers))


def _state_bytes(config: Config, size: int) -> int:
    kind = optimizer_class(config.optimizer.class_path, config.optimizer.init_args)
    with torch.compiler.set_stance("force_eager"):  # torchao would compile its update for a minute
        state = state_of_a_step(kind, config.optimizer.init_args, device=dist_env().device, size=size)
    return bytes_of(value for value in state.values() if isinstance(value, Tensor) and value.dim())


class _Phases:
    """The peak of each phase, and what held the bytes then."""

    def __init__(self, storages: LiveStorages) -> None:
        self._storages, self._name = storages, ""
        self.peaks: dict[str, tuple[int, int, int]] = {}  # bytes, operations before it, gathered bytes

    def begin(self, name: str) -> None:
        self.end()
        self._name = name
        self._storages.restart_peak()

    def end(self) -> None:
        if self._name:
            found = (self._storages.peak, *self._storages.at_peak)
            self.peaks[self._name] = max(found, self.peaks.get(self._name, found))
        self._name = ""


class _Marked:
    """The objective of a step, which says where forward and backward begin."""

    def __init__(self, run: FakeRun, phases: _Phases, host: list[int]) -> None:
        self._run, self._phases, self._host = run, phases, host

    def loss(self, *args: Any, **named: Any) -> Tensor:
        self._phases.begin("forward")
        offloaded = self._run.config.train.offload.activations
        with self._run.saving_on_host(self._host) if offloaded else nullcontext():
            loss = self._run.trained.objective.loss(*args, **named)
        self._phases.begin("backward")
        return loss


def rehearse(
    config: Config, family: Family, microbatch: Sequence[SampleTokens], *, ranks: int = 1, microbatches: int = 1
) -> dict[str, Any]:
    """Bytes at the peak of each phase on the fullest of `ranks` devices, FLOPs and bytes over the wire of a step.

    The step has so many `microbatches` a rank as large as this one, of which the last is run.

    Raises:
        UserError: the base's configuration or the optimizer is wrong, or the ranks are no groups of `shard_size`.
    """
    train = config.train
    with fake_ranks(config, ranks) as splitting:
        run = FakeRun(config, family, ranks=splitting)
        trained, storages = run.trained, run.storages
        phases, host = _Phases(storages), [0]
        phases.peaks["load"] = (run.load_peak, 0, 0)
        with run:
            # Before the step: what FSDP2 gathers is known from the second time on.
            decoder = _decoder(run, family)
            phases.begin("sample grid")
            _sample(run, noise_batch(config, family, microbatch[:1]).to(run.device), decoder)
            phases.end()
            batch = noise_batch(config, family, microbatch).to(run.device)
            storages.add(value for value in vars(batch).values() if isinstance(value, Tensor))
            if microbatches > 1 or ranks > splitting:
                for parameter in trained.parameters.values():
                    parameter.grad = torch.zeros_like(parameter)
            born: list[tuple[int, int]] = []

            def before_update(*_: Any) -> None:
                born.extend(storages.born(p.grad for p in trained.parameters.values() if p.grad is not None))
                phases.begin("optimizer")

            trained.optimizer.register_step_pre_hook(before_update)
            marked: Any = _Marked(run, phases, host)
            storages.wire = 0
            with FlopCounter() as flops:
                run_step(
                    trained.accelerator,
                    trained.model,
                    trained.optimizer,
                    marked,
                    [batch],
                    count=1,
                    step=0,
                    divisor=1,
                    max_grad_norm=train.max_grad_norm,
                )
            phases.end()
            wire = storages.wire
            phases.begin("save")
            _save(run)
            phases.end()
    if splitting == 1 and ranks > 1:  # a ring of ranks sends each gradient twice
        wire = 2 * run.resident["gradients"] * (ranks - 1) // ranks
    text = text_memory(config, family, microbatch)
    return {
        **_figures(run, phases, born, decoder, text),
        **({"text_encoder": text.figures()} if text else {}),
        "host_bytes": run.host_bytes + sum(host) + (text.host_bytes if text else 0),
        "ranks": ranks,
        "tokens": batch.tokens_computed,
        "microbatches": microbatches,
        "flops": flops.computed * microbatches,
        "flops_needed": flops.needed * microbatches,
        "wire_bytes": wire,
        "blocks": len(run.frozen_bytes),
        "block_bytes": max(run.frozen_bytes),
    }


def _decoder(run: FakeRun, family: Family) -> Any:
    """What decodes latents, as sample grids keep it, up to the image itself; None where there are no grids."""
    if not run.config.sample.every:
        return None
    with unset_fake_temporarily():
        vae = family.vae_skeleton().requires_grad_(False)
        nn.Module.to(vae, next(run.trained.transformer.parameters()).dtype)
    processor = SimpleNamespace(postprocess=lambda pixels, output_type: [None])
    return SimpleNamespace(vae=_without_values(vae, run.device), image_processor=processor)


@torch.no_grad()
def _sample(run: FakeRun, batch: Batch, decoder: Any) -> None:
    """One call of the transformer, as a sample grid makes many, and the VAE's."""
    trained, dtype = run.trained, getattr(torch, run.config.model.dtype)
    with ExitStack() as stack:
        if run.config.sample.use_ema and trained.ema:
            stack.enter_context(trained.ema.averaged())
        if next(trained.transformer.parameters()).dtype != dtype:  # all weights train
            stack.enter_context(torch.autocast(run.device.type, dtype, cache_enabled=False))
        trained.transformer.eval()
        flow: Any = SimpleNamespace(noisy_latents=batch.latents, sigmas=torch.full((1,), 0.5))
        trained.objective.predict(trained.transformer, batch, flow)
        trained.transformer.train()
        if decoder:
            latents = batch.latents.flatten(0, 1)[: batch.target_lengths[0]]
            trained.family.decode_latents(decoder, latents, batch.img_shapes[0][0])


def _save(run: FakeRun) -> None:
    """A checkpoint and the result, but for the files."""
    trained = run.trained
    unwritten: Any = SimpleNamespace(gather=lambda value: [value], save=lambda *args, **named: None)
    run.storages.value = 1  # all weights are finite
    save_run(unwritten, trained.parameters, trained.optimizer, step=1, state={})
    with TemporaryDirectory() as folder:
        write_results(trained, Path(folder), step=1, keep=False)


def _figures(
    run: FakeRun, phases: _Phases, born: Sequence[tuple[int, int]], decoder: Any, text: TextMemory | None
) -> dict[str, Any]:
    """The peak of each phase on the device, and by what holds it there."""
    resident, found = run.resident, {}
    between = {name: count for name, count in resident.items() if name != "gradients"}
    between["vae"] = bytes_of(decoder.vae.parameters()) if decoder else 0
    beside = text.weights if text and text.shared else 0
    if text and beside:
        held = {**resident, "vae": between["vae"], "gathered": 0, "text_encoder": beside}
        total = sum(held.values()) + text.activations
        found["text encoder"] = {"bytes": total, **held, "activations": text.activations}
    for name, (peak, operation, gathered) in phases.peaks.items():
        gradients = 0
        if name in ("forward", "backward", "optimizer") and resident["gradients"]:
            gradients = sum(size for size, birth in born if birth <= operation)
        held = {**between, "gradients": gradients, "gathered": gathered, **({"text_encoder": beside} if beside else {})}
        if name == "load":
            held = {**held, "optimizer": 0, "ema": 0, "vae": 0}
        total = max(peak + run.correction + beside, sum(held.values()))
        found[name] = {"bytes": total, **held, "activations": total - sum(held.values())}
    return peak_of(found)


def peak_of(phases: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The highest of these peaks, and which it is."""
    fullest = max(phases, key=lambda name: phases[name]["bytes"])
    return {"peak_bytes": phases[fullest]["bytes"], "peak_phase": fullest, "phases": phases}
