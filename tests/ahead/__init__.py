"""Compiling for NVIDIA GPUs on a machine that has none: `make test-cuda` installs JAX's CUDA plugin, and runs these tests.

The plugin compiles for a GPU of which it is given a description, to machine code: what a kernel asks of shared memory, what XLA and Triton
refuse, and what memory a program takes, are found out without the GPU. Nothing is run; and cuDNN, which builds its kernels on the GPU, is not asked.
"""

import dataclasses
import functools
import importlib.metadata
import re
import subprocess
import tempfile
from pathlib import Path

import jax
import pytest

WITHOUT_PRODUCTS = {"starts_kernel", "unit_gradient_kernel"}  # kernels that add and multiply numbers, with no use for matrix units
H200, A6000 = "NVIDIA H200", "NVIDIA RTX A6000"  # compute capability 9.0, and 8.6 with the least shared memory that the default tiles are for

# Name as JAX gives it: (compute capability, shared memory of a multiprocessor, and the most of it that one program may ask for, threads, multiprocessors,
# bytes of L2 cache, of memory, and bytes per second). NVIDIA's programming guide, table of compute capabilities, and data sheets.
GPUS = {
    H200: ("major: 9 feature_extension: ACCELERATED_FEATURES", 233472, 232448, 2048, 132, 50 * 2**20, 141 * 10**9, 4800 * 10**9),
    A6000: ("major: 8 minor: 6", 102400, 101376, 1536, 84, 6 * 2**20, 48 * 10**9, 768 * 10**9),
}

DESCRIPTION = """
gpu_device_info {{
  cuda_compute_capability {{ {capability} }}
  shared_memory_per_core: {shared} shared_memory_per_block: 49152 shared_memory_per_block_optin: {most_shared}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: 128
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: {cache} device_memory_size: {memory} memory_bandwidth: {bandwidth} clock_rate_ghz: 1.8 device_address_bits: 64
  device_vendor: "NVIDIA Corporation" name: "{name}" driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


@functools.cache
def described(gpu: str):
    """The sharding of arrays that lie on one such GPU."""
    from jax.experimental import topologies

    fields = ("capability", "shared", "most_shared", "threads", "cores", "cache", "memory", "bandwidth")
    text = DESCRIPTION.format(name=gpu, **dict(zip(fields, GPUS[gpu])))
    device = topologies.get_topology_desc(gpu, "cuda", target_config=text, topology="1x1x1").devices[0]
    return jax.sharding.NamedSharding(jax.sharding.Mesh([device], ("x",)), jax.sharding.PartitionSpec())


def compiled(f, *shapes, gpu: str = H200, **options):
    """`f` of arrays of these shapes and dtypes, compiled for `gpu`; errors are the compiler's."""
    place = described(gpu)
    there = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):  # from jax 0.11 on, what Pallas' Triton form learns the device from
        lowered = jax.jit(f).trace(*there).lower()
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 3} | options)  # tests/conftest.py asks for less


@dataclasses.dataclass(frozen=True)
class Assembled:
    """What became of one kernel: its PTX, and by the assembler's own count the bytes that a thread of it spills."""

    ptx: str
    spilled: int


def assembled(f, *shapes, gpu: str = H200) -> dict[str, Assembled]:
    """The Pallas kernels of `f`, by name."""
    ptxas = next((file.locate() for name in ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12") for file in _files(name) if file.name == "ptxas"), None)
    if ptxas is None:
        pytest.skip("there is no ptxas among the CUDA packages")
    with tempfile.TemporaryDirectory() as folder:
        compiled(f, *shapes, gpu=gpu, xla_dump_to=folder)
        texts = {found[1]: text for text in map(Path.read_text, Path(folder).glob("*.ptx")) if (found := re.search(r"\.entry (\w+_kernel\w*)", text))}
        for name, text in texts.items():
            path = Path(folder, f"{name}.ptx")
            path.write_text(text)
            arch = re.search(r"^\.target (\w+)", text, re.MULTILINE)[1]
            log = subprocess.run([ptxas, "-v", f"-arch={arch}", path, "-o", "/dev/null"], capture_output=True, text=True, check=True).stderr
            texts[name] = Assembled(text, int(re.search(r"(\d+) bytes spill stores", log)[1]))
    return texts


def _files(package: str) -> list:
    try:
        return importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
