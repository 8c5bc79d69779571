"""What a chip would take for a program, read off the schedule that its compiler made (tpu_static.py)."""

import shutil
import tempfile
from typing import Any

import tpu_static
from cases import TOPOLOGIES, Case, Pass

MORE_VMEM = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
"""What a kernel gets that does not say how much VMEM it needs and does not fit into the usual: what is left to XLA for
operands is less then."""


class Compiler:
    """Compiles for chips that are not there. Made before JAX is imported, and closed after."""

    def __init__(self) -> None:
        self.dump = tempfile.mkdtemp(prefix="attention_")
        tpu_static.setup_env(self.dump)
        from jax.experimental import topologies

        self._topologies = topologies
        self._devices: dict[str, Any] = {}
        read_slices_of_operands()

    def close(self) -> None:
        """Removes what the compiler wrote."""
        shutil.rmtree(self.dump, ignore_errors=True)

    def devices(self, chip: str) -> Any:
        """Those of a chip's smallest topology."""
        if chip not in self._devices:
            found = self._topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
            self._devices[chip] = found.devices
        return self._devices[chip]

    def measure(self, chip: str, make: Any, case: Case, which: Pass, settings: dict[str, Any]) -> dict[str, Any]:
        """Microseconds of the kernels and of the whole program, bytes, and how busy its longest kernel keeps the units.

        Raises:
            ValueError: where the schedule has branches that known numbers do not decide, or skips visible pairs.
        """
        import jax

        devices = self.devices(chip)
        function, arguments = make(devices[0], case, which, settings)

        def analyzed(**options: Any) -> Any:
            info = {"jit_kwargs": options}
            return tpu_static.analyze(function, arguments, TOPOLOGIES[chip], self.dump, devices, info)

        try:
            found = analyzed()
        except jax.errors.JaxRuntimeError as error:
            if "vmem" not in str(error):
                raise
            found = analyzed(compiler_options=MORE_VMEM)
        kernels = found["kernels"].values()
        undecided = {name: kernel["unknown_branches"] for name, kernel in found["kernels"].items()}
        done = sum(kernel["mxu_flops"] * kernel["runs"] for kernel in kernels)
        if any(undecided.values()) or done < case.flops(which):
            raise ValueError(
                f"the time of a kernel is known only where all branches are and all visible pairs are done, "
                f"got {undecided} and {done} of {case.flops(which)} FLOPs"
            )
        longest = max(kernels, key=lambda kernel: kernel["us"])
        return {
            "us": sum(kernel["us"] * kernel["runs"] for kernel in kernels),
            "program_us": found["raw_us"],
            "hbm_bytes": found["hbm_bytes_per_device"],
            "temp_bytes": found["memory"]["temp"],
            "compile_seconds": found["compile_s"],
            "units": {unit: round(share, 3) for unit, share in longest.get("slot_util", {}).items()},
            "waits": round(longest["dma_stall_cycles"] / longest["cycles"], 3),
        }


def read_slices_of_operands() -> None:
    """Teaches the emulator copies of a part of an operand to SMEM: the rows of our schedule are streamed."""
    emulator: Any = tpu_static.Emulator
    whole = emulator.dma

    def dma(self: Any, operation: Any) -> Any:
        source, size = self.val(operation.args[0]), self.val(operation.args[1])
        if not operation.opc.split(".")[1].endswith("smem") or source is None or size is None:
            return whole(self, operation)
        for index, base in self.base.items():
            words = self.ow.get(index)
            for start in (base, base << 4) if words else ():
                offset = (source - start) * self.g // 4
                if 0 <= offset < len(words):  # the first of them too, or it would be copied with all after it
                    argument = operation.args[0]
                    self.ow = self.ow | {index: words[offset : offset + tpu_static.u32(size) * self.g // 4]}
                    operation.args[0] = ("c", tpu_static.s32(start))
                    try:
                        whole(self, operation)
                    finally:
                        operation.args[0], self.ow = argument, self.ow | {index: words}
                    self.dma_src = hash((self.dma_src, source))
                    return None
        return whole(self, operation)

    emulator.dma = dma
