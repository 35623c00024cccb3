# SPDX-License-Identifier: MIT
"""The module `protokernels.nn.Prototypes`: its state, loaded, copied, compiled and looked at."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from protokernels import backend
from protokernels.nn import LinearTemperature, Prototypes
from python_tests.places import PLACES, Place
from python_tests.prototypes_oracle import draw
from python_tests.test_nn_prototypes import started


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestState:
    def test_state_dict_round_trip(self, place: Place) -> None:
        z = draw(129, 8, 5)[0].to(place.device)
        module = started(place, 8, 5, temperature=0.2, revive_after=5)
        module(z)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other = Prototypes(8, 5, temperature=0.2, revive_after=5).to(place.device)
        other.load_state_dict(torch.load(file, weights_only=True))
        for _ in range(2):  # goes on as the first does, without a new initialisation
            assert torch.equal(other(z), module(z))
        for name, value in module.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
        other.load_state_dict(Prototypes(8, 5).state_dict())
        with pytest.raises(RuntimeError, match="not initialised"):
            other.eval()(z)

    def test_a_loaded_state_is_compiled_and_exported_before_any_call(self, place: Place) -> None:
        z = draw(129, 8, 5)[0].to(place.device)
        given = started(place, 8, 5, temperature=0.2)
        for training in (False, True):
            torch.compiler.reset()
            fresh = Prototypes(8, 5, temperature=0.2).to(place.device)
            fresh.load_state_dict(given.state_dict())
            expected = copy.deepcopy(given).train(training)(z)
            c = torch.compile(fresh.train(training), fullgraph=True, backend="aot_eager")(z)
            torch.testing.assert_close(c, expected, rtol=1e-6, atol=1e-7)
        fresh = Prototypes(8, 5, temperature=0.2).to(place.device)
        fresh.load_state_dict(given.state_dict())
        exported = torch.export.export(fresh.eval(), (z,)).module()
        torch.testing.assert_close(exported(z), given.eval()(z), rtol=1e-6, atol=1e-7)

    def test_a_state_loaded_onto_no_device(self) -> None:
        with torch.device("meta"):
            module = Prototypes(8, 5)
        with pytest.warns(UserWarning, match="no-op"):
            module.load_state_dict(Prototypes(8, 5).state_dict())
        module.load_state_dict(started(Place("cpu", "reference"), 8, 5).state_dict(), assign=True)
        assert module.eval()(torch.randn(3, 5)).shape == (3, 8)

    @pytest.mark.parametrize("training", [False, True])
    def test_shapes_without_values(self, training: bool) -> None:
        with backend.use("auto"), torch.device("meta"):
            module = Prototypes(8, 5, revive_after=3).train(training)
            z = torch.empty(20, 5, requires_grad=True)
            c = module(z)
            c.sum().backward()
        assert c.is_meta and c.shape == (20, 8) and z.grad is not None and z.grad.shape == (20, 5)

    @pytest.mark.parametrize("training", [False, True])
    def test_shapes_of_fake_tensors(self, training: bool) -> None:
        """As tools that estimate memory make them."""
        with backend.use("auto"), FakeTensorMode():
            module = Prototypes(8, 5, revive_after=3).train(training)
            z = torch.empty(20, 5, requires_grad=True)
            c = module(z)
            c.sum().backward()
        assert c.shape == (20, 8) and z.grad is not None and z.grad.shape == (20, 5)

    def test_what_is_known_belongs_to_the_buffer(self, place: Place) -> None:
        z = draw(129, 8, 5)[0].to(place.device)
        given = started(place, 8, 5, temperature=0.2)
        empty = Prototypes(8, 5, temperature=0.2, new_weight=0.0).to(place.device).eval()
        c = torch.func.functional_call(empty, dict(given.named_buffers()), (z,))
        assert torch.equal(c, given.eval()(z))
        with pytest.raises(RuntimeError, match="not initialised"):
            empty(z)
        empty.train()(z)
        assert bool(empty.initialized) and all((z == q).all(dim=1).any() for q in empty.prototypes)

    def test_a_buffer_written_to_is_read_again(self) -> None:
        module = started(Place("cpu", "reference"), 8, 5)
        module(torch.randn(20, 5))
        module.initialized.fill_(False)
        with pytest.raises(RuntimeError, match="not initialised"):
            module.eval()(torch.randn(20, 5))
        with torch.inference_mode():
            module = Prototypes(8, 5)
            module(torch.randn(20, 5))
            assert module(torch.randn(20, 5)).shape == (20, 8)

    def test_many_states_at_once(self, place: Place) -> None:
        z = draw(129, 8, 5)[0].to(place.device)
        modules = [started(place, 8, 5, temperature=t) for t in (0.2, 0.2)]
        modules[1].prototypes.mul_(torch.linspace(-1, 2, 40, device=place.device).view(8, 5))
        _, buffers = torch.func.stack_module_state([module.eval() for module in modules])
        base = copy.deepcopy(modules[0])
        c = torch.func.vmap(lambda state: torch.func.functional_call(base, state, (z,)))(buffers)
        for own, module in zip(c, modules, strict=True):
            torch.testing.assert_close(own, module(z), rtol=1e-6, atol=1e-6)

    def test_a_state_of_version_0_1_0_goes_on(self, place: Place) -> None:
        saved = {  # names, shapes and types as that version saved them: a change of any needs a way to load this
            "prototypes": torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]),
            "initialized": torch.tensor(True),
            "last_counts": torch.tensor([2, 1, 0]),
            "empty_updates": torch.tensor([0, 0, 4]),
        }
        module = Prototypes(3, 2, temperature=0.5, new_weight=0.25, revive_after=10).to(place.device)
        assert {name: (x.dtype, x.shape) for name, x in module.state_dict().items()} == {
            name: (x.dtype, x.shape) for name, x in saved.items()
        }
        module.load_state_dict(saved)
        z = torch.tensor([[2.0, 0.0], [0.0, 5.0]], device=place.device)
        scores = torch.tensor([[2.0, 0.0, -2.0], [0.0, 2.0, 0.0]])  # cosines over 0.5
        torch.testing.assert_close(module.eval()(z).cpu(), scores.softmax(1))
        module.train()(z)
        torch.testing.assert_close(module.prototypes.cpu(), torch.tensor([[2.75, 0.0], [0.0, 2.0], [-1.0, 0.0]]))
        assert module.last_counts.tolist() == [1, 1, 0] and module.empty_updates.tolist() == [0, 0, 5]

    def test_copies_are_independent(self, place: Place) -> None:
        z = draw(129, 8, 5)[0].to(place.device)
        generator = torch.Generator().manual_seed(3)
        module = started(place, 8, 5, temperature=LinearTemperature(), sample=True, generator=generator)
        before = module.prototypes.clone()
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        for other in copies:
            other(z)
        assert torch.equal(module.prototypes, before)
        module(z)
        for other in copies:
            assert torch.equal(other.prototypes, module.prototypes)

    def test_moving_to_another_type(self) -> None:
        module = Prototypes(8, 5).double()
        assert module.prototypes.dtype == torch.float64
        assert module.last_counts.dtype == torch.int64 and module.initialized.dtype == torch.bool
        assert module(torch.randn(20, 5)).dtype == torch.float64
        assert "8, 5" in repr(module) and "new_weight=0.95" in repr(module)
