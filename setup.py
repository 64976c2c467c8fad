"""Builds csrc/ into childtune_kernels/_C_cpu.abi3.so and _C_cuda.abi3.so; all other metadata is in pyproject.toml.

csrc/python becomes _C_python_<torch version>, for this torch and this Python alone: what it does, Python does slower.

CHILDTUNE_BUILD_EXT=auto (the default) builds what this machine can and installs the pure-Python package all the same; 1
fails instead; 0 builds nothing. What was built, or not and why, is written into the package for `childtune doctor`: pip
shows no output of a build. CUDA is built where nvcc is found and torch is a CUDA build, for TORCH_CUDA_ARCH_LIST, else
the GPU present, else 8.0, 9.0 and 10.0+PTX.
"""

import glob
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("CHILDTUNE_BUILD_EXT", "auto")
if MODE not in ("auto", "0", "1"):
    raise SystemExit(f"CHILDTUNE_BUILD_EXT must be auto, 0 or 1, got {MODE!r}")

OP_FAMILIES = ("update", "bitmask", "fisher", "selection")
CPU_SOURCES = [f"csrc/cpu/{name}.cpp" for name in (*OP_FAMILIES, "loops", "loops_avx2", "loops_avx512")]
CUDA_SOURCES = [f"csrc/cuda/{name}.cu" for name in OP_FAMILIES]
# The stable ABI of torch 2.10: one library serves every later torch.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
# The bit contract forbids contraction; errno and traps, which nobody reads, would keep loops from vectorising.
CXX_FLAGS = ["-std=c++17", "-O3", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-fvisibility=hidden", "-g0"]
RECORD = []  # a line for everything that was built or left out
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def skip(what: str, why) -> None:
    """Say in one line that something is not built, or fail if it was asked for."""
    message = f"{what} is not built ({' '.join(str(why).split())}); the package works without it, slower"
    if MODE == "1":
        raise SystemExit(f"childtune_kernels: {message}")
    RECORD.append(message)
    print(f"childtune_kernels: {message}")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def gencode_flags(torch) -> list[str]:
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    if archs == [""]:
        present = torch.cuda.is_available()
        archs = ["{}.{}".format(*torch.cuda.get_device_capability())] if present else ["8.0", "9.0", "10.0+PTX"]
    flags = []
    for arch in filter(None, archs):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def extensions() -> list[Extension]:
    if MODE == "0":
        RECORD.append("csrc is not built (CHILDTUNE_BUILD_EXT=0)")
        return []
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        skip("csrc", f"torch cannot be imported here: {error}; try pip install --no-build-isolation")
        return []
    shared = {
        "include_dirs": include_paths(),
        "depends": glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True),
        "extra_compile_args": CXX_FLAGS,
        "py_limited_api": True,
    }
    cpu = Extension(
        "childtune_kernels._C_cpu",
        ["csrc/registration.cpp", *CPU_SOURCES],
        define_macros=[*MACROS, ("CHILDTUNE_DEVICE", "CPU")],
        library_dirs=library_paths(),
        libraries=["c10", "torch_cpu"],
        **shared,
    )
    module = "_C_python_" + re.sub(r"\W", "_", torch.__version__)
    python = Extension(
        f"childtune_kernels.{module}",
        ["csrc/python/tensors.cpp"],
        define_macros=[("CHILDTUNE_MODULE", f'"{module}"'), ("CHILDTUNE_MODULE_NAME", module)],
        library_dirs=library_paths(),
        libraries=["c10", "torch_cpu", "torch", "torch_python"],
        **shared | {"py_limited_api": False},
    )
    nvcc = find_nvcc()
    if nvcc is None or torch.version.cuda is None:
        why = "nvcc is not found" if nvcc is None else f"torch {torch.__version__} is built without CUDA"
        RECORD.append(f"childtune_kernels._C_cuda is not built ({why})")
        return [cpu, python]
    cuda_home = Path(nvcc).resolve().parent.parent
    cuda = Extension(
        "childtune_kernels._C_cuda",
        ["csrc/registration.cpp", *CUDA_SOURCES],
        define_macros=[*MACROS, ("CHILDTUNE_DEVICE", "CUDA")],
        library_dirs=[*library_paths(), f"{cuda_home}/lib64", f"{cuda_home}/lib"],
        libraries=["c10", "torch_cpu", "torch_cuda", "cudart"],
        **shared,
    )
    cuda.nvcc = [nvcc, *NVCC_FLAGS, *gencode_flags(torch)]
    return [cpu, python, cuda]


class BuildWhatWeCan(build_ext):
    """build_ext that compiles .cu files with nvcc and, unless told otherwise, survives a failing compile."""

    def build_extensions(self):
        built = []
        for extension in self.extensions:
            try:
                self.compile_cuda(extension)
                self.build_extension(extension)
                built.append(extension)
                RECORD.append(f"{extension.name} is built")
            except Exception as error:
                skip(extension.name, f"{type(error).__name__}: {error}")
        self.extensions = built  # what an editable install copies into the source tree

    def compile_cuda(self, extension):
        for source in [s for s in extension.sources if s.endswith(".cu")]:
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            macros = [f"-D{name}={value}" for name, value in extension.define_macros]
            includes = [f"-I{path}" for path in extension.include_dirs]
            subprocess.run([*extension.nvcc, *macros, *includes, "-c", source, "-o", str(target)], check=True)
            extension.sources.remove(source)
            extension.extra_objects.append(str(target))


class Record(Command):
    """Writes what was built into the package, where `childtune doctor` reads it."""

    description = "record what of csrc was built"
    user_options = []
    editable_mode = False  # set by an editable install, whose package is the source tree

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def file(self) -> Path:
        return Path("" if self.editable_mode else self.build_lib, "childtune_kernels", "_build.txt")

    def run(self):
        self.file().write_text("\n".join(RECORD) + "\n", encoding="utf-8")

    def get_outputs(self) -> list[str]:
        return [str(self.file())]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class BuildAndRecord(build):
    sub_commands = [*build.sub_commands, ("record", None)]


modules = extensions()
setup(
    ext_modules=modules,
    cmdclass={"build": BuildAndRecord, "build_ext": BuildWhatWeCan, "record": Record},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
