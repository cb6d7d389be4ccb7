"""How to get by with the memory there is: the fastest plan that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..checkpoint.networks import SamplingNetworks
from ..devices import free_bytes
from ..errors import SamplingError
from ..memory.state import MOST_WINDOWS
from ..memory.stream import AHEAD
from ..sampling.plan import Plan
from ..sampling.settings import Settings
from ..sampling.vae import few_frames
from .counting import GIB, RESERVE, Needs, needs
from .device import available_bytes

SEEN_AT_ONCE = 2 * GIB  # of host memory, for what the Reference Net sees of several windows in one turn
VAE_FRAMES = 2  # at once at 512 x 512 at most: one fills a GPU already, more take memory, more than a step


def vae_frames(height: int, width: int, window: int) -> list[int]:
    """Frames that may go through the VAE at once on a device with memory of its own, most first: `plan` takes the most
    that fit, so there the last bits of frames, and of the memory made of them, may follow free memory. No map of the
    decoder has 2^31 numbers, from where on layers of torch refuse or take rarely used paths: up to 2,896 x 2,896
    pixels; beyond, one frame's has. On the CPU it is always `few_frames`.

    Args:
        window: frames of a window, beyond which there are none to be coded at once.
    """
    most = max(1, min(window, VAE_FRAMES * 512 * 512 // (height * width)))
    return [2**power for power in range(most.bit_length() - 1, -1, -1)]


def plan_of(
    need: Needs,
    *,
    row_by_row: bool = False,
    sums_on_device: int | None = None,
    reference_net_stays: bool = True,
    vae_frames: int = 1,
    streamed: int | None = None,
    reserve: int = RESERVE,
) -> Plan:
    """What these choices lead to.

    Args:
        sums_on_device: None for all.
        streamed: bytes of weights on the device where someone else takes care of them; None: all of them.
    """
    count = len(need.layers) if sums_on_device is None else sums_on_device
    kept, gone = need.layers[:count], need.layers[count:]
    # Buffers for what comes from the host, and the layer in use where it was kept in another form.
    brought = (AHEAD + 1) * max(gone, default=0) + need.restored
    both = need.reference_net + need.diffusion_net
    reads, denoises = (both, both) if reference_net_stays else (need.reference_net, need.diffusion_net)
    # Frames: those decoded so far; for encoding as they are, as the VAE reads them, and in its number format.
    phases = {
        "reading past frames": (reads, 0, need.reading),
        "making sums": (denoises, need.features, need.summing + brought),
        "a step": (denoises, 0, (need.step_by_row if row_by_row else need.step) + brought),
        "decoding": (denoises, 0, vae_frames * need.decoding + need.frames),
        "encoding": (denoises, 0, vae_frames * need.encoding + 3 * need.frames),
    }
    if streamed is not None:
        phases = {name: (streamed, features, working) for name, (_, features, working) in phases.items()}
    # Each net's weights once they have waited, and what is seen of several windows in one turn.
    at_once = 1 if reference_net_stays else max(1, min(MOST_WINDOWS, SEEN_AT_ONCE // need.features))
    turns = 0 if reference_net_stays else both + (at_once * need.features if at_once > 1 else 0)
    phase = max(phases, key=lambda name: sum(phases[name]))
    weights, features, working = phases[phase]
    weights += need.others if streamed is None else 0
    features, working = features + need.conditions, working + reserve
    return Plan(
        row_by_row=row_by_row,
        sums_on_device=count,
        sums_on_host=len(gone),
        reference_net_stays=reference_net_stays,
        vae_frames=vae_frames,
        windows_a_turn=at_once,
        peak=weights + sum(kept) + features + working,
        weights=weights,
        sums=sum(kept),
        features=features,
        working=working,
        on_host=sum(gone) + turns,
        phase=phase,
    )


def choose_plan(
    nets: SamplingNetworks,
    height: int,
    width: int,
    settings: Settings,
    budget_bytes: int | None = None,
    host_moves_weights: bool = False,
    streamed_weights: int = 0,
) -> Plan:
    """The fastest way to sample at height x width pixels within a budget.

    What costs least time goes first: fewer frames at once through the VAE; the Reference Net waiting in host memory;
    memory sums in host memory, from the last layer on; the two rows of guidance one after the other.

    Args:
        settings: of which guidance and speed matter.
        budget_bytes: what may be on the device, weights included; None: no limit. On the CPU, where there is no other
            place to wait, without the weights.
        host_moves_weights: a host program brings weights by itself, whole or layer by layer, so that they need not fit.
        streamed_weights: bytes of them that it has on the device even while it brings the others layer by layer.

    Raises:
        SamplingError: not even the last of these fits; it says what would.
    """
    need = needs(nets, height, width, settings, host_moves_weights)
    if budget_bytes is None:
        frames = few_frames(height, width) if nets.device.type == "cpu" else vae_frames(height, width, nets.window)[0]
        return plan_of(need, vae_frames=frames)
    streamed = streamed_weights if host_moves_weights else None
    for choices in _choices(need, nets, height, width, settings, streamed):
        made = plan_of(need, **choices)
        if made.peak <= budget_bytes:
            return made

    def smallest(how: Settings) -> Plan:
        return least_plan(nets, height, width, how, host_moves_weights, streamed_weights)

    raise SamplingError(_too_large(smallest, nets.device, height, width, settings, budget_bytes))


def smaller_plan(
    nets: SamplingNetworks,
    height: int,
    width: int,
    settings: Settings,
    than: Plan,
    host_moves_weights: bool = False,
    streamed_weights: int = 0,
) -> Plan | None:
    """The next plan that takes less, felt so: one some MB smaller would fail as well. None after the last."""
    try:
        return choose_plan(nets, height, width, settings, int(than.peak * 0.9), host_moves_weights, streamed_weights)
    except SamplingError:
        last = least_plan(nets, height, width, settings, host_moves_weights, streamed_weights)
        return last if last.peak < than.peak else None


def least_plan(
    nets: SamplingNetworks,
    height: int,
    width: int,
    settings: Settings,
    host_moves_weights: bool = False,
    streamed_weights: int = 0,
) -> Plan:
    """The plan that takes least."""
    need = needs(nets, height, width, settings, host_moves_weights)
    streamed = streamed_weights if host_moves_weights else None
    return plan_of(need, **list(_choices(need, nets, height, width, settings, streamed))[-1])


def _choices(
    need: Needs, nets: SamplingNetworks, height: int, width: int, settings: Settings, streamed: int | None
) -> Iterator[dict[str, Any]]:
    """What `plan_of` may be given, fastest first; `streamed` where a host can bring weights layer by layer."""
    ways = (False, True) if settings.guided else (False,)
    if nets.device.type == "cpu":
        fixed = {"streamed": 0, "reserve": 0, "vae_frames": few_frames(height, width)}
        yield from ({"row_by_row": row_by_row, **fixed} for row_by_row in ways)
        return
    layers, at_once = len(need.layers), vae_frames(height, width, nets.window)
    weights = {"reference_net_stays": False} if streamed is None else {"streamed": streamed}
    # A host that streams weights does so at every step: the last resort.
    places: list[dict[str, Any]] = [{}]
    places += [
        {"sums_on_device": count, "row_by_row": row_by_row, **keep}
        for keep in ((weights,) if streamed is None else ({}, weights))
        for row_by_row in ways
        for count in range(layers, -1, -1)
    ]
    yield from ({"vae_frames": frames, **place} for place in places for frames in at_once)


def _too_large(
    smallest: Callable[[Settings], Plan], device: torch.device, height: int, width: int, settings: Settings, budget: int
) -> str:
    """Says that a size does not fit, and what does.

    Args:
        smallest: the plan at this size that takes least, for these settings or others.
    """
    from ..inputs.portrait import MAX_SIDE

    what: list[tuple[int, str]] = []
    for name, how in (("", settings), (" with guidance 1", replace(settings, guidance_scale=1.0))):
        fewest = smallest(how)
        fixed = fewest.weights + (0 if device.type == "cpu" else RESERVE)
        per_pixel = (fewest.peak - fixed) / (height * width)
        side = int((max(0, budget - fixed) / per_pixel) ** 0.5) // 64 * 64
        side = min(side, -(-max(height, width) // 64) * 64, MAX_SIDE)
        if side and side not in [other for other, _ in what]:
            what.append((side, name))
    sizes = " or ".join(f"size {side}{name}" for side, name in what)
    return (
        f"{width}x{height} pixels need at least {smallest(settings).peak / GIB:.1f} GB and {budget / GIB:.1f} GB are "
        f"available. What fits: {sizes or 'nothing'}"
    )


def check_room(
    nets: SamplingNetworks,
    height: int,
    width: int,
    settings: Settings,
    room: int | None = None,
    host_moves_weights: bool = False,
    kept: int = 0,
) -> None:
    """Refuses a size that cannot fit before anything is computed at it.

    Counted where it is cheap, at the size the checkpoint was trained at, and scaled by the number of pixels, as every
    part but the weights grows, within a tenth: so much is let pass on devices, where `plan` counts exactly, later.

    Args:
        settings: of which guidance and speed matter.
        room: bytes that sampling may take, as `plan`'s budget; None: what is free where the networks run. On the CPU
            without the weights, which are there already.
        host_moves_weights: as for `plan`.
        kept: bytes of sums that will be let go of; added to what is free, not to a given room.

    Raises:
        SamplingError: it does not fit; names the largest size that does.
    """
    if room is None:
        room = free_bytes(nets.device) if nets.device.type == "cpu" else available_bytes(nets)
        if room is None:  # nobody says what is free
            return
        room += kept
    side = 8 * nets.sample_size

    def smallest(how: Settings) -> Plan:
        need = needs(nets, side, side, settings, host_moves_weights).times(height * width / side**2)
        if settings.guided and not how.guided:  # not counted, for a message alone
            need = need.unguided()
        choices = list(_choices(need, nets, height, width, how, 0 if host_moves_weights else None))
        # On the CPU nothing is planned, unless a host does: both rows at once.
        return plan_of(need, **choices[0 if nets.device.type == "cpu" and not host_moves_weights else -1])

    # On the CPU nobody plans later: what does not fit there is killed by the system.
    certain = 1.0 if nets.device.type == "cpu" else 0.9
    if certain * smallest(settings).peak > room:
        raise SamplingError(_too_large(smallest, nets.device, height, width, settings, room))
