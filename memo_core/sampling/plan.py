"""How to sample within a budget of memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How to sample within a budget. Only speed and, by `row_by_row` and `vae_frames`, the last bits depend on it.

    Attributes:
        row_by_row: the two batch rows of guidance go through the Diffusion Net one after the other.
        sums_on_device: how many memory layers, in execution order, keep their sums on the device.
        sums_on_host: how many, the rest, keep them in host memory.
        reference_net_stays: otherwise the Reference Net and the Diffusion Net take turns on the device, and the other
            one waits in host memory.
        vae_frames: how many frames go through the VAE at once.
        windows_a_turn: how many remembered windows the Reference Net looks at in one turn, if the sums are rebuilt.
        peak: bytes on the device when most is there, weights and `RESERVE` among them.
        weights, sums, features, working: what the peak is made of.
        on_host: bytes of host memory for what waits there.
        phase: what is being done at the peak.
    """

    row_by_row: bool
    sums_on_device: int
    sums_on_host: int
    reference_net_stays: bool
    vae_frames: int
    windows_a_turn: int
    peak: int
    weights: int
    sums: int
    features: int
    working: int
    on_host: int
    phase: str

    def describe(self) -> str:
        """What it does to save memory, in words."""
        words = []
        if not self.reference_net_stays:
            words.append("the two nets take turns")
        if self.sums_on_host:
            words.append(f"sums of {self.sums_on_host} of {self.sums_on_host + self.sums_on_device} layers on the host")
        if self.row_by_row:
            words.append("row by row")
        words = words or ["all on the device"]
        words.append(f"VAE {self.vae_frames} frame{'s' * (self.vae_frames > 1)} at once")
        return ", ".join(words)
