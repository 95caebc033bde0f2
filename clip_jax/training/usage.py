"""What a run gets out of its chips: pairs a second, the share of their peak, the memory in use.

MFU (model FLOPs utilisation; PaLM, arXiv 2204.02311, appendix B) is analytic: what the architecture and what is trained
of it ask for, forward and backward, over what the chips could have done in that time. What is computed again to save
memory does not count, nor what is not computed because all captions of a batch were shorter.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from clip_jax import flops
from clip_jax.models import variants
from clip_jax.training.program import Program


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one second of a run is measured by."""

    kind: str  # of the chips, as JAX calls them
    chips: int
    flops: int  # of a pair, its text at full length
    forward: int  # of these, those of its forward pass
    here: list[jax.Device]  # the chips of this host
    by_length: Mapping[int, int] = dataclasses.field(default_factory=dict)  # `flops`, by how far texts are computed

    @classmethod
    def of(cls, program: Program) -> "Usage":
        """Returns what a program is measured by on its devices."""
        config, arch, mesh = program.config, program.architecture, program.mesh
        factors, trains = program.optimizer.factors, program.optimizer.trains
        how = config.model.patch_dropout, config.model.lora
        towers = flops.of_pair(arch, *how)

        def loss(sides: int) -> int:  # a ring's second cosines do not count
            return flops.of_loss(1, config.data.global_batch, arch.embed_dim, ring=False, sides=sides)

        both = loss(sides=trains("image") + trains("text"))
        by_length = {
            length: flops.of_pair(variants.resized(arch, context_length=length), *how).training(factors) + both
            for length in (*config.model.compiled_lengths(), arch.text.context_length)
        }
        return cls(
            kind=mesh.devices.flat[0].device_kind,
            chips=mesh.size,
            flops=by_length[arch.text.context_length],
            forward=towers.image + towers.text + loss(sides=0),
            here=list(mesh.local_devices),
            by_length=by_length,
        )

    def scalars(self, pairs_per_second: float, lengths: Sequence[int] = ()) -> dict[str, float]:
        """Returns pairs_per_second_per_chip; mfu where the peak is known; device_memory where the devices tell.
        `lengths` are those up to which the texts of each step were computed; none: all at full length."""
        rate = pairs_per_second / self.chips
        found = {"pairs_per_second_per_chip": rate}
        if peak := flops.PEAKS.get(self.kind):
            computed = sum(self.by_length[n] for n in lengths) / len(lengths) if lengths else self.flops
            found["mfu"] = rate * computed / peak
        memory = [stats["peak_bytes_in_use"] for device in self.here if (stats := device.memory_stats())]
        return found | ({"device_memory": max(memory)} if memory else {})

    def described(self) -> str:
        """Returns what MFU counts, or why there is none."""
        cost = f"{self.flops / 1e9:,.4g} GFLOP a pair, {self.flops / self.forward:.2f} times its forward pass"
        if peak := flops.PEAKS.get(self.kind):
            return f"MFU: analytic, {cost}, {peak / 1e12:g} TFLOP/s a chip ({self.kind}, bfloat16, dense)"
        return f"MFU: none, the peak of {self.kind!r} is not known (analytic {cost})"
