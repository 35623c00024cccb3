# SPDX-License-Identifier: MIT
"""Prototype vectors as a module: buffers that follow the clusters of the embeddings passed through it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops import _calls, _checks
from ..ops import prototypes as ops
from ..ops._prototypes_autograd import kept

_backward_pass: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)
"""The number of the backward pass that runs now, -1 outside; torch's own and not promised to users."""


@dataclass(frozen=True)
class LinearTemperature:
    """From ``start`` to ``end`` while training progress runs from 0 to ``until``, then constant. VAESim, Algorithm 1:
    1 to 0.01 in half of the epochs.

    >>> from protokernels.nn import LinearTemperature
    >>> LinearTemperature(start=1.0, end=0.01, until=0.5)(0.25)
    0.505
    """

    start: float = 1.0
    end: float = 0.01
    until: float = 0.5

    def __post_init__(self) -> None:
        for name in ("start", "end", "until"):
            _checks.check_real("LinearTemperature", name, getattr(self, name))
        if not (0 < self.start < math.inf and 0 < self.end < math.inf and 0 < self.until <= 1):
            raise ValueError(
                f"LinearTemperature: start and end must be positive and finite, until in (0, 1]; got {self}"
            )

    def __call__(self, progress: float) -> float:
        share = min(max(progress / self.until, 0.0), 1.0)
        return self.start + (self.end - self.start) * share


class Prototypes(nn.Module):
    """K prototype vectors that follow the clusters of a stream of embeddings.

    ``forward(z)`` returns the soft assignment c [B, K] of ``z`` [B, D] (:func:`protokernels.soft_assign`). In training mode the first batch
    initialises the prototypes with distinct random rows, c is computed with the prototypes as they are, and then they are moved towards the
    means of their members (:func:`protokernels.prototype_step`), in one pass over ``z``. In evaluation mode nothing changes.

    Under ``torch.distributed`` the sums and counts of all ranks are added up BEFORE the blend, so R ranks with B / R samples each equal one
    rank with B; every rank must call ``forward`` equally often. The prototypes are buffers: they are saved in ``state_dict``, moved by
    ``.to()`` and receive no gradient. ``progress`` is not in ``state_dict``: after loading set it, to 1.0 for the temperature that training
    ended with. Under autocast ``z`` may be half precision; prototypes stay in their own dtype and c has the wider of the two.

    Leave the module out of what ``torch.utils.checkpoint`` computes twice: the second pass, in ``backward``, would meet prototypes that
    have moved and move them again. A training pass within a backward pass is therefore refused; in code that ``torch.compile`` compiled
    it goes unnoticed, and its gradients are wrong.

    For averages of a whole model (``torch.optim.swa_utils.AveragedModel``) leave ``use_buffers`` at False: the prototypes are copied then,
    not averaged again, and one of the buffers is bool, which torch's plain average does not take.

    Args:
        num_prototypes: K.
        dim: D, the length of an embedding.
        similarity: ``"cosine"`` or ``"dot"``.
        temperature: a positive number, or a schedule: a callable from training progress in [0, 1] (the attribute ``progress``, which the
            training loop sets) to a temperature.
        new_weight: weight of the new mean in [0, 1]; VAESim: 0.95.
        sample: draw the label of a sample from its assignment instead of taking the largest.
        skip_nonfinite: leave rows with NaN or infinity out of the update.
        revive_after: replace a prototype that got no member in this many updates running by a random row of the batch; None: never.
        generator: random numbers for initialisation, ``sample`` and revival; default: torch's global generator.
        process_group: ranks that share the prototypes; default: all of them.
        dtype: of the prototypes.

    Shape: z [B, D] -> [B, K].

    Example:
        >>> import torch
        >>> from protokernels.nn import Prototypes
        >>> prototypes = Prototypes(4, 16, temperature=0.1)
        >>> prototypes(torch.randn(32, 16)).shape
        torch.Size([32, 4])
    """

    prototypes: Tensor  # [K, D]
    initialized: Tensor  # [] bool
    last_counts: Tensor  # [K] int64, members in the latest update
    empty_updates: Tensor  # [K] int64, updates running without a member

    def __init__(
        self,
        num_prototypes: int,
        dim: int,
        *,
        similarity: ops.Similarity = "cosine",
        temperature: float | Callable[[float], float] = 1.0,
        new_weight: float = 0.95,
        sample: bool = False,
        skip_nonfinite: bool = False,
        revive_after: int | None = None,
        generator: torch.Generator | None = None,
        process_group: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, value in (("num_prototypes", num_prototypes), ("dim", dim), ("revive_after", revive_after)):
            if value is not None or name != "revive_after":
                _checks.check_whole("Prototypes", name, value)
        for name, flag in (("sample", sample), ("skip_nonfinite", skip_nonfinite)):
            _checks.check_flag("Prototypes", name, flag)
        _checks.check_generator("Prototypes", generator)
        _checks.check_choice("Prototypes", "dtype", dtype, _checks.FLOATING)
        _checks.check_real("Prototypes", "new_weight", new_weight)
        if not callable(temperature):
            _checks.check_real("Prototypes", "temperature", temperature)
        if num_prototypes < 1 or dim < 1:
            raise ValueError(f"Prototypes: num_prototypes and dim must be at least 1; got {num_prototypes} and {dim}")
        if revive_after is not None and revive_after < 1:
            raise ValueError(f"Prototypes: revive_after must be at least 1 or None; got {revive_after}")
        if not isinstance(similarity, str) or similarity not in ("cosine", "dot"):
            raise ValueError(f"Prototypes: similarity must be 'cosine' or 'dot'; got {similarity!r}")
        if not 0.0 <= new_weight <= 1.0:
            raise ValueError(f"Prototypes: new_weight must lie in [0, 1]; got {new_weight}")
        if not callable(temperature) and not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"Prototypes: temperature must be positive and finite, or a schedule; got {temperature}")
        self.similarity: ops.Similarity = similarity
        self.schedule = temperature
        self.new_weight = new_weight
        self.sample = sample
        self.skip_nonfinite = skip_nonfinite
        self.revive_after = revive_after
        self.generator = generator
        self.process_group = process_group
        self.progress = 0.0
        self._known_initialized = False
        self._known_of: tuple[Tensor, int | None] | None = None  # the buffer that was read as true, and its version
        self.register_buffer("prototypes", torch.zeros(num_prototypes, dim, dtype=dtype))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.register_buffer("last_counts", torch.zeros(num_prototypes, dtype=torch.int64))
        self.register_buffer("empty_updates", torch.zeros(num_prototypes, dtype=torch.int64))
        self.register_load_state_dict_post_hook(_look_again)

    @property
    def temperature(self) -> float:
        """The temperature at the present ``progress``."""
        return float(self.schedule(self.progress)) if callable(self.schedule) else self.schedule

    def forward(self, z: Tensor) -> Tensor:  # [B, D] -> [B, K]
        if not self.training:
            self._require_initialized()
            return self._soft_assign(z).assignment
        if not isinstance(z, Tensor):
            _checks.check_matrix("Prototypes", "z", z, f"[B, {self.prototypes.shape[1]}]")
        if not torch.compiler.is_compiling() and _backward_pass is not None and _backward_pass() >= 0:
            raise RuntimeError(
                "Prototypes: forward in training mode was called within a backward pass, as torch.utils.checkpoint does to compute a part "
                "again; the prototypes have moved since the first call, so the gradients would be wrong; leave this module out of the "
                "part under the checkpoint, or call eval() on it"
            )
        if not self._is_initialized():
            self.initialize(z)
        # The buffer is overwritten below while autograd still needs the prototypes of this pass.
        current = kept(self.prototypes) if z.requires_grad else self.prototypes
        step = ops.prototype_step(
            z,
            current,
            temperature=self.temperature,
            new_weight=self.new_weight,
            similarity=self.similarity,
            sample=self.sample,
            generator=self.generator,
            skip_nonfinite=self.skip_nonfinite,
        )
        self._apply_update(step, z)
        return step.assignment

    def assign(self, z: Tensor) -> Tensor:  # [B, D] -> [B] int64
        """The most similar prototype of each row; changes nothing."""
        self._require_initialized()
        labels = self._soft_assign(z.detach() if isinstance(z, Tensor) else z).labels
        assert labels is not None
        return labels

    @torch.no_grad()
    def initialize(self, z: Tensor) -> None:  # [B, D]
        """Sets the prototypes to K distinct random rows of ``z`` (rank 0's choice for all ranks), with ``skip_nonfinite`` of the rows
        without NaN or infinity. Called by the first ``forward`` in training.

        Raises:
            ValueError: ``z`` has fewer than K rows to choose from, or those chosen have values that are not finite.
        """
        K = self.prototypes.shape[0]
        _checks.check_matrix("Prototypes", "z", z, f"[B, {self.prototypes.shape[1]}]")
        _checks.check_same_device("Prototypes", "prototypes", self.prototypes, "z", z)
        if z.shape[1] != self.prototypes.shape[1]:
            raise ValueError(f"Prototypes: z must have shape [B, {self.prototypes.shape[1]}]; got {list(z.shape)}")
        if self.skip_nonfinite:
            z = z[z.isfinite().all(dim=1)]
        if z.shape[0] < K:
            raise ValueError(
                f"Prototypes: the first batch must hold at least num_prototypes = {K} rows to start from; got {z.shape[0]}"
                f"{' without NaN and infinity' if self.skip_nonfinite else ''}; "
                "use a larger batch or call initialize(z) with more embeddings before training"
            )
        rows = z.detach()[
            torch.randperm(z.shape[0], generator=self.generator, device=self._random_device(z))[:K].to(z.device)
        ]
        if not bool(rows.isfinite().all()):
            raise ValueError(
                "Prototypes: the embeddings chosen to start from hold NaN or infinity; check the encoder before training goes on"
            )
        self.prototypes.copy_(rows)
        if self._world_size() > 1:
            dist.broadcast(self.prototypes, src=dist.get_global_rank(self._group(), 0), group=self.process_group)
        self.initialized.fill_(True)
        self._known_initialized = True

    def extra_repr(self) -> str:
        K, D = self.prototypes.shape
        return f"{K}, {D}, similarity={self.similarity!r}, temperature={self.temperature:g}, " + (
            f"new_weight={self.new_weight}, sample={self.sample}"
        )

    def _soft_assign(self, z: Tensor) -> ops.SoftAssignment:
        return ops.soft_assign(
            z, self.prototypes, temperature=self.temperature, similarity=self.similarity, return_labels=True
        )

    @torch.no_grad()
    def _apply_update(self, step: ops.PrototypeStep, z: Tensor) -> None:
        updated, counts = step.prototypes, step.counts
        if self._world_size() > 1:
            packed = torch.cat(
                [step.sums, step.counts.double().unsqueeze(-1)], dim=1
            )  # one collective; counts are exact in float64
            dist.all_reduce(packed, group=self.process_group)
            counts = packed[:, -1].to(torch.int64)
            updated = ops.blend_prototypes(
                self.prototypes, packed[:, :-1].contiguous(), counts, new_weight=self.new_weight
            )
        self.last_counts.copy_(counts)
        if self.revive_after is not None:
            updated = self._revived(updated, counts, z)
        self.prototypes.copy_(updated)

    def _revived(self, updated: Tensor, counts: Tensor, z: Tensor) -> Tensor:  # [K, D]
        assert self.revive_after is not None
        self.empty_updates.copy_(torch.where(counts > 0, 0, self.empty_updates + 1))
        dead = self.empty_updates >= self.revive_after
        revived = ops.revive_prototypes(updated, z, dead, generator=self.generator)
        if self._world_size() > 1:  # every rank takes rank 0's rows
            dist.broadcast(revived, src=dist.get_global_rank(self._group(), 0), group=self.process_group)
        self.empty_updates.masked_fill_(dead, 0)
        return revived

    def _is_initialized(self) -> bool:
        """The value of the buffer, read from the device once, not at every step: again where it is another tensor, and on the CPU,
        where that costs little, where it has been written to (elsewhere it is what DistributedDataParallel does at every step)."""
        buffer, known = self._buffers["initialized"], self._known_of
        assert buffer is not None
        compiling = torch.compiler.is_compiling()
        # Of a meta or fake tensor shapes are asked for, and there is no value.
        if buffer.is_meta or (not compiling and hasattr(buffer, "fake_mode")):
            return True
        same = not compiling and known is not None and known[0] is buffer
        if same and known is not None and (known[1] is None or known[1] == buffer._version):
            return True
        if compiling or _calls.is_transformed():  # no value to look at
            return self._known_initialized or bool(buffer)
        self._known_initialized, self._known_of = bool(buffer), None
        if self._known_initialized:
            counts = buffer.device.type == "cpu" and not buffer.is_inference()
            self._known_of = buffer, buffer._version if counts else None
        return self._known_initialized

    def _require_initialized(self) -> None:
        if not self._is_initialized():
            raise RuntimeError(
                "Prototypes: not initialised yet; run one batch in training mode, call initialize(z) or load a state_dict"
            )

    def _random_device(self, z: Tensor) -> torch.device:
        return self.generator.device if self.generator is not None else z.device

    def _group(self) -> dist.ProcessGroup:
        group = self.process_group if self.process_group is not None else dist.group.WORLD
        assert group is not None
        return group

    def _world_size(self) -> int:
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.process_group)


def _look_again(module: nn.Module, _incompatible: object) -> None:
    """After a state was loaded, so that the module can be compiled and exported before it is called."""
    assert isinstance(module, Prototypes)
    module._known_initialized, module._known_of = False, None
    if type(module.initialized) is Tensor and not module.initialized.is_meta:
        module._is_initialized()
