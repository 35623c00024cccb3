# SPDX-License-Identifier: MIT
"""Numbers and sizes that change from call to call are compiled twice: for the first, then for any; plain PyTorch is compiled as often."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from protokernels import (
    blend_flip,
    cross_view_loss,
    gaussian_blur,
    gaussian_noise,
    nt_xent_loss,
    prototype_step,
    rotate,
    sinkhorn,
    sinkhorn_features,
    soft_assign,
    soft_crop,
    transform,
    update_prototypes,
)
from protokernels.ops.warp import Stage
from python_tests.places import NATIVE_PLACES, Place

Function = Callable[[Tensor, float], Tensor]


@pytest.fixture(params=NATIVE_PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def seed(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def _views_at(loss: Callable[..., Tensor], x: Tensor, temperature: float) -> Tensor:
    """What the README advises for the contrastive losses, which hold their temperature as a constant."""
    first, second = (torch.nn.functional.normalize(view, dim=1) * temperature**-0.5 for view in (x, x.flip(0)))
    return loss(first, second, normalize=False, temperature=1.0)


VECTORS: dict[str, Function] = {
    "softmax, of torch": lambda x, t: torch.softmax(x / t, -1),
    "soft_assign": lambda x, t: soft_assign(x, x[:4], temperature=t),
    "prototype_step": lambda x, t: prototype_step(x, x[:4].detach(), temperature=t, new_weight=0.9).assignment,
    "prototype_step, new_weight": lambda x, t: (
        x[:4] + prototype_step(x, x[:4].detach(), temperature=0.5, new_weight=t).prototypes
    ),
    "update_prototypes, new_weight": lambda x, t: (
        x[:4] + update_prototypes(x[:4], x, torch.arange(9, device=x.device) % 3, new_weight=t).prototypes
    ),
    "scaled, nt_xent_loss": lambda x, t: _views_at(nt_xent_loss, x, t),
    "scaled, cross_view_loss": lambda x, t: _views_at(cross_view_loss, x, t),
    "sinkhorn": lambda x, t: sinkhorn(x.abs(), epsilon=t, num_iters=1).transport_cost,
    "sinkhorn_features": lambda x, t: sinkhorn_features(x, 2 * x[:5], epsilon=t, num_iters=1).entropic_value,
}
IMAGES: dict[str, Function] = {
    "gaussian_blur": gaussian_blur,
    "gaussian_noise": lambda x, t: gaussian_noise(x, t, seed=seed(x)),
    "soft_crop": lambda x, t: soft_crop(x, (t, 1 - t), size=0.5),
    "blend_flip": blend_flip,
    "rotate": rotate,
    "rotate, border": lambda x, t: rotate(x, t, padding_mode="border"),
}


@pytest.mark.parametrize("name", [*VECTORS, *IMAGES])
def test_numbers_are_compiled_twice_at_most(place: Place, name: str) -> None:
    torch.compiler.reset()
    function = (VECTORS | IMAGES)[name]
    inputs = (draw(9, 6) if name in VECTORS else draw(2, 1, 7, 8)).to(place.device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for number in (0.2, 0.25, 0.3, 0.45, 0.5):
        results = []
        for run in (function, compiled):
            x = inputs.clone().requires_grad_()
            y = run(x, number)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("order", [("blur", "noise", "crop", "hflip", "rotate"), ("crop",)])
def test_a_chain_is_compiled_twice_for_all_image_sizes(place: Place, order: tuple[Stage, ...]) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def chain(x: Tensor, params: Tensor) -> Tensor:
        return transform(x, params, order=order, radius=2, seed=seed(x))

    compiled = torch.compile(chain, fullgraph=True, backend=counter)
    params = draw(2, 7).sigmoid().to(place.device)
    for height, width in ((7, 8), (9, 6), (5, 11), (12, 7)):
        images = draw(2, 1, height, width).to(place.device)
        torch.testing.assert_close(compiled(images, params), chain(images, params), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2
