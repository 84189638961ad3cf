"""The metric of data: what r×r moments find is the optimum that the full covariances give."""

import pytest
import torch
from adapters import make_adapter, updates

from lora_squeeze import LoraLayer, decompose, fixed, open_adapter, squeeze
from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import AdapterError
from lora_squeeze.moments import LayerMoments, Moments
from lora_squeeze.policies import energy, params
from lora_squeeze.spectrum import basis
from lora_squeeze.truncation import Cut, truncate
from lora_squeeze.whitening import basis_on_data, truncate_on_data

SHAPES = {
    "wide": (24, 40, 8, 500),
    "tall": (40, 24, 8, 500),
    "r = in": (20, 8, 8, 500),
    "r > out": (5, 30, 8, 500),
    "fewer tokens than r": (24, 40, 8, 5),
    "one token": (24, 40, 8, 1),
    "fewer tokens than in": (24, 40, 8, 20),
}


def on_data(layer, found, rank, **dtypes):
    return truncate_on_data([Cut(layer, found, rank, layer.scale, **dtypes)])[0]


def problem(shape, *, seed=0, dtype=torch.float64, scale=0.5):
    """A layer, inputs with a covariance far from the identity, and gradients."""
    out, inner, rank, tokens = shape
    generator = torch.Generator().manual_seed(seed)
    random = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    mixing = random(inner, inner) * torch.logspace(0, -3, inner, dtype=torch.float64)
    layer = LoraLayer("layer", down=random(rank, inner).to(dtype), up=random(out, rank).to(dtype), scale=scale)
    gradients = random(tokens, out) * torch.logspace(0, -2, out, dtype=torch.float64)
    return layer, random(tokens, inner) @ mixing.T, gradients


def moments_of(layer, inputs, gradients=None):
    hidden = inputs @ layer.down.double().T
    back = None if gradients is None else gradients @ layer.up.double()
    up = None if back is None else back.T @ back / len(back)
    return hidden.T @ hidden / len(hidden), up


def delta(layer):
    return layer.scale * layer.up.double() @ layer.down.double()


def root(covariance):
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def lost(difference, inputs, gradients=None):
    """√E‖(ΔW − ΔW') x‖², with gradients √(‖M_g^½ (ΔW − ΔW') M_x^½‖²), from the full covariances."""
    right = root(inputs.T @ inputs / len(inputs))
    left = torch.eye(len(difference), dtype=torch.float64)
    if gradients is not None:
        left = root(gradients.T @ gradients / len(gradients)).T
    return left @ difference @ right


def optimum(layer, inputs, rank, gradients=None):
    """The least that any update of this rank loses: Eckart and Young in the whitened space."""
    return float(torch.linalg.svdvals(lost(delta(layer), inputs, gradients))[rank:].square().sum().sqrt())


@pytest.mark.parametrize("with_gradients", [False, True], ids=["outputs", "gradients"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_update_of_this_rank_loses_less(shape, with_gradients):
    layer, inputs, gradients = problem(shape)
    gradients = gradients if with_gradients else None
    found = basis_on_data(layer, *moments_of(layer, inputs, gradients))
    whole = float(lost(delta(layer), inputs, gradients).norm())
    for rank in range(1, min(shape[:3])):
        squeezed = on_data(layer, found, rank)
        ours = float(lost(delta(layer) - delta(squeezed.layer), inputs, gradients).norm())
        assert ours <= optimum(layer, inputs, rank, gradients) + 1e-6 * whole
        assert squeezed.relative_error == pytest.approx(ours / whole, abs=1e-6)


def test_it_loses_less_than_the_plain_truncation():
    layer, inputs, _ = problem(SHAPES["wide"])
    found = basis_on_data(layer, *moments_of(layer, inputs))
    plain = basis(layer)
    for rank in (1, 2, 4):
        ours = lost(delta(layer) - delta(on_data(layer, found, rank).layer), inputs).norm()
        theirs = lost(delta(layer) - delta(truncate(layer, plain, rank).layer), inputs).norm()
        assert ours < 0.8 * theirs


def test_the_singular_values_are_those_of_the_whitened_update():
    layer, inputs, gradients = problem(SHAPES["wide"])
    found = basis_on_data(layer, *moments_of(layer, inputs, gradients))
    expected = torch.linalg.svdvals(lost(delta(layer), inputs, gradients))[:8]
    assert torch.allclose(found.singular_values * abs(layer.scale), expected, rtol=1e-6)


def test_identical_inputs_in_all_directions_are_the_plain_route():
    layer, _, _ = problem(SHAPES["wide"])
    inputs = torch.eye(40, dtype=torch.float64)
    found, plain = basis_on_data(layer, *moments_of(layer, inputs)), basis(layer)
    for rank in (1, 3, 8):
        ours, theirs = on_data(layer, found, rank), truncate(layer, plain, rank)
        assert torch.allclose(delta(ours.layer), delta(theirs.layer), atol=1e-7)
        assert ours.relative_error == pytest.approx(theirs.relative_error, abs=1e-7)


def test_the_factors_are_balanced_and_lie_in_the_old_ones():
    layer, inputs, gradients = problem(SHAPES["wide"])
    found = basis_on_data(layer, *moments_of(layer, inputs, gradients))
    squeezed = on_data(layer, found, 3).layer
    assert torch.allclose(squeezed.up.norm(dim=0), squeezed.down.norm(dim=1))
    assert torch.allclose(found.q @ found.p, torch.eye(8, dtype=torch.float64), atol=1e-9)


def test_what_the_data_never_excite_is_kept_where_there_is_room():
    layer, inputs, _ = problem(SHAPES["one token"])
    found = basis_on_data(layer, *moments_of(layer, inputs))
    everything = on_data(layer, found, 8).layer
    assert torch.allclose(delta(everything), delta(layer), atol=1e-6)
    # Behind the one direction that counts, the strongest ones of the weights follow.
    kept = on_data(layer, found, 4).layer
    alone = on_data(layer, found, 1).layer
    assert (delta(layer) - delta(kept)).norm() < 0.9 * (delta(layer) - delta(alone)).norm()


def test_a_layer_that_is_never_reached_is_truncated_as_without_data():
    layer, _, _ = problem(SHAPES["wide"])
    found = basis_on_data(layer, torch.zeros(8, 8, dtype=torch.float64))
    assert not found.singular_values.any()
    ours, theirs = on_data(layer, found, 3), truncate(layer, basis(layer), 3)
    assert torch.allclose(delta(ours.layer), delta(theirs.layer), atol=1e-12)
    assert ours.relative_error == 0.0


def test_an_update_of_zero_stays_zero():
    layer, inputs, _ = problem(SHAPES["wide"])
    layer = LoraLayer("layer", layer.down, torch.zeros_like(layer.up), layer.scale)
    found = basis_on_data(layer, *moments_of(layer, inputs))
    squeezed = on_data(layer, found, 2)
    assert squeezed.relative_error == 0.0
    assert not squeezed.layer.up.any()
    assert squeezed.layer.down.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_counts_into_the_error(dtype):
    layer, inputs, _ = problem(SHAPES["wide"], dtype=dtype)
    found = basis_on_data(layer, *moments_of(layer, inputs))
    squeezed = on_data(layer, found, 8, down_dtype=dtype, up_dtype=dtype)
    rounding = delta(squeezed.layer) - delta(layer)
    assert squeezed.relative_error == pytest.approx(float(rounding.norm() / delta(layer).norm()), rel=0.02)
    assert squeezed.relative_error > 1e-4


def test_factors_that_are_not_finite_are_named():
    layer, inputs, _ = problem(SHAPES["wide"])
    moments = moments_of(layer, inputs)
    layer.down[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"layer 'layer': lora_A"):
        basis_on_data(layer, *moments)


# --- through the stations ---------------------------------------------------------------------------------------


def calibrated(adapter: Adapter, *, seed=0) -> tuple[Moments, dict]:
    """Moments of made-up inputs for every layer of an adapter, and these inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs, layers = {}, {}
    for number, (name, spec) in enumerate(adapter.layers.items()):
        rows = torch.randn(200, spec.in_features, generator=generator, dtype=torch.float64)
        inputs[name] = rows * torch.logspace(0, -2, spec.in_features, dtype=torch.float64) * 10.0**-number
        hidden = inputs[name] @ adapter.load(name).down.double().T
        layers[name] = LayerMoments(hidden.T @ hidden, None, 200)
    return Moments(layers, 200, adapter.sha256(), "", ()), inputs


def test_squeezing_on_data_reaches_the_optimum_of_every_layer_and_says_so(tmp_path):
    from adapters import LLAMA

    source = make_adapter(tmp_path / "adapter")
    adapter = open_adapter(source)
    moments, inputs = calibrated(adapter)
    decomposition = decompose(adapter, moments=moments)
    compression = squeeze(decomposition, fixed(decomposition.spectra, 3), tmp_path / "out")
    before, after = updates(LLAMA, source), updates(LLAMA, tmp_path / "out")
    for layer in compression.layers:
        name = layer.spectrum.name
        whole = lost(before[name], inputs[name])
        error = float(lost(before[name] - after[name], inputs[name]).norm() / whole.norm())
        best = torch.linalg.svdvals(whole)
        assert error == pytest.approx(float((best[3:].square().sum() / best.square().sum()).sqrt()), rel=1e-4)
        assert layer.relative_error == pytest.approx(error, rel=1e-4)
    assert any(
        note.startswith("calibrated: variance and errors are those of the layers' outputs")
        for note in compression.notes
    )


def test_policies_work_on_energies_of_outputs(tmp_path):
    adapter = open_adapter(make_adapter(tmp_path / "adapter"))
    moments, inputs = calibrated(adapter)
    spectra = decompose(adapter, moments=moments).spectra
    for spectrum in spectra:
        layer = adapter.load(spectrum.name)
        expected = float(lost(delta(layer), inputs[spectrum.name]).norm()) ** 2
        assert spectrum.energy == pytest.approx(expected, rel=1e-6)
    # The first layers have the inputs with most energy, so a global cut keeps them whole.
    ranks = params(spectra, 0.3).by_layer
    assert list(ranks.values()) == sorted(ranks.values(), reverse=True)
    assert ranks != params(decompose(adapter).spectra, 0.3).by_layer
    assert energy(spectra, 0.9).by_layer != energy(decompose(adapter).spectra, 0.9).by_layer


def test_moments_of_another_adapter_are_refused(tmp_path):
    adapter = open_adapter(make_adapter(tmp_path / "adapter"))
    other = open_adapter(make_adapter(tmp_path / "other", seed=1))
    moments, _ = calibrated(adapter)
    with pytest.raises(AdapterError, match=r"other: the moments are of another adapter.*calibrate this one"):
        decompose(other, moments=moments)


def test_moments_of_another_rank_are_refused_by_layer(tmp_path):
    adapter = open_adapter(make_adapter(tmp_path / "adapter"))
    moments, _ = calibrated(open_adapter(make_adapter(tmp_path / "other", r=4)))
    moments = Moments(moments.layers, 200, "", "", ())
    with pytest.raises(AdapterError, match=r"layer '.*down_proj' of rank 8 needs moments of its own.*\[4, 4\]"):
        decompose(adapter, moments=moments)
