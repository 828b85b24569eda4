"""Build the stand-in with gcc, and the environment variables that put it before NVIDIA's libraries.

python tests/cuda_stand_in/build.py FOLDER    # builds, and prints the variables for AUTOTUNE_STAND_IN_CARD
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CARDS = ("T4", "RTX 3090", "RTX 4090", "A100", "H100")
LIBRARIES = {  # by file name: sources, and what it is linked to
    "libcuda.so.1": (("driver.c", "card.c"), ("-ldl", "-lpthread")),
    "libnvidia-ml.so.1": (("nvml.c", "card.c"), ()),
    "libcudart.so.13": (("runtime.c", "card.c"), ("-l:libcuda.so.1",)),
    "libcublas.so.13": (("blas.c",), ()),
    "libcublasLt.so.13": (("blas_lt.c",), ()),
}
PRELOADED = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13")
"""torch's libraries name the folder of NVIDIA's own files, so that only a preloaded one comes before them."""
FLAGS = ("-std=gnu11", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


def build(folder: Path) -> None:
    """Compile every library into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (sources, linked) in LIBRARIES.items():
        own = [f"-Wl,-soname,{name}", "-Wl,-rpath,$ORIGIN", f"-L{folder}"]
        if name in PRELOADED:  # torch asks for versioned symbols
            versions = folder / f"{name}.map"
            versions.write_text(f"{name} {{ global: *; }};\n")
            own.append(f"-Wl,--version-script={versions}")
        command = ["gcc", *FLAGS, *own, "-o", folder / name, *(HERE / source for source in sources), *linked]
        subprocess.run(command, check=True)


def variables(folder: Path, card: str) -> dict[str, str]:
    """For processes that shall find the card; `folder` also has the file in which they count its memory together."""
    return {
        "AUTOTUNE_STAND_IN_CARD": card,
        "AUTOTUNE_STAND_IN_STATE": str(folder / "memory"),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH", "")])),
        "LD_PRELOAD": " ".join(str(folder / name) for name in PRELOADED),
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",  # on an H100 torch would choose cuDNN's attention, which is not there
    }


if __name__ == "__main__":
    asked = Path(sys.argv[1]).resolve()
    build(asked)
    for name, value in variables(asked, os.environ.get("AUTOTUNE_STAND_IN_CARD", CARDS[0])).items():
        print(f"export {name}='{value}'")
