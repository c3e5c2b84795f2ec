"""Check an installed wheel: that it holds every file of the repo's packages, and that every module imports from it.

Usage: check_wheel.py WHEEL FILE_LIST, in the venv that has the wheel, outside the repo.
"""

import importlib
import pkgutil
import sys
import zipfile
from pathlib import Path

MAPPED = ("adapters", "kernels", "eval", "model_cards")  # folders of the repo that become vtok.NAME
EXTRAS = {"lmms_eval", "vllm"}  # not in [dev]; modules that need them may not import


def main(wheel: str, listing: str) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = Path(listing).read_text().split()
    wanted = {f"vtok/{f}" if f.split("/")[0] in MAPPED else f for f in files}
    if missing := sorted(wanted - inside):
        sys.exit(f"{len(missing)} files of the repo are missing from the wheel: {missing[:10]}")

    import vtok

    home = Path(vtok.__file__).parent
    if not home.is_relative_to(sys.prefix):
        sys.exit(f"vtok was imported from {home}, not from the wheel in {sys.prefix}")
    modules = [m.name for m in pkgutil.walk_packages(vtok.__path__, "vtok.")]
    for name in modules:
        if name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and error.name.split(".")[0] in EXTRAS:
                print(f"skipped {name}: needs {error.name}")
                continue
            raise
        if not Path(module.__file__).is_relative_to(home):
            sys.exit(f"{name} was imported from {module.__file__}, not from the wheel")
    if not vtok.zoo.names():
        sys.exit("the wheel carries no bundled model")
    print(f"{len(inside)} files in the wheel, {len(modules)} modules imported from it, models: {vtok.zoo.names()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
